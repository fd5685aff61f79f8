"""Databases for the store: SQLite in a file, and a real PostgreSQL server on loopback that the tests start."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, MetaData

from cbp_server.store.database import open_database
from cbp_server.store.journal import Journal


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database of each kind."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else ""
    engine = open_database(url, tmp_path)
    yield engine
    _drop_tables(engine)
    engine.dispose()


def _drop_tables(engine: Engine) -> None:
    """Leaves the database as if no server had ever used it."""
    tables = MetaData()
    tables.reflect(engine)
    tables.drop_all(engine)


@pytest.fixture
def open_again(database: Engine, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Opens the same database as a second server would."""
    url = "" if database.dialect.name == "sqlite" else database.url.render_as_string(hide_password=False)
    opened: list[Engine] = []

    def open_() -> Engine:
        opened.append(open_database(url, tmp_path))
        return opened[-1]

    yield open_
    for engine in opened:
        engine.dispose()


@pytest.fixture
def journal(database: Engine) -> Journal:
    return Journal(database)


@pytest.fixture
def drop_tables() -> Callable[[Engine], None]:
    return _drop_tables
