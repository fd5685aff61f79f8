"""Batches and their learners: streams opened, batches handed to the engine, and what came of them in the records."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from cbp import Batch, CbpError, FieldViolation
from cbp_server.engine import messages
from cbp_server.errors import (
    InvalidRequest,
    LearnerReplaced,
    NotInEngine,
    ProducerFenced,
    ProducerNotFound,
    ServerDraining,
    TooManyProducers,
)
from cbp_server.learners.checkpointing import Checkpointer
from cbp_server.learners.hosted import Hosted
from cbp_server.learners.operations import Operations
from cbp_server.learners.registry import Registry
from cbp_server.learners.residence import Residence
from cbp_server.store.journal import EntryKind
from cbp_server.streams.byte_budget import ByteBudget
from cbp_server.streams.change_log import ChangeLog, NewEntry, pass_on
from cbp_server.streams.producers import Producer
from cbp_server.streams.sessions import IncomingBatch, TrainSession

log = structlog.get_logger("cbp_server.learners.training")

_LONGEST_PRODUCER = 128
_LONGEST_STREAM_ID = 64


class Training:
    """Opens streams.

    Args:
        credits: batches of a stream that may be unanswered at a time.
        max_message_bytes: largest batch.
        max_queued_bytes: of batches that wait, all streams' together; streams are read no further meanwhile.
        max_producers: of one learner; each is in every checkpoint and every view of it.
        producer_retention: seconds for which a producer that was cut off is kept when another one needs its place.
        on_rejected: called for each batch that is refused.
    """

    def __init__(
        self,
        registry: Registry,
        changes: ChangeLog,
        checkpointer: Checkpointer,
        residence: Residence,
        operations: Operations,
        *,
        credits: int,
        max_message_bytes: int,
        max_queued_bytes: int,
        max_producers: int,
        producer_retention: float,
        on_rejected: Callable[[CbpError], None],
    ) -> None:
        self._registry = registry
        self._changes = changes
        self._checkpointer = checkpointer
        self._residence = residence
        self._operations = operations
        self._credits = credits
        self._max_message_bytes = max_message_bytes
        self._max_producers = max_producers
        self._producer_retention = producer_retention
        self._on_rejected = on_rejected
        self._queued = ByteBudget(max_queued_bytes)

    async def open(
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
            ProducerFenced: the stream is resumed, but another one has been opened since, or the producer is forgotten.
            TooManyProducers: it would be one too many, and none can be forgotten for it.
            LearnerReplaced: the learner is another one.
            JournalUnavailable: the opening could not be written.
        """
        _check_opening(producer, stream_id, resumed_epoch)
        if self._operations.draining:
            raise ServerDraining
        hosted = self._registry.get(learner_id)
        if learner_uid and learner_uid != hosted.uid:
            raise LearnerReplaced(learner_id, hosted.uid)
        await self._residence.use(hosted)
        if self._operations.draining:
            raise ServerDraining
        if not self._registry.has(hosted):
            raise NotInEngine
        self._residence.check_trains(hosted)
        if producer not in hosted.producers:
            if 0 < resumed_epoch <= hosted.epoch_floor:
                raise ProducerFenced(producer, hosted.epoch_floor, forgotten=True)
            self._make_room(hosted)
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
        state = hosted.producers.setdefault(producer, Producer.newcomer(producer, hosted.epoch_floor))
        epoch = state.open(stream_id, resumed_epoch)
        earlier = hosted.sessions.pop(producer, None)
        if earlier is not None:
            earlier.end(ProducerFenced(producer, epoch))
        session = hosted.sessions[producer] = TrainSession(
            hosted.record,
            state,
            credits=self._credits,
            max_message_bytes=self._max_message_bytes,
            sink=partial(self._send, hosted),
            wait_for_room=self._queued.wait_for_room,
            on_rejected=self._on_rejected,
            on_close=partial(self._forget_session, hosted),
        )
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def request(position: int) -> messages.OpenProducer:
            if not written.done():
                written.set_result(None)
            return messages.OpenProducer(hosted.uid, position, producer, epoch, stream_id)

        entry = NewEntry(
            kind=EntryKind.OPEN, payload=stream_id.encode(), producer=producer, life=state.life, epoch=epoch
        )
        opened = self._changes.record(hosted.log, entry, request)
        pass_on(opened, written)  # also if it cannot be written
        self._residence.watch(hosted, opened)  # if it fails, so does the stream's first batch
        self._checkpointer.note_change(hosted)
        self._show_producer(hosted, state)
        return session, written

    # -- producers that go --

    async def forget(self, hosted: Hosted, producer: str) -> None:
        """Gives a producer's name free, behind all that it has sent; its stream, if one is open, is over.

        Raises:
            ProducerNotFound: there is no such producer.
            JournalUnavailable: it could not be written.
        """
        async with hosted.changing:
            self._registry.check_present(hosted, "")
            await self._residence.use(hosted)
            self._registry.check_present(hosted, "")  # once more: it may have taken a while
            self._residence.check_trains(hosted)
            if producer not in hosted.producers:
                raise ProducerNotFound(hosted.learner_id, producer)
            await self._forgotten(hosted, hosted.producers[producer])

    def _make_room(self, hosted: Hosted) -> None:
        """Forgets the producer that has been away longest, if there are as many as there may be.

        One that has ended its stream with everything durable has nothing to send again; another one may come back, and
        is kept for a while. Either goes only when its place is needed.
        """
        if len(hosted.producers) < self._max_producers:
            return
        latest = time.monotonic() - self._producer_retention
        away = [
            producer
            for producer in hosted.producers.values()
            if producer.name not in hosted.sessions
            and not producer.under_way
            and (producer.is_settled or producer.left_at <= latest)
        ]
        if not away:
            raise TooManyProducers(self._max_producers, len(hosted.sessions), self._producer_retention)
        self._forgotten(hosted, min(away, key=lambda producer: producer.left_at))

    def _forgotten(self, hosted: Hosted, producer: Producer) -> "asyncio.Future[None]":
        """When the engine has forgotten the producer; here it is at once."""
        del hosted.producers[producer.name]
        hosted.record.producers.pop(producer.name, None)
        hosted.epoch_floor = max(hosted.epoch_floor, producer.epoch)
        session = hosted.sessions.pop(producer.name, None)
        if session is not None:
            session.end(ProducerFenced(producer.name, producer.epoch, forgotten=True))
        entry = NewEntry(kind=EntryKind.FORGET, payload=producer.name.encode())
        applied = self._changes.record(
            hosted.log, entry, lambda position: messages.ForgetProducer(hosted.uid, position, producer.name)
        )
        self._residence.watch(hosted, applied)
        self._checkpointer.note_change(hosted)
        self._registry.touch(hosted)
        log.info("producer forgotten", learner=hosted.learner_id, producer=producer.name)
        return applied

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
            life=producer.life,
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

    def _forget_session(self, hosted: Hosted, session: TrainSession) -> None:
        if hosted.sessions.get(session.producer.name) is session:
            del hosted.sessions[session.producer.name]
            session.producer.left(finished=session.finished)

    def _show_producer(self, hosted: Hosted, producer: Producer) -> None:
        if hosted.producers.get(producer.name) is producer:  # not one of before a recovery
            # In place: there may be many, and this is per batch.
            hosted.record.producers[producer.name] = producer.record
        self._registry.touch(hosted)


def _check_opening(producer: str, stream_id: str, resumed_epoch: int) -> None:
    if not (1 <= len(producer) <= _LONGEST_PRODUCER and producer.isprintable()):
        description = f"must be 1 to {_LONGEST_PRODUCER} printable characters"
        raise InvalidRequest(FieldViolation("open.producer", description))
    if len(stream_id) > _LONGEST_STREAM_ID or not stream_id.isprintable():
        description = f"must be at most {_LONGEST_STREAM_ID} printable characters"
        raise InvalidRequest(FieldViolation("open.stream_id", description))
    if resumed_epoch < 0:
        raise InvalidRequest(FieldViolation("open.resumed_epoch", f"must not be negative, is {resumed_epoch}"))
