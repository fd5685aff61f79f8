"""What the front keeps on disk, in one hand: the database behind a thread, and checkpoint files."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from cbp_server.errors import JournalUnavailable
from cbp_server.store.catalog import Catalog
from cbp_server.store.checkpoints import CheckpointFiles
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Journal

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Storage:
    """The parts of the store."""

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
            return await asyncio.to_thread(action, *args, **kwargs)
        except SQLAlchemyError as error:
            self.commit.end_if_fsync_failed(error)
            raise JournalUnavailable(str(getattr(error, "orig", None) or error)) from error
