"""Kills and network faults while clients stream; `make torture` is the long run."""

import pytest
from faults.points import POINTS
from torture import Life, Torture, random_lives

_GROUPS = sorted({point.partition(".")[0].partition("/")[0] for point in POINTS})


def test_learners_survive_whatever_happens_at_random(tmp_path):
    outcome = Torture(tmp_path, seed=7).run(random_lives(5, seed=7))
    assert outcome.batches > 0


@pytest.mark.parametrize("group", _GROUPS)
def test_learners_survive_a_kill_at_every_point(tmp_path, group):
    points = [point for point in POINTS if point.startswith(group)]
    lives = [Life(point=point, nth=3, victims="all", seconds=20.0) for point in points]
    outcome = Torture(tmp_path, seed=1).run(lives)
    assert outcome.fired.keys() == set(points)


def test_learners_survive_their_engine_being_killed_at_every_point(tmp_path):
    points = [point for point in POINTS if point.startswith(("training", "checkpoint"))]
    lives = [Life(point=point, nth=4, victims="engine", seconds=8.0) for point in points]
    outcome = Torture(tmp_path, seed=2).run(lives)
    assert outcome.fired.keys() == set(points)
