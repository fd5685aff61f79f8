"""What the service costs: examples per second over gRPC against the same Learner called in this process.

    python benchmarks/service_throughput.py

Client, front and engine process share the machine, as they would on a laptop. Rounds are interleaved: each round
streams the same messages to the server and feeds them to a Learner here; the table shows medians and the median of the
rounds' ratios. A stream is opened before and flushed within the measured time. It also shows how long one prediction
takes while a stream keeps the engine busy.
"""

import argparse
import asyncio
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbp import Batch, Learner, LearnerSpec
from cbp_client import AsyncClient, AsyncLearner
from cbp_client.demo.local_server import local_server

PREDICTIONS = 100

Message = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Case:
    name: str
    widths: tuple[int, ...]
    batch_size: int
    messages: int  # of 256 examples, in one round
    loss: str = "cross_entropy"

    @property
    def spec(self) -> dict[str, Any]:
        network = {
            "kind": "mlp",
            "in_features": self.widths[0],
            "hidden": list(self.widths[1:-1]),
            "out_features": self.widths[-1],
        }
        optimizer = {"kind": "sgd", "lr": 0.01}
        return {"network": network, "loss": self.loss, "optimizer": optimizer, "batch_size": self.batch_size}

    def make_messages(self, size: int) -> list[Message]:
        generator = np.random.default_rng(0)
        made = []
        for _ in range(self.messages):
            features = generator.normal(size=(size, self.widths[0])).astype(np.float32)
            if self.loss == "cross_entropy":
                made.append((features, generator.integers(0, self.widths[-1], size)))
            else:
                made.append((features, generator.normal(size=(size, self.widths[-1])).astype(np.float32)))
        return made


CASES = (
    Case("A", (20, 5, 1), 1, 20, "mse"),
    Case("D", (64, 64, 64, 10), 16, 150),
    Case("C", (784, 100, 100, 100, 10), 16, 100),
)


async def over_the_wire(learner: AsyncLearner, messages: list[Message]) -> float:
    """Seconds from the first message to the last acknowledgement."""
    async with learner.stream("benchmark") as stream:
        started = time.perf_counter()
        for features, targets in messages:
            await stream.send(features, targets)
        await stream.flush()
        return time.perf_counter() - started


def in_process(learner: Learner, messages: list[Message]) -> float:
    started = time.perf_counter()
    for features, targets in messages:
        learner.train(Batch.validate(learner.spec, features, targets))
    return time.perf_counter() - started


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
        for case in CASES:
            remote = await client.create_learner(f"net-{case.name.lower()}", **case.spec)
            local = Learner(LearnerSpec.parse(case.spec))
            messages = case.make_messages(size)
            in_process(local, messages[:2])
            await over_the_wire(remote, messages[:2])
            pairs = [(await over_the_wire(remote, messages), in_process(local, messages)) for _ in range(rounds)]
            count = size * len(messages)
            ratio = statistics.median(here / wire for wire, here in pairs)
            rates = [count / statistics.median(column) for column in zip(*pairs, strict=True)]
            latencies = sorted(await prediction_latencies(remote, messages[:2]))
            p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
            shape = "-".join(map(str, case.widths)) + f" b{case.batch_size}"
            show(
                f"{case.name} {shape:<26}{rates[0]:>14,.0f}{rates[1]:>18,.0f}{ratio:>8.2f}"
                f"{1e3 * p50:>10.1f} ms{1e3 * p99:>6.1f} ms"
            )
            await remote.delete()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--message-size", type=int, default=256, help="examples a message")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one engine thread")
    print(f"{arguments.message_size} examples a message, medians of {arguments.rounds} interleaved rounds\n")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with local_server(path / "data", path / "server.log") as server:
            asyncio.run(measure(server.grpc_target, arguments.message_size, arguments.rounds, print))


if __name__ == "__main__":
    main()
