"""Kills a real server over and over, cuts its network and its power, while real clients stream to it; then compares
every learner, bit for bit, with one that never met a server.

    python tests/torture.py --kills 200 --seed 1

The seed decides what is sent and what goes wrong when; it is printed, so that a failure can be run again.
"""

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from faults.audit import History, keep_removed_rows
from faults.feeders import Feeder, Operator, Participant
from faults.learners import LEARNERS, FedLearner
from faults.plan import Lie, Victims
from faults.points import POINTS
from faults.proxy import Proxy
from faults.server import FaultyServer
from faults.sqlite_vfs import library_path
from faults.storage import Failures
from faults.undisturbed import check_fork, check_learner

from cbp_client import Client

_JOIN_SECONDS = 120.0
#: What clients may take to come back; a life in which they do not is short of traffic, and no failure.
_TRAFFIC_SECONDS = 10.0

#: Points that only some lives come to, so that torture at random leaves them to tests of their own.
_RARE = ("catalog.add", "catalog.restore")

#: Compiled code takes all steps of so small a batch at once.
ENGINE_OF_POINT: dict[str, Literal["torch"]] = {"training/step": "torch", "training.row/step": "torch"}

NetworkFault = Literal["cut", "cut within", "refuse", "delay", "throttle"]
_NETWORK_FAULTS: tuple[NetworkFault, ...] = ("cut", "cut within", "refuse", "delay", "throttle")
_STORAGE_FAULTS = (
    Failures(database="full"),
    Failures(database="read-only"),
    Failures(database="write-error"),
    Failures(database_sync=True),
    Failures(checkpoints="ENOSPC"),
    Failures(checkpoints="EROFS"),
)


@dataclass(frozen=True, kw_only=True)
class Life:
    """What happens to the server from one start to the next.

    Attributes:
        point: where it is killed the `nth` time that it comes there, if it does so within `seconds`.
        quiet: whether its seconds begin at once, rather than when the clients are back and the first batch is applied.
        engine: takes the steps, once what has been journaled is learnt again.
        network: faults, each with the seconds before it.
        storage: failures of the disk, each with the seconds before it; the last one stays to the end of the life.
        engine_killed_after: seconds after which the engine alone is killed.
        end: how it ends after `seconds`, if it has not been killed before: its front killed, all of it, or its power
            cut, also with some of what was not synced still there.
    """

    point: str | None = None
    nth: int = 1
    victims: Victims = "all"
    seconds: float
    quiet: bool = False
    engine: Literal["auto", "torch", "stacked"] = "auto"
    network: tuple[tuple[float, NetworkFault], ...] = ()
    storage: tuple[tuple[float, Failures], ...] = ()
    engine_killed_after: float | None = None
    end: Literal["front", "all", "power", "power, torn"] = "all"


@dataclass
class Outcome:
    """What a run did."""

    lives: int = 0
    batches: int = 0
    seconds: float = 0.0
    fired: Counter[str] = field(default_factory=Counter)  # kills by point
    changes: Counter[str] = field(default_factory=Counter)  # by kind
    forks: int = 0
    network_faults: int = 0
    storage_faults: int = 0
    engine_kills: int = 0
    power_losses: int = 0
    restarts: int = 0  # of producers
    losses: int = 0  # seen by producers of learners that may lose batches

    def __str__(self) -> str:
        points = ", ".join(f"{point} {count}" for point, count in sorted(self.fired.items()))
        changes = ", ".join(f"{kind} {count}" for kind, count in sorted(self.changes.items()))
        return "\n".join(
            (
                f"{self.lives} lives, {self.batches} batches, {self.seconds:.0f} s: every learner as if undisturbed",
                f"kills at points: {points or 'none'}; of the engine at random: {self.engine_kills}",
                f"faults of the network: {self.network_faults}; of storage: {self.storage_faults}; power losses: "
                f"{self.power_losses}",
                f"changes while fed: {changes or 'none'}; forks: {self.forks}; restarts of producers: {self.restarts}; "
                f"losses where allowed: {self.losses}",
            )
        )


def random_lives(count: int, seed: int, *, power: bool = False) -> list[Life]:
    """As the seed has it."""
    chance = random.Random(f"{seed} lives")
    watched = library_path() is not None
    points = [point for point in POINTS if point.partition("/")[0] not in _RARE and (watched or "sqlite" not in point)]
    return [_random_life(chance, points, power=power) for _ in range(count)]


def _random_life(chance: random.Random, points: Sequence[str], *, power: bool) -> Life:
    seconds = chance.uniform(0.0, 1.0)
    network = tuple((chance.uniform(0.0, seconds), chance.choice(_NETWORK_FAULTS)) for _ in range(chance.randrange(3)))
    ends: list[Literal["front", "all", "power", "power, torn"]] = (
        ["power", "power, torn", "all"] if power else ["front", "all"]
    )
    at_point = chance.random() < 0.5
    point = chance.choice(points) if at_point else None
    return Life(
        point=point,
        nth=1 + int(chance.expovariate(0.1)),
        victims=chance.choice(("all", "engine")),
        seconds=seconds + 2.0 if at_point else seconds,
        quiet=chance.random() < 0.1,
        engine=ENGINE_OF_POINT.get(point or "") or chance.choice(("auto", "auto", "torch", "stacked")),
        network=network,
        storage=_random_storage(chance, seconds) if chance.random() < 0.2 else (),
        engine_killed_after=chance.uniform(0.0, seconds) if chance.random() < 0.2 else None,
        end=chance.choice(ends),
    )


def _random_storage(chance: random.Random, seconds: float) -> tuple[tuple[float, Failures], ...]:
    begin = chance.uniform(0.0, seconds)
    return (begin, chance.choice(_STORAGE_FAULTS)), (begin + chance.uniform(0.0, 0.5), Failures())


class Torture:
    """One server, its learners, and what is done to them. The server's data is in `directory`.

    Args:
        flags: of the server.
        power_can_fail: whether lives may end in a power loss.
        lies: syncs that the disk pretends to have made.
    """

    def __init__(
        self,
        directory: Path,
        seed: int,
        *,
        learners: Sequence[FedLearner] = LEARNERS,
        flags: Sequence[str] = ("--checkpoint-interval", "0.2"),
        power_can_fail: bool = False,
        lies: tuple[Lie, ...] = (),
    ) -> None:
        self._seed = seed
        self._chance = random.Random(f"{seed} torture")
        self._learners = tuple(learners)
        self._power_can_fail = power_can_fail
        self._outcome = Outcome()
        self._traffic = threading.Event()  # a batch has been applied
        self.server = FaultyServer(directory, *flags, power_can_fail=power_can_fail, lies=lies)

    def run(self, lives: Sequence[Life]) -> Outcome:
        """Starts the clients, goes through the lives, lets the clients finish, and checks everything.

        Raises:
            AssertionError: a promise was broken; see `undisturbed.check_learner`.
        """
        started = time.monotonic()
        self._create_learners()
        with ExitStack() as stack:
            proxy = stack.enter_context(Proxy(self.server.grpc_target))
            feeders = [
                Feeder(
                    stack.enter_context(Client(proxy.target)),
                    learner,
                    producer,
                    self._seed,
                    on_result=self._traffic.set,
                    may_lose=self._may_lose(learner),
                )
                for learner in self._learners
                for producer in learner.producers
            ]
            operator = Operator(stack.enter_context(Client(proxy.target)), self._learners, self._seed)
            participants = [*feeders, operator]
            for thread in participants:
                thread.start()
            try:
                for life in lives:
                    self._live(life, proxy)
                    self._check_alive(participants)
                self.server.start()
                proxy.calm()
                self._finish(participants)
            finally:
                self.server.kill_everything()
        self._check(feeders, operator)
        self._outcome.restarts = sum(feeder.restarts for feeder in feeders)
        self._outcome.losses = sum(feeder.losses for feeder in feeders)
        self._outcome.seconds = time.monotonic() - started
        return self._outcome

    def _create_learners(self) -> None:
        self.server.start()
        with Client(self.server.grpc_target) as client:
            for learner in self._learners:
                client.create_learner(learner.name, durability=learner.durability, **learner.spec)
        assert self.server.stop() == 0
        keep_removed_rows(self.server.data_dir)
        if self._power_can_fail:
            self.server.trust_disk()

    def _may_lose(self, learner: FedLearner) -> bool:
        return self._power_can_fail and learner.durability == "os"

    def _live(self, life: Life, proxy: Proxy) -> None:
        """From a start to an end."""
        self._outcome.lives += 1
        kill = self.server.plan_kill(life.point, life.nth, life.victims) if life.point is not None else None
        self._traffic.clear()
        self.server.launch("--engine", life.engine)
        if self.server.wait_until_ready_or_ended():
            self._disturb(life, proxy)
        self._end(life)
        if kill is not None and kill.fired:
            self._outcome.fired[kill.point] += 1
        proxy.calm()
        self.server.failures.unlink(missing_ok=True)

    def _disturb(self, life: Life, proxy: Proxy) -> None:
        """Until the life's time is over, or the server has been killed at its point."""
        if not life.quiet:
            self._wait_for_traffic()
        events: list[tuple[float, Callable[[], None]]] = [
            (at, partial(self._disturb_network, fault, proxy)) for at, fault in life.network
        ]
        events += [(at, partial(self._fail_storage, failures)) for at, failures in life.storage]
        if life.engine_killed_after is not None:
            events.append((life.engine_killed_after, self._kill_engine))
        events.append((life.seconds, lambda: None))
        started = time.monotonic()
        for at, happen in sorted(events, key=lambda event: event[0]):
            self.server.wait_for_end_of_front(started + at - time.monotonic())
            if not self.server.running:
                return
            happen()

    def _wait_for_traffic(self) -> None:
        deadline = time.monotonic() + _TRAFFIC_SECONDS
        while self.server.running and not self._traffic.wait(0.05) and time.monotonic() < deadline:
            pass

    def _disturb_network(self, fault: NetworkFault, proxy: Proxy) -> None:
        self._outcome.network_faults += 1
        match fault:
            case "cut":
                proxy.cut()
            case "cut within":
                proxy.cut_after(self._chance.randrange(20_000))
            case "refuse":
                proxy.refuse()
            case "delay":
                proxy.delay = self._chance.uniform(0.0, 0.1)
            case "throttle":
                proxy.bytes_per_second = self._chance.uniform(10_000, 200_000)

    def _fail_storage(self, failures: Failures) -> None:
        self._outcome.storage_faults += failures != Failures()
        failures.begin(self.server.failures)

    def _kill_engine(self) -> None:
        self._outcome.engine_kills += 1
        self.server.kill_engine()

    def _end(self, life: Life) -> None:
        match life.end:
            case "front":
                if self.server.running:
                    self.server.kill()
            case "all":
                self.server.kill_everything()
            case "power":
                self._outcome.power_losses += 1
                self.server.lose_power()
            case "power, torn":
                self._outcome.power_losses += 1
                self.server.lose_power(self._chance)

    def _check_alive(self, participants: Sequence[Participant]) -> None:
        failures = [thread.failure for thread in participants if thread.failure is not None]
        if failures:
            raise AssertionError(f"clients failed: {failures}") from failures[0]

    def _finish(self, participants: Sequence[Participant]) -> None:
        for thread in participants:
            thread.finish()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in participants:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._check_alive(participants)
        unfinished = [thread.name for thread in participants if thread.is_alive()]
        assert not unfinished, f"not done after {_JOIN_SECONDS:.0f} s: {unfinished}"
        assert self.server.stop() == 0
        assert not self.server.log_problems(), self.server.log_problems()

    def _check(self, feeders: Sequence[Feeder], operator: Operator) -> None:
        history = History(self.server.data_dir)
        for learner in self._learners:
            told = {feeder.producer: feeder.told for feeder in feeders if feeder.learner == learner.name}
            confirmed = {} if self._may_lose(learner) else operator.confirmed[learner.name]
            self._outcome.batches += check_learner(history, learner, self._seed, told, confirmed)
        for name in operator.forks.keys() & history.uids().keys():
            check_fork(history, name, operator.forks[name])
            self._outcome.forks += 1
        self._outcome.changes = sum((Counter(counts) for counts in operator.confirmed.values()), Counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="lives of the server, each of which ends in a kill")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--power", action="store_true", help="end most lives in a power loss")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        torture = Torture(Path(directory), arguments.seed, power_can_fail=arguments.power)
        print(torture.run(random_lives(arguments.kills, arguments.seed, power=arguments.power)))


if __name__ == "__main__":
    main()
