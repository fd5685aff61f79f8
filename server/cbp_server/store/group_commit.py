"""Group commit: all entries that wait go to disk in one transaction, so one fsync serves them all."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

import structlog
from sqlalchemy.exc import DataError, IntegrityError

from cbp_server.errors import JournalUnavailable
from cbp_server.records.learners import Durability, JournalStatus
from cbp_server.store.journal import Entry

#: Bounds of one transaction; more entries wait for the next one.
_MOST_ENTRIES = 512
_MOST_BYTES = 32 * 2**20

#: After these nobody knows what is on disk, and asking again would hide it: the kernel reports a failed fsync once.
_FSYNC_ERRORS = {"SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC"}

log = structlog.get_logger("cbp_server.store")


@dataclass(frozen=True, slots=True)
class _Waiting:
    entry: Entry
    durability: Durability
    written: "asyncio.Future[None]"


@dataclass(frozen=True, slots=True)
class _Mend:
    learner_uid: str
    mended: "asyncio.Future[None]"


class CommitObserver(Protocol):
    """Counts transactions, for the metrics; called on the thread that writes."""

    def journal_written(self, seconds: float, entries: int, size_bytes: int) -> None: ...
    def journal_failed(self) -> None: ...


#: What went wrong by learner.
_Failures = dict[str, JournalUnavailable]
#: What the thread has dealt with, in order, and how it went.
_Outcome: TypeAlias = "Sequence[tuple[asyncio.Future[None], JournalUnavailable | None]]"


class GroupCommit:
    """Appends entries on a thread of its own, in the order in which they were given.

    A failed write may have reached the disk nevertheless (a connection lost during the commit), so every further entry
    of its learners fails until `mend`; the caller then reads where the journal ends before it goes on.

    Args:
        append: writes entries in one transaction, which is on disk when it returns if the second argument says so.
        on_fatal: called on that thread with the reason when an fsync has failed. It ends the process; should it return,
            nothing is written any more.
        observer: told of every transaction.
    """

    def __init__(
        self,
        append: Callable[[Sequence[Entry], bool], None],
        on_fatal: Callable[[str], None],
        observer: CommitObserver | None = None,
    ) -> None:
        self._append = append
        self._on_fatal = on_fatal
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Waiting | _Mend | None] = SimpleQueue()
        self._closed = False
        self._unsettled = 0  # given to the thread, and not completed yet
        # The thread's own:
        self._failed: set[str] = set()  # learners to be mended; read by others while the thread has nothing to do
        self._fatal: str | None = None
        self._status = JournalStatus(up=True, since=datetime.now(UTC))  # replaced, not changed: others read it
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def add(self, entry: Entry, durability: Durability = Durability.FSYNC) -> "asyncio.Future[None]":
        """Completes when the entry is as durable as asked for; with `NONE` it is not written, and only takes its turn.

        Futures complete in the order of the calls. They fail with `JournalUnavailable`.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        if self._closed:
            written.set_exception(JournalUnavailable("the server is shutting down"))
        elif durability is Durability.NONE and self.passes(entry.learner_uid):
            written.set_result(None)
        else:
            self._hand_over(_Waiting(entry, durability, written))
        return written

    def passes(self, learner_uid: str) -> bool:
        """Whether it is the turn at once of an entry that is not written: the thread has nothing to do."""
        return not (self._closed or self._unsettled or learner_uid in self._failed)

    @property
    def status(self) -> JournalStatus:
        """As the last write has left it."""
        return self._status

    def mend(self, learner_uid: str) -> "asyncio.Future[None]":
        """Takes entries of a learner again; completes when everything that was given before has been dealt with."""
        mended: asyncio.Future[None] = self._loop.create_future()
        if self._closed:
            mended.set_result(None)
        else:
            self._hand_over(_Mend(learner_uid, mended))
        return mended

    async def close(self) -> None:
        """Writes what waits, then ends the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _hand_over(self, item: _Waiting | _Mend) -> None:
        self._unsettled += 1
        self._queue.put(item)

    def _settle(self, outcome: "_Outcome") -> None:
        self._unsettled -= len(outcome)
        for future, error in outcome:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    # -- on the thread --

    def _run(self) -> None:
        while True:
            group, behind = self._next_group()
            if group:
                self._loop.call_soon_threadsafe(self._settle, self._commit(group))
            if isinstance(behind, _Mend):
                self._failed.discard(behind.learner_uid)
                self._loop.call_soon_threadsafe(self._settle, [(behind.mended, None)])
            elif not group:
                return

    def _next_group(self) -> tuple[list[_Waiting], _Mend | None]:
        """What waits now, waiting for the first, up to a mending; nothing of either at the end."""
        item = self._queue.get()
        group: list[_Waiting] = []
        size = 0
        while isinstance(item, _Waiting):
            group.append(item)
            size += len(item.entry.payload)
            if len(group) == _MOST_ENTRIES or size >= _MOST_BYTES:
                return group, None
            try:
                item = self._queue.get_nowait()
            except Empty:
                return group, None
        if item is None and group:
            self._queue.put(None)  # the end, once more
        return group, item

    def _commit(self, group: Sequence[_Waiting]) -> "_Outcome":
        """Writes what can be written; says how it went with each, in order."""
        accepted = [
            waiting
            for waiting in group
            if waiting.durability is not Durability.NONE and waiting.entry.learner_uid not in self._failed
        ]
        sync = any(waiting.durability is Durability.FSYNC for waiting in accepted)
        failures = self._write([waiting.entry for waiting in accepted], sync)
        written = set(map(id, accepted))
        outcome: list[tuple[asyncio.Future[None], JournalUnavailable | None]] = []
        for waiting in group:
            uid, error = waiting.entry.learner_uid, None
            if id(waiting) in written:
                error = failures.get(uid)
            elif uid in self._failed:
                error = JournalUnavailable("an entry before it could not be written")
            if error is not None:
                self._failed.add(uid)
            outcome.append((waiting.written, error))
        return outcome

    def _write(self, entries: Sequence[Entry], sync: bool) -> _Failures:
        if not entries:
            return {}
        by_learner: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            by_learner[entry.learner_uid].append(entry)
        if self._fatal is not None:
            return dict.fromkeys(by_learner, JournalUnavailable(self._fatal))
        started = time.monotonic()
        try:
            self._append(entries, sync)
        except (IntegrityError, DataError) as error:
            # One learner's entry is refused, and nothing was written. The others shall not suffer for it.
            if len(by_learner) > 1:
                failures: _Failures = {}
                for own in by_learner.values():
                    failures |= self._write(own, sync)
                return failures
            reason = _reason(error)
            log.error("journal entry refused", learner_uid=entries[0].learner_uid, error=reason)
            self._note_failure()
            return dict.fromkeys(by_learner, JournalUnavailable(reason))
        except Exception as error:  # whatever it is, whoever waits must hear of it
            return dict.fromkeys(by_learner, self._unavailable(error))
        if self._observer is not None:
            size_bytes = sum(len(entry.payload) for entry in entries)
            self._observer.journal_written(time.monotonic() - started, len(entries), size_bytes)
        if not self._status.up:
            now = datetime.now(UTC)
            log.info("journal is written again", seconds=round((now - self._status.since).total_seconds(), 3))
            self._status = JournalStatus(up=True, since=now)
        return {}

    def end_if_fsync_failed(self, error: Exception) -> None:
        """For every transaction's failure: an fsync that fails may have dropped what another transaction wrote."""
        if getattr(getattr(error, "orig", None), "sqlite_errorname", "") in _FSYNC_ERRORS:
            self._fatal = _reason(error)
            self._on_fatal(self._fatal)

    def _unavailable(self, error: Exception) -> JournalUnavailable:
        self.end_if_fsync_failed(error)
        reason = _reason(error)
        self._note_failure()
        if self._status.up:
            self._status = JournalStatus(up=False, since=datetime.now(UTC), reason=reason)
            log.error("journal not written; nothing is acknowledged until it can be", error=reason)
        return JournalUnavailable(reason)

    def _note_failure(self) -> None:
        if self._observer is not None:
            self._observer.journal_failed()


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip()
