"""Databases for the store: SQLite in a file, and a real PostgreSQL server on loopback that the tests start."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


class PostgresServer:
    """A server of its own data directory, on a socket in it."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # PostgreSQL refuses to run as root, and its user must be able to reach the directory.
        self._user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._directory = Path(tempfile.mkdtemp(prefix="cbp-postgres-"))
        if self._user:
            shutil.chown(self._directory, "postgres")
        self._data = str(self._directory / "data")
        self._run("initdb", "--pgdata", self._data, "--auth=trust", "--username=cbp", "--no-sync")
        self.url = f"postgresql+psycopg://cbp@/postgres?host={self._directory}"

    def start(self, **settings: str) -> None:
        """Returns when it answers. `settings` are of postgresql.conf."""
        settings |= {"listen_addresses": "", "unix_socket_directories": str(self._directory)}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        log = str(self._directory / "log")
        self._run("pg_ctl", "--pgdata", self._data, "--wait", "--log", log, "-o", options, "start")

    def stop(self) -> None:
        """As a crash does: connections are lost, and the next start recovers."""
        self._run("pg_ctl", "--pgdata", self._data, "--wait", "--mode=immediate", "stop")

    def close(self) -> None:
        """Stops it if it runs, and removes everything."""
        if (self._directory / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._user, str(self._programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._directory)


@pytest.fixture(scope="session")
def make_postgres() -> Iterator[Callable[[], PostgresServer]]:
    """Makes servers that are removed at the end."""
    programs = _postgres_programs()
    if programs is None:
        if os.environ.get("CI") == "true":
            pytest.fail("PostgreSQL is not installed; .ci/run installs it")
        pytest.skip("PostgreSQL's server programs are not installed (Debian: postgresql)")
    with ExitStack() as closing:

        def make() -> PostgresServer:
            server = PostgresServer(programs)
            closing.callback(server.close)
            return server

        yield make


@pytest.fixture(scope="session")
def postgres_url(make_postgres: Callable[[], PostgresServer]) -> str:
    """A server for all tests, which runs throughout."""
    server = make_postgres()
    server.start()
    return server.url


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
