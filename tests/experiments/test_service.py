"""The experiment over gRPC gives what learners in this process give, and all who watch the server see that."""

import re
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from server_process import ServerProcess
from system_tools import system_tool

from experiments.cells import Cell
from experiments.service import comparison, experiment, in_process, learner_id, over_grpc, picture
from experiments.status_page import PIXELS, chart_table, photograph
from experiments.watching import RATES, compare_panels, panel_picture, panel_table, watched_by_prometheus


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return [replace(cell, stream=replace(cell.stream, examples=250)) for cell in experiment(tasks=3)]


def test_the_service_gives_what_a_process_gives(server: ServerProcess, cells: list[Cell]) -> None:
    told: list[tuple[str, int]] = []
    served = over_grpc(server.grpc_target, cells, seed=2, on_task=lambda name, sent: told.append((name, sent)))
    here = in_process(cells, seed=2)
    for one, other in zip(served, here, strict=True):
        assert one.outputs.tobytes() == other.outputs.tobytes()
        np.testing.assert_allclose(one.accuracies, other.accuracies, rtol=1e-12)
        np.testing.assert_array_equal(one.first_weights, other.first_weights)
        assert one.difference(other) < 1e-12
    assert sorted(told) == sorted((learner_id(cell), sent) for cell in cells for sent in (1, 2, 3))
    assert served[0].difference(served[2]) > 1e-3  # resets did something
    assert "| only first |" in comparison(served, here)
    picture(served, here)

    metrics = httpx.get(f"{server.http_url}/metrics").text
    for one in served:
        name = learner_id(one.cell)
        [shown] = re.findall(rf'^cbp_learner_task_accuracy{{learner="{name}"}} (\S+)$', metrics, flags=re.MULTILINE)
        assert float(shown) == pytest.approx(one.accuracies[-1], rel=1e-12)
        [weight] = re.findall(
            rf'^cbp_layer_mean_abs_weight{{layer="hidden_0",learner="{name}"}} (\S+)$', metrics, flags=re.MULTILINE
        )
        assert float(weight) == pytest.approx(one.first_weights[-1], rel=1e-12)
        status = httpx.get(f"{server.http_url}/v1/learners/{name}").json()
        assert [task["accuracy"] for task in status["progress"]["tasks"]] == pytest.approx(one.accuracies, rel=1e-12)
        history = httpx.get(f"{server.http_url}/v1/learners/{name}/plasticity?max_samples=3").json()["samples"]
        assert [sample["layers"][0]["mean_abs_weight"] for sample in history] == pytest.approx(one.first_weights)


def test_the_experiment_can_be_run_again_on_the_same_server(server: ServerProcess, cells: list[Cell]) -> None:
    first, again = (over_grpc(server.grpc_target, cells[:1], 0, lambda *_: None)[0] for _ in range(2))
    assert first.outputs.tobytes() == again.outputs.tobytes()


def test_the_dashboards_panels_show_the_learners_numbers(own_server: ServerProcess, cells: list[Cell]) -> None:
    with watched_by_prometheus(system_tool("prometheus"), own_server.http_url) as watch:
        over_grpc(own_server.grpc_target, cells, 3, lambda *_: None)
        curves = watch.curves(cells[0].steps)
    here = in_process(cells, seed=3)
    compared = compare_panels(curves, here)
    assert len(compared) == 19
    for panel in compared:
        assert panel.points >= panel.curves >= len(cells), panel
        assert (panel.difference is None) == (panel.panel in RATES)
        assert panel.difference is None or panel.difference < 1e-12, panel
    assert "| Mean weight magnitude | 12 |" in panel_table(compared)
    panel_picture(curves, here)

    of_another_run = compare_panels(curves, in_process(cells, seed=4))
    differ = {panel.panel for panel in of_another_run if panel.difference is not None and panel.difference > 1e-3}
    assert {"Accuracy", "Loss", "Mean weight magnitude", "Effective rank per unit"} <= differ


def test_the_status_page_draws_the_learners_numbers(server: ServerProcess, cells: list[Cell], tmp_path: Path) -> None:
    over_grpc(server.grpc_target, cells, 3, lambda *_: None)
    chromium = system_tool("chromium")
    charts = photograph(chromium, server.http_url, in_process(cells, seed=3), tmp_path)
    assert {chart.title for chart in charts} == {"Accuracy by task", "Mean |w|", "Dormant units", "Effective rank"}
    assert all(chart.off < PIXELS for chart in charts)
    assert "| Mean |w| | 12 | 36 |" in chart_table(charts)
    assert {path.name for path in tmp_path.iterdir()} == {"service_status.png", "service_learner.png"}
    others = photograph(chromium, server.http_url, in_process(cells, seed=4), tmp_path)
    assert any(chart.off > 1 for chart in others)
