"""How the tables came to be, step by step and forwards only (Alembic). `open_database` runs what a database lacks."""
