"""Opens the store's database: SQLite in the data directory, or PostgreSQL by a URL."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidRequestError

from cbp_server.store.directories import sync_directory
from cbp_server.store.tables import METADATA

_FILE = "journal.db"
#: Where Alembic notes the revision of the tables.
_NOTE = "alembic_version"
_CHUNK_BYTES = 2**20

#: The engine's option that holds the lock of SQLite's writers.
_WRITING = "cbp_writing"

#: Key of the advisory lock on a PostgreSQL database; all its users share one space of numbers.
_OWNER_LOCK = 0x6362705F6F776E65

_SQLITE_SETTINGS = (
    "journal_mode=WAL",  # readers do not wait for the writer
    "synchronous=FULL",  # a commit returns when the log is fsynced, which is the promise
    "busy_timeout=10000",  # ms
    "foreign_keys=ON",
    "secure_delete=OFF",  # some builds have it on, and write zeros over all that is truncated
)

#: s, s, and how often; after that the other side is given up.
_POSTGRESQL_KEEPALIVES = {"keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3"}

#: Settings of connections, in s and ms, so that a database that is cut off is noticed; what the URL says goes first.
_POSTGRESQL_DEFAULTS = {"connect_timeout": "10", "tcp_user_timeout": "30000", **_POSTGRESQL_KEEPALIVES}


class DatabaseInUse(Exception):
    """Another server works on this database."""

    def __init__(self, text: str = "another server uses this database; give each its own, or stop that one") -> None:
        super().__init__(text)


def open_database(url: str, data_dir: Path) -> Engine:
    """The PostgreSQL at `url`, or SQLite in `data_dir` if that is empty, with its tables as this version has them.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the URL is wrong, the database cannot be reached or written, or a newer version
            has changed its tables.
        DatabaseInUse: its tables are an older version's, and a server works on them.
        OSError: SQLite's files cannot be written.
    """
    engine = _postgresql(url) if url else _sqlite(data_dir / _FILE)
    try:
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    if not url:
        sync_directory(data_dir)
    return engine


def _postgresql(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "postgresql":
        raise ArgumentError(f"the database is {parsed.get_backend_name()}, and must be PostgreSQL; or give no URL")
    try:
        engine = create_engine(parsed.set(query=_POSTGRESQL_DEFAULTS | dict(parsed.query)), pool_pre_ping=True)
    except ImportError as error:
        raise ArgumentError(f"{error}; PostgreSQL's driver comes with cbp-server[postgresql]") from error
    event.listen(engine, "connect", _configure_postgresql)
    return engine


def _sqlite(file: Path) -> Engine:
    _write_again(file.with_name(f"{file.name}-wal"))
    # SQLite takes one writer at a time; those that it turns away sleep, and may do so for long. A lock wakes them.
    engine = create_engine(URL.create("sqlite", database=str(file)), execution_options={_WRITING: threading.Lock()})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


def _migrate(engine: Engine) -> None:
    """Brings the tables to this version's state, in one transaction."""
    with engine.begin() as connection:
        revision = _revision(connection)
        if revision == newest_revision():
            return
        if engine.dialect.name == "postgresql" and not connection.scalar(
            select(func.pg_try_advisory_xact_lock(_OWNER_LOCK))
        ):
            raise DatabaseInUse  # of another version: its tables are not to change under its feet
        if revision is None:
            METADATA.create_all(connection, checkfirst=False)
            connection.execute(text(f"CREATE TABLE {_NOTE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
            connection.execute(text(f"INSERT INTO {_NOTE} VALUES (:newest)"), {"newest": newest_revision()})
        else:
            _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    # Imported when it has something to do: that takes a third of a second.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "cbp_server.store:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise InvalidRequestError(f"its tables are those of a newer version: {error}") from error


def _revision(connection: Connection) -> str | None:
    """That of the tables, as Alembic notes it; None of an empty database."""
    if not inspect(connection).has_table(_NOTE):
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {_NOTE}"))
    return revision


def newest_revision() -> str:
    """That of this version's tables: migrations are numbered by their files' names."""
    return max(file.name[:4] for file in (Path(__file__).parent / "migrations" / "versions").glob("[0-9]*.py"))


@contextmanager
def transaction(engine: Engine, *, sync: bool = True) -> Iterator[Connection]:
    """One transaction that writes, on disk when the block has ended.

    Args:
        sync: without it, it is handed to the operating system, or on PostgreSQL to the server.
    """
    with engine.get_execution_options().get(_WRITING, nullcontext()), engine.connect() as connection:
        if sync:
            with connection.begin():
                yield connection
        elif engine.dialect.name == "postgresql":
            with connection.begin():
                connection.execute(text("SET LOCAL synchronous_commit TO off"))
                yield connection
        else:
            driver = connection.connection
            _execute(driver, "PRAGMA synchronous=NORMAL")  # refused within a transaction, hence before it begins
            try:
                with connection.begin():
                    yield connection
            finally:
                _execute(driver, "PRAGMA synchronous=FULL")


class Ownership:
    """That this process alone works on the database."""

    def renew(self) -> None:
        """Makes sure of it after the database was away; to be called before anything is read or written again.

        Raises:
            DatabaseInUse: another server has taken the database meanwhile.
            sqlalchemy.exc.SQLAlchemyError: the database is still away.
        """


class _Lock(Ownership):
    """A session's advisory lock, which ends with its connection: with this process, or with the database server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = self._take()

    def renew(self) -> None:
        if self._connection is not None:
            with suppress(DBAPIError):
                self._connection.execute(select(1))
                return
            _end(self._connection)
            self._connection = None
        self._connection = self._take()

    def release(self) -> None:
        if self._connection is not None:
            with suppress(DBAPIError):
                self._connection.execute(select(func.pg_advisory_unlock(_OWNER_LOCK)))
            _end(self._connection)

    def _take(self) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # A host that vanished must not keep the lock for the hours that TCP waits by itself.
            for setting, value in _POSTGRESQL_KEEPALIVES.items():
                connection.execute(select(func.set_config(f"tcp_{setting}", value, False)))
            if not connection.scalar(select(func.pg_try_advisory_lock(_OWNER_LOCK))):
                raise DatabaseInUse
        except BaseException:
            _end(connection)
            raise
        return connection


def _end(connection: Connection) -> None:
    """Without a word to the server, which may not be there, and without a way back into the pool."""
    connection.invalidate()
    connection.close()


@contextmanager
def exclusive(engine: Engine) -> Iterator[Ownership]:
    """Keeps other servers off a PostgreSQL database while the block runs; SQLite's is guarded by its data directory.

    Raises:
        DatabaseInUse: another server has it.
    """
    if engine.dialect.name != "postgresql":
        yield Ownership()
        return
    lock = _Lock(engine)
    try:
        yield lock
    finally:
        lock.release()


def _write_again(log: Path) -> None:
    """Writes what SQLite's log has over itself, and to disk.

    A failed fsync leaves pages that the kernel takes for written and that are not. This is the first use after the
    process that saw it has ended; without this, entries acknowledged from now on could lie behind a hole.
    """
    try:
        file = log.open("r+b")
    except FileNotFoundError:
        return
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            file.seek(-len(chunk), os.SEEK_CUR)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _configure_sqlite(connection: Any, _: object) -> None:
    # Transactions begin where SQLAlchemy says so, and hold table definitions as well (`_begin`).
    connection.isolation_level = None
    for pragma in _SQLITE_SETTINGS:
        _execute(connection, f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _configure_postgresql(connection: Any, _: object) -> None:
    # A server or role set to lose commits must not lose ours; stricter settings (remote_apply) stay.
    _execute(
        connection,
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
    )
    connection.commit()


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()
