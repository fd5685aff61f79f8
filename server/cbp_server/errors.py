"""Everything that can be wrong with a request, and how each protocol says it.

CbpError                       (cbp) root of all
├── SpecError                  (cbp) a learner's spec, field by field
├── BatchError                 (cbp) a batch of examples, field by field
├── SnapshotError              (cbp) stored state that cannot be read
├── FormatError                (cbp) a network that the wanted file format cannot hold
├── DivergenceError            (cbp) training gave numbers that are none; the engine tells it as BatchNotLearnt
└── ServiceError
    ├── InvalidRequest         a request field other than spec and batch
    ├── MalformedRequest       bytes that are no message of the method
    ├── LearnerNotFound
    ├── LearnerExists
    ├── LearnerNotDeleted
    ├── LearnerReplaced        the stream was opened for another learner of that name
    ├── LearnerQuarantined     it does not train until it is resumed
    ├── LearnerNotQuarantined
    ├── CheckpointNotFound
    ├── CheckpointNeeded       recovery may need it
    ├── PositionNotHeld        the journal does not reach back so far
    ├── RequestIdReused        one request_id, two different requests
    ├── EtagMismatch           the learner changed since the caller read it
    ├── LimitReached           as many learners as the settings allow
    ├── MessageTooLarge        below that size which the transport refuses by itself
    ├── StreamProtocolError    messages in an order that Train does not know
    ├── CreditsExceeded        more batches in flight than the server granted
    ├── SequenceGap
    ├── SequenceReused         one sequence, two different payloads
    ├── ProducerNotFound
    ├── TooManyProducers       as many as the settings allow, and none that can be forgotten
    ├── ProducerFenced         a newer stream of the producer took over, or the producer was forgotten
    ├── EngineUnavailable      the engine process is down or starting
    ├── NotInEngine            the learner is not in the engine's memory: evicted, or being restored
    ├── BatchNotLearnt         a batch made the learner diverge, or training it failed
    ├── EngineFault            the engine failed at one request and lives on
    ├── ExportFailed
    ├── CheckpointFailed       state could not be written
    ├── CheckpointsUnreachable state cannot be read now; it is not said to be damaged
    ├── JournalUnavailable     a change could not be written to the journal
    ├── JournalDamaged         the journal is not what was written to it
    └── ServerDraining

The catalog below is total over this tree; a test proves it. Raisers know no transport.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import grpc

from cbp import BatchError, CbpError, DivergenceError, FieldViolation, FormatError, SnapshotError, SpecError
from cbp.errors import shown
from cbp_server.records.learners import Quarantine


class ServiceError(CbpError):
    """A request that the service cannot carry out. The text says what is wrong and what to do."""

    #: Facts for programs, sent as google.rpc.ErrorInfo.metadata.
    metadata: Mapping[str, str] = MappingProxyType({})
    violations: tuple[FieldViolation, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # The subclasses' arguments are not the text that Exception keeps, so the default would build another text.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[ServiceError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ServiceError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class InvalidRequest(ServiceError):
    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = violations


class MalformedRequest(ServiceError):
    def __init__(self, message_name: str) -> None:
        super().__init__(
            f"the request is not a {message_name} message; its bytes are cut off, damaged, or of another message"
        )


class LearnerNotFound(ServiceError):
    def __init__(self, learner_id: str) -> None:
        super().__init__(f"there is no learner {shown(learner_id, 70)}; create it, or list the learners there are")
        self.metadata = {"learner": learner_id}


class LearnerExists(ServiceError):
    def __init__(self, learner_id: str) -> None:
        super().__init__(f"a learner '{learner_id}' exists already; choose another id or delete that one")
        self.metadata = {"learner": learner_id}


class LearnerReplaced(ServiceError):
    def __init__(self, learner_id: str, uid: str) -> None:
        super().__init__(f"learner '{learner_id}' was deleted and created anew; it is another learner now")
        self.metadata = {"learner": learner_id, "uid": uid}


class LearnerNotDeleted(ServiceError):
    def __init__(self, learner_id: str) -> None:
        super().__init__(f"learner '{learner_id}' is not deleted; delete it first")
        self.metadata = {"learner": learner_id}


class LearnerQuarantined(ServiceError):
    def __init__(self, learner_id: str, quarantine: Quarantine) -> None:
        super().__init__(
            f"learner '{learner_id}' is quarantined: it could not learn batch {quarantine.sequence} of producer "
            f"'{quarantine.producer}' ({quarantine.reason}). It predicts as before that batch; resume it, with a lower "
            "learning rate or without that batch, or restore it"
        )
        self.metadata = {
            "learner": learner_id,
            "journal_position": str(quarantine.position),
            "producer": quarantine.producer,
            "sequence": str(quarantine.sequence),
        }


class LearnerNotQuarantined(ServiceError):
    def __init__(self, learner_id: str) -> None:
        super().__init__(f"learner '{learner_id}' is not quarantined, so there is nothing to resume")
        self.metadata = {"learner": learner_id}


class CheckpointNotFound(ServiceError):
    def __init__(self, learner_id: str, number: int) -> None:
        super().__init__(f"learner '{learner_id}' has no checkpoint {number}; list those it has")
        self.metadata = {"learner": learner_id}


class CheckpointNeeded(ServiceError):
    def __init__(self, learner_id: str, number: int) -> None:
        super().__init__(
            f"checkpoint {number} of learner '{learner_id}' is one that recovery may need; it goes by itself"
        )
        self.metadata = {"learner": learner_id}


class PositionNotHeld(ServiceError):
    def __init__(self, learner_id: str, first: int, last: int) -> None:
        super().__init__(
            f"learner '{learner_id}' can be restored to journal positions {first} to {last}, and to its checkpoints"
        )
        self.metadata = {"learner": learner_id, "first": str(first), "last": str(last)}


class RequestIdReused(ServiceError):
    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {shown(request_id)} was used for a different request; send a new UUID")
        self.violations = (FieldViolation("request_id", "was used for a different request"),)


class EtagMismatch(ServiceError):
    def __init__(self, learner_id: str, expected: str) -> None:
        super().__init__(
            f"learner '{learner_id}' has changed since it was read; get it again and use its etag {expected}"
        )
        self.metadata = {"learner": learner_id, "etag": expected}


class LimitReached(ServiceError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"this server hosts at most {limit} learners; delete one or raise --max-learners")


class MessageTooLarge(ServiceError):
    """`field` is the part of the request that is too large: a stream's batch, a prediction's features."""

    def __init__(self, size: int, limit: int, field: str = "batch") -> None:
        super().__init__(f"the message has {size} bytes, at most {limit} are allowed; send fewer examples at once")
        self.violations = (FieldViolation(field, f"has {size} bytes, at most {limit} are allowed"),)
        self.metadata = {"max_message_bytes": str(limit)}


class StreamProtocolError(ServiceError):
    pass


class CreditsExceeded(ServiceError):
    def __init__(self) -> None:
        super().__init__("a batch was sent without credit; wait for responses, each names the credits it grants")


class SequenceGap(ServiceError):
    def __init__(self, received: int, expected: int) -> None:
        super().__init__(f"sequence {received} leaves a gap: the next batch must have sequence {expected}")
        self.metadata = {"expected_sequence": str(expected)}


class SequenceReused(ServiceError):
    def __init__(self, sequence: int) -> None:
        super().__init__(f"sequence {sequence} was used for a batch with another payload; nothing was applied again")


class ProducerNotFound(ServiceError):
    def __init__(self, learner_id: str, producer: str) -> None:
        super().__init__(
            f"learner '{learner_id}' has no producer {shown(producer)}; get the learner to see those it has"
        )
        self.metadata = {"learner": learner_id, "producer": producer}


class TooManyProducers(ServiceError):
    def __init__(self, limit: int, open_streams: int, retention: float) -> None:
        super().__init__(
            f"the learner has {limit} producers, which is the limit: {open_streams} of them have open streams, and the "
            f"others were cut off less than {retention:g} seconds ago, or have sent what is not durable yet; use their "
            "names again, delete one that will not come back, or raise --max-producers"
        )
        self.violations = (FieldViolation("open.producer", f"would be one more than the {limit} that there may be"),)
        self.metadata = {"max_producers": str(limit)}


class ProducerFenced(ServiceError):
    def __init__(self, producer: str, epoch: int, *, forgotten: bool = False) -> None:
        super().__init__(
            f"producer '{producer}' has been forgotten, and its streams up to epoch {epoch} with it; open a new one, "
            "which begins at sequence 1"
            if forgotten
            else f"a newer stream of producer '{producer}' has taken over from epoch {epoch}"
        )
        self.metadata = {"producer": producer, "epoch": str(epoch)}


class EngineUnavailable(ServiceError):
    def __init__(self, reason: str = "the engine process is starting; try again in a moment") -> None:
        super().__init__(reason)


class NotInEngine(ServiceError):
    def __init__(self) -> None:
        super().__init__("the learner is being brought back into memory; try again in a moment")


class BatchNotLearnt(ServiceError):
    """The learner is no longer in the engine: it has to be brought back to where it was before the batch."""

    def __init__(self, position: int, producer: str, sequence: int, reason: str, *, diverged: bool = False) -> None:
        super().__init__(reason)
        self.position, self.producer, self.sequence = position, producer, sequence
        self.diverged = diverged  # so it would the next time; what else went wrong may not be the batch's fault

    def quarantine(self, position: int) -> Quarantine:
        """For this batch, which stands in the journal at `position`."""
        return Quarantine(position, self.producer, self.sequence, str(self), datetime.now(UTC))


class ExportFailed(ServiceError):
    pass


class EngineFault(ServiceError):
    """The engine raised where it should not have; the text is the engine's own."""


class CheckpointFailed(ServiceError):
    pass


class CheckpointsUnreachable(ServiceError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the storage of checkpoints cannot be reached: {reason}")


class JournalUnavailable(ServiceError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the journal cannot be written, so nothing is accepted: {reason}")


class JournalDamaged(ServiceError):
    def __init__(self, learner_uid: str, position: int) -> None:
        super().__init__(f"the journal of learner {learner_uid} is damaged or incomplete at position {position}")


class ServerDraining(ServiceError):
    def __init__(self) -> None:
        super().__init__("the server is shutting down; connect again, the stream resumes where it was acknowledged")


@dataclass(frozen=True)
class CatalogEntry:
    """How the protocols state one class of error."""

    code: grpc.StatusCode
    http_status: HTTPStatus
    reason: str  # google.rpc.ErrorInfo.reason
    title: str  # of the HTTP problem details
    retry_seconds: float | None = None  # when the same call may succeed


CATALOG: Mapping[type[CbpError], CatalogEntry] = {
    SpecError: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "INVALID_SPEC", "Invalid learner spec"
    ),
    BatchError: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "INVALID_BATCH", "Invalid batch"
    ),
    SnapshotError: CatalogEntry(
        grpc.StatusCode.DATA_LOSS, HTTPStatus.INTERNAL_SERVER_ERROR, "UNREADABLE_STATE", "Stored state is unreadable"
    ),
    FormatError: CatalogEntry(
        grpc.StatusCode.UNIMPLEMENTED, HTTPStatus.NOT_IMPLEMENTED, "FORMAT_UNSUPPORTED", "Format cannot hold this"
    ),
    DivergenceError: CatalogEntry(
        grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, "DIVERGED", "Training diverged"
    ),
    InvalidRequest: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT", "Invalid request"
    ),
    MalformedRequest: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "MALFORMED_REQUEST", "Malformed request"
    ),
    LearnerNotFound: CatalogEntry(
        grpc.StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND, "LEARNER_NOT_FOUND", "Learner not found"
    ),
    LearnerExists: CatalogEntry(
        grpc.StatusCode.ALREADY_EXISTS, HTTPStatus.CONFLICT, "LEARNER_EXISTS", "Learner exists already"
    ),
    LearnerReplaced: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "LEARNER_REPLACED", "Learner was created anew"
    ),
    LearnerNotDeleted: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "LEARNER_NOT_DELETED", "Learner is not deleted"
    ),
    LearnerQuarantined: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "LEARNER_QUARANTINED", "Learner is quarantined"
    ),
    LearnerNotQuarantined: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "LEARNER_NOT_QUARANTINED", "Nothing to resume"
    ),
    CheckpointNotFound: CatalogEntry(
        grpc.StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND, "CHECKPOINT_NOT_FOUND", "Checkpoint not found"
    ),
    CheckpointNeeded: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "CHECKPOINT_NEEDED", "Checkpoint is needed"
    ),
    PositionNotHeld: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "POSITION_NOT_HELD", "Journal position is not held"
    ),
    RequestIdReused: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "REQUEST_ID_REUSED", "Request id used before"
    ),
    EtagMismatch: CatalogEntry(
        grpc.StatusCode.ABORTED, HTTPStatus.PRECONDITION_FAILED, "ETAG_MISMATCH", "Learner has changed"
    ),
    LimitReached: CatalogEntry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS, "LIMIT_REACHED", "Limit reached"
    ),
    MessageTooLarge: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "MESSAGE_TOO_LARGE", "Message too large"
    ),
    StreamProtocolError: CatalogEntry(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST, "STREAM_PROTOCOL", "Unexpected stream message"
    ),
    CreditsExceeded: CatalogEntry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS, "CREDITS_EXCEEDED", "Sent without credit"
    ),
    SequenceGap: CatalogEntry(
        grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT, "SEQUENCE_GAP", "Gap in the sequence"
    ),
    SequenceReused: CatalogEntry(
        grpc.StatusCode.ALREADY_EXISTS, HTTPStatus.CONFLICT, "SEQUENCE_REUSED", "Sequence used before"
    ),
    ProducerNotFound: CatalogEntry(
        grpc.StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND, "PRODUCER_NOT_FOUND", "Producer not found"
    ),
    TooManyProducers: CatalogEntry(
        grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS, "TOO_MANY_PRODUCERS", "Too many producers"
    ),
    ProducerFenced: CatalogEntry(grpc.StatusCode.ABORTED, HTTPStatus.CONFLICT, "PRODUCER_FENCED", "Producer fenced"),
    EngineUnavailable: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "ENGINE_UNAVAILABLE", "Engine unavailable", 0.5
    ),
    NotInEngine: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "LEARNER_RESTORING", "Learner is coming back", 0.2
    ),
    BatchNotLearnt: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "BATCH_NOT_LEARNT", "Learner is rolled back", 0.2
    ),
    ExportFailed: CatalogEntry(
        grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, "EXPORT_FAILED", "Export failed"
    ),
    EngineFault: CatalogEntry(
        grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, "ENGINE_FAULT", "Engine fault"
    ),
    CheckpointFailed: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "CHECKPOINT_FAILED", "State not saved", 5.0
    ),
    CheckpointsUnreachable: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE,
        HTTPStatus.SERVICE_UNAVAILABLE,
        "CHECKPOINTS_UNREACHABLE",
        "Checkpoints out of reach",
        1.0,
    ),
    JournalUnavailable: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "JOURNAL_UNAVAILABLE", "Journal not written", 1.0
    ),
    JournalDamaged: CatalogEntry(
        grpc.StatusCode.DATA_LOSS, HTTPStatus.INTERNAL_SERVER_ERROR, "JOURNAL_DAMAGED", "Journal is damaged"
    ),
    ServerDraining: CatalogEntry(
        grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, "SERVER_DRAINING", "Server is shutting down", 1.0
    ),
}

_UNKNOWN = CatalogEntry(grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL", "Internal error")


@dataclass(frozen=True)
class Description:
    """One error, ready to be said in any protocol."""

    code: grpc.StatusCode
    http_status: HTTPStatus
    reason: str
    title: str
    message: str
    violations: tuple[FieldViolation, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None


def describe(error: BaseException) -> Description:
    """What to tell a caller about `error`; an error outside the tree gives no detail away."""
    entry = next((CATALOG[cls] for cls in type(error).__mro__ if cls in CATALOG), None)
    if entry is None:
        message = "the server failed at this request; its log has the details"
        return Description(_UNKNOWN.code, _UNKNOWN.http_status, _UNKNOWN.reason, _UNKNOWN.title, message)
    return Description(
        code=entry.code,
        http_status=entry.http_status,
        reason=entry.reason,
        title=entry.title,
        message=str(error),
        violations=tuple(getattr(error, "violations", ())),
        metadata=dict(getattr(error, "metadata", {})),
        retry_seconds=entry.retry_seconds,
    )
