"""A real PostgreSQL server on a socket of its own, for tests that need one."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest


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
