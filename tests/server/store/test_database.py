"""Opening a database: its tables, its settings, and that one server has it."""

import os
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from cbp_server.records.learners import Durability
from cbp_server.store.catalog import Catalog, StoredLearner
from cbp_server.store.database import DatabaseInUse, exclusive, newest_revision, open_database, transaction
from cbp_server.store.journal import Entry, EntryKind, Journal
from cbp_server.store.tables import METADATA

LEARNER = StoredLearner(
    uid="a",
    learner_id="clicks",
    spec={},
    engine="torch",
    durability=Durability.FSYNC,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
    born=True,
)


def synchronous(connection) -> int:
    return connection.execute(text("PRAGMA synchronous")).scalar()


def migrate(database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "cbp_server.store:migrations")
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def described(database) -> dict:
    """All that the database says of its tables."""
    looked_at = inspect(database)
    described = {}
    for table in looked_at.get_table_names():
        columns = [(c["name"], str(c["type"]), c["nullable"], c["default"]) for c in looked_at.get_columns(table)]
        indexes = sorted((i["name"], i["column_names"], bool(i["unique"])) for i in looked_at.get_indexes(table))
        unique = sorted((u["name"] or "", u["column_names"]) for u in looked_at.get_unique_constraints(table))
        foreign = sorted(str(sorted(f.items(), key=str)) for f in looked_at.get_foreign_keys(table))
        keys = looked_at.get_pk_constraint(table)["constrained_columns"]
        described[table] = columns, keys, indexes, unique, foreign
    return described


def test_migrations_make_the_tables_that_the_code_expects(database, drop_tables):
    """Those that a new database is given at once."""
    newborn = described(database)
    drop_tables(database)
    migrate(database, "head")
    assert described(database) == newborn
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        assert context.get_current_revision() == newest_revision()
        indexes = inspect(connection).get_indexes("learners")
    assert [(index["name"], bool(index["unique"])) for index in indexes] == [("learners_live_name", True)]


def test_opening_again_keeps_what_is_there(database, open_again):
    Catalog(database).add(LEARNER)
    assert Catalog(open_again()).learners() == [LEARNER]


def test_the_tables_of_the_first_version_keep_what_is_in_them(database, open_again, drop_tables):
    drop_tables(database)
    migrate(database, "0001")
    entry = Entry(learner_uid="a", position=1, kind=EntryKind.BATCH, payload=b"x", producer="web", epoch=1, sequence=1)
    Journal(database).append([entry])
    Catalog(database).add(LEARNER)
    engine = open_again()
    assert Catalog(engine).learners() == [LEARNER]
    assert list(Journal(engine).read("a", 0)) == [entry]
    Journal(engine).append([replace(entry, position=2, producer="ő" * 128, life=2**63 - 1)])


def test_a_database_of_a_newer_version_is_refused(database, open_again):
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SQLAlchemyError, match=r"newer version.*9999"):
        open_again()


def test_a_migration_that_fails_leaves_nothing_behind(database, open_again, drop_tables):
    drop_tables(database)
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE journal (x INTEGER)"))
    with pytest.raises(Exception, match="journal"):
        open_again()
    assert sorted(inspect(database).get_table_names()) == ["journal"]
    with database.begin() as connection:
        connection.execute(text("DROP TABLE journal"))
    assert Catalog(open_again()).learners() == []


def test_servers_that_start_at_once_migrate_once(database, open_again, drop_tables):
    if database.dialect.name == "sqlite":
        pytest.skip("the data directory is locked before SQLite's file is opened")
    drop_tables(database)
    outcomes: list[str] = []

    def start() -> None:
        try:
            open_again()
            outcomes.append("opened")
        except DatabaseInUse:
            outcomes.append("in use")

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 3
    assert "opened" in outcomes
    assert Catalog(open_again()).learners() == []


def test_a_database_belongs_to_one_server(database, open_again, drop_tables):
    second = open_again()
    with exclusive(database) as ownership:
        ownership.renew()
        if database.dialect.name == "sqlite":
            return  # guarded by the lock on its directory
        with pytest.raises(DatabaseInUse), exclusive(second):
            pass
        Catalog(database).add(LEARNER)
        drop_tables(second)
        with pytest.raises(DatabaseInUse):  # rather than migrated while another version works on it
            open_again()
    with exclusive(second):
        pass


def test_a_server_whose_connection_broke_takes_the_database_back_unless_another_has_it(postgres_url, tmp_path):
    first, second = (open_database(postgres_url, tmp_path) for _ in range(2))

    def cut() -> None:
        with second.connect() as connection:
            others = "locktype = 'advisory' AND granted AND pid != pg_backend_pid()"
            connection.execute(text(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE {others}"))

    with exclusive(first) as ownership:
        cut()
        ownership.renew()
        with pytest.raises(DatabaseInUse), exclusive(second):
            pass
        cut()
        with exclusive(second), pytest.raises(DatabaseInUse):
            ownership.renew()
        ownership.renew()
    with exclusive(second):
        pass
    first.dispose()
    second.dispose()


def test_the_log_of_a_process_that_ended_is_taken_to_disk_before_it_is_used(tmp_path, monkeypatch):
    """A failed fsync may have left a hole in it that only the disk has."""
    Catalog(open_database("", tmp_path)).add(LEARNER)
    log = tmp_path / "journal.db-wal"
    content, synced = log.read_bytes(), []
    fsync = os.fsync
    assert len(content) > 4096

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    engine = open_database("", tmp_path)
    assert synced == [log, tmp_path]
    assert log.read_bytes() == content
    assert Catalog(engine).learners() == [LEARNER]
    engine.dispose()


def test_sqlite_commits_are_fsynced(tmp_path):
    engine = open_database("", tmp_path)
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert synchronous(connection) == 2  # FULL
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()


def test_sqlite_is_synchronous_again_after_a_transaction_that_was_not(tmp_path):
    engine = open_database("", tmp_path)
    for _ in range(2):
        with transaction(engine, sync=False) as connection:
            assert synchronous(connection) == 1  # NORMAL
        with transaction(engine) as connection:
            assert synchronous(connection) == 2
    with pytest.raises(OperationalError), transaction(engine, sync=False) as connection:
        connection.execute(text("INSERT INTO nowhere VALUES (1)"))
    assert engine.pool.checkedin() == 1  # the same connection all along
    with engine.connect() as connection:
        assert synchronous(connection) == 2
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "parse"),
        ("mysql://host/db", "must be PostgreSQL"),
        ("sqlite:///elsewhere.db", "must be PostgreSQL"),
        ("postgresql+pg8000://host/db", r"cbp-server\[postgresql\]"),
        ("postgresql+psycopg://nobody@127.0.0.1:1/db", "refused"),
    ],
)
def test_a_url_that_leads_nowhere_is_an_error_of_sqlalchemys(tmp_path, url, reason):
    with pytest.raises(SQLAlchemyError, match=reason):
        open_database(url, tmp_path)


def test_a_directory_that_is_not_there_is_an_error_of_sqlalchemys(tmp_path):
    with pytest.raises(SQLAlchemyError, match="unable to open"):
        open_database("", tmp_path / "missing")


def test_postgresql_waits_for_the_disk_but_for_transactions_that_need_not(postgres_url, tmp_path):
    engine = open_database(postgres_url, tmp_path)
    show = text("SHOW synchronous_commit")
    with transaction(engine, sync=False) as connection:
        assert connection.execute(show).scalar() == "off"
    with transaction(engine) as connection:
        assert connection.execute(show).scalar() == "on"
    engine.dispose()


@pytest.mark.parametrize(("configured", "used"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
def test_a_postgresql_that_is_set_to_lose_commits_keeps_ours(postgres_url, tmp_path, configured, used):
    engine = open_database(f"{postgres_url}&options=-csynchronous_commit%3D{configured}", tmp_path)
    with engine.connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == used
    engine.dispose()


def test_the_package_brings_its_migrations_along():
    from importlib.resources import files

    migrations = files("cbp_server.store") / "migrations"
    assert (migrations / "env.py").is_file()
    assert [path.name for path in (migrations / "versions").iterdir() if path.name[0].isdigit()]
