"""Every status becomes the error that its name promises, with all that the server explains."""

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from cbp_client import (
    Aborted,
    AlreadyExists,
    AsyncClient,
    CbpClientError,
    DeadlineExceeded,
    EtagMismatch,
    FailedPrecondition,
    Fenced,
    FieldViolation,
    InvalidArgument,
    LearnerQuarantined,
    LearnerReplaced,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SequenceGap,
    ServerError,
    Unavailable,
    Unimplemented,
)
from cbp_client.errors import error_from_rpc
from tests.client.scripted_server import ScriptedServer, error


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_its_error(code: grpc.StatusCode) -> None:
    rpc_error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "what is wrong")

    assert type(error_from_rpc(rpc_error)) is not CbpClientError
    assert str(error_from_rpc(rpc_error)) == "what is wrong"


@pytest.mark.parametrize(
    ("sign", "what"),
    [
        ("CLIENT: Received", "the answer"),
        ("SERVER: Sent", "the answer"),
        ("SERVER: Received", "the request"),
        ("CLIENT: Sent", "the request"),
    ],
)
def test_a_message_beyond_a_limit_is_said_with_the_way_out(sign: str, what: str) -> None:
    details = f"{sign} message larger than max (80000006 vs. 67108864)"
    code, nothing = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata()
    found = error_from_rpc(grpc.aio.AioRpcError(code, nothing, nothing, details))

    assert type(found) is MessageTooLarge
    assert str(found) == f"{what} is too large for one message, give fewer examples in one call: {details}"


async def test_a_request_beyond_the_limit_is_too_large(scripted: ScriptedServer) -> None:
    async with AsyncClient(scripted.target) as client:
        learner = await client.get_learner("clicks")
        with pytest.raises(MessageTooLarge, match="the request is too large for one message, give fewer examples"):
            await learner.predict(np.zeros((65, 1024, 1024), np.bool_))


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.NOT_FOUND, "LEARNER_NOT_FOUND", NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, "LEARNER_EXISTS", AlreadyExists),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC", InvalidArgument),
        (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", InvalidArgument),
        (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", MessageTooLarge),
        (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", EtagMismatch),
        (grpc.StatusCode.ABORTED, "PRODUCER_FENCED", Fenced),
        (grpc.StatusCode.ABORTED, "", Aborted),
        (grpc.StatusCode.FAILED_PRECONDITION, "SEQUENCE_GAP", SequenceGap),
        (grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_QUARANTINED", LearnerQuarantined),
        (grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_REPLACED", LearnerReplaced),
        (grpc.StatusCode.FAILED_PRECONDITION, "", FailedPrecondition),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", ResourceExhausted),
        (grpc.StatusCode.UNAUTHENTICATED, "", PermissionDenied),
        (grpc.StatusCode.UNIMPLEMENTED, "", Unimplemented),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, "INTERNAL", ServerError),
    ],
)
async def test_reasons_choose_the_most_specific_error(
    scripted: ScriptedServer, code: grpc.StatusCode, reason: str, expected: type[CbpClientError]
) -> None:
    scripted.unary_errors = [error(code, reason, message="the server's words", metadata={"expected_sequence": "7"})]
    async with AsyncClient(scripted.target) as client:
        with pytest.raises(CbpClientError, match=r"^the server's words$") as caught:
            await client.get_learner("clicks")

    assert type(caught.value) is expected
    assert caught.value.reason == reason
    if isinstance(caught.value, SequenceGap):
        assert caught.value.expected_sequence == 7


async def test_violations_and_retry_advice_come_along(scripted: ScriptedServer) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="spec.optimizer.lr", description="must be positive")
    scripted.unary_errors = [
        error(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_SPEC",
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)),
            message="the spec is wrong",
        )
    ]
    async with AsyncClient(scripted.target) as client:
        with pytest.raises(InvalidArgument) as caught:
            await client.get_learner("clicks")

    assert caught.value.violations == (FieldViolation("spec.optimizer.lr", "must be positive"),)
    assert caught.value.retry_after == 2.0
    assert str(caught.value) == "the spec is wrong; spec.optimizer.lr: must be positive"


async def test_idempotent_calls_are_made_again(scripted: ScriptedServer) -> None:
    scripted.unary_errors = [error(grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE") for _ in range(2)]
    async with AsyncClient(scripted.target) as client:
        await client.get_learner("clicks")

    assert len(scripted.requests) == 3


async def test_creation_is_repeated_under_one_request_id(scripted: ScriptedServer) -> None:
    scripted.unary_errors = [error(grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")]
    async with AsyncClient(scripted.target) as client:
        await client.create_learner("clicks", network={"kind": "mlp"})

    first, second = scripted.requests
    assert first == second
    assert first.request_id


async def test_deletion_is_not_repeated(scripted: ScriptedServer) -> None:
    scripted.unary_errors = [error(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")]
    async with AsyncClient(scripted.target) as client:
        with pytest.raises(Unavailable):
            await client.delete_learner("clicks")

    assert len(scripted.requests) == 1


async def test_a_server_that_is_not_there_is_named(scripted: ScriptedServer) -> None:
    await scripted.stop()
    async with AsyncClient(scripted.target) as client:
        with pytest.raises(Unavailable, match=f"no server answers at {scripted.target}"):
            await client.get_learner("clicks")
        with pytest.raises(Unavailable, match=r"not ready after 0\.2 s"):
            await client.wait_until_ready(0.2)
        await scripted.start()
        await client.wait_until_ready(10)


async def test_a_call_has_a_deadline(scripted: ScriptedServer) -> None:
    scripted.answering.clear()
    async with AsyncClient(scripted.target, timeout=0.05) as client:
        with pytest.raises(DeadlineExceeded):
            await client.get_learner("clicks")
