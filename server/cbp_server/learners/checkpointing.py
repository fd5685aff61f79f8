"""When a learner is saved, and which checkpoints and journal entries are kept."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from cbp import CbpError
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.errors import NotInEngine
from cbp_server.learners.hosted import Hosted, Unsaved, checkpoint_record, stored_checkpoint
from cbp_server.learners.registry import Registry
from cbp_server.store.catalog import StoredCheckpoint
from cbp_server.store.storage import Storage

#: Checkpoints under way at a time, each with a copy of its learner's state.
_AT_ONCE = 4

log = structlog.get_logger("cbp_server.learners.checkpointing")


class CheckpointObserver(Protocol):
    """Counts checkpoints, for the metrics."""

    def checkpoint_written(self, seconds: float, size_bytes: int) -> None: ...
    def checkpoint_failed(self) -> None: ...


@dataclass(frozen=True)
class CheckpointPolicy:
    """A learner is saved when any of these has passed since its first change behind the newest checkpoint.

    Attributes:
        seconds: always finite, so that every change is saved some time.
        steps: 0 for any number.
        journal_bytes: 0 for any number.
        kept: checkpoints of each learner that are kept, besides pinned ones.
    """

    seconds: float
    steps: int
    journal_bytes: int
    kept: int

    def is_due(self, unsaved: Unsaved, now: float) -> bool:
        return bool(unsaved.changes) and (
            now - unsaved.since >= self.seconds
            or 0 < self.steps <= unsaved.steps
            or 0 < self.journal_bytes <= unsaved.journal_bytes
        )


class Checkpointer:
    """Saves learners while they go on."""

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        registry: Registry,
        policy: CheckpointPolicy,
        observer: CheckpointObserver,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._registry = registry
        self._policy = policy
        self._observer = observer
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._under_way: dict[Hosted, asyncio.Task[bool]] = {}

    def note_change(self, hosted: Hosted, *, steps: int = 0, journal_bytes: int = 0) -> None:
        """The learner has changed; saves it if that is due."""
        unsaved, now = hosted.unsaved, time.monotonic()
        if not unsaved.changes:
            unsaved.since = now
        unsaved.changes += 1
        unsaved.steps += steps
        unsaved.journal_bytes += journal_bytes
        self._consider(hosted, now)

    def save_due(self, learners: Iterable[Hosted]) -> None:
        """Begins to save those that are due by now."""
        now = time.monotonic()
        for hosted in learners:
            self._consider(hosted, now)

    def _consider(self, hosted: Hosted, now: float) -> None:
        if hosted in self._under_way or hosted.saving.locked():
            return
        if hosted.in_engine and self._policy.is_due(hosted.unsaved, now):
            task = self._under_way[hosted] = asyncio.create_task(self.try_save(hosted))
            task.add_done_callback(lambda _: self._under_way.pop(hosted))

    async def save_all(self, learners: Iterable[Hosted]) -> int:
        """Saves every learner that has changed; the number of those that could not be saved."""
        await asyncio.gather(*self._under_way.values())  # what they do not manage is unsaved again
        saves = (self.try_save(hosted) for hosted in learners if hosted.unsaved.changes and hosted.in_engine)
        return (await asyncio.gather(*saves)).count(False)

    async def try_save(self, hosted: Hosted) -> bool:
        """Saves the learner if it has changed; whether everything of it is saved. A failure is logged and counted."""
        try:
            if hosted.unsaved.changes:
                await self.save(hosted, only_changed=True)
        except NotInEngine:
            return True  # what it is has to be found out anew anyway
        except CbpError as error:
            self._observer.checkpoint_failed()
            log.error("checkpoint failed", learner=hosted.learner_id, error=str(error))
            return False
        except Exception:
            self._observer.checkpoint_failed()
            log.exception("checkpoint failed", learner=hosted.learner_id)
            return False
        return True

    async def save(
        self, hosted: Hosted, *, pinned: bool = False, only_changed: bool = False
    ) -> StoredCheckpoint | None:
        """Writes a checkpoint and lets go of what it makes superfluous.

        Args:
            pinned: keep it until it is deleted.
            only_changed: nothing to do if another call has saved the learner meanwhile; None then.

        Raises:
            CheckpointFailed: it could not be written.
            ServiceError: learner, engine or database cannot be used now.
        """
        async with hosted.saving, self._at_once:
            before, hosted.unsaved = hosted.unsaved, Unsaved()
            if only_changed and not before.changes:
                return None
            try:
                number = await self.next_number(hosted)
                report = await self._engine.call(messages.Checkpoint(hosted.uid, number, hosted.uid))
                checkpoint = stored_checkpoint(hosted.uid, number, report, pinned=pinned)
                await self._storage.run(self._storage.catalog.add_checkpoint, checkpoint)
            except BaseException:
                hosted.unsaved = before.followed_by(hosted.unsaved)
                raise
            self._observer.checkpoint_written(report.seconds, report.size_bytes)
            self.note_saved(hosted, checkpoint, report)
            await self._let_go(hosted)
            return checkpoint

    async def next_number(self, hosted: Hosted) -> int:
        """Of a new checkpoint. The catalog says it: a commit that was not answered may have added one."""
        rows = await self._storage.run(self._storage.catalog.checkpoints, hosted.uid)
        return max(hosted.checkpoint_number, rows[0].number if rows else 0) + 1

    def note_saved(
        self, hosted: Hosted, checkpoint: StoredCheckpoint, report: messages.CheckpointReport | None = None
    ) -> None:
        """The catalog has a new checkpoint of the learner."""
        hosted.checkpoint_number, hosted.saved_position = checkpoint.number, checkpoint.position
        hosted.record.checkpoint = checkpoint_record(checkpoint)
        if report is not None:
            learner = report.learner
            if learner.progress.step >= hosted.record.progress.step:
                hosted.record.progress = learner.progress
            if not hosted.log.journals_batches:
                for name, position in learner.positions.items():
                    _note_durable(hosted, name, position)
        self._registry.touch(hosted)

    async def _let_go(self, hosted: Hosted) -> None:
        """Removes checkpoints beyond those kept, and entries that all of these contain; a failure leaves more."""
        catalog, run = self._storage.catalog, self._storage.run
        try:
            unpinned = [row for row in await run(catalog.checkpoints, hosted.uid) if not row.pinned]
            # One that could not be read is nothing to fall back to; now that there is a newer one, it may go.
            whole = [row for row in unpinned if row.number not in hosted.damaged]
            kept = whole[: self._policy.kept]
            for row in unpinned:
                if row not in kept:
                    await run(catalog.remove_checkpoint, hosted.uid, row.number)
                    await run(self._storage.files.delete, hosted.uid, row.number)
            hosted.damaged.clear()
            if len(kept) == self._policy.kept:
                await run(self._storage.journal.truncate, hosted.uid, kept[-1].position)
        except (CbpError, OSError) as error:
            log.warning("old checkpoints not removed", learner=hosted.learner_id, error=str(error))


def _note_durable(hosted: Hosted, producer: str, position: messages.Position) -> None:
    known = hosted.producers.get(producer)
    if known is None or known.life != position.life or position.sequence <= known.durable:
        return
    known.make_durable(position.sequence)
    hosted.record.producers[producer] = known.record
    session = hosted.sessions.get(producer)
    if session is not None:
        session.note_durable()
