"""Errors as gRPC says them: a status with `google.rpc` details."""

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cbp import FieldViolation
from cbp_server.errors import describe

DOMAIN = "cbp.v1"


def rich_status(error: BaseException) -> grpc.Status:
    """The status that ends a call which failed with `error`."""
    description = describe(error)
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
