"""Group commit: all entries that wait go to disk in one transaction, so one fsync serves them all."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from cbp_server.store.journal import Entry

#: Bounds of one transaction; more entries wait for the next one.
_MOST_ENTRIES = 512
_MOST_BYTES = 32 * 2**20


class GroupCommit:
    """Appends entries on a thread of its own, in the order in which they were given.

    Args:
        append: writes entries in one transaction.
    """

    def __init__(self, append: Callable[[Sequence[Entry]], None]) -> None:
        self._append = append
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[tuple[Entry, asyncio.Future[None]] | None] = SimpleQueue()
        self._held: tuple[Entry, asyncio.Future[None]] | None = None
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> asyncio.Future[None]:
        """Completes when the entry is on disk, or fails with why it is not in the log. Futures complete in order."""
        written: asyncio.Future[None] = self._loop.create_future()
        self._waiting.put((entry, written))
        return written

    async def close(self) -> None:
        """Writes what waits, then ends the thread."""
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        ended = False
        while not ended:
            group, ended = self._next_group()
            if not group:
                continue
            error: Exception | None = None
            try:
                self._append([entry for entry, _ in group])
            except Exception as caught:
                error = caught
            self._loop.call_soon_threadsafe(_settle, [future for _, future in group], error)

    def _next_group(self) -> tuple[list[tuple[Entry, asyncio.Future[None]]], bool]:
        """What waits now, waiting for the first; and whether the end has come."""
        group: list[tuple[Entry, asyncio.Future[None]]] = []
        size = 0
        while not group or (not self._waiting.empty() and len(group) < _MOST_ENTRIES and size < _MOST_BYTES):
            item = self._waiting.get()
            if item is None:
                return group, True
            group.append(item)
            size += len(item[0].payload)
        return group, False


def _settle(futures: Sequence[asyncio.Future[None]], error: Exception | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
