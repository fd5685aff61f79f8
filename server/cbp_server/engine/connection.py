"""The front's end of the socket to an engine process."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from cbp_server.engine.frames import FrameReader, encode_frame

#: What the kernel may hold on its way to the engine, so that a message of examples goes in one piece.
_KERNEL_BYTES = 2 * 2**20
#: Bounds of what is sent at a time: small frames go together, and urgent ones wait for no more than this.
_SENT_BYTES = 256 * 1024
_SENT_PARTS = 256
#: Messages of one frame.
_MOST_TOGETHER = 32


class EngineConnection:
    """Sends messages in frames and receives them, on the event loop that it was made on.

    Each frame is a list of messages: one of several costs both ends less than several of one.

    Args:
        connection: owned by this object from now on.
        on_message: called with each message that arrives. What it raises closes the connection.
    """

    def __init__(self, connection: socket.socket, on_message: Callable[[object], None]) -> None:
        self._socket = connection
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._urgent: deque[tuple[object, int]] = deque()  # messages and their bytes
        self._waiting: deque[tuple[object, int]] = deque()
        self._parts: deque[memoryview] = deque()  # being sent
        self._send_due = False
        self._blocked = False  # the kernel takes no more for now
        self._closed: asyncio.Future[None] = self._loop.create_future()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_BYTES)
        self._loop.add_reader(connection, self._receive)

    def send(self, message: object, size_bytes: int = 0, *, urgent: bool = False) -> None:
        """Sends the message behind all others, or before those whose sending has not begun.

        Nothing in it may change any more. Lost if the other end has gone, as `wait_closed` then says.

        Args:
            size_bytes: of the arrays in it, about.
        """
        (self._urgent if urgent else self._waiting).append((message, size_bytes))
        if not (self._send_due or self._blocked):
            self._send_due = True
            self._loop.call_soon(self._send)  # together with what else is sent in this turn of the loop

    def close(self) -> None:
        """Closes the connection; what has not been sent is dropped."""
        self._end(None)

    async def wait_closed(self) -> None:
        """Returns when either end has closed; raises what `on_message` or decoding a message raised."""
        await asyncio.shield(self._closed)

    def _send(self) -> None:
        self._send_due = False
        if self._closed.done():
            return
        self._gather()
        try:
            self._drop_sent(self._socket.sendmsg(islice(self._parts, _SENT_PARTS)))
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone; what it said before is received first
            self._discard()
        left = bool(self._parts or self._urgent or self._waiting)
        if left and not self._blocked:
            self._loop.add_writer(self._socket, self._send)
        elif self._blocked and not left:
            self._loop.remove_writer(self._socket)
        self._blocked = left

    def _gather(self) -> None:
        size = sum(map(len, self._parts))
        while size < _SENT_BYTES and (queue := self._urgent or self._waiting):
            together: list[object] = []
            carried = 0
            while queue and size + carried < _SENT_BYTES and len(together) < _MOST_TOGETHER:
                message, size_bytes = queue.popleft()
                together.append(message)
                carried += size_bytes
            parts = encode_frame(together)
            self._parts.extend(parts)
            size += sum(map(len, parts))

    def _drop_sent(self, count: int) -> None:
        while count:
            part = self._parts.popleft()
            if len(part) > count:
                self._parts.appendleft(part[count:])
                return
            count -= len(part)

    def _receive(self) -> None:
        try:
            count = self._socket.recv_into(self._reader.space())
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._end(None)
            return
        try:
            for messages in self._reader.received(count):
                for message in messages:
                    self._on_message(message)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._closed.done():
            return
        self._discard()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if error is None:
            self._closed.set_result(None)
        else:
            self._closed.set_exception(error)

    def _discard(self) -> None:
        for queue in (self._urgent, self._waiting, self._parts):
            queue.clear()
