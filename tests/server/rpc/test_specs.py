"""Specifications come back from the wire as they went."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from cbp import LearnerSpec, SpecError
from cbp_proto import from_plain, to_plain
from cbp_proto.v1 import spec_pb2
from cbp_server.limits import Limits
from cbp_server.rpc.convert import revised_spec, spec_from_message, spec_to_message

PLAIN = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [5, 6], "out_features": 3},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.1},
}
LIMITS = Limits(max_parameters=10_000, max_layers=8, max_pending_bytes=2**20, max_activation_bytes=2**24)
METHODS = [
    [{"kind": "l2_init", "strength": 0.25}, {"kind": "shrink_and_perturb", "shrink": 0.5, "perturb": 0.0}],
    [{"kind": "redo", "interval": 7, "dormant_threshold": 0.0}],
    [{"kind": "self_normalized_resets", "rejection_level": 0.5, "longest_silence": 3}],
    [{"kind": "upgd", "noise": 0.0, "decay_rate": 0.5}],
    [{"kind": "selective_weight_reinitialization", "replacement_rate": 0.5, "interval": 2, "decay_rate": 0.0}],
]


def test_a_precision_comes_back():
    for precision in ("float32", "bfloat16"):
        spec = LearnerSpec.parse(PLAIN | {"precision": precision})
        assert to_plain(spec_to_message(spec))["precision"] == precision
        assert spec_from_message(spec_to_message(spec), LIMITS) == spec
    assert spec_from_message(spec_to_message(LearnerSpec.parse(PLAIN)), LIMITS).precision == "float32"


@pytest.mark.parametrize("methods", METHODS, ids=lambda methods: methods[0]["kind"])
def test_methods_come_back(methods):
    spec = LearnerSpec.parse(PLAIN | {"methods": methods, "resets": {"layers": "none"}})
    message = spec_to_message(spec)
    assert [one.WhichOneof("kind") for one in message.methods] == [method["kind"] for method in methods]
    assert spec_from_message(type(message).FromString(message.SerializeToString()), LIMITS) == spec


MASKS = {"no mask": [], "everything": ["*"], "the kind alone": ["spec.optimizer.kind"], "the part": ["spec.optimizer"]}


def revised(present, changes, paths):
    return revised_spec(
        LearnerSpec.parse(present), from_plain(changes, spec_pb2.LearnerSpec), FieldMask(paths=paths), LIMITS
    )


@pytest.mark.parametrize("paths", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("others", [{}, {"lr": 0.01}, {"lr": 0.01, "beta1": 0.8, "nesterov": True}], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_another_kind_of_optimizer_is_refused_by_its_name(paths, others, momentum):
    present = PLAIN | {"optimizer": {"kind": "sgd", "lr": 0.1, "momentum": momentum}}
    with pytest.raises(SpecError) as caught:
        revised(present, {"optimizer": {"kind": "adam", **others}}, paths)
    [violation] = caught.value.violations
    assert violation.field == "optimizer.kind"
    assert "'sgd' to 'adam' on a live learner" in violation.description


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("network", {"kind": "linear", "in_features": 4, "out_features": 3}),
        ("network", {"kind": "transformer", "input": "tokens", "length": 4, "vocabulary": 9, "out_features": 3}),
        ("loss", {"kind": "mse"}),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_another_kind_of_network_or_loss_is_refused_by_its_name(part, value, masked):
    with pytest.raises(SpecError, match=f"^{part}: Cannot change on a live learner; create another") as caught:
        revised(PLAIN | {"loss": {"kind": "huber", "delta": 2.0}}, {part: value}, [f"spec.{part}"] if masked else [])
    assert len(caught.value.violations) == 1


def test_the_same_kind_named_again_changes_nothing():
    present = LearnerSpec.parse(PLAIN)
    assert revised(PLAIN, {"optimizer": {"kind": "sgd"}, "loss": "cross_entropy"}, []) == present
