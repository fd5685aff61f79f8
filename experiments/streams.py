"""Streams whose task changes: what it is drawn from, and any of its tasks by number.

A task's examples depend on the stream, the seed and the task's number alone, so a run can go on anywhere.

Shapes: N examples of a task, I features, C outputs.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiments.images import CLASSES, ImageSet, canvas_side, load_images

StreamKind = Literal[
    "permuted_inputs", "permuted_labels", "swapped_labels", "regression_one_flip", "regression_all_redrawn"
]
Examples = tuple[NDArray[np.float32], NDArray[np.int64] | NDArray[np.float32]]
"""Features [N, I], and labels [N] or targets [N, C]."""

_BITS = 20
_FLIPPING_BITS = 15
_TARGET_UNITS = 100
_TARGET_SHARE = 0.7
"""A target unit fires if at least about this share of its inputs agrees with its weights."""
_TARGET, _SHIFTS, _EXAMPLES = range(3)
"""Purposes of generators, so that those of one seed differ."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A sequence of tasks.

    Images under `permuted_inputs` have their pixels in a new order for each task, drawn afresh; the metric is the
    accuracy of predictions made before the update. Under `permuted_labels` the classes get new labels for each task,
    under `swapped_labels` only two of them change places, as in a concept that drifts slowly.

    In slowly changing regression (Dohare et al. 2024, methods) 15 of 20 input bits hold for a task and 5 are drawn for
    every example; between tasks one of the 15 is flipped, or all are drawn anew. The target is a fixed network of 100
    threshold units.
    """

    kind: StreamKind = "permuted_inputs"
    images: ImageSet | None = "digits_28x28"
    """None for regression."""
    examples: int = 10_000
    """Of each task."""

    @property
    def is_regression(self) -> bool:
        return self.images is None

    @property
    def features(self) -> int:
        """I"""
        return _BITS if self.images is None else canvas_side(self.images) ** 2

    @property
    def outputs(self) -> int:
        """C"""
        return 1 if self.is_regression else CLASSES

    def task(self, seed: int, number: int, mnist: Path | None = None) -> Examples:
        """The examples of one task, counted from 0. Raises `DataError` if there are no images."""
        if self.images is None:
            return self._regression_task(seed, number)
        features, labels = load_images(self.images, mnist).draw(self.examples, _generator(seed, _EXAMPLES, number))
        match self.kind:
            case "permuted_inputs":
                order = _generator(seed, _SHIFTS, number).permutation(self.features)
                return np.ascontiguousarray(features[:, order]), labels
            case "permuted_labels":
                return features, _generator(seed, _SHIFTS, number).permutation(CLASSES)[labels]
            case _:
                return features, _swapped_labels(seed, number)[labels]

    def _regression_task(self, seed: int, number: int) -> Examples:
        features = _generator(seed, _EXAMPLES, number).integers(0, 2, (self.examples, _BITS)).astype(np.float32)
        features[:, :_FLIPPING_BITS] = (
            _flipped_bits(seed, number)
            if self.kind == "regression_one_flip"
            else _generator(seed, _SHIFTS, number).integers(0, 2, _FLIPPING_BITS)
        )
        return features, target_network(seed)(features)


@dataclass(frozen=True, eq=False)
class TargetNetwork:
    """What the regression's learner is to imitate: 20 bits, 100 threshold units, one output; weights and biases ±1."""

    weights: NDArray[np.float32]
    """[100, 20]"""
    biases: NDArray[np.float32]
    """[100]"""
    output_weights: NDArray[np.float32]
    """[100, 1]"""
    output_bias: float

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Targets [N, 1] of features [N, 20]."""
        opposed = (_BITS - self.weights.sum(axis=1) + self.biases) / 2
        thresholds = _TARGET_SHARE * (_BITS + 1) - opposed
        fires = features @ self.weights.T + self.biases > thresholds
        targets: NDArray[np.float32] = fires.astype(np.float32) @ self.output_weights + np.float32(self.output_bias)
        return targets


@lru_cache(maxsize=256)
def target_network(seed: int) -> TargetNetwork:
    generator = _generator(seed, _TARGET, 0)

    def signs(*shape: int) -> NDArray[np.float32]:
        return generator.choice(np.array([-1.0, 1.0], np.float32), shape)

    return TargetNetwork(signs(_TARGET_UNITS, _BITS), signs(_TARGET_UNITS), signs(_TARGET_UNITS, 1), float(signs(1)[0]))


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, number))


def _flipped_bits(seed: int, number: int) -> NDArray[np.int64]:
    """The bits that hold in a task, after one flip per task before it."""
    first = _generator(seed, _SHIFTS, 0)
    bits = first.integers(0, 2, _FLIPPING_BITS)
    flips = first.integers(0, _FLIPPING_BITS, number)
    return bits ^ (np.bincount(flips, minlength=_FLIPPING_BITS) % 2)


def _swapped_labels(seed: int, number: int) -> NDArray[np.int64]:
    """The label of each class in a task, after one swap per task before it."""
    labels = np.arange(CLASSES)
    generator = _generator(seed, _SHIFTS, 0)
    for _ in range(number):
        pair = generator.choice(CLASSES, 2, replace=False)
        labels[pair] = labels[pair[::-1]]
    return labels
