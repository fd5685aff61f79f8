"""Specifications come back from the wire as they went."""

import pytest

from cbp import LearnerSpec
from cbp_proto import to_plain
from cbp_server.limits import Limits
from cbp_server.rpc.convert import spec_from_message, spec_to_message

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
