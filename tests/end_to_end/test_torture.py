"""Kills and network faults while clients stream; `make torture` runs those marked so, and kills at random."""

import pytest
from faults.points import METHODS, SQLITE_POINTS
from torture import ENGINE_OF_POINT, Life, Torture, random_lives

#: By group, so that each test takes a minute or two.
_POINTS = {
    "journal": [point for point in METHODS if point.startswith("journal")],
    "catalog": ["catalog.add", "catalog.add_checkpoint"],
    "catalog-changes": ["catalog.remove_checkpoint", "catalog.restore"],
    "engine": ["checkpoint.write", "training", "training.row"],
}


def points_of(group):
    return [f"{call}/{moment}" for call in _POINTS[group] for moment in METHODS[call].moments]


def test_every_method_with_points_is_in_a_group():
    assert sorted(METHODS) == sorted(call for calls in _POINTS.values() for call in calls)


@pytest.mark.timeout(600)
def test_learners_survive_whatever_happens_at_random(tmp_path):
    outcome = Torture(tmp_path, seed=7).run(random_lives(3, seed=7))
    assert outcome.batches > 0


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", _POINTS)
def test_learners_survive_a_kill_at_every_point(tmp_path, group):
    points = points_of(group)
    # A life's first checkpoint directories, forks and restores are its only ones, or nearly so.
    lives = [
        Life(
            point=point,
            engine=ENGINE_OF_POINT.get(point, "auto"),
            nth=1 if "mkdir" in point or "catalog" in point else 3,
            seconds=60.0,
        )
        for point in points
    ]
    outcome = Torture(tmp_path, seed=1).run(lives)
    assert outcome.fired.keys() == set(points)


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("watched_sqlite")
def test_learners_survive_a_kill_within_sqlite(tmp_path):
    outcome = Torture(tmp_path, seed=1).run([Life(point=point, nth=8, seconds=60.0) for point in SQLITE_POINTS])
    assert outcome.fired.keys() == set(SQLITE_POINTS)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_learners_survive_their_engine_being_killed_at_every_point(tmp_path):
    points = [point for point in points_of("engine") if "mkdir" not in point]
    lives = [
        Life(point=point, engine=ENGINE_OF_POINT.get(point, "auto"), nth=4, victims="engine", seconds=8.0)
        for point in points
    ]
    outcome = Torture(tmp_path, seed=2).run(lives)
    assert outcome.fired.keys() == set(points)
