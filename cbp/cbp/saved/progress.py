"""How a learner is doing, as it is saved."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from cbp.errors import FieldViolation
from cbp.saved.parts import Count, Finite, Positive, SavedPart, TaskLabel

TASK_RECORD_LIMIT = 128
"""Task records kept; the oldest go first."""
_ROUNDING = 1e-6

Weight = Annotated[Finite, Field(ge=0, le=1 + _ROUNDING)]
"""Also a mean of numbers from 0 to 1."""


class SavedTask(SavedPart):
    """A `TaskRecord`."""

    task: Annotated[TaskLabel, Field(min_length=1)]
    first_step: Positive
    steps: Positive
    examples: Positive
    loss: Finite
    accuracy: Weight | None


class SavedAverage(SavedPart):
    """An `ExponentialAverage`."""

    total: Finite
    weight: Weight


Tasks = Annotated[list[SavedTask], Field(max_length=TASK_RECORD_LIMIT)]


class SavedTracker(SavedPart):
    """A `ProgressTracker`."""

    loss: SavedAverage
    accuracy: SavedAverage
    tasks: Tasks
    task_count: Count
    last_task: TaskLabel

    def misfits(self, step: int, examples: int, *, scores_accuracy: bool) -> Iterator[FieldViolation]:
        """What cannot be of a learner that has taken so many steps, with so many examples."""
        yield from _misfits_of_tasks(self.tasks, self.task_count, step, examples)
        for place, task in enumerate(self.tasks):
            if (task.accuracy is None) == scores_accuracy:
                yield FieldViolation(f"tasks[{place}].accuracy", _accuracy_expected(scores=scores_accuracy))
        average = self.accuracy
        if average.weight and not scores_accuracy:
            yield FieldViolation("accuracy.weight", _accuracy_expected(scores=False))
        if not -_ROUNDING <= average.total <= average.weight + _ROUNDING:
            yield FieldViolation("accuracy.total", f"Expected from 0 to the weight of {average.weight}")
        if average.total and not average.weight:
            yield FieldViolation("accuracy.total", "Expected 0, as its weight is")
        if bool(self.loss.weight) != bool(examples):
            yield FieldViolation("loss.weight", f"Does not go with {examples} examples")


class SavedProgress(SavedPart):
    """A `LearnerProgress`: what is shown of a learner that is not in memory."""

    step: Count
    examples: Count
    pending: Count
    loss: float | None
    accuracy: float | None
    replacements: dict[str, Count]
    tasks: Tasks
    task_count: Count

    def misfits(self) -> Iterator[FieldViolation]:
        """What does not go with the rest."""
        yield from _misfits_of_tasks(self.tasks, self.task_count, self.step, self.examples)


def _misfits_of_tasks(tasks: Sequence[SavedTask], count: int, step: int, examples: int) -> Iterator[FieldViolation]:
    for place, task in enumerate(tasks):
        last = task.first_step + task.steps - 1
        if last > step:
            yield FieldViolation(f"tasks[{place}].steps", f"Ends at step {last}, but the learner has taken {step}")
    if sum(task.examples for task in tasks) > examples:
        yield FieldViolation("tasks", f"Have more examples than the {examples} that the learner has learnt from")
    if not len(tasks) <= count <= examples:
        yield FieldViolation("task_count", f"Expected from {len(tasks)}, as recorded, to {examples}; got {count}")


def _accuracy_expected(*, scores: bool) -> str:
    return "Expected a number, as the loss is of labels" if scores else "Expected none, as the loss has no accuracy"
