"""A server process of the demo's own."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


class ServerStartError(Exception):
    """The server did not start; the text says why."""


@dataclass(frozen=True)
class LocalServer:
    """Where a running server listens."""

    grpc_target: str
    http_url: str


@contextmanager
def local_server(data_dir: Path, log_path: Path) -> Iterator[LocalServer]:
    """Runs `cbp-server` on free ports of 127.0.0.1 until the block ends.

    Raises:
        ServerStartError: `cbp-server` is not installed, or ended before it was ready.
    """
    command = shutil.which("cbp-server", path=str(Path(sys.executable).parent)) or shutil.which("cbp-server")
    if command is None:
        raise ServerStartError("cbp-server is not installed here; install it, or name a running server with --server")
    endpoints = data_dir / "endpoints.json"
    endpoints.unlink(missing_ok=True)  # of a server that was killed
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [command, "--data-dir", str(data_dir), "--grpc-port", "0", "--http-port", "0", "--log-format", "json"],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the demo, which then ends the server in order
        )
    try:
        yield _wait(process, endpoints, log_path)
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


def _wait(process: "subprocess.Popen[bytes]", endpoints: Path, log_path: Path) -> LocalServer:
    deadline = time.monotonic() + _START_SECONDS
    while not endpoints.exists():
        if process.poll() is not None:
            last = log_path.read_text().splitlines()[-1:]
            raise ServerStartError(f"cbp-server ended at once: {''.join(last)}")
        if time.monotonic() > deadline:
            raise ServerStartError(f"cbp-server did not start within {_START_SECONDS:.0f} s; see {log_path}")
        time.sleep(0.05)
    found = json.loads(endpoints.read_text())
    return LocalServer(f"{found['host']}:{found['grpc_port']}", f"http://{found['host']}:{found['http_port']}")
