"""Group commit: order, groups, what each durability costs, and what a failure does to whom."""

import asyncio
import sqlite3
import threading
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, OperationalError
from structlog.testing import capture_logs

from cbp_server.errors import JournalUnavailable
from cbp_server.records.learners import Durability
from cbp_server.store.database import open_database
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind, Journal


def batch(position: int, learner: str = "a") -> Entry:
    return Entry(
        learner_uid=learner,
        position=position,
        kind=EntryKind.BATCH,
        payload=b"xyz",
        payload_hash="h",
        producer="web",
        epoch=1,
        sequence=position,
    )


class Recorder:
    """Stands in for the journal where groups and failures are to be chosen by the test."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[str, int]]] = []
        self.synced: list[bool] = []
        self.fail: Exception | None = None
        self.refusal: type[DBAPIError] = IntegrityError
        self.fatal: list[str] = []
        self.transactions: list[tuple[int, int]] = []  # entries and bytes
        self.failures = 0
        self.open = threading.Event()  # while it is cleared, writing waits
        self.open.set()
        self.entered = threading.Semaphore(0)

    def append(self, entries, sync):
        self.entered.release()
        self.open.wait()
        if self.fail is not None:
            raise self.fail
        refused = [entry for entry in entries if entry.payload == b"refused"]
        if refused:
            raise self.refusal("INSERT", {}, Exception("UNIQUE constraint failed"))
        self.groups.append([(entry.learner_uid, entry.position) for entry in entries])
        self.synced.append(sync)

    def journal_written(self, seconds, entries, size_bytes):
        assert 0 <= seconds < 60
        self.transactions.append((entries, size_bytes))

    def journal_failed(self):
        self.failures += 1

    def written(self) -> list[tuple[str, int]]:
        return [name for group in self.groups for name in group]

    async def hold(self, commit: GroupCommit) -> asyncio.Future[None]:
        """From now on entries wait, until `open` is set. The learner used for it is "hold"."""
        self.open.clear()
        self.entered = threading.Semaphore(0)  # those who entered before do not count
        first = commit.add(batch(1, "hold"))
        await asyncio.to_thread(self.entered.acquire)
        return first


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def commit(recorder):
    made = GroupCommit(recorder.append, recorder.fatal.append, recorder)
    yield made
    recorder.open.set()
    await made.close()


def full() -> OperationalError:
    return OperationalError("INSERT", {}, Exception("database or disk is full"))


async def test_entries_that_wait_share_a_transaction(recorder, commit):
    await recorder.hold(commit)
    written = [commit.add(batch(position)) for position in range(1, 11)]
    recorder.open.set()
    await asyncio.gather(*written)
    assert recorder.groups == [[("hold", 1)], [("a", position) for position in range(1, 11)]]


async def test_a_transaction_has_bounds(recorder, commit):
    await recorder.hold(commit)
    written = [commit.add(batch(position)) for position in range(1, 1201)]
    recorder.open.set()
    await asyncio.gather(*written)
    assert [len(group) for group in recorder.groups] == [1, 512, 512, 176]


async def test_futures_complete_in_order_whatever_becomes_of_them(recorder, commit):
    await recorder.hold(commit)
    order: list[int] = []
    durabilities = [Durability.FSYNC, Durability.NONE, Durability.OS, Durability.NONE]
    futures = [commit.add(batch(1 + n // 2, f"{n % 2}"), durabilities[n % 4]) for n in range(20)]
    futures.append(commit.mend("0"))
    for index, future in enumerate(futures):
        future.add_done_callback(lambda _, index=index: order.append(index))
    recorder.fail = full()
    recorder.open.set()
    await asyncio.gather(*futures, return_exceptions=True)
    assert order == list(range(21))


async def test_only_what_asks_for_it_is_synced(recorder, commit):
    await commit.add(batch(1), Durability.OS)
    await commit.add(batch(2), Durability.NONE)
    await commit.add(batch(3), Durability.FSYNC)
    assert recorder.groups == [[("a", 1)], [("a", 3)]]
    assert recorder.synced == [False, True]

    await recorder.hold(commit)
    mixed = [commit.add(batch(4), Durability.OS), commit.add(batch(1, "b"), Durability.FSYNC)]
    recorder.open.set()
    await asyncio.gather(*mixed)
    assert recorder.synced[2:] == [True, True]


async def test_entries_that_are_not_written_wait_for_those_before_them(recorder, commit):
    held = await recorder.hold(commit)
    unwritten = commit.add(batch(1, "hold"), Durability.NONE)
    await asyncio.sleep(0)
    assert not unwritten.done()
    recorder.open.set()
    await unwritten
    assert held.done()


async def test_after_a_failure_a_learner_is_closed_until_it_is_mended(recorder, commit):
    await commit.add(batch(1))
    recorder.fail = full()
    with pytest.raises(JournalUnavailable, match="disk is full"):
        await commit.add(batch(2))
    recorder.fail = None
    for durability in Durability:
        with pytest.raises(JournalUnavailable, match="before it"):
            await commit.add(batch(2), durability)  # also the very entry that failed: it may be in the journal
    await commit.add(batch(1, "b"))  # another learner is not concerned
    await commit.mend("a")
    await commit.add(batch(2))
    await commit.add(batch(3))
    assert recorder.written() == [("a", 1), ("b", 1), ("a", 2), ("a", 3)]


async def test_mending_takes_its_turn(recorder, commit):
    await recorder.hold(commit)
    before = commit.add(batch(1))
    mended = commit.mend("a")
    behind = commit.add(batch(1))
    recorder.fail = full()
    recorder.open.set()
    with pytest.raises(JournalUnavailable, match="disk is full"):
        await before
    await mended
    with pytest.raises(JournalUnavailable, match="disk is full"):  # in a transaction of its own
        await behind
    recorder.fail = None
    with pytest.raises(JournalUnavailable, match="before it"):
        await commit.add(batch(1))


async def test_an_unwritten_entry_fails_only_behind_a_failed_one(recorder, commit):
    await recorder.hold(commit)
    first = commit.add(batch(1), Durability.NONE)
    second = commit.add(batch(2), Durability.FSYNC)
    third = commit.add(batch(3), Durability.NONE)
    recorder.fail = full()
    recorder.open.set()
    await first
    for future in (second, third):
        with pytest.raises(JournalUnavailable):
            await future


@pytest.mark.parametrize("kind", [IntegrityError, DataError])
async def test_a_refused_entry_harms_its_own_learner_only(recorder, commit, kind):
    recorder.refusal = kind
    await recorder.hold(commit)
    good, other = commit.add(batch(1, "b")), commit.add(batch(1, "c"))
    bad = commit.add(Entry(learner_uid="a", position=1, kind=EntryKind.BATCH, payload=b"refused"))
    recorder.open.set()
    with pytest.raises(JournalUnavailable, match="UNIQUE"):
        await bad
    await asyncio.gather(good, other)
    assert recorder.written() == [("hold", 1), ("b", 1), ("c", 1)]
    await commit.add(batch(2, "b"))


async def test_an_outage_is_logged_when_it_begins_and_when_it_ends(recorder, commit):
    with capture_logs() as logs:
        recorder.fail = full()
        for _ in range(3):
            await asyncio.gather(commit.add(batch(1)), return_exceptions=True)
            await commit.mend("a")
        recorder.fail = None
        for position in (1, 2):
            await commit.add(batch(position))
    assert [(entry["log_level"], entry.get("error")) for entry in logs] == [
        ("error", "database or disk is full"),
        ("info", None),
    ]


async def test_the_last_write_says_how_the_journal_is(recorder, commit):
    start = commit.status
    assert (start.up, start.reason) == (True, "")
    await commit.add(batch(1))
    assert commit.status == start
    recorder.fail = full()
    for position in (2, 3):
        with pytest.raises(JournalUnavailable):
            await commit.add(batch(position))
        await commit.mend("a")
        assert (commit.status.up, commit.status.reason) == (False, "database or disk is full")
    down = commit.status
    recorder.fail = None
    await commit.add(batch(2))
    assert (commit.status.up, commit.status.reason) == (True, "")
    assert start.since < down.since < commit.status.since
    assert (recorder.transactions, recorder.failures) == ([(1, 3), (1, 3)], 2)


async def test_a_refused_entry_says_nothing_about_the_journal(recorder, commit):
    with pytest.raises(JournalUnavailable):
        await commit.add(replace(batch(1), payload=b"refused"))
    assert commit.status.up
    assert recorder.failures == 1


async def test_a_fault_of_the_program_does_not_leave_callers_waiting(recorder, commit):
    recorder.fail = TypeError("a bug")
    with pytest.raises(JournalUnavailable, match="a bug"):
        await commit.add(batch(1))


@pytest.mark.parametrize("name", ["SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC"])
async def test_a_failed_fsync_is_fatal(recorder, commit, name):
    driver_error = sqlite3.OperationalError("disk I/O error")
    driver_error.sqlite_errorname = name
    recorder.fail = OperationalError("COMMIT", {}, driver_error)
    with pytest.raises(JournalUnavailable, match="I/O"):
        await commit.add(batch(1))
    assert recorder.fatal == ["disk I/O error"]
    recorder.fail = None
    await commit.mend("a")
    with pytest.raises(JournalUnavailable, match="I/O"):
        await commit.add(batch(1))
    assert recorder.written() == []


async def test_other_io_errors_are_not(recorder, commit):
    driver_error = sqlite3.OperationalError("disk I/O error")
    driver_error.sqlite_errorname = "SQLITE_IOERR_WRITE"
    recorder.fail = OperationalError("INSERT", {}, driver_error)
    with pytest.raises(JournalUnavailable):
        await commit.add(batch(1))
    assert recorder.fatal == []


async def test_a_full_disk_stops_writing_until_there_is_room(tmp_path):
    """SQLite's own bound on the file's size stands in for the disk's."""
    engine = open_database("", tmp_path)
    journal = Journal(engine)
    commit = GroupCommit(lambda entries, sync: journal.append(entries, sync=sync), pytest.fail)

    def bound(pages: int) -> None:
        with engine.connect() as connection:
            connection.execute(text(f"PRAGMA max_page_count={pages}"))

    await commit.add(batch(1))
    bound(1)  # the number of pages there are, then
    large = Entry(**vars(batch(2)) | {"payload": bytes(100_000)})
    with pytest.raises(JournalUnavailable, match="full"):
        await commit.add(large)
    bound(2**30)
    await commit.mend("a")
    assert journal.bounds("a") == (1, 1)
    await commit.add(large)
    assert list(journal.read("a", 0)) == [batch(1), large]
    await commit.close()
    engine.dispose()


async def test_closing_writes_what_waits(recorder):
    commit = GroupCommit(recorder.append, recorder.fatal.append)
    written = [commit.add(batch(position)) for position in range(1, 4)]
    await commit.close()
    await asyncio.gather(*written)
    with pytest.raises(JournalUnavailable, match="shutting down"):
        await commit.add(batch(4))
    await commit.mend("a")
    await commit.close()
