"""Prometheus and Grafana as deploy/ sets them up, on a real server: every query has an answer."""

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from faults.processes import children
from playwright.sync_api import sync_playwright
from server_process import wait_until
from system_tools import system_tool

from cbp_client import Client, LearnerQuarantined, Unavailable
from experiments.prometheus import DASHBOARDS, SETUP, Prometheus, filled_in, panels

ROOT = Path(__file__).parents[2]
RULES = re.findall(r"^ +- alert: (\w+)", (SETUP / "alerts.yml").read_text(), flags=re.MULTILINE)


# --- the files in deploy/ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=lambda check: " ".join(check),
)
def test_promtool_accepts(check: list[str]) -> None:
    checked = subprocess.run([system_tool("promtool"), *check], cwd=SETUP, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_is_tested_and_explained() -> None:
    tested = set(re.findall(r"alertname: (\w+)", (SETUP / "alerts_test.yml").read_text()))
    explained = set(re.findall(r"^\| `(Cbp\w+)`", (ROOT / "docs" / "operations.md").read_text(), flags=re.MULTILINE))
    assert tested == explained == set(RULES)


def test_dashboards_are_what_their_generator_makes() -> None:
    source = ROOT / "deploy" / "grafana" / "generate_dashboards.py"
    spec = importlib.util.spec_from_file_location("generate_dashboards", source)
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert {path.name: path.read_text() for path in DASHBOARDS} == generator.rendered()


def test_every_panel_says_what_it_shows() -> None:
    for path in DASHBOARDS:
        for panel in panels(path):
            assert panel["title"], path.name
            assert panel["description"], (path.name, panel["title"])
            assert panel["fieldConfig"]["defaults"]["unit"], (path.name, panel["title"])


# --- a server that trains, and a Prometheus that scrapes it --------------------------------------------------------


@pytest.fixture(scope="module")
def busy_server(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Like the shared server, but one that writes checkpoints every second."""
    another = type(server)(tmp_path_factory.mktemp("observed") / "data", "--checkpoint-interval", "1")
    another.start()
    yield another
    another.close()


@pytest.fixture(scope="module")
def observed(busy_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A learner that trains under the eyes of Prometheus."""
    target = busy_server.http_url.removeprefix("http://")
    prometheus = Prometheus(system_tool("prometheus"), tmp_path_factory.mktemp("prometheus"), target)
    stop = threading.Event()
    training = threading.Thread(target=train, args=(busy_server.grpc_target, stop))
    training.start()
    try:
        wait_until(prometheus.answers)
        for seen in ("cbp_learner_steps_total", "cbp_learner_trainability"):
            wait_until(lambda seen=seen: prometheus.values(f"count_over_time({seen}{{learner='observed'}}[1m]) >= 5"))
        yield prometheus
    finally:
        stop.set()
        training.join()
        prometheus.close()


def train(target: str, stop: threading.Event) -> None:
    """Creates a learner and teaches it one task after the other until told to stop."""
    generator = np.random.default_rng(0)
    with Client(target) as client:
        learner = client.create_learner(
            "observed",
            network={"kind": "mlp", "in_features": 8, "hidden": [16, 16], "out_features": 3, "activation": "tanh"},
            loss="cross_entropy",
            optimizer={"kind": "sgd", "lr": 0.01},
            resets={"replacement_rate": 1e-2, "maturity_threshold": 20},
            monitoring={"interval": 50, "probe_size": 64, "trainability_interval": 500},
        )
        with learner.stream("observability-test") as stream:
            for task in range(1_000_000):
                features = generator.normal(size=(256, 8)).astype(np.float32)
                stream.send(features, generator.integers(0, 3, size=256), task=f"task-{task}")
                stream.flush()
                with contextlib.suppress(Unavailable):  # while the engine starts again
                    learner.predict(features[:4])
                if stop.wait(0.05):
                    break


# --- the status page -----------------------------------------------------------------------------------------------


def test_the_example_on_the_empty_page_works(busy_server: Any) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=system_tool("chromium"), args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        page = browser.new_page()
        page.goto(busy_server.http_url)
        example = page.locator("section.empty pre").text_content()
        browser.close()
    assert example is not None
    assert '"127.0.0.1:50051"' in example
    batches = [(np.zeros((4, 64), np.float32), np.zeros(4, np.int64))]
    exec(example.replace("127.0.0.1:50051", busy_server.grpc_target), {"batches": batches})
    learner = httpx.get(f"{busy_server.http_url}/v1/learners/clicks").json()
    assert learner["progress"]["examples"] == 4


# --- what dashboards and alerts ask --------------------------------------------------------------------------------


PANEL_QUERIES = [
    pytest.param(target["expr"], id=f"{path.stem}: {panel['title']} {target['refId']}")
    for path in DASHBOARDS
    for panel in panels(path)
    for target in panel["targets"]
]
VARIABLES = [
    pytest.param(variable["query"], id=f"{path.stem}: {variable['name']}")
    for path in DASHBOARDS
    for variable in json.loads(path.read_text())["templating"]["list"]
    if variable["type"] == "query"
]


@pytest.mark.parametrize("query", PANEL_QUERIES)
def test_a_panel_has_data(observed: Prometheus, query: str) -> None:
    assert any(math.isfinite(value) for value in observed.values(filled_in(query)))


@pytest.mark.parametrize("query", VARIABLES)
def test_a_variable_has_values(observed: Prometheus, query: str) -> None:
    asked = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert asked is not None
    selector, label = asked.groups()
    assert observed.get(f"/label/{label}/values", **{"match[]": filled_in(selector)})


def test_alerts_evaluate_and_ask_for_metrics_that_exist(observed: Prometheus) -> None:
    known = set(observed.get("/label/__name__/values"))
    rules = [rule for group in observed.get("/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(RULES)
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert set(re.findall(r"\bcbp_\w+|\bup\b", rule["query"])) <= known, rule["name"]


def test_a_quarantine_is_seen_until_it_is_over(observed: Prometheus, busy_server: Any) -> None:
    alert = 'ALERTS{alertname="CbpLearnerQuarantined", learner="overflowing", alertstate="firing"}'
    with Client(busy_server.grpc_target) as client:
        learner = client.create_learner(
            "overflowing",
            network={"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3},
            loss="cross_entropy",
            optimizer={"kind": "adam", "lr": 0.01},
        )
        stream = learner.stream("observability-test")
        stream.open()
        with pytest.raises(LearnerQuarantined):
            stream.send(np.full((16, 4), 3e38, np.float32), np.zeros(16, np.int64)).result(timeout=30)
        stream.abort()
        wait_until(lambda: observed.values(alert))
        server = httpx.get(f"{busy_server.http_url}/v1/server").json()
        assert server["quarantined"] == ["overflowing"]
        assert observed.values("cbp_quarantines_total") == [1]
        learner.resume(skip_batch=True)
        wait_until(lambda: not observed.values(alert))
        learner.delete()
    wait_until(lambda: observed.values('cbp_learners{state="deleted"} == 1'))
    assert observed.values('cbp_learner_steps_total{learner="overflowing"}') == []


def test_a_busy_learner_is_recovered_after_the_engine_dies(observed: Prometheus, busy_server: Any) -> None:
    before = observed.values("cbp_recovery_duration_seconds_count")[0]
    for pid in children(busy_server.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: observed.values("cbp_recovery_duration_seconds_count")[0] > before)
    wait_until(lambda: observed.values('cbp_learners{state="unavailable"} == 0'))
    (unsaved,) = observed.values('cbp_learner_unsaved_entries{learner="observed"}')
    assert unsaved < 1000


@pytest.mark.usefixtures("observed")
def test_promtool_has_nothing_to_say_about_a_real_servers_metrics(busy_server: Any) -> None:
    text = httpx.get(f"{busy_server.http_url}/metrics").content
    checked = subprocess.run(
        [system_tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
