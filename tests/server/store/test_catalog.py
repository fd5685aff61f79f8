"""The catalog on both databases: what is in it comes back, names are taken once, changes are all or nothing."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from cbp import SnapshotError
from cbp_server.errors import LearnerExists
from cbp_server.records.learners import Durability, Quarantine
from cbp_server.store.catalog import Catalog, StoredCheckpoint, StoredLearner
from cbp_server.store.journal import Entry, EntryKind

NOW = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
POISON = Quarantine(position=7, producer="web", sequence=5, reason="the loss is NaN: ‘∞’\x00", time=NOW)


def learner(uid: str = "a", name: str = "clicks", **fields: object) -> StoredLearner:
    spec = {"layers": [{"inputs": 3, "units": 4}], "optimizer": {"lr": 0.1 + 0.2}, "note": "é"}
    plain = {"spec": spec, "engine": "torch", "durability": Durability.FSYNC, "create_time": NOW, "born": True}
    return StoredLearner(**plain | {"uid": uid, "learner_id": name} | fields)


def checkpoint(number: int, uid: str = "a", **fields: object) -> StoredCheckpoint:
    plain = {"position": 10 * number, "step": 2**40, "examples": 2**41, "size_bytes": 99, "time": NOW, "pinned": False}
    return StoredCheckpoint(**plain | {"learner_uid": uid, "number": number, "summary": {"loss": 0.25}} | fields)


def entry(kind: EntryKind, position: int, uid: str = "a") -> Entry:
    return Entry(learner_uid=uid, position=position, kind=kind, payload=b"{}")


@pytest.fixture
def catalog(database) -> Catalog:
    return Catalog(database)


def test_learners_come_back_as_they_were(catalog):
    plain = learner()
    full = learner(
        "b",
        "views",
        create_time=NOW + timedelta(seconds=1),
        durability=Durability.NONE,
        request_id="r",
        request_digest="d",
        delete_time=NOW,
        purge_time=NOW + timedelta(days=7),
        quarantine=POISON,
    )
    catalog.add(full)
    catalog.add(plain)
    assert catalog.learners() == [plain, full]


def test_times_of_other_zones_come_back_in_utc(catalog):
    east = NOW.astimezone(timezone(timedelta(hours=5)))
    catalog.add(learner(create_time=east))
    (stored,) = catalog.learners()
    assert stored.create_time == east
    assert stored.create_time.tzinfo is UTC


def test_numbers_that_are_not_finite_come_back(catalog):
    catalog.add(learner(), checkpoint(1, summary={"loss": float("inf"), "accuracy": None}))
    assert catalog.checkpoints("a")[0].summary == {"loss": float("inf"), "accuracy": None}


def test_a_name_is_taken_by_one_live_learner(catalog):
    catalog.add(learner("a"))
    with pytest.raises(LearnerExists, match="clicks"):
        catalog.add(learner("b"), checkpoint(1, "b"))
    assert catalog.newest_checkpoints() == {}

    catalog.delete("a", NOW, NOW + timedelta(days=1))
    catalog.add(learner("b"))
    with pytest.raises(LearnerExists, match="clicks"):
        catalog.undelete("a")
    assert [stored.delete_time for stored in catalog.learners()] == [NOW, None]

    catalog.delete("b", NOW, NOW)
    catalog.undelete("a")
    assert catalog.learners() == [learner("a"), learner("b", delete_time=NOW, purge_time=NOW)]


def test_a_uid_is_taken_once(catalog):
    catalog.add(learner("a"))
    with pytest.raises(IntegrityError):
        catalog.add(learner("a", "other"))


def test_of_two_creates_at_once_one_gets_the_name(catalog):
    for round_ in range(20):
        barrier = threading.Barrier(4)
        outcomes: list[str] = []

        def create(uid: str, name: str = f"name-{round_}", barrier=barrier, outcomes=outcomes) -> None:
            barrier.wait()
            try:
                catalog.add(learner(uid, name))
                outcomes.append("added")
            except LearnerExists:
                outcomes.append("exists")

        threads = [threading.Thread(target=create, args=(f"{round_}-{index}",)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["added", "exists", "exists", "exists"]
    assert len(catalog.learners()) == 20


def test_changes_of_a_learner(catalog):
    catalog.add(learner())
    catalog.set_durability("a", Durability.OS)
    catalog.quarantine("a", POISON)
    assert catalog.learners() == [learner(durability=Durability.OS, quarantine=POISON)]


@pytest.mark.parametrize(
    "change",
    [
        lambda catalog: catalog.delete("x", NOW, NOW),
        lambda catalog: catalog.undelete("x"),
        lambda catalog: catalog.set_durability("x", Durability.OS),
        lambda catalog: catalog.quarantine("x", POISON),
        lambda catalog: catalog.pin("x", 1),
        lambda catalog: catalog.resume(entry(EntryKind.RESUME, 1, "x")),
    ],
)
def test_a_change_of_what_is_not_there_is_refused(catalog, journal, change):
    catalog.add(learner())
    with pytest.raises(LookupError):
        change(catalog)
    assert journal.learners() == set()


def test_checkpoints_come_newest_first(catalog):
    catalog.add(learner(), checkpoint(1))
    catalog.add(learner("b", "views"))
    catalog.add(learner("c", "other"), checkpoint(7, "c"))
    for number in (2, 10, 9):
        catalog.add_checkpoint(checkpoint(number))
    catalog.pin("a", 2)
    assert catalog.checkpoints("a") == [checkpoint(10), checkpoint(9), checkpoint(2, pinned=True), checkpoint(1)]
    assert catalog.newest_checkpoints() == {"a": checkpoint(10), "c": checkpoint(7, "c")}
    for _ in range(2):
        catalog.remove_checkpoint("a", 10)
    assert catalog.newest_checkpoints()["a"] == checkpoint(9)
    with pytest.raises(IntegrityError):
        catalog.add_checkpoint(checkpoint(9))
    assert catalog.checkpoints("b") == catalog.checkpoints("nobody") == []


def test_a_purge_leaves_nothing_of_the_learner(catalog, journal):
    for uid in ("a", "b"):
        catalog.add(learner(uid, uid), checkpoint(1, uid))
        journal.append([entry(EntryKind.OPEN, 1, uid)])
    for _ in range(2):
        catalog.purge("a")
    assert [stored.uid for stored in catalog.learners()] == ["b"]
    assert set(catalog.newest_checkpoints()) == {"b"}
    assert journal.learners() == {"b"}
    with pytest.raises(IntegrityError):  # one that was being written meanwhile
        catalog.add_checkpoint(checkpoint(2))


def test_a_restore_is_one_transaction(catalog, journal):
    catalog.add(learner(quarantine=POISON), checkpoint(1))
    journal.append([entry(EntryKind.OPEN, 1)])
    restored = entry(EntryKind.RESTORE, 2)
    for refused in [(restored, checkpoint(1)), (entry(EntryKind.RESTORE, 1), checkpoint(2))]:
        with pytest.raises(IntegrityError):
            catalog.restore(*refused)
        assert catalog.learners() == [learner(quarantine=POISON)]
        assert catalog.checkpoints("a") == [checkpoint(1)]
        assert journal.bounds("a") == (1, 1)

    catalog.restore(restored, checkpoint(2, position=2))
    assert catalog.learners() == [learner()]
    assert catalog.checkpoints("a") == [checkpoint(2, position=2), checkpoint(1)]
    assert list(journal.read("a", 1)) == [restored]


def test_resuming_is_one_transaction(catalog, journal):
    catalog.add(learner(quarantine=POISON))
    journal.append([entry(EntryKind.OPEN, 1)])
    with pytest.raises(IntegrityError):
        catalog.resume(entry(EntryKind.RESUME, 1))
    assert catalog.learners() == [learner(quarantine=POISON)]
    catalog.resume(entry(EntryKind.RESUME, 2))
    assert catalog.learners() == [learner()]
    assert journal.resumes("a", 0) == [entry(EntryKind.RESUME, 2)]


def test_a_second_thread_reads_while_one_writes(catalog, database):
    catalog.add(learner())
    with database.begin() as connection:
        connection.execute(text("UPDATE learners SET request_id = 'other'"))
        reader = threading.Thread(target=lambda: seen.extend(catalog.learners()))
        seen: list[StoredLearner] = []
        reader.start()
        reader.join(timeout=5)
        assert seen == [learner()]
    assert replace(seen[0], request_id="other") == catalog.learners()[0]


def forge(database, table: str, column: str, value: object, key: str) -> None:
    """As somebody would who has the database."""
    where = "uid" if table == "learners" else "learner_uid"
    with database.begin() as connection:
        connection.execute(
            text(f"UPDATE {table} SET {column} = :value WHERE {where} = :key"), {"value": value, "key": key}
        )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("spec", "nonsense"),
        ("spec", "[]"),
        ("spec", "[" * 100_000),
        ("durability", "always"),
        ("engine", "steam"),
        ("quarantine", "{}"),
        (
            "quarantine",
            '{"position": true, "producer": "", "sequence": 1, "reason": "", "time": "2026-11-22T00:00:00Z"}',
        ),
        (
            "quarantine",
            '{"position": 1, "producer": "", "sequence": 1, "reason": "\\ud800", "time": "2026-11-22T00:00:00Z"}',
        ),
    ],
)
def test_a_row_of_nonsense_hides_no_other_learner(catalog, database, column, value):
    catalog.add(learner("a", "clicks"))
    catalog.add(learner("b", "views"))
    catalog.add(learner("c", "gone", delete_time=NOW))
    for uid in ("b", "c"):
        forge(database, "learners", column, value, uid)
    first, *others = catalog.learners()
    assert first == learner("a", "clicks")
    assert [(row.uid, row.learner_id, row.deleted) for row in others] == [("b", "views", False), ("c", "gone", True)]
    assert all("cannot be read" in row.reason for row in others)


@pytest.mark.parametrize(("column", "value"), [("summary", "{"), ("summary", "7"), ("step", -1), ("size_bytes", 2**60)])
def test_a_checkpoint_of_nonsense_hides_no_other_learners(catalog, database, column, value):
    for uid, name in (("a", "clicks"), ("b", "views")):
        catalog.add(learner(uid, name), checkpoint(1, uid))
    forge(database, "checkpoints", column, value, "b")
    newest = catalog.newest_checkpoints()
    assert newest["a"] == checkpoint(1)
    assert isinstance(newest["b"], SnapshotError)
    with pytest.raises(SnapshotError, match=column if column != "summary" else "checkpoint"):
        catalog.checkpoints("b")
    assert catalog.checkpoints("a") == [checkpoint(1)]
