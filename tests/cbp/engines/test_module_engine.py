"""What holds for every network that is trained as a module: the same promises as for a multilayer perceptron."""

import numpy as np
import pytest
import torch
from network_kinds import METHODS, NETWORKS, OPTIMIZERS, PERCEPTRON_ENGINES, batch_for, examples, plain_spec

from cbp import (
    Batch,
    BatchError,
    CbpError,
    DivergenceError,
    Learner,
    LearnerSnapshot,
    LearnerSpec,
    SnapshotError,
    SpecError,
    train_together,
)
from cbp.spec.learner_spec import goes_with_resets

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def make(name: str, device: str = "cpu", **changes) -> Learner:
    return Learner(LearnerSpec.parse(plain_spec(name, **changes)), device=device, engine="auto")


def assert_same(one: Learner, other: Learner) -> None:
    first, second = one.snapshot(), other.snapshot()
    assert first.metadata == second.metadata
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_resumed_is_uninterrupted(name: str, optimizer: str, device: str) -> None:
    learner = make(name, device, optimizer=OPTIMIZERS[optimizer])
    assert learner.engine == "module"
    spec = learner.spec
    learner.train(batch_for(spec, 22, seed=1))  # one example waits
    resumed = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()), device=device, engine="auto")
    assert_same(learner, resumed)
    assert not any(tensor.isnan().any() for tensor in learner.snapshot().tensors.values())
    for run in (learner, resumed):
        run.train(batch_for(spec, 32, seed=2))
    assert_same(learner, resumed)
    np.testing.assert_array_equal(learner.predict(examples(spec, 5)[0]), resumed.predict(examples(spec, 5)[0]))
    replaced = learner.progress.replacements
    assert all(count > 0 for count in replaced.values())
    assert bool(replaced) == (spec.network.kind != "linear")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["plain mlp", "convnet", "transformer of sequences"])
def test_methods_are_resumed_and_outlast_an_update(network: str, method: str, device: str) -> None:
    changes = METHODS[method]
    if network == "plain mlp":
        network = "mlp with layer normalization"
        changes = {**changes, "network": {**NETWORKS[network], "normalization": "none", "out_features": 3}}
    learner = make(network, device, **changes)
    assert learner.engine == "module"
    spec = learner.spec
    without = make(network, device, **{**changes, "methods": []})
    for run in (learner, without):
        run.train(batch_for(spec, 32, seed=1))
    acts = (network, method) != ("transformer of sequences", "self-normalised resets")  # no unit of GELU is ever silent
    assert np.allclose(learner.predict(examples(spec, 5)[0]), without.predict(examples(spec, 5)[0])) != acts
    resumed = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()), device=device, engine="auto")
    slower = {**spec.to_plain(), "optimizer": {**spec.to_plain()["optimizer"], "lr": 0.004}}
    resumed.update(spec)  # attaches everything again, and changes nothing
    for run in (learner, resumed):
        run.train(batch_for(spec, 22, seed=2))
        run.update(LearnerSpec.parse(slower))
        run.train(batch_for(spec, 22, seed=3))
    assert_same(learner, resumed)
    if method in ("ReDo", "self-normalised resets") and acts:
        assert sum(learner.progress.replacements.values()) > 0
    if not goes_with_resets(spec.methods):
        before = learner.progress.replacements
        assert set(learner.reset_units([0], 1.0).values()) == {0}  # nobody knows which of its units are mature
        assert learner.progress.replacements == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_precision_is_near_and_what_is_kept_is_whole(name: str, device: str) -> None:
    learner, exact = make(name, device, precision="bfloat16"), make(name, device)
    spec = learner.spec
    features = examples(spec, 20)[0]
    first, exactly = learner.predict(features), exact.predict(features)
    assert first.dtype == np.float32
    scale = np.abs(exactly).max()
    assert not np.array_equal(first, exactly)
    np.testing.assert_allclose(first, exactly, atol=0.05 * scale)
    learner.train(batch_for(spec, 22, seed=1))
    resumed = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()), device=device, engine="auto")
    for part in (slice(0, 7), slice(7, 32)):
        inputs, labels = examples(spec, 32, seed=2)
        resumed.train(Batch.validate(spec, inputs[part], labels[part]))
    learner.train(batch_for(spec, 32, seed=2))
    tensors, others = learner.snapshot().tensors, resumed.snapshot().tensors
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    for layer in learner.take_samples()[-1].layers:
        assert layer.gradient_norm is not None
        assert layer.gradient_norm > 0
        assert (layer.effective_rank is None) == (layer.layer == "output")


@pytest.mark.parametrize("method", METHODS)
def test_methods_in_mixed_precision(method: str) -> None:
    learner = make("convnet", **{**METHODS[method], "precision": "bfloat16"})
    without = make("convnet", **{**METHODS[method], "precision": "bfloat16", "methods": []})
    for run in (learner, without):
        run.train(batch_for(run.spec, 40))
    assert not np.allclose(*(run.predict(examples(learner.spec, 5)[0]) for run in (learner, without)))
    if method in ("ReDo", "self-normalised resets"):
        assert sum(learner.progress.replacements.values()) > 0


def test_mixed_precision_is_the_module_engines_and_for_good() -> None:
    network = {"network": {"kind": "mlp", "in_features": 5, "hidden": [8], "out_features": 3}}
    spec = LearnerSpec.parse(plain_spec("linear", precision="bfloat16", **network))
    assert Learner(spec, engine="auto").engine == "module"
    for engine in PERCEPTRON_ENGINES:
        with pytest.raises(CbpError, match="in float32 only"):
            Learner(spec, engine=engine)
    with pytest.raises(SpecError, match="precision: Cannot change on a live learner"):
        Learner(spec, engine="auto").update(LearnerSpec.parse(plain_spec("linear", **network)))
    with pytest.raises(SpecError, match=r"precision: Input should be 'float32' or 'bfloat16'; got 'float16'"):
        LearnerSpec.parse(plain_spec("linear", precision="float16"))
    with pytest.raises(SpecError, match=r"monitoring.trainability_interval: Only copies of plain"):
        LearnerSpec.parse(
            plain_spec("linear", precision="bfloat16", monitoring={"trainability_interval": 1000}, **network)
        )


def test_a_linear_learner_has_no_units_for_methods_that_reset_them() -> None:
    for kind in ("redo", "self_normalized_resets"):
        with pytest.raises(SpecError, match=r"methods\[0\]\.kind: .*no units"):
            LearnerSpec.parse(plain_spec("linear", methods=[{"kind": kind}], resets={"layers": "none"}))


@pytest.mark.parametrize("name", NETWORKS)
def test_seeds_decide_and_messages_do_not(name: str) -> None:
    torch.manual_seed(1)
    whole = make(name)
    torch.manual_seed(2)
    cut, other = make(name), make(name, seed=1)
    before = torch.get_rng_state()
    features, labels = examples(whole.spec, 30, seed=3)
    results = [
        whole.train(batch_for(whole.spec, 30, seed=3), return_outputs=True),
        other.train(batch_for(other.spec, 30, seed=3)),
    ]
    parts = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        batch = type(batch_for(cut.spec, 1)).validate(cut.spec, features[part], labels[part])
        parts.append(cut.train(batch, return_outputs=True).outputs)
        cut.predict(features)
    np.testing.assert_array_equal(np.concatenate(parts), results[0].outputs)
    assert torch.equal(before, torch.get_rng_state())
    whole_tensors, cut_tensors = whole.snapshot().tensors, cut.snapshot().tensors
    assert all(torch.equal(tensor, cut_tensors[key]) for key, tensor in whole_tensors.items())
    assert not torch.equal(
        whole_tensors["parameters.body.output.weight"], other.snapshot().tensors["parameters.body.output.weight"]
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_between_steps_and_samples_change_nothing(name: str) -> None:
    watched, alone = make(name), make(name, monitoring={"interval": 0, "probe_size": 20})
    features = examples(watched.spec, 4, seed=9)[0]
    seen = []

    def look() -> None:
        seen.append(watched.predict(features))
        with pytest.raises(CbpError, match="between_steps"):
            watched.snapshot()

    watched.train(batch_for(watched.spec, 30, seed=1), between_steps=look)
    alone.train(batch_for(alone.spec, 30, seed=1))
    assert len(seen) >= 9
    np.testing.assert_array_equal(watched.predict(features), alone.predict(features))
    [sample] = watched.take_samples()
    assert [layer.layer for layer in sample.layers] == list(watched.spec.layer_names)
    for layer, units in zip(sample.layers, watched.spec.network.hidden_units, strict=False):
        assert layer.units == units
        assert layer.replacements == watched.progress.replacements[layer.layer]
        for measure in (layer.mean_abs_weight, layer.distance_from_init, layer.gradient_norm, layer.dormant_fraction):
            assert measure is not None
            assert measure >= 0
    output = sample.layers[-1]
    assert (output.layer, output.units, output.dormant_fraction) == ("output", 3, None)
    assert output.gradient_norm
    torch.testing.assert_close(
        output.weight_norm, float(watched.snapshot().tensors["parameters.body.output.weight"].norm()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_divergence_is_raised(name: str) -> None:
    learner = make(name, optimizer={"kind": "sgd", "lr": 1e30}, loss="mse")
    spec = learner.spec
    batch = type(batch_for(LearnerSpec.parse(plain_spec(name)), 1)).validate(
        spec, examples(spec, 30)[0], np.full((30, 3), 1e30)
    )
    with pytest.raises(DivergenceError):
        learner.train(batch)


def test_infinite_statistics_are_noticed() -> None:
    learner = make("convnet with batches")
    learner.train(batch_for(learner.spec, 3))
    learner._state.network.body.convolution_0_normalization.running_var.fill_(torch.inf)
    with pytest.raises(DivergenceError, match="parameters"):
        learner.train(batch_for(learner.spec, 3))


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_change_on_a_live_learner(name: str) -> None:
    learner = make(name, optimizer=OPTIMIZERS["adam"])
    spec = learner.spec
    learner.train(batch_for(spec, 21, seed=1))
    before = dict(learner.progress.replacements)
    quiet = LearnerSpec.parse(
        plain_spec(name, optimizer={"kind": "adam", "lr": 1e-30}, resets={"layers": "none", "maturity_threshold": 3})
    )
    learner.update(quiet)
    weights = learner.snapshot().tensors["parameters.body.output.weight"]
    learner.train(batch_for(spec, 21, seed=2))
    assert learner.progress.replacements == before
    torch.testing.assert_close(learner.snapshot().tensors["parameters.body.output.weight"], weights, rtol=0, atol=1e-20)
    learner.update(spec)
    learner.train(batch_for(spec, 21, seed=3))
    assert all(learner.progress.replacements[layer] > count for layer, count in before.items())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "linear"])
def test_units_are_reset_by_hand(name: str) -> None:
    learner = make(name, resets={"layers": "none", "maturity_threshold": 3})
    assert learner.reset_units([0], 1.0) == {"hidden_0": 0}  # none is mature
    learner.train(batch_for(learner.spec, 15))
    units = learner.spec.network.hidden_units[-1]
    last = len(learner.spec.network.hidden_units) - 1
    assert learner.reset_units([last], 0.5) == {f"hidden_{last}": -(-units // 2)}
    assert learner.progress.replacements[f"hidden_{last}"] == -(-units // 2)
    assert learner.reset_units([last], 1.0) == {f"hidden_{last}": units // 2}  # the others are newborn


def test_a_linear_learner_has_nothing_to_reset() -> None:
    learner = make("linear")
    with pytest.raises(SpecError, match="no hidden units"):
        learner.reset_units([0], 0.5)
    with pytest.raises(SpecError, match="No hidden layer 'hidden_0'; there are none"):
        make("linear", resets={"layers": [0]})


@pytest.mark.parametrize("engine", ["torch", "compiled", "stacked"])
def test_other_engines_say_what_they_do_not_run(engine) -> None:
    spec = LearnerSpec.parse(plain_spec("convnet"))
    with pytest.raises(CbpError, match=r"engine: .* use 'module' or 'auto'"):
        Learner(spec, engine=engine)
    learner = Learner(spec, engine="module")
    with pytest.raises(CbpError, match="engine: "):
        learner.switch_engine(engine)
    with pytest.raises(CbpError, match="engine: "):
        Learner.restore(learner.snapshot(), engine=engine)
    learner.switch_engine("module")
    learner.train(batch_for(spec, 6))


def test_the_module_engine_leaves_plain_perceptrons_to_the_others(make_spec) -> None:
    with pytest.raises(CbpError, match=r"engine: 'module' .* use 'auto'"):
        Learner(make_spec(), engine="module")


def test_learners_of_several_engines_train_together(make_spec, make_batch) -> None:
    plain = make_spec()
    learners = [make("convnet"), Learner(plain), make("linear")]
    twins = [make("convnet"), Learner(plain), make("linear")]
    batches = [batch_for(learners[0].spec, 9), make_batch(plain, 9), batch_for(learners[2].spec, 9)]
    train_together(list(zip(learners, batches, strict=True)))
    for learner, twin, batch in zip(learners, twins, batches, strict=True):
        twin.train(batch)
        assert_same(learner, twin)


@pytest.mark.parametrize(
    "part",
    [
        "parameters.body.output.bias",
        "buffers.inputs.mean",
        "optimizer.body.output.bias.step",
        "methods.0.age",
        "methods.0.adam_steps.convolution_0.weight",
    ],
)
def test_a_snapshot_that_lacks_anything_is_refused(part: str) -> None:
    learner = make("convnet", optimizer=OPTIMIZERS["adam"])
    learner.train(batch_for(learner.spec, 6))
    snapshot = learner.snapshot()
    del snapshot.tensors[part]
    with pytest.raises(SnapshotError, match=part):
        Learner.restore(snapshot, engine="auto")


def test_snapshots_write_over_earlier_ones() -> None:
    learner = make("resnet")
    learner.train(batch_for(learner.spec, 21))
    first = learner.snapshot()
    room = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    learner.train(batch_for(learner.spec, 9))
    second = learner.snapshot(into=first)
    assert {name: tensor.data_ptr() for name, tensor in second.tensors.items()} == room


@pytest.mark.parametrize(
    ("name", "features", "says"),
    [
        ("convnet", np.zeros((2, 6, 8, 3)), r"\[N, 3, 6, 8\]"),
        ("convnet", np.zeros((2, 144)), r"\[N, 3, 6, 8\]"),
        ("transformer of tokens", np.full((2, 6), 11), "from 0 to 10"),
        ("transformer of tokens", np.full((2, 6), 0.5), "whole numbers"),
        ("transformer of tokens", np.full((2, 6), np.nan), "whole numbers"),
        ("mlp with columns", np.array([[0, 4, 0, 0, 0]]), "column 1 from 0 to 3.*hash_buckets"),
        ("mlp with columns", np.array([[0, 1, 0, 2**25, 0]]), "column 3 .*24 bits"),
    ],
)
def test_features_that_do_not_fit_are_refused(name: str, features: np.ndarray, says: str) -> None:
    with pytest.raises(BatchError, match=says):
        make(name).predict(features)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_learner_moves_to_another_device(name: str) -> None:
    learner = make(name)
    spec = learner.spec
    learner.train(batch_for(spec, 21, seed=1))
    moved = Learner.restore(learner.snapshot(), device="cuda", engine="auto")
    features = examples(spec, 5)[0]
    np.testing.assert_allclose(moved.predict(features), learner.predict(features), rtol=1e-3, atol=1e-4)
    moved.train(batch_for(spec, 21, seed=2))
    assert moved.snapshot().tensors.keys() == learner.snapshot().tensors.keys()
