"""The journal on both databases: in order, once, whole, or an error."""

import asyncio
import subprocess
import sys

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from cbp_server.errors import JournalDamaged, JournalUnavailable
from cbp_server.store.database import open_database
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind, Journal


def batch(position: int, learner: str = "a", *, producer: str = "web", payload: bytes = b"xyz") -> Entry:
    return Entry(
        learner_uid=learner,
        position=position,
        kind=EntryKind.BATCH,
        payload=payload,
        payload_hash="h",
        producer=producer,
        epoch=1,
        sequence=position,
    )


def positions(journal: Journal, learner: str = "a", after: int = 0) -> list[int]:
    return [entry.position for entry in journal.read(learner, after)]


def test_entries_come_back_as_they_were_in_the_order_of_their_positions(journal):
    entries = [batch(position, payload=bytes([position % 256]) * position) for position in range(1, 600)]
    update = Entry(learner_uid="a", position=600, kind=EntryKind.UPDATE, payload=b"{}")
    journal.append(entries)
    journal.append([batch(1, "b"), update])
    assert list(journal.read("a", 0)) == [*entries, update]
    assert positions(journal, after=598) == [599, 600]
    assert positions(journal, "b") == [1]
    assert positions(journal, "nobody") == []


def test_a_batch_is_in_the_log_once(journal):
    journal.append([batch(1)])
    again = Entry(**{**batch(2).__dict__, "sequence": 1})
    for duplicate in (batch(1), again):
        with pytest.raises(IntegrityError):
            journal.append([batch(3, "b"), duplicate])
    assert positions(journal) == [1]
    assert positions(journal, "b") == []  # the whole transaction is gone


def test_entries_without_a_producer_do_not_collide(journal):
    journal.append([Entry(learner_uid="a", position=p, kind=EntryKind.UPDATE, payload=b"") for p in (1, 2, 3)])
    assert positions(journal) == [1, 2, 3]


def test_truncation_leaves_what_is_behind_and_other_learners(journal):
    journal.append([batch(position) for position in range(1, 6)])
    journal.append([batch(1, "b")])
    journal.truncate("a", 3)
    assert positions(journal, after=3) == [4, 5]
    with pytest.raises(JournalDamaged):
        positions(journal, after=2)
    assert positions(journal, "b") == [1]
    journal.forget("a")
    assert journal.learners() == {"b"}


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET payload_hash = payload_hash, payload = :payload WHERE position = 2",
        "UPDATE journal SET sequence = 77 WHERE position = 2",
        "DELETE FROM journal WHERE position = 2",
    ],
)
def test_damage_is_named_by_its_position(journal, database, damage):
    journal.append([batch(position) for position in (1, 2, 3)])
    with database.begin() as connection:
        connection.execute(text(damage), {"payload": b"xyZ"} if ":payload" in damage else {})
    with pytest.raises(JournalDamaged, match="position 2"):
        positions(journal)


def test_what_was_appended_survives_kill_9(tmp_path):
    """In a process of its own, which ends without closing anything as soon as the call has returned."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from cbp_server.store.database import open_database\n"
        "from cbp_server.store.journal import Entry, EntryKind, Journal\n"
        "journal = Journal(open_database('', Path(sys.argv[1])))\n"
        "journal.append([Entry(learner_uid='a', position=1, kind=EntryKind.UPDATE, payload=b'x')])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert positions(Journal(open_database("", tmp_path))) == [1]


class Recorder:
    """Stands in for the database where groups and failures are to be chosen by the test."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.failing = False
        self.gate = None

    def append(self, entries):
        if self.gate is not None:
            self.gate.acquire()
        if self.failing:
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        self.groups.append([entry.position for entry in entries])


async def test_entries_that_wait_share_a_transaction():
    import threading

    recorder = Recorder()
    recorder.gate = threading.Semaphore(0)
    commit = GroupCommit(recorder.append)
    written = [commit.add(batch(position)) for position in range(1, 11)]
    for _ in range(10):
        recorder.gate.release()
    await asyncio.gather(*written)
    assert len(recorder.groups) <= 2  # the first alone at most, the others together
    assert [position for group in recorder.groups for position in group] == list(range(1, 11))
    await commit.close()


async def test_after_a_failure_the_log_goes_on_without_a_gap():
    recorder = Recorder()
    commit = GroupCommit(recorder.append)
    await commit.add(batch(1))
    recorder.failing = True
    with pytest.raises(JournalUnavailable, match="disk is full"):
        await commit.add(batch(2))
    recorder.failing = False
    with pytest.raises(JournalUnavailable):
        await commit.add(batch(3))  # given before the caller heard of the failure
    await commit.add(batch(1, "b"))  # another learner is not concerned
    await commit.add(batch(2))
    await commit.add(batch(3))
    assert [position for group in recorder.groups for position in group] == [1, 1, 2, 3]
    await commit.close()


async def test_closing_writes_what_waits():
    recorder = Recorder()
    commit = GroupCommit(recorder.append)
    written = [commit.add(batch(position)) for position in range(1, 4)]
    await commit.close()
    await asyncio.gather(*written)
