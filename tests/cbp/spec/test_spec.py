import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from cbp import BatchError, FieldViolation, Learner, LearnerSpec, LossSpec, MlpSpec, ResetSpec, SgdSpec, SpecError

PLAIN: dict[str, Any] = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [5, 6, 7], "out_features": 3},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.1},
}
L2_INIT: dict[str, Any] = {"kind": "l2_init", "strength": 0.1}
REDO, SNR, UPGD = ({"kind": kind} for kind in ("redo", "self_normalized_resets", "upgd"))
SWR: dict[str, Any] = {"kind": "selective_weight_reinitialization", "replacement_rate": 0.1}
QUIET: dict[str, Any] = {"resets": {"layers": "none"}}


def test_defaults_are_the_papers() -> None:
    spec = LearnerSpec.parse(PLAIN)
    assert spec.batch_size == 1
    assert (spec.network.activation, spec.network.initializer) == ("relu", "kaiming")
    assert (spec.resets.layers, spec.resets.replacement_rate, spec.resets.maturity_threshold) == ("all", 1e-4, 100)
    assert (spec.resets.decay_rate, spec.resets.utility) == (0.99, "adaptable_contribution")
    assert spec.resets.bias_compensation
    assert (spec.resets.strength, spec.resets.max_replacements) == (1.0, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"kind": "huber", "delta": 0.5}},
        {"optimizer": {"kind": "adam", "lr": 1e-3, "beta1": 0.8}},
        {"optimizer": {"kind": "adamw", "lr": 1e-3}},
        {"optimizer": {"kind": "rmsprop", "lr": 1e-3, "alpha": 0.9, "momentum": 0.5}},
        {"optimizer": {"kind": "sgd", "lr": 1e-3, "momentum": 0.5, "nesterov": True, "clip_norm": 0.5}},
        {"methods": [{"kind": "l2_init", "strength": 0.1}, {"kind": "shrink_and_perturb", "shrink": 1, "perturb": 0}]},
        {"methods": [{"kind": "redo", "interval": 7}], "resets": {"layers": "none"}},
        {"methods": [{"kind": "self_normalized_resets"}], "resets": {"replacement_rate": 0}},
        {"methods": [{"kind": "upgd", "noise": 0.0}], "resets": {"layers": "none"}},
        {
            "methods": [{"kind": "selective_weight_reinitialization", "replacement_rate": 1e-3}],
            "resets": {"layers": "none"},
        },
        {"resets": {"layers": [0, "2"], "layer_replacement_rates": {"hidden_2": 0.5}}},
        {"resets": {"strength": 0.5, "max_replacements": 3, "replacement_window": 50}},
        {"resets": {"layers": "none"}, "monitoring": {"interval": 0}, "batch_size": 0, "seed": 2**63 - 1},
    ],
)
def test_plain_form_survives_json(changes: dict[str, Any]) -> None:
    spec = LearnerSpec.parse(PLAIN | changes)
    assert LearnerSpec.parse(json.loads(json.dumps(spec.to_plain()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_built_from_records_or_parsed_is_the_same() -> None:
    built = LearnerSpec(
        network=MlpSpec(in_features=4, hidden=(5, 6, 7), out_features=3),
        loss=LossSpec(kind="cross_entropy"),
        optimizer=SgdSpec(lr=0.1),
    )
    assert built == LearnerSpec.parse(PLAIN)
    assert built.layer_names == ("hidden_0", "hidden_1", "hidden_2", "output")


@pytest.mark.parametrize(
    ("resets", "rates"),
    [
        ({}, (1e-4, 1e-4, 1e-4)),
        ({"layers": "first"}, (1e-4, 0.0, 0.0)),
        ({"layers": "none"}, (0.0, 0.0, 0.0)),
        ({"layers": [1, "hidden_2"], "replacement_rate": 0.5}, (0.0, 0.5, 0.5)),
        ({"layers": ["0", 2.0], "layer_replacement_rates": {0: 0.25}}, (0.25, 0.0, 1e-4)),
    ],
)
def test_layers_may_be_named_or_numbered(resets: dict[str, Any], rates: tuple[float, ...]) -> None:
    assert LearnerSpec.parse(PLAIN | {"resets": resets}).replacement_rates == rates


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"network": {**PLAIN["network"], "hidden": [5, 0]}}, "network.hidden[1]", "greater than or equal to 1; got 0"),
        ({"network": {**PLAIN["network"], "hidden": []}}, "network.hidden", "at least 1 item"),
        ({"network": {**PLAIN["network"], "kind": "cnn"}}, "network.kind", "mlp"),
        ({"network": {**PLAIN["network"], "in_features": "4"}}, "network.in_features", "number"),
        ({"network": {**PLAIN["network"], "width": 4}}, "network.width", "Unknown field"),
        ({"network": {**PLAIN["network"], "out_features": 1}}, "network.out_features", "binary_cross_entropy"),
        ({"network": {"kind": "mlp", "in_features": 4, "hidden": [5]}}, "network.out_features", "required"),
        ({"loss": "hinge"}, "loss.kind", "'mse'"),
        ({"loss": {"kind": "mse", "delta": 2.0}}, "loss", "huber"),
        ({"optimizer": {"kind": "lion", "lr": 1}}, "optimizer.kind", "sgd, rmsprop, adam, adamw"),
        ({"optimizer": {"lr": 1}}, "optimizer.kind", "sgd, rmsprop, adam, adamw"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "nesterov": True}}, "optimizer.nesterov", "set momentum above 0"),
        ({"optimizer": {"kind": "adam", "lr": 1, "nesterov": True}}, "optimizer.nesterov", "Unknown field"),
        ({"optimizer": {"kind": "adam", "lr": 1, "clip_norm": 0}}, "optimizer.clip_norm", "greater than 0; got 0"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "clip_norm": "1"}}, "optimizer.clip_norm", "number"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "clip_norm": 1e-60}}, "optimizer.clip_norm", "float32"),
        ({"optimizer": {"kind": "rmsprop", "lr": 1, "alpha": 1}}, "optimizer.alpha", "less than 1; got 1"),
        ({"optimizer": {"kind": "rmsprop", "lr": 1, "centered": True}}, "optimizer.centered", "Unknown field"),
        ({"methods": [L2_INIT, {"kind": "sleep"}]}, "methods[1].kind", "l2_init, shrink_and_perturb"),
        ({"methods": [{"interval": 3}]}, "methods[0].kind", "l2_init, shrink_and_perturb"),
        ({"methods": [{"kind": "l2_init"}]}, "methods[0].strength", "required"),
        ({"methods": [REDO | {"interval": 0}]}, "methods[0].interval", "greater than or equal to 1"),
        ({"methods": [REDO | {"redo": 0}]}, "methods[0].redo", "Unknown field"),
        ({"methods": {"kind": "redo"}}, "methods", "tuple"),
        ({"methods": [L2_INIT, L2_INIT]}, "methods[1].kind", "each method once"),
        ({"methods": [L2_INIT, REDO]}, "methods[1].kind", "set resets.layers to 'none'"),
        ({"methods": [SNR, REDO], **QUIET}, "methods[1].kind", "self_normalized_resets resets units already"),
        ({"methods": [SWR]}, "methods[0].kind", "reset units or weights, not both"),
        ({"methods": [SWR, REDO], **QUIET}, "methods[0].kind", "reset units or weights, not both"),
        ({"methods": [UPGD]}, "methods[0].kind", "needs resets.layers 'none'"),
        ({"methods": [UPGD, L2_INIT], **QUIET}, "methods[0].kind", "goes with no other method"),
        ({"methods": [UPGD], "optimizer": {"kind": "adam", "lr": 1}, **QUIET}, "methods[0].kind", "'sgd' without"),
        (
            {"methods": [UPGD], "optimizer": {"kind": "sgd", "lr": 1, "momentum": 0.9}, **QUIET},
            "methods[0].kind",
            "'sgd' without momentum",
        ),
        ({"optimizer": {"kind": "sgd", "lr": 0}}, "optimizer.lr", "greater than 0; got 0"),
        ({"optimizer": {"kind": "sgd", "lr": float("nan")}}, "optimizer.lr", "finite"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "beta1": 0.9}}, "optimizer.beta1", "Unknown field"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "sgd": 0.9}}, "optimizer.sgd", "Unknown field"),
        ({"optimizer": {"kind": "sgd", "lr": 1e300}}, "optimizer.lr", "finite in float32; got 1e+300"),
        (
            {"optimizer": {"kind": "sgd", "lr": 1 << 20000}},
            "optimizer.lr",
            "finite in float32; got a value of type int",
        ),
        ({"optimizer": {"kind": "sgd", "lr": 1e-60}}, "optimizer.lr", "greater than 0 in float32; got 1e-60"),
        ({"optimizer": {"kind": "adam", "lr": 1, "epsilon": 1e-60}}, "optimizer.epsilon", "float32"),
        ({"optimizer": {"kind": "sgd", "lr": 1, "weight_decay": 1e39}}, "optimizer.weight_decay", "float32"),
        ({"loss": {"kind": "huber", "delta": 1e39}}, "loss.delta", "float32"),
        ({"batch_size": -1}, "batch_size", "got -1"),
        ({"batch_size": True}, "batch_size", "number"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"resets": {"layers": "frist"}}, "resets.layers", "'first'"),
        ({"resets": {"layers": []}}, "resets.layers", "'none'"),
        ({"resets": {"layers": [3]}}, "resets.layers", "No hidden layer 'hidden_3'"),
        ({"resets": {"layers": [-1]}}, "resets.layers", "index or name"),
        ({"resets": {"layers": ["9" * 5000]}}, "resets.layers", "index or name"),
        ({"resets": {"layers": ["hidden_" + "9" * 5000]}}, "resets.layers", "index or name"),
        ({"resets": {"layers": ["output"]}}, "resets.layers", "no hidden units"),
        ({"resets": {"layers": [0, "hidden_0"]}}, "resets.layers", "once"),
        ({"resets": {"replacement_rate": 1.5}}, "resets.replacement_rate", "less than or equal to 1"),
        ({"resets": {"layer_replacement_rates": {"0": 3}}}, "resets.layer_replacement_rates.hidden_0", "got 3"),
        ({"resets": {"layer_replacement_rates": {"9": 0.1}}}, "resets.layer_replacement_rates.hidden_9", "No hidden"),
        (
            {"resets": {"layers": "first", "layer_replacement_rates": {"1": 0.1}}},
            "resets.layer_replacement_rates.hidden_1",
            "not reset",
        ),
        ({"resets": {"mt": 3}}, "resets.mt", "Unknown field"),
        ({"resets": {"strength": 0}}, "resets.strength", "greater than 0; got 0"),
        ({"resets": {"strength": 1.01}}, "resets.strength", "less than or equal to 1; got 1.01"),
        ({"resets": {"max_replacements": 0}}, "resets.max_replacements", "greater than or equal to 1; got 0"),
        ({"resets": {"max_replacements": 1.5}}, "resets.max_replacements", "got 1.5"),
        ({"resets": {"replacement_window": 0}}, "resets.replacement_window", "greater than or equal to 1; got 0"),
        ({"resets": {"decay_rate": 1.0}}, "resets.decay_rate", "less than 1"),
        ({"monitoring": {"probe_size": 0}}, "monitoring.probe_size", "got 0"),
    ],
)
def test_mistakes_are_named_by_field(changes: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        LearnerSpec.parse(PLAIN | changes)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert says in caught.value.violations[0].description
    assert field in str(caught.value)


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        LearnerSpec.parse(PLAIN | {"batch_size": -1, "optimizer": {"kind": "adam", "lr": -1, "beta2": 2}})
    assert {violation.field for violation in caught.value.violations} == {
        "batch_size",
        "optimizer.lr",
        "optimizer.beta2",
    }


@pytest.mark.parametrize("value", ["x" * 10**6, "\0" * 100, ["x" * 100] * 9, 10**5000], ids=range(4))
def test_a_mistake_is_repeated_briefly_and_printably(value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        LearnerSpec.parse(PLAIN | {"loss": {"kind": value}})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_many_layers_are_checked_in_no_time() -> None:
    """Looking every layer up in a list of all layers takes minutes here."""
    spec = LearnerSpec.parse(PLAIN | {"network": PLAIN["network"] | {"hidden": [1] * 60_000}})
    assert len(spec.replacement_rates) == 60_000
    with pytest.raises(SpecError, match=r"there are hidden_0, hidden_1, hidden_2, …, hidden_59999$"):
        spec.resets.model_copy(update={"layers": ("hidden_70000",)}).rates(spec.layer_names[:-1])


@pytest.mark.parametrize(
    ("widths", "parameters"),
    [((4, [5, 6, 7], 3), 25 + 36 + 49 + 24), ((2**31 - 1, [2**31 - 1], 2), (2**31) * (2**31 - 1) + 2 * 2**31)],
)
def test_parameters_are_counted_exactly(widths: tuple[int, list[int], int], parameters: int) -> None:
    network = dict(zip(("in_features", "hidden", "out_features"), widths, strict=True)) | {"kind": "mlp"}
    assert LearnerSpec.parse(PLAIN | {"network": network}).parameter_count == parameters


def test_the_parameters_counted_are_those_there_are(make_spec: Callable[..., LearnerSpec]) -> None:
    tensors = Learner(make_spec()).snapshot().tensors
    there = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("parameters."))
    assert make_spec().parameter_count == there


@pytest.mark.parametrize("plain", [None, [], "mlp", {1: 2}])
def test_what_is_no_object_is_refused(plain: Any) -> None:
    with pytest.raises(SpecError, match="spec"):
        LearnerSpec.parse(plain)


def test_a_part_names_fields_from_its_own_root() -> None:
    with pytest.raises(SpecError) as caught:
        ResetSpec(replacement_rate=2.0)
    assert caught.value.violations[0].field == "replacement_rate"


@pytest.mark.parametrize("error", [SpecError, BatchError])
def test_errors_cross_process_boundaries(error: type[SpecError] | type[BatchError]) -> None:
    raised = error([FieldViolation("features", "too wide"), FieldViolation("task", "too long")])
    copied = pickle.loads(pickle.dumps(raised))
    assert type(copied) is error
    assert copied.violations == raised.violations
    assert str(copied) == "features: too wide; task: too long"


def test_a_live_learner_may_change_resets_monitoring_and_optimizer_settings(
    make_spec: Callable[..., LearnerSpec],
) -> None:
    make_spec().check_update(make_spec(resets__layers="first", monitoring__interval=5, optimizer__lr=0.5))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"network__hidden": [9]}, "network"),
        ({"batch_size": 7}, "batch_size"),
        ({"seed": 7}, "seed"),
        ({"optimizer__kind": "adam"}, "optimizer.kind"),
        ({"loss": "mse"}, "loss"),
        ({"methods": [L2_INIT]}, "methods"),
    ],
)
def test_a_live_learner_keeps_the_rest(
    changes: dict[str, Any], field: str, make_spec: Callable[..., LearnerSpec]
) -> None:
    with pytest.raises(SpecError) as caught:
        make_spec().check_update(make_spec(**changes))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "create another learner" in str(caught.value)
