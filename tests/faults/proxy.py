"""A network that fails: a TCP proxy on loopback that can cut, refuse and slow down what goes through it."""

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK = 16 * 1024
_NO_LINGER = struct.pack("ii", 1, 0)  # closing then resets the connection, as a vanished peer does


class Proxy:
    """Passes connections on to `upstream`, host:port, which may come and go.

    Attributes:
        target: host:port to connect to; stays the same.
        delay: seconds that every chunk waits, in both directions.
        bytes_per_second: bound for each direction of each connection; None is none.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address: tuple[str, int] = self._listener.getsockname()
        self.target = f"{self._address[0]}:{self._address[1]}"
        self.delay = 0.0
        self.bytes_per_second: float | None = None
        self._cut_after: int | None = None
        self._connections: set[socket.socket] = set()
        self._changing = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._accept(self._listener)

    def cut(self) -> None:
        """Resets every connection."""
        with self._changing:
            cut, self._connections = self._connections, set()
        for connection in cut:
            _reset(connection)

    def cut_after(self, passed: int) -> None:
        """Resets every connection once that many more bytes have passed, most likely within a message."""
        with self._changing:
            self._cut_after = passed

    def refuse(self) -> None:
        """Resets every connection, and refuses new ones until `accept`."""
        _reset(self._listener)
        self.cut()

    def accept(self) -> None:
        """Takes connections again after `refuse`."""
        if self._listener.fileno() == -1:
            self._listener = socket.create_server(self._address)
            self._accept(self._listener)

    def calm(self) -> None:
        """A network without faults again."""
        self.delay, self.bytes_per_second = 0.0, None
        with self._changing:
            self._cut_after = None
        self.accept()

    def close(self) -> None:
        self.refuse()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        self._start(self._serve, listener)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # refusing, or closed
            try:
                server = socket.create_connection(self._upstream, timeout=1)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._changing:
                self._connections |= {client, server}
                self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._start(self._relay, client, server)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        with self._changing:
            self._threads.append(thread)
        thread.start()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        """Passes bytes on in both directions until both ends are closed."""
        back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
        back.start()
        self._pump(client, server)
        back.join()
        with self._changing:
            self._connections -= {client, server}
        client.close()
        server.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        """Passes bytes on until either end is closed."""
        try:
            while data := source.recv(_CHUNK):
                if self.delay:
                    time.sleep(self.delay)
                if self.bytes_per_second is not None:
                    time.sleep(len(data) / self.bytes_per_second)
                passing = self._passing(len(data))
                target.sendall(data[:passing])
                if passing < len(data):
                    self.cut()
                    return
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(source)
            _reset(target)

    def _passing(self, length: int) -> int:
        """How many of the next bytes pass before the connections are cut."""
        with self._changing:
            if self._cut_after is None:
                return length
            passing = min(length, self._cut_after)
            self._cut_after = self._cut_after - passing if passing == length else None
            return passing


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        connection.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
    connection.close()
