"""Errors as gRPC says them: a status with `google.rpc` details, short enough to arrive.

A status travels in the trailers. Trailers over 8 KiB may be dropped by clients and proxies, which then report a
RESOURCE_EXHAUSTED of their own: the caller would learn nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cbp import FieldViolation
from cbp_server.errors import Description, describe

DOMAIN = "cbp.v1"

# In bytes of UTF-8. The message is sent twice, once with every byte beyond ASCII as three; the rest once, in base64.
_LONGEST_MESSAGE = 600
_LONGEST_FIELD = 100
_LONGEST_DESCRIPTION = 300
_MOST_VIOLATIONS = 20
_ALL_VIOLATIONS = 2400
_LONGEST_METADATA = 400


def brief_description(error: BaseException) -> Description:
    """What to tell a caller about `error`, clipped to what fits into a status."""
    description = describe(error)
    return replace(
        description,
        message=_clipped(description.message, _LONGEST_MESSAGE),
        violations=tuple(_brief_violations(description.violations)),
        metadata={key: _clipped(value, _LONGEST_METADATA) for key, value in description.metadata.items()},
    )


def _brief_violations(violations: Sequence[FieldViolation]) -> Iterator[FieldViolation]:
    room = _ALL_VIOLATIONS
    for index, violation in enumerate(violations):
        brief = FieldViolation(
            _clipped(violation.field, _LONGEST_FIELD), _clipped(violation.description, _LONGEST_DESCRIPTION)
        )
        room -= len(brief.field.encode()) + len(brief.description.encode())
        if index == _MOST_VIOLATIONS or room < 0:
            yield FieldViolation("…", f"and {len(violations) - index} more")
            return
        yield brief


def _clipped(text: str, longest: int) -> str:
    """`text` in at most `longest` bytes of UTF-8."""
    if len(text) <= longest and len(data := text.encode(errors="replace")) <= longest:
        return data.decode()
    ellipsis = "…".encode()
    return text[:longest].encode(errors="replace")[: longest - len(ellipsis)].decode(errors="ignore") + "…"


def rich_status(error: BaseException) -> grpc.Status:
    """The status that ends a call which failed with `error`."""
    description = brief_description(error)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=description.reason, domain=DOMAIN, metadata=dict(description.metadata))
    ]
    if description.violations:
        details.append(_bad_request(description.violations))
    if description.retry_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(description.retry_seconds * 1e9))
        details.append(retry)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(description.code.name),
        message=description.message,
        details=[_packed(detail) for detail in details],
    )
    return rpc_status.to_status(status)


def _bad_request(violations: Sequence[FieldViolation]) -> Message:
    request: Message = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in violations
        ]
    )
    return request


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
