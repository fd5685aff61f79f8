"""Every benchmark still runs, and is where its readers look for it. What it measures is no matter of tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Of each script, flags that make it quick.
SCRIPTS = {
    "step_cost": ["--quick"],
    "stacked_steps": ["--quick"],
    "plasticity_samples": ["--quick"],
    "service_throughput": ["--quick"],
    "service_latency": ["--quick"],
    "many_learners": ["--quick"],
    "server_start": ["--quick"],
    "gpu_steps": ["--quick"],
    "durability": ["--quick", "--part", "ingest"],
}
#: Too long, even so, to be run with every change.
LONG = {"service_throughput", "service_latency", "many_learners", "durability"}
#: Started by others.
HELPERS = {"echo"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.torture) if name in LONG else name for name in SCRIPTS]
)
def test_a_benchmark_prints_its_tables(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CBP_")}
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / f"{name}.py"), *SCRIPTS[name]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "\n|---|" in done.stdout or "\nskipped: " in done.stdout


def test_every_benchmark_is_run_by_make_and_described_in_the_docs() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    makefile, docs = (ROOT / "Makefile").read_text(), (ROOT / "docs" / "benchmarks.md").read_text()

    assert scripts - HELPERS == set(SCRIPTS)
    for name in SCRIPTS:
        assert f"benchmarks/{name}.py" in makefile
        assert f"`python benchmarks/{name}.py`" in docs
