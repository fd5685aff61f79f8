"""A bare grpc.aio server that acknowledges messages without looking at them: what the transport alone gives.

    python benchmarks/echo.py

Prints the port it listens on at 127.0.0.1 and serves until it is terminated.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import grpc

ACKNOWLEDGEMENT = b"sixteen bytes ok"
METHOD = "/benchmark.Echo/Echo"
MESSAGE_LIMIT = 64 * 2**20
OPTIONS = (("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.max_send_message_length", MESSAGE_LIMIT))


@contextmanager
def echo_server() -> Iterator[str]:
    """The target of an echo in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate()


class Echo:
    """A channel to an echo server."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._method = self._channel.stream_stream(METHOD)

    async def exchange(self, messages: Sequence[bytes], count: int) -> float:
        """Seconds until `count` messages, the given ones over and over, have been sent and acknowledged."""
        call = self._method()
        await call.wait_for_connection()
        started = time.perf_counter()
        sending = asyncio.create_task(self._send(call, islice(cycle(messages), count)))
        for _ in range(count):
            await call.read()
        seconds = time.perf_counter() - started
        await sending
        return seconds

    async def _send(self, call: Any, messages: Iterator[bytes]) -> None:
        for message in messages:
            await call.write(message)
        await call.done_writing()

    async def close(self) -> None:
        await self._channel.close()


async def acknowledge(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield ACKNOWLEDGEMENT


async def serve() -> None:
    server = grpc.aio.server(options=OPTIONS)
    _, service, name = METHOD.split("/")
    handlers = {name: grpc.stream_stream_rpc_method_handler(acknowledge)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
