"""Learners that train together are, bit for bit, learners that train alone."""

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pytest
import torch

from cbp import (
    Batch,
    BatchError,
    CbpError,
    DivergenceError,
    Learner,
    LearnerSnapshot,
    LearnerSpec,
    TrainResult,
    train_together,
)
from cbp.engines import stacked_engine
from cbp.engines.compiled import engine as compiled_engine
from cbp.engines.names import EngineName
from cbp.engines.stacked_engine import stack_width
from cbp.spec.learner_spec import Activation, LossKind, Utility

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]
Outcome = TrainResult | DivergenceError

OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.05},
    "decay": {"kind": "sgd", "lr": 0.02, "weight_decay": 0.01},
    "momentum": {"kind": "sgd", "lr": 0.02, "momentum": 0.9},
    "nesterov": {"kind": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"kind": "rmsprop", "lr": 0.003},
    "rmsprop_momentum": {"kind": "rmsprop", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.01},
    "clipped": {"kind": "sgd", "lr": 0.05, "clip_norm": 0.5},
    "adam": {"kind": "adam", "lr": 0.01},
    "adamw": {"kind": "adamw", "lr": 0.01},
}
WIDTH = 64
"""Rows of a stack of small networks on the CPU."""


def learners_of(make_spec: MakeSpec, count: int, optimizer: str = "sgd", **changes: Any) -> list[Learner]:
    """Of one kind, each with settings of its own."""
    random = np.random.default_rng(count)
    learners = []
    for seed in range(count):
        resets = {
            "replacement_rate": random.choice([0.0, 0.03, 0.2]),
            "maturity_threshold": int(random.choice([0, 3, 8])),
            "decay_rate": random.choice([0.8, 0.99]),
            "bias_compensation": bool(random.integers(2)),
            "strength": changes.get("resets__strength", 1.0),
            "max_replacements": int(random.integers(1, 4)) if random.integers(2) else None,
            "replacement_window": int(random.integers(5, 30)),
            "utility": changes.get("resets__utility", "adaptable_contribution"),
        }
        settings = OPTIMIZERS[optimizer] | {"lr": OPTIMIZERS[optimizer]["lr"] * random.uniform(0.2, 1)}
        interval = int(random.choice([0, 7]))
        own = {"resets": resets, "optimizer": settings, "seed": seed, "monitoring__interval": interval}
        learners.append(Learner(make_spec(**(own | changes)), engine="stacked"))
    return learners


def copies(learners: Sequence[Learner], device: str = "cpu", engine: EngineName = "stacked") -> list[Learner]:
    return [Learner.restore(learner.snapshot(), device=device, engine=engine) for learner in learners]


def assert_same(actual: Learner, expected: Learner) -> None:
    of_actual, of_expected = actual.snapshot(), expected.snapshot()
    assert of_actual.metadata == of_expected.metadata
    for name, tensor in of_expected.tensors.items():
        assert torch.equal(of_actual.tensors[name], tensor), name
    assert list(actual._samples) == list(expected._samples)


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    assert type(actual) is type(expected)
    if isinstance(actual, DivergenceError) or isinstance(expected, DivergenceError):
        assert actual.args == expected.args  # type: ignore[union-attr]
        return
    assert asdict(actual) | {"outputs": None} == asdict(expected) | {"outputs": None}
    np.testing.assert_array_equal(actual.outputs, expected.outputs)


def alone(learner: Learner, batch: Batch) -> Outcome:
    try:
        return learner.train(batch, return_outputs=True)
    except DivergenceError as divergence:
        return divergence


def assert_company_changes_nothing(
    learners: Sequence[Learner], make_batch: MakeBatch, longest: int, device: str = "cpu", rounds: int = 3
) -> None:
    """In every round some learners train, each on a message of its own length: alone, all together, and in groups."""
    by_themselves, together, grouped = (copies(learners, device) for _ in range(3))
    random = np.random.default_rng(longest)
    for seed in range(rounds):
        chosen = random.permutation(len(learners))[: random.integers(2, len(learners) + 1)].tolist()
        batches = {
            place: make_batch(
                learners[place].spec,
                int(random.integers(1, longest)),
                seed=seed * 1000 + place,
                weighted=place % 2 == 1,
            )
            for place in chosen
        }
        expected = [alone(by_themselves[place], batches[place]) for place in chosen]
        outcomes = train_together([(together[place], batches[place]) for place in chosen], return_outputs=True)
        cut = int(random.integers(len(chosen)))
        in_groups = [
            outcome
            for group in (chosen[:cut], chosen[cut:])
            for outcome in train_together([(grouped[place], batches[place]) for place in group], return_outputs=True)
        ]
        for one, other, reference in zip(outcomes, in_groups, expected, strict=True):
            assert_same_outcome(one, reference)
            assert_same_outcome(other, reference)
    for one, other, reference in zip(together, grouped, by_themselves, strict=True):
        assert_same(one, reference)
        assert_same(other, reference)


@pytest.mark.parametrize("utility", get_args(Utility))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grouping_with_every_optimizer_and_utility(
    optimizer: str, utility: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learners = learners_of(make_spec, 4, optimizer, resets__utility=utility, batch_size=1 + 2 * (len(utility) % 2))
    assert_company_changes_nothing(learners, make_batch, 30)


@pytest.mark.parametrize("loss", get_args(LossKind))
@pytest.mark.parametrize("activation", get_args(Activation))
def test_grouping_with_every_activation_and_loss(
    activation: str, loss: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learners = learners_of(make_spec, 4, network__activation=activation, loss=loss, batch_size=3)
    assert_company_changes_nothing(learners, make_batch, 30)


@pytest.mark.parametrize("hidden", [[1], [33], [17, 5], [64, 64, 64]])
@pytest.mark.parametrize("batch_size", [0, 1, 7, 16])
def test_grouping_with_every_size(
    batch_size: int, hidden: list[int], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    network = {"kind": "mlp", "in_features": 2 * len(hidden) + 35, "hidden": hidden, "out_features": 11}
    learners = learners_of(make_spec, 5, network=network, batch_size=batch_size)
    assert_company_changes_nothing(learners, make_batch, 5 * max(batch_size, 1), rounds=2)


def test_more_learners_than_rows(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, WIDTH + 3)
    assert stack_width(learners[0].spec.network, 2, torch.device("cpu")) == WIDTH
    assert_company_changes_nothing(learners, make_batch, 12, rounds=2)


def test_a_network_too_large_to_gain_takes_its_steps_alone(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    network = {"kind": "mlp", "in_features": 700, "hidden": [300], "out_features": 3}
    learners = learners_of(make_spec, 2, network=network)
    assert stack_width(learners[0].spec.network, 2, torch.device("cpu")) == 1
    assert_company_changes_nothing(learners, make_batch, 8)


def test_learners_of_every_kind_and_engine_in_one_call(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    specs = [
        make_spec(seed=seed, **changes)
        for seed, changes in enumerate(
            (
                {},
                {"batch_size": 3},
                {"optimizer__momentum": 0.5},
                {"optimizer__weight_decay": 0.1},
                {"optimizer": {"kind": "adam", "lr": 0.01}},
                {"loss": "mse"},
                {"resets__utility": "random"},
                {"network__hidden": [4]},
                {},
            )
        )
    ]
    engines: list[EngineName] = ["stacked"] * 8 + ["torch", "compiled"]
    specs.append(make_spec(seed=9))
    first, second = (
        [Learner(spec, engine=engine) for spec, engine in zip(specs, engines, strict=True)] for _ in range(2)
    )
    batches = [make_batch(spec, 41, seed=seed, task="a") for seed, spec in enumerate(specs)]
    outcomes = train_together(list(zip(first, batches, strict=True)), return_outputs=True)
    for learner, other, batch, outcome in zip(first, second, batches, outcomes, strict=True):
        assert_same_outcome(outcome, other.train(batch, return_outputs=True))
        assert_same(learner, other)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("utility", ["adaptable_contribution", "random"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_learners_of_the_compiled_engine(
    batch_size: int,
    utility: str,
    threads: int,
    make_spec: MakeSpec,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of any architecture, with any number of steps, on any number of threads."""
    shapes = [[9, 8, 7], [5], [12, 3]]
    first = [
        learner
        for place, name in enumerate([*OPTIMIZERS, "sgd", "adam"])
        for learner in learners_of(
            make_spec, 1, name, network__hidden=shapes[place % 3], resets__utility=utility, batch_size=batch_size
        )
    ]
    by_themselves, together, watched = (copies(first, engine="compiled") for _ in range(3))
    monkeypatch.setattr(compiled_engine, "_WORTH_THREADS", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(3):
        batches = [
            make_batch(learner.spec, (1 + 13 * (place + seed) % 61) * batch_size, seed=seed)
            for place, learner in enumerate(first)
        ]
        expected = [alone(learner, batch) for learner, batch in zip(by_themselves, batches, strict=True)]
        for learners, between_steps in ((together, None), (watched, lambda: None)):
            pairs = list(zip(learners, batches, strict=True))
            outcomes = train_together(pairs, return_outputs=True, between_steps=between_steps)
            for outcome, reference in zip(outcomes, expected, strict=True):
                assert_same_outcome(outcome, reference)
    for one, other, reference in zip(together, watched, by_themselves, strict=True):
        assert_same(one, reference)
        assert_same(other, reference)
    assert any(sum(learner.progress.replacements.values()) for learner in together)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resets_in_part(optimizer: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """Beside learners of another strength, and of none."""
    learners = [
        learner
        for strength in (0.25, 0.6, 1.0)
        for learner in learners_of(make_spec, 3, optimizer, resets__strength=strength)
    ]
    assert_company_changes_nothing(learners, make_batch, 60)


def test_settings_changed_in_between_are_noticed(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 3, monitoring__interval=0)
    batch = make_batch(learners[0].spec, 40)
    for changes in (
        {"optimizer__lr": 0.01},
        {"optimizer__momentum": 0.9},
        {"resets__utility": "weight"},
        {"optimizer__clip_norm": 0.3},
        {"resets__strength": 0.5, "resets__max_replacements": 1, "resets__replacement_window": 9},
        {"resets__maturity_threshold": 2, "optimizer__momentum": 0.0},
        {"optimizer__weight_decay": 0.1},
    ):
        others = copies(learners)
        changed = make_spec(seed=1, **changes)
        for learner in (learners[1], others[1]):
            learner.update(changed)
            learner.reset_units([0], 0.3)
        train_together([(learner, batch) for learner in learners])
        for learner, other in zip(learners, others, strict=True):
            other.train(batch)
            assert_same(learner, other)


def test_the_one_that_diverges_does_so_alone(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 4, loss="mse", monitoring__interval=0)
    others = copies(learners)
    batches = [make_batch(learner.spec, 20, seed=seed) for seed, learner in enumerate(learners)]
    features = batches[2].features.copy()
    features[6] = 3e38
    batches[2] = Batch.validate(learners[2].spec, features, batches[2].targets)
    outcomes = train_together(list(zip(learners, batches, strict=True)), return_outputs=True)
    assert [type(outcome) for outcome in outcomes] == [TrainResult, TrainResult, DivergenceError, TrainResult]
    for place, (outcome, other) in enumerate(zip(outcomes, others, strict=True)):
        assert_same_outcome(outcome, alone(other, batches[place]))
        if place != 2:
            assert_same(learners[place], other)


def test_a_call_that_is_refused_changes_nothing(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 2)
    others = copies(learners)
    fits = make_batch(learners[0].spec, 5)
    with pytest.raises(BatchError, match="features: Expected float32"):
        train_together([(learners[0], fits), (learners[1], make_batch(make_spec(network__in_features=5), 5))])
    with pytest.raises(CbpError, match="pairs: A learner occurs twice"):
        train_together([(learners[0], fits), (learners[1], fits), (learners[0], fits)])
    for learner, other in zip(learners, others, strict=True):
        assert_same(learner, other)
    assert train_together([]) == []


def test_examples_wait_as_they_do_alone(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    first, second = learners_of(make_spec, 2, batch_size=4)
    results = train_together([(first, make_batch(first.spec, 3)), (second, make_batch(second.spec, 9))])
    assert [(result.steps, result.pending) for result in results] == [(0, 3), (2, 1)]  # type: ignore[union-attr]


def test_somebody_may_look_between_steps(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 3)
    others = copies(learners)
    batches = [make_batch(learner.spec, 2 * steps) for learner, steps in zip(learners, (3, 5, 2), strict=True)]
    seen: list[list[int]] = []

    def look() -> None:
        seen.append([learner.progress.step for learner in learners])
        learners[0].predict(batches[0].features)
        with pytest.raises(CbpError, match="cannot be called from between_steps"):
            learners[0].snapshot()

    train_together(list(zip(learners, batches, strict=True)), between_steps=look)
    assert seen == [[1, 1, 1], [2, 2, 2], [3, 3, 2], [3, 4, 2]]
    for learner, other, batch in zip(learners, others, batches, strict=True):
        other.train(batch)
        assert_same(learner, other)


def test_an_exception_between_steps_leaves_the_rest_waiting(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 2, monitoring__interval=0)
    others = copies(learners)
    batches = [make_batch(learner.spec, 8, seed=seed) for seed, learner in enumerate(learners)]

    def stop() -> None:
        if learners[0].progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_together(list(zip(learners, batches, strict=True)), between_steps=stop)
    assert [(learner.progress.step, learner.progress.pending) for learner in learners] == [(3, 2), (3, 2)]
    for learner, other, batch in zip(learners, others, batches, strict=True):
        other.train(Batch.validate(other.spec, batch.features[:6], batch.targets[:6]))
        other.train(Batch.validate(other.spec, batch.features[6:7], batch.targets[6:7]))
        learner.train(make_batch(learner.spec, 2, seed=7))
        other.train(
            Batch.validate(
                other.spec,
                np.concatenate([batch.features[7:], make_batch(learner.spec, 2, seed=7).features]),
                np.concatenate([batch.targets[7:], make_batch(learner.spec, 2, seed=7).targets]),
            )
        )
        assert torch.equal(learner._state.parameters.flat, other._state.parameters.flat)


def test_divergence_wins_over_an_exception_between_steps(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 2, loss="mse")
    learners.append(Learner(make_spec(loss="mse", optimizer__lr=3e38), engine="stacked"))

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(DivergenceError) as raised:
        train_together([(learner, make_batch(learner.spec, 8)) for learner in learners], between_steps=stop)
    assert isinstance(raised.value.__cause__, InterruptedError)
    assert [learner.progress.step for learner in learners] == [1, 1, 1]


def test_threads_may_train_learners_of_one_kind(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 4)
    others = copies(learners)
    batches = [make_batch(learner.spec, 100, seed=seed) for seed, learner in enumerate(learners)]

    def train(learner: Learner, batch: Batch) -> None:
        for start in range(0, 100, 10):
            part = slice(start, start + 10)
            learner.train(Batch.validate(learner.spec, batch.features[part], batch.targets[part]))

    threads = [threading.Thread(target=train, args=pair) for pair in zip(learners, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for learner, other, batch in zip(learners, others, batches, strict=True):
        train(other, batch)
        assert_same(learner, other)


def test_a_stack_goes_with_its_last_learner(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 2, network__hidden=[13])
    train_together([(learner, make_batch(learner.spec, 4)) for learner in learners])

    def stacks() -> int:
        gc.collect()
        return sum(kind.network == make_spec(network__hidden=[13]).network for kind in stacked_engine._stacks)

    assert stacks() == 1
    learners.pop()
    assert stacks() == 1
    learners.clear()
    assert stacks() == 0


def test_deterministic_algorithms_will_do(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 2)
    torch.use_deterministic_algorithms(True)
    try:
        assert_company_changes_nothing(learners, make_batch, 20)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("utility", ["adaptable_contribution", "random"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grouping_on_a_gpu(optimizer: str, utility: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 5, optimizer, resets__utility=utility)
    assert_company_changes_nothing(learners, make_batch, 40, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_agrees_with_the_cpu(optimizer: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learners = learners_of(make_spec, 3, optimizer)
    on_gpu = copies(learners, device="cuda")
    batches = [make_batch(learner.spec, 60, seed=seed) for seed, learner in enumerate(learners)]
    for group in (learners, on_gpu):
        train_together(list(zip(group, batches, strict=True)))
    for learner, other in zip(learners, on_gpu, strict=True):
        expected, actual = learner.snapshot(), other.snapshot()
        assert actual.metadata["replacements"] == expected.metadata["replacements"]
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("utility", ["adaptable_contribution", "random"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_is_never_waited_for_but_for_results(
    optimizer: str, utility: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learners = copies(
        learners_of(make_spec, 3, optimizer, resets__utility=utility, monitoring__interval=0), device="cuda"
    )
    pairs = [(learner, make_batch(learner.spec, 80)) for learner in learners]
    train_together(pairs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_together(pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(sum(learner.progress.replacements.values()) for learner in learners) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_does_what_its_operations_do(
    optimizer: str, make_spec: MakeSpec, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[list[LearnerSnapshot]] = []
    for captured in (True, False):
        if not captured:
            monkeypatch.setattr(stacked_engine, "_captured", lambda _step, _device: None)
        stacked_engine._stacks.clear()
        learners = copies(learners_of(make_spec, 3, optimizer), device="cuda")
        train_together([(learner, make_batch(learner.spec, 80)) for learner in learners])
        states.append([learner.snapshot() for learner in learners])
    for of_graph, of_operations in zip(*states, strict=True):
        assert of_graph.metadata == of_operations.metadata
        for name, tensor in of_operations.tensors.items():
            assert torch.equal(of_graph.tensors[name], tensor), name
