"""Real servers on real loopback ports, for every test that needs one."""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the server has it; before torch is imported

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from server_process import ServerProcess

from cbp import compile_ahead, compiled_before

pytest_plugins = ["postgres", "wire"]


def pytest_configure(config: pytest.Config) -> None:
    """Compiles the engine's code, so that learners have it from the start; with several workers before they start."""
    if not hasattr(config, "workerinput") and not compiled_before():
        compile_ahead()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server shared by all tests; they name their learners with `learner_id` and leave it running."""
    shared = ServerProcess(tmp_path_factory.mktemp("server") / "data")
    shared.start()
    yield shared
    shared.close()


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers for one test, which may stop, kill and start them again. Arguments are flags."""
    started: list[ServerProcess] = []
    marker = request.node.get_closest_marker("server_flags")
    common = marker.args if marker is not None else ()

    def start(*flags: str) -> ServerProcess:
        process = ServerProcess(tmp_path / f"server-{len(started)}" / "data", *common, *flags)
        process.data_dir.parent.mkdir()
        started.append(process)
        process.start()
        return process

    yield start
    with ExitStack() as closing:  # all of them, also if one fails
        for process in started:
            closing.callback(process.close)


@pytest.fixture
def own_server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server of the test's own, to stop, kill and start again."""
    return start_server()


@pytest.fixture
def learner_id(request: pytest.FixtureRequest) -> str:
    """A learner id that no other test uses."""
    slug = "".join(character if character.isascii() and character.isalnum() else "-" for character in request.node.name)
    return f"t-{zlib.crc32(request.node.nodeid.encode()):08x}-{slug.lower()}"[:60].rstrip("-")
