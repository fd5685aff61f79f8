"""Networks of every kind: what they are built as, what becomes of their features, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from network_kinds import (
    IMAGE,
    NETWORKS,
    SMALL_TRANSFORMER,
    batch_for,
    examples,
    install_architectures,
    plain_spec,
)
from torch import nn

from cbp import Batch, FormatError, Learner, LearnerSpec, SpecError
from cbp.architectures.building import build, found_units
from cbp.architectures.inputs import RunningNormalization, tabular_inputs
from cbp.architectures.profile import layer_names, profile_of, replacement_rates
from cbp.export import to_module, to_onnx, to_torch_export
from cbp.spec.network_spec import InputSpec


def spec_of(network: dict[str, Any], **changes: Any) -> LearnerSpec:
    plain = {"loss": "cross_entropy", "optimizer": {"kind": "sgd", "lr": 0.05}, "batch_size": 4}
    return LearnerSpec.parse(plain | {"network": {"out_features": 3, **network}} | changes)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_is_what_the_specification_says(name: str) -> None:
    spec = LearnerSpec.parse(plain_spec(name))
    assert LearnerSpec.parse(spec.to_plain()) == spec
    module = build(spec.network, seed=3)
    assert sum(parameter.numel() for parameter in module.parameters()) == spec.parameter_count
    groups = found_units(spec.network, module).groups
    assert tuple(group.units for group in groups) == spec.network.hidden_units
    assert len(spec.layer_names) == len(groups) + 1
    features = torch.from_numpy(batch_for(spec, 5).features)
    assert module(features).shape == (5, 3)
    for group in groups:  # a newborn unit is drawn from what the first ones were drawn from
        for part in group.incoming:
            weight = getattr(part.layer, part.weight)
            assert 0.6 * part.bound < weight.abs().max() <= part.bound
            if part.bias is not None:
                assert not getattr(part.layer, part.bias).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_learns(name: str) -> None:
    spec = LearnerSpec.parse(
        plain_spec(name, optimizer={"kind": "adam", "lr": 0.01}, batch_size=8, resets={"replacement_rate": 1e-4})
    )
    learner = Learner(spec, engine="auto")
    batch = batch_for(spec, 64)
    first = learner.train(batch).loss
    for _ in range(12):
        last = learner.train(batch).loss
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        ({"kind": "mlp", "in_features": 5, "hidden": [8, 7], "inputs": {"normalize": True}}, 0),
        ({"kind": "convnet", **IMAGE, "channels": [4, 6], "kernel_size": 1}, 0),
        ({"kind": "convnet", **IMAGE, "channels": [4, 6], "hidden": [9]}, 2),
        ({**SMALL_TRANSFORMER, "input": "sequence", "length": 6, "in_features": 4}, 1),
    ],
)
def test_outputs_stay_when_constant_units_are_reset(network: dict[str, Any], layer: int) -> None:
    resets = {"layers": "none", "maturity_threshold": 3}
    spec = spec_of(network, optimizer={"kind": "sgd", "lr": 1e-12}, resets=resets)
    learner = Learner(spec, engine="module")
    state = learner._state
    [part] = found_units(spec.network, state.network).groups[layer].incoming
    with torch.no_grad():
        getattr(part.layer, part.weight).zero_()
        getattr(part.layer, part.bias).fill_(0.7)
    learner.train(batch_for(spec, 40))
    features = examples(spec, 6, seed=5)[0]
    before = learner.predict(features)
    units = spec.network.hidden_units[layer]
    assert learner.reset_units([layer], 1.0) == {f"hidden_{layer}": units}
    np.testing.assert_allclose(learner.predict(features), before, rtol=1e-4, atol=1e-5)


# -- what becomes of features --


def test_running_statistics_are_those_of_all_examples_seen() -> None:
    layer = RunningNormalization(4, axis=1, window=10_000)
    random = np.random.default_rng(0)
    seen = (random.normal(size=(60, 4, 3)) * [[2], [0.1], [30], [1]] + [[5], [0], [-40], [0]]).astype(np.float32)
    for start, end in ((0, 1), (1, 20), (20, 60)):
        layer(torch.from_numpy(seen[start:end]))
    np.testing.assert_allclose(layer.mean, seen.mean(axis=(0, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.variance, seen.var(axis=(0, 2)), rtol=1e-3, atol=1e-4)
    assert layer.count == 60
    layer.eval()
    normalized = layer(torch.from_numpy(seen))
    assert layer.count == 60
    torch.testing.assert_close(normalized.mean(dim=(0, 2)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(normalized.std(dim=(0, 2)), torch.ones(4), rtol=0, atol=1e-2)
    assert layer(torch.full((1, 4, 1), 1e6)).max() == 10.0


def test_running_statistics_forget_what_is_older_than_their_window() -> None:
    layer = RunningNormalization(1, axis=1, window=50)
    layer(torch.full((1000, 1), 100.0))
    for value in torch.randn(400, 1, generator=torch.Generator().manual_seed(0)):
        layer(value.unsqueeze(0))
    assert abs(float(layer.mean)) < 0.5
    assert 0.3 < float(layer.variance) < 10
    assert layer.count == 50


def test_normalisation_makes_features_of_any_scale_learnable() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 3))
    labels = (features @ [1.0, -1.0, 0.5] > 0).astype(int)
    scaled = features * [1e4, 1e-3, 1.0] + [3e4, 0.0, -7.0]
    losses = {}
    for normalize in (True, False):
        spec = spec_of({"kind": "linear", "in_features": 3, "out_features": 2, "inputs": {"normalize": normalize}})
        learner = Learner(spec, engine="auto")
        for _ in range(5):
            losses[normalize] = learner.train(Batch.validate(spec, scaled, labels)).loss
    assert losses[True] < 0.3 < losses[False]


def test_categories_are_codes_and_not_quantities() -> None:
    columns = [{"column": 2, "cardinality": 3}, {"column": 0, "hash_buckets": 8, "dimension": 2}]
    inputs = tabular_inputs(4, InputSpec(columns=columns))
    assert InputSpec(columns=columns).width(4) == 2 + 3 + 2
    features = torch.tensor([[12345.0, 0.5, 2.0, -1.0], [-7.0, 0.25, 0.0, 4.0]])
    encoded = inputs(features)
    assert encoded.shape == (2, 7)
    torch.testing.assert_close(encoded[:, :2], features[:, [1, 3]])
    torch.testing.assert_close(encoded[:, 2:5], torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert not torch.equal(encoded[0, 5:], encoded[1, 5:])
    assert torch.equal(inputs(features.flip(0)).flip(0), encoded)


def test_hashed_categories_spread_over_their_buckets() -> None:
    inputs = tabular_inputs(1, InputSpec(columns=[{"column": 0, "hash_buckets": 16}]))
    for values in (torch.arange(4096.0), torch.arange(4096.0) * 64, torch.arange(-(2.0**24), 2.0**24, 8192.0)):
        counts = inputs(values.unsqueeze(1)).sum(dim=0)
        assert counts.sum() == len(values)
        assert counts.min() > 0.5 * len(values) / 16
        assert counts.max() < 1.5 * len(values) / 16


# -- what is refused --


@pytest.mark.parametrize(
    ("network", "field", "says"),
    [
        ({"kind": "rnn"}, "network.kind", "mlp, linear, convnet"),
        ({"in_features": 4, "hidden": [3], "activation": "softplus"}, "network.activation", "'crelu'"),
        ({"kind": "linear", "in_features": 4, "hidden": [3]}, "network.hidden", "Unknown field"),
        ({"kind": "linear", "in_features": 2**23}, "network.in_features", "At most"),
        ({"kind": "linear", "in_features": 4, "out_features": 2**23}, "network.out_features", "At most"),
        ({"kind": "mlp", "in_features": 4, "hidden": [9] * 300, "normalization": "layer"}, "network.hidden", "256"),
        ({"kind": "mlp", "in_features": 4, "hidden": [9], "normalization": "batch"}, "network.normalization", "layer"),
        ({"kind": "convnet", **IMAGE, "channels": [4], "kernel_size": 2}, "network.kernel_size", "odd"),
        ({"kind": "convnet", **IMAGE, "channels": [4, 4, 4]}, "network.pooling", "use fewer"),
        ({"kind": "convnet", **IMAGE, "channels": []}, "network.channels", "at least 1"),
        ({"kind": "convnet", **IMAGE, "channels": [4], "activation": "crelu"}, "network.activation", "relu"),
        ({"kind": "resnet", **IMAGE, "height": 2**16, "width": 2**16}, "network.height", "at most"),
        (
            {"kind": "resnet", **IMAGE, "inputs": {"columns": [{"column": 0, "cardinality": 2}]}},
            "network.inputs.columns",
            "no columns",
        ),
        ({"kind": "transformer", "length": 3}, "network.input", "required"),
        ({"kind": "transformer", "input": "tokens", "length": 3}, "network.vocabulary", "needs length and vocabulary"),
        ({"kind": "transformer", "input": "tabular", "in_features": 3, "length": 2}, "network.length", "no more"),
        ({**SMALL_TRANSFORMER, "input": "tabular", "in_features": 3, "width": 9}, "network.width", "multiple of heads"),
        (
            {"kind": "transformer", "input": "tokens", "length": 3, "vocabulary": 4, "inputs": {"normalize": True}},
            "network.inputs.normalize",
            "leave it out",
        ),
        (
            {"in_features": 4, "hidden": [5], "inputs": {"columns": [{"column": 0}]}},
            "network.inputs.columns[0]",
            "either",
        ),
        (
            {"in_features": 4, "hidden": [5], "inputs": {"columns": [{"column": 4, "cardinality": 2}]}},
            "network.inputs.columns[0].column",
            "0 to 3",
        ),
        (
            {"in_features": 4, "hidden": [5], "inputs": {"columns": [{"column": 1, "cardinality": 2}] * 2}},
            "network.inputs.columns[1].column",
            "twice",
        ),
        (
            {"kind": "registered", "name": "unknown", "shape": [3], "inputs": {"normalize": True}},
            "network.inputs",
            "leave it out",
        ),
    ],
)
def test_mistakes_are_named_by_field(network: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(network)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert says in caught.value.violations[0].description


def test_batches_cannot_be_normalised_in_steps_of_one_example() -> None:
    network = {"kind": "resnet", **IMAGE, "channels": [4], "normalization": "batch"}
    for batch_size in (0, 1):
        with pytest.raises(SpecError, match=r"network\.normalization: .* or use 'group'"):
            spec_of(network, batch_size=batch_size)
    spec_of(network, batch_size=2)


def test_networks_beyond_all_memory_are_counted_and_not_built() -> None:
    tokens = {"kind": "transformer", "input": "tokens", "length": 8, "vocabulary": 2**20, "width": 1024}
    assert spec_of(tokens).parameter_count > 2**30
    with pytest.raises(SpecError, match=r"network: It has \d+ parameters, at most"):
        Learner(spec_of({"in_features": 4, "hidden": [2**16] * 4, "activation": "crelu"}), engine="module")


# -- architectures of the operator --


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of an operator, installed."""
    install_architectures(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_networks", raising=False)


def registered(name: str, **settings: float) -> dict[str, Any]:
    return {"kind": "registered", "name": name, "shape": [3, 4], "settings": settings}


@pytest.mark.usefixtures("architectures")
@pytest.mark.parametrize(("name", "units"), [("small", 10), ("recurrent", 6)])
def test_an_operator_adds_architectures(name: str, units: int) -> None:
    spec = spec_of(registered(name, units=10), resets={"replacement_rate": 0.05, "maturity_threshold": 3})
    assert profile_of(spec.network).hidden_units == (units,)
    assert layer_names(spec) == ("hidden_0", "output")
    assert replacement_rates(spec) == (0.05,)
    assert LearnerSpec.parse(spec.to_plain()) == spec
    learner, other = Learner(spec, engine="auto"), Learner(spec, engine="auto")
    torch.manual_seed(4)
    learner.train(batch_for(spec, 24))
    resumed = Learner.restore(learner.snapshot(), engine="auto")
    torch.manual_seed(5)  # a random layer draws the same numbers all the same
    other.train(batch_for(spec, 24))
    for run in (learner, other, resumed):
        run.train(batch_for(spec, 24, seed=1))
    features = examples(spec, 4)[0]
    np.testing.assert_array_equal(learner.predict(features), other.predict(features))
    np.testing.assert_array_equal(learner.predict(features), resumed.predict(features))
    assert learner.progress.replacements["hidden_0"] > 0
    assert learner.sample_plasticity().layers[0].gradient_norm


@pytest.mark.usefixtures("architectures")
@pytest.mark.parametrize(
    ("name", "field", "says"),
    [
        ("small", "network.settings", "KeyError: 'units'"),
        ("nothing", "network.settings", "made a NoneType"),
        ("wrong", "network.name", "does not take examples [1, 3, 4]"),
        ("other", "network.name", "No architecture 'other' is installed here; there are nothing, recurrent, small"),
    ],
)
def test_an_operators_mistakes_are_named(name: str, field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Learner(spec_of(registered(name)), engine="auto")
    assert [violation.field for violation in caught.value.violations] == [field]
    assert says in caught.value.violations[0].description


@pytest.mark.usefixtures("architectures")
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"resets": {"layers": [1]}}, "resets.layers"),
        ({"resets": {"layer_replacement_rates": {"hidden_1": 0.1}}}, "resets.layer_replacement_rates.hidden_1"),
    ],
)
def test_layers_that_a_registered_architecture_does_not_have_are_named(settings: dict[str, Any], field: str) -> None:
    spec = spec_of(registered("small", units=10), **settings)
    with pytest.raises(SpecError, match=r"No hidden layer 'hidden_1'; there are hidden_0") as caught:
        Learner(spec, engine="auto")
    assert [violation.field for violation in caught.value.violations] == [field]
    learner = Learner(spec_of(registered("small", units=10)), engine="auto")
    with pytest.raises(SpecError, match="No hidden layer"):
        learner.update(spec)


def test_a_specification_needs_no_architecture_and_says_that_it_does_not_count_it() -> None:
    spec = spec_of(registered("gone"), resets={"layers": [0]}, methods=[{"kind": "l2_init", "strength": 0.5}])
    assert LearnerSpec.parse(spec.to_plain()) == spec
    with pytest.raises(SpecError, match="shows only when it is built"):
        spec.layer_names  # noqa: B018


# -- elsewhere --


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_a_module_elsewhere(name: str, tmp_path: Path) -> None:
    spec = LearnerSpec.parse(plain_spec(name))
    learner = Learner(spec, engine="auto")
    learner.train(batch_for(spec, 21))
    snapshot = learner.snapshot()
    features = batch_for(spec, 7, seed=1).features
    expected = learner.predict(features)
    module = to_module(snapshot)
    assert isinstance(module, nn.Module)
    assert not module.training
    np.testing.assert_allclose(module(torch.from_numpy(features)).detach(), expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "network.pt2").write_bytes(to_torch_export(snapshot))
    program = torch.export.load(tmp_path / "network.pt2").module()
    np.testing.assert_allclose(program(torch.from_numpy(features)).detach(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(FormatError, match=f"not for this {spec.network.kind}.*; torch.export holds the network"):
        to_onnx(snapshot)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize(("width", "advised"), [(1600, True), (16, False)])
def test_parameters_of_large_networks_are_meant_for_huge_pages(width: int, advised: bool) -> None:
    learner = Learner(
        spec_of({"kind": "mlp", "in_features": width, "hidden": [width], "out_features": 2}), engine="torch"
    )
    flat = learner._state.parameters.flat  # type: ignore[attr-defined]
    assert ("hg" in flags_of_memory(flat.data_ptr() + 2 * flat.numel())) is advised


def flags_of_memory(address: int) -> list[str]:
    """As the kernel lists them of the mapping that holds this address."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if head == "VmFlags:" and within:
            return rest
        if not head.endswith(":"):
            start, end = (int(bound, 16) for bound in head.split("-"))
            within = start <= address < end
    raise AssertionError("no such memory")
