"""What shall go wrong in a server: written by the harness, read in the server's processes."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

#: The environment variable that carries a plan. The server refuses unknown variables that begin with CBP_.
VARIABLE = "FAULT_PLAN"

Victims = Literal["all", "engine"]
#: Syncs that a disk may pretend to have made: SQLite's, and those of os.fsync for files and for directories.
Lie = Literal["sqlite", "files", "directories"]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL at a point of the program.

    Attributes:
        point: a name of `points.POINTS`.
        nth: how often the process must have come to the point, counted from 1.
        victims: front and engine, or the engine only.
        marker: made just before; a kill whose marker exists has happened, and does not happen again.
    """

    point: str
    nth: int
    victims: Victims
    marker: Path

    @property
    def fired(self) -> bool:
        return self.marker.exists()


@dataclass(frozen=True, kw_only=True)
class SyncedDisk:
    """Keeps what is durable of the tree below `root` in `shadow`, on the same file system."""

    root: Path
    shadow: Path
    lies: tuple[Lie, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """All faults of one life of a server.

    Attributes:
        failures: a file that says which storage operations fail while it exists; see `storage.Failures`.
    """

    kill: Kill | None = None
    disk: SyncedDisk | None = None
    failures: Path | None = None

    def environment(self) -> dict[str, str]:
        """The variable that carries the plan to the server."""
        return {VARIABLE: json.dumps(asdict(self), default=str)}


def plan_of_this_process() -> FaultPlan | None:
    """The plan in the environment, if there is one."""
    if VARIABLE not in os.environ:
        return None
    plain = json.loads(os.environ[VARIABLE])
    kill, disk, failures = plain["kill"], plain["disk"], plain["failures"]
    return FaultPlan(
        kill=Kill(**kill | {"marker": Path(kill["marker"])}) if kill else None,
        disk=SyncedDisk(root=Path(disk["root"]), shadow=Path(disk["shadow"]), lies=tuple(disk["lies"]))
        if disk
        else None,
        failures=Path(failures) if failures else None,
    )
