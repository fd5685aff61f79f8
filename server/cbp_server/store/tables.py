"""The tables of the store, the same on SQLite and PostgreSQL. `migrations` makes them; a test compares the two."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

METADATA = MetaData()

#: The index that keeps names of live learners apart.
LIVE_NAME = "learners_live_name"


class UtcTime(TypeDecorator[datetime]):
    """Aware times in UTC, to the microsecond; SQLite keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


class Json(TypeDecorator[Any]):
    """A JSON value as text, so that numbers come back exactly, NaN and infinity included."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


#: Every learner, also those that are deleted and not yet purged.
LEARNERS = Table(
    "learners",
    METADATA,
    Column("uid", String(32), nullable=False),
    Column("learner_id", String(128), nullable=False),
    Column("spec", Json, nullable=False),  # the newborn's
    Column("engine", String(16), nullable=False),  # the newborn's
    Column("durability", String(8), nullable=False),
    Column("born", Boolean, nullable=False),  # as that newborn; else it begins with its first checkpoint
    Column("create_time", UtcTime, nullable=False),
    Column("request_id", String(128), nullable=False),  # of the create, with the request's digest; "" without
    Column("request_digest", String(128), nullable=False),
    Column("delete_time", UtcTime),
    Column("purge_time", UtcTime),
    Column("quarantine", Json),
    PrimaryKeyConstraint("uid", name="learners_pkey"),
)

# Two creates at once cannot both take a name, whatever the callers checked before; deleted learners leave it free.
Index(
    LIVE_NAME,
    LEARNERS.c.learner_id,
    unique=True,
    sqlite_where=text("delete_time IS NULL"),
    postgresql_where=text("delete_time IS NULL"),
)

#: Every checkpoint file that is whole. Numbers count from 1 for each learner.
CHECKPOINTS = Table(
    "checkpoints",
    METADATA,
    Column("learner_uid", String(32), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("position", BigInteger, nullable=False),  # of the last journal entry in it
    Column("step", BigInteger, nullable=False),
    Column("examples", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("time", UtcTime, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("summary", Json, nullable=False),
    PrimaryKeyConstraint("learner_uid", "number", name="checkpoints_pkey"),
    # A checkpoint that is finished after its learner was purged is refused rather than left behind.
    ForeignKeyConstraint(["learner_uid"], ["learners.uid"], name="checkpoints_learner_uid_fkey"),
)

#: A name, and the number of its life if it may have been forgotten before. SQLite takes any length.
_PRODUCER = String(128).with_variant(String(160), "postgresql")

#: One ordered log per learner of everything that changes it. Positions run 1, 2, 3, … without gaps.
JOURNAL = Table(
    "journal",
    METADATA,
    Column("learner_uid", String(32), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("producer", _PRODUCER),  # of batches and openings
    Column("epoch", BigInteger),
    Column("sequence", BigInteger),  # of batches; NULL otherwise, which the constraint below ignores
    Column("payload_hash", String(32), nullable=False),
    Column("crc", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("learner_uid", "position", name="journal_pkey"),
    # A batch is in the log once, whatever retries, races or bugs lie before it: the guarantee rests on this line.
    UniqueConstraint("learner_uid", "producer", "sequence", name="journal_batch_once"),
)

# Directives to resume are looked for before replay, without reading the batches between them.
RESUMES = text("kind = 'resume'")
Index("journal_resumes", JOURNAL.c.learner_uid, JOURNAL.c.position, sqlite_where=RESUMES, postgresql_where=RESUMES)
