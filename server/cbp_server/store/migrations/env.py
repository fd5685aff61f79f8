"""Alembic runs this for each command; the connection comes from `database.migrate`, there is no ini file."""

from alembic import context

from cbp_server.store.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,  # SQLite can, and a migration that is cut short must leave nothing behind
)
with context.begin_transaction():
    context.run_migrations()
