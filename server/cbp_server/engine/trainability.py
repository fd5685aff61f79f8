"""Tests of learners' trainability: on copies, on a thread that takes a small share of the time."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import structlog

from cbp import EngineName, Learner, LearnerSnapshot, Trainability, measure_trainability

#: Share of the time that tests take, all learners' together.
SHARE = 0.05
#: Seconds of a test between two rests, at least; a step that takes longer is not interrupted.
_TURN = 1e-3

log = structlog.get_logger("cbp_server.engine")


class Tested(Protocol):
    """Whose copy is tested, and what came of it."""

    learner: Learner
    trainability: Trainability | None


class _ClosingError(Exception):
    """The engine ends, and nobody will see the result."""


class TrainabilityTests:
    """One test at a time; whoever is due meanwhile waits, without a copy in memory. Learners themselves are only read,
    by the thread that trains them."""

    def __init__(self, share: float = SHARE) -> None:
        self._rest_per_work = 1 / share - 1
        self._due: dict[int, weakref.ref[Tested]] = {}  # by identity, who has waited longest first
        self._under_way = False
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainability")
        self._resumed = 0.0

    def add(self, tested: Tested) -> None:
        """The learner is to be tested in its turn, if it is still there then."""
        self._due.setdefault(id(tested), weakref.ref(tested))

    def start_next(self) -> None:
        """Copies the learner that has waited longest, if no test is under way; to be called between batches."""
        while self._due and not self._under_way:
            tested = self._due.pop(next(iter(self._due)))()
            if tested is not None:
                self._start(tested)

    def close(self) -> None:
        """Gives up the test under way."""
        self._closing.set()
        self._thread.shutdown(wait=True)

    def _start(self, tested: Tested) -> None:
        try:
            snapshot = tested.learner.snapshot()
        except Exception:
            log.exception("a learner could not be copied for a test of trainability")
            return
        self._under_way = True
        self._thread.submit(self._run, weakref.ref(tested), snapshot, _engine_beside(tested.learner.engine))

    def _run(self, tested: "weakref.ref[Tested]", snapshot: LearnerSnapshot, engine: EngineName) -> None:
        self._resumed = time.perf_counter()
        try:
            result = measure_trainability(snapshot, engine=engine, between_steps=self._rest)
        except _ClosingError:
            return
        except Exception:
            log.exception("a test of trainability failed")
        else:
            if (of := tested()) is not None and result is not None:
                of.trainability = result
        finally:
            self._under_way = False

    def _rest(self) -> None:
        worked = time.perf_counter() - self._resumed
        if worked < _TURN:
            return
        if self._closing.wait(worked * self._rest_per_work):
            raise _ClosingError
        self._resumed = time.perf_counter()


def _engine_beside(engine: EngineName) -> EngineName:
    """What a copy on the CPU learns with; the stacked engine is for graphics processors."""
    return "torch" if engine == "stacked" else engine
