"""The whole log of every learner, from the first entry to the last, in a store on SQLite.

The server removes entries that it needs no more. A trigger in the database keeps them, so that at the end the order in
which the batches of several producers were applied is known.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

_COLUMNS = ("learner_uid", "position", "kind", "producer", "epoch", "sequence", "payload")


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


def keep_removed_entries(data_dir: Path) -> None:
    """Installs the trigger; the server must have made its tables, and not run."""
    columns, old = ", ".join(_COLUMNS), ", ".join(f"OLD.{column}" for column in _COLUMNS)
    with closing(_connect(data_dir)) as database, database:
        database.execute(f"CREATE TABLE audit AS SELECT {columns} FROM journal WHERE 0")
        database.execute(
            "CREATE TRIGGER keep_removed_entries BEFORE DELETE ON journal "
            f"BEGIN INSERT INTO audit ({columns}) VALUES ({old}); END"
        )


def whole_log(data_dir: Path, learner_uid: str) -> list[LogEntry]:
    """All entries that the learner ever had, in order. The server must not run.

    Raises:
        AssertionError: a position is missing or there twice.
    """
    columns = ", ".join(_COLUMNS)
    with closing(_connect(data_dir)) as database:
        rows = database.execute(
            f"SELECT {columns} FROM audit WHERE learner_uid = :uid "
            f"UNION ALL SELECT {columns} FROM journal WHERE learner_uid = :uid ORDER BY position",
            {"uid": learner_uid},
        ).fetchall()
    log = [LogEntry(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]
    positions = [entry.position for entry in log]
    assert positions == list(range(1, len(log) + 1)), f"the log of {learner_uid} has gaps or repeats"
    return log


def _connect(data_dir: Path) -> sqlite3.Connection:
    return sqlite3.connect(data_dir / "journal.db", timeout=10)
