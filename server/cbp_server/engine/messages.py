"""What the front process and the engine process say to each other.

Every call is one frozen request that names the type of its answer; requests that concern one learner are carried out
in the order in which they were sent. Values are pickled: both ends are this package, in one version, on one machine.
"""

import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cbp import Batch, LearnerProgress, LearnerSpec, TrainResult
from cbp_server.records import SampleRecord

AnswerT_co = TypeVar("AnswerT_co", covariant=True)

_HEADER = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class EngineOptions:
    """Settings of the engine process."""

    data_dir: Path
    device: str
    threads: int
    log_level: str
    log_format: str


@dataclass(frozen=True)
class Identity:
    """What is true of a learner besides its state, kept in its checkpoints. Times are ISO 8601, UTC."""

    learner_id: str
    uid: str
    create_time: str
    update_time: str
    request_id: str = ""
    request_digest: str = ""


#: Payload hashes kept per producer, to tell a repeated batch from a reused sequence.
HASHES_KEPT = 256


@dataclass(frozen=True)
class Position:
    """Where a producer stands: its newest epoch, the last sequence applied, payload hashes of the latest sequences."""

    epoch: int = 0
    sequence: int = 0
    hashes: tuple[tuple[int, str], ...] = ()

    def advance(self, epoch: int, sequence: int, payload_hash: str) -> "Position":
        """The position after one more batch."""
        return Position(epoch, sequence, (*self.hashes, (sequence, payload_hash))[-HASHES_KEPT:])


# -- answers --


@dataclass(frozen=True)
class EngineReady:
    """The engine process is up."""

    device: str
    stored_learners: tuple[str, ...]  # ids of the learners on disk


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint on disk."""

    size_bytes: int
    time: float  # when it was written, seconds since the epoch
    seconds: float  # writing it took


@dataclass(frozen=True)
class LearnerReport:
    """A learner as the engine held it when the checkpoint was taken."""

    identity: Identity
    spec: LearnerSpec
    progress: LearnerProgress
    positions: dict[str, Position]
    journal_position: int  # of the last entry that the learner contains
    checkpoint: CheckpointReport


@dataclass(frozen=True)
class LoadReport:
    """A learner brought back, with the plasticity samples saved with it, oldest first."""

    learner: LearnerReport
    samples: tuple[SampleRecord, ...]


@dataclass(frozen=True)
class TrainReport:
    """One batch applied."""

    result: TrainResult
    step: int  # the learner's, after the batch
    seconds: float
    samples: tuple[SampleRecord, ...]
    progress: LearnerProgress | None  # left out while more batches wait and the last report is recent


@dataclass(frozen=True)
class PredictReport:
    outputs: NDArray[np.float32]  # [N, out_features]
    step: int


# -- requests --


@dataclass(frozen=True)
class Request(Generic[AnswerT_co]):
    """A call that is answered with an `AnswerT_co` or an exception."""

    learner_id: str


@dataclass(frozen=True)
class Create(Request[LearnerReport]):
    """Make a learner and write its first checkpoint."""

    identity: Identity
    spec: LearnerSpec


@dataclass(frozen=True)
class Load(Request[LoadReport]):
    """Bring a learner back from its newest readable checkpoint."""


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


@dataclass(frozen=True)
class OpenProducer(Change[None]):
    """Note a producer's new epoch, so that it is in the next checkpoint."""

    producer: str
    epoch: int


@dataclass(frozen=True)
class AbortTraining(Request[None]):
    """Give up every batch that is not finished, of all learners, because the server ends.

    A batch that has begun counts as applied: the examples it has left wait in its learner, as a remainder does.
    """

    learner_id: str = ""


@dataclass(frozen=True)
class Predict(Request[PredictReport]):
    """Predict between two steps, ahead of whatever waits."""

    features: NDArray[np.generic]


@dataclass(frozen=True)
class Sample(Request[SampleRecord]):
    """Measure plasticity now."""


@dataclass(frozen=True)
class Update(Change[None]):
    """Change a live learner's spec."""

    update_time: str
    spec: LearnerSpec


@dataclass(frozen=True)
class Checkpoint(Request[LearnerReport]):
    """Write the learner's whole state."""


@dataclass(frozen=True)
class Delete(Request[None]):
    """Drop the learner and its files."""


@dataclass(frozen=True)
class Call:
    """A request under way; the answer carries the same number."""

    number: int
    request: Request[object]


@dataclass(frozen=True)
class Answer:
    """Exactly one of value and error counts; a value may be None."""

    number: int
    value: object = None
    error: Exception | None = None


def encode_frame(message: object) -> bytes:
    """`message` behind its length."""
    payload = pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(payload)) + payload


def frame_length(header: bytes) -> int:
    (length,) = _HEADER.unpack(header)
    return int(length)


def decode_frame(payload: bytes) -> object:
    """The message in `payload`, which came from the other end of this process's own socket pair."""
    return pickle.loads(payload)
