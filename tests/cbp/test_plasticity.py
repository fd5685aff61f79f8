import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbp import Batch, LayerPlasticity, Learner, LearnerSpec
from cbp.plasticity import SAMPLES_PER_UNIT, ranks

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]
HIDDEN_ONLY = {
    "dormant_fraction",
    "dead_fraction",
    "effective_rank",
    "stable_rank",
    "replacements",
    "age_quantiles",
    "utility_quantiles",
}


def trained(spec: LearnerSpec, batch: Batch) -> Learner:
    learner = Learner(spec)
    learner.train(batch)
    return learner


def test_every_layer_is_measured_in_its_own_terms(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    sample = trained(spec, make_batch(spec, 60)).sample_plasticity()
    assert (sample.step, sample.examples) == (30, 60)
    assert [layer.layer for layer in sample.layers] == ["hidden_0", "hidden_1", "output"]
    assert [layer.units for layer in sample.layers] == [8, 7, 3]
    for layer in sample.layers:
        missing = {name for name, value in dataclasses.asdict(layer).items() if value is None}
        assert missing == (HIDDEN_ONLY if layer.layer == "output" else set())


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
    assert layer.utility_quantiles is None


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "huber", "binary_cross_entropy"])
def test_gradient_norm_is_autograds(loss: str, make_spec: MakeSpec, make_batch: MakeBatch) -> None:
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


def test_dead_and_dormant_units_are_counted(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(resets__layers="none", optimizer__lr=1e-30)
    learner = trained(spec, make_batch(spec, 60))
    before = learner.sample_plasticity().layers[0]
    learner._state.parameters.biases[0][0, :2] = -1e6
    learner._state.parameters.weights[0][0, 2] *= 1e-4
    after = learner.sample_plasticity().layers[0]
    assert before.dead_fraction == 0.0
    assert after.dead_fraction == pytest.approx(2 / 8)
    assert after.dormant_fraction == pytest.approx(3 / 8)


def test_a_silent_layer_is_dormant_altogether(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = trained(spec, make_batch(spec, 60))
    learner._state.parameters.biases[0][:] = -1e6
    layer = learner.sample_plasticity().layers[0]
    assert (layer.dormant_fraction, layer.dead_fraction) == (1.0, 1.0)
    assert (layer.effective_rank, layer.stable_rank) == (0.0, 0.0)


def test_saturated_units_are_not_dead(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(network__activation="tanh")
    learner = trained(spec, make_batch(spec, 60))
    learner._state.parameters.biases[0][:] = 1e3
    assert learner.sample_plasticity().layers[0].dead_fraction == 0.0


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_ranks_of_orthogonal_activations_are_exact(rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns, _ = np.linalg.qr(random.normal(size=(40, rank)))
    rows, _ = np.linalg.qr(random.normal(size=(8, rank)))
    effective, stable = ranks(torch.from_numpy(columns @ rows.T * random.uniform(0.1, 10)))
    assert effective == pytest.approx(rank, rel=1e-6)
    assert stable == pytest.approx(rank, rel=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_stable_rank_is_at_most_the_rank(seed: int) -> None:
    activations = torch.from_numpy(np.random.default_rng(seed).normal(size=(30, 9)))
    effective, stable = ranks(activations)
    assert 1.0 <= stable <= 9.0 + 1e-9
    assert 1.0 <= effective <= 9.0 + 1e-9


def test_a_rank_needs_twice_as_many_examples_as_units(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """On fewer, it would show a plasticity loss that is not there."""
    spec = make_spec()
    learner = trained(spec, make_batch(spec, SAMPLES_PER_UNIT * 7))
    first, second, _ = learner.sample_plasticity().layers
    assert first.effective_rank is None
    assert first.stable_rank is None
    assert second.effective_rank is not None
    assert first.dead_fraction is not None


def test_the_documented_share_of_the_full_rank_is_right() -> None:
    """Independent units, 100 of them: how much of the full effective rank the smallest allowed probe shows."""
    random = torch.Generator().manual_seed(0)
    shown = {n: ranks(torch.randn(n * 100, 100, generator=random))[0] / 100 for n in (1, SAMPLES_PER_UNIT, 100)}
    assert shown[1] < 0.85
    assert 0.9 < shown[SAMPLES_PER_UNIT] < 0.97
    assert shown[100] > 0.99


def test_replaced_units_are_young(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(resets__replacement_rate=0.3)
    learner = trained(spec, make_batch(spec, 100))
    layer = learner.sample_plasticity().layers[0]
    assert layer.replacements == learner.progress.replacements["hidden_0"]
    assert layer.age_quantiles is not None
    assert layer.age_quantiles[0] < layer.age_quantiles[2] < 50


def test_numbers_are_finite_or_absent_even_in_a_broken_network(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = trained(spec, make_batch(spec, 60))
    for broken in (math.nan, math.inf):
        learner._state.parameters.weights[0][0, 0, 0] = broken
        learner._state.units.utility[0, 3] = broken
        sample = learner.sample_plasticity()
        json.dumps(sample.to_plain(), allow_nan=False)
        assert sample.layers[0].weight_norm is None
        assert sample.layers[0].utility_quantiles is None


def test_a_sample_is_plain_json(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    plain = trained(spec, make_batch(spec, 60)).sample_plasticity().to_plain()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain["layers"][0]) == {field.name for field in dataclasses.fields(LayerPlasticity)}
