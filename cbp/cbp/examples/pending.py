"""Examples on the host: those that wait for their step to fill up, and the recent ones that serve as a probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cbp.errors import BatchError, FieldViolation
from cbp.examples.batches import Batch
from cbp.spec.learner_spec import LearnerSpec

RowT = TypeVar("RowT", bound=np.generic)
TaskRun = tuple[str, int]
"""A task label and how many examples in a row carry it."""


@dataclass(slots=True)
class Examples:
    """Consecutive examples of a stream. Not frozen, which would triple the time to make one; nothing changes them."""

    features: NDArray[np.float32]
    """[N, …]"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """[N] labels or [N, C] values."""
    weights: NDArray[np.float32] | None
    """[N]; None is 1 for all."""
    tasks: tuple[TaskRun, ...]
    """Runs that add up to N."""

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, batch: Batch) -> "Examples":
        features = batch.features
        return cls(features, batch.targets, batch.weights, ((batch.task, len(features)),))

    @classmethod
    def checked(
        cls,
        spec: LearnerSpec,
        features: NDArray[Any],
        targets: NDArray[Any],
        weights: NDArray[Any] | None,
        tasks: Sequence[TaskRun],
    ) -> "Examples":
        """Examples of any number, of float32 and, where they are labels, int64, held to what `Batch.validate` asks.

        Raises `BatchError`.
        """
        violations = []
        if (counted := sum(count for _, count in tasks)) != len(features):
            violations.append(FieldViolation("tasks", f"Are of {counted} examples, of which there are {len(features)}"))
        for name, rows in (("targets", targets), ("weights", weights)):
            if rows is not None and len(rows) != len(features):
                violations.append(FieldViolation(name, f"Are of {len(rows)} examples, and features of {len(features)}"))
        if violations:
            raise BatchError(violations)
        if len(features):
            Batch.validate(spec, features, targets, weights)
        return cls(features, targets, weights, tuple(tasks))

    @classmethod
    def none_like(cls, shape: tuple[int, ...], outputs: int | None) -> "Examples":
        """No examples of this shape; `outputs` is None for labels."""
        targets: NDArray[np.int64] | NDArray[np.float32] = (
            np.empty(0, np.int64) if outputs is None else np.empty((0, outputs), np.float32)
        )
        return cls(np.empty((0, *shape), np.float32), targets, np.empty(0, np.float32), ())

    def known_weights(self) -> NDArray[np.float32]:
        """[N]"""
        return np.ones(len(self), np.float32) if self.weights is None else self.weights

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
            np.concatenate([self.known_weights(), later.known_weights()]),
            tuple(tasks),
        )

    def split_at(self, position: int) -> tuple["Examples", "Examples"]:
        """The first `position` examples, and the rest in memory of its own."""
        first, rest = _split_runs(self.tasks, position)
        weights = self.known_weights()
        return (
            Examples(self.features[:position], self.targets[:position], weights[:position], first),
            Examples(self.features[position:].copy(), self.targets[position:].copy(), weights[position:].copy(), rest),
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
    """The most recent examples, on which a plasticity sample is measured.

    They lie in a ring, which grows with them up to its size. `position` is where the ring goes on and how many examples
    it holds; a compiled engine writes to all three arrays by their addresses.
    """

    def __init__(
        self, size: int, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]
    ) -> None:
        count = min(len(features), size)
        self.size = size
        self.feature_rows = features[len(features) - count :].copy()
        """[rows, …]"""
        self.target_rows: NDArray[Any] = targets[len(targets) - count :].copy()
        """[rows] or [rows, C]"""
        self.position = np.array([count, count])
        """The row that is written next, and the rows that are filled."""

    def __len__(self) -> int:
        return int(self.position[1])

    @property
    def features(self) -> NDArray[np.float32]:
        """[n, …], oldest first; valid until `extend`."""
        return self._unrolled(self.feature_rows)

    @property
    def targets(self) -> NDArray[np.int64] | NDArray[np.float32]:
        """[n] or [n, C], oldest first; valid until `extend`."""
        return self._unrolled(self.target_rows)

    def _unrolled(self, rows: NDArray[RowT]) -> NDArray[RowT]:
        following, filled = self.position.tolist()
        return rows[:filled] if following in (filled, 0) else np.concatenate([rows[following:], rows[:following]])

    def resized(self, size: int) -> "Probe":
        return Probe(size, self.features, self.targets)

    def make_room(self, count: int) -> None:
        """Lets the ring grow, if it is not as large as it gets and so many more examples do not fit."""
        rows, filled = len(self.feature_rows), len(self)
        if rows == self.size or filled + count <= rows:
            return
        rows = min(max(2 * rows, filled + count), self.size)
        self.feature_rows = _grown(self.features, rows)
        self.target_rows = _grown(self.targets, rows)
        self.position[0] = filled

    def extend(self, features: NDArray[np.float32], targets: NDArray[np.int64] | NDArray[np.float32]) -> None:
        if not len(features):
            return
        self.make_room(len(features))
        rows = len(self.feature_rows)
        features, targets = features[-rows:], targets[-rows:]
        following, filled = self.position.tolist()
        following %= rows
        before_the_end = rows - following
        for ring, new in ((self.feature_rows, features), (self.target_rows, targets)):
            ring[following : following + len(new)] = new[:before_the_end]
            ring[: max(len(new) - before_the_end, 0)] = new[before_the_end:]
        self.position[:] = (following + len(features)) % rows, min(filled + len(features), rows)


def _grown(rows: NDArray[RowT], count: int) -> NDArray[RowT]:
    grown = np.empty((count, *rows.shape[1:]), rows.dtype)
    grown[: len(rows)] = rows
    return grown
