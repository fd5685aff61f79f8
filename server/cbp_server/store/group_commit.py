"""Group commit: all entries that wait go to disk in one transaction, so one fsync serves them all."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import structlog
from sqlalchemy.exc import SQLAlchemyError

from cbp_server.errors import JournalUnavailable
from cbp_server.store.journal import Entry

#: Bounds of one transaction; more entries wait for the next one.
_MOST_ENTRIES = 512
_MOST_BYTES = 32 * 2**20

log = structlog.get_logger("cbp_server.store")

_Waiting = tuple[Entry, "asyncio.Future[None]"]
_Outcome = tuple["asyncio.Future[None]", JournalUnavailable | None]


class GroupCommit:
    """Appends entries on a thread of its own, in the order in which they were given.

    After a failure the entries of the same learner that were given behind the failed ones fail as well, since the log
    has no gaps: `add` goes on for a learner with the position that failed first.

    Args:
        append: writes entries in one transaction.
    """

    def __init__(self, append: Callable[[Sequence[Entry]], None]) -> None:
        self._append = append
        self._loop = asyncio.get_running_loop()
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._failed: dict[str, int] = {}  # by learner: the position that the log goes on with
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> "asyncio.Future[None]":
        """Completes when the entry is on disk, or fails with `JournalUnavailable`. Futures complete in order."""
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
            accepted: list[_Waiting] = []
            refused: list[_Waiting] = []
            for waiting in group:
                (accepted if self._continues(waiting[0]) else refused).append(waiting)
            error = self._write([entry for entry, _ in accepted])
            if error is not None:
                for entry, _ in accepted:
                    self._failed.setdefault(entry.learner_uid, entry.position)
            outcome: list[_Outcome] = [(future, error) for _, future in accepted]
            outcome += [
                (future, JournalUnavailable("an entry before it could not be written")) for _, future in refused
            ]
            self._loop.call_soon_threadsafe(_settle, outcome)

    def _write(self, entries: Sequence[Entry]) -> JournalUnavailable | None:
        if not entries:
            return None
        try:
            self._append(entries)
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error)
            log.error("journal not written", entries=len(entries), error=reason)
            return JournalUnavailable(reason)
        return None

    def _continues(self, entry: Entry) -> bool:
        expected = self._failed.get(entry.learner_uid)
        if expected is None:
            return True
        if entry.position != expected:
            return False
        del self._failed[entry.learner_uid]
        return True

    def _next_group(self) -> tuple[list[_Waiting], bool]:
        """What waits now, waiting for the first; and whether the end has come."""
        first = self._waiting.get()
        if first is None:
            return [], True
        group, size = [first], len(first[0].payload)
        while len(group) < _MOST_ENTRIES and size < _MOST_BYTES:
            try:
                item = self._waiting.get_nowait()
            except Empty:
                break
            if item is None:
                return group, True
            group.append(item)
            size += len(item[0].payload)
        return group, False


def _settle(outcome: Sequence[_Outcome]) -> None:
    for future, error in outcome:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
