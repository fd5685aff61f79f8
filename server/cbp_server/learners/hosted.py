"""One learner as the front knows it: its record, its place in the journal, its producers and streams."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import structlog
from pydantic import Strict

from cbp import EngineName, LearnerProgress, LearnerSpec, SnapshotError, SpecError
from cbp.architectures.profile import hidden_layer_names
from cbp.saved.parts import Count, Label, SavedBeside, read_part
from cbp_server.engine import messages
from cbp_server.records.learners import CheckpointRecord, Durability, LearnerRecord, LearnerState, Quarantine
from cbp_server.records.samples import SampleHistory
from cbp_server.records.times import SavedTime
from cbp_server.store.catalog import StoredCheckpoint, StoredLearner, UnreadableRow
from cbp_server.streams.change_log import LearnerLog
from cbp_server.streams.producers import Producer
from cbp_server.streams.sessions import TrainSession

log = structlog.get_logger("cbp_server.learners.hosted")


@dataclass
class Unsaved:
    """What a learner has gone through since its newest checkpoint."""

    changes: int = 0  # entries of the journal, and batches that are not in it
    steps: int = 0
    journal_bytes: int = 0
    since: float = 0.0  # monotonic seconds of the first change

    def followed_by(self, later: "Unsaved") -> "Unsaved":
        """Both together."""
        return Unsaved(
            self.changes + later.changes,
            self.steps + later.steps,
            self.journal_bytes + later.journal_bytes,
            self.since if self.changes else later.since,
        )


@dataclass(eq=False)
class Hosted:
    """A learner's record and what only the front needs beside it.

    Attributes:
        epoch_floor: the highest epoch of all producers that were forgotten.
        in_engine: the engine holds the learner.
        recovery: brings the learner to where its journal ends; until it is done, nothing is taken for it.
        unreadable: why it could not be brought back; empty if it could.
        unshown: why its record could not be shown; empty if it could, or has changed since.
        used: monotonic seconds of the last use.
        changing: one change of what the learner is at a time, such as an update, a restore, an eviction.
        saving: one checkpoint at a time.
    """

    stored: StoredLearner
    record: LearnerRecord
    log: LearnerLog
    producers: dict[str, Producer] = field(default_factory=dict)
    epoch_floor: int = 0
    sessions: dict[str, TrainSession] = field(default_factory=dict)  # by producer
    in_engine: bool = False
    recovery: "asyncio.Task[None] | None" = None
    unreadable: str = ""
    unshown: str = ""
    used: float = 0.0
    unsaved: Unsaved = field(default_factory=Unsaved)
    checkpoint_number: int = 0  # of the newest one
    saved_position: int = 0  # that the newest one contains
    damaged: set[int] = field(default_factory=set)  # numbers of checkpoints that turned out to be unreadable
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def uid(self) -> str:
        return self.stored.uid

    @property
    def learner_id(self) -> str:
        return self.stored.learner_id

    @property
    def busy(self) -> bool:
        """Whether anybody uses the learner now."""
        return bool(
            self.sessions
            or self.record.queued_batches
            or self.recovery is not None
            or self.changing.locked()
            or self.saving.locked()
        )

    def install(self, report: messages.LearnerReport) -> None:
        """Takes over what the engine says the learner is."""
        record = self.record
        record.spec, record.engine, record.progress = report.spec, report.engine, report.progress
        record.update_time = _time(report.update_time) or self.stored.create_time
        record.etag = etag(self.uid, record.update_time, report.spec)
        before, self.producers = self.producers, {}
        for name, position in report.positions.items():
            producer = self.producers[name] = Producer(name, position)
            if name in before and before[name].epoch == producer.epoch:
                producer.has_been_away_like(before[name])
        self.epoch_floor = report.epoch_floor
        record.producers = {name: producer.record for name, producer in self.producers.items()}

    def set_durable(self, sequences: Mapping[str, int]) -> None:
        """How far producers are durable, of which `install` takes all that is applied to be."""
        for name, producer in self.producers.items():
            producer.durable = sequences.get(name, 0)
            self.record.producers[name] = producer.record

    def set_quarantine(self, quarantine: Quarantine | None) -> None:
        self.stored = replace(self.stored, quarantine=quarantine)
        self.record.quarantine = quarantine

    def end_sessions(self, error: Exception) -> None:
        for session in list(self.sessions.values()):
            session.end(error)


def hosted_from_catalog(
    stored: StoredLearner, checkpoint: StoredCheckpoint | None, state: LearnerState, history_samples: int
) -> Hosted:
    """A learner as its newest checkpoint leaves it, not in the engine; where only the summary in the catalog cannot be,
    one that is to be brought back now, whatever the state.

    Raises `SnapshotError` if the catalog says what cannot be.
    """
    try:
        spec = LearnerSpec.parse(stored.spec)
    except SpecError as error:
        raise SnapshotError.of_spec(error) from error
    engine, update_time, progress, producers = stored.engine, stored.create_time, newborn_progress(spec), {}
    if checkpoint is not None and (summary := _summary(stored, checkpoint)) is None:
        state = LearnerState.UNAVAILABLE if state is LearnerState.EVICTED else state  # its file says what it is
    elif checkpoint is not None and summary is not None:
        spec, engine, progress = summary.spec, summary.engine, summary.progress
        update_time = _time(summary.update_time) or update_time
        producers = {
            name: Producer(name, messages.Position(epoch, sequence))
            for name, (epoch, sequence) in summary.producers.items()
        }
    record = LearnerRecord(
        learner_id=stored.learner_id,
        uid=stored.uid,
        spec=spec,
        engine=engine,
        etag=etag(stored.uid, update_time, spec),
        create_time=stored.create_time,
        update_time=update_time,
        state=state,
        progress=progress,
        samples=SampleHistory(history_samples),
        producers={name: producer.record for name, producer in producers.items()},
        checkpoint=checkpoint_record(checkpoint) if checkpoint is not None else None,
        durability=stored.durability,
        quarantine=stored.quarantine,
        delete_time=stored.delete_time,
        purge_time=stored.purge_time,
        journal_position=checkpoint.position if checkpoint is not None else 0,
    )
    return Hosted(
        stored=stored,
        record=record,
        log=LearnerLog(stored.uid, stored.durability, record.journal_position),
        producers=producers,
        checkpoint_number=checkpoint.number if checkpoint is not None else 0,
        saved_position=checkpoint.position if checkpoint is not None else 0,
    )


def hosted_from_rows(
    row: StoredLearner | UnreadableRow, checkpoint: StoredCheckpoint | SnapshotError | None, history_samples: int
) -> Hosted:
    """A learner, evicted or deleted, as the catalog has it; unreadable where that cannot be."""
    if isinstance(row, UnreadableRow):
        return _hosted_by_name(row)
    deleted = row.delete_time is not None
    try:
        if isinstance(checkpoint, SnapshotError):
            raise checkpoint
        state = LearnerState.DELETED if deleted else LearnerState.EVICTED
        return hosted_from_catalog(row, checkpoint, state, history_samples)
    except SnapshotError as error:
        return _hosted_by_name(
            UnreadableRow(uid=row.uid, learner_id=row.learner_id, deleted=deleted, reason=str(error))
        )


def _summary(stored: StoredLearner, checkpoint: StoredCheckpoint) -> "Summary | None":
    try:
        return Summary.from_plain(checkpoint.summary)
    except SnapshotError as error:
        log.warning("checkpoint's summary unreadable", learner=stored.learner_id, error=str(error))
        return None


def _hosted_by_name(row: UnreadableRow) -> Hosted:
    """A learner of which nothing is known but its name: it is there to be named, and to be deleted."""
    spec = LearnerSpec.parse(_UNKNOWN)
    stored = StoredLearner(
        uid=row.uid,
        learner_id=row.learner_id,
        spec=spec.to_plain(),
        engine="module",
        durability=Durability.FSYNC,
        born=False,
        create_time=_LONG_AGO,
        delete_time=_LONG_AGO if row.deleted else None,
    )
    state = LearnerState.DELETED if row.deleted else LearnerState.EVICTED  # nothing tries to bring it back
    hosted = hosted_from_catalog(stored, None, state, 1)
    hosted.unreadable = row.reason
    return hosted


_UNKNOWN = {
    "network": {"kind": "linear", "in_features": 1, "out_features": 1},
    "loss": "mse",
    "optimizer": {"kind": "sgd", "lr": 1.0},
}
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Summary:
    """What the catalog keeps of a checkpoint, so that a learner can be shown without being loaded."""

    spec: LearnerSpec
    engine: EngineName
    update_time: str
    progress: LearnerProgress
    producers: Mapping[str, tuple[int, int]]  # epoch and applied sequence

    @classmethod
    def of(cls, report: messages.LearnerReport) -> "Summary":
        producers = {name: (position.epoch, position.sequence) for name, position in report.positions.items()}
        return cls(report.spec, report.engine, report.update_time, report.progress, producers)

    def to_plain(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_plain(),
            "engine": self.engine,
            "update_time": self.update_time,
            "progress": self.progress.to_plain(),
            "producers": {name: list(position) for name, position in self.producers.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Summary":
        """What `to_plain` said. Raises `SnapshotError` if it is anything else."""
        saved = read_part(_SavedSummary, plain)
        try:
            spec = LearnerSpec.parse(saved.spec)
        except SpecError as error:
            raise SnapshotError.of_spec(error) from error
        try:
            progress = LearnerProgress.from_plain(saved.progress)
        except SnapshotError as error:
            raise error.within("progress") from error
        return cls(spec, saved.engine, saved.update_time, progress, saved.producers)


class _SavedSummary(SavedBeside):
    spec: dict[str, Any]
    engine: EngineName
    update_time: SavedTime | Literal[""]
    progress: dict[str, Any]
    producers: dict[Label, Annotated[tuple[Count, Count], Strict(False)]]


def newborn_progress(spec: LearnerSpec) -> LearnerProgress:
    """Of a learner that has learnt nothing yet."""
    try:
        hidden_layers = hidden_layer_names(spec)
    except SpecError:  # its architecture is not installed any more; that is said where the engine cannot make it
        hidden_layers = ()
    return LearnerProgress(
        step=0,
        examples=0,
        pending=0,
        loss=None,
        accuracy=None,
        replacements=dict.fromkeys(hidden_layers, 0),
        tasks=(),
        task_count=0,
    )


def stored_checkpoint(
    uid: str, number: int, report: messages.CheckpointReport, *, pinned: bool = False
) -> StoredCheckpoint:
    """The catalog's row for a checkpoint that the engine has written."""
    learner = report.learner
    return StoredCheckpoint(
        learner_uid=uid,
        number=number,
        position=learner.journal_position,
        step=learner.progress.step,
        examples=learner.progress.examples,
        size_bytes=report.size_bytes,
        time=datetime.fromtimestamp(report.time, UTC),
        pinned=pinned,
        summary=Summary.of(learner).to_plain(),
    )


def checkpoint_record(checkpoint: StoredCheckpoint) -> CheckpointRecord:
    return CheckpointRecord(checkpoint.step, checkpoint.time, checkpoint.size_bytes, checkpoint.position)


def etag(uid: str, update_time: datetime, spec: LearnerSpec) -> str:
    """Differs after each update, also after one that brings an earlier spec back."""
    return digest({"uid": uid, "update_time": update_time.isoformat(), "spec": spec.to_plain()})[:16]


def digest(plain: Mapping[str, Any]) -> str:
    """Equal for equal JSON objects."""
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def _time(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
