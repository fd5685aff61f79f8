"""Claim: with compiled code on disk a server is ready two seconds after its start, and a start costs little.

    python benchmarks/server_start.py [--quick]

From the start of the process to the first 200 of /readyz, with an empty data directory and with one used before. What
the processes have cost by then is their processor time, as Linux counts it.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from workloads import machine, print_table, verdict

from cbp import compile_ahead

TARGET = 2.0
"""Seconds."""


def start(directory: Path) -> tuple[float, float, float]:
    """Seconds until it is ready, and processor seconds of front and engine."""
    grpc_port, http_port = free_port(), free_port()
    command = ["-m", "cbp_server", "--data-dir", str(directory), "--log-level", "error"]
    started = time.perf_counter()
    front = subprocess.Popen([sys.executable, *command, "--grpc-port", grpc_port, "--http-port", http_port])
    try:
        while not is_ready(f"http://127.0.0.1:{http_port}/readyz"):
            assert front.poll() is None, "the server has ended"
            time.sleep(0.01)
        ready = time.perf_counter() - started
        [engine] = children_of(front.pid)
        return ready, processor_seconds(front.pid), processor_seconds(engine)
    finally:
        front.send_signal(signal.SIGTERM)
        front.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(what: str, starts: list[tuple[float, float, float]]) -> list[str]:
    ready, front, engine = (statistics.median(each) for each in zip(*starts, strict=True))
    fastest = min(each[0] for each in starts)
    return [
        what,
        f"{ready:.2f} s",
        f"{fastest:.2f} s",
        f"{front:.2f} s",
        f"{engine:.2f} s",
        verdict({f"≤ {TARGET:.0f} s": ready <= TARGET}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start each, to see that it runs")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    compile_ahead()
    first, again = [], []
    for _ in range(1 if arguments.quick else 7):
        with tempfile.TemporaryDirectory() as directory:
            first.append(start(Path(directory)))
            again.append(start(Path(directory)))
    print_table(
        "From a server's start to its first 200 of /readyz, medians",
        ["data directory", "ready after", "fastest", "front's processor", "engine's processor", "target"],
        [row("empty", first), row("used before", again)],
    )


if __name__ == "__main__":
    main()
