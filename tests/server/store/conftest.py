"""Databases for the store: SQLite in a file, and a real PostgreSQL server on loopback that the tests start."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, MetaData

from cbp_server.store.database import open_database
from cbp_server.store.journal import Journal


def _postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    command = shutil.which("initdb")
    return Path(command).parent if command else None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    programs = _postgres_programs()
    if programs is None:
        if os.environ.get("CI") == "true":
            pytest.fail("PostgreSQL is not installed; .ci/run installs it")
        pytest.skip("PostgreSQL's server programs are not installed (Debian: postgresql)")
    # PostgreSQL refuses to run as root, and its user must be able to reach the directory.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    directory = Path(tempfile.mkdtemp(prefix="cbp-postgres-"))
    if user:
        shutil.chown(directory, "postgres")
    data = directory / "data"

    def run(program: str, *arguments: str) -> None:
        subprocess.run([*user, str(programs / program), *arguments], check=True, capture_output=True, cwd=directory)

    try:
        run("initdb", "--pgdata", str(data), "--auth=trust", "--username=cbp", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={directory}"
        run("pg_ctl", "--pgdata", str(data), "--wait", "--log", str(directory / "log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg://cbp@/postgres?host={directory}"
        finally:
            run("pg_ctl", "--pgdata", str(data), "--wait", "--mode=immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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
