"""One channel to a server: deadlines, retries, and errors in this package's words."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import grpc

from cbp_client.errors import CbpClientError, Unavailable, error_from_rpc
from cbp_proto import MAX_MESSAGE_BYTES
from cbp_proto.v1 import learner_service_pb2_grpc, training_service_pb2, training_service_pb2_grpc
from cbp_proto.v1.training_service_pb2 import TrainResponse

_ATTEMPTS = 4
_LEAST_TIMEOUT = 0.001  # gRPC takes 0 for no deadline at all
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Notices a server that vanished without closing its connections; idle channels stay silent.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC's own pause between connection attempts grows to two minutes, in which every call would fail.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_SERVICE = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
_TRAIN = f"/{_SERVICE.full_name}/{_SERVICE.methods_by_name['Train'].name}"

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)


class UnaryMethod(Protocol[RequestT, ResponseT]):
    """A unary call of an asynchronous stub."""

    def __call__(self, request: RequestT, /, *, timeout: float | None = None) -> Any: ...


class Abortable(Protocol):
    """Something that uses the channel until it is told to stop."""

    async def abort(self) -> None: ...


def backoff(first: float = 0.1, most: float = 5.0) -> Iterator[float]:
    """Seconds to wait before each retry: doubling, with jitter so that clients of a restarted server spread out."""
    delay = first
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, most)


class Connection:
    """A channel and its stubs. To be made and used on one event loop."""

    def __init__(self, target: str, *, timeout: float, credentials: grpc.ChannelCredentials | None) -> None:
        self.target = target
        self.timeout = timeout
        self.streams: WeakSet[Abortable] = WeakSet()
        self._closed = False
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
        self.learners = learner_service_pb2_grpc.LearnerServiceStub(self._channel)
        self.training = training_service_pb2_grpc.TrainingServiceStub(self._channel)
        #: TrainingService.Train with requests that are serialised already.
        self.train: grpc.aio.StreamStreamMultiCallable[bytes, TrainResponse] = self._channel.stream_stream(
            _TRAIN, response_deserializer=TrainResponse.FromString
        )

    async def close(self) -> None:
        """Abort the streams and close the channel; calls under way are cancelled."""
        self._closed = True
        for stream in list(self.streams):
            await stream.abort()
        await self._channel.close()

    async def call(
        self, method: UnaryMethod[RequestT, Any], request: RequestT, *, retry: bool, timeout: float | None = None
    ) -> Any:
        """The answer to a unary call.

        Args:
            method: the stub's method.
            request: its argument.
            retry: whether the call may be made again when the server could not be reached.
            timeout: seconds for the call with all its retries; the connection's if None.
        """
        if self._closed:
            raise RuntimeError("the client is closed")
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        delays = backoff()
        for attempts_left in reversed(range(_ATTEMPTS if retry else 1)):
            try:
                with self.translated_errors():
                    return await method(request, timeout=max(_LEAST_TIMEOUT, deadline - time.monotonic()))
            except Unavailable as error:
                delay = max(next(delays), error.retry_after or 0.0)
                if not attempts_left or time.monotonic() + delay >= deadline:
                    raise
                await asyncio.sleep(delay)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def stream(self, responses: grpc.aio.UnaryStreamCall[Any, ResponseT]) -> AsyncGenerator[ResponseT]:
        """The messages of a server stream, which is cancelled when its reader stops."""
        try:
            with self.translated_errors():
                async for response in responses:
                    yield response
        finally:
            responses.cancel()

    @contextlib.contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise errors of this package for those of gRPC."""
        try:
            yield
        except grpc.aio.AioRpcError as rpc_error:
            raise self.translated(rpc_error) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also for a call that the server cancelled, as one that is stopping does.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"{self.target}: the server cancelled the call") from None

    def translated(self, rpc_error: grpc.aio.AioRpcError) -> CbpClientError:
        """The error of this package for one of gRPC."""
        error = error_from_rpc(rpc_error)
        if isinstance(error, Unavailable) and not error.reason:
            return Unavailable(f"no server answers at {self.target}: {error.message}", retry_after=error.retry_after)
        return error
