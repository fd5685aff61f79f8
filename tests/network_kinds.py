"""Small networks of every kind, and examples for them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np

from cbp import Batch, LearnerSpec
from cbp.engines.names import EngineName

PERCEPTRON_ENGINES = tuple(engine for engine in get_args(EngineName) if engine != "module")
"""Those that run plain multilayer perceptrons."""
COLUMNS = {
    "normalize": True,
    "columns": [{"column": 1, "cardinality": 4}, {"column": 3, "hash_buckets": 16, "dimension": 3}],
}
IMAGE = {"in_channels": 3, "height": 6, "width": 8}
SMALL_TRANSFORMER = {"kind": "transformer", "width": 8, "heads": 2, "feed_forward": 12}
NETWORKS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "in_features": 5},
    "mlp with layer normalization": {"kind": "mlp", "in_features": 5, "hidden": [8, 7], "normalization": "layer"},
    "mlp with crelu": {"kind": "mlp", "in_features": 5, "hidden": [8, 7], "activation": "crelu"},
    "mlp with columns": {"kind": "mlp", "in_features": 5, "hidden": [8, 7], "inputs": COLUMNS},
    "convnet": {"kind": "convnet", **IMAGE, "channels": [4, 6], "hidden": [10], "inputs": {"normalize": True}},
    "convnet with batches": {"kind": "convnet", **IMAGE, "channels": [4, 6], "normalization": "batch"},
    "resnet": {"kind": "resnet", **IMAGE, "channels": [4, 8], "blocks": 1},
    "transformer of tokens": {**SMALL_TRANSFORMER, "input": "tokens", "length": 6, "vocabulary": 11},
    "transformer of sequences": {
        **SMALL_TRANSFORMER,
        "input": "sequence",
        "length": 6,
        "in_features": 4,
        "inputs": {"normalize": True},
    },
    "transformer of columns": {
        **SMALL_TRANSFORMER,
        "input": "tabular",
        "in_features": 4,
        "inputs": {"columns": [{"column": 1, "cardinality": 4}]},
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.05},
    "momentum": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "rmsprop": {"kind": "rmsprop", "lr": 0.002, "momentum": 0.5},
    "nesterov, clipped": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "clip_norm": 0.5},
    "adam": {"kind": "adam", "lr": 0.01},
    "adamw": {"kind": "adamw", "lr": 0.01},
}
_INSTEAD_OF_RESETS: dict[str, Any] = {"resets": {"layers": "none"}, "optimizer": OPTIMIZERS["adam"]}
#: What a specification says of them; they act every few steps.
METHODS: dict[str, dict[str, Any]] = {
    "L2 Init and perturbation beside resets": {
        "methods": [
            {"kind": "l2_init", "strength": 0.01},
            {"kind": "shrink_and_perturb", "shrink": 0.99, "perturb": 0.01, "interval": 3},
        ]
    },
    "ReDo": {"methods": [{"kind": "redo", "interval": 4, "dormant_threshold": 0.6}], **_INSTEAD_OF_RESETS},
    "self-normalised resets": {
        "methods": [{"kind": "self_normalized_resets", "longest_silence": 4}],
        **_INSTEAD_OF_RESETS,
    },
    "UPGD": {"methods": [{"kind": "upgd"}], "resets": {"layers": "none"}, "optimizer": OPTIMIZERS["sgd"]},
    "SWR": {
        "methods": [{"kind": "selective_weight_reinitialization", "replacement_rate": 0.05, "interval": 4}],
        **_INSTEAD_OF_RESETS,
    },
}
#: A method that reads activations, and resets beside one that does not.
MIXED_PRECISION: dict[str, dict[str, Any]] = {
    f"{name} in bfloat16": {"precision": "bfloat16", **METHODS[name]}
    for name in ("ReDo", "L2 Init and perturbation beside resets")
}


def plain_spec(name: str, **changes: Any) -> dict[str, Any]:
    """A busy learner's: it replaces units every few steps."""
    return {
        "network": {**NETWORKS[name], "out_features": 3},
        "loss": "cross_entropy",
        "optimizer": OPTIMIZERS["momentum"],
        "batch_size": 3,
        "resets": {"replacement_rate": 0.05, "maturity_threshold": 3},
        "monitoring": {"interval": 10, "probe_size": 20},
    } | changes


def examples(spec: LearnerSpec, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels that have something to do with each other."""
    random = np.random.default_rng(seed)
    network = spec.network
    features = random.normal(size=(count, *network.input_shape))
    if network.vocabulary_size is not None:
        features = random.integers(0, network.vocabulary_size, size=features.shape).astype(float)
    for column in network.inputs.columns:
        features[:, column.column] = random.integers(0, 4, count)
    direction = np.random.default_rng(7).normal(size=(network.input_size, 3))
    labels = (features.reshape(count, -1) @ direction).argmax(axis=1)
    return (features.astype(np.int64) if network.vocabulary_size is not None else features), labels


def batch_for(spec: LearnerSpec, count: int, seed: int = 0) -> Batch:
    return Batch.validate(spec, *examples(spec, count, seed))


ARCHITECTURE = """
from torch import nn

def small(shape, outputs, settings):
    units = int(settings["units"])
    first = nn.Linear(shape[0] * shape[1], units)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Dropout(0.3), nn.Linear(units, outputs))

def recurrent(shape, outputs, settings):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.LSTM(shape[1], 6, batch_first=True)
            self.last = nn.Linear(6, outputs)

        def forward(self, values):
            return self.last(self.memory(values)[0][:, -1])

    return Recurrent()

def wrong(shape, outputs, settings):
    return nn.Linear(99, outputs)

def nothing(shape, outputs, settings):
    return None
"""


def install_architectures(directory: Path) -> None:
    """A package of an operator, as an installer leaves it."""
    (directory / "acme_networks.py").write_text(ARCHITECTURE)
    info = directory / "acme_networks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-networks\nVersion: 1.0\n")
    names = ("small", "recurrent", "wrong", "nothing")
    (info / "entry_points.txt").write_text("[cbp.networks]\n" + "".join(f"{n} = acme_networks:{n}\n" for n in names))
