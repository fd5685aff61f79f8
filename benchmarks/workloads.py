"""What the benchmarks have in common: the nets, their messages, both ways to train them, servers, turns and tables."""

import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import torch

from cbp import Batch, Learner, LearnerSpec
from cbp_client import AsyncLearner
from cbp_client.demo.local_server import LocalServer, local_server

Message = tuple[np.ndarray, np.ndarray]
#: Deals with so many messages; the seconds that it took.
Deal = Callable[[int], Awaitable[float]]

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
"""Without these every large tensor is mapped and unmapped anew, and an eager loop on net B takes two to three times as
long."""

# -- nets --


@dataclass(frozen=True)
class Net:
    name: str
    widths: tuple[int, ...]
    batch_size: int
    loss: str = "cross_entropy"
    optimizer: str = "sgd"
    replacement_rate: float = 1e-4
    sample_interval: int = 1000
    """Steps between two plasticity samples, by default as a learner has it; 0 takes none."""

    @property
    def shape(self) -> str:
        return f"{self.name} {'-'.join(map(str, self.widths))} b{self.batch_size}"

    @property
    def parameter_count(self) -> int:
        """Weights and biases."""
        return sum((into + 1) * out for into, out in pairwise(self.widths))

    @property
    def spec(self) -> dict[str, Any]:
        """Of a learner with resets in all layers by the default utility, adaptable_contribution."""
        network = {
            "kind": "mlp",
            "in_features": self.widths[0],
            "hidden": list(self.widths[1:-1]),
            "out_features": self.widths[-1],
        }
        return {
            "network": network,
            "loss": self.loss,
            "optimizer": {"kind": self.optimizer, "lr": 0.01 if self.optimizer == "sgd" else 1e-4},
            "batch_size": self.batch_size,
            "resets": {"replacement_rate": self.replacement_rate},
            "monitoring": {"interval": self.sample_interval},
        }

    @property
    def unmonitored(self) -> "Net":
        """Without plasticity samples: one takes as long as hundreds of compiled steps of net A."""
        return replace(self, sample_interval=0)

    def learner_spec(self, seed: int = 0) -> LearnerSpec:
        return LearnerSpec.parse(self.spec | {"seed": seed})

    def make_messages(self, count: int, size: int, seed: int = 0) -> list[Message]:
        """`count` messages of `size` examples."""
        generator = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            features = generator.normal(size=(size, self.widths[0])).astype(np.float32)
            if self.loss == "cross_entropy":
                made.append((features, generator.integers(0, self.widths[-1], size)))
            else:
                made.append((features, generator.normal(size=(size, self.widths[-1])).astype(np.float32)))
        return made


A = Net("A", (20, 5, 1), 1, "mse", replacement_rate=1e-3)
D = Net("D", (64, 64, 64, 10), 16)
C = Net("C", (784, 100, 100, 100, 10), 16)
B = Net("B", (784, 2000, 2000, 2000, 10), 1)
#: Adam's moments, the initial weights and the weights: 150 MB.
L = Net("L", (784, 2000, 2000, 2000, 10), 16, optimizer="adam")


# -- training --


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


def streaming(learner: AsyncLearner, messages: Sequence[Message]) -> Deal:
    """`over_the_wire` in turns."""

    async def stream(count: int) -> float:
        return (await over_the_wire(learner, messages, count)).seconds

    return stream


def as_hosted(net: Net) -> Learner:
    """A learner in this process, of the engine that a server runs it on."""
    return Learner(net.learner_spec(), engine="auto")


def in_process(learner: Learner, messages: Sequence[Message], count: int = 0) -> float:
    """Seconds to check and learn the messages, or `count` of them over and over."""
    started = time.perf_counter()
    for features, targets in islice(cycle(messages), count or len(messages)):
        learner.train(Batch.validate(learner.spec, features, targets))
    return time.perf_counter() - started


# -- servers --


@contextmanager
def server_with(directory: Path, **settings: object) -> Iterator[LocalServer]:
    """A server on what `directory` holds, with these settings of `cbp-server`; malloc is as a user's server has it."""
    variables = {f"CBP_{name.upper()}": str(value) for name, value in settings.items()}
    with ExitStack() as stack:
        with mock.patch.dict(os.environ, variables):
            for name in MALLOC:
                os.environ.pop(name, None)
            server = stack.enter_context(local_server(directory / "data", directory / "server.log"))
        yield server


def server_pid(directory: Path) -> int:
    """The front process of the server on `directory`."""
    return int(json.loads((directory / "data" / "endpoints.json").read_text())["pid"])


def kill_server(directory: Path) -> None:
    """kill -9 for the server on `directory`."""
    os.kill(server_pid(directory), signal.SIGKILL)


# -- turns --


class Rounds:
    """Seconds per unit of work of several contenders, by round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self._seconds = seconds

    def rate(self, name: str) -> float:
        """Median units of work a second."""
        return 1 / statistics.median(self._seconds[name])

    def times_as_fast(self, name: str, as_name: str) -> float:
        """Median of the rounds' ratios: they outlast a machine that is busy with other things."""
        pairs = zip(self._seconds[name], self._seconds[as_name], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


@dataclass(frozen=True)
class Contender:
    """What takes part in an `interleaved` measurement."""

    run: Callable[[], None]
    work: float = 1.0
    """Units of work, such as steps, in one call of `run`."""


def interleaved(contenders: Mapping[str, Contender], rounds: int, seconds: float) -> Rounds:
    """Measures the contenders in turns that last about `seconds` each, after one call of each to warm up."""
    repeats = {}
    for name, contender in contenders.items():
        contender.run()
        repeats[name] = max(1, round(seconds / _seconds_of(contender, 1)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds):
        for name in _rotated(list(contenders), round_number):
            work = repeats[name] * contenders[name].work
            taken[name].append(_seconds_of(contenders[name], repeats[name]) / work)
    return Rounds(taken)


def _seconds_of(contender: Contender, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        contender.run()
    return time.perf_counter() - started


async def interleaved_messages(contenders: Mapping[str, Deal], rounds: int, seconds: float) -> Rounds:
    """Measures the contenders in turns that last about `seconds` each; the units of work are messages."""
    counts = {name: await messages_in(seconds, deal) for name, deal in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds):
        for name in _rotated(list(contenders), round_number):
            taken[name].append(await contenders[name](counts[name]) / counts[name])
    return Rounds(taken)


async def messages_in(seconds: float, deal: Deal) -> int:
    """How many messages are dealt with in about so many seconds; warms everything up."""
    count = 2
    while (took := await deal(count)) < seconds / 4:
        count *= 2
    return max(1, round(count * seconds / took))


def _rotated(names: list[str], by: int) -> list[str]:
    """Nobody always runs after the same neighbour's mess."""
    first = by % len(names)
    return names[first:] + names[:first]


# -- reports --


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In markdown, to be pasted into docs/benchmarks.md."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def verdict(reached: Mapping[str, bool]) -> str:
    """Which of the targets are met."""
    return ", ".join(f"{target}: {'met' if met else '**missed**'}" for target, met in reached.items()) or "–"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def machine() -> str:
    """What the figures were taken on, as far as it can be asked."""
    model = platform.machine()
    with suppress(OSError):  # not Linux
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{os.cpu_count()} × {model}{load}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}, grpc {grpc.__version__}"
    )


def with_malloc_set() -> None:
    """Runs the script anew if malloc is not set as `MALLOC` says; it reads that once, when a process starts."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)


def one_thread() -> None:
    """For torch and its BLAS, as the server's engine has it."""
    torch.set_num_threads(1)
