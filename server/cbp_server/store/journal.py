"""The journal: one ordered log per learner of everything that changes it, kept in a database.

Synchronous; the front reaches it through `GroupCommit`, which runs it on a thread of its own.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Engine, delete, func, insert, select

from cbp_server.errors import JournalDamaged
from cbp_server.store.database import transaction
from cbp_server.store.tables import JOURNAL

#: Rows fetched at a time when reading back.
_READ_ROWS = 256


class EntryKind(StrEnum):
    """What an entry does to its learner."""

    BATCH = "batch"  # payload: a serialised cbp.v1.TrainBatch
    OPEN = "open"  # a producer's new epoch; no payload
    UPDATE = "update"  # payload: JSON of update_time and spec
    RESET = "reset"  # units reset by hand; payload: JSON of layers and fraction
    RESTORE = "restore"  # the state of an earlier position, which the checkpoint at this position holds
    RESUME = "resume"  # how a quarantined learner goes on; payload: JSON of at, lr, skip and update_time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One change of one learner."""

    learner_uid: str
    position: int
    kind: EntryKind
    payload: bytes
    payload_hash: str = ""
    producer: str | None = None
    epoch: int | None = None
    sequence: int | None = None


class Journal:
    """Reads and writes entries through `engine`; each call is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def append(self, entries: Sequence[Entry], *, sync: bool = True) -> None:
        """Adds entries of any learners; all of them are on disk when this returns, or none of them is in the log.

        If the connection is lost during the commit, which of the two is unknown.

        Args:
            sync: without it the entries outlast this process, but a crash of the machine (or of PostgreSQL) takes
                the last ones; a later append with it makes them last as well.

        Raises:
            sqlalchemy.exc.IntegrityError: a position or a producer's sequence is in the log already.
            sqlalchemy.exc.OperationalError: the database could not write.
        """
        with transaction(self._engine, sync=sync) as connection:
            connection.execute(insert(JOURNAL), [row_of(entry) for entry in entries])

    def read(self, learner_uid: str, after: int, up_to: int | None = None) -> Iterator[Entry]:
        """The learner's entries behind position `after` in order, to the last or to `up_to`, that one included.

        Raises:
            JournalDamaged: an entry is missing or is not what was written.
        """
        query = select(JOURNAL).where(JOURNAL.c.learner_uid == learner_uid)
        if up_to is not None:
            query = query.where(JOURNAL.c.position <= up_to)
        query = query.order_by(JOURNAL.c.position).limit(_READ_ROWS)
        expected = after + 1
        while True:
            with self._engine.connect() as connection:
                rows = connection.execute(query.where(JOURNAL.c.position >= expected)).mappings().all()
            for row in rows:
                entry = _entry(row)
                if entry.position != expected:
                    raise JournalDamaged(learner_uid, expected)
                expected += 1
                yield entry
            if len(rows) < _READ_ROWS:
                return

    def resumes(self, learner_uid: str, after: int) -> list[Entry]:
        """The learner's entries of kind RESUME behind position `after`, in order.

        Raises:
            JournalDamaged: one of them is not what was written.
        """
        query = select(JOURNAL).where(
            _of(learner_uid), JOURNAL.c.position > after, JOURNAL.c.kind == EntryKind.RESUME.value
        )
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query.order_by(JOURNAL.c.position)).mappings()]

    def bounds(self, learner_uid: str) -> tuple[int, int] | None:
        """The first and the last position that the log holds of the learner."""
        query = select(func.min(JOURNAL.c.position), func.max(JOURNAL.c.position)).where(_of(learner_uid))
        with self._engine.connect() as connection:
            first, last = connection.execute(query).one()
        return None if first is None else (first, last)

    def truncate(self, learner_uid: str, up_to: int) -> None:
        """Removes the entries up to and including position `up_to`."""
        with transaction(self._engine) as connection:
            connection.execute(delete(JOURNAL).where(_of(learner_uid), JOURNAL.c.position <= up_to))

    def forget(self, learner_uid: str) -> None:
        """Removes every entry of the learner."""
        with transaction(self._engine) as connection:
            connection.execute(delete(JOURNAL).where(_of(learner_uid)))

    def learners(self) -> set[str]:
        """uids that have entries."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(JOURNAL.c.learner_uid).distinct()).scalars())


def row_of(entry: Entry) -> dict[str, Any]:
    """The entry as a row of the table."""
    return vars(entry) | {"kind": entry.kind.value, "crc": _crc(entry)}


def _entry(row: Mapping[Any, Any]) -> Entry:
    fields = dict(row)
    crc = fields.pop("crc")
    try:
        entry = Entry(**fields | {"kind": EntryKind(fields["kind"])})
    except ValueError as error:
        raise JournalDamaged(fields["learner_uid"], fields["position"]) from error
    if _crc(entry) != crc:
        raise JournalDamaged(entry.learner_uid, entry.position)
    return entry


def _of(learner_uid: str) -> ColumnElement[bool]:
    return JOURNAL.c.learner_uid == learner_uid


def _crc(entry: Entry) -> int:
    """Over all that replay uses; signed, as databases have it."""
    head = (
        f"{entry.learner_uid} {entry.position} {entry.kind} "
        f"{entry.producer} {entry.epoch} {entry.sequence} {entry.payload_hash}"
    )
    unsigned = zlib.crc32(entry.payload, zlib.crc32(head.encode()))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned
