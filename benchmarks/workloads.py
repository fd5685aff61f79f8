"""The nets that the benchmarks of the service train, the messages they are sent, and both ways to train them."""

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbp import Batch, Learner
from cbp_client import AsyncLearner

Message = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Net:
    name: str
    widths: tuple[int, ...]
    batch_size: int
    loss: str = "cross_entropy"
    optimizer: str = "sgd"

    @property
    def shape(self) -> str:
        return f"{self.name} {'-'.join(map(str, self.widths))} b{self.batch_size}"

    @property
    def spec(self) -> dict[str, Any]:
        network = {
            "kind": "mlp",
            "in_features": self.widths[0],
            "hidden": list(self.widths[1:-1]),
            "out_features": self.widths[-1],
        }
        optimizer = {"kind": self.optimizer, "lr": 0.01 if self.optimizer == "sgd" else 1e-4}
        return {"network": network, "loss": self.loss, "optimizer": optimizer, "batch_size": self.batch_size}

    def make_messages(self, count: int, size: int) -> list[Message]:
        """`count` messages of `size` examples."""
        generator = np.random.default_rng(0)
        made = []
        for _ in range(count):
            features = generator.normal(size=(size, self.widths[0])).astype(np.float32)
            if self.loss == "cross_entropy":
                made.append((features, generator.integers(0, self.widths[-1], size)))
            else:
                made.append((features, generator.normal(size=(size, self.widths[-1])).astype(np.float32)))
        return made


A = Net("A", (20, 5, 1), 1, "mse")
D = Net("D", (64, 64, 64, 10), 16)
C = Net("C", (784, 100, 100, 100, 10), 16)
#: Adam's moments, the initial weights and the weights: 150 MB.
L = Net("L", (784, 2000, 2000, 2000, 10), 16, optimizer="adam")


@dataclass(frozen=True)
class Streamed:
    """Messages that were sent and acknowledged.

    Attributes:
        seconds: from the first message to the last acknowledgement.
        longest_gap: seconds between two acknowledgements.
    """

    seconds: float
    longest_gap: float


async def over_the_wire(learner: AsyncLearner, messages: Sequence[Message], count: int = 0) -> Streamed:
    """Streams the messages, or `count` of them over and over."""
    acknowledged: list[float] = []
    options: dict[str, Any] = {"on_result": lambda _: acknowledged.append(time.perf_counter())}
    async with learner.stream("benchmark", **options) as stream:
        started = time.perf_counter()
        for features, targets in islice(cycle(messages), count or len(messages)):
            await stream.send(features, targets)
        await stream.flush()
        seconds = time.perf_counter() - started
    gaps = [after - before for before, after in pairwise(acknowledged)]
    return Streamed(seconds, max(gaps, default=0.0))


def in_process(learner: Learner, messages: Sequence[Message]) -> float:
    """Seconds to check and learn the messages."""
    started = time.perf_counter()
    for features, targets in messages:
        learner.train(Batch.validate(learner.spec, features, targets))
    return time.perf_counter() - started


def machine() -> str:
    """What the figures were taken on, as far as it can be asked."""
    model = platform.machine()
    with suppress(OSError):  # not Linux
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return (
        f"{os.cpu_count()} × {model}, Python {platform.python_version()}, torch {torch.__version__}, one engine thread"
    )
