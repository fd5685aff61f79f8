"""Specs as people write them: to messages and back, and clear words where that fails."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbp_proto import PlainError, from_plain, to_plain
from cbp_proto.v1 import spec_pb2

numbers = st.floats(allow_nan=False, allow_infinity=False)
int32 = st.integers(min_value=-(2**31), max_value=2**31 - 1)
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def enum_values(enum: Any) -> st.SearchStrategy[int]:
    return st.sampled_from([number for number in enum.values() if number != 0])


def messages(message_type: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields).map(lambda drawn: message_type(**drawn))


mlps = messages(
    spec_pb2.Mlp,
    in_features=int32,
    hidden=st.lists(int32, max_size=4),
    out_features=int32,
    activation=enum_values(spec_pb2.Activation),
    initializer=enum_values(spec_pb2.Initializer),
)
specs = messages(
    spec_pb2.LearnerSpec,
    network=mlps.map(lambda mlp: spec_pb2.Network(mlp=mlp)),
    loss=messages(spec_pb2.Loss, kind=enum_values(spec_pb2.LossKind), delta=numbers),
    optimizer=messages(
        spec_pb2.Optimizer,
        kind=enum_values(spec_pb2.OptimizerKind),
        **dict.fromkeys(("lr", "weight_decay", "momentum", "beta1", "beta2", "epsilon"), numbers),
    ),
    batch_size=int32,
    seed=int64,
    resets=messages(
        spec_pb2.Resets,
        layers=st.lists(words, max_size=3),
        replacement_rate=numbers,
        layer_replacement_rates=st.dictionaries(words, numbers, max_size=3),
        maturity_threshold=int64,
        decay_rate=numbers,
        utility=enum_values(spec_pb2.Utility),
        bias_compensation=st.booleans(),
    ),
    methods=st.lists(
        st.one_of(
            messages(spec_pb2.L2Init, strength=numbers).map(lambda one: spec_pb2.Method(l2_init=one)),
            messages(spec_pb2.ReDo, interval=int64, dormant_threshold=numbers).map(
                lambda one: spec_pb2.Method(redo=one)
            ),
        ),
        max_size=2,
    ),
    monitoring=messages(
        spec_pb2.Monitoring,
        interval=int64,
        probe_size=int32,
        dormant_threshold=numbers,
        average_decay=numbers,
        trainability_interval=int64,
    ),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.integers() | st.text(max_size=8) | st.sampled_from(["kind", "lr", "layers"]), children)
    ),
    max_leaves=8,
)


@given(specs)
def test_a_spec_comes_back_from_its_plain_form(spec: spec_pb2.LearnerSpec) -> None:
    assert from_plain(to_plain(spec), spec_pb2.LearnerSpec) == spec


@given(st.dictionaries(st.sampled_from(list(spec_pb2.LearnerSpec.DESCRIPTOR.fields_by_name)) | st.integers(), anything))
def test_any_plain_value_is_taken_or_refused_by_name(plain: dict[Any, Any]) -> None:
    refusal = None
    try:
        from_plain(plain, spec_pb2.LearnerSpec)
    except PlainError as error:
        refusal = error
    if refusal is not None:
        assert refusal.description
        assert str(refusal) == f"{refusal.field}: {refusal.description}"


def test_plain_form_is_what_people_write() -> None:
    plain = {
        "network": {"kind": "mlp", "in_features": 64, "hidden": [100, 100], "out_features": 10, "activation": "relu"},
        "loss": {"kind": "cross_entropy"},
        "optimizer": {"kind": "sgd", "lr": 0.01},
        "batch_size": 1,
        "resets": {"layers": ["first"], "replacement_rate": 1e-4, "layer_replacement_rates": {"hidden_1": 0.5}},
    }

    assert to_plain(from_plain(plain, spec_pb2.LearnerSpec)) == plain


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"loss": "mse"}, {"loss": {"kind": "mse"}}),
        ({"optimizer": "adam"}, {"optimizer": {"kind": "adam"}}),
        ({"resets": {"layers": "first"}}, {"resets": {"layers": ["first"]}}),
        ({"resets": {"layers": [0, 2]}}, {"resets": {"layers": ["0", "2"]}}),
        ({"resets": {"layers": 1}}, {"resets": {"layers": ["1"]}}),
        ({"resets": {"layer_replacement_rates": {0: 0.5}}}, {"resets": {"layer_replacement_rates": {"0": 0.5}}}),
        ({"seed": None, "batch_size": 4}, {"batch_size": 4}),
        ({"methods": {"kind": "redo", "interval": 9}}, {"methods": [{"kind": "redo", "interval": 9}]}),
        ({"batch_size": 0}, {"batch_size": 0}),
    ],
)
def test_short_forms(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert to_plain(from_plain(short, spec_pb2.LearnerSpec)) == long


@pytest.mark.parametrize(
    ("plain", "field", "description"),
    [
        ({"learning_rate": 1}, "learning_rate", "is not a field here; there are network, loss"),
        ({1: 2}, "1", "is not a field here"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", "there are kind, lr"),
        ({"optimizer": "lion"}, "optimizer.kind", "must be one of sgd, adam, adamw, rmsprop, not 'lion'"),
        ({"optimizer": {"kind": 1}}, "optimizer.kind", "must be one of sgd"),
        ({"optimizer": 3}, "optimizer", "must be a mapping, not int"),
        ({"network": {"in_features": 3}}, "network.kind", "must be one of mlp, linear, convnet"),
        ({"network": {"kind": "mlp", "depth": 3}}, "network.depth", "is not a field here"),
        ({"network": {"kind": "mlp", "hidden": ["wide"]}}, "network.hidden", "does not fit"),
        ({"network": {"kind": "mlp", "in_features": 2**31}}, "network.in_features", "does not fit"),
        ({"resets": "first"}, "resets", "must be a mapping, not str"),
        ({"resets": {"layer_replacement_rates": 0.1}}, "resets.layer_replacement_rates", "does not fit"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr", "does not fit"),
        ({"methods": [{"kind": "redo"}, {"kind": "dream"}]}, "methods[1].kind", "must be one of l2_init, shrink_and"),
        ({"methods": [{"kind": "redo", "rate": 1}]}, "methods[0].rate", "is not a field here; there are interval"),
        ({"methods": 3}, "methods", "does not fit"),
        ({"methods": "redo"}, "methods[0]", "must be a mapping, not str"),
        ({"batch_size": "x" * 999}, "batch_size", "… does not fit; it must be a whole number that 32 bits hold"),
        ({"seed": 2**70}, "seed", "must be a whole number that 64 bits hold"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr", "does not fit; it must be a number"),
        ({"resets": {"layers": "\ud800"}}, "resets.layers", "a list, each a text that UTF-8 can hold"),
        ({"resets": {"bias_compensation": "no"}}, "resets.bias_compensation", "must be true or false"),
        ({"loss": {"\ud800": 1}}, "loss.'\\ud800'", "is not a field here"),
    ],
)
def test_errors_name_the_field_and_what_is_right(plain: dict[Any, Any], field: str, description: str) -> None:
    with pytest.raises(PlainError) as caught:
        from_plain(plain, spec_pb2.LearnerSpec)

    assert caught.value.field == field
    assert description in caught.value.description
