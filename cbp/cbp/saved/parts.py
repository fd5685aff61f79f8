"""What the records of a saved state are made of, and how they are read: every violation by the name of its field.

Strict throughout: a whole number is no number with a point, and neither is a boolean. Counts end where float64, in
which JSON's readers and Prometheus hold them, no longer tells them apart; a learner would need centuries to come near.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from cbp.errors import FieldViolation, SnapshotError, shown
from cbp.examples.batches import problem_with_task

LARGEST_COUNT = 2**53


def _encodable(value: str) -> str:
    value.encode()  # half of a surrogate pair, which JSON may hold, no message can
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("printable", "Expected printable characters only")
    return value


def _task_label(value: str) -> str:
    problem = problem_with_task(value)
    if problem is not None:
        raise PydanticCustomError("task_label", "{problem}", {"problem": problem})
    return value


Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST_COUNT)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST_COUNT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Owed = Annotated[float, Field(ge=0, lt=2, allow_inf_nan=False)]
"""What a rate adds up to and has not been carried out yet: below one, but for rounding."""
Measure = Annotated[float, Strict()]
"""Any number: what overflows is infinite, and what that comes to may be none."""
Label = Annotated[str, Field(strict=True, min_length=1, max_length=128), AfterValidator(_printable)]
Text = Annotated[str, Field(strict=True), AfterValidator(_encodable)]
TaskLabel = Annotated[str, AfterValidator(_task_label)]


class SavedPart(BaseModel):
    """A record of which nothing but its fields may be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class SavedBeside(SavedPart):
    """A record of plain values among others, such as tensors, that somebody else reads."""

    model_config = ConfigDict(extra="ignore")


PartT = TypeVar("PartT", bound=SavedPart)


def read_part(kind: type[PartT], plain: object) -> PartT:
    """The record that `plain` describes. Raises `SnapshotError`."""
    if not isinstance(plain, Mapping):
        raise SnapshotError(f"The snapshot's metadata should be an object, but is {type(plain).__name__}")
    with naming_misfits():
        return kind.model_validate(plain)


@contextmanager
def naming_misfits() -> Iterator[None]:
    """Turns what pydantic says into `SnapshotError`."""
    try:
        yield
    except ValidationError as error:
        raise SnapshotError.of(map(_violation, error.errors(include_url=False))) from None


def refuse(misfits: Iterable[FieldViolation]) -> None:
    """Raises `SnapshotError` if there are any."""
    found = tuple(misfits)
    if found:
        raise SnapshotError.of(found)


def _violation(details: ErrorDetails) -> FieldViolation:
    path = ""
    for part in details["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    match details["type"]:
        case "missing":
            return FieldViolation(path, "Field required")
        case "extra_forbidden":
            return FieldViolation(path, "Unknown field")
        case _:
            return FieldViolation(path, f"{details['msg']}; got {_shown(details['input'])}")


def _shown(value: Any) -> str:
    return shown(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
