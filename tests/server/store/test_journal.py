"""The journal on both databases: in order, once, whole, or an error."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError

from cbp_server.errors import JournalDamaged
from cbp_server.store.database import open_database
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


def test_a_name_that_was_forgotten_begins_anew_where_its_old_batches_are(journal):
    first, later, last = batch(1), replace(batch(2), sequence=1, life=7), replace(batch(3), sequence=1, life=12)
    journal.append([first, later, last])
    assert list(journal.read("a", 0)) == [first, later, last]
    for known in (first, later, last):
        with pytest.raises(IntegrityError):
            journal.append([replace(known, position=4)])


def test_the_longest_name_of_the_longest_life_fits(journal):
    entry = replace(batch(1, producer="ő" * 128), life=2**63 - 1)
    journal.append([entry])
    assert list(journal.read("a", 0)) == [entry]


def test_entries_without_a_producer_do_not_collide(journal):
    journal.append([Entry(learner_uid="a", position=p, kind=EntryKind.UPDATE, payload=b"") for p in (1, 2, 3)])
    assert positions(journal) == [1, 2, 3]


def test_reading_ends_where_it_is_told_to(journal):
    journal.append([batch(position) for position in range(1, 520)])
    journal.append([batch(1, "b")])
    for up_to in (0, 1, 255, 256, 257, 512, 518):
        assert [entry.position for entry in journal.read("a", 0, up_to)] == list(range(1, up_to + 1))
    assert [entry.position for entry in journal.read("a", 516, 10_000)] == [517, 518, 519]


def test_large_payloads_are_read_a_few_at_a_time(journal, database):
    entries = [batch(position, payload=bytes([position]) * size) for position, size in enumerate([2, 3, 9, 7, 9, 1], 1)]
    entries = [Entry(**vars(entry) | {"payload": entry.payload * 2**20}) for entry in entries]
    journal.append(entries)
    fetched: list[int] = []

    def note(*context: object) -> None:
        fetched.append(context[2].count("payload_hash"))

    event.listen(database, "before_cursor_execute", note)
    assert list(journal.read("a", 0)) == entries
    assert sum(map(bool, fetched)) == 5  # 2, 3 + 9, 7 + 9, 1; and what finds the end
    assert sum(1 for _ in journal.read("a", 0, 1)) == 1


def test_resumes_are_found_without_what_lies_between(journal):
    resumes = [
        Entry(learner_uid="a", position=position, kind=EntryKind.RESUME, payload=b'{"at": 1}') for position in (2, 4)
    ]
    journal.append([batch(1), resumes[0], batch(3), resumes[1], batch(1, "b")])
    assert journal.resumes("a", 0) == resumes
    assert journal.resumes("a", 2) == resumes[1:]
    assert journal.resumes("b", 0) == []


def test_resumes_and_bounds_need_not_read_the_log(tmp_path):
    engine = open_database("", tmp_path)
    plans: list[str] = []

    def explain(connection, _cursor, statement, parameters, *_: object) -> None:
        if statement.startswith("SELECT"):
            rows = connection.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(row[3] for row in rows if "journal" in row[3])

    event.listen(engine, "before_cursor_execute", explain)
    journal = Journal(engine)
    journal.resumes("a", 0)
    assert plans == ["SEARCH journal USING INDEX journal_resumes (learner_uid=? AND position>?)"]
    plans.clear()
    journal.bounds("a")
    assert plans == ["SEARCH journal USING COVERING INDEX sqlite_autoindex_journal_1 (learner_uid=?)"] * 2
    engine.dispose()


def test_bounds_are_the_first_and_the_last_position(journal):
    assert journal.bounds("a") is None
    journal.append([batch(position) for position in range(1, 6)])
    assert journal.bounds("a") == (1, 5)
    journal.truncate("a", 3)
    assert journal.bounds("a") == (4, 5)


@pytest.mark.parametrize("sync", [True, False])
def test_appending_with_and_without_sync(journal, sync):
    journal.append([batch(1), batch(2)], sync=sync)
    with pytest.raises(IntegrityError):
        journal.append([batch(3), batch(2)], sync=sync)
    journal.append([batch(3)], sync=sync)
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


def test_truncation_goes_through_in_parts_while_others_append(journal):
    journal.append([batch(position) for position in range(1, 1001)])
    journal.truncate("a", 10)
    truncation = threading.Thread(target=journal.truncate, args=("a", 997))
    truncation.start()
    for position in range(1, 101):
        journal.append([batch(position, "b")], sync=position % 2 == 0)
    truncation.join()
    assert positions(journal, after=997) == [998, 999, 1000]
    assert journal.bounds("a") == (998, 1000)
    assert positions(journal, "b") == list(range(1, 101))
    journal.truncate("a", 500)
    journal.truncate("a", 5000)
    assert journal.learners() == {"b"}
    for _ in range(2):
        journal.forget("b")
    assert journal.learners() == set()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET payload = :payload WHERE position = 2",
        "UPDATE journal SET payload_hash = 'i' WHERE position = 2",
        "UPDATE journal SET sequence = 77 WHERE position = 2",
        "UPDATE journal SET kind = 'open' WHERE position = 2",
        "UPDATE journal SET kind = 'shrug' WHERE position = 2",
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


def test_large_entries_are_removed_a_few_at_a_time(journal, database):
    """So that others' entries come in between."""
    journal.append([batch(position, payload=bytes(3 * 2**20)) for position in range(1, 8)])
    removed: list[int] = []

    def note(_connection, cursor, statement, *_):
        if statement.startswith("DELETE FROM journal"):
            removed.append(cursor.rowcount)

    event.listen(database, "after_cursor_execute", note)
    journal.truncate("a", 6)
    assert removed == [2, 2, 2]
    assert positions(journal, after=6) == [7]
