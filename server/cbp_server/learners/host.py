"""The host: owns the live learners, decides what may happen to them, and in which order."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cbp import Batch, CbpError, FieldViolation, LearnerSpec, SnapshotError
from cbp.examples.batches import validate_features
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    EngineUnavailable,
    InvalidRequest,
    LearnerReplaced,
    NotInEngine,
    ProducerFenced,
    ServerDraining,
)
from cbp_server.learners.alterations import Alterations
from cbp_server.learners.checkpointing import Checkpointer, CheckpointObserver, CheckpointPolicy
from cbp_server.learners.engine_choice import EngineChoice
from cbp_server.learners.hosted import Hosted, hosted_from_catalog
from cbp_server.learners.lifecycle import Lifecycle
from cbp_server.learners.paging import page_of
from cbp_server.learners.recovery import Recovery, ReplayObserver
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence, ResidenceObserver
from cbp_server.records.learners import (
    Durability,
    EngineStatus,
    JournalStatus,
    LearnerRecord,
    LearnerState,
)
from cbp_server.records.samples import SampleRecord, unpack
from cbp_server.settings import EngineSetting
from cbp_server.store.catalog import StoredCheckpoint, StoredLearner
from cbp_server.store.journal import EntryKind
from cbp_server.store.storage import Storage
from cbp_server.streams.byte_budget import ByteBudget
from cbp_server.streams.change_log import ChangeLog, NewEntry, pass_on
from cbp_server.streams.producers import Producer
from cbp_server.streams.sessions import IncomingBatch, TrainSession

AnswerT = TypeVar("AnswerT")

_LONGEST_PRODUCER = 128
_LONGEST_STREAM_ID = 64
_MOST_PRODUCERS = 1000  # of one learner: each is in every checkpoint and every view of the learner

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
    """

    max_learners: int
    max_live_learners: int
    evict_after: float
    deleted_retention: float
    max_message_bytes: int
    stream_credits: int
    max_queued_bytes: int
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
        self._queued = ByteBudget(options.max_queued_bytes)
        self._registry = Registry()
        self._changes = ChangeLog(engine, storage.commit)
        self._engines = EngineChoice(options.engine)
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
            on_ready=self._choose_engine,
            observer=observer,
        )
        self._alterations = Alterations(
            engine, storage, self._changes, self._registry, recovery, self._checkpointer, self._residence
        )
        self._lifecycle = Lifecycle(
            engine,
            storage,
            self._registry,
            self._checkpointer,
            self._residence,
            self._engines,
            max_learners=options.max_learners,
            deleted_seconds=options.deleted_retention,
            history_samples=options.history_samples,
        )
        self._restored = False  # once
        self._serving = False
        self._draining = False
        self._operations: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Learns from the catalog which learners there are; before the engine starts.

        Raises:
            JournalUnavailable: the database cannot be read.
        """
        catalog = self._storage.catalog
        learners = await self._storage.run(catalog.learners)
        newest = await self._storage.run(catalog.newest_checkpoints)

        def last_seen(stored: StoredLearner) -> float:
            return (newest[stored.uid].time if stored.uid in newest else stored.create_time).timestamp()

        room = self._options.max_live_learners or len(learners)
        for stored in sorted(learners, key=last_seen, reverse=True):
            state = LearnerState.DELETED
            if stored.delete_time is None:
                state = LearnerState.UNAVAILABLE if room > 0 else LearnerState.EVICTED
                room -= 1
            self._registry.add(
                [hosted_from_catalog(stored, newest.get(stored.uid), state, self._options.history_samples)]
            )

    # -- reading --

    def learners(self, *, deleted: bool = False) -> list[LearnerRecord]:
        """Every learner, by id; on request the deleted ones as well."""
        return [
            hosted.record
            for hosted in self._registry.ordered()
            if not hosted.unreadable and (deleted or hosted.stored.delete_time is None)
        ]

    def learner(self, learner_id: str) -> LearnerRecord:
        """The learner of this id.

        Raises:
            LearnerNotFound: there is none.
            SnapshotError: there is one, but none of its checkpoints can be read.
        """
        hosted = self._registry.get(learner_id)
        if hosted.unreadable:
            raise SnapshotError(hosted.unreadable)
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
        if self._draining:
            reasons.append("the server is shutting down")
        if not self._engine.status.up:
            reasons.append("the engine process is down")
        elif not self._serving:
            reasons.append("learners are being restored")
        return reasons

    def unreadable(self) -> Mapping[str, str]:
        """Learners that could not be restored, and why."""
        return {hosted.learner_id: hosted.unreadable for hosted in self._registry.present() if hosted.unreadable}

    @property
    def draining(self) -> bool:
        """Whether the server is on its way down."""
        return self._draining

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
        return await self._complete(self._lifecycle.create(learner_id, spec, durability, request_id))

    async def update(
        self,
        learner_id: str,
        revise: Callable[[LearnerSpec], LearnerSpec],
        *,
        durability: Durability | None = None,
        etag: str = "",
    ) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        return await self._complete(self._alterations.update(hosted, revise, durability, etag))

    async def delete(self, learner_id: str, *, etag: str = "") -> LearnerRecord:
        return await self._complete(self._lifecycle.delete(self._registry.get(learner_id), etag))

    async def undelete(self, learner_id: str, uid: str) -> LearnerRecord:
        return await self._complete(self._lifecycle.undelete(learner_id, uid))

    async def purge(self, learner_id: str, uid: str) -> None:
        await self._complete(self._lifecycle.purge(learner_id, uid))

    async def fork(
        self, source: str, learner_id: str, *, durability: Durability | None, request_id: str
    ) -> LearnerRecord:
        hosted = self._registry.get(source)
        return await self._complete(self._lifecycle.fork(hosted, learner_id, durability, request_id))

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
        return await self._complete(operation)

    async def export(self, learner_id: str, format_name: str) -> bytes:
        return await self._lifecycle.export(self._registry.get(learner_id), format_name)

    async def create_checkpoint(self, learner_id: str) -> StoredCheckpoint:
        return await self._complete(self._alterations.create_checkpoint(self._registry.get(learner_id)))

    async def checkpoints(self, learner_id: str) -> tuple[list[StoredCheckpoint], int, int]:
        return await self._alterations.checkpoints(self._registry.get(learner_id))

    async def delete_checkpoint(self, learner_id: str, number: int) -> None:
        await self._complete(self._alterations.delete_checkpoint(self._registry.get(learner_id), number))

    async def restore(self, learner_id: str, *, number: int | None, position: int | None, etag: str) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        operation = self._alterations.restore(hosted, number=number, position=position, expected_etag=etag)
        return await self._complete(operation)

    async def resume(self, learner_id: str, lr: float | None, *, skip_batch: bool) -> LearnerRecord:
        hosted = self._registry.get(learner_id)
        return await self._complete(self._alterations.resume(hosted, lr, skip_batch=skip_batch))

    async def reset_units(self, learner_id: str, layers: Sequence[str], fraction: float) -> dict[str, int]:
        hosted = self._registry.get(learner_id)
        return await self._complete(self._alterations.reset_units(hosted, layers, fraction))

    async def _complete(self, operation: Coroutine[Any, Any, AnswerT]) -> AnswerT:
        """Carries an operation through even if its caller goes away half-way: engine and records must agree."""
        if self._draining:
            operation.close()
            raise ServerDraining
        task = asyncio.create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._forget_operation)
        return await asyncio.shield(task)

    def _forget_operation(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody does any more, it is nobody's

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
        """A stream of one producer; an earlier one of the same producer is fenced.

        It begins when what it begins with is in the journal: what an earlier process sent and nobody acknowledged will
        not be sent again once the next process has been told that it is here.

        Args:
            stream_id: names the stream through its reconnections.
            resumed_epoch: the epoch that this stream had before; 0 if it takes the producer over.
            learner_uid: if given, the uid that the learner must have.

        Raises:
            ProducerFenced: the stream is resumed, but another one has been opened since.
            LearnerReplaced: the learner is another one.
            JournalUnavailable: the opening could not be written.
        """
        _check_opening(producer, stream_id, resumed_epoch)
        if self._draining:
            raise ServerDraining
        hosted = self._registry.get(learner_id)
        if learner_uid and learner_uid != hosted.uid:
            raise LearnerReplaced(learner_id, hosted.uid)
        await self._residence.use(hosted)
        if not self._registry.has(hosted) or self._draining:
            raise ServerDraining if self._draining else NotInEngine
        self._residence.check_trains(hosted)
        if producer not in hosted.producers and len(hosted.producers) >= _MOST_PRODUCERS:
            description = f"would be one more than the {_MOST_PRODUCERS} that one learner may have; use the names again"
            raise InvalidRequest(FieldViolation("open.producer", description))
        session, written = self._opened_stream(hosted, producer, stream_id, resumed_epoch)
        try:
            await written
        except BaseException:
            session.close()
            raise
        return session

    def _opened_stream(
        self, hosted: Hosted, producer: str, stream_id: str, resumed_epoch: int
    ) -> tuple[TrainSession, "asyncio.Future[None]"]:
        """The stream, and when its opening, with all that was accepted before it, is in the journal."""
        state = hosted.producers.setdefault(producer, Producer(producer))
        epoch = state.open(stream_id, resumed_epoch)
        earlier = hosted.sessions.pop(producer, None)
        if earlier is not None:
            earlier.end(ProducerFenced(producer, epoch))
        session = hosted.sessions[producer] = TrainSession(
            hosted.record,
            state,
            credits=self._options.stream_credits,
            max_message_bytes=self._options.max_message_bytes,
            sink=partial(self._send, hosted),
            wait_for_room=self._queued.wait_for_room,
            on_rejected=self._observer.batch_rejected,
            on_close=partial(self._forget_session, hosted),
        )
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def request(position: int) -> messages.OpenProducer:
            if not written.done():
                written.set_result(None)
            return messages.OpenProducer(hosted.uid, position, producer, epoch, stream_id)

        entry = NewEntry(kind=EntryKind.OPEN, payload=stream_id.encode(), producer=producer, epoch=epoch)
        opened = self._changes.record(hosted.log, entry, request)
        pass_on(opened, written)  # also if it cannot be written
        self._residence.watch(hosted, opened)  # if it fails, so does the stream's first batch
        self._checkpointer.note_change(hosted)
        self._show_producer(hosted, state)
        return session, written

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

    def _send(
        self, hosted: Hosted, producer: Producer, epoch: int, incoming: IncomingBatch, batch: Batch
    ) -> asyncio.Future[messages.TrainReport]:
        self._residence.check_trains(hosted)
        journaled = hosted.log.journals_batches

        def request(position: int) -> messages.Train:
            if journaled:
                producer.make_durable(incoming.sequence)
                self._show_producer(hosted, producer)
            return messages.Train(
                hosted.uid,
                position,
                producer.name,
                epoch,
                incoming.sequence,
                incoming.payload_hash,
                batch,
                incoming.return_outputs,
                journaled,
            )

        entry = NewEntry(
            kind=EntryKind.BATCH,
            payload=incoming.payload,
            payload_hash=incoming.payload_hash,
            producer=producer.name,
            epoch=epoch,
            sequence=incoming.sequence,
        )
        applied = self._changes.record(hosted.log, entry, request)
        hosted.used = time.monotonic()
        hosted.record.queued_batches += 1
        # Arrays that need no conversion are views of the payload.
        size = max(len(incoming.payload), batch.features.nbytes + batch.targets.nbytes)
        self._queued.take(size)
        # Registered first, so whoever awaits the future finds the record and the positions up to date.
        applied.add_done_callback(partial(self._applied, hosted, producer, incoming, size))
        return applied

    def _applied(
        self,
        hosted: Hosted,
        producer: Producer,
        incoming: IncomingBatch,
        size: int,
        applied: asyncio.Future[messages.TrainReport],
    ) -> None:
        self._queued.give_back(size)
        record = hosted.record
        record.queued_batches -= 1
        if applied.cancelled() or applied.exception() is not None:
            producer.retract(incoming.sequence)
            self._residence.settle(hosted, applied)
            return
        report = applied.result()
        producer.settle(incoming.sequence)
        if report.progress is not None:
            record.progress = report.progress
        record.samples.extend(report.samples)
        journal_bytes = len(incoming.payload) if hosted.log.journals_batches else 0
        self._checkpointer.note_change(hosted, steps=report.result.steps, journal_bytes=journal_bytes)
        self._show_producer(hosted, producer)

    # -- time, start, failure and end --

    async def maintain(self) -> None:
        """What time brings: checkpoints that are due, idle learners, deleted ones whose time is over."""
        learners = self._registry.present()
        self._checkpointer.save_due(learners)
        if self._serving and not self._draining:
            await self._residence.evict_idle(learners)
            await self._lifecycle.purge_expired()

    async def engine_up(self, ready: messages.EngineReady) -> None:
        """Restores the learners into a new engine process; each one serves as soon as it is ready."""
        self._announce_readiness()
        self._engines.device, self._engines.compiled = ready.device, ready.compiled
        if not ready.compiled:
            self._engine.submit(messages.Prepare()).add_done_callback(self._prepared)
        await self._residence.engine_up(self._registry.present())
        self._serving = self._restored = True
        self._announce_readiness()

    def _prepared(self, prepared: "asyncio.Future[messages.PrepareReport]") -> None:
        if prepared.cancelled() or prepared.exception() is not None or not prepared.result().compiled:
            return
        self._engines.compiled = True
        for hosted in self._registry.present():
            if hosted.recovery is None:
                self._choose_engine(hosted)

    def _choose_engine(self, hosted: Hosted) -> None:
        """Has the learner go on with the engine that it should have; from which entry on, its journal says."""
        wanted = self._engines.of(hosted.record.spec)
        if wanted == hosted.record.engine or not hosted.in_engine or hosted.stored.quarantine is not None:
            return

        def switched(applied: "asyncio.Future[None]") -> None:
            if not applied.cancelled() and applied.exception() is None:
                hosted.record.engine = wanted
                self._registry.touch(hosted)
                log.info("learner goes on with another engine", learner=hosted.learner_id, engine=wanted)

        applied = self._changes.record(
            hosted.log,
            NewEntry(kind=EntryKind.ENGINE, payload=wanted.encode()),
            lambda position: messages.SwitchEngine(hosted.uid, position, wanted),
        )
        applied.add_done_callback(switched)
        self._residence.watch(hosted, applied)
        self._checkpointer.note_change(hosted)

    def engine_down(self) -> None:
        """The engine process has died: nothing is served until another one has restored the learners."""
        self._serving = False
        self._residence.engine_down(self._registry.present())
        self._announce_readiness()

    async def drain(self, timeout_seconds: float) -> int:
        """Takes no more work, lets accepted batches finish, ends the streams and saves what changed.

        Returns the number of learners that could not be saved.
        """
        self._draining = True
        self._announce_readiness()
        self._registry.changed.announce()  # watchers look up and leave
        self._residence.stop()
        under_way: list[asyncio.Future[Any]] = []
        for hosted in self._registry.present():
            hosted.end_sessions(ServerDraining())
            under_way += [future for producer in hosted.producers.values() for future in producer.under_way.values()]
        under_way += self._operations
        if under_way:
            log.info("finishing what was accepted", operations=len(under_way))
            _, unfinished = await asyncio.wait(under_way, timeout=timeout_seconds)
            if unfinished:
                log.warning("drain timeout: giving up what is not finished", operations=len(unfinished))
                with suppress(EngineUnavailable):
                    await self._engine.call(messages.AbortTraining())
                await asyncio.wait(unfinished)
        return await self._checkpointer.save_all(self._registry.present())

    # -- helpers --

    def _forget_session(self, hosted: Hosted, session: TrainSession) -> None:
        if hosted.sessions.get(session.producer.name) is session:
            del hosted.sessions[session.producer.name]

    def _show_producer(self, hosted: Hosted, producer: Producer) -> None:
        if hosted.producers.get(producer.name) is producer:  # not one of before a recovery
            # In place: there may be many, and this is per batch.
            hosted.record.producers[producer.name] = producer.record
        self._registry.touch(hosted)

    def _announce_readiness(self) -> None:
        self._on_readiness(self.readiness())


def _check_opening(producer: str, stream_id: str, resumed_epoch: int) -> None:
    if not (1 <= len(producer) <= _LONGEST_PRODUCER and producer.isprintable()):
        description = f"must be 1 to {_LONGEST_PRODUCER} printable characters"
        raise InvalidRequest(FieldViolation("open.producer", description))
    if len(stream_id) > _LONGEST_STREAM_ID or not stream_id.isprintable():
        description = f"must be at most {_LONGEST_STREAM_ID} printable characters"
        raise InvalidRequest(FieldViolation("open.stream_id", description))
    if resumed_epoch < 0:
        raise InvalidRequest(FieldViolation("open.resumed_epoch", f"must not be negative, is {resumed_epoch}"))
