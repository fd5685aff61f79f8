"""The whole history of every learner, in a store on SQLite: also what the server has removed since.

The server removes entries and checkpoints that it needs no more. Triggers in the database keep their rows, so that at
the end the order in which the batches of several producers were applied is known.
"""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbp import EngineName

_ENTRY = ("learner_uid", "position", "kind", "producer", "epoch", "sequence", "payload")
_CHECKPOINT = ("learner_uid", "number", "position", "summary")
_TABLES = {"journal": _ENTRY, "checkpoints": _CHECKPOINT}


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """A row of the journal, as it was written."""

    learner_uid: str
    position: int
    kind: str
    producer: str | None
    epoch: int | None
    sequence: int | None
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """A row of the catalog; the checkpoint's file may be gone."""

    learner_uid: str
    number: int
    position: int
    summary: dict[str, Any]


def keep_removed_rows(data_dir: Path) -> None:
    """Installs the triggers; the server must have made its tables, and not run."""
    with closing(_connect(data_dir)) as database, database:
        for table, columns in _TABLES.items():
            names, old = ", ".join(columns), ", ".join(f"OLD.{column}" for column in columns)
            database.execute(f"CREATE TABLE removed_{table} AS SELECT {names} FROM {table} WHERE 0")
            database.execute(
                f"CREATE TRIGGER keep_removed_{table} BEFORE DELETE ON {table} "
                f"BEGIN INSERT INTO removed_{table} ({names}) VALUES ({old}); END"
            )


class History:
    """What a store holds, and held. The server must not run."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def uids(self) -> dict[str, str]:
        """By name, of the learners that are not deleted."""
        with closing(_connect(self._data_dir)) as database:
            return dict(database.execute("SELECT learner_id, uid FROM learners WHERE delete_time IS NULL"))

    def engine(self, uid: str) -> EngineName:
        """That the learner was born with."""
        with closing(_connect(self._data_dir)) as database:
            return database.execute("SELECT engine FROM learners WHERE uid = ?", (uid,)).fetchone()[0]

    def log(self, uid: str) -> list[LogEntry]:
        """All entries that the learner ever had, in order.

        Raises:
            AssertionError: a position is missing or there twice.
        """
        log = [LogEntry(**row) for row in self._rows("journal", uid, "position")]
        positions = [entry.position for entry in log]
        assert positions == list(range(1, len(log) + 1)), f"the log of {uid} has gaps or repeats: {positions}"
        return log

    def checkpoints(self, uid: str) -> list[CheckpointRow]:
        """All that the learner ever had, in order."""
        rows = self._rows("checkpoints", uid, "number")
        return [CheckpointRow(**row | {"summary": json.loads(row["summary"])}) for row in rows]

    def newest_file(self, uid: str) -> Path:
        """Of the checkpoints that the catalog has now."""
        with closing(_connect(self._data_dir)) as database:
            query = "SELECT MAX(number) FROM checkpoints WHERE learner_uid = ?"
            (number,) = database.execute(query, (uid,)).fetchone()
        return self._data_dir / "checkpoints" / uid / f"{number}.safetensors"

    def _rows(self, table: str, uid: str, order: str) -> list[dict[str, Any]]:
        columns = _TABLES[table]
        names = ", ".join(columns)
        with closing(_connect(self._data_dir)) as database:
            rows = database.execute(
                f"SELECT {names} FROM removed_{table} WHERE learner_uid = :uid "
                f"UNION ALL SELECT {names} FROM {table} WHERE learner_uid = :uid ORDER BY {order}",
                {"uid": uid},
            ).fetchall()
        return [dict(zip(columns, row, strict=True)) for row in rows]


def _connect(data_dir: Path) -> sqlite3.Connection:
    return sqlite3.connect(data_dir / "journal.db", timeout=10)
