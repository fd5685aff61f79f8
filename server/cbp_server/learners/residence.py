"""Which learners are in the engine: brought back when they are used, out when they idle, rolled back when they fail."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import structlog

from cbp import CbpError, SnapshotError
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    BatchNotLearnt,
    CheckpointsUnreachable,
    EngineFault,
    EngineUnavailable,
    JournalUnavailable,
    LearnerQuarantined,
    NotInEngine,
    ServerDraining,
)
from cbp_server.learners.checkpointing import Checkpointer
from cbp_server.learners.hosted import Hosted
from cbp_server.learners.recovery import Recovered, Recovery
from cbp_server.records.learners import LearnerState, Quarantine
from cbp_server.store.storage import Storage

#: Learners that are loaded and replayed side by side.
_RECOVERIES_AT_ONCE = 8
_LONGEST_WAIT = 10.0  # seconds that a call waits for a learner to be brought back
_PROGRESS_SECONDS = 5.0  # between two words about a long restart
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # seconds between attempts while the database cannot be used

log = structlog.get_logger("cbp_server.learners.residence")


class ResidenceObserver(Protocol):
    """Counts what happens to learners, for the metrics."""

    def learner_recovered(self, seconds: float) -> None: ...
    def learner_quarantined(self) -> None: ...
    def learner_evicted(self) -> None: ...


class Residence:
    """Moves learners in and out of the engine.

    Args:
        most: learners that may be in the engine before idle ones have to leave; 0 for any number.
        idle_seconds: a learner unused for so long leaves; 0 for never.
        on_change: called with every learner whose record has changed.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        recovery: Recovery,
        checkpointer: Checkpointer,
        *,
        most: int,
        idle_seconds: float,
        on_change: Callable[[Hosted], None],
        on_ready: Callable[[Hosted], None],
        observer: ResidenceObserver,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._recovery = recovery
        self._checkpointer = checkpointer
        self._most = most
        self._idle_seconds = idle_seconds
        self._on_change = on_change
        self._on_ready = on_ready
        self._observer = observer
        self._at_once = asyncio.Semaphore(_RECOVERIES_AT_ONCE)
        self._one_at_once = asyncio.Lock()
        self._suspects: set[str] = set()  # uids that had batches in the engine, or were replayed, when it died
        self._stopping = asyncio.Event()

    def drop(self, uid: str) -> None:
        """Takes a learner that nobody needs out of the engine."""
        self._engine.submit(messages.Drop(uid)).add_done_callback(_forget)

    # -- use --

    async def use(self, hosted: Hosted) -> None:
        """Returns when the learner is in the engine and up to date, bringing it back if it is not.

        Raises:
            SnapshotError: it cannot be brought back.
            ServiceError: it cannot now; the error says why.
        """
        hosted.used = time.monotonic()
        if hosted.record.state is LearnerState.EVICTED and hosted.recovery is None and not hosted.unreadable:
            self.begin_recovery(hosted)
        if hosted.recovery is not None and not hosted.in_engine:
            await asyncio.wait([hosted.recovery], timeout=_LONGEST_WAIT)  # one that takes longer is tried again
        self.check_predicts(hosted)

    def check_predicts(self, hosted: Hosted) -> None:
        """Raises what keeps the learner from being predicted with."""
        if hosted.unreadable:
            raise SnapshotError(hosted.unreadable)
        if not hosted.in_engine:
            if not self._engine.status.up:
                raise EngineUnavailable
            raise NotInEngine

    def check_trains(self, hosted: Hosted) -> None:
        """Raises what keeps the learner from taking changes."""
        self.check_predicts(hosted)
        if hosted.recovery is not None:
            raise NotInEngine
        if hosted.stored.quarantine is not None:
            raise LearnerQuarantined(hosted.learner_id, hosted.stored.quarantine)

    # -- recovery --

    def begin_recovery(
        self,
        hosted: Hosted,
        *,
        because: Exception | None = None,
        quarantine: Quarantine | None = None,
        carefully: bool = False,
    ) -> "asyncio.Task[None]":
        """Ends the learner's streams, and brings it to where its journal ends; every doubt about it ends here.

        Args:
            because: what the streams end with.
            quarantine: of a batch that is known to be one that the learner cannot learn.
        """
        if hosted.recovery is None:
            hosted.end_sessions(because or NotInEngine())
            hosted.recovery = asyncio.create_task(self._recover(hosted, quarantine, carefully=carefully))
            hosted.recovery.add_done_callback(_forget)
        return hosted.recovery

    async def occupy(self, hosted: Hosted, operation: Coroutine[Any, Any, None]) -> None:
        """Keeps changes out while `operation` makes another state of the learner; recovers it if that fails half-way.

        Raises:
            Exception: what `operation` raises.
        """
        while hosted.recovery is not None:
            await asyncio.wait([hosted.recovery])
        task = hosted.recovery = asyncio.create_task(operation)
        hosted.end_sessions(NotInEngine())
        try:
            await task
        except BaseException:
            hosted.recovery = None
            self.begin_recovery(hosted)
            raise
        hosted.recovery = None
        self._on_ready(hosted)
        self._on_change(hosted)

    def watch(self, hosted: Hosted, change: "asyncio.Future[Any]") -> None:
        """Has the learner recovered if the change fails in a way that leaves a doubt."""
        change.add_done_callback(lambda done: self.settle(hosted, done))

    def settle(self, hosted: Hosted, change: "asyncio.Future[Any]") -> None:
        """What `watch` does, for a change that is done."""
        if change.cancelled() or (error := change.exception()) is None:
            return
        quarantine = None
        if isinstance(error, BatchNotLearnt):
            hosted.in_engine = False
            if not hosted.log.journals_batches:
                quarantine = error.quarantine(0)
            elif error.diverged:
                quarantine = error.quarantine(error.position)
        elif isinstance(error, NotInEngine):
            hosted.in_engine = False
        elif not isinstance(error, JournalUnavailable | EngineFault):
            return
        if self._engine.status.up and hosted.stored.delete_time is None:
            self.begin_recovery(hosted, because=error, quarantine=quarantine)
            self._on_change(hosted)

    async def _recover(self, hosted: Hosted, quarantine: Quarantine | None, *, carefully: bool) -> None:
        pause, started = _FIRST_PAUSE, time.monotonic()
        try:
            while True:
                if hosted.stored.delete_time is not None:
                    return
                if not hosted.in_engine:
                    hosted.record.state = LearnerState.UNAVAILABLE
                    self._on_change(hosted)
                try:
                    recovered = await self._recovered(hosted, quarantine, carefully=carefully)
                    break
                except (JournalUnavailable, CheckpointsUnreachable) as error:
                    log.warning("learner waits for its storage", learner=hosted.learner_id, error=str(error))
                    await self._pause(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                except (NotInEngine, EngineFault):
                    if not hosted.in_engine:
                        raise
                    hosted.in_engine = False  # it is not what it seemed to be: from the checkpoint, then
            if hosted.stored.delete_time is not None:  # meanwhile
                self.drop(hosted.uid)
                return
            self._install(hosted, recovered)
            self._on_ready(hosted)
            if recovered.journal_position:  # not a newborn
                self._observer.learner_recovered(time.monotonic() - started)
        except (EngineUnavailable, ServerDraining):
            hosted.in_engine = False
            raise
        except CbpError as error:
            if hosted.stored.delete_time is None:  # else it was taken from under the recovery
                hosted.unreadable, hosted.in_engine = str(error), False
                log.error("learner not restored", learner=hosted.learner_id, error=str(error))
        except Exception as error:  # nobody waits for this task who would tell of it
            hosted.unreadable = f"the server failed at bringing it back: {type(error).__name__}: {error}"
            hosted.in_engine = False
            log.exception("learner not restored", learner=hosted.learner_id)
        finally:
            hosted.recovery = None
            self._on_change(hosted)

    async def _recovered(self, hosted: Hosted, quarantine: Quarantine | None, *, carefully: bool) -> Recovered:
        await self._storage.commit.mend(hosted.uid)
        if quarantine is not None and hosted.stored.quarantine is None:
            await self._storage.run(self._storage.catalog.quarantine, hosted.uid, quarantine)
            self._quarantined(hosted, quarantine)
        async with self._one_at_once if carefully else self._at_once:
            return await self._recovery.recover(
                hosted.stored,
                in_engine=hosted.in_engine,
                carefully=carefully,
                on_quarantine=partial(self._quarantined, hosted),
            )

    def _quarantined(self, hosted: Hosted, quarantine: Quarantine) -> None:
        hosted.set_quarantine(quarantine)
        self._observer.learner_quarantined()
        log.error(
            "learner quarantined",
            learner=hosted.learner_id,
            producer=quarantine.producer,
            sequence=quarantine.sequence,
            reason=quarantine.reason,
        )

    def _install(self, hosted: Hosted, recovered: Recovered) -> None:
        record, report = hosted.record, recovered.report
        hosted.log.position = recovered.journal_position
        durable = {name: producer.durable for name, producer in hosted.producers.items()}
        hosted.install(report)
        if recovered.samples is None and not hosted.log.journals_batches:
            hosted.set_durable(durable)  # it was in the engine all along, with batches that no checkpoint has
        if recovered.samples is not None:
            record.samples.replace(recovered.samples)
        hosted.in_engine, hosted.unreadable, hosted.used = True, "", time.monotonic()
        hosted.damaged.update(recovered.damaged)
        hosted.set_quarantine(recovered.quarantine)
        record.state = LearnerState.QUARANTINED if recovered.quarantine is not None else LearnerState.ACTIVE
        if report.journal_position > hosted.saved_position:
            self._checkpointer.note_change(hosted)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise ServerDraining

    def stop(self) -> None:
        """Recoveries that wait for the database give up."""
        self._stopping.set()

    # -- the engine process --

    async def engine_up(self, learners: Sequence[Hosted]) -> None:
        """Restores learners into a new engine process; each one serves as soon as it is ready.

        Raises:
            EngineUnavailable: the process ended meanwhile.
        """
        wanted = [hosted for hosted in learners if hosted.record.state is not LearnerState.EVICTED]
        suspects = [hosted for hosted in wanted if hosted.uid in self._suspects]
        others = [hosted for hosted in wanted if hosted.uid not in self._suspects]
        started = told = time.monotonic()
        waiting = {self.begin_recovery(hosted) for hosted in others}
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=_PROGRESS_SECONDS)
            _raise_unavailable(done)
            if time.monotonic() - told > _PROGRESS_SECONDS and waiting:
                told = time.monotonic()
                log.info("restoring learners", restored=len(wanted) - len(waiting) - len(suspects), of=len(wanted))
        # The process may have died of a batch of theirs: one entry after another, so that the next death names it.
        for hosted in suspects:
            task = self.begin_recovery(hosted, carefully=True)
            await asyncio.wait([task])
            _raise_unavailable([task])
            self._suspects.discard(hosted.uid)
        seconds = round(time.monotonic() - started, 3)
        unreadable = sum(bool(hosted.unreadable) for hosted in learners)
        log.info("learners restored", learners=len(wanted), unreadable=unreadable, seconds=seconds)

    def engine_down(self, learners: Sequence[Hosted]) -> None:
        """The engine process has died, and every learner in it is gone."""
        for hosted in learners:
            if hosted.record.queued_batches or hosted.uid in self._recovery.replaying:
                self._suspects.add(hosted.uid)
            if hosted.in_engine or hosted.recovery is not None:
                hosted.in_engine = False
                hosted.record.state = LearnerState.UNAVAILABLE
                hosted.end_sessions(EngineUnavailable("the engine process ended; the stream resumes once it is back"))
                self._on_change(hosted)

    # -- eviction --

    async def evict_idle(self, learners: Sequence[Hosted]) -> None:
        """Takes learners out of the engine that have idled for long, or that are more than may be there."""
        now = time.monotonic()
        in_engine = [hosted for hosted in learners if hosted.in_engine]
        excess = max(0, len(in_engine) - self._most) if self._most else 0
        idle = sorted((hosted for hosted in in_engine if not hosted.busy), key=lambda hosted: hosted.used)
        for index, hosted in enumerate(idle):
            if index < excess or (self._idle_seconds and now - hosted.used >= self._idle_seconds):
                await self._evict(hosted)

    async def _evict(self, hosted: Hosted) -> None:
        if hosted.busy or hosted.stored.delete_time is not None:
            return
        used = hosted.used
        async with hosted.changing:
            if not await self._checkpointer.try_save(hosted):
                return
            if hosted.sessions or hosted.unsaved.changes or hosted.used != used or not hosted.in_engine:
                return  # somebody has come meanwhile
            dropped = self._engine.submit(messages.Drop(hosted.uid))  # before whatever brings it back
            hosted.in_engine = False
            hosted.record.state = LearnerState.EVICTED
            self._on_change(hosted)
            with suppress(EngineUnavailable):
                await dropped
        self._observer.learner_evicted()
        log.info("learner evicted", learner=hosted.learner_id)


def _forget(done: "asyncio.Future[None]") -> None:
    """Whatever came of it, nobody needs to hear."""
    if not done.cancelled():
        done.exception()


def _raise_unavailable(tasks: Iterable["asyncio.Task[None]"]) -> None:
    for task in tasks:
        if isinstance(task.exception(), EngineUnavailable):
            raise EngineUnavailable
