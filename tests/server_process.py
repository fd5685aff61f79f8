"""A real server in a process of its own, as tests start, stop and kill it."""

import json
import os
import pkgutil
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cbp
import cbp_proto
import cbp_server
from cbp_server.process.addresses import with_port

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_FIRST_EPHEMERAL_PORT = 32_768
#: What Python writes of itself about exceptions that nobody took.
_COMPLAINTS = (
    "Traceback (most recent call last)",
    "Exception ignored in",
    "was never retrieved",
    "was never awaited",
    "was destroyed but it is pending",
)


def _own_ports() -> Iterator[int]:
    """Ports that no other process of these tests tries, each once."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(10_000 + worker, _FIRST_EPHEMERAL_PORT, workers)
    return iter(secrets.SystemRandom().sample(ports, len(ports)))


_ports = _own_ports()


def lasting_port() -> int:
    """A free port that stays free while its server is down: none that the system gives to whoever asks for any."""
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports have been tried")


class ServerProcess:
    """A `cbp-server` process with a data directory of its own, on ports of its own choosing.

    Attributes:
        data_dir: keeps the learners from one start to the next.
        grpc_target: host:port, while it runs.
        http_url: http://host:port, while it runs.
    """

    def __init__(self, data_dir: Path, *flags: str, log_path: Path | None = None) -> None:
        self.data_dir = data_dir
        self.log_path = log_path or data_dir.with_name(data_dir.name + ".log")
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._tolerated: set[str] = set()
        self.grpc_target = ""
        self.http_url = ""

    def start(self, *flags: str) -> None:
        """Returns when the server is ready. After the first start it keeps its ports."""
        self.launch(*flags)
        self.wait_until_ready()

    def launch(self, *flags: str) -> None:
        """Starts the process and returns at once."""
        ports = [target.rpartition(":")[2] or str(lasting_port()) for target in (self.grpc_target, self.http_url)]
        (self.data_dir / "endpoints.json").unlink(missing_ok=True)  # left behind by a killed server
        with self.log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "cbp_server", "--data-dir", str(self.data_dir), "--log-format", "json",
                    "--grpc-port", ports[0], "--http-port", ports[1], *self._flags, *flags,
                ],
                stderr=log_file, stdout=log_file, env=self.environment(),
            )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of the process: without settings of the person who runs the tests, and with our own warnings as errors."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CBP_", "MKL_"))}
        filters = ["error::ResourceWarning", *(f"error:::{module}" for module in ("__main__", *_own_modules()))]
        return environment | {"PYTHONWARNINGS": ",".join(filters)}

    def wait_until_ready(self) -> None:
        """Fails if the process ends instead."""
        endpoints = self._wait_for_endpoints()
        host = str(endpoints["host"])
        self.grpc_target = with_port(host, int(str(endpoints["grpc_port"])))
        self.http_url = f"http://{with_port(host, int(str(endpoints['http_port'])))}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def log_events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def tolerate(self, event: str) -> None:
        """The test provokes the log event `event`: the exception that is logged with it is no failure."""
        self._tolerated.add(event)

    def log_problems(self) -> list[str]:
        """Lines of the log that a healthy server does not write: exceptions, and complaints of Python itself."""
        return [line for line in self.log.splitlines() if self._is_problem(line)]

    def _is_problem(self, line: str) -> bool:
        if not line.startswith("{"):
            return any(complaint in line for complaint in _COMPLAINTS)
        record = json.loads(line)
        if record["event"] in self._tolerated:
            return False
        return "exception" in record or any(complaint in record["event"] for complaint in _COMPLAINTS)

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
        """Whatever state it is in: afterwards it does not run. Fails if its log tells of a failure."""
        if self.running:
            self.stop()
        problems = self.log_problems()
        assert not problems, "the server's log tells of failures:\n" + "\n".join(problems)

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


def _own_modules() -> Iterator[str]:
    """A filter in PYTHONWARNINGS holds for one module, not for what is in a package."""
    for package in (cbp, cbp_proto, cbp_server):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until `condition` holds, for what no event tells of."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def engine_pid(server: ServerProcess) -> int:
    """Of the engine process that came up last."""
    return [int(str(event["pid"])) for event in server.log_events() if event["event"] == "engine process ready"][-1]
