import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbp import Batch, LayerPlasticity, Learner, LearnerSpec, PlasticitySample, SnapshotError, Trainability
from cbp.plasticity.measures import (
    GRADIENT_EXAMPLES,
    SAMPLES_PER_UNIT,
    effective_rank,
    gradient_rank,
    measure_activations,
    saturated_fraction,
    singular_values,
    srank,
    stable_rank,
)

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]
Trained = Callable[[LearnerSpec, Batch], Learner]
HIDDEN_ONLY = {
    "dormant_fraction",
    "dead_fraction",
    "feature_norm",
    "effective_rank",
    "stable_rank",
    "srank",
    "replacements",
    "age_quantiles",
    "utility_quantiles",
}


@pytest.fixture(params=["torch", "compiled"])
def trained(request: pytest.FixtureRequest) -> Trained:
    """Makes a learner that has learnt a batch, of either engine that measures."""

    def make(spec: LearnerSpec, batch: Batch) -> Learner:
        learner = Learner(spec, engine=request.param)
        learner.train(batch)
        return learner

    return make


def test_every_layer_is_measured_in_its_own_terms(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec()
    sample = trained(spec, make_batch(spec, 100)).sample_plasticity()
    assert (sample.step, sample.examples) == (50, 100)
    assert [layer.layer for layer in sample.layers] == ["hidden_0", "hidden_1", "output"]
    assert [layer.units for layer in sample.layers] == [8, 7, 3]
    for layer in sample.layers:
        missing = {name for name, value in dataclasses.asdict(layer).items() if value is None}
        assert missing == {"saturated_fraction"} | (HIDDEN_ONLY if layer.layer == "output" else set())


def test_weights_are_compared_with_the_first_draw(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = Learner(spec)
    first = learner._state.parameters.weights[0][0].clone()
    assert [layer.distance_from_init for layer in learner.sample_plasticity().layers] == [0.0, 0.0, 0.0]
    learner.train(make_batch(spec, 60))
    weight = learner._state.parameters.weights[0][0]
    layer = learner.sample_plasticity().layers[0]
    assert layer.distance_from_init == pytest.approx(float((weight - first).norm()), rel=1e-5)
    assert layer.mean_abs_weight == pytest.approx(float(weight.abs().mean()), rel=1e-5)
    assert layer.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)


def test_before_any_example_only_weights_are_known(make_spec: MakeSpec) -> None:
    layer = Learner(make_spec()).sample_plasticity().layers[0]
    assert layer.weight_norm is not None
    assert layer.age_quantiles == (0.0, 0.0, 0.0)
    assert layer.gradient_norm is None
    assert layer.dormant_fraction is None
    assert layer.feature_norm is None
    assert layer.gradient_rank is None
    assert layer.utility_quantiles is None


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "huber", "binary_cross_entropy"])
def test_gradient_norm_is_autograds(loss: str, make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec(loss=loss, network__activation="gelu")
    batch = make_batch(spec, 40)
    learner = trained(spec, batch)
    parameters = learner._state.parameters
    weights = [weight[0].clone().requires_grad_() for weight in parameters.weights]
    biases = [bias[0].clone().requires_grad_() for bias in parameters.biases]
    hidden = torch.from_numpy(batch.features)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        hidden = torch.nn.functional.gelu(hidden @ weight.T + bias)
    outputs, targets = hidden @ weights[-1].T + biases[-1], torch.from_numpy(batch.targets)
    losses = {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "mse": torch.nn.functional.mse_loss,
        "huber": torch.nn.functional.huber_loss,
        "binary_cross_entropy": torch.nn.functional.binary_cross_entropy_with_logits,
    }
    losses[loss](outputs, targets).backward()
    for layer, weight, bias in zip(learner.sample_plasticity().layers, weights, biases, strict=True):
        assert weight.grad is not None
        assert bias.grad is not None
        assert layer.gradient_norm == pytest.approx(float(torch.hypot(weight.grad.norm(), bias.grad.norm())), rel=1e-4)


def test_dead_and_dormant_units_are_counted(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec(resets__layers="none", optimizer__lr=1e-30)
    learner = trained(spec, make_batch(spec, 60))
    before = learner.sample_plasticity().layers[0]
    learner._state.parameters.biases[0][0, :2] = -1e6
    learner._state.parameters.weights[0][0, 2] *= 1e-4
    after = learner.sample_plasticity().layers[0]
    assert before.dead_fraction == 0.0
    assert after.dead_fraction == pytest.approx(2 / 8)
    assert after.dormant_fraction == pytest.approx(3 / 8)


def test_a_silent_layer_is_dormant_altogether(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec()
    learner = trained(spec, make_batch(spec, 60))
    learner._state.parameters.biases[0][:] = -1e6
    layer = learner.sample_plasticity().layers[0]
    assert (layer.dormant_fraction, layer.dead_fraction) == (1.0, 1.0)
    assert (layer.effective_rank, layer.stable_rank) == (0.0, 0.0)


def test_saturated_units_are_not_dead(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec(network__activation="tanh")
    learner = trained(spec, make_batch(spec, 60))
    learner._state.parameters.biases[0][:] = 1e3
    assert learner.sample_plasticity().layers[0].dead_fraction == 0.0


seeds = st.integers(0, 2**32 - 1)
RANKS = (effective_rank, stable_rank, srank)


@pytest.mark.parametrize(
    ("activation", "bound", "units"), [("tanh", (-0.9, 0.9), (0.95, -0.5)), ("sigmoid", (0.05, 0.95), (0.97, 0.5))]
)
def test_saturation_is_a_share_of_activations(
    activation: str,
    bound: tuple[float, float],
    units: tuple[float, float],
    make_spec: MakeSpec,
    make_batch: MakeBatch,
    trained: Trained,
) -> None:
    spec = make_spec(network__activation=activation, resets__layers="none", optimizer__lr=1e-30)
    learner = trained(spec, make_batch(spec, 60))
    inverse = math.atanh if activation == "tanh" else lambda value: math.log(value / (1 - value))
    first = learner._state.parameters
    first.weights[0][:] = 0.0
    first.biases[0][0] = inverse(units[1])
    first.biases[0][0, :2] = inverse(units[0])
    assert learner.sample_plasticity().layers[0].saturated_fraction == 2 / 8
    on_some = np.array([[units[0], units[1]], [units[1], units[1]], [bound[0], bound[1]], [bound[0] - 0.01, 0.3]])
    assert saturated_fraction(on_some, bound) == 2 / 8, "the bounds themselves are not outside"


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "identity"])
def test_what_has_no_bounds_does_not_saturate(
    activation: str, make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained
) -> None:
    spec = make_spec(network__activation=activation)
    assert trained(spec, make_batch(spec, 20)).sample_plasticity().layers[0].saturated_fraction is None


def test_feature_norm_is_the_mean_over_examples() -> None:
    measured = measure_activations(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]]), 0.025, None)
    assert measured["feature_norm"] == 2.0


def test_ranks_by_hand() -> None:
    spectrum = np.array([0.0, 3.0, 1.0])
    assert stable_rank(spectrum) == pytest.approx(10 / 9)
    assert effective_rank(spectrum) == pytest.approx(4 / 3**0.75)  # exp(−¾ log ¾ − ¼ log ¼)
    assert srank(spectrum) == 2
    assert srank(spectrum, delta=0.25) == 1
    assert srank(np.ones(100)) == 99, "99 of 100 equal ones hold 99 %"
    assert srank(np.ones(99)) == 99
    for rank in RANKS:
        assert rank(np.zeros(4)) == rank(np.zeros(0)) == 0


def test_singular_values_are_those_of_a_decomposition() -> None:
    activations = np.random.default_rng(1).normal(size=(40, 7)) @ np.diag([1e3, 10.0, 1.0, 1.0, 0.1, 0.0, 0.0])
    direct = np.linalg.svd(activations, compute_uv=False)[::-1]
    np.testing.assert_allclose(singular_values(activations), direct, rtol=1e-5, atol=1e-9)
    assert list(singular_values(activations)[:2]) == [0.0, 0.0]


@given(st.integers(1, 6), seeds)
@settings(max_examples=30, deadline=None)
def test_ranks_of_orthogonal_activations_are_exact(rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns, _ = np.linalg.qr(random.normal(size=(40, rank)))
    rows, _ = np.linalg.qr(random.normal(size=(8, rank)))
    spectrum = singular_values(columns @ rows.T * random.uniform(0.1, 10))
    for measured in RANKS:
        assert measured(spectrum) == pytest.approx(rank, rel=1e-6)


@given(seeds, st.floats(1e-6, 1e6), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_ranks_have_bounds_and_ignore_scale_and_order(seed: int, factor: float, width: int) -> None:
    random = np.random.default_rng(seed)
    activations = random.normal(size=(30, width)) * random.choice([0.0, 0.01, 1.0], size=width)
    spectrum = singular_values(activations)
    changed = singular_values(factor * random.permutation(random.permutation(activations), axis=1))
    for rank in RANKS:
        assert rank(spectrum) == pytest.approx(rank(changed), rel=1e-6)
        assert 0 <= rank(spectrum) <= np.linalg.matrix_rank(activations) + 1e-9 <= width + 1e-9
    assert stable_rank(spectrum) <= effective_rank(spectrum) ** 2 + 1e-9


def gradients_of_examples(inputs: torch.Tensor, deltas: torch.Tensor) -> np.ndarray:
    """[n, out · (in + 1)], each written out."""
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    return torch.einsum("no,ni->noi", deltas, torch.cat([inputs, ones], dim=1)).flatten(1).numpy()


@given(seeds, st.floats(1e-12, 1e6), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_gradient_rank_is_that_of_the_gradients_written_out(seed: int, factor: float, into: int, out: int) -> None:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(GRADIENT_EXAMPLES + 3, into, generator=random, dtype=torch.float64)
    deltas = torch.randn(GRADIENT_EXAMPLES + 3, out, generator=random, dtype=torch.float64)
    newest = gradients_of_examples(inputs[3:], deltas[3:])
    measured = gradient_rank(inputs, factor * deltas)
    assert measured is not None
    assert measured == pytest.approx(effective_rank(np.linalg.svd(newest, compute_uv=False)), rel=1e-5)
    assert 0 < measured <= min(GRADIENT_EXAMPLES, out * (into + 1)) + 1e-9
    order = torch.randperm(GRADIENT_EXAMPLES, generator=random)
    assert gradient_rank(inputs[3:][order], deltas[3:][order]) == pytest.approx(measured, rel=1e-6)


def test_gradient_rank_of_special_cases() -> None:
    inputs, deltas = torch.randn(2, GRADIENT_EXAMPLES, 4, generator=torch.Generator().manual_seed(0))
    assert gradient_rank(inputs, torch.zeros_like(deltas)) == 0.0
    assert gradient_rank(inputs[:1].expand_as(inputs), deltas[:1].expand_as(deltas)) == pytest.approx(1.0)
    assert gradient_rank(inputs[1:], deltas[1:]) is None, "of fewer examples it would be lower"
    assert gradient_rank(inputs, deltas / 0.0) is None


@pytest.mark.gpu
def test_a_learner_on_a_gpu_is_measured_alike(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec(network__activation="tanh")
    snapshot = trained(spec, make_batch(spec, 100)).snapshot()
    on_cpu, on_gpu = (Learner.restore(snapshot, device=device).sample_plasticity() for device in ("cpu", "cuda"))
    for here, there in zip(on_cpu.layers, on_gpu.layers, strict=True):
        for name in ("saturated_fraction", "feature_norm", "effective_rank", "srank", "gradient_rank"):
            value = getattr(here, name)
            assert getattr(there, name) == (None if value is None else pytest.approx(value, rel=1e-3)), name


def test_gradient_rank_is_of_the_losss_own_gradients(
    make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained
) -> None:
    spec = make_spec(loss="cross_entropy", network__activation="tanh", resets__layers="none")
    batch = make_batch(spec, GRADIENT_EXAMPLES)
    learner = trained(spec, batch)
    parameters = learner._state.parameters
    weights = [weight[0].clone().requires_grad_() for weight in parameters.weights]
    biases = [bias[0].clone().requires_grad_() for bias in parameters.biases]
    rows: list[list[torch.Tensor]] = [[], [], []]
    for features, label in zip(torch.from_numpy(batch.features), torch.from_numpy(batch.targets), strict=True):
        hidden = features
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = torch.tanh(weight @ hidden + bias)
        loss = torch.nn.functional.cross_entropy(weights[-1] @ hidden + biases[-1], label)
        gradients = torch.autograd.grad(loss, [*weights, *biases])
        for layer, of_layer in enumerate(rows):
            of_layer.append(torch.cat([gradients[layer].flatten(), gradients[layer + 3]]))
    for measured, of_layer in zip(learner.sample_plasticity().layers, rows, strict=True):
        spectrum = np.linalg.svd(torch.stack(of_layer).numpy().astype(np.float64), compute_uv=False)
        assert measured.gradient_rank == pytest.approx(effective_rank(spectrum), rel=1e-3)


def test_a_rank_needs_twice_as_many_examples_as_units(
    make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained
) -> None:
    """On fewer, it would show a plasticity loss that is not there."""
    spec = make_spec()
    learner = trained(spec, make_batch(spec, SAMPLES_PER_UNIT * 7))
    first, second, _ = learner.sample_plasticity().layers
    assert first.effective_rank is None
    assert first.stable_rank is None
    assert first.srank is None
    assert first.feature_norm is not None
    assert second.effective_rank is not None
    assert first.dead_fraction is not None


def test_the_documented_share_of_the_full_rank_is_right() -> None:
    """Independent units, 100 of them: how much of the full effective rank the smallest allowed probe shows."""
    random = torch.Generator().manual_seed(0)
    shown = {
        n: effective_rank(singular_values(torch.randn(n * 100, 100, generator=random).double().numpy())) / 100
        for n in (1, SAMPLES_PER_UNIT, 100)
    }
    assert shown[1] < 0.85
    assert 0.9 < shown[SAMPLES_PER_UNIT] < 0.97
    assert shown[100] > 0.99


def test_replaced_units_are_young(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec(resets__replacement_rate=0.3)
    learner = trained(spec, make_batch(spec, 100))
    layer = learner.sample_plasticity().layers[0]
    assert layer.replacements == learner.progress.replacements["hidden_0"]
    assert layer.age_quantiles is not None
    assert layer.age_quantiles[0] < layer.age_quantiles[2] < 50


def test_numbers_are_finite_or_absent_even_in_a_broken_network(
    make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained
) -> None:
    spec = make_spec()
    learner = trained(spec, make_batch(spec, 60))
    for broken in (math.nan, math.inf):
        learner._state.parameters.weights[0][0, 0, 0] = broken
        learner._state.units.utility[0, 3] = broken
        sample = learner.sample_plasticity()
        json.dumps(sample.to_plain(), allow_nan=False)
        assert sample.layers[0].weight_norm is None
        assert sample.layers[0].utility_quantiles is None


def test_a_sample_is_plain_json(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec()
    plain = trained(spec, make_batch(spec, 60)).sample_plasticity().to_plain()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain["layers"][0]) == {field.name for field in dataclasses.fields(LayerPlasticity)}


def test_a_sample_comes_back_from_its_plain_form(make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained) -> None:
    spec = make_spec()
    sample = trained(spec, make_batch(spec, 100)).sample_plasticity()
    assert PlasticitySample.from_plain(json.loads(json.dumps(sample.to_plain()))) == sample
    test = Trainability(step=40, loss=None, fresh_loss=0.5, chance_loss=1.0)
    tested = dataclasses.replace(sample, trainability=test)
    assert PlasticitySample.from_plain(json.loads(json.dumps(tested.to_plain()))) == tested


def test_a_sample_of_an_earlier_version_can_be_read(
    make_spec: MakeSpec, make_batch: MakeBatch, trained: Trained
) -> None:
    spec = make_spec()
    plain = trained(spec, make_batch(spec, 100)).sample_plasticity().to_plain()
    later = ("saturated_fraction", "feature_norm", "srank", "gradient_rank")
    expected = PlasticitySample.from_plain(plain)
    del plain["trainability"]
    for layer in plain["layers"]:
        for name in later:
            del layer[name]
    read = PlasticitySample.from_plain(plain)
    assert read.trainability is None
    for of_read, of_expected in zip(read.layers, expected.layers, strict=True):
        assert of_read == dataclasses.replace(of_expected, **dict.fromkeys(later))
    with pytest.raises(SnapshotError):
        PlasticitySample.from_plain({"step": 1, "examples": 1, "layers": [{"units": 3}]})
