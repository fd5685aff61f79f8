"""A PostgreSQL that goes away and comes back: what was acknowledged is there, and writing goes on without a gap."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from cbp_server.errors import JournalUnavailable
from cbp_server.records.learners import Durability
from cbp_server.store.catalog import Catalog
from cbp_server.store.database import DatabaseInUse, exclusive, open_database
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind, Journal


def batch(position: int, learner: str = "a") -> Entry:
    return Entry(
        learner_uid=learner,
        position=position,
        kind=EntryKind.BATCH,
        payload=bytes([position % 256]) * 3000,
        producer="web",
        epoch=1,
        sequence=position,
    )


@pytest.fixture(scope="module")
def postgres(make_postgres):
    """A server for this module, which stops and starts it. It runs at the beginning of a test."""
    server = make_postgres()
    server.start()
    return server


@pytest.fixture
def engine(postgres, tmp_path: Path) -> Iterator[Engine]:
    opened = open_database(postgres.url, tmp_path)
    yield opened
    with opened.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    opened.dispose()


@pytest.fixture
def journal(engine: Engine) -> Journal:
    return Journal(engine)


@pytest.fixture
async def commit(journal: Journal) -> AsyncIterator[GroupCommit]:
    made = GroupCommit(lambda entries, sync: journal.append(entries, sync=sync), pytest.fail)
    yield made
    await made.close()


def test_a_restart_between_two_appends_goes_unnoticed(postgres, journal, engine):
    journal.append([batch(1)])
    postgres.stop()
    postgres.start()
    journal.append([batch(2)])
    assert list(journal.read("a", 0)) == [batch(1), batch(2)]
    assert Catalog(engine).learners() == []


def test_while_it_is_away_every_call_fails_and_afterwards_none(postgres, journal, engine):
    journal.append([batch(1)])
    postgres.stop()
    for call in (
        lambda: journal.append([batch(2)]),
        lambda: list(journal.read("a", 0)),
        lambda: journal.truncate("a", 1),
        lambda: Catalog(engine).learners(),
    ):
        for _ in range(2):
            with pytest.raises(OperationalError):
                call()
    postgres.start()
    assert list(journal.read("a", 0)) == [batch(1)]
    journal.append([batch(2)])
    assert journal.bounds("a") == (1, 2)


async def test_entries_fail_while_it_is_away_and_go_on_after_mending(postgres, journal, commit):
    await commit.add(batch(1))
    postgres.stop()
    for durability in (Durability.FSYNC, Durability.OS):
        with pytest.raises(JournalUnavailable):
            await commit.add(batch(2), durability)
    postgres.start()
    with pytest.raises(JournalUnavailable, match="before it"):
        await commit.add(batch(2))
    await commit.mend("a")
    assert journal.bounds("a") == (1, 1)
    await asyncio.gather(*(commit.add(batch(position)) for position in range(2, 20)))
    assert list(journal.read("a", 0)) == [batch(position) for position in range(1, 20)]


def wait_for(url: str, wait_event: str) -> None:
    """Returns when a session of the server waits for that."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                f"DO $$ BEGIN WHILE NOT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = '{wait_event}') LOOP "
                "PERFORM pg_sleep(0.01); PERFORM pg_stat_clear_snapshot(); END LOOP; END $$"
            )
        )
    engine.dispose()


async def lose_the_answer_to_a_commit(postgres, commit: GroupCommit, entry: Entry, wait_event: str) -> None:
    """The commit is under way in the server when that dies."""
    written = commit.add(entry)
    await asyncio.to_thread(wait_for, postgres.url, wait_event)
    assert not written.done()
    postgres.stop()
    with pytest.raises(JournalUnavailable):
        await written


async def test_a_commit_that_was_not_answered_and_did_happen(postgres, journal, commit):
    await commit.add(batch(1))
    postgres.stop()
    # A commit is on disk, then waits for a second machine before it is answered. There is none.
    postgres.start(synchronous_standby_names="nobody")
    await lose_the_answer_to_a_commit(postgres, commit, batch(2), "SyncRep")
    postgres.start()

    with pytest.raises(JournalUnavailable):
        await commit.add(batch(2))  # would be there twice, or stand where another stands
    await commit.mend("a")
    assert journal.bounds("a") == (1, 2)
    await commit.add(batch(3))
    assert list(journal.read("a", 0)) == [batch(position) for position in (1, 2, 3)]


async def test_a_commit_that_was_not_answered_and_did_not_happen(postgres, journal, commit, engine):
    with engine.begin() as connection:  # what is deferred to the commit takes its time
        connection.execute(
            text(
                "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN IF NEW.position = 2 THEN PERFORM pg_sleep(600); END IF; RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON journal DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION dawdle()"
            )
        )
    await commit.add(batch(1))
    await lose_the_answer_to_a_commit(postgres, commit, batch(2), "PgSleep")
    postgres.start()
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER dawdle ON journal"))

    with pytest.raises(JournalUnavailable):
        await commit.add(batch(3))  # would leave a gap
    await commit.mend("a")
    assert journal.bounds("a") == (1, 1)
    await commit.add(batch(2))
    await commit.add(batch(3))
    assert list(journal.read("a", 0)) == [batch(position) for position in (1, 2, 3)]


async def test_nothing_acknowledged_is_lost_when_it_dies_while_it_is_written_to(postgres, journal, commit):
    """Two learners write all the time; whenever they fail they mend, and go on where the journal ends."""
    acknowledged = {"a": 0, "b": 0}
    failures = 0
    written: asyncio.Queue[None] = asyncio.Queue()
    enough = asyncio.Event()

    async def write(uid: str) -> None:
        nonlocal failures
        position = 0
        while not enough.is_set():
            flight = [commit.add(batch(position + number, uid)) for number in range(1, 9)]
            for number, outcome in enumerate(await asyncio.gather(*flight, return_exceptions=True), 1):
                if outcome is None:
                    assert acknowledged[uid] == position + number - 1
                    acknowledged[uid] = position + number
                    written.put_nowait(None)
                else:
                    failures += 1
            await commit.mend(uid)
            try:
                position = ((await asyncio.to_thread(journal.bounds, uid)) or (0, 0))[1]
            except OperationalError:
                continue  # the position stays; as long as it is away nothing can be written
            assert position >= acknowledged[uid]
            acknowledged[uid] = position  # read back counts as acknowledged

    writers = [asyncio.create_task(write(uid)) for uid in acknowledged]
    for _ in range(3):
        for _ in range(200):
            await written.get()
        await asyncio.to_thread(postgres.stop)
        await asyncio.to_thread(postgres.start)
    enough.set()
    await asyncio.gather(*writers)
    assert failures > 0
    for uid, position in acknowledged.items():
        assert list(journal.read(uid, 0)) == [batch(number, uid) for number in range(1, position + 1)]


def test_the_first_server_to_renew_has_the_database_after_a_restart(postgres, engine, tmp_path):
    second = open_database(postgres.url, tmp_path)
    with exclusive(engine) as ownership:
        postgres.stop()
        with pytest.raises(OperationalError):
            ownership.renew()
        postgres.start()
        ownership.renew()
        with pytest.raises(DatabaseInUse), exclusive(second):
            pass
    second.dispose()
