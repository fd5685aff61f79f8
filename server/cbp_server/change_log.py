"""Every change of a learner on its way: into the journal first, then to the engine, and after a crash once more."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from cbp import Batch, LearnerSpec
from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.store.checkpoints import CHECKPOINTS_KEPT
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind, Journal

AnswerT = TypeVar("AnswerT")

#: Journal entries decoded and under way at a time while a learner is restored.
_REPLAYED_AT_ONCE = 64

log = structlog.get_logger("cbp_server.store")


@dataclass
class LearnerLog:
    """Where one learner's log stands."""

    learner_uid: str
    position: int  # of the last entry given to the journal
    checkpoints: deque[int] = field(
        default_factory=lambda: deque(maxlen=CHECKPOINTS_KEPT)
    )  # positions of those on disk


class ChangeLog:
    """Takes changes of all learners in order, and the engine through them.

    Args:
        decode_batch: the batch in an entry's payload.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        commit: GroupCommit,
        decode_batch: Callable[[bytes, LearnerSpec], Batch],
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._commit = commit
        self._decode_batch = decode_batch

    def record(
        self, learner: LearnerLog, request: Callable[[int], messages.Change[AnswerT]], **entry: Any
    ) -> "asyncio.Future[AnswerT]":
        """Writes a change to the journal, and once it is on disk hands it to the engine.

        The order of these calls is the order in the journal, and that in which the engine applies the changes.

        Args:
            request: what the engine shall do, given the entry's position; called when the entry is on disk.
            entry: fields of the journal's entry, but for learner and position.

        Returns:
            The engine's answer; fails with `JournalUnavailable` if the entry could not be written.
        """
        position = learner.position = learner.position + 1
        applied: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        written = self._commit.add(Entry(learner_uid=learner.learner_uid, position=position, **entry))
        written.add_done_callback(partial(self._written, learner, position, request, applied))
        return applied

    def _written(
        self,
        learner: LearnerLog,
        position: int,
        request: Callable[[int], messages.Change[AnswerT]],
        applied: "asyncio.Future[AnswerT]",
        written: "asyncio.Future[None]",
    ) -> None:
        error = written.exception()
        if error is not None:
            # The log goes on with the first position that failed; everything behind it fails as well.
            learner.position = min(learner.position, position - 1)
            applied.set_exception(error)
        else:
            _pass_on(self._engine.submit(request(position)), applied)

    async def replay(self, loaded: messages.LearnerReport) -> messages.LearnerReport:
        """Applies what the journal has behind the checkpoint; the learner is then the one that never stopped.

        Raises:
            JournalDamaged: an entry is missing or damaged.
        """
        learner_id, started = loaded.identity.learner_id, time.monotonic()
        entries = self._journal.read(loaded.identity.uid, loaded.journal_position)
        replayed = 0
        while chunk := await asyncio.to_thread(lambda: list(islice(entries, _REPLAYED_AT_ONCE))):
            changes = [self._change(learner_id, entry, loaded.spec) for entry in chunk]
            await asyncio.gather(*(self._engine.submit(change) for change in changes))
            replayed += len(chunk)
        if not replayed:
            return loaded
        seconds = round(time.monotonic() - started, 3)
        log.info("journal replayed", learner=learner_id, entries=replayed, seconds=seconds)
        return await self._engine.call(messages.Checkpoint(learner_id))

    def _change(self, learner_id: str, entry: Entry, spec: LearnerSpec) -> messages.Change[Any]:
        producer, epoch = entry.producer or "", entry.epoch or 0
        match entry.kind:
            case EntryKind.BATCH:
                batch = self._decode_batch(entry.payload, spec)
                sequence = entry.sequence or 0
                return messages.Train(
                    learner_id, entry.position, producer, epoch, sequence, entry.payload_hash, batch, False
                )
            case EntryKind.UPDATE:
                plain = json.loads(entry.payload)
                revised = LearnerSpec.parse(plain["spec"])
                return messages.Update(learner_id, entry.position, plain["update_time"], revised)
            case EntryKind.OPEN:
                return messages.OpenProducer(learner_id, entry.position, producer, epoch)

    async def truncate(self, learner: LearnerLog) -> None:
        """Removes what every kept checkpoint contains; a failure only leaves more behind."""
        if len(learner.checkpoints) == CHECKPOINTS_KEPT:
            await self._tidy(partial(self._journal.truncate, learner.learner_uid, learner.checkpoints[0]))

    async def forget(self, learner_uid: str) -> None:
        """Removes the entries of a learner that is gone; a failure only leaves them behind."""
        await self._tidy(partial(self._journal.forget, learner_uid))

    async def forget_others(self, present: Collection[str]) -> None:
        """Removes what learners left behind whose deletion was cut short."""

        def forget() -> None:
            for learner_uid in self._journal.learners().difference(present):
                self._journal.forget(learner_uid)

        await self._tidy(forget)

    async def _tidy(self, action: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(action)
        except SQLAlchemyError as error:
            log.warning("journal not tidied", error=str(error))


def _pass_on(source: "asyncio.Future[AnswerT]", target: "asyncio.Future[AnswerT]") -> None:
    """Completes `target` as `source` completes."""

    def copy(done: "asyncio.Future[AnswerT]") -> None:
        if target.done():
            return
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(copy)
