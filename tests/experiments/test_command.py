"""The command line: what it refuses, and a whole way from runs to tables."""

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from experiments import findings
from experiments import forgetting as limits_on_forgetting
from experiments.__main__ import app
from experiments.findings import Finding, Size
from experiments.results import Results


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick enough for a test."""
    layers, tanh = findings.FINDINGS["layers"], findings.FINDINGS["utilities_tanh"]
    monkeypatch.setitem(findings.FINDINGS, "layers", with_quick_size(layers, Size(seeds=2, tasks=2, examples=60)))
    monkeypatch.setitem(findings.FINDINGS, "utilities_tanh", with_quick_size(tanh, Size(seeds=2, tasks=2, examples=60)))


def with_quick_size(finding: Finding, size: Size) -> Finding:
    return Finding(name=finding.name, question=finding.question, sizes={"quick": size}, build=finding.build)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"CBP_MNIST": ""})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_from_runs_to_tables_and_pictures(tmp_path: Path) -> None:
    chosen = ("--findings", "layers,utilities_tanh", "--output", tmp_path)
    assert invoke("run", *chosen, "--minutes", "0")[0] == 3
    status, output = invoke("run", *chosen)
    assert status == 0, output
    assert "26/26 runs, 100.0% of the work" in output
    status, output = invoke("collect", "--output", tmp_path)
    assert status == 0, output
    document = tmp_path / "paper.md"
    document.write_text("Before\n<!-- table: layers -->\nold\n<!-- end -->\nAfter\n")
    status, output = invoke("report", "--results", tmp_path, "--document", document)
    assert status == 0, output
    text = document.read_text()
    assert text.startswith("Before\n<!-- table: layers -->\n| resets in |")
    assert "| only third |" in text
    assert "old" not in text
    pictures = {"layers", "layers_score", "weights", "units", "tanh_over_time", "tanh_units"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures


def test_results_grow_by_runs_that_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the runs themselves gone, as in the repository."""
    before, after = tmp_path / "before", tmp_path / "after"
    chosen = ("--findings", "layers,utilities_tanh")
    assert invoke("run", *chosen, "--output", before)[0] == 0
    assert invoke("collect", "--output", before)[0] == 0
    layers = findings.FINDINGS["layers"]
    monkeypatch.setitem(findings.FINDINGS, "layers", with_quick_size(layers, Size(seeds=3, tasks=2, examples=60)))
    earlier = ("--earlier", before / "quick.parquet")
    status, output = invoke("run", *chosen, "--output", after, *earlier)
    assert status == 0
    assert "13/13 runs, 100.0% of the work" in output
    assert invoke("collect", "--output", after, *earlier)[0] == 0
    [old, new] = (pq.read_table(directory / "quick.parquet") for directory in (before, after))
    assert new.schema.equals(old.schema)
    assert new.slice(0, len(old)).equals(old)
    assert set(new.slice(len(old))["seed"].to_pylist()) == {2}
    assert {Results(new).of(cell).accuracy.shape for cell in findings.FINDINGS["layers"].cells("quick")} == {(3, 2)}
    [old, new] = (pq.read_table(directory / "quick-units.parquet") for directory in (before, after))
    assert len(old) > 0
    assert new.equals(old)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--protocol", "huge"], "expected one of quick, reported, full"),
        (["run", "--findings", "luck"], "expected some of layers"),
        (["report", "--results", "nowhere"], "run and collect first"),
        (["collect", "--output", "nowhere"], "run the experiments first"),
        (["run", "--findings", "layers", "--mnist", "nowhere"], "put MNIST's training files there"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = invoke(*arguments)
    assert status == 2
    assert complaint in " ".join(output.replace("│", " ").split())


def test_a_plan_says_how_long_it_takes() -> None:
    status, output = invoke("plan", "--protocol", "quick", "--findings", "layers")
    assert status == 0
    assert "| layers | 13 | 26 | 3,120 |" in output
    assert "hours in all" in output


def test_what_is_remembered_is_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = dataclasses.replace(limits_on_forgetting.STREAM, examples=100)
    monkeypatch.setattr(limits_on_forgetting, "STREAM", stream)
    document = tmp_path / "forgetting.md"
    document.write_text("<!-- table: forgetting -->\nold\n<!-- end -->\n")
    size = ("--seeds", "2", "--tasks", "10", "--scored", "2")
    assert invoke("forgetting", *size, "--document", document)[0] == 0
    lines = document.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[3:-1]] == [f"| {name}" for name in limits_on_forgetting.RESETS]
    assert all(line.count("±") == (3 if "– | –" in line else 6) for line in lines[3:-1])
    status, output = invoke("forgetting", "--tasks", "10", "--scored", "8")
    assert status == 2
    assert "--scored" in output
