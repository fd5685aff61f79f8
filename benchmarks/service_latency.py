"""Claim: whoever asks the server something gets an answer at once, however busy its learners are.

    python benchmarks/service_latency.py [--quick] [--part predictions|scrapes]

- Predictions: one example of net C, one request after another, while another process streams batches of 256 to the same
  learner as fast as they are taken, and while nobody does. Idle and busy spells take turns.
- Scrapes: GET /metrics of a server with a thousand learners of three hidden layers, each with series of its own and a
  plasticity sample: of learners that rest, and when each has learnt and has a new sample since the scrape before. A
  stream to net C runs with a scrape every second, at first after all have learnt, and without, in turns.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from feeder import Feeder, feeder
from workloads import (
    A,
    C,
    Streamed,
    machine,
    messages_in,
    milliseconds,
    over_the_wire,
    print_table,
    server_with,
    streaming,
    verdict,
    with_malloc_set,
)

from cbp_client import AsyncClient, AsyncLearner
from cbp_client.demo.local_server import LocalServer

MESSAGE_SIZE = 256
PREDICTION_TARGET = 0.005  # s, 99th percentile
SCRAPE_TARGET = 0.1  # s
SCRAPE_EVERY = 1.0  # s
#: Small, since it is how many there are that counts.
SCRAPED = replace(A, name="S", widths=(20, 5, 5, 5, 1), sample_interval=1)
AT_ONCE = 16
"""Requests under way while learners are made."""


@dataclass(frozen=True)
class Effort:
    rounds: int
    predictions: int
    """In one spell."""
    learners: int
    scrapes: int
    """Of an idle server, of learners that rest."""
    learnt_scrapes: int
    """Of an idle server, each after all have learnt."""
    seconds: float
    """Of one stream."""


FULL = Effort(5, 300, 1000, 20, 4, 3.0)
QUICK = Effort(1, 10, 20, 2, 1, 0.2)


# -- predictions --


@dataclass(frozen=True)
class Spells:
    idle: list[float]
    """Seconds of each prediction."""
    busy: list[float]
    rates: list[float]
    """Examples that the stream taught in a second of each busy spell."""


async def predictions(effort: Effort, server: LocalServer) -> None:
    async with AsyncClient(server.grpc_target) as client:
        learner = await client.create_learner("predicted", durability="none", **C.spec)
        with feeder(server.grpc_target, learner.id, C, MESSAGE_SIZE) as other:
            spells = await measure_spells(learner, other, effort)
    rows = []
    for name, seconds in (("idle", spells.idle), ("busy", spells.busy)):
        p50, p99, most = (np.quantile(seconds, quantile) for quantile in (0.5, 0.99, 1.0))
        stream = f"{statistics.median(spells.rates):,.0f}" if name == "busy" else "–"
        reached = {f"p99 ≤ {1e3 * PREDICTION_TARGET:.0f} ms": bool(p99 <= PREDICTION_TARGET)} if name == "busy" else {}
        rows.append(
            [name, stream, str(len(seconds)), *(milliseconds(each) for each in (p50, p99, most)), verdict(reached)]
        )
    print_table(
        f"Prediction of one example, {C.shape}",
        ["learner", "examples/s it is taught", "predictions", "p50", "p99", "longest", "target"],
        rows,
    )


async def measure_spells(learner: AsyncLearner, other: Feeder, effort: Effort) -> Spells:
    probe = C.make_messages(1, 1)[0][0]
    spells = Spells([], [], [])
    await latencies(learner, probe, 10)
    for _ in range(effort.rounds):
        spells.idle.extend(await latencies(learner, probe, effort.predictions))
        other.turn_on()
        await until_it_learns(learner)
        before, started = learner.info.progress.examples, time.perf_counter()
        spells.busy.extend(await latencies(learner, probe, effort.predictions))
        taught = (await learner.refresh()).progress.examples - before
        spells.rates.append(taught / (time.perf_counter() - started))
        other.turn_off()
        await until_it_rests(learner)
    return spells


async def latencies(learner: AsyncLearner, probe: np.ndarray, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        await learner.predict(probe)
        taken.append(time.perf_counter() - started)
    return taken


async def until_it_learns(learner: AsyncLearner) -> None:
    """And the stream has had time to fill the queues."""
    enough = (await learner.refresh()).progress.examples + 2 * MESSAGE_SIZE
    while learner.info.progress.examples < enough:
        await asyncio.sleep(0.05)
        await learner.refresh()
    await asyncio.sleep(0.2)


async def until_it_rests(learner: AsyncLearner) -> None:
    examples = -1
    while (now := (await learner.refresh()).progress.examples) != examples:
        examples = now
        await asyncio.sleep(0.3)


# -- scrapes --


async def scrapes(effort: Effort, server: LocalServer) -> None:
    url = f"{server.http_url}/metrics"
    async with AsyncClient(server.grpc_target) as client:
        scraped = await make_scraped(client, effort.learners)
        learner = await client.create_learner("streamed-to", durability="none", **C.spec)
        size, _ = await scrape(url)
        taken = {"idle, learners rest": [(await scrape(url))[1] for _ in range(effort.scrapes)]}
        taken["idle, all have learnt"] = []
        for _ in range(effort.learnt_scrapes):
            await teach(scraped)
            taken["idle, all have learnt"].append((await scrape(url))[1])
        busy, pairs = await measure_scraped(learner, scraped, url, effort)
    taken |= busy
    rows = []
    for name, seconds in taken.items():
        if not seconds:
            continue  # the stream was over before the second scrape
        middle, most = statistics.median(seconds), max(seconds)
        reached = {f"≤ {1e3 * SCRAPE_TARGET:.0f} ms": most <= SCRAPE_TARGET}
        rows.append([name, str(len(seconds)), milliseconds(middle), milliseconds(most), verdict(reached)])
    print_table(
        f"GET /metrics, {effort.learners:,} learners of 3 hidden layers, {size / 1e6:.1f} MB",
        ["server", "scrapes", "median", "longest", "target"],
        rows,
    )
    share = statistics.median(without.seconds / scraped.seconds for scraped, without in pairs)
    gaps = [max(each.longest_gap for each in column) for column in zip(*pairs, strict=True)]
    print_table(
        f"A stream to {C.shape} with a scrape every {SCRAPE_EVERY:.0f} s, beside one without",
        ["its speed", "longest gap between acknowledgements", "without scrapes"],
        [[f"{share:.2f}", *(milliseconds(gap) for gap in gaps)]],
    )


async def make_scraped(client: AsyncClient, count: int) -> list[AsyncLearner]:
    """Learners that have a plasticity sample."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def make(number: int) -> AsyncLearner:
        async with gate:
            return await client.create_learner(f"scraped-{number}", durability="none", **SCRAPED.spec)

    learners = await asyncio.gather(*(make(number) for number in range(count)))
    await teach(learners)
    return learners


async def teach(learners: Sequence[AsyncLearner]) -> None:
    """Each learns an example and gets a plasticity sample."""
    messages = SCRAPED.make_messages(1, 1)
    gate = asyncio.Semaphore(AT_ONCE)

    async def teach_one(learner: AsyncLearner) -> None:
        async with gate:
            await over_the_wire(learner, messages)

    await asyncio.gather(*(teach_one(learner) for learner in learners))


async def measure_scraped(
    learner: AsyncLearner, scraped: Sequence[AsyncLearner], url: str, effort: Effort
) -> tuple[dict[str, list[float]], list[tuple[Streamed, Streamed]]]:
    """Seconds of each scrape beside a stream; streams with scrapes, each with one without."""
    messages = C.make_messages(20, MESSAGE_SIZE)
    count = await messages_in(effort.seconds, streaming(learner, messages))
    resting: list[float] = []
    learnt: list[float] = []
    pairs = []
    for round_number in range(effort.rounds):
        without = None if round_number % 2 else await over_the_wire(learner, messages, count)
        await teach(scraped)
        taken: list[float] = []
        scraping = asyncio.create_task(scrape_again_and_again(url, taken))
        with_scrapes = await over_the_wire(learner, messages, count)
        scraping.cancel()
        await asyncio.wait([scraping])
        learnt += taken[:1]
        resting += taken[1:]
        pairs.append((with_scrapes, without or await over_the_wire(learner, messages, count)))
    return {"busy, learners rest": resting, "busy, all have learnt": learnt}, pairs


async def scrape_again_and_again(url: str, taken: list[float]) -> None:
    while True:
        taken.append((await scrape(url))[1])
        await asyncio.sleep(SCRAPE_EVERY)


async def scrape(url: str) -> tuple[int, float]:
    """Bytes and seconds of a request such as Prometheus makes."""
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})

    def read() -> int:
        with urllib.request.urlopen(request) as response:
            return len(response.read())

    started = time.perf_counter()
    size = await asyncio.to_thread(read)
    return size, time.perf_counter() - started


PARTS = {"predictions": predictions, "scrapes": scrapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with_malloc_set()
    print(machine(), flush=True)
    settings = {"metrics_max_learners": effort.learners + 2, "max_live_learners": 0}
    with tempfile.TemporaryDirectory() as directory, server_with(Path(directory), **settings) as server:
        for name in arguments.part or PARTS:
            asyncio.run(PARTS[name](effort, server))


if __name__ == "__main__":
    main()
