"""The engine process: holds the learners' tensors and carries out requests from the front, one at a time.

Three threads: one reads requests into the inbox, the main one carries them out, one writes checkpoints. The process
ends when the front closes its end of the socket, so it never outlives the front.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import structlog
import torch

from cbp import CbpError, Learner, LearnerProgress, LearnerSnapshot, PlasticitySample, SnapshotError
from cbp_server.engine import messages
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.training import StopTrainingError, TrainingJob
from cbp_server.errors import CheckpointFailed, EngineFault, LearnerExists, LearnerNotFound, SequenceGap, ServerDraining
from cbp_server.logs import configure_logging
from cbp_server.records import SampleRecord
from cbp_server.store.checkpoints import CheckpointDirectory

#: Seconds between two full progress reports of a learner that has more batches waiting.
_PROGRESS_INTERVAL = 0.25
#: Newest plasticity samples saved with each checkpoint, so that a restart does not blind its watchers.
_SAMPLES_SAVED = 100
_SERVICE_KEY = "cbp_server"

log = structlog.get_logger("cbp_server.engine")


@dataclass
class HostedLearner:
    """A learner and what its checkpoints say besides its state."""

    learner: Learner
    identity: messages.Identity
    positions: dict[str, messages.Position] = field(default_factory=dict)
    journal_position: int = 0
    samples: deque[SampleRecord] = field(default_factory=lambda: deque(maxlen=_SAMPLES_SAVED))
    reported_at: float = 0.0  # monotonic seconds

    def applied(self, change: messages.Change[object]) -> None:
        """The learner contains this entry of the journal now."""
        self.journal_position = change.journal_position

    def stamp(self, samples: Iterable[PlasticitySample]) -> tuple[SampleRecord, ...]:
        """The samples with the present time, kept for the next checkpoint."""
        now = datetime.now(UTC)
        stamped = tuple(SampleRecord(sample, now) for sample in samples)
        self.samples.extend(stamped)
        return stamped


class EngineWorker:
    """Carries out requests on the learners of one device.

    Args:
        answer: takes each answer; called from more than one thread.
    """

    def __init__(
        self, options: messages.EngineOptions, inbox: Inbox, answer: Callable[[messages.Answer], None]
    ) -> None:
        self._device = _resolve_device(options.device)
        self._checkpoints = CheckpointDirectory(options.data_dir)
        self._inbox = inbox
        self._answer = answer
        self._hosted: dict[str, HostedLearner] = {}
        self._begun: dict[str, TrainingJob] = {}  # by learner: batches between two slices
        self._learn_until = 0.0  # monotonic; predictions have had their share up to then
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")

    @property
    def ready(self) -> messages.EngineReady:
        return messages.EngineReady(self._device, tuple(self._checkpoints.learner_ids()))

    def run(self) -> None:
        """Carries out requests until the inbox closes, then finishes the checkpoints under way."""
        while (call := self._inbox.take()) is not None:
            self._carry_out(call)
        self._writer.shutdown(wait=True)

    def _carry_out(self, call: messages.Call) -> None:
        match call.request:
            case messages.Predict() as request:
                self._reply(call, partial(self._predict, request))
            case messages.Train() as request:
                self._train(call, request)
            case messages.OpenProducer() as request:
                self._reply(call, partial(self._open_producer, request))
            case messages.AbortTraining():
                self._reply(call, self._abort_training)
            case messages.Sample() as request:
                self._reply(call, partial(self._sample, request))
            case messages.Create() as request:
                self._reply(call, partial(self._create, request))
            case messages.Load() as request:
                self._reply(call, partial(self._load, request))
            case messages.Update() as request:
                self._reply(call, partial(self._update, request))
            case messages.Checkpoint() as request:
                self._checkpoint(call, request)
            case messages.Delete() as request:
                self._reply(call, partial(self._delete, request))
            case request:
                raise TypeError(f"the engine knows no request {type(request).__name__}")

    def _reply(self, call: messages.Call, action: Callable[[], object]) -> None:
        try:
            self._answer(messages.Answer(call.number, value=action()))
        except Exception as error:
            self._answer(messages.Answer(call.number, error=_for_front(error, call)))

    # -- learning and predicting --

    def _train(self, call: messages.Call, request: messages.Train) -> None:
        """Learns a batch, or the next part of one that has begun, and answers when it is finished."""
        job = self._begun.pop(request.learner_id, None)
        try:
            if job is None:
                job = self._begin(request)
        except CbpError as error:  # nothing has changed
            self._answer(messages.Answer(call.number, error=error))
            return
        started = time.perf_counter()
        try:
            self._run(job)
        except StopTrainingError:
            self._give_up(call, request, job)
            return
        except Exception:
            # Some of the batch's steps may have been made. The only whole state left is the checkpoint, so this
            # process ends, and the one that the front starts next restores it.
            log.exception("training failed half-way; ending the engine process", learner=request.learner_id)
            os._exit(70)  # EX_SOFTWARE; exiting by exception would let the writer save the half-trained state
        job.seconds += time.perf_counter() - started
        if job.finished:
            self._reply(call, partial(self._finish, request, job))
        else:
            self._begun[request.learner_id] = job
            self._inbox.put_back(call)

    def _begin(self, request: messages.Train) -> TrainingJob:
        hosted = self._get_for(request)
        position = hosted.positions.get(request.producer, messages.Position())
        if request.sequence != position.sequence + 1:  # one before it was refused here: nothing may overtake that
            raise SequenceGap(request.sequence, position.sequence + 1)
        return TrainingJob(
            hosted.learner,
            request.batch,
            return_outputs=request.return_outputs,
            between_steps=self._between_steps,
        )

    def _run(self, job: TrainingJob) -> None:
        """Goes on with the batch until it is finished or somebody else wants a turn."""
        while not job.finished:
            job.run_slice()
            if self._inbox.aborting and not job.finished:
                raise StopTrainingError
            if self._inbox.has_turns():
                return
            self._answer_predictions()

    def _finish(self, request: messages.Train, job: TrainingJob) -> messages.TrainReport:
        hosted = self._get(request.learner_id)
        self._advance(hosted, request)
        result = job.result()
        return messages.TrainReport(
            result=result,
            step=result.first_step + result.steps - 1,
            seconds=job.seconds,
            samples=hosted.stamp(hosted.learner.take_samples()),
            progress=self._due_progress(hosted),
        )

    def _give_up(self, call: messages.Call, request: messages.Train, job: TrainingJob) -> None:
        """The batch counts as applied: what is left of it waits in the learner, and is in its last checkpoint."""
        job.give_up()
        self._advance(self._hosted[request.learner_id], request)
        self._answer(messages.Answer(call.number, error=ServerDraining()))

    def _advance(self, hosted: HostedLearner, request: messages.Train) -> None:
        position = hosted.positions.get(request.producer, messages.Position())
        hosted.positions[request.producer] = position.advance(request.epoch, request.sequence, request.payload_hash)
        hosted.applied(request)

    def _open_producer(self, request: messages.OpenProducer) -> None:
        hosted = self._get_for(request)
        position = hosted.positions.get(request.producer, messages.Position())
        hosted.positions[request.producer] = replace(position, epoch=request.epoch)
        hosted.applied(request)

    def _abort_training(self) -> None:
        for call in self._inbox.take_dropped():
            self._answer(messages.Answer(call.number, error=ServerDraining()))
        # Batches between two slices come up again by themselves, and are given up at the end of one more slice.

    def _due_progress(self, hosted: HostedLearner) -> LearnerProgress | None:
        now = time.monotonic()
        waiting = self._inbox.has_training(hosted.identity.learner_id)
        if waiting and now - hosted.reported_at < _PROGRESS_INTERVAL:
            return None
        hosted.reported_at = now
        return hosted.learner.progress

    def _between_steps(self) -> None:
        if self._inbox.aborting:
            raise StopTrainingError
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
        learner = self._get(request.learner_id).learner
        return messages.PredictReport(learner.predict(request.features), learner.progress.step)

    def _sample(self, request: messages.Sample) -> SampleRecord:
        hosted = self._get(request.learner_id)
        return hosted.stamp([hosted.learner.sample_plasticity()])[0]

    # -- life and death --

    def _create(self, request: messages.Create) -> messages.LearnerReport:
        if request.learner_id in self._hosted:
            raise LearnerExists(request.learner_id)
        hosted = HostedLearner(Learner(request.spec, device=self._device), request.identity)
        report = self._write_now(hosted)
        self._hosted[request.learner_id] = hosted
        return report

    def _update(self, request: messages.Update) -> None:
        hosted = self._get_for(request)
        hosted.learner.update(request.spec)
        hosted.identity = replace(hosted.identity, update_time=request.update_time)
        hosted.applied(request)

    def _load(self, request: messages.Load) -> messages.LoadReport:
        failures = []
        for path in self._checkpoints.paths(request.learner_id):
            try:
                data = path.read_bytes()
                snapshot = LearnerSnapshot.from_bytes(data)
                learner = Learner.restore(snapshot, device=self._device)
                service = json.loads(snapshot.extra[_SERVICE_KEY])
                identity = messages.Identity(**service["identity"])
                positions = {name: messages.Position(**value) for name, value in service["positions"].items()}
                journal_position = int(service["journal_position"])
                samples = [_sample_from_plain(plain) for plain in service["samples"]]
                if identity.learner_id != request.learner_id:
                    raise SnapshotError(
                        f"it is a checkpoint of learner '{identity.learner_id}', in the wrong directory"
                    )
            except (SnapshotError, OSError, KeyError, TypeError, ValueError) as error:
                log.warning("checkpoint unreadable", learner=request.learner_id, file=path.name, error=str(error))
                failures.append(f"{path.name}: {error}")
                continue
            hosted = self._hosted[request.learner_id] = HostedLearner(learner, identity, positions, journal_position)
            hosted.samples.extend(samples)
            written = messages.CheckpointReport(len(data), path.stat().st_mtime, 0.0)
            return messages.LoadReport(_describe(hosted, written), tuple(samples))
        raise SnapshotError(f"no checkpoint of learner '{request.learner_id}' is readable: {'; '.join(failures)}")

    def _delete(self, request: messages.Delete) -> None:
        hosted = self._get(request.learner_id)
        delete = partial(self._checkpoints.delete, request.learner_id, hosted.identity.uid)
        try:
            # Behind the checkpoints under way, so that none of them brings the directory back.
            self._writer.submit(delete).result()
        except OSError as error:
            raise CheckpointFailed(f"learner '{request.learner_id}' could not be removed: {error}") from error
        del self._hosted[request.learner_id]

    # -- checkpoints --

    def _checkpoint(self, call: messages.Call, request: messages.Checkpoint) -> None:
        """Copies the learner's state between two steps; the copy is written while the learner goes on."""
        try:
            hosted = self._get(request.learner_id)
            copy = _Copy(hosted)
        except Exception as error:
            self._answer(messages.Answer(call.number, error=_for_front(error, call)))
            return
        self._writer.submit(self._reply, call, partial(self._write, copy))

    def _write_now(self, hosted: HostedLearner) -> messages.LearnerReport:
        """Writes the learner's state in turn with the other writes, and waits for it."""
        return self._writer.submit(self._write, _Copy(hosted)).result()

    def _write(self, copy: "_Copy") -> messages.LearnerReport:
        started = time.perf_counter()
        described = copy.described
        service = {
            "identity": asdict(described.identity),
            "positions": {name: asdict(position) for name, position in described.positions.items()},
            "journal_position": described.journal_position,
            "samples": [_sample_to_plain(sample) for sample in copy.samples],
        }
        data = copy.snapshot.to_bytes(extra={_SERVICE_KEY: json.dumps(service)})
        learner_id = described.identity.learner_id
        try:
            self._checkpoints.write(learner_id, data)
        except OSError as error:
            raise CheckpointFailed(f"learner '{learner_id}' could not be saved: {error}") from error
        written = messages.CheckpointReport(len(data), time.time(), time.perf_counter() - started)
        return replace(described, checkpoint=written)

    def _get_for(self, change: messages.Change[Any]) -> HostedLearner:
        """The learner that `change` is the next change of."""
        hosted = self._get(change.learner_id)
        if change.journal_position != hosted.journal_position + 1:
            raise EngineFault(f"journal position {change.journal_position} came behind {hosted.journal_position}")
        return hosted

    def _get(self, learner_id: str) -> HostedLearner:
        hosted = self._hosted.get(learner_id)
        if hosted is None:
            raise LearnerNotFound(learner_id)
        return hosted


def _describe(hosted: HostedLearner, checkpoint: messages.CheckpointReport) -> messages.LearnerReport:
    return messages.LearnerReport(
        hosted.identity,
        hosted.learner.spec,
        hosted.learner.progress,
        dict(hosted.positions),
        hosted.journal_position,
        checkpoint,
    )


class _Copy:
    """A learner as it was between two steps, for the writer to write while it goes on."""

    def __init__(self, hosted: HostedLearner) -> None:
        self.snapshot = hosted.learner.snapshot()
        self.described = _describe(hosted, messages.CheckpointReport(0, 0.0, 0.0))
        self.samples = tuple(hosted.samples)


def _sample_to_plain(record: SampleRecord) -> dict[str, Any]:
    return record.sample.to_plain() | {"time": record.time.isoformat()}


def _sample_from_plain(plain: Mapping[str, Any]) -> SampleRecord:
    return SampleRecord(PlasticitySample.from_plain(plain), datetime.fromisoformat(plain["time"]))


def _for_front(error: Exception, call: messages.Call) -> Exception:
    """`error` if it belongs to the service's vocabulary; otherwise logged here and named briefly."""
    if isinstance(error, CbpError):
        return error
    request = type(call.request).__name__
    log.exception("request failed", request=request, learner=call.request.learner_id, exc_info=error)
    return EngineFault(f"{request} failed in the engine: {type(error).__name__}: {error}")


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("cbp-server: --device cuda, but torch sees no CUDA device; use --device auto or cpu")
    return device


def _read_calls(connection: socket.socket, inbox: Inbox) -> None:
    """Fills the inbox until the front is gone, in whichever way: ended, killed, or cut off within a request."""
    try:
        with connection.makefile("rb") as stream:
            while len(header := stream.read(messages.HEADER_BYTES)) == messages.HEADER_BYTES:
                payload = stream.read(messages.frame_length(header))
                inbox.put(cast(messages.Call, messages.decode_frame(payload)))
    except (OSError, EOFError, pickle.UnpicklingError):
        pass
    finally:
        inbox.close()  # whatever happens here, the process must not live on without its front


def main() -> None:
    """Entry point: `python -m cbp_server.engine.worker FD`, where FD is this end of the front's socket pair."""
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _serve(connection)


def _serve(connection: socket.socket) -> None:
    """Carries out the front's requests until it closes the connection."""
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to tell
            connection.sendall(messages.encode_frame(message))

    # A supervisor may signal the whole group; this process ends when the front has saved everything and closes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = cast(messages.EngineOptions, _receive(connection))
    configure_logging(options.log_level, options.log_format)
    torch.set_num_threads(options.threads)
    inbox = Inbox()
    worker = EngineWorker(options, inbox, send)
    send(worker.ready)
    threading.Thread(target=_read_calls, args=(connection, inbox), name="reader", daemon=True).start()
    worker.run()


def _receive(connection: socket.socket) -> object:
    length = messages.frame_length(connection.recv(messages.HEADER_BYTES, socket.MSG_WAITALL))
    return messages.decode_frame(connection.recv(length, socket.MSG_WAITALL))


if __name__ == "__main__":
    main()
