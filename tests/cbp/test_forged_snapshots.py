"""Whatever stands in a snapshot: it is refused by name, or it makes a learner that harms nobody."""

import json
import random
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from forging import SPECS, Forgery, batch_of, forgeries, good_snapshot
from network_kinds import install_architectures, plain_spec

from cbp import CbpError, DivergenceError, Learner, LearnerProgress, LearnerSnapshot, SnapshotError

_LARGEST_ON_THE_WIRE = 2**63 - 1
_OF_PERCEPTRONS, _OF_MODULES = 60, 12
"""Forgeries of one snapshot in the short form; there are some thousands, and modules take their time."""
_LARGEST_STEP = 10_000
"""Larger ones are for the service's limits to refuse, as where a learner is created."""
REGISTERED = "registered"
KINDS = [*SPECS, "mlp, adam on torch", "mlp, sgd stacked", REGISTERED]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A package of an operator, installed."""
    directory = tmp_path_factory.mktemp("architectures")
    install_architectures(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield
    sys.modules.pop("acme_networks", None)


@cache
def snapshot_of(kind: str) -> tuple[LearnerSnapshot, Any]:
    """A good one, and the engine for it."""
    plain, engine = SPECS.get(kind, {}), "auto"
    if kind == REGISTERED:
        network = {"kind": "registered", "name": "small", "shape": [3, 4], "settings": {"units": 10}, "out_features": 3}
        plain = plain_spec("linear", network=network)
    elif not plain:
        plain, engine = SPECS["mlp, adam"], "torch"
        if "stacked" in kind:
            plain, engine = SPECS["mlp, sgd"], "stacked"
    return good_snapshot(plain, engine), engine


def assert_harmless(learner: Learner, engine: Any) -> None:
    """What the service does with a learner can be done with it."""
    show(learner.progress)
    learner.predict(batch_of(learner.spec, 3).features)
    learner.sample_plasticity().to_plain()
    if learner.spec.batch_size > _LARGEST_STEP:
        return
    try:
        for seed in range(2):
            learner.train(batch_of(learner.spec, 10, seed, task=f"task {seed}"))
    except DivergenceError:  # large numbers may; the service quarantines the learner
        return
    show(learner.progress)
    again = LearnerSnapshot.from_bytes(learner.snapshot().to_bytes())
    Learner.restore(again, engine=engine)


def show(progress: LearnerProgress) -> None:
    """All of it fits into the messages of the wire."""
    counts = [progress.step, progress.examples, progress.pending, progress.task_count, *progress.replacements.values()]
    for task in progress.tasks:
        counts += [task.first_step, task.steps, task.examples]
        assert isinstance(task.task, str)
        task.task.encode()
    assert all(type(count) is int and 0 <= count <= _LARGEST_ON_THE_WIRE for count in counts)
    assert LearnerProgress.from_plain(json.loads(json.dumps(progress.to_plain()))) == progress


def try_all(kind: str, forged: Sequence[Forgery]) -> list[str]:
    """What went wrong with each."""
    snapshot, engine = snapshot_of(kind)
    wrong = []
    for forgery in forged:
        data = forgery.change(snapshot).to_bytes()
        try:
            learner = Learner.restore(LearnerSnapshot.from_bytes(data), engine=engine)
            assert_harmless(learner, engine)
        except SnapshotError as error:
            named = {violation.field for violation in error.violations}
            if not named and "nested" not in str(error) and "JSON object" not in str(error):
                wrong.append(f"{forgery}: refused without a name: {error}")
        except Exception as error:
            if isinstance(error, CbpError) and engine != "auto" and str(error).startswith("engine:"):
                continue  # this one, which was asked for, does not run what the specification has become
            wrong.append(f"{forgery}: {type(error).__name__}: {error}")
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced_is_refused_or_does_no_harm(kind: str) -> None:
    forged = forgeries(snapshot_of(kind)[0])
    count = _OF_PERCEPTRONS if kind.startswith("mlp,") else _OF_MODULES
    assert try_all(kind, random.Random(kind).sample(forged, count)) == []


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_replaced_is_refused_or_does_no_harm(kind: str) -> None:
    assert try_all(kind, forgeries(snapshot_of(kind)[0])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_good_snapshots_are_taken(kind: str) -> None:
    snapshot, engine = snapshot_of(kind)
    assert_harmless(Learner.restore(LearnerSnapshot.from_bytes(snapshot.to_bytes()), engine=engine), engine)
