"""How trainable a learner still is, measured on a copy."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cbp import Batch, Learner, LearnerSpec, SnapshotError, Trainability, measure_trainability
from cbp.trainability import LEAST_TASK_EXAMPLES, PASSES, TASK_EXAMPLES

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]
LOSSES = ("cross_entropy", "mse", "huber", "binary_cross_entropy")


def as_born(make_spec: MakeSpec, make_batch: MakeBatch, examples: int = 200, **changes: Any) -> Learner:
    """A learner whose probe is full and whose parameters are those it was born with; its steps are real from now on."""
    frozen = make_spec(optimizer__lr=1e-30, resets__layers="none", **changes)
    learner = Learner(frozen)
    learner.train(make_batch(frozen, examples))
    learner.update(frozen.model_copy(update={"optimizer": frozen.optimizer.model_copy(update={"lr": 0.05})}))
    return learner


@pytest.mark.parametrize("loss", LOSSES)
def test_a_newborn_is_as_trainable_as_itself(loss: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch, loss=loss)
    tested = measure_trainability(learner.snapshot())
    assert tested is not None
    assert tested.step == 100
    assert tested.loss == tested.fresh_loss
    assert tested.fresh_loss is not None
    assert tested.fresh_loss < tested.chance_loss
    assert tested.score in (1.0, None)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dead_network_is_no_better_than_chance(loss: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch, loss=loss, network__hidden=[32, 32])
    learner._state.parameters.biases[0][:] = -1e6
    tested = measure_trainability(learner.snapshot())
    assert tested is not None
    assert tested.loss is not None
    assert tested.loss > 0.95 * tested.chance_loss, "only the last layer's biases can learn"
    assert tested.score is not None
    assert tested.score < 0.3


def test_the_task_is_another_at_every_step_and_the_same_each_time(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch)
    first = measure_trainability(learner.snapshot())
    assert measure_trainability(learner.snapshot()) == first
    batch = make_batch(learner.spec, 2)
    learner.train(batch)
    second = measure_trainability(learner.snapshot())
    assert first is not None
    assert second is not None
    assert second.fresh_loss != first.fresh_loss


@pytest.mark.parametrize("engine", ["torch", "compiled", "stacked"])
@pytest.mark.parametrize("waiting", [0, 3])
def test_it_changes_nothing(engine: Any, waiting: int, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """Bit for bit: not what the learner is, and not what becomes of it. Examples that wait have no part in it."""
    spec = make_spec(optimizer={"kind": "adam", "lr": 0.01}, batch_size=4)
    watched, alone = Learner(spec, engine=engine), Learner(spec, engine=engine)
    for learner in (watched, alone):
        learner.train(make_batch(spec, 200 + waiting))
    before = watched.snapshot()
    assert before.metadata["step"] == 50
    tested = measure_trainability(before, engine=engine)
    assert tested is not None
    for learner in (watched, alone):
        learner.train(make_batch(spec, 101, seed=1))
    expected = alone.snapshot()
    for snapshot in (watched.snapshot(),):
        assert snapshot.metadata == expected.metadata
        for name, tensor in expected.tensors.items():
            assert torch.equal(snapshot.tensors[name], tensor), name
    random = torch.get_rng_state()
    assert measure_trainability(before, engine=engine) == tested, "the snapshot is as it was, too"
    assert torch.equal(torch.get_rng_state(), random)


def test_engines_agree(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch)
    tests = [measure_trainability(learner.snapshot(), engine=engine) for engine in ("torch", "compiled")]
    losses = [test.loss for test in tests if test is not None]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("batch_size", "probe", "steps"),
    [
        (1, 512, PASSES * TASK_EXAMPLES),
        (0, 512, PASSES * TASK_EXAMPLES // 16),
        (50, 512, PASSES * 2),
        (500, 512, PASSES),
        (1, 40, PASSES * 40),
    ],
)
def test_steps_and_examples_are_bounded(
    batch_size: int, probe: int, steps: int, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learner = as_born(make_spec, make_batch, 600, batch_size=batch_size, monitoring__probe_size=probe)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    measure_trainability(learner.snapshot(), between_steps=count)
    assert calls == 2 * steps


def test_too_few_examples_are_no_test(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    few = as_born(make_spec, make_batch, LEAST_TASK_EXAMPLES - 2)
    enough = as_born(make_spec, make_batch, LEAST_TASK_EXAMPLES)
    assert measure_trainability(few.snapshot()) is None
    assert measure_trainability(enough.snapshot()) is not None


def test_a_copy_that_diverges_has_no_loss(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch, loss="mse")
    for weight in learner._state.parameters.weights:
        weight.mul_(1e12)
    tested = measure_trainability(learner.snapshot())
    assert tested is not None
    assert tested.loss is None
    assert tested.fresh_loss is not None
    assert tested.score is None


def test_between_steps_may_end_it(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    def stop() -> None:
        raise InterruptedError

    learner = as_born(make_spec, make_batch)
    with pytest.raises(InterruptedError):
        measure_trainability(learner.snapshot(), between_steps=stop)


def test_a_snapshot_without_a_probe_is_refused(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    snapshot = as_born(make_spec, make_batch).snapshot()
    del snapshot.tensors["probe.features"]
    with pytest.raises(SnapshotError, match=r"probe\.features"):
        measure_trainability(snapshot)


@pytest.mark.parametrize(
    ("loss", "fresh_loss", "score"),
    [
        (1.0, 1.0, 1.0),
        (1.5, 1.0, 0.5),
        (2.0, 1.0, 0.0),
        (3.0, 1.0, -1.0),
        (0.5, 1.0, 1.5),
        (1.0, 1.95, None),  # the fresh one learnt next to nothing
        (1.0, 2.5, None),
        (None, 1.0, None),
        (1.0, None, None),
    ],
)
def test_the_score_by_hand(loss: float | None, fresh_loss: float | None, score: float | None) -> None:
    assert Trainability(step=1, loss=loss, fresh_loss=fresh_loss, chance_loss=2.0).score == score


def test_chance_is_the_best_constant_prediction(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = as_born(make_spec, make_batch, network__out_features=4)
    tested = measure_trainability(learner.snapshot())
    assert tested is not None
    assert tested.chance_loss == pytest.approx(math.log(4), rel=1e-5), "128 examples of 4 labels, 32 of each"
