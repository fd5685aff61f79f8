"""All that a snapshot says of a learner beside its tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Strict

from cbp.errors import FieldViolation
from cbp.saved.parts import Count, Owed, Positive, SavedPart, TaskLabel, read_part, refuse
from cbp.saved.progress import SavedTracker
from cbp.spec.learner_spec import LearnerSpec


class SavedLearner(SavedPart):
    """What the snapshots of all learners have in common."""

    format_version: Count
    spec: dict[str, Any]
    """See `LearnerSnapshot.read_spec`, which reads these two first."""
    step: Count
    examples: Count
    pending_tasks: list[Annotated[tuple[TaskLabel, Positive], Strict(False)]]
    progress: SavedTracker

    def misfits(self, spec: LearnerSpec) -> Iterator[FieldViolation]:
        """What does not go with the rest."""
        if self.examples < self.step or (not self.step and self.examples):
            yield FieldViolation("examples", f"Expected at least one in each of {self.step} steps; got {self.examples}")
        scores_accuracy = spec.loss.kind in ("cross_entropy", "binary_cross_entropy")
        for misfit in self.progress.misfits(self.step, self.examples, scores_accuracy=scores_accuracy):
            yield FieldViolation(f"progress.{misfit.field}", misfit.description)


class SavedPerceptron(SavedLearner):
    """Of a plain multilayer perceptron; lists are by hidden layer."""

    replacements: list[Count]
    accumulated_replacements: list[Owed]
    replacements_in_window: list[Count] | None = None
    """Not in snapshots of before there was a limit on replacements: none have gone in the present window."""

    def misfits(self, spec: LearnerSpec) -> Iterator[FieldViolation]:
        yield from super().misfits(spec)
        yield from misfits_of_replacements(
            spec.mlp.hidden, self.step, self.replacements, self.accumulated_replacements, self.replacements_in_window
        )


class SavedModule(SavedLearner):
    """Of any other network."""

    methods: list[dict[str, Any]]
    """Of each method that is at work on the learner its state without the tensors, which the method reads itself."""


LearnerT = TypeVar("LearnerT", bound=SavedLearner)


def read_learner(kind: type[LearnerT], plain: Mapping[str, Any], spec: LearnerSpec) -> LearnerT:
    """The metadata of a learner with this specification. Raises `SnapshotError`."""
    saved = read_part(kind, plain)
    refuse(saved.misfits(spec))
    return saved


def misfits_of_replacements(
    widths: Sequence[int],
    step: int | None,
    replacements: Sequence[int],
    accumulated: Sequence[float] | None = None,
    in_window: Sequence[int] | None = None,
) -> Iterator[FieldViolation]:
    """What cannot be of hidden layers of so many units, of which each is replaced once a step at most.

    `step` is None if it is not known. By layer: units replaced so far; what is owed; and units replaced by the rates in
    the present window of steps.
    """
    counted = {
        "replacements": replacements,
        "accumulated_replacements": accumulated,
        "replacements_in_window": in_window,
    }
    wrong = [field for field, values in counted.items() if values is not None and len(values) != len(widths)]
    for field in wrong:
        yield FieldViolation(field, f"Expected {len(widths)} numbers, one for each hidden layer or group of units")
    if wrong:
        return
    for layer, (width, count) in enumerate(zip(widths, replacements, strict=True)):
        if step is not None and count > width * step:
            text = f"Expected at most {width * step}, by {step} steps of a layer of {width} units"
            yield FieldViolation(f"replacements[{layer}]", f"{text}; got {count}")
        if in_window is not None and in_window[layer] > count:
            yield FieldViolation(f"replacements_in_window[{layer}]", f"Expected at most the {count} of all windows")
