"""Claim: ten thousand learners of net A live in one process.

    python benchmarks/many_learners.py [--quick] [--full]

Each learner has learnt two messages, so that whatever it makes when it is first used is there, and all stay alive to
the end. Memory is the resident set, of a fresh process per engine. With --full also on a server, for its front and its
engine process: that takes minutes, for every creation is a transaction.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from workloads import (
    MALLOC,
    A,
    in_process,
    machine,
    one_thread,
    over_the_wire,
    print_table,
    server_pid,
    server_with,
    verdict,
)

from cbp import Learner, compile_ahead
from cbp.engines.names import EngineName, PerceptronEngineName
from cbp_client import AsyncClient

TARGET = 4 * 2**30
AT_ONCE = 16
"""Requests under way while learners are made."""


def in_this_process(engine: EngineName, count: int) -> list[str]:
    spec = A.learner_spec()
    messages = A.make_messages(2, 2)
    one_thread()
    if engine == "compiled":
        compile_ahead()
    in_process(Learner(spec, engine=engine), messages)
    gc.collect()
    before, started = resident_bytes(os.getpid()), time.perf_counter()
    learners = [Learner(spec, engine=engine) for _ in range(count)]
    made = time.perf_counter() - started
    for learner in learners:
        in_process(learner, messages)
    after = resident_bytes(os.getpid())
    return row(f"Learner, {engine} engine", count, count / made, after, after - before)


async def on_a_server(count: int, directory: Path) -> list[list[str]]:
    messages = A.make_messages(2, 2)
    gate = asyncio.Semaphore(AT_ONCE)
    with server_with(directory, max_live_learners=0, evict_after=0, max_learners=count + 1) as server:
        async with AsyncClient(server.grpc_target) as client:

            async def make(number: int) -> None:
                async with gate:
                    learner = await client.create_learner(f"learner-{number}", **A.spec)
                    await over_the_wire(learner, messages)

            await make(count)
            before = server_bytes(directory, server.http_url)
            started = time.perf_counter()
            await asyncio.gather(*(make(number) for number in range(count)))
            rate = count / (time.perf_counter() - started)
            after = server_bytes(directory, server.http_url)
    total_before, total = sum(before.values()), sum(after.values())
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in after.items())
    return [row(f"server ({parts}), made and streamed to", count, rate, total, total - total_before)]


def server_bytes(directory: Path, http_url: str) -> dict[str, int]:
    """Resident bytes of the server's processes."""
    with urllib.request.urlopen(f"{http_url}/v1/server") as response:
        engine = json.load(response)["engine"]["resident_bytes"]
    return {"front": resident_bytes(server_pid(directory)), "engine": engine}


def row(what: str, count: int, rate: float, total: int, grown: int) -> list[str]:
    return [
        what,
        f"{count:,}",
        f"{rate:,.0f}",
        f"{total / 2**20:,.0f} MiB",
        f"{grown / count / 2**10:,.1f} KiB",
        verdict({f"< {TARGET / 2**30:.0f} GiB": total < TARGET}),
    ]


def resident_bytes(pid: int) -> int:
    """As Linux counts them."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rows(count: int, full: bool) -> Iterator[list[str]]:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for engine in get_args(PerceptronEngineName):
            yield fresh.apply(in_this_process, (engine, count))
    if full:
        with tempfile.TemporaryDirectory() as directory:
            yield from asyncio.run(on_a_server(count, Path(directory)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs: fewer learners")
    parser.add_argument("--full", action="store_true", help="on a server, too")
    arguments = parser.parse_args()
    count = 50 if arguments.quick else 10_000
    for name in MALLOC:
        os.environ.pop(name, None)  # what they keep back would count
    print(machine(), flush=True)
    print_table(
        f"Learners of net {A.shape} alive at once",
        ["where", "learners", "made a second", "memory in all", "each", "target"],
        list(rows(count, arguments.full)),
    )


if __name__ == "__main__":
    main()
