"""The journal: one ordered log per learner of everything that changes it, kept in a database.

Synchronous; the front reaches it through `GroupCommit`, which runs it on a thread of its own.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from sqlalchemy import Engine, delete, insert, select

from cbp_server.errors import JournalDamaged
from cbp_server.store.tables import JOURNAL

#: Rows fetched at a time when reading back.
_READ_ROWS = 256


class EntryKind(StrEnum):
    """What an entry does to its learner."""

    BATCH = "batch"  # payload: a serialised cbp.v1.TrainBatch
    UPDATE = "update"  # payload: JSON of update_time and spec
    OPEN = "open"  # a producer's new epoch; no payload


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

    def append(self, entries: Sequence[Entry]) -> None:
        """Adds entries of any learners; all of them are on disk when this returns, or none of them is in the log.

        Raises:
            sqlalchemy.exc.IntegrityError: a position or a producer's sequence is in the log already.
            sqlalchemy.exc.OperationalError: the database could not write.
        """
        rows = [asdict(entry) | {"crc": _crc(entry)} for entry in entries]
        with self._engine.begin() as connection:
            connection.execute(insert(JOURNAL), rows)

    def read(self, learner_uid: str, after: int) -> Iterator[Entry]:
        """The learner's entries behind position `after`, in order.

        Raises:
            JournalDamaged: an entry is missing or is not what was written.
        """
        query = (
            select(JOURNAL).where(JOURNAL.c.learner_uid == learner_uid).order_by(JOURNAL.c.position).limit(_READ_ROWS)
        )
        expected = after + 1
        while True:
            with self._engine.connect() as connection:
                rows = connection.execute(query.where(JOURNAL.c.position >= expected)).mappings().all()
            for row in rows:
                fields = dict(row)
                crc = fields.pop("crc")
                entry = Entry(**fields | {"kind": EntryKind(fields["kind"])})
                if entry.position != expected or _crc(entry) != crc:
                    raise JournalDamaged(learner_uid, expected)
                expected += 1
                yield entry
            if len(rows) < _READ_ROWS:
                return

    def truncate(self, learner_uid: str, up_to: int) -> None:
        """Removes the entries up to and including position `up_to`."""
        condition = (JOURNAL.c.learner_uid == learner_uid) & (JOURNAL.c.position <= up_to)
        with self._engine.begin() as connection:
            connection.execute(delete(JOURNAL).where(condition))

    def forget(self, learner_uid: str) -> None:
        """Removes every entry of the learner."""
        with self._engine.begin() as connection:
            connection.execute(delete(JOURNAL).where(JOURNAL.c.learner_uid == learner_uid))

    def learners(self) -> set[str]:
        """uids that have entries."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(JOURNAL.c.learner_uid).distinct()).scalars())


def _crc(entry: Entry) -> int:
    """Over all that replay uses; signed, as databases have it."""
    head = f"{entry.learner_uid} {entry.position} {entry.kind} {entry.producer} {entry.epoch} {entry.sequence}".encode()
    unsigned = zlib.crc32(entry.payload, zlib.crc32(head))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned
