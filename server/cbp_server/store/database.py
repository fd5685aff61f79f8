"""Opens the store's database: SQLite in the data directory, or PostgreSQL by a URL."""

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url

from cbp_server.store.tables import METADATA

_FILE = "journal.db"


def open_database(url: str, data_dir: Path) -> Engine:
    """The database at `url`, empty for SQLite in `data_dir`, with its tables made if they are missing.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it cannot be reached or written.
    """
    engine = create_engine(make_url(url) if url else f"sqlite:///{data_dir / _FILE}")
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
    METADATA.create_all(engine)
    return engine


def _configure_sqlite(connection: Any, _: object) -> None:
    # WAL: readers do not wait for the writer. FULL: a commit returns when the log is fsynced, which is the promise.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")
