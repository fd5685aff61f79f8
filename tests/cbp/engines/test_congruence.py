"""The engines agree: the same replacements at the same steps, and the same state to float32 rounding.

And each agrees with itself, bit for bit, however the stream is cut into calls and wherever it is saved and resumed.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch

from cbp import Batch, CbpError, Learner, LearnerSnapshot, LearnerSpec, compile_ahead
from cbp.engines.compiled.replacing import replace
from cbp.engines.compiled.steps import run
from cbp.engines.names import EngineName, PerceptronEngineName, choose_engine
from cbp.spec.learner_spec import Activation, LossKind, Utility

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]

STEPS = 100
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.02},
    "decay": {"kind": "sgd", "lr": 0.02, "weight_decay": 0.01},
    "momentum": {"kind": "sgd", "lr": 0.01, "momentum": 0.9},
    "nesterov": {"kind": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"kind": "rmsprop", "lr": 0.002, "weight_decay": 0.01},
    "rmsprop_momentum": {"kind": "rmsprop", "lr": 0.0005, "momentum": 0.9, "alpha": 0.9, "epsilon": 1e-6},
    "clipped": {"kind": "sgd", "lr": 0.05, "clip_norm": 0.5},
    "clipped_adam": {"kind": "adam", "lr": 0.003, "clip_norm": 0.5, "weight_decay": 0.01},
    "adam": {"kind": "adam", "lr": 0.003, "weight_decay": 0.01},
    "adamw": {"kind": "adamw", "lr": 0.003, "beta1": 0.4, "beta2": 0.99},
}
RESETS: Sequence[dict[str, Any]] = (
    {"layers": "all"},
    {"layers": "first", "bias_compensation": False},
    {"layers": [1]},
    {"layers": "all", "layer_replacement_rates": {"hidden_0": 0.1, "hidden_2": 0.0}, "maturity_threshold": 0},
    {"layers": "none"},
    {"layers": [0, 2], "decay_rate": 0.3},
    {"layers": "all", "strength": 0.4},
    {"layers": "all", "strength": 0.75, "max_replacements": 1, "replacement_window": 20, "maturity_threshold": 2},
)
WHOLE_RESETS = [resets for resets in RESETS if "strength" not in resets]
BATCH_SIZES = (1, 3, 16)


def spec_of(make_spec: MakeSpec, case: int, **changes: Any) -> LearnerSpec:
    """A network of three hidden layers, of odd widths unless given; the resets go round with the cases."""
    chosen = changes.pop("resets", RESETS[case % len(RESETS)])
    resets = {"replacement_rate": 0.03, "maturity_threshold": 8, "decay_rate": 0.9} | chosen
    utility = changes.pop("utility", "adaptable_contribution")
    return make_spec(
        network__hidden=changes.pop("hidden", [9, 8, 7]),
        resets=resets | {"utility": utility},
        monitoring__interval=37,
        seed=case,
        **changes,
    )


def assert_congruent(spec: LearnerSpec, make_batch: MakeBatch) -> None:
    reference, *others = (Learner(spec, engine=engine) for engine in get_args(PerceptronEngineName))
    assert [learner.engine for learner in (reference, *others)] == ["torch", "compiled", "stacked"]
    rows = STEPS * spec.batch_size
    for start in range(2):
        batch = make_batch(spec, rows // 2, seed=start, task=f"{start}", weighted=bool(start))
        of_torch = reference.train(batch, return_outputs=True)
        expected = reference.snapshot()
        for learner in others:
            result = learner.train(batch, return_outputs=True)
            assert (of_torch.steps, of_torch.examples) == (result.steps, result.examples)
            np.testing.assert_allclose(result.outputs, of_torch.outputs, rtol=1e-3, atol=1e-4)
            assert result.loss == pytest.approx(of_torch.loss, rel=1e-4)
            assert result.accuracy == pytest.approx(of_torch.accuracy, abs=1e-2)
            assert_same_state(learner.snapshot(), expected)
    for learner in (reference, *others):
        assert [sample.step for sample in learner.take_samples()] == [37, 74]


def assert_same_samples(learner: Learner) -> None:
    """The engine measures what the eager one does."""
    measured = learner.sample_plasticity()
    engine = learner.engine
    learner.switch_engine("torch")
    expected = learner.sample_plasticity()
    learner.switch_engine(engine)
    for layer, expected_layer in zip(measured.layers, expected.layers, strict=True):
        for name, value in vars(expected_layer).items():
            expected_value = (
                value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
            )
            assert getattr(layer, name) == expected_value, (layer.layer, name)


def assert_same_state(actual: LearnerSnapshot, expected: LearnerSnapshot) -> None:
    """To float32 rounding."""
    for name in ("units.age", "generator"):
        assert torch.equal(actual.tensors[name], expected.tensors[name]), name
    for name in ("replacements", "accumulated_replacements", "replacements_in_window", "step"):
        assert actual.metadata[name] == expected.metadata[name], name
    for name, tensor in expected.tensors.items():
        if tensor.dtype == torch.float32:
            tolerance = {
                "rtol": 1e-3,
                "atol": 1e-4 * float(tensor.abs().max().clamp(min=1)) if tensor.numel() else 0,
            }
            torch.testing.assert_close(actual.tensors[name], tensor, **tolerance, msg=name)


@pytest.mark.parametrize("utility", get_args(Utility))
@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation_and_utility(
    activation: str, utility: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    case = get_args(Activation).index(activation) + get_args(Utility).index(utility)
    batch_size = (1, 3)[case % 2]
    network = {"network__activation": activation, "utility": utility, "batch_size": batch_size}
    resets = WHOLE_RESETS[case % len(WHOLE_RESETS)]
    assert_congruent(spec_of(make_spec, case, optimizer__lr=0.02, resets=resets, **network), make_batch)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", get_args(LossKind))
def test_every_loss_and_optimizer(loss: str, optimizer: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    case = get_args(LossKind).index(loss) + list(OPTIMIZERS).index(optimizer)
    batch_size = BATCH_SIZES[case % len(BATCH_SIZES)]
    spec = spec_of(
        make_spec,
        case,
        loss={"kind": loss, "delta": 0.3} if loss == "huber" else loss,
        optimizer=OPTIMIZERS[optimizer],
        batch_size=batch_size,
        network__activation="relu" if case % 2 else "tanh",
    )
    assert_congruent(spec, make_batch)


@pytest.mark.parametrize("loss", get_args(LossKind))
@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_sample(activation: str, loss: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = spec_of(make_spec, 1, network__activation=activation, loss=loss, batch_size=3)
    learner = Learner(spec, engine="compiled")
    assert_same_samples(learner)
    for rows in (1, 4, 40, 600):  # a probe too small for any rank, for some, and full
        learner.train(make_batch(spec, rows))
        assert_same_samples(learner)


def test_samples_of_large_layers(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = spec_of(make_spec, 2, hidden=[512, 530, 512], batch_size=1)
    learner = Learner(spec, engine="compiled")
    learner.train(make_batch(spec, 60))
    assert any(not weight.is_contiguous() for weight in learner._state.parameters.weights)
    assert_same_samples(learner)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("resets", range(len(RESETS)))
def test_every_choice_of_layers(resets: int, optimizer: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    batch_size = 1 + 2 * (resets % 2)
    assert_congruent(spec_of(make_spec, resets, optimizer=OPTIMIZERS[optimizer], batch_size=batch_size), make_batch)


LARGE: dict[str, Any] = {"network__in_features": 515, "hidden": [513, 520, 512], "batch_size": 1}
"""Layers whose weights and sums of magnitudes the compiled engine keeps in another way."""


@pytest.mark.parametrize("resets", range(len(RESETS)))
def test_large_layers(resets: int, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    utility = get_args(Utility)[resets % len(get_args(Utility))]
    spec = spec_of(make_spec, resets, optimizer__lr=0.002, utility=utility, **LARGE)
    assert_congruent(spec, make_batch)


def test_large_layers_with_a_clipped_gradient(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    optimizer = {"kind": "sgd", "lr": 0.01, "clip_norm": 1.0}
    assert_congruent(spec_of(make_spec, 0, optimizer=optimizer, **LARGE), make_batch)


@pytest.mark.parametrize("factor", [4.0, 1e-3])
def test_large_layers_of_any_magnitude(factor: float, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """Beyond what sums in integers can hold; across that bound and back; and changed behind the engine's back."""
    spec = spec_of(make_spec, 0, optimizer__lr=1e-4, **LARGE)
    learners = [Learner(spec, engine=engine) for engine in get_args(PerceptronEngineName)]
    for learner in learners:
        learner.train(make_batch(spec, 20))
        learner._state.parameters.weights[1].mul_(factor)
        learner.train(make_batch(spec, 20, seed=1))
        learner._state.parameters.weights[1].div_(factor)
        learner.train(make_batch(spec, 20, seed=2))
    expected, *others = (learner.snapshot() for learner in learners)
    for actual in others:
        assert actual.metadata["replacements"] == expected.metadata["replacements"]
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_large_layers_after_an_update_of_the_optimizer(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """To one that needs the ordinary layout of the weights, and back."""
    updates = [{"kind": "sgd", "lr": 0.001, "momentum": momentum} for momentum in (0.0, 0.5, 0.0)]
    learners = [
        Learner(spec_of(make_spec, 0, optimizer=updates[0], **LARGE), engine=engine)
        for engine in get_args(PerceptronEngineName)
    ]
    for learner in learners:
        for seed, optimizer in enumerate(updates):
            learner.update(spec_of(make_spec, 0, optimizer=optimizer, **LARGE))
            learner.train(make_batch(learner.spec, 20, seed=seed))
    expected, *others = (learner.snapshot() for learner in learners)
    for actual in others:
        assert actual.metadata["replacements"] == expected.metadata["replacements"]
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("engine", ["torch", "stacked"])
def test_large_layers_after_a_change_of_engine(engine: EngineName, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """To one that needs the ordinary layout of the weights, and back."""
    spec = spec_of(make_spec, 0, optimizer__lr=0.001, **LARGE)
    reference, switching = Learner(spec), Learner(spec, engine="compiled")
    for seed in range(3):
        switching.switch_engine(engine if seed == 1 else "compiled")
        for learner in (reference, switching):
            learner.train(make_batch(spec, 20, seed=seed))
        assert_same_state(switching.snapshot(), reference.snapshot())


@pytest.mark.parametrize(("factor", "resets"), [(1.0, 0), (4.0, 0), (1.0, 6)])
def test_remembered_sums_are_those_made_anew(
    factor: float, resets: int, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    """Restored at every few steps, or never: not one bit differs, within and beyond what integers can hold."""
    spec = spec_of(make_spec, resets, optimizer__lr=0.01, **LARGE)
    whole, resumed = (Learner(spec, engine="compiled") for _ in range(2))
    for learner in (whole, resumed):
        learner._state.parameters.weights[1].mul_(factor)
    for seed, count in enumerate([1, 9, 30, 20]):
        for learner in (whole, resumed):
            learner.reset_units([0, 1, 2], 0.1)
        whole.train(make_batch(spec, count, seed=seed))
        resumed = Learner.restore(LearnerSnapshot.from_bytes(resumed.snapshot().to_bytes()), engine="compiled")
        resumed.train(make_batch(spec, count, seed=seed))
    expected, actual = whole.snapshot(), resumed.snapshot()
    assert sum(expected.metadata["replacements"]) > 0
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual.tensors[name], tensor), name


@pytest.mark.parametrize("engine", ["compiled", "stacked"])
@pytest.mark.parametrize(("optimizer", "resets"), [*((name, 0) for name in OPTIMIZERS), ("adam", 7)])
@pytest.mark.parametrize(
    ("batch_size", "utility"), [(0, "adaptable_contribution"), (1, "random"), (3, "adaptable_contribution")]
)
def test_cuts_and_pauses_change_nothing(
    batch_size: int,
    optimizer: str,
    resets: int,
    utility: str,
    engine: EngineName,
    make_spec: MakeSpec,
    make_batch: MakeBatch,
) -> None:
    """Calls of one step, of many, with somebody looking in between, saved and restored: not one bit differs."""
    spec = spec_of(make_spec, resets, optimizer=OPTIMIZERS[optimizer], utility=utility, batch_size=batch_size)
    sizes = [1, 2, 1, 5, 1] * 6 if batch_size == 0 else [7, 1, 1, 40, 2, 60, 13, 100, 1, 75]
    stream = make_batch(spec, sum(sizes))
    bounds = list(itertools.accumulate(sizes, initial=0))
    pieces = [
        Batch.validate(spec, stream.features[start:end], stream.targets[start:end])
        for start, end in itertools.pairwise(bounds)
    ]
    learner = Learner(spec, engine=engine)
    for piece in pieces if batch_size == 0 else [stream]:
        learner.train(piece)
    cut, watched, resumed = (Learner(spec, engine=engine) for _ in range(3))
    for piece in pieces:
        cut.train(piece)
        watched.train(piece, between_steps=lambda: None)
        resumed.train(piece)
        resumed = Learner.restore(LearnerSnapshot.from_bytes(resumed.snapshot().to_bytes()), engine=engine)
    expected = learner.snapshot()
    assert sum(expected.metadata["replacements"]) > 0
    for other in (cut, watched, resumed):
        actual = other.snapshot()
        for name, tensor in expected.tensors.items():
            assert torch.equal(actual.tensors[name], tensor), name
        for name in ("replacements", "accumulated_replacements", "replacements_in_window", "step"):
            assert actual.metadata[name] == expected.metadata[name], name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engines", list(itertools.permutations(get_args(PerceptronEngineName), 2)))
def test_a_snapshot_goes_on_in_the_other_engine(
    engines: tuple[EngineName, EngineName],
    optimizer: str,
    make_spec: MakeSpec,
    make_batch: MakeBatch,
) -> None:
    batch_size = 1 if engines[0] < engines[1] else 3
    spec = spec_of(make_spec, 0, optimizer=OPTIMIZERS[optimizer], batch_size=batch_size)
    first, second = make_batch(spec, 50 * batch_size + 1), make_batch(spec, 50 * batch_size, seed=1)
    learner = Learner(spec, engine=engines[0])
    learner.train(first)
    moved = Learner.restore(learner.snapshot(), engine=engines[1])
    assert moved.engine == engines[1]
    for each in (learner, moved):
        each.train(second)
    assert learner.progress.replacements == moved.progress.replacements
    for name, tensor in learner.snapshot().tensors.items():
        torch.testing.assert_close(moved.snapshot().tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_changes_from_outside_are_noticed(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """By hand, by an update, behind its back: what an engine assumes of the state may not hold any more."""
    spec = make_spec(batch_size=1)
    learners = [Learner(spec, engine=engine) for engine in get_args(PerceptronEngineName)]
    for learner in learners:
        learner.train(make_batch(spec, 60))
        learner.reset_units([0, 1], 0.4)
        learner.train(make_batch(spec, 30, seed=1))
        learner._state.parameters.weights[1].mul_(0.5)
        learner.train(make_batch(spec, 30, seed=2))
        learner.update(make_spec(batch_size=1, optimizer={"kind": "sgd", "lr": 0.02, "momentum": 0.5}))
        learner.train(make_batch(spec, 30, seed=3))
        learner.update(make_spec(batch_size=1, resets__utility="contribution"))
        learner.train(make_batch(spec, 30, seed=4))
        learner.update(make_spec(batch_size=1, resets__strength=0.5, resets__max_replacements=1))
        learner.train(make_batch(spec, 30, seed=5))
        learner.update(make_spec(batch_size=1))
        learner.train(make_batch(spec, 30, seed=6))
    expected, *others = (learner.snapshot() for learner in learners)
    for actual in others:
        assert actual.metadata["replacements"] == expected.metadata["replacements"]
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_adams_counts_need_not_be_ages(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """A state that steps alone cannot bring about: the counts of Adam decide, in every engine."""
    spec = make_spec(optimizer={"kind": "adam", "lr": 0.01}, batch_size=1)
    learners = [Learner(spec, engine=engine) for engine in get_args(PerceptronEngineName)]
    for learner in learners:
        learner.train(make_batch(spec, 20))
        for name, slot in learner._state.optimizer.slots().items():
            slot.flat.fill_(3.0 if name == "steps" else 0.0)
        learner.train(make_batch(spec, 20, seed=1))
    expected, *others = (learner.snapshot() for learner in learners)
    for actual in others:
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_somebody_may_look_between_runs_of_steps(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(network={"kind": "mlp", "in_features": 30, "hidden": [100], "out_features": 3}, batch_size=16)
    learner = Learner(spec, engine="compiled")
    seen: list[int] = []
    result = learner.train(make_batch(spec, 16 * 900), between_steps=lambda: seen.append(learner.progress.step))
    at_once = seen[0]
    assert 1 <= at_once < 500
    assert seen == list(range(at_once, 900, at_once))
    assert result.steps == 900


def test_arrays_of_any_kind_need_no_other_code(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    compile_ahead()
    compiled = [len(kernel.signatures) for kernel in (run, replace)]
    spec = make_spec(loss="mse")
    plain = make_batch(spec, 40)
    features, targets = np.asfortranarray(plain.features), plain.targets.copy()
    targets.flags.writeable = False
    awkward = Batch(features[::-1][::-1], targets, None, "")
    learner, other = (Learner(spec, engine="compiled") for _ in range(2))
    learner.train(plain)
    other.train(awkward)
    assert torch.equal(learner._state.parameters.flat, other._state.parameters.flat)
    assert [len(kernel.signatures) for kernel in (run, replace)] == compiled == [1, 1]


def test_an_engine_that_cannot_run_there_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec()
    snapshot = Learner(spec).snapshot()
    for device, engine in (("meta", "compiled"), ("cpu", "numpy")):
        with pytest.raises(CbpError, match="engine: "):
            Learner(spec, device=device, engine=engine)  # type: ignore[arg-type]
        with pytest.raises(CbpError, match="engine: "):
            Learner.restore(snapshot, device=device, engine=engine)  # type: ignore[arg-type]


def test_the_automatic_choice(make_spec: MakeSpec) -> None:
    spec = make_spec()
    assert Learner(spec).engine == "torch"
    assert Learner(spec, engine="auto").engine == "compiled"
    assert Learner.restore(Learner(spec).snapshot(), engine="auto").engine == "compiled"
    devices = ("cpu", "cuda", "meta")
    assert [choose_engine(spec, torch.device(device)) for device in devices] == ["compiled", "stacked", "torch"]


@pytest.mark.parametrize("utility", ["adaptable_contribution", "random"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_engine_is_changed_as_if_restored(
    optimizer: str, utility: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = spec_of(make_spec, 0, optimizer=OPTIMIZERS[optimizer], utility=utility, batch_size=3)
    switched, restored = Learner(spec), Learner(spec)
    for seed, engine in enumerate(("compiled", "stacked", "torch", "stacked", "compiled", "auto")):
        switched.switch_engine(engine)
        restored = Learner.restore(restored.snapshot(), engine=engine)
        assert switched.engine == restored.engine == ("compiled" if engine == "auto" else engine)
        for learner in (switched, restored):
            learner.train(make_batch(spec, 41, seed=seed))
        expected, actual = restored.snapshot(), switched.snapshot()
        assert actual.metadata == expected.metadata
        for name, tensor in expected.tensors.items():
            assert torch.equal(actual.tensors[name], tensor), name
    assert sum(switched.progress.replacements.values()) > 0


def test_an_engine_is_not_changed_amid_a_call(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = Learner(spec)
    with pytest.raises(CbpError, match="switch_engine cannot be called from between_steps"):
        learner.train(make_batch(spec, 4), between_steps=lambda: learner.switch_engine("stacked"))
    with pytest.raises(CbpError, match="engine: Expected one of torch, compiled, stacked, module, auto; got 'numpy'"):
        learner.switch_engine("numpy")  # type: ignore[arg-type]
    assert learner.engine == "torch"
