"""The tables of the store, the same on SQLite and PostgreSQL."""

from sqlalchemy import (
    BigInteger,
    Column,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
)

METADATA = MetaData()

#: One ordered log per learner of everything that changes it. Positions run 1, 2, 3, … without gaps.
JOURNAL = Table(
    "journal",
    METADATA,
    Column("learner_uid", String(32), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("producer", String(128)),  # of batches; NULL otherwise, which the constraint below ignores
    Column("epoch", BigInteger),
    Column("sequence", BigInteger),
    Column("payload_hash", String(32), nullable=False),
    Column("crc", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    PrimaryKeyConstraint("learner_uid", "position"),
    # A batch is in the log once, whatever retries, races or bugs lie before it: the guarantee rests on this line.
    UniqueConstraint("learner_uid", "producer", "sequence", name="journal_batch_once"),
)
