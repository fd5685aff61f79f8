"""What the front process and the engine process say to each other.

Every call is one frozen request that names the type of its answer; requests that concern one learner are carried out
in the order in which they were sent. For how they travel see `frames`.
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cbp import Batch, EngineName, LearnerProgress, LearnerSpec, TrainResult
from cbp_server.records.samples import PackedSample

AnswerT_co = TypeVar("AnswerT_co", covariant=True)


@dataclass(frozen=True)
class EngineOptions:
    """Settings of the engine process."""

    checkpoint_url: str
    device: str
    engine: str  # see the setting
    threads: int
    group_wait: float  # seconds
    log_level: str
    log_format: str


#: Payload hashes kept per producer, to tell a repeated batch from a reused sequence.
HASHES_KEPT = 256


@dataclass(frozen=True)
class Position:
    """Where a producer stands: its newest epoch and the stream that has it, the last sequence applied, payload hashes
    of the latest sequences.

    `life` is 0 unless a producer may have had the name before, and been forgotten; it tells their batches apart.
    """

    epoch: int = 0
    sequence: int = 0
    hashes: tuple[tuple[int, str], ...] = ()
    stream_id: str = ""
    life: int = 0

    def opened(self, epoch: int, stream_id: str) -> "Position":
        """The position after a stream was opened."""
        return replace(self, epoch=epoch, stream_id=stream_id)

    def advance(self, epoch: int, sequence: int, payload_hash: str) -> "Position":
        """The position after one more batch."""
        hashes = (*self.hashes[-HASHES_KEPT + 1 :], (sequence, payload_hash))
        return Position(epoch, sequence, hashes, self.stream_id, self.life)


# -- answers --


@dataclass(frozen=True)
class EngineReady:
    """The engine process is up."""

    device: str
    compiled: bool  # compiled code is at hand; if not, `Prepare` says when it is


@dataclass(frozen=True)
class PrepareReport:
    """What has come of the preparations."""

    compiled: bool  # compiled code is at hand


@dataclass(frozen=True)
class LearnerReport:
    """A learner as the engine held it between two requests."""

    spec: LearnerSpec
    engine: EngineName
    update_time: str  # of the spec; ISO 8601, UTC, empty if it is the one it was made with
    progress: LearnerProgress
    positions: dict[str, Position]
    journal_position: int  # of the last entry that the learner contains
    epoch_floor: int = 0  # the highest epoch of all producers that were forgotten; those to come are above it


@dataclass(frozen=True)
class LoadReport:
    """A learner brought back, with the plasticity samples saved with it, oldest first."""

    learner: LearnerReport
    samples: tuple[PackedSample, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint that is whole and durable, and the learner as it holds it."""

    learner: LearnerReport
    size_bytes: int
    time: float  # when it was written, seconds since the epoch
    seconds: float  # writing it took


@dataclass(frozen=True)
class TrainReport:
    """One batch applied."""

    result: TrainResult
    step: int  # the learner's, after the batch
    samples: tuple[PackedSample, ...]
    progress: LearnerProgress | None  # left out while more batches wait and the last report is recent


@dataclass(frozen=True)
class ResetReport:
    """Units reset by hand."""

    replacements: dict[str, int]  # by layer
    progress: LearnerProgress


@dataclass(frozen=True)
class PredictReport:
    outputs: NDArray[np.float32]  # [N, out_features]
    step: int


# -- requests --


@dataclass(frozen=True)
class Request(Generic[AnswerT_co]):
    """A call that is answered with an `AnswerT_co` or an exception."""

    learner: str  # uid

    @property
    def size_bytes(self) -> int:
        """Of the arrays in it."""
        return 0


@dataclass(frozen=True)
class Create(Request[LearnerReport]):
    """Make the newborn that the spec describes."""

    spec: LearnerSpec
    engine: EngineName


@dataclass(frozen=True)
class Load(Request[LoadReport]):
    """Bring a learner back from a checkpoint; it takes the place of one that is there."""

    number: int
    stored_as: str  # uid of the learner whose checkpoint it is


@dataclass(frozen=True)
class Import(Request[LearnerReport]):
    """Make a learner of a snapshot's bytes, with no producers."""

    data: bytes
    engine: EngineName


@dataclass(frozen=True)
class Copy(Request[LearnerReport]):
    """Make a copy of the learner, with no producers, behind what waits; answers what the copy is."""

    to: str  # uid of the copy


@dataclass(frozen=True)
class Describe(Request[LearnerReport]):
    """Say where the learner stands, behind what waits."""


@dataclass(frozen=True)
class Export(Request[bytes]):
    """The learner's snapshot as bytes."""


@dataclass(frozen=True)
class Drop(Request[None]):
    """Take the learner out of memory, behind what waits; nothing is saved."""


@dataclass(frozen=True)
class Rename(Request[None]):
    """Let the learner take the place of another one, with these producers and this position."""

    place_of: str  # uid


@dataclass(frozen=True)
class Place(Request[LearnerReport]):
    """Set where the learner stands in a journal: that of the learner whose earlier state it is."""

    positions: dict[str, Position]
    epoch_floor: int
    journal_position: int
    update_time: str


@dataclass(frozen=True)
class Revise(Request[None]):
    """Go on with another spec, by a decision that stands in the journal further behind."""

    update_time: str
    spec: LearnerSpec


@dataclass(frozen=True)
class Change(Request[AnswerT_co]):
    """A request that stands in the journal, and is applied in its order."""

    journal_position: int


@dataclass(frozen=True)
class Train(Change[TrainReport]):
    """Apply one batch and move the producer's position with it."""

    producer: str
    epoch: int
    sequence: int
    payload_hash: str
    batch: Batch
    return_outputs: bool
    journaled: bool = True  # otherwise journal_position is that of the entry before it

    @property
    def size_bytes(self) -> int:
        return self.batch.features.nbytes + self.batch.targets.nbytes


@dataclass(frozen=True)
class Skip(Change[None]):
    """Move the producer's position as if the batch had been applied."""

    producer: str
    epoch: int
    sequence: int
    payload_hash: str


@dataclass(frozen=True)
class OpenProducer(Change[None]):
    """Note a producer's new epoch, so that it is in the next checkpoint."""

    producer: str
    epoch: int
    stream_id: str


@dataclass(frozen=True)
class ForgetProducer(Change[None]):
    """Give a producer's name free: its position is kept no longer."""

    producer: str


@dataclass(frozen=True)
class Update(Change[None]):
    """Change a live learner's spec."""

    update_time: str
    spec: LearnerSpec


@dataclass(frozen=True)
class ResetUnits(Change[ResetReport]):
    """Reset units by hand."""

    layers: tuple[int, ...]
    fraction: float


@dataclass(frozen=True)
class SwitchEngine(Change[None]):
    """Take the learner's further steps with another engine."""

    engine: EngineName


@dataclass(frozen=True)
class Pass(Change[None]):
    """Note an entry that does nothing by itself."""


@dataclass(frozen=True)
class AbortTraining(Request[None]):
    """Give up every batch that is not finished, of all learners, because the server ends.

    A batch that has begun counts as applied: the examples it has left wait in its learner, as a remainder does.
    """

    learner: str = ""


@dataclass(frozen=True)
class Prepare(Request[PrepareReport]):
    """Answered when compiled code is at hand, or cannot be had. Concerns no learner."""

    learner: str = ""


@dataclass(frozen=True)
class Predict(Request[PredictReport]):
    """Predict between two steps, ahead of whatever waits."""

    features: NDArray[np.generic]

    @property
    def size_bytes(self) -> int:
        return self.features.nbytes


@dataclass(frozen=True)
class Sample(Request[PackedSample]):
    """Measure plasticity now."""


@dataclass(frozen=True)
class Checkpoint(Request[CheckpointReport]):
    """Write the learner's whole state."""

    number: int
    stored_as: str  # uid of the learner whose checkpoint it becomes


@dataclass(frozen=True)
class Call:
    """A request under way; the answer carries the same number."""

    number: int
    request: Request[object]
    quiet: bool = False  # answered only if it fails


@dataclass(frozen=True)
class Answer:
    """Exactly one of value and error counts; a value may be None."""

    number: int
    value: object = None
    error: Exception | None = None


@dataclass(frozen=True)
class Answers:
    """What the engine process has to say at a time, and what it has done since it spoke before."""

    answers: tuple[Answer, ...]
    train_seconds: float = 0.0  # spent in steps
    steps: int = 0
