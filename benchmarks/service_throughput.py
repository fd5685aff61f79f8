"""What the service costs: examples per second over gRPC against the same Learner called in this process.

    python benchmarks/service_throughput.py

Client, front and engine process share the machine, as they would on a laptop. Rounds are interleaved: each round
streams the same messages to the server and feeds them to a Learner here; the table shows medians and the median of the
rounds' ratios. A stream is opened before and flushed within the measured time. It also shows how long one prediction
takes while a stream keeps the engine busy.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workloads import A, C, D, Message, in_process, machine, over_the_wire

from cbp import Learner, LearnerSpec
from cbp_client import AsyncClient, AsyncLearner
from cbp_client.demo.local_server import local_server

PREDICTIONS = 100

#: Nets, and messages of 256 examples in one round.
CASES = ((A, 20), (D, 150), (C, 100))


async def prediction_latencies(learner: AsyncLearner, messages: list[Message]) -> list[float]:
    """Seconds of each prediction of one example while a stream keeps the engine busy."""
    busy = True

    async def keep_busy() -> None:
        async with learner.stream("benchmark") as stream:
            while busy:
                for features, targets in messages:
                    await stream.send(features, targets)

    feeding = asyncio.create_task(keep_busy())
    probe = messages[0][0][:1]
    latencies = []
    while learner.info.progress.step == 0:
        await learner.refresh()
    for _ in range(PREDICTIONS):
        started = time.perf_counter()
        await learner.predict(probe)
        latencies.append(time.perf_counter() - started)
    busy = False
    await feeding
    return latencies


async def measure(target: str, size: int, rounds: int, show: Callable[[str], None]) -> None:
    async with AsyncClient(target) as client:
        show(f"{'net':<28}{'service ex/s':>14}{'in process ex/s':>18}{'ratio':>8}{'predict p50':>13}{'p99':>9}")
        for net, count in CASES:
            remote = await client.create_learner(f"net-{net.name.lower()}", **net.spec)
            local = Learner(LearnerSpec.parse(net.spec))
            messages = net.make_messages(count, size)
            in_process(local, messages[:2])
            await over_the_wire(remote, messages[:2])
            pairs = [
                ((await over_the_wire(remote, messages)).seconds, in_process(local, messages)) for _ in range(rounds)
            ]
            ratio = statistics.median(here / wire for wire, here in pairs)
            rates = [size * count / statistics.median(column) for column in zip(*pairs, strict=True)]
            latencies = sorted(await prediction_latencies(remote, messages[:2]))
            p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
            show(
                f"{net.shape:<28}{rates[0]:>14,.0f}{rates[1]:>18,.0f}{ratio:>8.2f}"
                f"{1e3 * p50:>10.1f} ms{1e3 * p99:>6.1f} ms"
            )
            await remote.delete()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--message-size", type=int, default=256, help="examples a message")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(f"{arguments.message_size} examples a message, medians of {arguments.rounds} interleaved rounds\n")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with local_server(path / "data", path / "server.log") as server:
            asyncio.run(measure(server.grpc_target, arguments.message_size, arguments.rounds, print))


if __name__ == "__main__":
    main()
