"""Everything that the client raises.

CbpClientError
├── InvalidArgument
│   ├── BatchRejected          batches of a stream that the server did not accept
│   └── MessageTooLarge        a request or an answer larger than one message may be
├── NotFound
├── AlreadyExists
├── PermissionDenied           also for a missing or wrong credential
├── FailedPrecondition
│   ├── SequenceGap            the server expects another sequence than the stream sent
│   ├── BatchesLost            the server fell back behind the oldest batch that the stream still holds
│   ├── LearnerReplaced        the learner was deleted and created anew while the stream was open
│   └── LearnerQuarantined     the learner could not learn a batch, and trains again once it is resumed
├── Aborted
│   ├── EtagMismatch           the learner changed since it was read
│   └── Fenced                 a newer stream of the same producer has taken over
├── ResourceExhausted
├── Unavailable                no server, or one that is starting, draining or restoring its engine
├── DeadlineExceeded
├── Unimplemented
├── ServerError                a fault of the server, not of the call
├── StreamClosed               a stream was used after it was closed
└── ClientUnusable             a client was used where it can't be, such as after it was closed, or in a forked process
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cbp_proto import PlainError
from cbp_proto.v1 import training_service_pb2

ERROR_DOMAIN = "cbp.v1"


@dataclass(frozen=True)
class FieldViolation:
    """What is wrong with one field of a request."""

    field: str
    description: str


class CbpClientError(Exception):
    """Base of all errors that this package raises.

    Attributes:
        message: what is wrong, in the server's words where it was the server that refused.
        reason: the same for programs, such as LEARNER_NOT_FOUND; empty where the error is not the server's.
        violations: the fields that were refused, if it was because of fields.
        metadata: facts that the server gives for programs, such as the id of a learner.
        retry_after: seconds after which the server says that a retry makes sense, if it says so.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross to other processes. They are made again without __init__, which differs from class to class.
        return _remade, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        unsaid = [violation for violation in self.violations if violation.description not in self.message]
        return "; ".join([self.message, *(f"{violation.field}: {violation.description}" for violation in unsaid)])


def _remade(error_type: type[CbpClientError], arguments: tuple[Any, ...]) -> CbpClientError:
    return error_type.__new__(error_type, *arguments)


class InvalidArgument(CbpClientError):
    """The request is wrong; see `violations`."""


@dataclass(frozen=True)
class RejectedBatch:
    """A batch that the server did not accept and that changed nothing.

    Attributes:
        number: the `Ticket.number` that `send` returned for it.
        task: the label that it was sent with.
    """

    number: int
    task: str
    message: str
    reason: str
    violations: tuple[FieldViolation, ...]


class BatchRejected(InvalidArgument):
    """The server did not accept batches sent earlier; all others of the stream are unharmed.

    Attributes:
        batches: the rejected batches, each reported once in a stream's life.
    """

    def __init__(self, batches: Sequence[RejectedBatch]) -> None:
        first = batches[0]
        message = f"batch {first.number} of the stream was rejected: {first.message}"
        if len(batches) > 1:
            message += f" (and {len(batches) - 1} more)"
        super().__init__(message, reason=first.reason, violations=first.violations)
        self.batches = tuple(batches)


class MessageTooLarge(InvalidArgument):
    """A request, or the answer to it, is larger than one message may be."""


class NotFound(CbpClientError):
    """There is no learner, or checkpoint, of that name."""


class AlreadyExists(CbpClientError):
    """The name, request id or sequence is taken by something else."""


class PermissionDenied(CbpClientError):
    """The server does not let this caller do that."""


class FailedPrecondition(CbpClientError):
    """The server's state does not allow the call."""


class SequenceGap(FailedPrecondition):
    """The server expects another sequence than the stream sent."""

    @property
    def expected_sequence(self) -> int:
        """The sequence that the server would take next; 0 if it did not say."""
        return int(self.metadata.get("expected_sequence", 0))


class BatchesLost(FailedPrecondition):
    """The server came back from a state so old that the stream no longer holds all the batches it lacks.

    Attributes:
        expected: the sequence that the server would take next.
        oldest_held: the oldest sequence that the stream could send again.
    """

    def __init__(self, *, expected: int, oldest_held: int) -> None:
        super().__init__(
            f"the server fell back to before sequence {expected}, the oldest batch still held here is {oldest_held}: "
            f"{oldest_held - expected} batches are lost; send again from the source or open a new stream to go on "
            "without them, and give the stream a larger resend buffer or the learner more frequent checkpoints"
        )
        self.expected = expected
        self.oldest_held = oldest_held

    @property
    def count(self) -> int:
        """Batches that are lost."""
        return self.oldest_held - self.expected


class LearnerReplaced(FailedPrecondition):
    """The learner was deleted and created anew while the stream was open."""


class LearnerQuarantined(FailedPrecondition):
    """A batch could not be learnt, such as one that made the loss infinite. The learner predicts with its state before
    that batch; what was accepted behind it waits until the learner is resumed."""

    @property
    def learner(self) -> str:
        """The learner's id."""
        return self.metadata.get("learner", "")

    @property
    def journal_position(self) -> int:
        """Where the batch is in the learner's journal; 0 if the server did not say."""
        return int(self.metadata.get("journal_position", 0))

    @property
    def producer(self) -> str:
        """Whose batch it is."""
        return self.metadata.get("producer", "")

    @property
    def sequence(self) -> int:
        """Which of the producer's batches; 0 if the server did not say."""
        return int(self.metadata.get("sequence", 0))


class Aborted(CbpClientError):
    """Somebody else got in between; read again before trying again."""


class EtagMismatch(Aborted):
    """The learner changed since it was read."""


class Fenced(Aborted):
    """A newer stream of the same producer has taken over; this one is at its end."""


class ResourceExhausted(CbpClientError):
    """A limit of the server is reached."""


class Unavailable(CbpClientError):
    """No server can be reached, or it cannot serve now."""


class DeadlineExceeded(CbpClientError):
    """The answer did not come in time; the server may have done what was asked nevertheless."""


class Unimplemented(CbpClientError):
    """The server does not know the call, since it is older or no cbp server; or it cannot export such a network in the
    wanted format."""


class ServerError(CbpClientError):
    """The server failed."""


class StreamClosed(CbpClientError):
    """The stream is closed."""


class ClientUnusable(CbpClientError, RuntimeError):
    """The client can't be used here, whatever the server says.

    `reason` is CLIENT_CLOSED; CLIENT_FORKED in a process that was forked after a client had been used; CLIENT_LOOP on
    another event loop than the client's; or CLIENT_CALLBACK in a callback that runs on the client's own thread.
    """


_BY_CODE: dict[grpc.StatusCode, type[CbpClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the server: the client's own cancellation is CancelledError
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}
_BY_REASON: dict[str, type[CbpClientError]] = {
    "ETAG_MISMATCH": EtagMismatch,
    "LEARNER_QUARANTINED": LearnerQuarantined,
    "LEARNER_REPLACED": LearnerReplaced,
    "MESSAGE_TOO_LARGE": MessageTooLarge,
    "PRODUCER_FENCED": Fenced,
    "SEQUENCE_GAP": SequenceGap,
}

# How gRPC words, under the status INTERNAL or UNKNOWN, a connection that a proxy or the operating system cut, and a
# call that ended while a message was being written to it: grpc.aio then loses the status that the server ended it with.
_CONNECTION_LOST = ("RST_STREAM", "Stream removed", "Connection reset", "Socket closed", "Internal error from Core")

# How gRPC words, under the status RESOURCE_EXHAUSTED, a message beyond a limit of the side that is named.
_TOO_LARGE = {
    "CLIENT: Received message larger than max": "the answer",
    "SERVER: Sent message larger than max": "the answer",
    "CLIENT: Sent message larger than max": "the request",
    "SERVER: Received message larger than max": "the request",
}


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> CbpClientError:
    """The error of this package that says what `rpc_error` and its google.rpc details say."""
    reason, metadata = "", dict[str, str]()
    violations: list[FieldViolation] = []
    retry_after = None
    for detail in _details(rpc_error):
        match detail:
            case error_details_pb2.ErrorInfo() if detail.domain == ERROR_DOMAIN:
                reason, metadata = detail.reason, dict(detail.metadata)
            case error_details_pb2.BadRequest():
                violations += [FieldViolation(item.field, item.description) for item in detail.field_violations]
            case error_details_pb2.RetryInfo():
                retry_after = detail.retry_delay.ToTimedelta().total_seconds()
    message = rpc_error.details() or rpc_error.code().name.lower().replace("_", " ")
    if not reason and (what := next((what for sign, what in _TOO_LARGE.items() if sign in message), None)):
        return MessageTooLarge(f"{what} is too large for one message, give fewer examples in one call: {message}")
    error_type = _BY_REASON.get(reason) or _BY_CODE[rpc_error.code()]
    if not reason and error_type is ServerError and any(sign in message for sign in _CONNECTION_LOST):
        error_type = Unavailable
    return error_type(message, reason=reason, violations=violations, metadata=metadata, retry_after=retry_after)


def error_from_plain(plain_error: PlainError) -> InvalidArgument:
    """The error for a spec that does not fit its message."""
    violation = FieldViolation(plain_error.field, plain_error.description)
    return InvalidArgument(f"{violation.field}: {violation.description}", reason="INVALID_SPEC", violations=[violation])


def rejected_batch(rejection: training_service_pb2.Rejection, *, number: int, task: str) -> RejectedBatch:
    """What `rejection` says of the batch that `send` gave `number`."""
    violations = tuple(FieldViolation(item.field, item.description) for item in rejection.field_violations)
    return RejectedBatch(number, task, rejection.message, rejection.reason, violations)


def _details(rpc_error: grpc.aio.AioRpcError) -> list[object]:
    try:
        status = rpc_status.from_call(rpc_error)  # type: ignore[arg-type]  # has all that from_call reads
    except ValueError:  # details that contradict the status: not written by a cbp server
        return []
    details: list[object] = []
    for packed in status.details if status is not None else ():
        for detail_type in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(detail_type.DESCRIPTOR):
                detail = detail_type()
                packed.Unpack(detail)
                details.append(detail)
    return details
