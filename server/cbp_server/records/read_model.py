"""What HTTP and metrics ask of the running server. Every answer comes from memory; none waits for the engine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from cbp import SnapshotError
from cbp_server.records.learners import EngineStatus, JournalStatus, LearnerRecord
from cbp_server.records.samples import SampleRecord


class ReadModel(Protocol):
    """The live server, read only, and only from its event loop."""

    def learners(self, *, deleted: bool = False) -> Sequence[LearnerRecord]:
        """Every learner, in the order of their ids; on request the deleted ones as well."""
        ...

    def page(self, page_size: int, page_token: str, *, deleted: bool = False) -> tuple[Sequence[LearnerRecord], str]:
        """One page of them, and the token of the next one, empty on the last. Raises `InvalidRequest`."""
        ...

    def learner(self, learner_id: str) -> LearnerRecord:
        """One learner. Raises `LearnerNotFound`, or `SnapshotError` if it cannot be read from disk."""
        ...

    def samples(self, learner_id: str, count: int) -> Sequence[SampleRecord]:
        """Its newest plasticity samples, oldest first. Raises as `learner` does."""
        ...

    def unreadable(self) -> Mapping[str, str]:
        """Ids of learners that could not be restored, or cannot be shown, and why."""
        ...

    def cannot_show(self, record: LearnerRecord, error: Exception) -> str:
        """Notes that a record could not be shown: until it changes it counts as unreadable. Returns the reason."""
        ...

    def engine_status(self) -> EngineStatus: ...

    def journal_status(self) -> JournalStatus: ...

    def readiness(self) -> Sequence[str]:
        """Why requests should go elsewhere now, in words for an operator; empty when ready."""
        ...

    @property
    def open_streams(self) -> int:
        """Train streams open now."""
        ...


ShownT = TypeVar("ShownT")


def all_shown(
    source: ReadModel, records: Iterable[LearnerRecord], convert: Callable[[LearnerRecord], ShownT]
) -> list[ShownT]:
    """What `convert` makes of each record. One that it fails at is left out, and takes no other with it."""
    shown = []
    for record in records:
        try:
            shown.append(convert(record))
        except Exception as error:  # whatever is wrong with it
            source.cannot_show(record, error)
    return shown


def one_shown(source: ReadModel, record: LearnerRecord, convert: Callable[[LearnerRecord], ShownT]) -> ShownT:
    """What `convert` makes of the record. Raises `SnapshotError` if it fails."""
    try:
        return convert(record)
    except Exception as error:
        raise SnapshotError(source.cannot_show(record, error)) from error
