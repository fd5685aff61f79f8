from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from one_thread import one_thread

from cbp import Batch, LearnerSpec

__all__ = ["one_thread"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def make_spec() -> Callable[..., LearnerSpec]:
    """A small, busy learner: it replaces a unit every few steps."""

    def make(**changes: Any) -> LearnerSpec:
        plain: dict[str, Any] = {
            "network": {"kind": "mlp", "in_features": 6, "hidden": [8, 7], "out_features": 3},
            "loss": "cross_entropy",
            "optimizer": {"kind": "sgd", "lr": 0.05},
            "batch_size": 2,
            "resets": {"replacement_rate": 0.05, "maturity_threshold": 5, "decay_rate": 0.9},
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = plain
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return LearnerSpec.parse(plain)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Random examples that fit a specification."""

    def make(spec: LearnerSpec, count: int, seed: int = 0, task: str = "", weighted: bool = False) -> Batch:
        random = np.random.default_rng(seed)
        outputs = spec.network.out_features
        targets: Any
        match spec.loss.kind:
            case "cross_entropy":
                targets = random.integers(0, outputs, count)
            case "binary_cross_entropy":
                targets = random.random((count, outputs))
            case _:
                targets = random.normal(size=(count, outputs))
        weights = random.random(count) * 2 if weighted else None
        return Batch.validate(spec, random.normal(size=(count, spec.network.in_features)), targets, weights, task)

    return make
