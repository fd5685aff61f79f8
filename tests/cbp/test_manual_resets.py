"""Resets by hand are those of the algorithm, at a time and of a number that the caller chooses."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cbp import Batch, CbpError, Learner, LearnerSnapshot, LearnerSpec, SpecError
from cbp.spec.learner_spec import hidden_layer_name
from cbp.units.replacement import bias_correction

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]
LAYERS = (slice(0, 8), slice(8, 15))


def ages(learner: Learner) -> list[torch.Tensor]:
    return [learner._state.units.age[0, columns] for columns in LAYERS]


@pytest.mark.parametrize(
    ("layers", "fraction", "expected"),
    [
        ([0], 0.25, {"hidden_0": 2}),
        ([1], 0.25, {"hidden_1": 2}),
        ([1, 0], 1e-9, {"hidden_0": 1, "hidden_1": 1}),
        ([0, 1], 1, {"hidden_0": 8, "hidden_1": 7}),
    ],
)
def test_a_share_of_the_units_rounded_up_is_reset_and_counted(
    layers: Sequence[int], fraction: float, expected: dict[str, int], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learner = Learner(make_spec(resets__layers="none"))
    learner.train(make_batch(learner.spec, 20))
    assert learner.reset_units(layers, fraction) == expected
    for layer, of_layer in enumerate(ages(learner)):
        name = hidden_layer_name(layer)
        assert int((of_layer == 0).sum()) == learner.progress.replacements[name] == expected.get(name, 0)


def test_decimal_fractions_mean_what_they_say(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """In binary, 0.07 of 100 is a little more than 7."""
    learner = Learner(make_spec(network__hidden=[100], resets__layers="none"))
    learner.train(make_batch(learner.spec, 20))
    assert learner.reset_units([0], 0.07) == {"hidden_0": 7}


def test_the_mature_units_of_least_utility_go(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(resets__maturity_threshold=20, network__activation="tanh")
    learner = Learner(spec)
    learner.train(make_batch(spec, 120))
    age, utility = (values[0, LAYERS[0]] for values in (learner._state.units.age, learner._state.units.utility))
    corrected = utility / bias_correction(age, torch.tensor(np.log(0.9)))
    candidates = sorted((float(corrected[unit]), unit) for unit in range(8) if age[unit] > 20)
    assert 3 < len(candidates) < 8
    assert learner.reset_units([0], 3 / 8) == {"hidden_0": 3}
    gone = {unit for _, unit in candidates[:3]}
    assert gone <= set((ages(learner)[0] == 0).nonzero()[:, 0].tolist())
    assert not learner._state.parameters.weights[1][0][:, list(gone)].any()


def test_only_mature_units_go(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = Learner(make_spec(resets__layers="none"))
    assert learner.reset_units([0], 1.0) == {"hidden_0": 0}
    learner.train(make_batch(learner.spec, 10))
    assert learner.reset_units([0], 1.0) == {"hidden_0": 0}, "5 steps: not older than the threshold"
    learner.train(make_batch(learner.spec, 2))
    assert learner.reset_units([0], 0.5) == {"hidden_0": 4}
    assert learner.reset_units([0], 1.0) == {"hidden_0": 4}
    assert learner.reset_units([0, 1], 1.0) == {"hidden_0": 0, "hidden_1": 7}


def test_the_schedule_knows(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """The host's counts still are those of the device's ages, and what was owed stays owed."""
    spec = make_spec(resets__replacement_rate=0.2)
    learner = Learner(spec)
    accumulated = [0.0, 0.0]
    replaced = {"hidden_0": 0, "hidden_1": 0}
    for step in range(80):
        grown = [of_layer + 1 for of_layer in ages(learner)]
        for layer in range(2):
            accumulated[layer] += 0.2 * int((grown[layer] > 5).sum())
            replaced[f"hidden_{layer}"] += int(accumulated[layer])
            accumulated[layer] -= int(accumulated[layer])
        learner.train(make_batch(spec, 2, seed=step))
        assert learner.progress.replacements == replaced
        if step % 7 == 0:
            replaced["hidden_1"] += learner.reset_units([1], 0.3)["hidden_1"]
            assert list(learner._state.schedules[0].accumulated) == accumulated
    assert learner.progress.replacements == replaced


@pytest.mark.parametrize("optimizer", [{"kind": "sgd", "lr": 0.05, "momentum": 0.9}, {"kind": "adam", "lr": 0.01}])
def test_it_is_deterministic_and_saved(optimizer: dict[str, Any], make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(optimizer=optimizer)
    learner = Learner(spec)
    learner.train(make_batch(spec, 41))
    before = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()))
    assert learner.reset_units([0, 1], 0.4) == before.reset_units([1, 0], 0.4)
    after = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()))
    for each in (learner, before, after):
        each.train(make_batch(spec, 60, seed=1))
    expected = learner.snapshot()
    for other in (before.snapshot(), after.snapshot()):
        assert other.metadata == expected.metadata
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in other.tensors.items())


def test_mean_predictions_stay_near_where_they_were(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """The readers' biases take over the mean output of what is removed."""
    moved = {}
    for compensation in (True, False):
        resets = {"layers": "none", "decay_rate": 0.99, "bias_compensation": compensation}
        spec = make_spec(network__activation="identity", optimizer__lr=1e-3, resets=resets)
        learner = Learner(spec)
        batch = make_batch(spec, 400)
        features = batch.features + 2  # a mean to hand on
        learner.train(Batch.validate(spec, features, batch.targets))
        before = learner.predict(features)
        learner.reset_units([0], 0.5)
        moved[compensation] = float(np.abs((learner.predict(features) - before).mean(axis=0)).sum())
    assert moved[True] < moved[False] / 3


def test_a_network_reset_as_a_whole_still_learns(make_spec: MakeSpec) -> None:
    """Newborns that did not read newborns would leave the second layer without a signal for ever."""
    spec = make_spec(network__hidden=[8, 8, 8], resets__layers="none", loss="mse", network__out_features=1)
    learner = Learner(spec)
    features = np.random.default_rng(0).normal(size=(400, 6))
    batch = Batch.validate(spec, features, np.abs(features[:, 0]))
    learner.train(batch)
    assert learner.reset_units(range(3), 1.0) == {"hidden_0": 8, "hidden_1": 8, "hidden_2": 8}
    assert np.ptp(learner.predict(features)) == 0.0
    losses = [learner.train(batch).loss or 0.0 for _ in range(8)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("layers", "fraction", "fields"),
    [
        ([], 0.5, ["layers"]),
        ([0, 0], 0.5, ["layers"]),
        ([0, 2], 0.5, ["layers[1]"]),
        ([-1], 0.5, ["layers[0]"]),
        (["hidden_0"], 0.5, ["layers[0]"]),
        ([True], 0.5, ["layers[0]"]),
        ([0], 0.0, ["fraction"]),
        ([0], 1.01, ["fraction"]),
        ([0], float("nan"), ["fraction"]),
        ([0], "0.5", ["fraction"]),
        ([7], True, ["layers[0]", "fraction"]),
    ],
)
def test_what_cannot_be_reset_is_named(
    layers: Any, fraction: Any, fields: list[str], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learner = Learner(make_spec())
    learner.train(make_batch(learner.spec, 20))
    before = learner.snapshot()
    with pytest.raises(SpecError) as raised:
        learner.reset_units(layers, fraction)
    assert [violation.field for violation in raised.value.violations] == fields
    after = learner.snapshot()
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in after.tensors.items())


def test_not_between_the_steps_of_train(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = Learner(make_spec())
    with pytest.raises(CbpError, match="reset_units cannot be called from between_steps"):
        learner.train(make_batch(learner.spec, 20), between_steps=lambda: learner.reset_units([0], 0.5) and None)
