"""What a stopped server has stored of its learners."""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cbp import LearnerSnapshot


@dataclass(frozen=True)
class Stored:
    """A learner's last checkpoint."""

    uid: str
    snapshot: LearnerSnapshot
    journal_position: int
    sequences: dict[str, int]  # by producer: the last one applied


def newest_checkpoint(data_dir: Path, learner: str) -> Stored:
    """The newest checkpoint of the learner of that name."""
    path = _newest_path(data_dir, learner)
    snapshot = LearnerSnapshot.from_bytes(path.read_bytes())
    service = json.loads(snapshot.extra["cbp_server"])
    sequences = {name: position["sequence"] for name, position in service["positions"].items()}
    return Stored(service["identity"]["uid"], snapshot, service["journal_position"], sequences)


def _newest_path(data_dir: Path, learner: str) -> Path:
    if (data_dir / "learners").exists():
        return sorted((data_dir / "learners" / learner).glob("*.safetensors"))[-1]
    with closing(sqlite3.connect(data_dir / "journal.db")) as database:
        uid, number = database.execute(
            "SELECT uid, MAX(number) FROM learners JOIN checkpoints ON learner_uid = uid "
            "WHERE learner_id = ? AND delete_time IS NULL",
            (learner,),
        ).fetchone()
    return data_dir / "checkpoints" / str(uid) / f"{number}.safetensors"
