"""Storage that fails on demand: while a file exists that says how."""

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from faults.sqlite_vfs import (
    SQLITE_FULL,
    SQLITE_IOERR_FSYNC,
    SQLITE_IOERR_WRITE,
    SQLITE_OK,
    SQLITE_READONLY,
    SqliteWatcher,
)

_DATABASE_STATUS = {
    "full": SQLITE_FULL,
    "read-only": SQLITE_READONLY,
    "write-error": SQLITE_IOERR_WRITE,
}


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What fails.

    Attributes:
        database: how writes of the database fail.
        database_sync: whether fsync of the database fails.
        checkpoints: the error of opening a checkpoint file for writing ("EROFS") or of syncing it ("ENOSPC", which a
            file system that allocates late finds out only then).
    """

    database: Literal["full", "read-only", "write-error"] | None = None
    database_sync: bool = False
    checkpoints: Literal["ENOSPC", "EROFS"] | None = None

    def begin(self, trigger: Path) -> None:
        temporary = trigger.with_name(f"{trigger.name}.writing")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(trigger)


class FailingStorage(SqliteWatcher):
    """In the server's processes: fails what the trigger file says."""

    def __init__(self, trigger: Path) -> None:
        self._trigger = trigger

    def writing(self, path: str) -> int:
        database = self._failures().database
        return SQLITE_OK if database is None or _is_shared_memory(path) else _DATABASE_STATUS[database]

    def syncing(self, _: str) -> int:
        return SQLITE_IOERR_FSYNC if self._failures().database_sync else SQLITE_OK

    def check_open(self, path: str, flags: int) -> None:
        """Raises OSError if the file shall not be opened like this."""
        if _is_checkpoint(path) and flags & (os.O_WRONLY | os.O_RDWR) and self._failures().checkpoints == "EROFS":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def check_sync(self, path: str) -> None:
        """Raises OSError if syncing the file shall fail."""
        if _is_checkpoint(path) and self._failures().checkpoints == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def _failures(self) -> Failures:
        try:
            return Failures(**json.loads(self._trigger.read_text()))
        except FileNotFoundError:
            return Failures()


def _is_checkpoint(path: str) -> bool:
    return "checkpoints" in Path(path).parts


def _is_shared_memory(path: str) -> bool:
    return path.endswith("-shm")
