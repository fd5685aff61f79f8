"""Producers can be forgotten: a name that is used again has the number of its life behind it. And entries of kind
`forget`, which the version before does not know."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":  # SQLite does not look at lengths
        op.alter_column("journal", "producer", existing_type=sa.String(128), type_=sa.String(160))
