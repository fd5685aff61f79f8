"""What HTTP and metrics ask of the running server. Every answer comes from memory; none waits for the engine."""

from collections.abc import Mapping, Sequence
from typing import Protocol

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
        """Ids of learners that could not be restored, and why."""
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
