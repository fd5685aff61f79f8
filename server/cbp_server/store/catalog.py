"""The catalog: which learners and checkpoints there are. What is not in it does not exist, whatever files lie about."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, TypeAdapter
from sqlalchemy import Connection, Engine, Row, Select, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from cbp import EngineName, SnapshotError
from cbp.saved.parts import Count, naming_misfits
from cbp_server.errors import LearnerExists
from cbp_server.records.learners import Durability, Quarantine
from cbp_server.store.database import transaction
from cbp_server.store.journal import Entry, row_of
from cbp_server.store.tables import CHECKPOINTS, JOURNAL, LEARNERS, LIVE_NAME


@dataclass(frozen=True, kw_only=True)
class StoredLearner:
    """A learner as the database has it; its state is in checkpoints and journal."""

    uid: str
    learner_id: str
    spec: dict[str, Any]  # the newborn's; JSON
    engine: EngineName  # the newborn's
    durability: Durability
    born: bool  # it began as that newborn; otherwise its first checkpoint, at position 0, is its beginning
    create_time: AwareDatetime  # times are UTC
    request_id: str = ""
    request_digest: str = ""
    delete_time: AwareDatetime | None = None
    purge_time: AwareDatetime | None = None
    quarantine: Quarantine | None = None


@dataclass(frozen=True, kw_only=True)
class UnreadableRow:
    """A learner of which the database says what cannot be."""

    uid: str
    learner_id: str
    deleted: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint whose file is whole."""

    learner_uid: str
    number: Count  # counts from 1 for each learner
    position: Count  # of the last journal entry in it
    step: Count
    examples: Count
    size_bytes: Count
    time: AwareDatetime
    pinned: bool
    summary: dict[str, Any]  # JSON


class Catalog:
    """Reads and writes learners and checkpoints through `engine`.

    Each call is one transaction, on disk when it returns. Calls that change a learner raise `LookupError` if there is
    none with that uid, and all raise `sqlalchemy.exc.SQLAlchemyError` if the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def learners(self) -> list[StoredLearner | UnreadableRow]:
        """All that are not purged, the oldest first, also the deleted ones."""
        order = LEARNERS.c.create_time, LEARNERS.c.uid
        with self._engine.connect() as connection:
            try:
                with _reading("a learner"):
                    return [_learner(row) for row in connection.execute(select(LEARNERS).order_by(*order))]
            except SnapshotError:  # of one of them, which must not hide the others
                names = select(LEARNERS.c.uid, LEARNERS.c.learner_id, LEARNERS.c.delete_time.is_not(None))
                rows = connection.execute(names.order_by(*order)).all()
                return [_readable_learner(connection, str(uid), str(name), deleted) for uid, name, deleted in rows]

    def newest_checkpoints(self) -> dict[str, StoredCheckpoint | SnapshotError]:
        """By uid, of those learners that have one; an error where the database says what cannot be."""
        newest = (
            select(CHECKPOINTS.c.learner_uid, func.max(CHECKPOINTS.c.number).label("number"))
            .group_by(CHECKPOINTS.c.learner_uid)
            .subquery()
        )
        same = (CHECKPOINTS.c.learner_uid == newest.c.learner_uid) & (CHECKPOINTS.c.number == newest.c.number)
        query = select(CHECKPOINTS).join(newest, same)
        with self._engine.connect() as connection:
            try:
                with _reading("a checkpoint"):
                    return {row.learner_uid: _checkpoint(row) for row in connection.execute(query)}
            except SnapshotError:
                uids = connection.execute(select(newest.c.learner_uid)).scalars().all()
                return {
                    uid: _readable_checkpoint(connection, query.where(CHECKPOINTS.c.learner_uid == uid)) for uid in uids
                }

    def add(self, learner: StoredLearner, checkpoint: StoredCheckpoint | None = None) -> None:
        """Makes a learner known, and its first checkpoint with it.

        Raises:
            LearnerExists: one that is not deleted has the name.
        """
        with _name_guard(learner.learner_id), transaction(self._engine) as connection:
            connection.execute(insert(LEARNERS), _learner_row(learner))
            if checkpoint is not None:
                _insert_checkpoint(connection, checkpoint)

    def delete(self, uid: str, delete_time: datetime, purge_time: datetime) -> None:
        """Marks the learner as deleted; its name is free at once."""
        with transaction(self._engine) as connection:
            _change_learner(connection, uid, delete_time=delete_time, purge_time=purge_time)

    def undelete(self, uid: str) -> None:
        """Takes the deletion back.

        Raises:
            LearnerExists: another has taken the name.
        """
        with self._engine.connect() as connection:
            name = connection.execute(select(LEARNERS.c.learner_id).where(LEARNERS.c.uid == uid)).scalar()
        with _name_guard(str(name)), transaction(self._engine) as connection:
            _change_learner(connection, uid, delete_time=None, purge_time=None)

    def purge(self, uid: str) -> None:
        """Removes the learner with its checkpoints' rows and its journal; nothing if it is gone already."""
        with transaction(self._engine) as connection:
            connection.execute(delete(JOURNAL).where(JOURNAL.c.learner_uid == uid))
            connection.execute(delete(CHECKPOINTS).where(CHECKPOINTS.c.learner_uid == uid))
            connection.execute(delete(LEARNERS).where(LEARNERS.c.uid == uid))

    def set_durability(self, uid: str, durability: Durability) -> None:
        """What acknowledged batches of the learner survive from now on."""
        with transaction(self._engine) as connection:
            _change_learner(connection, uid, durability=durability.value)

    def quarantine(self, uid: str, quarantine: Quarantine) -> None:
        """Notes the batch that the learner could not learn; `resume` and `restore` end it."""
        with transaction(self._engine) as connection:
            _change_learner(connection, uid, quarantine=_quarantine_json(quarantine))

    def checkpoints(self, uid: str) -> list[StoredCheckpoint]:
        """The learner's checkpoints, the newest first. Raises `SnapshotError` if the database says what cannot be."""
        query = select(CHECKPOINTS).where(CHECKPOINTS.c.learner_uid == uid).order_by(CHECKPOINTS.c.number.desc())
        with self._engine.connect() as connection, _reading("a checkpoint"):
            return [_checkpoint(row) for row in connection.execute(query)]

    def add_checkpoint(self, checkpoint: StoredCheckpoint) -> None:
        """Makes a checkpoint known whose file is whole.

        Raises:
            sqlalchemy.exc.IntegrityError: the learner is purged, or the number taken.
        """
        with transaction(self._engine) as connection:
            _insert_checkpoint(connection, checkpoint)

    def pin(self, uid: str, number: int) -> None:
        """Keeps the checkpoint from being removed by retention.

        Raises:
            LookupError: there is none with that number.
        """
        condition = _numbered(uid, number)
        with transaction(self._engine) as connection:
            if connection.execute(update(CHECKPOINTS).where(*condition).values(pinned=True)).rowcount == 0:
                raise LookupError(f"learner {uid} has no checkpoint {number}")

    def remove_checkpoint(self, uid: str, number: int) -> None:
        """Forgets a checkpoint, before its file is removed; nothing if it is gone already."""
        with transaction(self._engine) as connection:
            connection.execute(delete(CHECKPOINTS).where(*_numbered(uid, number)))

    def restore(self, entry: Entry, checkpoint: StoredCheckpoint) -> None:
        """Appends the RESTORE entry, makes its checkpoint known and ends a quarantine, all or nothing.

        Raises:
            sqlalchemy.exc.IntegrityError: the position or the checkpoint's number is taken.
        """
        with transaction(self._engine) as connection:
            connection.execute(insert(JOURNAL), row_of(entry))
            _insert_checkpoint(connection, checkpoint)
            _change_learner(connection, entry.learner_uid, quarantine=None)

    def resume(self, entry: Entry) -> None:
        """Appends the RESUME entry and ends the quarantine, both or nothing.

        Raises:
            sqlalchemy.exc.IntegrityError: the position is taken.
        """
        with transaction(self._engine) as connection:
            connection.execute(insert(JOURNAL), row_of(entry))
            _change_learner(connection, entry.learner_uid, quarantine=None)


def _change_learner(connection: Connection, uid: str, **values: Any) -> None:
    if connection.execute(update(LEARNERS).where(LEARNERS.c.uid == uid).values(values)).rowcount == 0:
        raise LookupError(f"there is no learner with the uid {uid}")


def _insert_checkpoint(connection: Connection, checkpoint: StoredCheckpoint) -> None:
    connection.execute(insert(CHECKPOINTS), vars(checkpoint))


def _numbered(uid: str, number: int) -> tuple[Any, Any]:
    return CHECKPOINTS.c.learner_uid == uid, CHECKPOINTS.c.number == number


@contextmanager
def _name_guard(learner_id: str) -> Iterator[None]:
    """Says `LearnerExists` where the constraint on live names refuses a row."""
    try:
        yield
    except IntegrityError as error:
        # PostgreSQL names the index, SQLite its column.
        if any(name in str(error.orig) for name in (LIVE_NAME, "learners.learner_id")):
            raise LearnerExists(learner_id) from error
        raise


def _learner_row(learner: StoredLearner) -> dict[str, Any]:
    return vars(learner) | {
        "durability": learner.durability.value,
        "quarantine": None if learner.quarantine is None else _quarantine_json(learner.quarantine),
    }


def _learner(row: Row[Any]) -> StoredLearner:
    return _LEARNER.validate_python(dict(row._mapping))


def _checkpoint(row: Row[Any]) -> StoredCheckpoint:
    return _CHECKPOINT.validate_python(dict(row._mapping))


_LEARNER, _CHECKPOINT = TypeAdapter(StoredLearner), TypeAdapter(StoredCheckpoint)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what reading a row of nonsense raises into `SnapshotError`."""
    try:
        with naming_misfits():
            yield
    except SnapshotError as error:
        raise SnapshotError(f"what the catalog says of {what} cannot be read: {error}") from error
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = f"what the catalog says of {what} cannot be read: {type(error).__name__}: {error}"
        raise SnapshotError(text) from error


def _readable_learner(
    connection: Connection, uid: str, learner_id: str, deleted: bool
) -> StoredLearner | UnreadableRow:
    try:
        with _reading("it"):
            return _learner(connection.execute(select(LEARNERS).where(LEARNERS.c.uid == uid)).one())
    except SnapshotError as error:
        return UnreadableRow(uid=uid, learner_id=learner_id, deleted=bool(deleted), reason=str(error))


def _readable_checkpoint(connection: Connection, query: Select[Any]) -> StoredCheckpoint | SnapshotError:
    try:
        with _reading("its newest checkpoint"):
            return _checkpoint(connection.execute(query).one())
    except SnapshotError as error:
        return error


def _quarantine_json(quarantine: Quarantine) -> dict[str, Any]:
    return asdict(quarantine) | {"time": quarantine.time.isoformat()}
