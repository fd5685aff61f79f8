"""How a learner is doing on its stream: prequential loss and accuracy, overall and per task.

Every number is of the prediction made *before* the example was learned from (test, then train).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbp.saved.parts import read_part, refuse
from cbp.saved.progress import TASK_RECORD_LIMIT as TASK_RECORD_LIMIT  # part of this module's names, too
from cbp.saved.progress import SavedProgress, SavedTask, SavedTracker


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One stretch of the stream that carried the same task label; a label that comes back starts another."""

    task: str
    first_step: int
    """The step, counted from 1, that applied its first example."""
    steps: int
    """Steps in which its examples took part."""
    examples: int
    loss: float
    """Mean loss of its examples."""
    accuracy: float | None
    """Mean accuracy of its examples; None for regression."""

    @classmethod
    def of(cls, saved: SavedTask) -> "TaskRecord":
        return cls(**dict(saved))


@dataclass(frozen=True, kw_only=True)
class LearnerProgress:
    """Where a learner stands."""

    step: int
    """Optimizer updates so far."""
    examples: int
    """Examples learned from so far."""
    pending: int
    """Examples that wait for their step to fill up."""
    loss: float | None
    """Exponential average of the examples' loss; None before the first."""
    accuracy: float | None
    """Exponential average of the examples' accuracy; None before the first, and for regression."""
    replacements: dict[str, int]
    """Units replaced so far, per hidden layer."""
    tasks: tuple[TaskRecord, ...]
    """The last tasks, oldest first."""
    task_count: int
    """Tasks so far, those included whose records are gone."""

    def to_plain(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"tasks": [asdict(record) for record in self.tasks]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "LearnerProgress":
        """What `to_plain` was called on. Raises `SnapshotError` if it is anything else."""
        saved = read_part(SavedProgress, plain)
        refuse(saved.misfits())
        return cls(**{**dict(saved), "tasks": tuple(map(TaskRecord.of, saved.tasks))})


@dataclass(slots=True)
class ExponentialAverage:
    """Average in which an example's share falls by a decay with every later one; corrected for its start at zero."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


class Tally(NamedTuple):
    """Sums over examples in the order they were applied."""

    loss: float
    accuracy: float | None
    """None for regression."""
    faded_loss: float
    """Sum of (1 − δ) δᵏ times the loss, with k the number of examples after this one and δ the averages' decay."""
    faded_accuracy: float

    @classmethod
    def of(cls, losses: NDArray[np.float64], accuracies: NDArray[np.float64] | None, decay: float) -> "Tally":
        shares = (1.0 - decay) * decay ** np.arange(len(losses) - 1, -1, -1, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # an infinite loss may meet a share of 0
            loss, faded_loss = float(losses.sum()), float((losses * shares).sum())
            if accuracies is None:
                return cls(loss, None, faded_loss, 0.0)
            return cls(loss, float(accuracies.sum()), faded_loss, float((accuracies * shares).sum()))


@dataclass(slots=True)
class ProgressTracker:
    """Keeps the averages and the task records of one learner."""

    loss: ExponentialAverage = field(default_factory=ExponentialAverage)
    accuracy: ExponentialAverage = field(default_factory=ExponentialAverage)
    tasks: deque[TaskRecord] = field(default_factory=lambda: deque(maxlen=TASK_RECORD_LIMIT))
    task_count: int = 0
    last_task: str = ""

    def extend(self, tally: Tally, count: int, decay: float) -> None:
        """Adds so many examples to the averages."""
        faded = decay**count
        average = self.loss
        average.total = average.total * faded + tally.faded_loss
        average.weight = average.weight * faded + (1.0 - faded)
        if tally.accuracy is not None:
            average = self.accuracy
            average.total = average.total * faded + tally.faded_accuracy
            average.weight = average.weight * faded + (1.0 - faded)

    def extend_task(
        self, task: str, count: int, loss: float, accuracy: float | None, first_step: int, last_step: int
    ) -> None:
        """Accounts for the next examples, all of one task; loss and accuracy are their means.

        Their first was applied by step `first_step`, counted from 1, and their last by step `last_step`.
        """
        continues = task == self.last_task
        self.last_task = task
        if not task:
            return
        if not (continues and self.tasks):
            self.task_count += 1
            self.tasks.append(
                TaskRecord(
                    task=task,
                    first_step=first_step,
                    steps=last_step - first_step + 1,
                    examples=count,
                    loss=loss,
                    accuracy=accuracy,
                )
            )
            return
        before = self.tasks[-1]
        examples = before.examples + count
        share = count / examples
        self.tasks[-1] = TaskRecord(
            task=task,
            first_step=before.first_step,
            steps=last_step - before.first_step + 1,
            examples=examples,
            loss=before.loss + share * (loss - before.loss),
            accuracy=None
            if accuracy is None or before.accuracy is None
            else before.accuracy + share * (accuracy - before.accuracy),
        )

    def to_plain(self) -> dict[str, Any]:
        return {
            "loss": asdict(self.loss),
            "accuracy": asdict(self.accuracy),
            "tasks": [asdict(record) for record in self.tasks],
            "task_count": self.task_count,
            "last_task": self.last_task,
        }

    @classmethod
    def of(cls, saved: SavedTracker) -> "ProgressTracker":
        """Goes on from what `to_plain` said."""
        tracker = cls(
            loss=ExponentialAverage(saved.loss.total, saved.loss.weight),
            accuracy=ExponentialAverage(saved.accuracy.total, saved.accuracy.weight),
            task_count=saved.task_count,
            last_task=saved.last_task,
        )
        tracker.tasks.extend(map(TaskRecord.of, saved.tasks))
        return tracker
