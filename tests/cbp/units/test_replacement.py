"""One test for each way in which implementations of Continual Backprop have gone wrong."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_kinds import PERCEPTRON_ENGINES
from read_back import NoReadBack

from cbp import Batch, Learner, LearnerSpec, losses
from cbp.engines.names import EngineName
from cbp.engines.torch_engine import TorchEngine, initial_stack
from cbp.networks import LinearLayers, initial_bounds
from cbp.spec.learner_spec import ResetSpec
from cbp.units.draws import UniformGenerator
from cbp.units.replacement import (
    GeneratorDraws,
    ReplacementSchedule,
    ResetSettings,
    UnitLayout,
    UnitState,
    bias_correction,
    evaluate_units,
    replace_units,
    select_units,
)

CPU = torch.device("cpu")
WIDTHS = (5, 4)


class Draws:
    """Recognisable weights: 100 more for every layer."""

    def incoming_weights(self, learner: int, layer: int, count: int) -> torch.Tensor:  # noqa: ARG002
        return torch.full((count, (3, *WIDTHS)[layer]), 100.0 * (layer + 1))

    def utilities(self) -> torch.Tensor:
        return torch.rand(1, sum(WIDTHS))


def layers_like(value: Callable[..., torch.Tensor], learners: int = 1) -> LinearLayers:
    widths = (3, *WIDTHS, 2)
    return LinearLayers(
        weights=tuple(value(learners, out, into) for into, out in pairwise(widths)),
        biases=tuple(value(learners, out) for out in widths[1:]),
    )


def mature_units(learners: int = 1, age: int = 1000) -> UnitState:
    units = UnitState.fresh(learners, sum(WIDTHS), CPU)
    units.age.fill_(age)
    units.utility.copy_(torch.rand(units.utility.shape))
    units.mean_activation.copy_(torch.randn(units.utility.shape))
    return units


LAYOUT = UnitLayout((3, 5), WIDTHS, (4, 2), CPU)


def replace(
    units: UnitState,
    layers: LinearLayers,
    counts: Sequence[Sequence[int]],
    slots: Sequence[LinearLayers] = (),
    spec: ResetSpec | None = None,
) -> list[list[int]]:
    """Replaces counts[layer][learner] units; returns the units of learner 0 per layer."""
    reset_settings = ResetSettings.of([spec or ResetSpec(bias_compensation=False)] * units.age.shape[0], CPU)
    selected = [select_units(units, reset_settings, LAYOUT, layer, of_layer) for layer, of_layer in enumerate(counts)]
    replace_units(selected, units, reset_settings, LAYOUT, layers, slots, Draws())
    return [[] if chosen is None else chosen.units[chosen.learners == 0].tolist() for chosen in selected]


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_newborns_have_fresh_inputs_and_nothing_else(first: int, second: int, seed: int) -> None:
    """In particular: a unit that is drawn next to one in the layer below keeps 0 at it."""
    torch.manual_seed(seed)
    units, layers, slot = mature_units(), layers_like(torch.randn), layers_like(torch.randn)
    before, slot_before = [w.clone() for w in layers.weights], [w.clone() for w in slot.weights]
    chosen = replace(units, layers, [[first], [second]], [slot])
    assert [len(of_layer) for of_layer in chosen] == [first, second]

    columns_below: list[int] = []
    for layer, newborns in enumerate([*chosen, []]):
        expected, slot_expected = before[layer][0].clone(), slot_before[layer][0].clone()
        expected[newborns] = 100.0 * (layer + 1)
        slot_expected[newborns] = 0.0
        expected[:, columns_below] = 0.0
        slot_expected[:, columns_below] = 0.0
        assert torch.equal(layers.weights[layer][0], expected)
        assert torch.equal(slot.weights[layer][0], slot_expected)
        columns_below = newborns
    for layer, newborns in enumerate(chosen):
        bias, slot_bias = layers.biases[layer], slot.biases[layer]
        assert bias is not None
        assert slot_bias is not None
        assert not bias[0, newborns].any()
        assert not slot_bias[0, newborns].any()
        assert torch.count_nonzero(slot_bias) == WIDTHS[layer] - len(newborns)
        columns = LAYOUT.slices[layer]
        for state in (units.utility, units.age, units.mean_activation):
            assert not state[0, columns][newborns].any()
        assert int((units.age[0, columns] == 1000).sum()) == WIDTHS[layer] - len(newborns)


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_bias_compensation_keeps_the_mean_input_of_the_survivors(first: int, second: int, seed: int) -> None:
    torch.manual_seed(seed)
    units, layers = mature_units(age=3), layers_like(torch.randn)
    correction = 1 - 0.99**3
    before = [w.clone() for w in layers.weights]
    biases = [b.clone() for b in layers.biases if b is not None]
    means = [units.mean_activation[0, columns] / correction for columns in LAYOUT.slices]
    spec = ResetSpec(bias_compensation=True, maturity_threshold=0)
    chosen = replace(units, layers, [[first], [second]], spec=spec)
    for layer, newborns in enumerate(chosen):
        expected = biases[layer + 1][0] + before[layer + 1][0][:, newborns] @ means[layer][newborns]
        if layer + 1 < len(chosen):
            expected[chosen[layer + 1]] = 0.0  # a newborn starts with bias 0 whatever goes on below it
        actual = layers.biases[layer + 1]
        assert actual is not None
        torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-4)


def test_without_bias_compensation_the_next_bias_stays() -> None:
    units, layers = mature_units(), layers_like(torch.randn)
    last = layers.biases[-1]
    assert last is not None
    before = last.clone()
    replace(units, layers, [[2], [2]])
    assert torch.equal(last, before)


def test_ranking_uses_the_bias_corrected_utility() -> None:
    """A unit of age 3 with raw utility 0.02 has been worth 0.67 a step; the old one with 0.3 goes first."""
    units = mature_units()
    units.utility[0, :5] = torch.tensor([0.5, 0.02, 0.3, 0.9, 0.8])
    units.age[0, 1] = 3
    chosen = replace(units, layers_like(torch.randn), [[1], [0]], spec=ResetSpec(maturity_threshold=2))
    assert chosen[0] == [2]


def test_units_at_the_maturity_threshold_are_protected() -> None:
    units = mature_units(age=100)
    units.utility[0, :5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    units.age[0, 3] = 101
    assert replace(units, layers_like(torch.randn), [[1], [0]])[0] == [3]


def test_equal_utilities_are_taken_from_the_highest_index() -> None:
    units = mature_units()
    units.utility.fill_(0.0)
    assert replace(units, layers_like(torch.randn), [[3], [1]]) == [[4, 3, 2], [3]]


def test_learners_of_a_stack_lose_units_of_their_own() -> None:
    torch.manual_seed(0)
    units, layers = mature_units(3), layers_like(torch.randn, 3)
    before = [weight.clone() for weight in layers.weights]
    replace(units, layers, [[2, 0, 1], [0, 0, 3]])
    assert (units.age == 0).sum(dim=1).tolist() == [2, 0, 4]
    assert all(torch.equal(weight[1], old[1]) for weight, old in zip(layers.weights, before, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999, 1 - 1e-7])
@pytest.mark.parametrize("age", [1, 2, 100, 10**6, 2**24 + 1, 10**12])
def test_bias_correction_is_exact_at_every_age(decay: float, age: int) -> None:
    reset_settings = ResetSettings.of([ResetSpec(decay_rate=decay)], CPU)
    corrected = bias_correction(torch.tensor([[age]]), reset_settings.log_decay)
    exact = 1.0 if decay == 0.0 else -np.expm1(age * np.log(decay))
    assert float(corrected) == pytest.approx(exact, rel=1e-6)


def test_ages_count_on_beyond_what_float32_can() -> None:
    units = mature_units(age=2**24)
    reset_settings = ResetSettings.of([ResetSpec()], CPU)
    activations = [torch.rand(1, 1, width) for width in WIDTHS]
    evaluate_units(units, reset_settings, LAYOUT, layers_like(torch.randn), activations, Draws())
    assert units.age.dtype == torch.int64
    assert set(units.age[0].tolist()) == {2**24 + 1}


def test_a_unit_without_inputs_has_a_finite_utility() -> None:
    units, layers = mature_units(), layers_like(torch.zeros)
    for utility in ("adaptation", "feature_by_input", "adaptable_contribution"):
        reset_settings = ResetSettings.of([ResetSpec(utility=utility)], CPU)
        activations = [torch.rand(1, 2, width) for width in WIDTHS]
        evaluate_units(units, reset_settings, LAYOUT, layers, activations, Draws())
        assert torch.isfinite(units.utility).all()


@given(
    rate=st.sampled_from([0.0, 1e-4, 0.003, 0.05, 0.5, 1.0]),
    maturity=st.integers(0, 12),
    width=st.integers(1, 30),
    steps=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_host_counts_what_the_units_ages_say(rate: float, maturity: int, width: int, steps: int) -> None:
    """The schedule never sees an age, and still asks for int(acc) of what is eligible."""
    schedule = ReplacementSchedule.from_ages([rate], maturity, [0.0], 0, [np.zeros(width, np.int64)])
    ages = np.zeros(width, np.int64)
    accumulated = 0.0
    for step in range(1, steps + 1):
        ages += 1
        eligible = np.flatnonzero(ages > maturity)
        accumulated += rate * len(eligible)
        expected = int(accumulated)
        accumulated -= expected
        due = schedule.advance(step)
        assert (due or (0,))[0] == expected
        ages[eligible[:expected]] = 0


@given(
    rate=st.sampled_from([1e-3, 0.05, 0.5, 1.0]),
    maturity=st.integers(0, 12),
    most=st.integers(1, 5),
    window=st.integers(1, 40),
    saved=st.sets(st.integers(1, 150)),
)
@settings(max_examples=60, deadline=None)
def test_no_window_has_more_replacements_than_allowed(
    rate: float, maturity: int, most: int, window: int, saved: set[int]
) -> None:
    """By the ages themselves, and wherever the learner is saved and goes on; what may not go is not owed."""
    width = 9
    schedule = ReplacementSchedule.from_ages(
        [rate], maturity, [0.0], 0, [np.zeros(width, np.int64)], max_replacements=most, window=window
    )
    ages = np.zeros(width, np.int64)
    accumulated, gone = 0.0, 0
    for step in range(1, 151):
        gone = 0 if (step - 1) % window == 0 else gone
        ages += 1
        eligible = np.flatnonzero(ages > maturity)
        accumulated += rate * len(eligible)
        expected = min(int(accumulated), most - gone)
        accumulated -= int(accumulated)
        assert (schedule.advance(step) or (0,))[0] == expected
        gone += expected
        ages[eligible[:expected]] = 0
        assert schedule.replaced(step) == [gone]
        if step in saved:
            schedule = ReplacementSchedule.from_ages(
                [rate],
                maturity,
                schedule.accumulated,
                step,
                [ages],
                max_replacements=most,
                window=window,
                replaced=schedule.replaced(step),
            )


@pytest.mark.parametrize("compensation", [True, False])
def test_a_reset_in_part_goes_part_of_the_way(compensation: bool) -> None:
    """Units 4 of the first and 3 of the second layer, with three quarters of their old selves left."""
    torch.manual_seed(0)
    units, layers, slot = mature_units(age=3), layers_like(torch.randn), layers_like(torch.randn)
    units.utility.fill_(1.0)
    weights = [w[0].clone() for w in layers.weights]
    biases = [b[0].clone() for b in layers.biases if b is not None]
    means = [units.mean_activation[0, columns] / (1 - 0.99**3) for columns in LAYOUT.slices]
    spec = ResetSpec(strength=0.25, bias_compensation=compensation, maturity_threshold=0)
    assert replace(units, layers, [[1], [1]], [slot], spec) == [[4], [3]]

    if compensation:
        biases[1] += 0.25 * weights[1][:, 4] * means[0][4]
        biases[2] += 0.25 * weights[2][:, 3] * means[1][3]
    weights[0][4] = 0.75 * weights[0][4] + 0.25 * 100.0
    weights[1][3] = 0.75 * weights[1][3] + 0.25 * 200.0
    weights[1][:, 4] *= 0.75
    weights[2][:, 3] *= 0.75
    biases[0][4] *= 0.75
    biases[1][3] *= 0.75
    for layer in range(3):
        bias = layers.biases[layer]
        assert bias is not None
        torch.testing.assert_close(layers.weights[layer][0], weights[layer])
        torch.testing.assert_close(bias[0], biases[layer])
    assert (units.age[0, [4, 8]] == 0).all()
    assert (units.utility[0, [4, 8]] == 0).all()
    assert (units.mean_activation[0, [4, 8]] == 0).all()
    for weight, rows, columns in zip(slot.weights, ([4], [3], []), ([], [4], [3]), strict=True):
        assert not weight[0, rows].any()
        assert not weight[0, :, columns].any()
        assert torch.count_nonzero(weight[0]) == (weight.shape[1] - len(rows)) * (weight.shape[2] - len(columns))


def test_small_rates_add_up_to_whole_units() -> None:
    """int(ρ·n) without a remainder would be 0 for ever: 1e-4 of 50 units is one in 200 steps."""
    schedule = ReplacementSchedule.from_ages([1e-4], 0, [0.0], 0, [np.full(50, 10, np.int64)])
    due = [schedule.advance(step) for step in range(1, 2001)]
    assert sum(counts[0] for counts in due if counts) in (9, 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_step_reads_from_the_device(optimizer: str, make_spec: Callable[..., LearnerSpec]) -> None:
    spec = make_spec(optimizer__kind=optimizer, resets__bias_compensation=True)
    state = initial_stack([spec], CPU)
    engine = TorchEngine([spec], state, CPU)
    random = torch.Generator().manual_seed(0)
    targets = torch.nn.functional.one_hot(torch.tensor([[0, 2]]), 3).float()
    with NoReadBack() as watching:
        for _ in range(60):
            inputs = torch.randn(1, 2, 6, generator=random)
            engine.step(inputs, targets, torch.full((1, 2, 1), 0.5), torch.empty(1, 2, 3))
    assert sum(state.replacements[0]) > 10
    assert watching.operations["sort"] == sum(state.replacements[0]), "selection runs only on the steps that need it"


@pytest.mark.parametrize("layers", ["none", "first"])
def test_ages_and_utilities_go_on_where_nothing_is_replaced(
    layers: str, make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]
) -> None:
    spec = make_spec(resets__layers=layers)
    learner = Learner(spec)
    learner.train(make_batch(spec, 80))
    units = learner._state.units
    assert units.age[0, 8:].tolist() == [40] * 7
    assert (units.utility[0, 8:] > 0).any()
    assert learner.progress.replacements["hidden_1"] == 0
    assert (learner.progress.replacements["hidden_0"] > 0) == (layers == "first")


def test_batch_size_may_change_from_step_to_step(
    make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]
) -> None:
    spec = make_spec(batch_size=0)
    learner = Learner(spec)
    for count in (1, 7, 3, 1, 64):
        assert learner.train(make_batch(spec, count)).steps == 1
    assert learner._state.units.age[0].max() == 5


def test_prediction_leaves_no_trace(make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]) -> None:
    spec = make_spec()
    learner = Learner(spec)
    learner.train(make_batch(spec, 30))
    before = learner.snapshot()
    learner.predict(make_batch(spec, 100, seed=9).features)
    learner.sample_plasticity()
    after = learner.snapshot()
    assert after.metadata == before.metadata
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_momentum_moments_and_step_counts_of_exactly_the_replaced_weights_are_zeroed(
    make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]
) -> None:
    """A global step count would give fresh weights a wrong step size; a stale momentum would move a zeroed column."""
    spec = make_spec(optimizer={"kind": "adam", "lr": 1e-3}, network__activation="tanh")
    learner = Learner(spec)
    state = learner._state
    while not sum(state.replacements[0]):
        learner.train(make_batch(spec, 2, seed=state.steps[0]))
    step = state.steps[0]
    age = [state.units.age[0, :8], state.units.age[0, 8:], torch.full((3,), step)]
    reads = [torch.full((6,), step), *age[:2]]
    slots = state.optimizer.slots()
    for layer in range(3):
        counted = torch.minimum(age[layer].unsqueeze(1), reads[layer].unsqueeze(0)).float()
        assert torch.equal(slots["steps"].weights[layer][0], counted)
        assert torch.equal(slots["steps"].biases[layer][0], age[layer].float())
        for moment in ("first_moment", "second_moment"):
            assert torch.equal(slots[moment].weights[layer][0] == 0, counted == 0)


@pytest.mark.parametrize("engine", PERCEPTRON_ENGINES)
def test_a_reset_weight_starts_like_a_new_one_under_rmsprop(
    engine: EngineName, make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]
) -> None:
    """Nothing of its past is left, so its first step is the 1/√(1 − alpha) · lr of every first step."""
    optimizer = {"kind": "rmsprop", "lr": 1e-3, "alpha": 0.75, "momentum": 0.5, "epsilon": 1e-12}
    spec = make_spec(optimizer=optimizer, network__activation="tanh")
    learner = Learner(spec, engine=engine)
    learner.train(make_batch(spec, 60))
    state = learner._state
    learner.reset_units([0], 0.25)
    newborns = (state.units.age[0, :8] == 0).nonzero()[:, 0]
    assert len(newborns) >= 2
    for slot in state.optimizer.slots().values():
        assert not slot.weights[0][0][newborns].any()
        assert not slot.biases[0][0][newborns].any()
        assert not slot.weights[1][0][:, newborns].any()
        assert slot.weights[1][0].any()
    learner.train(make_batch(spec, 2, seed=1))
    moved = state.parameters.weights[1][0][:, newborns].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-3), rtol=1e-3, atol=0)


def test_zeroed_outgoing_weights_do_not_move_before_the_next_gradient(
    make_spec: Callable[..., LearnerSpec], make_batch: Callable[..., Batch]
) -> None:
    """Replacement comes after the optimizer's update: no stale gradient or momentum reaches a newborn."""
    spec = make_spec(optimizer={"kind": "sgd", "lr": 0.05, "momentum": 0.9})
    learner = Learner(spec)
    state = learner._state
    found = 0
    for step in range(200):
        learner.train(make_batch(spec, 2, seed=step))
        newborn = (state.units.age[0, :8] == 0).nonzero()[:, 0]
        assert not state.parameters.weights[1][0][:, newborn].any()
        assert not state.parameters.biases[0][0][newborn].any()
        found += len(newborn)
    assert found > 5


@pytest.mark.parametrize("utility", ["random", "adaptable_contribution"])
@pytest.mark.parametrize(
    "optimizers",
    [
        [
            {"kind": "sgd", "lr": lr, "momentum": momentum}
            for lr, momentum in ((0.05, 0), (0.01, 0.9), (0.1, 0), (0.1, 0))
        ],
        [
            {"kind": "adam", "lr": lr, "beta2": beta2}
            for lr, beta2 in ((0.01, 0.999), (0.001, 0.9), (0.01, 0.9), (0.01, 0.9))
        ],
        [
            {"kind": "rmsprop", "lr": lr, "momentum": momentum}
            for lr, momentum in ((0.01, 0), (0.001, 0.9), (0.01, 0), (0.01, 0))
        ],
    ],
)
def test_company_does_not_change_a_learner(
    utility: str, optimizers: list[dict[str, Any]], make_spec: Callable[..., LearnerSpec]
) -> None:
    """Four learners with settings of their own, in one stack and alone."""
    resets = [
        {"replacement_rate": 0.05, "maturity_threshold": 5, "decay_rate": 0.9},
        {"replacement_rate": 0.2, "maturity_threshold": 9, "decay_rate": 0.99, "layers": "first"},
        {"replacement_rate": 0.1, "maturity_threshold": 3, "decay_rate": 0.5, "bias_compensation": False},
        {"replacement_rate": 0.1, "maturity_threshold": 3, "strength": 0.3, "max_replacements": 2},
    ]
    specs = [
        make_spec(seed=seed, optimizer=optimizer, resets={**of_one, "utility": utility}, network__activation="tanh")
        for seed, (optimizer, of_one) in enumerate(zip(optimizers, resets, strict=True))
    ]
    stacks = [specs, *([spec] for spec in specs)]
    states = [initial_stack(stack, CPU) for stack in stacks]
    engines = [TorchEngine(stack, state, CPU) for stack, state in zip(stacks, states, strict=True)]
    random = torch.Generator().manual_seed(1)
    scale = torch.full((4, 2, 1), 0.5 * losses.gradient_scale(specs[0].loss, 3))
    for _ in range(60):
        inputs = torch.randn(4, 2, 6, generator=random)
        targets = torch.nn.functional.one_hot(torch.randint(3, (4, 2), generator=random), 3).float()
        engines[0].step(inputs, targets, scale, torch.empty(4, 2, 3))
        for learner, engine in enumerate(engines[1:]):
            own = slice(learner, learner + 1)
            engine.step(inputs[own], targets[own], scale[own], torch.empty(1, 2, 3))
    together, *alone = states
    for learner, single in enumerate(alone):
        assert together.replacements[learner] == single.replacements[0]
        assert torch.equal(together.units.age[learner], single.units.age[0])
        torch.testing.assert_close(together.parameters.flat[learner], single.parameters.flat[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.units.utility[learner], single.units.utility[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("initializer", ["kaiming", "xavier", "lecun", "default"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "selu", "gelu", "sigmoid"])
def test_redraws_come_from_the_initial_distribution(
    initializer: str, activation: str, make_spec: Callable[..., LearnerSpec]
) -> None:
    spec = make_spec(network__initializer=initializer, network__activation=activation, network__hidden=[400, 300])
    first = initial_stack([spec], CPU).parameters
    layout = UnitLayout((6, 400), (400, 300), (300, 3), CPU)
    draws = GeneratorDraws([UniformGenerator(5)], layout, initial_bounds(spec.network))
    gain = {"relu": 2**0.5, "leaky_relu": (2 / 1.0001) ** 0.5, "tanh": 5 / 3, "gelu": 2**0.5}.get(activation, 1.0)
    kaiming = "lecun" if activation == "selu" else "kaiming"
    for layer, (into, out) in enumerate(((6, 400), (400, 300))):
        bound = {
            "kaiming": (1.0 if kaiming == "lecun" else gain) * (3 / into) ** 0.5,
            "xavier": gain * (6 / (into + out)) ** 0.5,
            "lecun": (3 / into) ** 0.5,
            "default": (1 / into) ** 0.5,
        }[initializer]
        for values in (first.weights[layer][0], draws.incoming_weights(0, layer, 300)):
            assert 0.97 * bound < float(values.abs().max()) <= bound * (1 + 1e-6)
            assert abs(float(values.mean())) < 0.1 * bound


def test_draws_depend_on_the_seed_alone(make_spec: Callable[..., LearnerSpec]) -> None:
    first, again, other = (Learner(make_spec(seed=seed))._state.parameters.flat for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
