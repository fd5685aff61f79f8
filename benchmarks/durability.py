"""What durability costs: the journal, checkpoints, and the time it takes to come back.

    python benchmarks/durability.py [--quick]

Client, front and engine process share the machine. What is compared is measured in turns, and ratios are medians over
the rounds, so that they outlast a machine that is busy with other things. The database and the checkpoints lie in a
temporary directory: fsync is that disk's, so TMPDIR should not be in memory.

- Ingest: a stream's examples per second at each durability, and its share of what it is without a journal.
- Checkpoints: a stream with checkpoints and the same stream without them. From the time that one checkpoint takes away
  from learning follows what other intervals cost.
- Replay: a server is killed with a journal and no checkpoint. The log of its next start says how long it took to learn
  the journal's batches again; a Learner in this process learns them without being told of any of this.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import torch
from workloads import A, C, D, L, Message, Net, Streamed, machine, over_the_wire

from cbp import Batch, Learner, LearnerSpec
from cbp_client import AsyncClient, AsyncLearner
from cbp_client.demo.local_server import LocalServer, local_server
from cbp_client.types import Durability

DURABILITIES: tuple[Durability, ...] = ("fsync", "os", "none")
INTERVALS = (1.0, 5.0, 30.0)  # s, between two checkpoints; the last one is the default
NEVER = 1e6  # s
MESSAGE_SIZE = 256  # examples
POOL = 20  # different messages, sent over and over

Show = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure; seconds are those of one stream."""

    rounds: int
    ingest_seconds: float
    checkpoint_rounds: int
    checkpoint_seconds: float
    large_rounds: int
    large_seconds: float
    replay_rounds: int
    replay_seconds: float


FULL = Effort(5, 0.7, 4, 3.5, 2, 12.0, 3, 1.8)
QUICK = Effort(2, 0.4, 2, 2.5, 1, 11.0, 1, 1.0)


# -- servers --


@contextmanager
def server_with(directory: Path, **settings: object) -> Iterator[LocalServer]:
    """A server on what `directory` holds, with these settings of `cbp-server` and no limit on a journal's length."""
    variables = {f"CBP_{name.upper()}": str(value) for name, value in settings.items()} | {"CBP_CHECKPOINT_BYTES": "0"}
    with ExitStack() as stack:
        with mock.patch.dict(os.environ, variables):
            server = stack.enter_context(local_server(directory / "data", directory / "server.log"))
        yield server


def kill(directory: Path) -> None:
    """kill -9 for the server on `directory`."""
    os.kill(json.loads((directory / "data" / "endpoints.json").read_text())["pid"], signal.SIGKILL)


async def count_for(learner: AsyncLearner, messages: Sequence[Message], seconds: float) -> int:
    """How many messages the learner's stream takes in about so many seconds; warms everything up."""
    count = len(messages)
    while (took := (await over_the_wire(learner, messages, count)).seconds) < seconds / 4:
        count *= 2
    return max(1, round(count * seconds / took))


# -- ingest --


async def measure_ingest(effort: Effort, directory: Path, show: Show) -> None:
    show("Ingest: examples/s by durability, and the share of 'none'")
    show(f"{'net':<28}{'a message':>10}" + "".join(f"{name:>10}" for name in DURABILITIES) + f"{'fsync':>9}{'os':>7}")
    with server_with(directory, checkpoint_interval=NEVER) as server:
        async with AsyncClient(server.grpc_target) as client:
            for net in (A, D):
                for size in (MESSAGE_SIZE, 16):
                    rates = await ingest_rates(client, net, size, effort)
                    medians = "".join(f"{statistics.median(rates[name]):>10,.0f}" for name in DURABILITIES)
                    shares = [median_ratio(rates[name], rates["none"]) for name in DURABILITIES]
                    show(f"{net.shape:<28}{size:>10}{medians}{shares[0]:>9.2f}{shares[1]:>7.2f}")


async def ingest_rates(client: AsyncClient, net: Net, size: int, effort: Effort) -> dict[str, list[float]]:
    """Examples/s of each round by durability."""
    messages = net.make_messages(POOL, size)
    learners = {
        name: await client.create_learner(f"{net.name.lower()}-{size}-{name}", durability=name, **net.spec)
        for name in DURABILITIES
    }
    counts = [await count_for(learner, messages, effort.ingest_seconds) for learner in learners.values()]
    count = round(statistics.mean(counts))
    rates: dict[str, list[float]] = {name: [] for name in DURABILITIES}
    for round_number in range(effort.rounds):
        first = round_number % len(DURABILITIES)
        for name in DURABILITIES[first:] + DURABILITIES[:first]:
            streamed = await over_the_wire(learners[name], messages, count)
            rates[name].append(size * count / streamed.seconds)
    return rates


# -- checkpoints --


@dataclass(frozen=True)
class Pair:
    """The same messages with checkpoints and without."""

    saved: Streamed
    unsaved: Streamed
    checkpoints: int

    @property
    def lost_seconds(self) -> float:
        """What each checkpoint took."""
        return (self.saved.seconds - self.unsaved.seconds) / max(1, self.checkpoints)


async def measure_checkpoints(effort: Effort, directory: Path, show: Show) -> None:
    show("Checkpoints: what they cost the stream, measured at one interval, computed for others; longest gap between")
    show("two acknowledgements")
    computed = "".join(f"{f'at {seconds:.0f} s':>9}" for seconds in INTERVALS)
    show(f"{'net':<28}{'size':>8}{'every':>7}{'cost':>8}{'each':>9}{computed}{'gap':>9}{'without':>9}")
    cases = (
        (D, MESSAGE_SIZE, 1.0, effort.checkpoint_rounds, effort.checkpoint_seconds),
        (C, MESSAGE_SIZE, 1.0, effort.large_rounds, effort.checkpoint_seconds),  # much to remove from the journal
        (L, L.batch_size, 5.0, effort.large_rounds, effort.large_seconds),
    )
    for net, size, interval, rounds, seconds in cases:
        own = directory / net.name
        with (
            server_with(subdirectory(own, "saved"), checkpoint_interval=interval) as saving,
            server_with(subdirectory(own, "unsaved"), checkpoint_interval=NEVER) as other,
        ):
            async with AsyncClient(saving.grpc_target) as saving_client, AsyncClient(other.grpc_target) as other_client:
                saved = await saving_client.create_learner("net", **net.spec)
                unsaved = await other_client.create_learner("net", **net.spec)
                pairs = await checkpoint_pairs(saved, unsaved, net.make_messages(POOL, size), rounds, seconds)
                size_bytes = (await saved.checkpoints())[0].size_bytes
            for part in ("saved", "unsaved"):
                kill(own / part)  # else they would save what they have
        lost = statistics.median(pair.lost_seconds for pair in pairs)
        cost = statistics.median(pair.saved.seconds / pair.unsaved.seconds - 1 for pair in pairs)
        costs = "".join(f"{lost / seconds:>9.1%}" for seconds in INTERVALS)
        gaps = [max(pair.saved.longest_gap for pair in pairs), max(pair.unsaved.longest_gap for pair in pairs)]
        show(
            f"{net.shape:<28}{size_bytes / 1e6:>5.1f} MB{interval:>5.0f} s{cost:>8.1%}{1e3 * lost:>6.0f} ms{costs}"
            + "".join(f"{1e3 * gap:>6.0f} ms" for gap in gaps)
        )


async def checkpoint_pairs(
    saved: AsyncLearner, unsaved: AsyncLearner, messages: Sequence[Message], rounds: int, seconds: float
) -> list[Pair]:
    count = await count_for(unsaved, messages, seconds)
    await over_the_wire(saved, messages)
    await all_saved(saved)
    pairs = []
    for round_number in range(rounds):
        without = None if round_number % 2 else await over_the_wire(unsaved, messages, count)
        before = await checkpoint_number(saved)
        streamed = await over_the_wire(saved, messages, count)
        written = await checkpoint_number(saved) - before
        await all_saved(saved)  # or the next stream would have to share the machine with a checkpoint
        pairs.append(Pair(streamed, without or await over_the_wire(unsaved, messages, count), written))
    return pairs


async def checkpoint_number(learner: AsyncLearner) -> int:
    """Of the newest one."""
    checkpoints = await learner.checkpoints()
    return checkpoints[0].number if len(checkpoints) else 0


async def all_saved(learner: AsyncLearner) -> None:
    """Returns when a checkpoint has everything that the learner has learnt."""
    step = (await learner.refresh()).progress.step
    while True:
        checkpoints = await learner.checkpoints()
        if len(checkpoints) and checkpoints[0].step >= step:
            return
        await asyncio.sleep(0.1)


# -- replay --


@dataclass(frozen=True)
class Replay:
    """Examples/s of the same messages: live, replayed and in this process."""

    live: float
    replayed: float
    in_process: float


async def measure_replay(effort: Effort, directory: Path, show: Show) -> None:
    show("Replay: examples/s of the same messages")
    show(f"{'net':<28}{'replayed':>10}{'in process':>12}{'live':>10}{'of in process':>15}{'of live':>9}")
    for net in (A, D, C):
        messages = net.make_messages(POOL, MESSAGE_SIZE)
        rounds = [
            await replay(net, messages, effort.replay_seconds, subdirectory(directory, f"{net.name}-{number}"))
            for number in range(effort.replay_rounds)
        ]
        replayed, here = [each.replayed for each in rounds], [each.in_process for each in rounds]
        live = [each.live for each in rounds]
        rates = [statistics.median(column) for column in (replayed, here, live)]
        show(
            f"{net.shape:<28}{rates[0]:>10,.0f}{rates[1]:>12,.0f}{rates[2]:>10,.0f}"
            f"{median_ratio(replayed, here):>15.2f}{median_ratio(replayed, live):>9.2f}"
        )


async def replay(net: Net, messages: Sequence[Message], seconds: float, directory: Path) -> Replay:
    with server_with(directory, checkpoint_interval=NEVER) as server:
        async with AsyncClient(server.grpc_target) as client:
            learner = await client.create_learner("net", **net.spec)
            count = await count_for(learner, messages, seconds)
            streamed = await over_the_wire(learner, messages, count)
            examples = (await learner.refresh()).progress.examples
        kill(directory)
    here = learn_here(net, messages, examples // MESSAGE_SIZE)
    with server_with(directory, checkpoint_interval=NEVER) as server:
        async with AsyncClient(server.grpc_target) as client:
            restored = (await client.get_learner("net")).info.progress.examples
        kill(directory)
    if restored != examples:
        raise SystemExit(f"net {net.name} had learnt {examples} examples before it was killed, and {restored} after")
    events = [json.loads(line) for line in (directory / "server.log").read_text().splitlines()]
    replay_seconds = sum(event["seconds"] for event in events if event["event"] == "journal replayed")
    return Replay(MESSAGE_SIZE * count / streamed.seconds, examples / replay_seconds, examples / here)


def learn_here(net: Net, messages: Sequence[Message], count: int) -> float:
    """Seconds that a new learner in this process takes for what the server was sent."""
    learner = Learner(LearnerSpec.parse(net.spec))
    batches = [Batch.validate(learner.spec, features, targets) for features, targets in messages]
    started = time.perf_counter()
    for batch in islice(cycle(batches), count):
        learner.train(batch)
    return time.perf_counter() - started


# -- all of it --


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def subdirectory(directory: Path, name: str) -> Path:
    """Made now."""
    made = directory / name
    made.mkdir(parents=True)
    return made


PARTS = {"ingest": measure_ingest, "checkpoints": measure_checkpoints, "replay": measure_replay}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about two minutes, and rougher")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be given more than once")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    torch.set_num_threads(1)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.part or PARTS:
            print(flush=True)
            part = PARTS[name](effort, subdirectory(Path(directory), name), lambda line: print(line, flush=True))
            asyncio.run(part)


if __name__ == "__main__":
    main()
