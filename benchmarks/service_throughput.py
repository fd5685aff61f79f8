"""Claim: a learner behind the service learns nearly as fast as one in this process, or as messages can be exchanged.

    python benchmarks/service_throughput.py [--quick]

Client, front and engine process share the machine, as they would on a laptop. Measured in turns, per net: the service
with durability "none" and "fsync"; a Learner in this process, of the engine that the server uses, which checks and
learns the same messages; and a bare grpc.aio echo in a process of its own, which is sent the same serialised messages
and answers each with 16 bytes. The ceiling is the lower of the last two.

A stream is opened before and flushed within the measured time. Plasticity samples are taken as often as by default, and
of net A also never, which leaves the service least to hide behind. Client, echo and the Learner here run with malloc
set as `workloads.MALLOC` says; the server as it starts by itself.
"""

import argparse
import asyncio
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from echo import Echo, echo_server
from workloads import (
    A,
    B,
    C,
    D,
    Deal,
    Net,
    Rounds,
    as_hosted,
    in_process,
    interleaved_messages,
    machine,
    one_thread,
    print_table,
    server_with,
    streaming,
    verdict,
    with_malloc_set,
)

from cbp_client import AsyncClient
from cbp_client.examples import examples_of

NONE, FSYNC, HERE, ECHO = "service, none", "service, fsync", "in process", "bare echo"
TARGET = 0.8

POOL_BYTES = 2**24
"""Different messages, at most twenty, sent over and over."""


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    """Of one turn."""
    cases: tuple[tuple[Net, int], ...]
    """Nets, and examples in a message."""


FULL = Effort(5, 0.8, ((A, 256), (A.unmonitored, 256), (D, 256), (C, 256), (B, 16)))
QUICK = Effort(1, 0.01, ((A, 2), (C, 16)))


async def measure(net: Net, size: int, effort: Effort, client: AsyncClient, echo: Echo) -> tuple[Rounds, str]:
    """By the message; and the engine of the Learner here."""
    bytes_each = 4 * size * net.widths[0]
    messages = net.make_messages(min(20, 1 + POOL_BYTES // bytes_each), size)
    serialized = [examples_of(*message, None).encode(task="", return_outputs=False).encoded for message in messages]
    unsaved = await client.create_learner(f"{net.name.lower()}-none", durability="none", **net.spec)
    saved = await client.create_learner(f"{net.name.lower()}-fsync", durability="fsync", **net.spec)
    here = as_hosted(net)

    async def learn_here(count: int) -> float:
        return in_process(here, messages, count)

    deals: dict[str, Deal] = {
        NONE: streaming(unsaved, messages),
        FSYNC: streaming(saved, messages),
        HERE: learn_here,
        ECHO: partial(echo.exchange, serialized),
    }
    measured = await interleaved_messages(deals, effort.rounds, effort.seconds)
    for learner in (unsaved, saved):
        await learner.delete()
    return measured, here.engine


def row(net: Net, size: int, measured: Rounds, engine: str) -> list[str]:
    ceiling = min(HERE, ECHO, key=measured.rate)
    shares = {name: measured.times_as_fast(name, ceiling) for name in (NONE, FSYNC)}
    return [
        net.shape if net.sample_interval else f"{net.shape}, no samples",
        str(size),
        *(f"{size * measured.rate(name):,.0f}" for name in (NONE, FSYNC)),
        f"{size * measured.rate(HERE):,.0f} ({engine})",
        f"{size * measured.rate(ECHO):,.0f}",
        f"{shares[NONE]:.2f} of {ceiling}",
        f"{shares[FSYNC]:.2f}",
        verdict({f"≥ {TARGET:.0%}": shares[NONE] >= TARGET}),
    ]


async def measure_all(target: str, echo_target: str, effort: Effort) -> list[list[str]]:
    echo = Echo(echo_target)
    try:
        async with AsyncClient(target) as client:
            return [row(net, size, *await measure(net, size, effort, client, echo)) for net, size in effort.cases]
    finally:
        await echo.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with_malloc_set()
    one_thread()
    print(f"{machine()}\nmedians of {effort.rounds} interleaved rounds", flush=True)
    with tempfile.TemporaryDirectory() as directory, server_with(Path(directory)) as server, echo_server() as echo:
        rows = asyncio.run(measure_all(server.grpc_target, echo, effort))
    columns = ["net", "a message", NONE, FSYNC, HERE, ECHO, "none of the ceiling", "fsync of it", "target"]
    print_table(
        "Examples per second end to end, and as a share of the lower of in process and bare echo", columns, rows
    )


if __name__ == "__main__":
    main()
