"""What HTTP and metrics ask of the running server. Every answer comes from memory; none waits for the engine."""

from collections.abc import Sequence
from typing import Protocol

from cbp_server.records import EngineStatus, LearnerRecord


class ReadModel(Protocol):
    """The live server, read only. Metrics call it from a worker thread, so each answer is a snapshot."""

    def learners(self) -> Sequence[LearnerRecord]:
        """Every live learner, in the order of their ids."""
        ...

    def learner(self, learner_id: str) -> LearnerRecord:
        """One learner. Raises `LearnerNotFound`."""
        ...

    def engine_status(self) -> EngineStatus: ...

    def readiness(self) -> Sequence[str]:
        """Why requests should go elsewhere now, in words for an operator; empty when ready."""
        ...

    @property
    def open_streams(self) -> int:
        """Train streams open now."""
        ...
