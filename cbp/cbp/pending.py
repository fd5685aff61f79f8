"""Examples on the host: those that wait for their step to fill up, and the recent ones that serve as a probe."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbp.batches import Batch

TaskRun = tuple[str, int]
"""A task label and how many examples in a row carry it."""


@dataclass(frozen=True)
class Examples:
    """Consecutive examples of a stream."""

    features: NDArray[np.float32]
    """[N, I]"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """[N] labels or [N, C] values."""
    weights: NDArray[np.float32]
    """[N]"""
    tasks: tuple[TaskRun, ...]
    """Runs that add up to N."""

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, batch: Batch) -> "Examples":
        weights = np.ones(len(batch), dtype=np.float32) if batch.weights is None else batch.weights
        return cls(batch.features, batch.targets, weights, ((batch.task, len(batch)),))

    @classmethod
    def none_like(cls, features: int, outputs: int | None) -> "Examples":
        """No examples; `outputs` is None for labels."""
        targets: NDArray[np.int64] | NDArray[np.float32] = (
            np.empty(0, np.int64) if outputs is None else np.empty((0, outputs), np.float32)
        )
        return cls(np.empty((0, features), np.float32), targets, np.empty(0, np.float32), ())

    def followed_by(self, later: "Examples") -> "Examples":
        """These examples and then the later ones, in memory of their own."""
        tasks = list(self.tasks)
        for task, count in later.tasks:
            if tasks and tasks[-1][0] == task:
                tasks[-1] = (task, tasks[-1][1] + count)
            else:
                tasks.append((task, count))
        return Examples(
            np.concatenate([self.features, later.features]),
            np.concatenate([self.targets, later.targets]),
            np.concatenate([self.weights, later.weights]),
            tuple(tasks),
        )

    def split_at(self, position: int) -> tuple["Examples", "Examples"]:
        """The first `position` examples, and the rest in memory of its own."""
        first, rest = _split_runs(self.tasks, position)
        return (
            Examples(self.features[:position], self.targets[:position], self.weights[:position], first),
            Examples(
                self.features[position:].copy(), self.targets[position:].copy(), self.weights[position:].copy(), rest
            ),
        )


def _split_runs(runs: Sequence[TaskRun], position: int) -> tuple[tuple[TaskRun, ...], tuple[TaskRun, ...]]:
    first: list[TaskRun] = []
    rest: list[TaskRun] = []
    for task, count in runs:
        taken = min(count, position)
        position -= taken
        if taken:
            first.append((task, taken))
        if count > taken:
            rest.append((task, count - taken))
    return tuple(first), tuple(rest)


class Probe:
    """The most recent examples, on which a plasticity sample is measured."""

    def __init__(
        self, size: int, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]
    ) -> None:
        self._size = size
        self.features = features[-size:].copy()
        """[n, I], oldest first"""
        self.targets = targets[-size:].copy()
        """[n] or [n, C]"""

    def __len__(self) -> int:
        return len(self.features)

    def resized(self, size: int) -> "Probe":
        return Probe(size, self.features, self.targets)

    def extend(self, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]) -> None:
        kept = max(self._size - len(features), 0)
        start = max(len(self.features) - kept, 0)
        self.features = np.concatenate([self.features[start:], features[-self._size :]])
        self.targets = np.concatenate([self.targets[start:], targets[-self._size :]])
