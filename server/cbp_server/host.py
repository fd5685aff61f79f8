"""The host: owns the live learners, decides what may happen to them, and in which order."""

import asyncio
import hashlib
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from cbp import Batch, CbpError, FieldViolation, LearnerSpec, SnapshotError
from cbp.batches import validate_features
from cbp.errors import shown
from cbp_server.broadcast import Broadcast
from cbp_server.byte_budget import ByteBudget
from cbp_server.change_log import ChangeLog, LearnerLog
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import (
    EngineUnavailable,
    EtagMismatch,
    InvalidRequest,
    LearnerExists,
    LearnerNotFound,
    LimitReached,
    ProducerFenced,
    RequestIdReused,
    ServerDraining,
)
from cbp_server.paging import page_of
from cbp_server.producers import Producer
from cbp_server.records import CheckpointRecord, EngineStatus, LearnerRecord, LearnerState, SampleRecord
from cbp_server.sessions import IncomingBatch, TrainSession
from cbp_server.store.journal import EntryKind

AnswerT = TypeVar("AnswerT")

_LEARNER_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LONGEST_PRODUCER = 128
_MOST_PRODUCERS = 1000  # of one learner: each is in every checkpoint and every view of the learner
#: Checkpoints under way at a time, each with a copy of its learner's state.
_CHECKPOINTS_AT_ONCE = 4

log = structlog.get_logger("cbp_server.host")


class HostObserver(Protocol):
    """Counts what happens, for the metrics."""

    def batch_rejected(self, error: CbpError) -> None: ...
    def checkpoint_written(self, seconds: float, size_bytes: int) -> None: ...
    def checkpoint_failed(self) -> None: ...


class _Hosted:
    """A learner's record and what only the host needs beside it."""

    def __init__(self, record: LearnerRecord, identity: messages.Identity) -> None:
        self.record = record
        self.identity = identity
        self.producers: dict[str, Producer] = {}
        self.sessions: dict[str, TrainSession] = {}  # by producer
        self.changing = asyncio.Lock()  # one update or deletion at a time
        self.changes = 0  # batches applied and streams opened so far; updates save themselves
        self.changes_saved = 0  # of which a checkpoint holds at least these
        self.log = LearnerLog(record.uid, position=0)


class Host:
    """The live learners of one engine.

    Args:
        max_learners: learners that may exist.
        max_message_bytes: largest batch or prediction request.
        stream_credits: batches that one stream may have unanswered.
        max_queued_bytes: memory of all batches that wait; streams are not read while it is taken.
        history_samples: plasticity samples kept of each learner.
        on_readiness: called with the reasons why the host is not ready, whenever they change; none means ready.
    """

    def __init__(
        self,
        *,
        max_learners: int,
        max_message_bytes: int,
        stream_credits: int,
        max_queued_bytes: int,
        history_samples: int,
        observer: HostObserver,
        on_readiness: Callable[[Sequence[str]], None],
    ) -> None:
        self._max_learners = max_learners
        self._max_message_bytes = max_message_bytes
        self._stream_credits = stream_credits
        self._queued = ByteBudget(max_queued_bytes)
        self._history_samples = history_samples
        self._change_log: ChangeLog | None = None
        self._observer = observer
        self._on_readiness = on_readiness
        self._engine: Engine | None = None
        self._hosted: dict[str, _Hosted] = {}
        self._unreadable: dict[str, str] = {}
        self._creation = asyncio.Lock()
        self._changed = Broadcast()
        self._restored = False  # once
        self._serving = False
        self._draining = False
        self._operations: set[asyncio.Task[Any]] = set()

    def attach(self, engine: Engine, changes: ChangeLog) -> None:
        """Names the engine whose learners these are, and the way of changes to it; before anything else."""
        self._engine = engine
        self._change_log = changes

    # -- reading --

    def learners(self) -> list[LearnerRecord]:
        """Every learner, by id."""
        # Metrics read on a thread of their own: the copy is made in one go, so nothing can come or go meanwhile.
        records = [hosted.record for hosted in list(self._hosted.values())]
        return sorted(records, key=lambda record: record.learner_id)

    def learner(self, learner_id: str) -> LearnerRecord:
        """The learner of this id.

        Raises:
            LearnerNotFound: there is none.
            SnapshotError: there is one on disk, but none of its checkpoints can be read.
        """
        return self._get(learner_id).record

    def page(self, page_size: int, page_token: str) -> tuple[list[LearnerRecord], str]:
        """One page of learners by id, and the token of the next one, empty on the last."""
        if not self._restored:
            raise EngineUnavailable  # a part of the learners must not look like all of them
        return page_of(self.learners(), page_size, page_token)

    def samples(self, learner_id: str, count: int) -> list[SampleRecord]:
        """The newest samples, oldest first."""
        return list(self.learner(learner_id).samples)[-count:] if count > 0 else []

    def readiness(self) -> list[str]:
        """Why the host is not ready; empty if it is."""
        reasons = []
        if self._draining:
            reasons.append("the server is shutting down")
        if self._engine is None or not self._engine.status.up:
            reasons.append("the engine process is down")
        elif not self._serving:
            reasons.append("learners are being restored")
        return reasons

    def unreadable(self) -> Mapping[str, str]:
        """Learners on disk that could not be restored, and why."""
        return self._unreadable

    @property
    def draining(self) -> bool:
        """Whether the server is on its way down."""
        return self._draining

    def engine_status(self) -> EngineStatus:
        return self._running_engine.status

    @property
    def open_streams(self) -> int:
        return sum(len(hosted.sessions) for hosted in list(self._hosted.values()))

    async def wait_for_change(self) -> None:
        """Returns when any learner has changed, come or gone."""
        await self._changed.wait()

    # -- life of a learner --

    async def create(self, learner_id: str, spec: LearnerSpec, *, request_id: str = "") -> LearnerRecord:
        """A new learner, saved; or, repeated with the same request_id, the one that was made the first time."""
        _check_learner_id(learner_id)
        _check_request_id(request_id)
        return await self._complete(self._create(learner_id, spec, request_id))

    async def update(
        self, learner_id: str, revise: Callable[[LearnerSpec], LearnerSpec], *, etag: str = ""
    ) -> LearnerRecord:
        """Gives a live learner the spec that `revise` makes of its present one, behind every batch accepted so far."""
        return await self._complete(self._update(self._get(learner_id), revise, etag))

    async def delete(self, learner_id: str, *, etag: str = "") -> None:
        """Removes the learner and its checkpoints, and ends its streams."""
        await self._complete(self._delete(self._get(learner_id), etag))

    async def _complete(self, operation: Coroutine[Any, Any, AnswerT]) -> AnswerT:
        """Carries an operation through even if its caller goes away half-way: engine and records must agree."""
        task = asyncio.create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._forget_operation)
        return await asyncio.shield(task)

    def _forget_operation(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody does any more, it is nobody's

    async def _create(self, learner_id: str, spec: LearnerSpec, request_id: str) -> LearnerRecord:
        digest = _digest({"learner_id": learner_id, "spec": spec.to_plain()})
        async with self._creation:
            self._check_serving()
            if request_id and (earlier := self._created_by(request_id)) is not None:
                if earlier.identity.request_digest != digest:
                    raise RequestIdReused(request_id)
                return earlier.record
            if learner_id in self._hosted or learner_id in self._unreadable:
                raise LearnerExists(learner_id)
            if len(self._hosted) >= self._max_learners:
                raise LimitReached(self._max_learners)
            now = datetime.now(UTC).isoformat()
            identity = messages.Identity(learner_id, uuid.uuid4().hex, now, now, request_id, digest)
            report = await self._running_engine.call(messages.Create(learner_id, identity, spec))
            self._host(report)
        log.info("learner created", learner=learner_id, resets=spec.resets.layers)
        return self._hosted[learner_id].record

    async def _update(self, hosted: _Hosted, revise: Callable[[LearnerSpec], LearnerSpec], etag: str) -> LearnerRecord:
        record = hosted.record
        async with hosted.changing:
            self._check_serving()
            self._check_current(hosted, etag)
            spec = revise(record.spec)
            record.spec.check_update(spec)
            update_time = datetime.now(UTC).isoformat()
            payload = json.dumps({"update_time": update_time, "spec": spec.to_plain()}).encode()

            def request(position: int) -> messages.Update:
                return messages.Update(record.learner_id, position, update_time, spec)

            await self._changes.record(hosted.log, request, kind=EntryKind.UPDATE, payload=payload)
            hosted.identity = replace(hosted.identity, update_time=update_time)
            record.spec, record.etag = spec, _etag(hosted.identity, spec)
            record.update_time = datetime.fromisoformat(update_time)
            hosted.changes += 1
            self._touch(hosted)
        log.info("learner updated", learner=record.learner_id)
        return record

    async def _delete(self, hosted: _Hosted, etag: str) -> None:
        learner_id = hosted.record.learner_id
        async with hosted.changing:
            self._check_serving()
            self._check_current(hosted, etag)
            await self._running_engine.call(messages.Delete(learner_id))
            await self._changes.forget(hosted.record.uid)
            del self._hosted[learner_id]
            for session in hosted.sessions.values():
                session.end(LearnerNotFound(learner_id))
            self._changed.announce()
        log.info("learner deleted", learner=learner_id)

    # -- learning and predicting --

    def open_stream(self, learner_id: str, producer: str) -> TrainSession:
        """A stream of one producer; an earlier one of the same producer is fenced."""
        if not (1 <= len(producer) <= _LONGEST_PRODUCER and producer.isprintable()):
            description = f"must be 1 to {_LONGEST_PRODUCER} printable characters"
            raise InvalidRequest(FieldViolation("open.producer", description))
        hosted = self._get(learner_id)
        if self._draining:
            raise ServerDraining
        if hosted.record.state is not LearnerState.ACTIVE:
            raise EngineUnavailable
        if producer not in hosted.producers and len(hosted.producers) >= _MOST_PRODUCERS:
            description = f"would be one more than the {_MOST_PRODUCERS} that one learner may have; use the names again"
            raise InvalidRequest(FieldViolation("open.producer", description))
        state = hosted.producers.setdefault(producer, Producer(producer))
        earlier = hosted.sessions.pop(producer, None)
        session = hosted.sessions[producer] = TrainSession(
            hosted.record,
            state,
            credits=self._stream_credits,
            max_message_bytes=self._max_message_bytes,
            sink=partial(self._send, hosted),
            wait_for_room=self._queued.wait_for_room,
            on_rejected=self._observer.batch_rejected,
            on_close=partial(self._forget_session, hosted),
        )
        if earlier is not None:
            earlier.end(ProducerFenced(producer, session.epoch))
        opened = self._changes.record(
            hosted.log,
            lambda position: messages.OpenProducer(learner_id, position, producer, session.epoch),
            kind=EntryKind.OPEN,
            payload=b"",
            producer=producer,
            epoch=session.epoch,
        )
        opened.add_done_callback(_ignore_failure)  # if it fails, so does the stream's first batch
        hosted.changes += 1
        self._show_producer(hosted, state)
        return session

    async def predict(self, learner_id: str, features: NDArray[np.generic]) -> messages.PredictReport:
        """Raw outputs of the live network between two of its steps, for features [N, in_features]."""
        record = self._get(learner_id).record
        if record.state is not LearnerState.ACTIVE:
            raise EngineUnavailable
        checked = validate_features(record.spec, features)
        return await self._running_engine.call(messages.Predict(learner_id, checked))

    async def sample(self, learner_id: str) -> SampleRecord:
        """Measures plasticity now, between two steps."""
        hosted = self._get(learner_id)
        sample = await self._running_engine.call(messages.Sample(learner_id))
        hosted.record.samples.append(sample)
        self._touch(hosted)
        return sample

    def _send(
        self, hosted: _Hosted, producer: Producer, epoch: int, incoming: IncomingBatch, batch: Batch
    ) -> asyncio.Future[messages.TrainReport]:
        if hosted.record.state is not LearnerState.ACTIVE:
            raise EngineUnavailable

        def request(position: int) -> messages.Train:
            producer.make_durable(incoming.sequence)
            self._show_producer(hosted, producer)
            return messages.Train(
                hosted.record.learner_id,
                position,
                producer.name,
                epoch,
                incoming.sequence,
                incoming.payload_hash,
                batch,
                incoming.return_outputs,
            )

        applied = self._changes.record(
            hosted.log,
            request,
            kind=EntryKind.BATCH,
            payload=incoming.payload,
            payload_hash=incoming.payload_hash,
            producer=producer.name,
            epoch=epoch,
            sequence=incoming.sequence,
        )
        hosted.record.queued_batches += 1
        size = batch.features.nbytes + batch.targets.nbytes + len(incoming.payload)
        self._queued.take(size)
        applied.add_done_callback(lambda _: self._queued.give_back(size))
        # Registered first, so whoever awaits the future finds the record and the positions up to date.
        applied.add_done_callback(partial(self._applied, hosted, producer, incoming.sequence))
        return applied

    def _applied(
        self, hosted: _Hosted, producer: Producer, sequence: int, applied: asyncio.Future[messages.TrainReport]
    ) -> None:
        record = hosted.record
        record.queued_batches -= 1
        if applied.cancelled() or applied.exception() is not None:
            producer.retract(sequence)
            return
        report = applied.result()
        producer.settle(sequence)
        hosted.changes += 1
        if report.progress is not None:
            record.progress = report.progress
        record.samples.extend(report.samples)
        self._show_producer(hosted, producer)

    # -- checkpoints --

    async def checkpoint_changed(self) -> int:
        """Saves every learner that changed since its last checkpoint; the number of those that could not be saved."""
        changed = [hosted for hosted in self._hosted.values() if hosted.changes > hosted.changes_saved]
        at_once = asyncio.Semaphore(_CHECKPOINTS_AT_ONCE)

        async def save(hosted: _Hosted) -> bool:
            async with at_once:
                return await self._checkpoint(hosted)

        return (await asyncio.gather(*(save(hosted) for hosted in changed))).count(False)

    async def _checkpoint(self, hosted: _Hosted) -> bool:
        """Whether everything of the learner is saved; one that has been deleted has nothing to save."""
        learner_id, changes = hosted.record.learner_id, hosted.changes
        if self._hosted.get(learner_id) is not hosted:
            return True
        try:
            report = await self._running_engine.call(messages.Checkpoint(learner_id))
        except LearnerNotFound:
            return True
        except CbpError as error:
            self._observer.checkpoint_failed()
            log.error("checkpoint failed", learner=learner_id, error=str(error))
            return False
        if report.identity.uid == hosted.identity.uid:  # not that of a new learner of the same name
            self._note_checkpoint(hosted, report, changes)
            await self._changes.truncate(hosted.log)
        return True

    def _note_checkpoint(self, hosted: _Hosted, report: messages.LearnerReport, changes: int) -> None:
        checkpoint = report.checkpoint
        self._observer.checkpoint_written(checkpoint.seconds, checkpoint.size_bytes)
        hosted.changes_saved = max(hosted.changes_saved, changes)
        hosted.record.checkpoint = _checkpoint_record(report)
        if report.progress.step >= hosted.record.progress.step:
            hosted.record.progress = report.progress
        hosted.log.checkpoints.append(report.journal_position)
        self._touch(hosted)

    # -- start, failure and end --

    async def engine_up(self, ready: messages.EngineReady) -> None:
        """Restores every stored learner into a new engine process; each one serves as soon as it is ready."""
        started = time.monotonic()
        self._announce_readiness()
        self._unreadable.clear()
        for gone in self._hosted.keys() - set(ready.stored_learners):
            del self._hosted[gone]  # its deletion was under way when the process before ended
        await asyncio.gather(*(self._load(learner_id) for learner_id in ready.stored_learners))
        if not self._unreadable:  # whose entries they are is not known
            await self._changes.forget_others([hosted.record.uid for hosted in self._hosted.values()])
        self._serving = self._restored = True
        self._announce_readiness()
        seconds = round(time.monotonic() - started, 3)
        log.info("learners restored", learners=len(self._hosted), unreadable=len(self._unreadable), seconds=seconds)

    def engine_down(self) -> None:
        """The engine process has died: nothing is served until another one has restored the learners."""
        self._serving = False
        for hosted in self._hosted.values():
            hosted.record.state = LearnerState.UNAVAILABLE
            for session in hosted.sessions.values():
                session.end(EngineUnavailable("the engine process ended; the stream resumes once it is back"))
            self._touch(hosted)
        self._announce_readiness()

    async def drain(self, timeout_seconds: float) -> int:
        """Takes no more work, lets accepted batches finish, ends the streams and saves what changed.

        Returns the number of learners that could not be saved.
        """
        self._draining = True
        self._announce_readiness()
        self._changed.announce()  # watchers look up and leave
        under_way = []
        for hosted in self._hosted.values():
            for session in hosted.sessions.values():
                session.end(ServerDraining())
            under_way += [future for producer in hosted.producers.values() for future in producer.under_way]
        under_way += self._operations
        if under_way:
            log.info("finishing what was accepted", operations=len(under_way))
            _, unfinished = await asyncio.wait(under_way, timeout=timeout_seconds)
            if unfinished:
                log.warning("drain timeout: giving up what is not finished", operations=len(unfinished))
                with suppress(EngineUnavailable):
                    await self._running_engine.call(messages.AbortTraining())
                await asyncio.wait(unfinished)
        return await self.checkpoint_changed()

    async def _load(self, learner_id: str) -> None:
        try:
            loaded = await self._running_engine.call(messages.Load(learner_id))
            report = await self._changes.replay(loaded.learner)
        except EngineUnavailable:
            raise
        except CbpError as error:
            self._hosted.pop(learner_id, None)
            self._unreadable[learner_id] = str(error)
            log.error("learner not restored", learner=learner_id, error=str(error))
        else:
            self._host(report, loaded.samples)

    def _host(self, report: messages.LearnerReport, samples: Sequence[SampleRecord] = ()) -> None:
        """Takes up a learner as the engine reports it."""
        identity, learner_id = report.identity, report.identity.learner_id
        before = self._hosted.get(learner_id)
        record = LearnerRecord(
            learner_id=learner_id,
            uid=identity.uid,
            spec=report.spec,
            etag=_etag(identity, report.spec),
            create_time=datetime.fromisoformat(identity.create_time),
            update_time=datetime.fromisoformat(identity.update_time),
            state=LearnerState.ACTIVE,
            progress=report.progress,
            samples=deque(samples, maxlen=self._history_samples),
            checkpoint=_checkpoint_record(report),
            version=0 if before is None else before.record.version,
        )
        hosted = self._hosted[learner_id] = _Hosted(record, identity)
        hosted.producers = {name: Producer(name, position) for name, position in report.positions.items()}
        record.producers = {name: producer.record for name, producer in hosted.producers.items()}
        hosted.log.position = report.journal_position
        hosted.log.checkpoints.append(report.journal_position)
        self._touch(hosted)

    # -- helpers --

    @property
    def _changes(self) -> ChangeLog:
        if self._change_log is None:
            raise EngineUnavailable
        return self._change_log

    @property
    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise EngineUnavailable
        return self._engine

    def _get(self, learner_id: str) -> _Hosted:
        hosted = self._hosted.get(learner_id)
        if hosted is None:
            if learner_id in self._unreadable:
                raise SnapshotError(self._unreadable[learner_id])
            if not self._serving and not self._draining:
                raise EngineUnavailable  # it may be one of those that are still to be restored
            raise LearnerNotFound(learner_id)
        return hosted

    def _created_by(self, request_id: str) -> _Hosted | None:
        return next((hosted for hosted in self._hosted.values() if hosted.identity.request_id == request_id), None)

    def _check_serving(self) -> None:
        if self._draining:
            raise ServerDraining
        if not self._serving:
            raise EngineUnavailable

    def _check_current(self, hosted: _Hosted, etag: str) -> None:
        if self._hosted.get(hosted.record.learner_id) is not hosted:
            raise LearnerNotFound(hosted.record.learner_id)  # deleted while this call waited its turn
        if etag and etag != hosted.record.etag:
            raise EtagMismatch(hosted.record.learner_id, hosted.record.etag)

    def _forget_session(self, hosted: _Hosted, session: TrainSession) -> None:
        if hosted.sessions.get(session.producer.name) is session:
            del hosted.sessions[session.producer.name]

    def _show_producer(self, hosted: _Hosted, producer: Producer) -> None:
        hosted.record.producers[producer.name] = producer.record  # in place: there may be many, and this is per batch
        self._touch(hosted)

    def _touch(self, hosted: _Hosted) -> None:
        hosted.record.version += 1
        self._changed.announce()

    def _announce_readiness(self) -> None:
        self._on_readiness(self.readiness())


def _check_learner_id(learner_id: str) -> None:
    if not _LEARNER_ID.fullmatch(learner_id):
        description = (
            "must be 1 to 63 characters of a-z, 0-9 and hyphen, beginning with a letter and not ending with a hyphen, "
            f"not {shown(learner_id)}"
        )
        raise InvalidRequest(FieldViolation("learner_id", description))


def _check_request_id(request_id: str) -> None:
    if request_id:
        try:
            uuid.UUID(request_id)
        except ValueError:
            raise InvalidRequest(FieldViolation("request_id", f"must be a UUID, not {shown(request_id)}")) from None


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def _etag(identity: messages.Identity, spec: LearnerSpec) -> str:
    """Differs after each update, also after one that brings an earlier spec back."""
    return _digest({"uid": identity.uid, "update_time": identity.update_time, "spec": spec.to_plain()})[:16]


def _ignore_failure(future: "asyncio.Future[None]") -> None:
    if not future.cancelled():
        future.exception()


def _checkpoint_record(report: messages.LearnerReport) -> CheckpointRecord:
    written = datetime.fromtimestamp(report.checkpoint.time, UTC)
    return CheckpointRecord(report.progress.step, written, report.checkpoint.size_bytes)
