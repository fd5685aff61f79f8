"""The journal: one ordered log per learner of everything that changes it, kept in a database.

Synchronous; the front reaches it through `GroupCommit`, which runs it on a thread of its own.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from isal import isal_zlib
from sqlalchemy import ColumnElement, Engine, Row, delete, func, insert, select

from cbp_server.errors import JournalDamaged
from cbp_server.store.database import transaction
from cbp_server.store.tables import JOURNAL, RESUMES

#: Rows and bytes of payload read back at a time, so that large ones do not fill the memory; at first fewer bytes, for
#: whoever waits for the first rows has nothing to do before.
_READ_ROWS = 256
_READ_BYTES_FIRST = 2**20
_READ_BYTES = 16 * 2**20
_BUFFERED_ROWS = 8  # that PostgreSQL sends at a time, whatever their size
#: Rows and bytes of payload removed at a time, so that appending does not wait for long.
_REMOVED_ROWS = 256
_REMOVED_BYTES = 4 * 2**20

#: Stands in no producer's name, which is printable.
_LIFE = "\x1f"

_COLUMNS = tuple(JOURNAL.c.keys())


class EntryKind(StrEnum):
    """What an entry does to its learner."""

    BATCH = "batch"  # payload: a serialised cbp.v1.TrainBatch
    OPEN = "open"  # a producer's new epoch; no payload
    FORGET = "forget"  # a producer's name is free again; payload: the name
    UPDATE = "update"  # payload: JSON of update_time and spec
    RESET = "reset"  # units reset by hand; payload: JSON of layers and fraction
    RESTORE = "restore"  # the state of an earlier position, which the checkpoint at this position holds
    ENGINE = "engine"  # another engine takes the steps from here on; payload: its name
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
    life: int = 0  # of the producer's name; not 0 if it may have been forgotten before
    epoch: int | None = None
    sequence: int | None = None


class Journal:
    """Reads and writes entries through `engine`; each call is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._portioned = engine.execution_options(stream_results=True, max_row_buffer=_BUFFERED_ROWS)
        # Compiled once: what SQLAlchemy does for a statement each time would take as long as SQLite does.
        self._insert = insert(JOURNAL).compile(dialect=engine.dialect)

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
        row = _values if self._insert.positional else row_of
        rows: list[Any] = [row(entry) for entry in entries]
        with transaction(self._engine, sync=sync) as connection:
            connection.exec_driver_sql(self._insert.string, rows)

    def read(self, learner_uid: str, after: int, up_to: int | None = None) -> Iterator[Entry]:
        """The learner's entries behind position `after` in order, to the last or to `up_to`, that one included.

        Raises:
            JournalDamaged: an entry is missing or is not what was written.
        """
        expected = after + 1
        size = _READ_BYTES_FIRST
        while rows := self._next_rows(learner_uid, expected, up_to, size):
            size = min(4 * size, _READ_BYTES)
            for row in rows:
                entry = _entry(row)
                if entry.position != expected:
                    raise JournalDamaged(learner_uid, expected)
                expected += 1
                yield entry

    def _next_rows(self, learner_uid: str, first: int, up_to: int | None, size_bytes: int) -> list[Row[Any]]:
        """Some rows from position `first` on, with about so many bytes of payload; none at the end."""
        query = select(JOURNAL).where(_of(learner_uid), JOURNAL.c.position >= first)
        if up_to is not None:
            query = query.where(JOURNAL.c.position <= up_to)
        query = query.order_by(JOURNAL.c.position).limit(_READ_ROWS)
        rows: list[Row[Any]] = []
        size = 0
        with self._portioned.connect() as connection, connection.execute(query) as result:
            for row in result:
                rows.append(row)
                size += len(row[-1])
                if size >= size_bytes:
                    break
        return rows

    def restores(self, learner_uid: str, after: int, up_to: int | None = None) -> list[Entry]:
        """The learner's entries of kind RESTORE behind position `after` up to `up_to`, in order.

        Raises:
            JournalDamaged: one of them is not what was written.
        """
        query = select(JOURNAL).where(
            _of(learner_uid), JOURNAL.c.position > after, JOURNAL.c.kind == EntryKind.RESTORE.value
        )
        if up_to is not None:
            query = query.where(JOURNAL.c.position <= up_to)
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query.order_by(JOURNAL.c.position))]

    def resumes(self, learner_uid: str, after: int) -> list[Entry]:
        """The learner's entries of kind RESUME behind position `after`, in order.

        Raises:
            JournalDamaged: one of them is not what was written.
        """
        query = select(JOURNAL).where(_of(learner_uid), JOURNAL.c.position > after, RESUMES)
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query.order_by(JOURNAL.c.position))]

    def bounds(self, learner_uid: str) -> tuple[int, int] | None:
        """The first and the last position that the log holds of the learner."""
        ends = (select(end(JOURNAL.c.position)).where(_of(learner_uid)) for end in (func.min, func.max))
        with self._engine.connect() as connection:  # a query each, since SQLite scans the whole log for both at once
            first, last = connection.execute(select(*(end.scalar_subquery() for end in ends))).one()
        return None if first is None else (first, last)

    def truncate(self, learner_uid: str, up_to: int) -> None:
        """Removes the entries up to and including position `up_to`, the first ones first.

        After a failure, or power loss, some of them may be there still.
        """
        while (end := self._end_of_piece(learner_uid, up_to)) is not None:
            started = time.monotonic()
            with transaction(self._engine, sync=False) as connection:
                connection.execute(delete(JOURNAL).where(_of(learner_uid), JOURNAL.c.position <= end))
            time.sleep(time.monotonic() - started)  # half of the time is the commits'

    def _end_of_piece(self, learner_uid: str, up_to: int) -> int | None:
        """The position up to which entries are removed in one transaction; None if there are none."""
        sizes = (
            select(JOURNAL.c.position, func.length(JOURNAL.c.payload))
            .where(_of(learner_uid), JOURNAL.c.position <= up_to)
            .order_by(JOURNAL.c.position)
            .limit(_REMOVED_ROWS)
        )
        end, size = None, 0
        with self._engine.connect() as connection:
            for position, length in connection.execute(sizes):
                end, size = position, size + length
                if size >= _REMOVED_BYTES:
                    break
        return end

    def forget(self, learner_uid: str) -> None:
        """Removes every entry of the learner, as `truncate` does."""
        _, last = self.bounds(learner_uid) or (0, 0)
        self.truncate(learner_uid, last)

    def learners(self) -> set[str]:
        """uids that have entries."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(JOURNAL.c.learner_uid).distinct()).scalars())


def row_of(entry: Entry) -> dict[str, Any]:
    """The entry as a row of the table."""
    return dict(zip(_COLUMNS, _values(entry), strict=True))


def _values(entry: Entry) -> tuple[Any, ...]:
    """In the order of the table's columns."""
    return (
        entry.learner_uid,
        entry.position,
        entry.kind.value,
        _producer_key(entry),
        entry.epoch,
        entry.sequence,
        entry.payload_hash,
        _crc(entry),
        entry.payload,
    )


def _entry(row: Row[Any]) -> Entry:
    uid, position, kind, producer, epoch, sequence, payload_hash, crc, payload = tuple(row)
    try:
        entry = Entry(
            learner_uid=uid,
            position=position,
            kind=EntryKind(kind),
            payload=payload,
            payload_hash=payload_hash,
            **_named(producer),
            epoch=epoch,
            sequence=sequence,
        )
    except ValueError as error:
        raise JournalDamaged(uid, position) from error
    if _crc(entry) != crc:
        raise JournalDamaged(uid, position)
    return entry


def _producer_key(entry: Entry) -> str | None:
    """In the table: what was sent under a name before it was forgotten may be there still, and is no repeat."""
    return entry.producer if not entry.life else f"{entry.producer}{_LIFE}{entry.life}"


def _named(key: str | None) -> dict[str, Any]:
    """The fields of an entry that `_producer_key` has made one."""
    if key is None or _LIFE not in key:
        return {"producer": key}
    name, _, life = key.rpartition(_LIFE)
    return {"producer": name, "life": int(life)}


def _of(learner_uid: str) -> ColumnElement[bool]:
    return JOURNAL.c.learner_uid == learner_uid


def _crc(entry: Entry) -> int:
    """Over all that replay uses; signed, as databases have it. The polynomial is zlib's, which takes twenty times as
    long: a third of a millisecond for a message of 800 KB."""
    head = (
        f"{entry.learner_uid} {entry.position} {entry.kind} "
        f"{_producer_key(entry)} {entry.epoch} {entry.sequence} {entry.payload_hash}"
    )
    unsigned = isal_zlib.crc32(entry.payload, isal_zlib.crc32(head.encode()))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned
