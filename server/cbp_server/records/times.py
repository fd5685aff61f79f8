"""Times as they are written beside a learner's state: ISO 8601, with their zone."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from cbp import FieldViolation, SnapshotError

_FIRST_YEAR, _LAST_YEAR = 1970, 9998  # a zone must not lead out of what timestamps hold


def read_time(text: object) -> datetime:
    """The time that `isoformat` wrote, in UTC. Raises `SnapshotError`."""
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        time = None
    if time is None or time.tzinfo is None or not _FIRST_YEAR < time.year <= _LAST_YEAR:
        text = "Expected a time with its zone in ISO 8601, such as 2026-11-22T08:00:00+00:00"
        raise SnapshotError.of([FieldViolation("time", text)])
    return time.astimezone(UTC)


def _checked(text: str) -> str:
    try:
        read_time(text)
    except SnapshotError as error:
        raise PydanticCustomError("time", "{problem}", {"problem": error.violations[0].description}) from None
    return text


SavedTime = Annotated[str, AfterValidator(_checked)]
