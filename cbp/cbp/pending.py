"""Examples on the host: those that wait for their step to fill up, and the recent ones that serve as a probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cbp.batches import Batch

RowT = TypeVar("RowT", bound=np.generic)
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
        weights = np.ones(len(batch.features), dtype=np.float32) if batch.weights is None else batch.weights
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


class _Window(Generic[RowT]):
    """The last `size` rows of an ever longer array.

    They lie one after another in a buffer of up to twice their number and move to its front when they reach its end,
    so that a row is copied about twice, however few rows come at a time.
    """

    def __init__(self, size: int, rows: NDArray[RowT]) -> None:
        self._size = size
        self._buffer = rows[-size:].copy()
        self._start, self._end = 0, len(self._buffer)

    @property
    def rows(self) -> NDArray[RowT]:
        """Oldest first; valid until more come."""
        return self._buffer[self._start : self._end]

    def extend(self, rows: NDArray[RowT]) -> None:
        count = len(rows)
        if count > self._size:
            rows, count = rows[-self._size :], self._size
        kept = min(self._end - self._start, self._size - count)
        if self._end + count > len(self._buffer):
            self._move_to_front(self._buffer[self._end - kept : self._end], kept + count)
        self._buffer[self._end : self._end + count] = rows
        self._end += count
        self._start = self._end - kept - count

    def _move_to_front(self, kept: NDArray[RowT], needed: int) -> None:
        buffer, room = self._buffer, min(2 * needed, 2 * self._size)
        if room > len(buffer):
            buffer = np.empty((room, *buffer.shape[1:]), buffer.dtype)
        buffer[: len(kept)] = kept
        self._buffer, self._end = buffer, len(kept)


class Probe:
    """The most recent examples, on which a plasticity sample is measured."""

    def __init__(
        self, size: int, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]
    ) -> None:
        self._features: _Window[np.float32] = _Window(size, features)
        self._targets: _Window[Any] = _Window(size, targets)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def features(self) -> NDArray[np.float32]:
        """[n, I], oldest first; valid until `extend`."""
        return self._features.rows

    @property
    def targets(self) -> NDArray[np.int64] | NDArray[np.float32]:
        """[n] or [n, C], oldest first; valid until `extend`."""
        return self._targets.rows

    def resized(self, size: int) -> "Probe":
        return Probe(size, self.features, self.targets)

    def extend(self, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]) -> None:
        self._features.extend(features)
        self._targets.extend(targets)
