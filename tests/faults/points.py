"""The points at which a server can be killed, and where in its code they lie.

Points of a method are `begin` and `done`, before and after it; of a transaction also `commit`, when all is written and
nothing committed; of a checkpoint file also `mkdir`, when a directory has been made for it, and `rename`, when it is
whole under its temporary name.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["front", "engine"]


@dataclass(frozen=True)
class Method:
    """A method whose calls have points, in the process of that role; a function of the module if it has no owner."""

    role: Role
    module: str
    owner: str
    name: str
    moments: tuple[str, ...]


_TRANSACTION = ("begin", "commit", "done")

METHODS = {
    "journal.append": Method("front", "cbp_server.store.journal", "Journal", "append", _TRANSACTION),
    "journal.truncate": Method("front", "cbp_server.store.journal", "Journal", "truncate", _TRANSACTION),
    "journal.read": Method("front", "cbp_server.store.journal", "Journal", "read", ("entry",)),
    "catalog.add": Method("front", "cbp_server.store.catalog", "Catalog", "add", _TRANSACTION),
    "catalog.add_checkpoint": Method("front", "cbp_server.store.catalog", "Catalog", "add_checkpoint", _TRANSACTION),
    "catalog.remove_checkpoint": Method(
        "front", "cbp_server.store.catalog", "Catalog", "remove_checkpoint", _TRANSACTION
    ),
    "catalog.restore": Method("front", "cbp_server.store.catalog", "Catalog", "restore", _TRANSACTION),
    "checkpoint.write": Method(
        "engine", "cbp_server.store.checkpoints", "CheckpointFiles", "write", ("begin", "mkdir", "rename", "done")
    ),
    "training": Method("engine", "cbp_server.engine.training", "", "run_slices", ("step", "done")),
    "training.row": Method("engine", "cbp_server.engine.training", "", "run_row", ("step", "done")),
}

#: Within SQLite: before a write and a sync of its files, and after a sync.
SQLITE_POINTS = ("sqlite.write", "sqlite.sync", "sqlite.synced")

POINTS = tuple(f"{call}/{moment}" for call, method in METHODS.items() for moment in method.moments) + SQLITE_POINTS
