"""Training that overflows is noticed, named, and never counted."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from network_kinds import PERCEPTRON_ENGINES

from cbp import Batch, CbpError, DivergenceError, Learner, LearnerSpec
from cbp.engines.names import EngineName

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]

OPTIMIZERS: list[dict[str, Any]] = [{"kind": kind, "lr": 1e30} for kind in ("sgd", "rmsprop", "adam", "adamw")]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "huber", "binary_cross_entropy"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["kind"])
def test_every_loss_and_optimizer_can_diverge(
    loss: str, optimizer: dict[str, Any], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = make_spec(loss=loss, optimizer=optimizer, monitoring__interval=1)
    learner = Learner(spec)
    before = learner.progress
    with pytest.raises(DivergenceError, match="diverged: at step") as raised:
        learner.train(make_batch(spec, 40, task="a"))
    assert 1 < raised.value.step <= 20
    assert (learner.progress.loss, learner.progress.tasks) == (before.loss, before.tasks)


def test_the_step_is_that_of_the_first_wrong_prediction(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(network__activation="identity")
    learner = Learner(spec)
    learner.train(make_batch(spec, 10))
    features = make_batch(spec, 20, seed=1).features.copy()
    features[[6, 9]] = 3e38
    with pytest.raises(DivergenceError) as raised:
        learner.train(Batch.validate(spec, features, np.zeros(20, dtype=np.int64)))
    assert (raised.value.step, raised.value.what) == (5 + 4, "outputs")


def test_a_loss_may_overflow_though_the_outputs_do_not(make_spec: MakeSpec) -> None:
    spec = make_spec(loss="mse")
    targets = np.zeros((4, 3))
    targets[3, 1] = 1e30
    with pytest.raises(DivergenceError) as raised:
        Learner(spec).train(Batch.validate(spec, np.ones((4, 6)), targets))
    assert (raised.value.step, raised.value.what) == (2, "loss")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_parameters_are_checked_after_the_last_step(kind: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """The predictions of a single step are made before it, and show nothing of what it does."""
    spec = make_spec(optimizer={"kind": kind, "lr": 3e38}, batch_size=0)
    learner = Learner(spec)
    batch = make_batch(spec, 4)
    learner._state.parameters.flat.mul_(1e3)
    with pytest.raises(DivergenceError) as raised:
        learner.train(Batch.validate(spec, batch.features, batch.targets, np.full(4, 1e3)))
    assert (raised.value.step, raised.value.what) == (1, "parameters")


@pytest.mark.parametrize("engine", PERCEPTRON_ENGINES)
def test_clipping_hides_no_infinite_gradient(engine: EngineName, make_spec: MakeSpec) -> None:
    """Of the weights, where those in the outputs are still finite."""
    optimizer = {"kind": "sgd", "lr": 0.1, "clip_norm": 1.0}
    spec = make_spec(loss="mse", optimizer=optimizer, network__activation="identity")
    learner = Learner(spec, engine=engine)
    learner._state.parameters.weights[1].zero_()  # so that outputs are 0, whatever the weights behind
    learner._state.parameters.weights[2].fill_(1e30)
    with pytest.raises(DivergenceError):
        learner.train(Batch.validate(spec, np.ones((4, 6)), np.full((4, 3), 1e15)))


@pytest.mark.parametrize("kind", ["rmsprop", "adam", "adamw"])
def test_an_infinite_second_moment_is_noticed(kind: str, make_spec: MakeSpec) -> None:
    """It would leave loss and parameters finite, and its parameters without a step for ever."""
    spec = make_spec(optimizer={"kind": kind, "lr": 1e-3})
    with pytest.raises(DivergenceError) as raised:
        Learner(spec).train(Batch.validate(spec, np.full((2, 6), 1e25), np.zeros(2, dtype=np.int64)))
    assert (raised.value.step, raised.value.what) == (1, "optimizer state")


def test_large_finite_numbers_are_let_be(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """Their sum is infinite; they are not."""
    spec = make_spec(network__activation="identity", optimizer__lr=1e-30)
    learner = Learner(spec)
    learner._state.parameters.biases[-1].fill_(3e38)
    assert torch.isinf(learner._state.parameters.flat.sum())
    assert learner.train(make_batch(spec, 2)).steps == 1


def test_it_wins_over_an_exception_between_steps(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(optimizer__lr=3e38, loss="mse")

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(DivergenceError) as raised:
        Learner(spec).train(make_batch(spec, 10), between_steps=stop)
    assert isinstance(raised.value.__context__, InterruptedError)


def test_a_snapshot_from_before_goes_on(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(loss="mse")
    learner, undisturbed = Learner(spec), Learner(spec)
    for each in (learner, undisturbed):
        each.train(make_batch(spec, 10))
    snapshot = learner.snapshot()
    with pytest.raises(DivergenceError):
        learner.train(Batch.validate(spec, np.full((2, 6), 1e30), np.zeros((2, 3))))
    restored = Learner.restore(snapshot)
    for each in (restored, undisturbed):
        each.train(make_batch(spec, 10, seed=1))
    assert torch.equal(restored._state.parameters.flat, undisturbed._state.parameters.flat)


def test_the_error_crosses_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(DivergenceError(7, "optimizer state")))
    assert isinstance(error, CbpError)
    assert (error.step, error.what) == (7, "optimizer state")
    assert str(error) == "Training diverged: at step 7 the optimizer state became infinite or not a number"
