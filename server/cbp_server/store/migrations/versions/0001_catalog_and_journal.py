"""Learners, checkpoints and journal."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    live = sa.text("delete_time IS NULL")
    time = sa.DateTime(timezone=True)
    op.create_table(
        "learners",
        sa.Column("uid", sa.String(32), nullable=False),
        sa.Column("learner_id", sa.String(128), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("engine", sa.String(16), nullable=False),
        sa.Column("durability", sa.String(8), nullable=False),
        sa.Column("born", sa.Boolean, nullable=False),
        sa.Column("create_time", time, nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("request_digest", sa.String(128), nullable=False),
        sa.Column("delete_time", time),
        sa.Column("purge_time", time),
        sa.Column("quarantine", sa.Text),
        sa.PrimaryKeyConstraint("uid", name="learners_pkey"),
    )
    op.create_index(
        "learners_live_name", "learners", ["learner_id"], unique=True, sqlite_where=live, postgresql_where=live
    )
    op.create_table(
        "checkpoints",
        sa.Column("learner_uid", sa.String(32), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("time", time, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("learner_uid", "number", name="checkpoints_pkey"),
        sa.ForeignKeyConstraint(["learner_uid"], ["learners.uid"], name="checkpoints_learner_uid_fkey"),
    )
    op.create_table(
        "journal",
        sa.Column("learner_uid", sa.String(32), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("producer", sa.String(128)),
        sa.Column("epoch", sa.BigInteger),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("payload_hash", sa.String(32), nullable=False),
        sa.Column("crc", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("learner_uid", "position", name="journal_pkey"),
        sa.UniqueConstraint("learner_uid", "producer", "sequence", name="journal_batch_once"),
    )
    resumes = sa.text("kind = 'resume'")
    op.create_index(
        "journal_resumes", "journal", ["learner_uid", "position"], sqlite_where=resumes, postgresql_where=resumes
    )
