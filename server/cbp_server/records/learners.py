"""What the front process knows of the live learners: named records, read by gRPC, HTTP and metrics alike."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from pydantic import AwareDatetime

from cbp import EngineName, LearnerProgress, LearnerSpec
from cbp.saved.parts import Count, Text
from cbp_server.records.samples import SampleHistory


class LearnerState(Enum):
    """Whether a learner can be used now."""

    ACTIVE = "active"
    UNAVAILABLE = "unavailable"  # its engine process is down or restoring it
    EVICTED = "evicted"  # idle and out of memory; the first use brings it back
    QUARANTINED = "quarantined"  # a batch could not be learnt; it predicts, and trains once it is resumed
    DELETED = "deleted"  # can be undeleted for a while


class Durability(Enum):
    """What an acknowledged batch survives."""

    FSYNC = "fsync"  # power loss
    OS = "os"  # a crash of the server, not power loss
    NONE = "none"  # nothing until the next checkpoint: batches are not journaled


@dataclass(frozen=True)
class Quarantine:
    """The batch that a learner could not learn."""

    position: Count  # in the journal
    producer: Text
    sequence: Count
    reason: Text
    time: AwareDatetime


@dataclass(frozen=True)
class ProducerRecord:
    """How far a producer has come; sequences count from 1, 0 is nothing yet."""

    producer: str
    epoch: int
    applied_sequence: int
    durable_sequence: int


@dataclass(frozen=True)
class CheckpointRecord:
    """The newest checkpoint on disk."""

    step: int
    time: datetime
    size_bytes: int
    position: int  # in the journal


@dataclass
class LearnerRecord:
    """One live learner. Its values are replaced, not changed, but for `samples`, which only grows, and `producers`."""

    learner_id: str
    uid: str
    spec: LearnerSpec
    engine: EngineName  # that takes its steps
    etag: str
    create_time: datetime
    update_time: datetime
    state: LearnerState
    progress: LearnerProgress
    samples: SampleHistory
    producers: dict[str, ProducerRecord] = field(default_factory=dict)
    checkpoint: CheckpointRecord | None = None
    durability: Durability = Durability.FSYNC
    quarantine: Quarantine | None = None
    delete_time: datetime | None = None
    purge_time: datetime | None = None
    journal_position: int = 0  # of the last entry given to the journal
    queued_batches: int = 0  # accepted, not yet applied
    version: int = 0  # grows with every change that a watcher may want to see

    @property
    def unsaved_entries(self) -> int:
        """Entries of the journal behind the newest checkpoint."""
        return self.journal_position - (self.checkpoint.position if self.checkpoint is not None else 0)


@dataclass(frozen=True)
class JournalStatus:
    """Whether the journal can be written, as its last write has shown."""

    up: bool
    since: datetime  # when that changed last (UTC); at first, when the server started
    reason: str = ""  # why it cannot


@dataclass(frozen=True)
class EngineStatus:
    """The engine process as its supervisor sees it."""

    up: bool
    device: str
    restarts: int  # since the server started
    train_seconds: float  # spent in steps, since the server started
    steps: int  # made, since the server started
    resident_bytes: int  # memory of the engine process, 0 if not known
