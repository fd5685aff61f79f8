"""The learners that the harness feeds, and what it feeds them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Durability = Literal["fsync", "os"]

_FEATURES, _CLASSES = 4, 3

#: Some batches have more steps than the engine takes in one go.
_LONG_EVERY, _LONG_EXAMPLES = 20, 1536


@dataclass(frozen=True, kw_only=True)
class FedLearner:
    """A learner and its producers. Learning rates are such that learners stay finite."""

    name: str
    optimizer: dict[str, Any]
    batch_size: int
    utility: str = "contribution"
    durability: Durability = "fsync"
    producers: tuple[str, ...]

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "network": {"kind": "mlp", "in_features": _FEATURES, "hidden": [8, 6], "out_features": _CLASSES},
            "loss": "cross_entropy",
            "optimizer": self.optimizer,
            "batch_size": self.batch_size,
            "resets": {"replacement_rate": 0.02, "maturity_threshold": 5, "utility": self.utility},
            "monitoring": {"interval": 500},
        }


LEARNERS = (
    FedLearner(
        name="sgd",
        optimizer={"kind": "sgd", "lr": 0.002, "momentum": 0.9},
        batch_size=1,
        producers=("ada", "ben", "eva"),
    ),
    FedLearner(
        name="adam", optimizer={"kind": "adam", "lr": 0.01}, batch_size=3, utility="random", producers=("ada", "ben")
    ),
    FedLearner(name="whole", optimizer={"kind": "adamw", "lr": 0.01}, batch_size=0, producers=("ada", "ben")),
    FedLearner(
        name="os", optimizer={"kind": "sgd", "lr": 0.01}, batch_size=1, durability="os", producers=("ada", "ben")
    ),
)


def make_batch(
    learner: str, producer: str, sequence: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], str]:
    """Features, labels and task of the producer's batch of that sequence, always the same."""
    generator = np.random.default_rng([seed, sequence, *learner.encode(), 0, *producer.encode()])
    examples = int(generator.integers(1, 40))
    if sequence % _LONG_EVERY == 0:
        examples += _LONG_EXAMPLES
    features = generator.normal(size=(examples, _FEATURES)).astype(np.float32)
    return features, features[:, :_CLASSES].argmax(axis=1), f"t{sequence // 50}"
