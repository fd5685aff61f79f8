"""The engine process: `python -m cbp_server.engine FD`, where FD is this end of the front's socket pair.

Four threads: one reads requests into the inbox, the main one carries them out, one writes checkpoints, and one tests
trainability on copies. The process ends when the front closes its end of the socket, so it never outlives the front.
"""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import cast

import torch

from cbp_server.engine import messages
from cbp_server.engine.frames import encode_frame, receive_frame
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.worker import EngineWorker
from cbp_server.process.logs import configure_logging
from cbp_server.process.memory import keep_freed_memory, shorten_collections


def _received(connection: socket.socket) -> Iterator[list[object]]:
    """The messages that the front sends, by frame, until it is gone, in whichever way: ended, killed, or cut off within
    one."""
    with contextlib.suppress(OSError):
        while (received := receive_frame(connection)) is not None:
            yield received


def _read_calls(received: Iterator[list[object]], inbox: Inbox) -> None:
    """Fills the inbox until the front is gone."""
    try:
        for calls in received:
            inbox.put(*cast(list[messages.Call], calls))
    finally:
        inbox.close()  # whatever happens here, the process must not live on without its front


def main() -> None:
    """Entry point."""
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Carries out the front's requests until it closes the connection."""

    def send(message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to tell
            for part in encode_frame([message]):
                connection.sendall(part)

    # A supervisor may signal the whole group; this process ends when the front has saved everything and closes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    received = _received(connection)
    options = next(received, [None])[0]
    if not isinstance(options, messages.EngineOptions):  # the front has gone already
        return
    configure_logging(options.log_level, options.log_format)
    torch.set_num_threads(options.threads)
    inbox = Inbox(options.group_wait)
    worker = EngineWorker(options, inbox, send)
    shorten_collections()
    send(worker.ready)
    threading.Thread(target=_read_calls, args=(received, inbox), name="reader", daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
