"""The experiment over gRPC gives what learners in this process give, and the server shows it."""

import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
from server_process import ServerProcess

from experiments.cells import Cell
from experiments.service import comparison, experiment, in_process, learner_id, over_grpc, picture


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
