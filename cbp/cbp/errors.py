"""The errors of this package.

CbpError
├── SpecError       a specification is wrong, or does not fit what it is applied to
├── BatchError      examples do not fit the learner's specification
├── DivergenceError a learner's numbers overflowed: it is lost, and goes on from a snapshot
├── SnapshotError   a snapshot is damaged or was not made by this package
└── FormatError     a file format cannot hold the learner's network
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FieldViolation:
    """One thing that is wrong: the dotted path of the field, and what to do about it."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


def shown(value: object, longest: int = 60) -> str:
    """`value` as an error's text may repeat it: printable, on one line, and clipped."""
    # A text of millions of characters is clipped before its representation is made, not after.
    try:
        text = repr(value[: longest + 1] if isinstance(value, str | bytes) else value)
    except ValueError:  # an integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


class CbpError(Exception):
    """Base of every error that this package raises on purpose."""


class _ViolationError(CbpError):
    """Carries every violation found, not only the first, so that one round of corrections is enough."""

    def __init__(self, violations: Iterable[FieldViolation]) -> None:
        # The violations are the only argument, so that pickle rebuilds the error from `args`.
        self.violations = tuple(violations)
        super().__init__(self.violations)

    def __str__(self) -> str:
        return "; ".join(str(violation) for violation in self.violations)


class SpecError(_ViolationError):
    """A specification that cannot be used."""


class BatchError(_ViolationError):
    """Examples that cannot be used."""


Diverged = Literal["outputs", "loss", "parameters", "optimizer state"]


class DivergenceError(CbpError):
    """A step made numbers that are infinite or not numbers. The learner is in no defined state any more."""

    def __init__(self, step: int, what: Diverged) -> None:
        # Both are arguments of the base class, so that pickle rebuilds the error from `args`.
        super().__init__(step, what)
        self.step = step
        """The step, counted from 1, at which it was noticed: whose predictions were wrong, or else the call's last."""
        self.what: Diverged = what
        """What is not finite: the step's outputs; its loss, though the outputs are finite; the parameters; or the
        optimizer's state, though the parameters are finite."""

    def __str__(self) -> str:
        return f"Training diverged: at step {self.step} the {self.what} became infinite or not a number"


class SnapshotError(CbpError):
    """A snapshot that cannot be restored."""

    def __init__(self, message: str, violations: Iterable[FieldViolation] = ()) -> None:
        # Both are arguments of the base class, so that pickle rebuilds the error from `args`.
        self.violations = tuple(violations)
        """What in it is wrong, by its name there; none if it cannot be read at all."""
        super().__init__(message, self.violations)

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def of(cls, violations: Iterable[FieldViolation]) -> "SnapshotError":
        """Says everything that is wrong."""
        found = tuple(violations)
        return cls("; ".join(map(str, found)), found)

    def within(self, place: str) -> "SnapshotError":
        """The same of a part that stands at `place` in a larger whole."""
        if not self.violations:
            return SnapshotError.of([FieldViolation(place, str(self))])
        return SnapshotError.of(FieldViolation(f"{place}.{each.field}", each.description) for each in self.violations)

    @classmethod
    def of_spec(cls, error: SpecError) -> "SnapshotError":
        """What is wrong with a specification, said of the snapshot that it is in."""
        violations = [
            FieldViolation(each.field if each.field == "spec" else f"spec.{each.field}", each.description)
            for each in error.violations
        ]
        return cls(f"The specification cannot be read: {error}", violations)


class FormatError(CbpError):
    """A network that cannot be written in the wanted format; the text names those that can hold it."""
