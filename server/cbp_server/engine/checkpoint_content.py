"""What a checkpoint holds: a learner's snapshot, and beside it where the service stood with it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from cbp import EngineName, Learner, LearnerSnapshot, PlasticitySample, SnapshotError
from cbp_server.engine import messages
from cbp_server.engine.hosted_learner import HostedLearner
from cbp_server.records.samples import PackedSample, SampleRecord, pack, unpack

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
    """A checkpoint as it is read. Raises `SnapshotError`, or what conversions raise, if it is unreadable."""

    def __init__(self, data: bytes, stored_as: str) -> None:
        self.snapshot = LearnerSnapshot.from_bytes(data)
        self._service = json.loads(self.snapshot.extra[_SERVICE_KEY])
        if self._service["learner"] != stored_as:
            raise SnapshotError("it is another learner's checkpoint, under the wrong name")

    @property
    def engine(self) -> EngineName:
        """What took the learner's steps."""
        name: EngineName = self._service["engine"]
        return name

    def hosted(self, learner: Learner) -> HostedLearner:
        """The learner of this snapshot, with what is said of it here."""
        service = self._service
        hosted = HostedLearner(learner, str(service["update_time"]), journal_position=int(service["journal_position"]))
        positions = {name: _position_from_plain(plain) for name, plain in service["positions"].items()}
        hosted.place(positions, int(service.get("epoch_floor", 0)))  # absent in those of the first version
        hosted.samples.extend(_sample_from_plain(plain) for plain in service["samples"])
        hosted.trainability = hosted.samples.newest_trainability
        return hosted


def _position_from_plain(plain: Mapping[str, Any]) -> messages.Position:
    hashes = tuple((int(sequence), str(payload_hash)) for sequence, payload_hash in plain["hashes"])
    return messages.Position(
        int(plain["epoch"]), int(plain["sequence"]), hashes, str(plain["stream_id"]), int(plain.get("life", 0))
    )


def _sample_to_plain(packed: PackedSample) -> dict[str, Any]:
    record = unpack(packed)
    return record.sample.to_plain() | {"time": record.time.isoformat()}


def _sample_from_plain(plain: Mapping[str, Any]) -> PackedSample:
    return pack(SampleRecord(PlasticitySample.from_plain(plain), datetime.fromisoformat(plain["time"])))
