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
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from workloads import (
    A,
    C,
    D,
    Deal,
    L,
    Message,
    Net,
    Rounds,
    Streamed,
    as_hosted,
    in_process,
    interleaved_messages,
    kill_server,
    machine,
    messages_in,
    milliseconds,
    one_thread,
    over_the_wire,
    print_table,
    server_with,
    streaming,
)

from cbp_client import AsyncClient, AsyncLearner
from cbp_client.demo.local_server import LocalServer
from cbp_client.types import Durability

DURABILITIES: tuple[Durability, ...] = ("fsync", "os", "none")
INTERVALS = (1.0, 5.0, 30.0)  # s, between two checkpoints; the last one is the default
NEVER = 1e6  # s
MESSAGE_SIZE = 256  # examples
POOL = 20  # different messages, sent over and over
REPLAYED_BYTES = 64 * 2**20  # of features of those to be replayed: no cache holds them, as none holds a journal


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


FULL = Effort(5, 0.7, 4, 3.5, 2, 12.0, 3, 4.0)
QUICK = Effort(1, 0.02, 1, 1.5, 1, 0.1, 1, 0.02)


# -- ingest --


async def measure_ingest(effort: Effort, directory: Path) -> None:
    rows = []
    with server_on(directory) as server:
        async with AsyncClient(server.grpc_target) as client:
            for net, size in product((A, D), (MESSAGE_SIZE, 16)):
                measured = await ingest(client, net, size, effort)
                rates = [f"{size * measured.rate(name):,.0f}" for name in DURABILITIES]
                shares = [f"{measured.times_as_fast(name, 'none'):.2f}" for name in ("fsync", "os")]
                rows.append([net.shape, str(size), *rates, *shares])
    print_table(
        "Ingest: examples/s by durability, and the share of `none`",
        ["net", "a message", *DURABILITIES, "fsync of none", "os of none"],
        rows,
    )


async def ingest(client: AsyncClient, net: Net, size: int, effort: Effort) -> Rounds:
    """Messages by durability."""
    messages = net.make_messages(POOL, size)
    deals: dict[str, Deal] = {}
    for name in DURABILITIES:
        learner = await client.create_learner(f"{net.name.lower()}-{size}-{name}", durability=name, **net.spec)
        deals[name] = streaming(learner, messages)
    return await interleaved_messages(deals, effort.rounds, effort.ingest_seconds)


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


async def measure_checkpoints(effort: Effort, directory: Path) -> None:
    rows = []
    cases = (
        (D, MESSAGE_SIZE, 1.0, effort.checkpoint_rounds, effort.checkpoint_seconds),
        (C, MESSAGE_SIZE, 1.0, effort.large_rounds, effort.checkpoint_seconds),  # much to remove from the journal
        (L, L.batch_size, 5.0, effort.large_rounds, effort.large_seconds),
    )
    for net, size, interval, rounds, seconds in cases:
        own = directory / net.name
        with (
            server_on(subdirectory(own, "saved"), interval) as saving,
            server_on(subdirectory(own, "unsaved")) as other,
        ):
            async with AsyncClient(saving.grpc_target) as saving_client, AsyncClient(other.grpc_target) as other_client:
                saved = await saving_client.create_learner("net", **net.spec)
                unsaved = await other_client.create_learner("net", **net.spec)
                pairs = await checkpoint_pairs(saved, unsaved, net.make_messages(POOL, size), rounds, seconds)
                size_bytes = (await saved.checkpoints())[0].size_bytes
            for part in ("saved", "unsaved"):
                kill_server(own / part)  # else they would save what they have
        lost = statistics.median(pair.lost_seconds for pair in pairs)
        cost = statistics.median(pair.saved.seconds / pair.unsaved.seconds - 1 for pair in pairs)
        gaps = [max(pair.saved.longest_gap for pair in pairs), max(pair.unsaved.longest_gap for pair in pairs)]
        rows.append(
            [
                net.shape,
                f"{size_bytes / 1e6:.1f} MB",
                f"{interval:.0f} s",
                f"{cost:.1%}",
                milliseconds(lost),
                *(f"{lost / seconds:.1%}" for seconds in INTERVALS),
                *(milliseconds(gap) for gap in gaps),
            ]
        )
    computed = [f"at {seconds:.0f} s" for seconds in INTERVALS]
    print_table(
        "Checkpoints: what they cost the stream, measured at one interval and computed for others; longest gap "
        "between two acknowledgements, with and without",
        ["net", "size", "every", "cost", "each", *computed, "gap", "without"],
        rows,
    )


async def checkpoint_pairs(
    saved: AsyncLearner, unsaved: AsyncLearner, messages: Sequence[Message], rounds: int, seconds: float
) -> list[Pair]:
    count = await messages_in(seconds, streaming(unsaved, messages))
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


async def measure_replay(effort: Effort, directory: Path) -> None:
    rows = []
    for net in (A, D, C):
        message_bytes = 4 * MESSAGE_SIZE * net.widths[0]
        messages = net.make_messages(REPLAYED_BYTES // message_bytes, MESSAGE_SIZE)
        rounds = [
            await replay(net, messages, effort.replay_seconds, subdirectory(directory, f"{net.name}-{number}"))
            for number in range(effort.replay_rounds)
        ]
        replayed, here = [each.replayed for each in rounds], [each.in_process for each in rounds]
        live = [each.live for each in rounds]
        rates = [statistics.median(column) for column in (replayed, here, live)]
        rows.append(
            [
                net.shape,
                *(f"{rate:,.0f}" for rate in rates),
                f"{median_ratio(replayed, here):.2f}",
                f"{median_ratio(replayed, live):.2f}",
            ]
        )
    print_table(
        "Replay: examples/s of the same messages",
        ["net", "replayed", "in process", "live", "of in process", "of live"],
        rows,
    )


async def replay(net: Net, messages: Sequence[Message], seconds: float, directory: Path) -> Replay:
    with server_on(directory) as server:
        async with AsyncClient(server.grpc_target) as client:
            learner = await client.create_learner("net", **net.spec)
            count = await messages_in(seconds, streaming(learner, messages))
            streamed = await over_the_wire(learner, messages, count)
            examples = (await learner.refresh()).progress.examples
        kill_server(directory)
    here = in_process(as_hosted(net), messages, examples // MESSAGE_SIZE)
    with server_on(directory) as server:
        async with AsyncClient(server.grpc_target) as client:
            restored = (await client.get_learner("net")).info.progress.examples
        kill_server(directory)
    if restored != examples:
        raise SystemExit(f"net {net.name} had learnt {examples} examples before it was killed, and {restored} after")
    events = [json.loads(line) for line in (directory / "server.log").read_text().splitlines()]
    replay_seconds = sum(event["seconds"] for event in events if event["event"] == "journal replayed")
    return Replay(MESSAGE_SIZE * count / streamed.seconds, examples / replay_seconds, examples / here)


# -- all of it --


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def server_on(directory: Path, checkpoint_interval: float = NEVER) -> AbstractContextManager[LocalServer]:
    """A server without a limit on its journal's length."""
    return server_with(directory, checkpoint_interval=checkpoint_interval, checkpoint_bytes=0)


def subdirectory(directory: Path, name: str) -> Path:
    """Made now."""
    made = directory / name
    made.mkdir(parents=True)
    return made


PARTS = {"ingest": measure_ingest, "checkpoints": measure_checkpoints, "replay": measure_replay}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute, to see that it runs, not figures")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be given more than once")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    one_thread()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.part or PARTS:
            asyncio.run(PARTS[name](effort, subdirectory(Path(directory), name)))


if __name__ == "__main__":
    main()
