"""What a checkpoint holds: a learner's snapshot, and beside it where the service stood with it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from cbp import EngineName, FieldViolation, Learner, LearnerSnapshot, PlasticitySample, SnapshotError
from cbp.architectures.profile import layer_names
from cbp.engines.names import needs_module
from cbp.saved.parts import Count, Label, SavedBeside, read_part
from cbp.serialization import read_object
from cbp_server.engine import messages
from cbp_server.engine.hosted_learner import SAMPLES_SAVED, HostedLearner
from cbp_server.records.samples import PackedSample, SampleRecord, pack, unpack
from cbp_server.records.times import SavedTime, read_time

_SERVICE_KEY = "cbp_server"


class Copy:
    """A learner as it was between two steps, to be written while it goes on.

    Args:
        spare: memory to copy into.
    """

    def __init__(self, hosted: HostedLearner, spare: LearnerSnapshot | None) -> None:
        self.snapshot = hosted.learner.snapshot(into=spare)
        self.report = hosted.report
        self._samples = hosted.samples.packed

    def to_bytes(self, stored_as: str) -> bytes:
        """The file's content; `stored_as` is the learner in whose name it lies there."""
        service = {
            "learner": stored_as,
            "engine": self.report.engine,
            "update_time": self.report.update_time,
            "positions": {name: asdict(position) for name, position in self.report.positions.items()},
            "epoch_floor": self.report.epoch_floor,
            "journal_position": self.report.journal_position,
            "samples": [_sample_to_plain(sample) for sample in self._samples],
        }
        return self.snapshot.to_bytes(extra={_SERVICE_KEY: json.dumps(service)})


class Content:
    """A checkpoint as it is read: all that it says is checked here, or where its snapshot is restored.

    Raises `SnapshotError` if it is unreadable.
    """

    def __init__(self, data: bytes, stored_as: str) -> None:
        self.snapshot = LearnerSnapshot.from_bytes(data)
        if _SERVICE_KEY not in self.snapshot.extra:
            raise SnapshotError("it is a learner's snapshot, but no checkpoint")
        plain = read_object(self.snapshot.extra[_SERVICE_KEY], _SERVICE_KEY)
        try:
            self._service = read_part(SavedService, plain)
        except SnapshotError as error:
            raise error.within(_SERVICE_KEY) from error
        if self._service.learner != stored_as:
            raise SnapshotError("it is another learner's checkpoint, under the wrong name")
        if needs_module(self.snapshot.read_spec()) != (self.engine == "module"):
            text = f"{self.engine!r} does not run this network"
            raise SnapshotError.of([FieldViolation(f"{_SERVICE_KEY}.engine", text)])

    @property
    def engine(self) -> EngineName:
        """What took the learner's steps."""
        return self._service.engine

    def hosted(self, learner: Learner) -> HostedLearner:
        """The learner of this snapshot, with what is said of it here. Raises `SnapshotError`."""
        service = self._service
        samples = [_sample_from_plain(plain) for plain in service.samples]
        names = layer_names(learner.spec)
        if any(tuple(layer.layer for layer in record.sample.layers) != names for record in samples):
            text = f"Expected the network's layers: {', '.join(names)}"
            raise SnapshotError.of([FieldViolation(f"{_SERVICE_KEY}.samples", text)])
        hosted = HostedLearner(learner, service.update_time, journal_position=service.journal_position)
        positions = {name: position.position for name, position in service.positions.items()}
        hosted.place(positions, service.epoch_floor)
        hosted.samples.extend(map(pack, samples))
        hosted.trainability = hosted.samples.newest_trainability
        return hosted


class SavedPosition(SavedBeside):
    """A `messages.Position`."""

    epoch: Count
    sequence: Count
    hashes: Annotated[
        list[Annotated[tuple[Count, Annotated[str, Field(max_length=64)]], Strict(False)]],
        Field(max_length=messages.HASHES_KEPT),
    ]
    stream_id: Annotated[str, Field(max_length=64)]
    life: Count = 0
    """Not in checkpoints of the first version; neither is `epoch_floor`."""

    @property
    def position(self) -> messages.Position:
        return messages.Position(self.epoch, self.sequence, tuple(self.hashes), self.stream_id, self.life)


class SavedService(SavedBeside):
    """What a checkpoint says beside the snapshot; other keys, such as earlier versions wrote, are left alone."""

    learner: str
    engine: EngineName
    update_time: SavedTime | Literal[""]
    positions: dict[Label, SavedPosition]
    epoch_floor: Count = 0
    journal_position: Count
    samples: Annotated[list[dict[str, Any]], Field(max_length=SAMPLES_SAVED)]


def _sample_to_plain(packed: PackedSample) -> dict[str, Any]:
    record = unpack(packed)
    return record.sample.to_plain() | {"time": record.time.isoformat()}


def _sample_from_plain(plain: Mapping[str, Any]) -> SampleRecord:
    measured = {key: value for key, value in plain.items() if key != "time"}
    try:
        return SampleRecord(PlasticitySample.from_plain(measured), read_time(plain.get("time")))
    except SnapshotError as error:
        raise error.within(f"{_SERVICE_KEY}.samples") from error
