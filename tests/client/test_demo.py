"""The demo, small: data, the whole run against a server of its own and against a given one, and its report."""

import re
from contextlib import closing

import numpy as np
import pytest
from PIL import Image
from server_process import ServerProcess
from typer import Typer
from typer.testing import CliRunner

from cbp_client import Client
from cbp_client.demo.command import demo
from cbp_client.demo.digits import PIXELS, digit_tasks

app = Typer()
app.command()(demo)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--tasks", "3", "--examples", "60"])
    assert result.exit_code == 0, result.output
    return result.output


def test_tasks_show_the_same_kind_of_images_under_ever_new_permutations():
    first, second = digit_tasks(2, 500, seed=3)
    assert first.features.shape == second.features.shape == (500, PIXELS)
    assert first.features.dtype == np.float32
    assert 0 <= first.features.min() < first.features.max() <= 1
    assert set(first.labels) == set(second.labels) == set(range(10))
    assert first.features.sum(axis=1).mean() == pytest.approx(second.features.sum(axis=1).mean(), rel=0.05)
    pixel_means = np.corrcoef(first.features.mean(axis=0), second.features.mean(axis=0))
    assert abs(pixel_means[0, 1]) < 0.3  # unpermuted it would be near 1
    assert len(np.unique(first.features, axis=0)) == 500


def test_the_stream_is_that_of_its_seed():
    first, again, other = (next(digit_tasks(1, 20, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.features, again.features)
    assert not np.array_equal(first.features, other.features)


def test_the_demo_starts_a_server_and_leaves_picture_and_learners(tmp_path):
    output = run("--output", str(tmp_path))

    picture = Image.open(tmp_path / "demo.png")
    assert picture.width > 1000
    assert picture.convert("L").getextrema() != (255, 255)
    for label in ("backprop", "resets: first layer", "resets: all layers"):
        assert label in output
    assert re.search(r"cbp-server --data-dir", output)
    assert not (tmp_path / "data" / "endpoints.json").exists()  # its server has ended
    again = ServerProcess(tmp_path / "data")
    again.start()
    with closing(again), Client(again.grpc_target) as client:
        assert {learner.id for learner in client.list_learners()} == {"demo-all", "demo-backprop", "demo-first"}


def test_the_demo_can_use_a_running_server_and_be_repeated(server, tmp_path):
    for _ in range(2):
        run("--output", str(tmp_path), "--server", server.grpc_target)
    with Client(server.grpc_target) as client:
        learners = [client.get_learner(f"demo-{name}") for name in ("backprop", "first", "all")]
        for learner in learners:
            assert learner.info.progress.examples == 180
            assert [task.examples for task in learner.info.progress.tasks] == [60, 60, 60]
        layers = [learner.info.spec["resets"]["layers"] for learner in learners]
        assert layers == [["none"], ["first"], ["all"]]
        for learner in learners:
            learner.delete()
