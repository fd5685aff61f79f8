"""Opens the store's database: SQLite in the data directory, or PostgreSQL by a URL."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import DBAPIError

from cbp_server.store.directories import sync_directory

_FILE = "journal.db"
_CHUNK_BYTES = 2**20

#: Key of the advisory lock on a PostgreSQL database; all its users share one space of numbers.
_OWNER_LOCK = 0x6362705F6F776E65

#: s, s, and how often; after that the other side is given up.
_POSTGRESQL_KEEPALIVES = {"keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3"}

#: Settings of connections, in s and ms, so that a database that is cut off is noticed; what the URL says goes first.
_POSTGRESQL_DEFAULTS = {"connect_timeout": "10", "tcp_user_timeout": "30000", **_POSTGRESQL_KEEPALIVES}


class DatabaseInUse(Exception):
    """Another server works on this database."""

    def __init__(self) -> None:
        super().__init__("another server uses this database; give each its own, or stop that one")


def open_database(url: str, data_dir: Path) -> Engine:
    """The database at `url`, empty for SQLite in `data_dir`, with its tables as this version has them.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it cannot be reached or written.
        alembic.util.CommandError: a newer version has changed its tables.
        DatabaseInUse: its tables are an older version's, and a server works on them.
        OSError: the file in `data_dir` cannot be written.
    """
    if not url:
        _write_again(data_dir / f"{_FILE}-wal")
    parsed = make_url(url) if url else make_url("sqlite://").set(database=str(data_dir / _FILE))
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite:
        engine = create_engine(parsed)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin)
    else:
        engine = create_engine(_with_defaults(parsed), pool_pre_ping=True)
        event.listen(engine, "connect", _configure_postgresql)
    try:
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    if sqlite and not url:
        sync_directory(data_dir)
    return engine


def _migrate(engine: Engine) -> None:
    """Brings the tables to this version's state, in one transaction."""
    config = Config()
    config.set_main_option("script_location", "cbp_server.store:migrations")
    with engine.begin() as connection:
        if MigrationContext.configure(connection).get_current_revision() == _newest(config):
            return
        if engine.dialect.name == "postgresql" and not connection.scalar(
            select(func.pg_try_advisory_xact_lock(_OWNER_LOCK))
        ):
            raise DatabaseInUse  # of another version: its tables are not to change under its feet
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _newest(config: Config) -> str | None:
    return ScriptDirectory.from_config(config).get_current_head()


@contextmanager
def transaction(engine: Engine, *, sync: bool = True) -> Iterator[Connection]:
    """One transaction, on disk when the block has ended; without `sync` handed to the operating system, or on
    PostgreSQL to the server.
    """
    if sync:
        with engine.begin() as connection:
            yield connection
    elif engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL synchronous_commit TO off"))
            yield connection
    else:
        with engine.connect() as connection:
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


def _with_defaults(url: URL) -> URL:
    return url.set(query=_POSTGRESQL_DEFAULTS | dict(url.query))


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
    # WAL: readers do not wait for the writer. FULL: a commit returns when the log is fsynced, which is the promise.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
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
