"""The engine process: holds the learners' tensors and carries out requests from the front, one at a time.

Four threads: one reads requests into the inbox, the main one carries them out, one writes checkpoints, and one tests
trainability on copies. The process ends when the front closes its end of the socket, so it never outlives the front.
"""

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import structlog
import torch

from cbp import (
    CbpError,
    DivergenceError,
    EngineName,
    Learner,
    LearnerProgress,
    LearnerSnapshot,
    LearnerSpec,
    PlasticitySample,
    SnapshotError,
    Trainability,
    TrainResult,
)
from cbp_server.engine import messages, training
from cbp_server.engine.frames import encode_frame, receive_frame
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.outbox import Outbox
from cbp_server.engine.preparation import Preparation
from cbp_server.engine.spares import SpareSnapshots
from cbp_server.engine.trainability import TrainabilityTests
from cbp_server.engine.training import Pace, StopTrainingError, TrainingJob
from cbp_server.errors import (
    BatchNotLearnt,
    CheckpointFailed,
    CheckpointsUnreachable,
    EngineFault,
    NotInEngine,
    SequenceGap,
    ServerDraining,
)
from cbp_server.process.logs import configure_logging
from cbp_server.process.memory import keep_freed_memory, shorten_collections
from cbp_server.records.samples import PackedSample, SampleHistory, SampleRecord, pack, unpack
from cbp_server.store.checkpoints import CheckpointFiles

#: Seconds between two full progress reports of a learner that has more batches waiting.
_PROGRESS_INTERVAL = 0.25
#: Seconds after which a learner begins no other batch in its turn, and batches of a turn at most.
_LONGEST_TURN = 2e-3
_LONGEST_ROW = 16
#: Newest plasticity samples saved with each checkpoint, so that a restart does not blind its watchers.
_SAMPLES_SAVED = 100
#: Learners that share a call of the stacked engine at most.
_LARGEST_GROUP = 1024
#: Learners of a call of compiled code that one thread goes through, one after another; others wait meanwhile.
_SHARES_OF_A_THREAD = 4
_SERVICE_KEY = "cbp_server"

log = structlog.get_logger("cbp_server.engine")


@dataclass
class ProducerState:
    """A `messages.Position` that changes in place: with every batch, of which hundreds of hashes are remembered."""

    epoch: int
    sequence: int
    hashes: deque[tuple[int, str]]
    stream_id: str

    @classmethod
    def at(cls, position: messages.Position) -> "ProducerState":
        hashes = deque(position.hashes, maxlen=messages.HASHES_KEPT)
        return cls(position.epoch, position.sequence, hashes, position.stream_id)

    @property
    def position(self) -> messages.Position:
        return messages.Position(self.epoch, self.sequence, tuple(self.hashes), self.stream_id)


@dataclass
class HostedLearner:
    """A learner and what its checkpoints say besides its state."""

    learner: Learner
    update_time: str = ""
    producers: dict[str, ProducerState] = field(default_factory=dict)
    journal_position: int = 0
    samples: SampleHistory = field(default_factory=lambda: SampleHistory(_SAMPLES_SAVED))
    reported_at: float = 0.0  # monotonic seconds
    trainability: Trainability | None = None  # the newest test
    pace: Pace = field(init=False)
    test_interval: int = field(init=False)  # steps; 0 is never
    test_begun_at: int = field(init=False)  # step

    def __post_init__(self) -> None:
        self.pace = Pace.of(self.learner.spec)
        self.test_interval = self.learner.spec.monitoring.trainability_interval
        self.test_begun_at = self.learner.progress.step

    def revise(self, spec: LearnerSpec, update_time: str) -> None:
        """Goes on with another spec."""
        self.learner.update(spec)
        self.update_time = update_time
        self.test_interval = spec.monitoring.trainability_interval

    def begins_test(self, step: int) -> bool:
        """Whether a test of trainability is due at this step; if so, the next one is when an interval has passed."""
        due = self.test_interval > 0 and step // self.test_interval > self.test_begun_at // self.test_interval
        if due:
            self.test_begun_at = step
        return due

    def applied(self, change: messages.Change[object]) -> None:
        """The learner contains this entry of the journal now."""
        self.journal_position = change.journal_position

    def producer(self, name: str) -> ProducerState:
        """Where the producer stands, perhaps at the beginning."""
        producer = self.producers.get(name)
        if producer is None:
            producer = self.producers[name] = ProducerState.at(messages.Position())
        return producer

    def sequence_of(self, name: str) -> int:
        """The producer's last one that the learner contains."""
        producer = self.producers.get(name)
        return producer.sequence if producer is not None else 0

    def place(self, positions: Mapping[str, messages.Position]) -> None:
        """Where all its producers stand."""
        self.producers = {name: ProducerState.at(position) for name, position in positions.items()}

    def stamp(self, samples: Sequence[PlasticitySample]) -> tuple[PackedSample, ...]:
        """The samples with the present time and the newest test, kept for the next checkpoint."""
        if not samples:
            return ()
        now = datetime.now(UTC)
        stamped = tuple(pack(SampleRecord(replace(sample, trainability=self.trainability), now)) for sample in samples)
        self.samples.extend(stamped)
        return stamped

    @property
    def report(self) -> messages.LearnerReport:
        return messages.LearnerReport(
            self.learner.spec,
            self.learner.engine,
            self.update_time,
            self.learner.progress,
            {name: producer.position for name, producer in self.producers.items()},
            self.journal_position,
        )


class EngineWorker:
    """Carries out requests on the learners of one device.

    Args:
        send: takes what there is to say; called from more than one thread, one call at a time.
    """

    def __init__(self, options: messages.EngineOptions, inbox: Inbox, send: Callable[[messages.Answers], None]) -> None:
        self._device = _resolve_device(options.device)
        self._preparation = _preparation(options.engine, self._device)
        self._files = CheckpointFiles(options.checkpoint_url)
        self._spares = SpareSnapshots()
        self._inbox = inbox
        self._outbox = Outbox(send)
        self._hosted: dict[str, HostedLearner] = {}
        self._begun: dict[str, TrainingJob] = {}  # by learner: batches between two slices
        self._loners: set[str] = set()  # learners that a call failed with which they shared
        self._learn_until = 0.0  # monotonic; predictions have had their share up to then
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._tests = TrainabilityTests()

    @property
    def ready(self) -> messages.EngineReady:
        return messages.EngineReady(self._device, self._preparation.compiled)

    def run(self) -> None:
        """Carries out requests until the inbox closes, then finishes the checkpoints under way."""
        while True:
            if self._inbox.would_wait:
                self._outbox.flush()
            if (call := self._inbox.take()) is None:
                break
            self._carry_out(call)
        self._tests.close()
        self._writer.shutdown(wait=True)

    def _carry_out(self, call: messages.Call) -> None:
        if not isinstance(call.request, messages.Train):  # it may take long, as making a learner does
            self._outbox.flush()
        match call.request:
            case messages.Predict() as request:
                self._reply(call, partial(self._predict, request))
            case messages.Train():
                self._train(call)
            case messages.AbortTraining():
                self._reply(call, self._abort_training)
            case messages.Sample() as request:
                self._reply(call, partial(self._sample, request))
            case messages.Change() as request:
                self._reply(call, partial(self._change, request))
            case messages.Checkpoint() as request:
                self._checkpoint(call, request)
            case messages.Export() as request:
                self._export(call, request)
            case messages.Prepare():
                self._preparation.when_finished(partial(self._prepared, call))
            case messages.Request() as request:
                self._reply(call, partial(self._administer, request))

    def _reply(self, call: messages.Call, action: Callable[[], object]) -> None:
        try:
            value = action()
        except Exception as error:
            self._outbox.put(messages.Answer(call.number, error=_for_front(error, call)))
            return
        if not call.quiet:
            self._outbox.put(messages.Answer(call.number, value=value))

    def _fail(self, call: messages.Call, error: Exception) -> None:
        self._outbox.put(messages.Answer(call.number, error=error))

    # -- learning and predicting --

    def _train(self, first: messages.Call) -> None:
        """Learns a batch, or the next part of one; what goes with it makes the turn worth its while."""
        company = self._company(first)
        if company or not self._fits_one_slice(first):
            self._train_in_slices([first, *company])
        else:
            self._train_in_a_row([first, *self._inbox.take_batches_behind(first, _LONGEST_ROW - 1)])

    def _fits_one_slice(self, call: messages.Call) -> bool:
        request = cast(messages.Train, call.request)
        hosted = self._hosted.get(request.learner)
        return hosted is not None and request.learner not in self._begun and hosted.pace.fits_one_slice(request.batch)

    def _train_in_a_row(self, calls: Sequence[messages.Call]) -> None:
        """Learns batches of one learner, as many as its turn has time for.

        They are checked before, and accounted for afterwards, all in one go: between two batches every line of code
        costs several times what it costs in a loop, since the processor has forgotten it.
        """
        hosted = self._hosted[calls[0].request.learner]
        row, refusal = self._checked(hosted, calls)
        if row and (len(row) > 1 or hosted.pace.takes_long(len(row[0].batch))):
            self._outbox.flush()
        results: list[TrainResult] = []
        failure: Exception | None = None
        started = time.perf_counter()
        ends = started + _LONGEST_TURN
        try:
            training.run_row(
                hosted.learner,
                [request.batch for request in row],
                results,
                return_outputs=[request.return_outputs for request in row],
                between_steps=self._between_steps,
                is_over=lambda: self._inbox.has_predictions or time.perf_counter() > ends,
            )
        except Exception as error:
            failure = error
        self._outbox.count(time.perf_counter() - started, sum(result.steps for result in results))
        learnt = len(results)
        if learnt < len(row):
            refusal = None  # of a batch that has not had its turn
        ended_at_one = failure is not None or refusal is not None
        self._inbox.give_back(calls[learnt + ended_at_one :])
        self._report_row(hosted, calls, row, results)
        if failure is not None:
            self._take_failure(hosted, calls[learnt], failure)
        elif refusal is not None:
            self._fail(calls[learnt], refusal)

    def _checked(
        self, hosted: HostedLearner, calls: Sequence[messages.Call]
    ) -> tuple[list[messages.Train], CbpError | None]:
        """The batches that may be learnt one after another, and why the one behind them may not, if there is one that
        may never be."""
        row: list[messages.Train] = []
        position = hosted.journal_position
        sequences: dict[str, int] = {}
        for call in calls:
            request = cast(messages.Train, call.request)
            producer = request.producer
            if producer not in sequences:
                sequences[producer] = hosted.sequence_of(producer)
            try:
                _check_order(position, request.journal_position - request.journaled)
                _check_sequence(sequences[producer], request)
            except CbpError as refusal:
                return row, refusal
            if not hosted.pace.fits_one_slice(request.batch):
                break
            row.append(request)
            position = request.journal_position
            sequences[producer] = request.sequence
        return row, None

    def _report_row(
        self,
        hosted: HostedLearner,
        calls: Sequence[messages.Call],
        row: Sequence[messages.Train],
        results: Sequence[TrainResult],
    ) -> None:
        newest = len(results) - 1
        for index, (call, request, result) in enumerate(zip(calls, row, results, strict=False)):
            self._advance(hosted, request)
            samples = hosted.stamp(hosted.learner.take_samples()) if index == newest else ()
            if not call.quiet:
                progress = self._due_progress(request.learner, hosted) if index == newest else None
                self._report(call, result, samples, progress)
        if results:
            self._test_if_due(hosted, results[-1])

    def _take_failure(self, hosted: HostedLearner, call: messages.Call, failure: Exception) -> None:
        if isinstance(failure, StopTrainingError):
            self._give_up(hosted, call)
        else:
            self._lose([call], failure)

    def _give_up(self, hosted: HostedLearner, call: messages.Call) -> None:
        """The batch counts as applied: what is left of it waits in the learner, and is in its last checkpoint."""
        self._advance(hosted, cast(messages.Train, call.request))
        self._fail(call, ServerDraining())

    def _train_in_slices(self, calls: Sequence[messages.Call]) -> None:
        """Learns the next part of each batch, of different learners, in as few engine calls as possible; answers those
        that are finished."""
        under_way: list[tuple[messages.Call, TrainingJob]] = []
        for call in calls:
            try:
                under_way.append((call, self._job(cast(messages.Train, call.request))))
            except CbpError as error:  # nothing has changed
                self._fail(call, error)
        if not under_way:
            return
        jobs = [job for _, job in under_way]
        if not all(job.is_short for job in jobs):
            self._outbox.flush()
        steps_before = sum(job.steps for job in jobs)
        started = time.perf_counter()
        try:
            stopped = self._run_or_give_up(jobs)
        except Exception as error:
            self._lose([call for call, _ in under_way], error)
            return
        self._outbox.count(time.perf_counter() - started, sum(job.steps for job in jobs) - steps_before)
        for call, job in under_way:
            self._settle(call, job, stopped=stopped)

    def _company(self, first: messages.Call) -> list[messages.Call]:
        """Batches of other learners that gain from sharing a call with this one."""
        engine = self._shared_engine(first.request.learner)
        if engine == "stacked":
            most = _LARGEST_GROUP - 1
        elif engine == "compiled" and torch.get_num_threads() > 1:
            most = _SHARES_OF_A_THREAD * torch.get_num_threads() - 1
        else:
            return []
        return self._inbox.take_company(first, lambda uid: self._shared_engine(uid) == engine, most)

    def _shared_engine(self, uid: str) -> EngineName | None:
        """The engine whose calls the learner may share with others."""
        hosted = self._hosted.get(uid)
        return None if hosted is None or uid in self._loners else hosted.learner.engine

    def _job(self, request: messages.Train) -> TrainingJob:
        job = self._begun.pop(request.learner, None)
        if job is None:
            hosted = self._get(request.learner)
            _check_order(hosted.journal_position, request.journal_position - request.journaled)
            _check_sequence(hosted.sequence_of(request.producer), request)
            job = TrainingJob(hosted.learner, request.batch, hosted.pace, return_outputs=request.return_outputs)
        return job

    def _lose(self, calls: Sequence[messages.Call], error: Exception) -> None:
        """Some of the batches' steps may have been made. The only whole states left are in the checkpoints."""
        for call in calls:
            request = cast(messages.Train, call.request)
            del self._hosted[request.learner]
            if len(calls) == 1:
                self._fail(call, _not_learnt(error, request))
            else:  # whose batch it was shows when each is learnt again, alone
                self._loners.add(request.learner)
                self._fail(call, NotInEngine())
        if len(calls) > 1:
            log.exception("training failed half-way", learners=len(calls), exc_info=error)

    def _settle(self, call: messages.Call, job: TrainingJob, *, stopped: bool) -> None:
        request = cast(messages.Train, call.request)
        if job.failure is not None:
            self._lose([call], job.failure)
        elif stopped:
            self._give_up(self._get(request.learner), call)
        elif job.finished:
            self._finish(call, request, job)
        else:
            self._begun[request.learner] = job
            self._inbox.put_back(call)

    def _run_or_give_up(self, jobs: Sequence[TrainingJob]) -> bool:
        """Whether the batches were given up."""
        try:
            self._run(jobs)
        except StopTrainingError:
            for job in jobs:
                job.give_up()
            return True
        return False

    def _run(self, jobs: Sequence[TrainingJob]) -> None:
        """Goes on with the batches until one of them is finished or somebody else wants a turn."""
        while True:
            training.run_slices(jobs, between_steps=self._between_steps)
            if any(job.finished or job.failure for job in jobs) or self._inbox.has_turns():
                break
            self._answer_predictions()
            self._outbox.flush_due()
        if self._inbox.aborting and not all(job.finished for job in jobs):
            raise StopTrainingError

    def _finish(self, call: messages.Call, request: messages.Train, job: TrainingJob) -> None:
        hosted = self._get(request.learner)
        self._advance(hosted, request)
        samples = hosted.stamp(hosted.learner.take_samples())
        result = job.result()
        if not call.quiet:
            self._report(call, result, samples, self._due_progress(request.learner, hosted))
        self._test_if_due(hosted, result)

    def _test_if_due(self, hosted: HostedLearner, result: TrainResult) -> None:
        """Has a copy of the learner tested, if enough steps have passed; and whoever is next, if a test has ended."""
        if hosted.begins_test(_last_step(result)):
            self._tests.add(hosted)
        self._tests.start_next()

    def _report(
        self,
        call: messages.Call,
        result: TrainResult,
        samples: tuple[PackedSample, ...],
        progress: LearnerProgress | None,
    ) -> None:
        report = messages.TrainReport(result=result, step=_last_step(result), samples=samples, progress=progress)
        self._outbox.hold(messages.Answer(call.number, value=report))

    def _advance(self, hosted: HostedLearner, request: messages.Train | messages.Skip) -> None:
        producer = hosted.producer(request.producer)
        producer.epoch, producer.sequence = request.epoch, request.sequence
        producer.hashes.append((request.sequence, request.payload_hash))
        hosted.applied(request)

    def _change(self, request: messages.Change[Any]) -> object:
        """Applies an entry of the journal other than a batch; one that the learner refuses has no effect."""
        hosted = self._get(request.learner)
        _check_order(hosted.journal_position, request.journal_position - 1)
        try:
            return self._applied_change(hosted, request)
        finally:
            hosted.applied(request)

    def _applied_change(self, hosted: HostedLearner, request: messages.Change[Any]) -> object:
        match request:
            case messages.OpenProducer():
                producer = hosted.producer(request.producer)
                producer.epoch, producer.stream_id = request.epoch, request.stream_id
            case messages.Update():
                hosted.revise(request.spec, request.update_time)
            case messages.ResetUnits():
                counts = hosted.learner.reset_units(request.layers, request.fraction)
                return messages.ResetReport(counts, hosted.learner.progress)
            case messages.Skip():
                _check_sequence(hosted.sequence_of(request.producer), request)
                self._advance(hosted, request)
            case messages.SwitchEngine():
                hosted.learner.switch_engine(self._engine_at_hand(request.engine))
            case messages.Pass():
                pass
            case _:
                raise TypeError(f"the engine knows no change {type(request).__name__}")
        return None

    def _abort_training(self) -> None:
        for call in self._inbox.take_dropped():
            self._fail(call, ServerDraining())
        # Batches between two slices come up again by themselves, and are given up at the end of one more slice.

    def _due_progress(self, uid: str, hosted: HostedLearner) -> LearnerProgress | None:
        now = time.monotonic()
        if now - hosted.reported_at < _PROGRESS_INTERVAL and self._inbox.has_training(uid):
            return None
        hosted.reported_at = now
        return hosted.learner.progress

    def _between_steps(self) -> None:
        if self._inbox.aborting:
            raise StopTrainingError
        self._outbox.flush_due()
        self._answer_predictions()

    def _answer_predictions(self) -> None:
        """Answers one waiting prediction, unless predictions have just had as much time as is now learning's due."""
        started = time.monotonic()
        if started < self._learn_until or (call := self._inbox.take_prediction()) is None:
            return
        self._carry_out(call)
        ended = time.monotonic()
        self._learn_until = ended + (ended - started)

    def _predict(self, request: messages.Predict) -> messages.PredictReport:
        learner = self._get(request.learner).learner
        return messages.PredictReport(learner.predict(request.features), learner.progress.step)

    def _sample(self, request: messages.Sample) -> PackedSample:
        hosted = self._get(request.learner)
        return hosted.stamp([hosted.learner.sample_plasticity()])[0]

    # -- coming and going --

    def _administer(self, request: messages.Request[Any]) -> object:
        match request:
            case messages.Create():
                return self._take_up(
                    request.learner,
                    Learner(request.spec, device=self._device, engine=self._engine_at_hand(request.engine)),
                )
            case messages.Import():
                return self._take_up(
                    request.learner, self._restored(LearnerSnapshot.from_bytes(request.data), request.engine)
                )
            case messages.Copy():
                source = self._get(request.learner)
                report = self._take_up(request.to, self._restored(source.learner.snapshot(), source.learner.engine))
                self._hosted[request.to].update_time = source.update_time
                return report
            case messages.Load():
                return self._load(request)
            case messages.Describe():
                return self._get(request.learner).report
            case messages.Drop():
                self._hosted.pop(request.learner, None)
                return None
            case messages.Rename():
                self._hosted[request.place_of] = self._hosted.pop(request.learner)
                return None
            case messages.Place():
                return self._place(request)
            case messages.Revise():
                self._get(request.learner).revise(request.spec, request.update_time)
                return None
            case _:
                raise TypeError(f"the engine knows no request {type(request).__name__}")

    def _take_up(self, uid: str, learner: Learner) -> messages.LearnerReport:
        hosted = self._hosted[uid] = HostedLearner(learner)
        return hosted.report

    def _restored(self, snapshot: LearnerSnapshot, engine: EngineName) -> Learner:
        return Learner.restore(snapshot, device=self._device, engine=self._engine_at_hand(engine))

    def _engine_at_hand(self, name: EngineName) -> EngineName:
        """The engine of this name, once it can take steps; another one where the device has none of the kind."""
        if name != "compiled":
            return name
        if self._device != "cpu":
            return "stacked"
        self._preparation.require()
        return name

    def _prepared(self, call: messages.Call, compiled: bool) -> None:
        self._outbox.put(messages.Answer(call.number, value=messages.PrepareReport(compiled)))

    def _load(self, request: messages.Load) -> messages.LoadReport:
        try:
            snapshot = LearnerSnapshot.from_bytes(self._read(request))
            service = json.loads(snapshot.extra[_SERVICE_KEY])
            hosted = HostedLearner(
                self._restored(snapshot, service["engine"]),
                str(service["update_time"]),
                journal_position=int(service["journal_position"]),
            )
            hosted.place({name: _position_from_plain(plain) for name, plain in service["positions"].items()})
            hosted.samples.extend(_sample_from_plain(plain) for plain in service["samples"])
            hosted.trainability = hosted.samples.newest_trainability
            if service["learner"] != request.stored_as:
                raise SnapshotError("it is another learner's checkpoint, under the wrong name")
        except (SnapshotError, OSError, KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"checkpoint {request.number} is unreadable: {error}") from error
        self._hosted[request.learner] = hosted
        return messages.LoadReport(hosted.report, hosted.samples.packed)

    def _read(self, request: messages.Load) -> bytes:
        try:
            return self._files.read(request.stored_as, request.number)
        except OSError as error:
            if self._files.remote and not isinstance(error, FileNotFoundError):
                raise CheckpointsUnreachable(str(error)) from error
            raise

    def _place(self, request: messages.Place) -> messages.LearnerReport:
        hosted = self._get(request.learner)
        hosted.place(request.positions)
        hosted.journal_position = request.journal_position
        hosted.update_time = request.update_time
        return hosted.report

    # -- checkpoints --

    def _checkpoint(self, call: messages.Call, request: messages.Checkpoint) -> None:
        """Copies the learner's state between two steps; the copy is written while the learner goes on."""
        try:
            hosted = self._get(request.learner)
            copy = _Copy(hosted, self._spares.take(hosted.learner.spec))
        except Exception as error:
            self._fail(call, _for_front(error, call))
            return
        self._writer.submit(self._reply, call, partial(self._write, request, copy))

    def _write(self, request: messages.Checkpoint, copy: "_Copy") -> messages.CheckpointReport:
        started = time.perf_counter()
        report = copy.report
        service = {
            "learner": request.stored_as,
            "engine": report.engine,
            "update_time": report.update_time,
            "positions": {name: asdict(position) for name, position in report.positions.items()},
            "journal_position": report.journal_position,
            "samples": [_sample_to_plain(sample) for sample in copy.samples],
        }
        data = copy.snapshot.to_bytes(extra={_SERVICE_KEY: json.dumps(service)})
        self._spares.give(report.spec, copy.snapshot)
        try:
            self._files.write(request.stored_as, request.number, data)
        except OSError as error:
            raise CheckpointFailed(f"the checkpoint could not be written: {error}") from error
        return messages.CheckpointReport(report, len(data), time.time(), time.perf_counter() - started)

    def _export(self, call: messages.Call, request: messages.Export) -> None:
        try:
            snapshot = self._get(request.learner).learner.snapshot()
        except Exception as error:
            self._fail(call, _for_front(error, call))
            return
        self._writer.submit(self._reply, call, snapshot.to_bytes)

    def _get(self, uid: str) -> HostedLearner:
        hosted = self._hosted.get(uid)
        if hosted is None:
            raise NotInEngine
        return hosted


def _last_step(result: TrainResult) -> int:
    """The learner's step after the batch."""
    return result.first_step + result.steps - 1


def _check_order(position: int, before: int) -> None:
    """`before` is the position of the entry before the one to be applied."""
    if before != position:
        raise EngineFault(f"the change behind position {before} came when the learner was at {position}")


def _check_sequence(sequence: int, request: messages.Train | messages.Skip) -> None:
    """`sequence` is the producer's last one."""
    if request.sequence != sequence + 1:  # one before it was refused here: nothing may overtake that
        raise SequenceGap(request.sequence, sequence + 1)


class _Copy:
    """A learner as it was between two steps, for the writer to write while it goes on."""

    def __init__(self, hosted: HostedLearner, spare: LearnerSnapshot | None) -> None:
        self.snapshot = hosted.learner.snapshot(into=spare)
        self.report = hosted.report
        self.samples = hosted.samples.packed


def _position_from_plain(plain: Mapping[str, Any]) -> messages.Position:
    hashes = tuple((int(sequence), str(payload_hash)) for sequence, payload_hash in plain["hashes"])
    return messages.Position(int(plain["epoch"]), int(plain["sequence"]), hashes, str(plain["stream_id"]))


def _sample_to_plain(packed: PackedSample) -> dict[str, Any]:
    record = unpack(packed)
    return record.sample.to_plain() | {"time": record.time.isoformat()}


def _sample_from_plain(plain: Mapping[str, Any]) -> PackedSample:
    return pack(SampleRecord(PlasticitySample.from_plain(plain), datetime.fromisoformat(plain["time"])))


def _not_learnt(error: Exception, request: messages.Train) -> BatchNotLearnt:
    """Why the batch could not be learnt, in words for an operator."""
    diverged = isinstance(error, DivergenceError)
    if not diverged:
        log.exception("training failed half-way", learner=request.learner, exc_info=error)
    reason = str(error) if isinstance(error, CbpError) else f"{type(error).__name__}: {error}"
    return BatchNotLearnt(request.journal_position, request.producer, request.sequence, reason, diverged=diverged)


def _for_front(error: Exception, call: messages.Call) -> Exception:
    """`error` if it belongs to the service's vocabulary; otherwise logged here and named briefly."""
    if isinstance(error, CbpError):
        return error
    request = type(call.request).__name__
    log.exception("request failed", request=request, learner=call.request.learner, exc_info=error)
    return EngineFault(f"{request} failed in the engine: {type(error).__name__}: {error}")


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("cbp-server: --device cuda, but torch sees no CUDA device; use --device auto or cpu")
    return device


def _preparation(engine: str, device: str) -> Preparation:
    preparation = Preparation()
    if engine == "compiled" and device != "cpu":
        raise SystemExit(f"cbp-server: --engine compiled runs on the CPU, not on {device}; use --engine auto")
    if device == "cpu" and engine in ("auto", "compiled"):
        preparation.begin(at_once=engine == "compiled")
    else:
        preparation.skip()
    return preparation


def _received(connection: socket.socket) -> Iterator[list[object]]:
    """The messages that the front sends, by frame, until it is gone, in whichever way: ended, killed, or cut off within
    one."""
    with contextlib.suppress(OSError):
        while (received := receive_frame(connection)) is not None:
            yield received


def _read_calls(received: Iterator[list[object]], inbox: Inbox) -> None:
    """Fills the inbox until the front is gone."""
    try:
        for calls in received:
            inbox.put(*cast(list[messages.Call], calls))
    finally:
        inbox.close()  # whatever happens here, the process must not live on without its front


def main() -> None:
    """Entry point: `python -m cbp_server.engine.worker FD`, where FD is this end of the front's socket pair."""
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Carries out the front's requests until it closes the connection."""

    def send(message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to tell
            for part in encode_frame([message]):
                connection.sendall(part)

    # A supervisor may signal the whole group; this process ends when the front has saved everything and closes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    received = _received(connection)
    options = next(received, [None])[0]
    if not isinstance(options, messages.EngineOptions):  # the front has gone already
        return
    configure_logging(options.log_level, options.log_format)
    torch.set_num_threads(options.threads)
    inbox = Inbox(options.group_wait)
    worker = EngineWorker(options, inbox, send)
    shorten_collections()
    send(worker.ready)
    threading.Thread(target=_read_calls, args=(received, inbox), name="reader", daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
