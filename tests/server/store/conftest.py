"""Databases for the store: SQLite in a file, and a real PostgreSQL server on loopback that the tests start."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from cbp_server.store.database import open_database
from cbp_server.store.journal import Journal
from cbp_server.store.tables import METADATA


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
    METADATA.drop_all(engine)
    engine.dispose()


@pytest.fixture
def journal(database: Engine) -> Journal:
    return Journal(database)
