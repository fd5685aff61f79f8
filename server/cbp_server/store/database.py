"""Opens the store's database: SQLite in the data directory, or PostgreSQL by a URL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text

from cbp_server.store.directories import sync_directory

_FILE = "journal.db"

#: Keys of PostgreSQL's advisory locks, which are one number space for the whole database.
_MIGRATION_LOCK = 0x6362705F6D696772
_OWNER_LOCK = 0x6362705F6F776E65

#: A database host that does not answer is given up after these; what the operator's URL says goes first.
_POSTGRESQL_DEFAULTS = {
    "connect_timeout": "10",  # s
    "keepalives_idle": "15",  # s
    "keepalives_interval": "5",  # s
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # ms
}


class DatabaseInUse(Exception):
    """Another server works on this database."""

    def __init__(self) -> None:
        super().__init__("another server uses this database; give each its own, or stop that one")


def open_database(url: str, data_dir: Path) -> Engine:
    """The database at `url`, empty for SQLite in `data_dir`, with its tables as this version has them.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it cannot be reached or written.
        alembic.util.CommandError: a newer version has changed its tables.
    """
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
        if engine.dialect.name == "postgresql":  # servers that start at once wait for each other here
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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


@contextmanager
def exclusive(engine: Engine) -> Iterator[None]:
    """Keeps other servers off a PostgreSQL database while the block runs; SQLite's is guarded by its data directory.

    The lock ends with its connection, so also with the process or the database server.

    Raises:
        DatabaseInUse: another server has it.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _OWNER_LOCK}).scalar():
            raise DatabaseInUse
        try:
            yield
        finally:
            connection.invalidate()  # closes it, which gives the lock back even if the server is not there to ask


def _with_defaults(url: URL) -> URL:
    return url.set(query=_POSTGRESQL_DEFAULTS | dict(url.query))


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
