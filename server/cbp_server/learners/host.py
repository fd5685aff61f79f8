"""The host: owns the live learners, decides what may happen to them, and in which order."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cbp import Batch, CbpError, LearnerSpec, SnapshotError
from cbp.examples.batches import validate_features
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    EngineUnavailable,
    NotInEngine,
    ServerDraining,
)
from cbp_server.learners.alterations import Alterations
from cbp_server.learners.checkpointing import Checkpointer, CheckpointObserver, CheckpointPolicy
from cbp_server.learners.engine_choice import EngineChoice
from cbp_server.learners.engine_switch import EngineSwitch
from cbp_server.learners.hosted import Hosted, hosted_from_rows
from cbp_server.learners.lifecycle import Lifecycle
from cbp_server.learners.operations import Operations
from cbp_server.learners.paging import page_of
from cbp_server.learners.recovery import Recovery, ReplayObserver
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence, ResidenceObserver
from cbp_server.learners.training import Training
from cbp_server.records.learners import (
    Durability,
    EngineStatus,
    JournalStatus,
    LearnerRecord,
    LearnerState,
)
from cbp_server.records.samples import SampleRecord, unpack
from cbp_server.settings import EngineSetting
from cbp_server.store.catalog import StoredCheckpoint
from cbp_server.store.storage import Storage
from cbp_server.streams.change_log import ChangeLog
from cbp_server.streams.sessions import TrainSession

AnswerT = TypeVar("AnswerT")

log = structlog.get_logger("cbp_server.learners.host")


class HostObserver(CheckpointObserver, ReplayObserver, ResidenceObserver, Protocol):
    """Counts what happens, for the metrics."""

    def batch_rejected(self, error: CbpError) -> None: ...


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """See the settings of the same names.

    Attributes:
        max_live_learners: learners in the engine's memory before idle ones leave it; 0 for any number.
        evict_after: seconds after which an idle learner leaves it; 0 for never.
        deleted_retention: seconds during which a deleted learner can be undeleted.
        producer_retention: seconds for which a producer that was cut off is kept when another one needs its place.
    """

    max_learners: int
    max_live_learners: int
    evict_after: float
    deleted_retention: float
    max_message_bytes: int
    stream_credits: int
    max_queued_bytes: int
    max_producers: int
    producer_retention: float
    history_samples: int
    engine: EngineSetting
    checkpoints: CheckpointPolicy


class Host:
    """The live learners of one engine.

    Args:
        decode_batch: the batch in a journal entry's payload.
        on_readiness: called with the reasons why the host is not ready, whenever they change; none means ready.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        options: HostOptions,
        *,
        decode_batch: Callable[[bytes, LearnerSpec], Batch],
        observer: HostObserver,
        on_readiness: Callable[[Sequence[str]], None],
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._options = options
        self._observer = observer
        self._on_readiness = on_readiness
        self._registry = Registry()
        self._operations = Operations()
        changes = ChangeLog(engine, storage.commit)
        choice = EngineChoice(options.engine)
        self._checkpointer = Checkpointer(engine, storage, self._registry, options.checkpoints, observer)
        recovery = Recovery(engine, storage, decode_batch, observer)
        self._residence = Residence(
            engine,
            storage,
            recovery,
            self._checkpointer,
            most=options.max_live_learners,
            idle_seconds=options.evict_after,
            on_change=self._registry.touch,
            on_ready=lambda hosted: self._switch.choose(hosted),
            observer=observer,
        )
        self._switch = EngineSwitch(engine, choice, self._registry, changes, self._checkpointer, self._residence)
        self._training = Training(
            self._registry,
            changes,
            self._checkpointer,
            self._residence,
            self._operations,
            credits=options.stream_credits,
            max_message_bytes=options.max_message_bytes,
            max_queued_bytes=options.max_queued_bytes,
            max_producers=options.max_producers,
            producer_retention=options.producer_retention,
            on_rejected=observer.batch_rejected,
        )
        self._alterations = Alterations(
            engine, storage, changes, self._registry, recovery, self._checkpointer, self._residence
        )
        self._lifecycle = Lifecycle(
            engine,
            storage,
            self._registry,
            self._checkpointer,
            self._residence,
            choice,
            max_learners=options.max_learners,
            deleted_seconds=options.deleted_retention,
            history_samples=options.history_samples,
        )
        self._restored = False  # once
        self._serving = False

    async def open(self) -> None:
        """Learns from the catalog which learners there are; before the engine starts.

        Raises:
            JournalUnavailable: the database cannot be read.
        """
        catalog = self._storage.catalog
        rows = await self._storage.run(catalog.learners)
        newest = await self._storage.run(catalog.newest_checkpoints)
        learners = [hosted_from_rows(row, newest.get(row.uid), self._options.history_samples) for row in rows]
        room = self._options.max_live_learners or len(learners)
        for hosted in sorted(learners, key=_last_seen, reverse=True):
            if hosted.unreadable:
                log.error("learner not restored", learner=hosted.learner_id, error=hosted.unreadable)
            elif hosted.record.state is LearnerState.EVICTED and room > 0:
                hosted.record.state = LearnerState.UNAVAILABLE  # until it is brought back, which begins by itself
                room -= 1
        self._registry.add(learners)

    # -- reading --

    def learners(self, *, deleted: bool = False) -> list[LearnerRecord]:
        """Every learner, by id; on request the deleted ones as well."""
        return [
            hosted.record
            for hosted in self._registry.ordered()
            if not (hosted.unreadable or hosted.unshown) and (deleted or hosted.stored.delete_time is None)
        ]

    def learner(self, learner_id: str) -> LearnerRecord:
        """The learner of this id.

        Raises:
            LearnerNotFound: there is none.
            SnapshotError: there is one, but none of its checkpoints can be read.
        """
        hosted = self._registry.get(learner_id)
        if problem := hosted.unreadable or hosted.unshown:
            raise SnapshotError(problem)
        return hosted.record

    def page(self, page_size: int, page_token: str, *, deleted: bool = False) -> tuple[list[LearnerRecord], str]:
        """One page of learners by id, and the token of the next one, empty on the last."""
        return page_of(self.learners(deleted=deleted), page_size, page_token)

    def samples(self, learner_id: str, count: int) -> list[SampleRecord]:
        """The newest samples, oldest first."""
        return self.learner(learner_id).samples.last(count)

    def readiness(self) -> list[str]:
        """Why the host is not ready; empty if it is."""
        reasons = []
        if self._operations.draining:
            reasons.append("the server is shutting down")
        if not self._engine.status.up:
            reasons.append("the engine process is down")
        elif not self._serving:
            reasons.append("learners are being restored")
        return reasons

    def unreadable(self) -> Mapping[str, str]:
        """Learners that could not be restored, or cannot be shown, and why."""
        problems = {hosted.learner_id: hosted.unreadable or hosted.unshown for hosted in self._registry.present()}
        return {learner_id: problem for learner_id, problem in problems.items() if problem}

    def cannot_show(self, record: LearnerRecord, error: Exception) -> str:
        """Notes that a record could not be shown: until it changes it counts as unreadable. Returns the reason."""
        problem = f"its record cannot be shown: {type(error).__name__}: {error}"
        for hosted in self._registry.ordered():
            if hosted.record is record and not hosted.unshown:
                hosted.unshown = problem
                log.error("learner not shown", learner=record.learner_id, exc_info=error)
        return problem

    @property
    def draining(self) -> bool:
        """Whether the server is on its way down."""
        return self._operations.draining

    def engine_status(self) -> EngineStatus:
        return self._engine.status

    def journal_status(self) -> JournalStatus:
        return self._storage.commit.status

    @property
    def open_streams(self) -> int:
        return sum(len(hosted.sessions) for hosted in self._registry.present())

    async def wait_for_change(self) -> None:
        """Returns when any learner has changed, come or gone."""
        await self._registry.changed.wait()

    # -- life of a learner; see Lifecycle and Alterations --

    async def create(
        self,
        learner_id: str,
        spec: LearnerSpec,
        *,
        durability: Durability = Durability.FSYNC,
        request_id: str = "",
    ) -> LearnerRecord:
        return await self._operations.complete(self._lifecycle.create(learner_id, spec, durability, request_id))

    async def update(
        self,
        learner_id: str,
        revise: Callable[[LearnerSpec], LearnerSpec],
        *,
        durability: Durability | None = None,
        etag: str = "",
    ) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        return await self._operations.complete(self._alterations.update(hosted, revise, durability, etag))

    async def delete(self, learner_id: str, *, etag: str = "") -> LearnerRecord:
        return await self._operations.complete(self._lifecycle.delete(self._registry.get(learner_id), etag))

    async def undelete(self, learner_id: str, uid: str) -> LearnerRecord:
        return await self._operations.complete(self._lifecycle.undelete(learner_id, uid))

    async def purge(self, learner_id: str, uid: str) -> None:
        await self._operations.complete(self._lifecycle.purge(learner_id, uid))

    async def fork(
        self, source: str, learner_id: str, *, durability: Durability | None, request_id: str
    ) -> LearnerRecord:
        hosted = self._registry.get(source)
        return await self._operations.complete(self._lifecycle.fork(hosted, learner_id, durability, request_id))

    async def import_(
        self,
        learner_id: str,
        data: bytes,
        *,
        durability: Durability,
        request_id: str,
        check_spec: Callable[[LearnerSpec], None],
    ) -> LearnerRecord:
        operation = self._lifecycle.import_(learner_id, data, durability, request_id, check_spec)
        return await self._operations.complete(operation)

    async def export(self, learner_id: str, format_name: str) -> bytes:
        return await self._lifecycle.export(self._registry.get(learner_id), format_name)

    async def create_checkpoint(self, learner_id: str) -> StoredCheckpoint:
        return await self._operations.complete(self._alterations.create_checkpoint(self._registry.get(learner_id)))

    async def checkpoints(self, learner_id: str) -> tuple[list[StoredCheckpoint], int, int]:
        return await self._alterations.checkpoints(self._registry.get(learner_id))

    async def delete_checkpoint(self, learner_id: str, number: int) -> None:
        await self._operations.complete(self._alterations.delete_checkpoint(self._registry.get(learner_id), number))

    async def restore(self, learner_id: str, *, number: int | None, position: int | None, etag: str) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        operation = self._alterations.restore(hosted, number=number, position=position, expected_etag=etag)
        return await self._operations.complete(operation)

    async def resume(self, learner_id: str, lr: float | None, *, skip_batch: bool) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        return await self._operations.complete(self._alterations.resume(hosted, lr, skip_batch=skip_batch))

    async def reset_units(self, learner_id: str, layers: Sequence[str], fraction: float) -> dict[str, int]:
        hosted = self._registry.get(learner_id)
        return await self._operations.complete(self._alterations.reset_units(hosted, layers, fraction))

    async def forget_producer(self, learner_id: str, producer: str) -> None:
        await self._operations.complete(self._training.forget(self._registry.get(learner_id), producer))

    # -- learning and predicting --

    async def open_stream(
        self,
        learner_id: str,
        producer: str,
        *,
        stream_id: str = "",
        resumed_epoch: int = 0,
        learner_uid: str = "",
    ) -> TrainSession:
        """See `Training.open`."""
        return await self._training.open(
            learner_id, producer, stream_id=stream_id, resumed_epoch=resumed_epoch, learner_uid=learner_uid
        )

    async def predict(self, learner_id: str, features: NDArray[np.generic]) -> messages.PredictReport:
        """Raw outputs of the live network between two of its steps, for features [N, …]."""
        hosted = self._registry.get(learner_id)
        checked = validate_features(hosted.record.spec, features)
        return await self._ask(hosted, messages.Predict(hosted.uid, checked))

    async def sample(self, learner_id: str) -> SampleRecord:
        """Measures plasticity now, between two steps."""
        hosted = self._registry.get(learner_id)
        packed = await self._ask(hosted, messages.Sample(hosted.uid))
        hosted.record.samples.extend([packed])
        self._registry.touch(hosted)
        return unpack(packed)

    async def _ask(self, hosted: Hosted, request: messages.Request[AnswerT]) -> AnswerT:
        """The engine's answer about a learner that may have to be brought back first."""
        await self._residence.use(hosted)
        try:
            return await self._engine.call(request)
        except NotInEngine:  # it was evicted meanwhile, or is being rolled back
            await self._residence.use(hosted)
            return await self._engine.call(request)

    # -- time, start, failure and end --

    async def maintain(self) -> None:
        """What time brings: checkpoints that are due, idle learners, deleted ones whose time is over."""
        learners = self._registry.present()
        self._checkpointer.save_due(learners)
        if self._serving and not self._operations.draining:
            await self._residence.evict_idle(learners)
            await self._lifecycle.purge_expired()

    async def engine_up(self, ready: messages.EngineReady) -> None:
        """Restores the learners into a new engine process; each one serves as soon as it is ready."""
        self._announce_readiness()
        self._switch.engine_up(ready)
        await self._residence.engine_up(self._registry.present())
        self._serving = self._restored = True
        self._announce_readiness()

    def engine_down(self) -> None:
        """The engine process has died: nothing is served until another one has restored the learners."""
        self._serving = False
        self._residence.engine_down(self._registry.present())
        self._announce_readiness()

    async def drain(self, timeout_seconds: float) -> int:
        """Takes no more work, lets accepted batches finish, ends the streams and saves what changed.

        Returns the number of learners that could not be saved.
        """
        self._operations.draining = True
        self._announce_readiness()
        self._registry.changed.announce()  # watchers look up and leave
        self._residence.stop()
        under_way: list[asyncio.Future[Any]] = []
        for hosted in self._registry.present():
            hosted.end_sessions(ServerDraining())
            under_way += [future for producer in hosted.producers.values() for future in producer.under_way.values()]
        under_way += self._operations.under_way
        if under_way:
            log.info("finishing what was accepted", operations=len(under_way))
            _, unfinished = await asyncio.wait(under_way, timeout=timeout_seconds)
            if unfinished:
                log.warning("drain timeout: giving up what is not finished", operations=len(unfinished))
                with suppress(EngineUnavailable):
                    await self._engine.call(messages.AbortTraining())
                await asyncio.wait(unfinished)
        return await self._checkpointer.save_all(self._registry.present())

    def _announce_readiness(self) -> None:
        self._on_readiness(self.readiness())


def _last_seen(hosted: Hosted) -> float:
    """Seconds since the epoch."""
    checkpoint = hosted.record.checkpoint
    return (checkpoint.time if checkpoint is not None else hosted.stored.create_time).timestamp()
