"""Real servers on real loopback ports, for every test that needs one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["wire"]

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


class ServerProcess:
    """A `cbp-server` process with a data directory of its own, on ports of its own choosing.

    Attributes:
        data_dir: keeps the learners from one start to the next.
        grpc_target: host:port, while it runs.
        http_url: http://host:port, while it runs.
    """

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self.grpc_target = ""
        self.http_url = ""

    def start(self, *flags: str) -> None:
        """Returns when the server is ready. After the first start it keeps its ports."""
        ports = [self.grpc_target.rpartition(":")[2] or "0", self.http_url.rpartition(":")[2] or "0"]
        (self.data_dir / "endpoints.json").unlink(missing_ok=True)  # left behind by a killed server
        with self.log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "cbp_server", "--data-dir", str(self.data_dir), "--log-format", "json",
                    "--grpc-port", ports[0], "--http-port", ports[1], *self._flags, *flags,
                ],
                stderr=log_file, stdout=log_file, env=_environment(),
            )  # fmt: skip
        endpoints = self._wait_for_endpoints()
        self.grpc_target = f"{endpoints['host']}:{endpoints['grpc_port']}"
        self.http_url = f"http://{endpoints['host']}:{endpoints['http_port']}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def log_events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def begin_stop(self) -> None:
        """Sends SIGTERM and returns at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(_STOP_SECONDS)

    def stop(self) -> int:
        """Ends the server in order; its exit status."""
        self.begin_stop()
        return self.wait()

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(_STOP_SECONDS)

    def close(self) -> None:
        """Whatever state it is in: afterwards it does not run."""
        if self._process is not None and self._process.poll() is None:
            self.stop()

    def _wait_for_endpoints(self) -> dict[str, object]:
        assert self._process is not None
        path = self.data_dir / "endpoints.json"
        deadline = time.monotonic() + _START_SECONDS
        while not path.exists():
            if self._process.poll() is not None:
                raise AssertionError(f"cbp-server ended with status {self._process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                self._process.kill()
                raise AssertionError(f"cbp-server did not start:\n{self.log}")
            time.sleep(0.02)
        endpoints: dict[str, object] = json.loads(path.read_text())
        return endpoints


def _environment() -> dict[str, str]:
    """Without settings of the person who runs the tests; warnings in the server are errors as well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CBP_")}
    return environment | {"PYTHONWARNINGS": "error::ResourceWarning,error::DeprecationWarning:cbp_server"}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server shared by all tests; they name their learners with `learner_id` and leave it running."""
    shared = ServerProcess(tmp_path_factory.mktemp("server") / "data")
    shared.start()
    yield shared
    shared.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers for one test, which may stop, kill and start them again. Arguments are flags."""
    started: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        process = ServerProcess(tmp_path / f"server-{len(started)}" / "data", *flags)
        process.data_dir.parent.mkdir()
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.close()


@pytest.fixture
def own_server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server of the test's own, to stop, kill and start again."""
    return start_server()


@pytest.fixture
def learner_id(request: pytest.FixtureRequest) -> str:
    """A learner id that no other test uses."""
    slug = "".join(character if character.isalnum() else "-" for character in request.node.name.lower())
    return f"t-{abs(hash(request.node.nodeid)) % 10**8}-{slug}"[:60].rstrip("-")
