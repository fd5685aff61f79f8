"""What the front keeps on disk, in one hand: the database behind a thread, and checkpoint files."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from cbp_server.errors import JournalUnavailable
from cbp_server.store.catalog import Catalog
from cbp_server.store.checkpoints import CheckpointFiles
from cbp_server.store.database import DatabaseInUse, Ownership
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Journal

P = ParamSpec("P")
R = TypeVar("R")


class Guard:
    """Lets calls through to the database, but after it was away only if no other server has taken it meanwhile.

    Used by several threads.
    """

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._renewing = threading.Lock()
        self._in_doubt = False

    def call(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Raises `DatabaseInUse` if another server has it, and what `action` raises."""
        with self._renewing:
            if self._in_doubt:
                self._ownership.renew()
                self._in_doubt = False
        try:
            return action(*args, **kwargs)
        except SQLAlchemyError:
            self._in_doubt = True
            raise


@dataclass(frozen=True)
class Storage:
    """The parts of the store."""

    guard: Guard
    catalog: Catalog
    journal: Journal
    commit: GroupCommit
    files: CheckpointFiles

    async def run(self, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a method of catalog, journal or files, all of which may wait for a disk, on a thread.

        Raises:
            JournalUnavailable: the database cannot be reached, read or written.
        """
        try:
            return await asyncio.to_thread(lambda: self.guard.call(action, *args, **kwargs))
        except DatabaseInUse as error:
            raise JournalUnavailable(str(error)) from error
        except SQLAlchemyError as error:
            self.commit.end_if_fsync_failed(error)
            raise JournalUnavailable(str(getattr(error, "orig", None) or error)) from error
