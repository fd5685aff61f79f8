"""Around every call: errors become rich statuses, and each call is counted, timed and, if it failed on us, logged.

Requests are decoded here, too: bytes that are no message of the method are an error like any other.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from cbp_server.errors import MalformedRequest, describe
from cbp_server.rpc.errors import rich_status

log = structlog.get_logger("cbp_server.rpc")

if TYPE_CHECKING:  # generic in the type stubs only
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class RpcObserver(Protocol):
    """Counts calls, for the metrics."""

    def observe(self, method: str, code: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class _Malformed:
    """Takes the place of a request that could not be decoded, up to where its error can be told."""

    message_name: str


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The one place where a call's failure meets the wire."""

    def __init__(self, observer: RpcObserver) -> None:
        self._observer = observer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method; grpc answers UNIMPLEMENTED
            return handler
        method = str(handler_call_details.method).lstrip("/")
        coding = {
            "request_deserializer": _decoding(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._around_unary(method, handler.unary_unary), **coding)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._around_unary(method, handler.stream_unary), **coding)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._around_stream(method, handler.unary_stream), **coding)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._around_stream(method, handler.stream_stream), **coding)
        return handler

    def _around_unary(self, method: str, behaviour: Any) -> Any:
        async def unary(request: Any, context: "Context") -> Any:
            async with self._call(method, context):
                return await behaviour(_requests(request), context)

        return unary

    def _around_stream(self, method: str, behaviour: Any) -> Any:
        async def stream(request: Any, context: "Context") -> AsyncIterator[Any]:
            async with self._call(method, context):
                responses = behaviour(_requests(request), context)
                if not hasattr(responses, "__aiter__"):  # reads and writes through the context, as health does
                    await responses
                    return
                async for response in responses:
                    yield response

        return stream

    @asynccontextmanager
    async def _call(self, method: str, context: "Context") -> AsyncIterator[None]:
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = grpc.StatusCode(context.code()) if isinstance(context.code(), int) else context.code()
            raise
        except Exception as error:
            code = describe(error).code
            if code is grpc.StatusCode.INTERNAL:
                log.exception("call failed", method=method)
            await context.abort_with_status(rich_status(error))
        finally:
            self._observer.observe(method, code.name, time.perf_counter() - started)


def _decoding(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """`decode`, but what it fails at comes out as `_Malformed`: gRPC would end the call without saying why."""

    if decode is None:
        return None

    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            message_type = getattr(decode, "__self__", None)
            return _Malformed(message_type.DESCRIPTOR.full_name if message_type else "protobuf")

    return decode_or_mark


def _requests(request: Any) -> Any:
    """One request or a stream of them, decoded."""
    return _all_decoded(request) if hasattr(request, "__aiter__") else _decoded(request)


def _decoded(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise MalformedRequest(request.message_name)
    return request


async def _all_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)
