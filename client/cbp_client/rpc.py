"""One channel to a server: deadlines, retries, and errors in this package's words."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import grpc

from cbp_client import arguments, forks
from cbp_client.errors import CbpClientError, ClientUnusable, Unavailable, error_from_rpc
from cbp_client.target import address, is_loopback, proxy_hint
from cbp_proto import MAX_MESSAGE_BYTES
from cbp_proto.v1 import learner_service_pb2_grpc, training_service_pb2, training_service_pb2_grpc
from cbp_proto.v1.training_service_pb2 import TrainResponse

_ATTEMPTS = 4
_LEAST_TIMEOUT = 0.001  # gRPC takes 0 for no deadline at all
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What may be asked for is the server's to say; an answer that it made is taken.
    ("grpc.max_receive_message_length", -1),
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


class _Channel:
    """A channel and its stubs, on the event loop that it was made on."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.loop = asyncio.get_running_loop()
        options = [*_OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(address)))]
        if credentials is None:
            self.grpc = grpc.aio.insecure_channel(address, options=options)
        else:
            self.grpc = grpc.aio.secure_channel(address, credentials, options=options)
        self.learners = learner_service_pb2_grpc.LearnerServiceStub(self.grpc)
        self.training = training_service_pb2_grpc.TrainingServiceStub(self.grpc)
        self.train: grpc.aio.StreamStreamMultiCallable[bytes, TrainResponse] = self.grpc.stream_stream(
            _TRAIN, response_deserializer=TrainResponse.FromString
        )


class Connection:
    """A channel to one server, opened by its first use, so that a client may be made before there is an event loop and
    before a fork. To be used on one event loop at a time.

    Args:
        target: as `address` takes it.
        timeout: seconds for a call; None for no limit.
        credentials: for a server behind TLS.

    Raises:
        InvalidArgument: one of them is something else.
        ClientUnusable: the process was forked after a client had been used.
    """

    def __init__(self, target: str, *, timeout: float | None, credentials: grpc.ChannelCredentials | None) -> None:
        forks.check()
        self.target = address(target)
        self.timeout = arguments.seconds("timeout", timeout, none="for no limit")
        self.streams: WeakSet[Abortable] = WeakSet()
        self._credentials = arguments.channel_credentials("credentials", credentials)
        self._channel: _Channel | None = None
        self._closed = False

    @property
    def learners(self) -> "learner_service_pb2_grpc.LearnerServiceAsyncStub":
        """The stub of LearnerService."""
        return self._opened().learners

    @property
    def training(self) -> "training_service_pb2_grpc.TrainingServiceAsyncStub":
        """The stub of TrainingService."""
        return self._opened().training

    @property
    def train(self) -> grpc.aio.StreamStreamMultiCallable[bytes, TrainResponse]:
        """TrainingService.Train with requests that are serialised already."""
        return self._opened().train

    def _opened(self) -> _Channel:
        forks.note_use()
        if self._closed:
            raise ClientUnusable("the client is closed; make a new one", reason="CLIENT_CLOSED")
        loop = asyncio.get_running_loop()
        channel = self._channel
        if channel is None or channel.loop.is_closed():
            channel = self._channel = _Channel(self.target, self._credentials)
        if channel.loop is not loop:
            raise ClientUnusable(
                "the client is in use on another event loop; make one for each loop, or use the synchronous Client, "
                "which serves all threads",
                reason="CLIENT_LOOP",
            )
        return channel

    async def close(self) -> None:
        """Abort the streams and close the channel; calls under way are cancelled. In a forked process nothing happens:
        the connection is that of the process before."""
        if forks.forked() or self._closed:
            return
        self._closed = True
        for stream in list(self.streams):
            await stream.abort()
        if self._channel is not None and not self._channel.loop.is_closed():
            await self._channel.grpc.close()

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
        timeout = self.timeout if timeout is None else timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        delays = backoff()
        for attempts_left in reversed(range(_ATTEMPTS if retry else 1)):
            try:
                with self.translated_errors():
                    return await method(request, timeout=_until(deadline))
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
            place = f"{self.target}{proxy_hint(self.target)}"
            return Unavailable(f"no server answers at {place}: {error.message}", retry_after=error.retry_after)
        return error


def _until(deadline: float) -> float | None:
    return None if deadline == math.inf else max(_LEAST_TIMEOUT, deadline - time.monotonic())
