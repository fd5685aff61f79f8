"""Every change of a learner on its way: into the journal first, then to the engine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cbp_server.engine import messages
from cbp_server.engine.protocol import Engine
from cbp_server.records.learners import Durability
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind

AnswerT = TypeVar("AnswerT")


@dataclass
class LearnerLog:
    """Where one learner's log stands."""

    learner_uid: str
    durability: Durability
    position: int = 0  # of the last entry given to the journal
    on_the_way: int = 0  # entries that the engine has not heard of yet

    @property
    def journals_batches(self) -> bool:
        return self.durability is not Durability.NONE


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """An entry that has no position yet."""

    kind: EntryKind
    payload: bytes = b""
    payload_hash: str = ""
    producer: str | None = None
    life: int = 0
    epoch: int | None = None
    sequence: int | None = None

    def at(self, learner_uid: str, position: int) -> Entry:
        return Entry(learner_uid=learner_uid, position=position, **vars(self))


class ChangeLog:
    """Takes changes of all learners in order, and the engine through them."""

    def __init__(self, engine: Engine, commit: GroupCommit) -> None:
        self._engine = engine
        self._commit = commit

    def record(
        self, log: LearnerLog, entry: NewEntry, request: Callable[[int], messages.Change[AnswerT]]
    ) -> "asyncio.Future[AnswerT]":
        """Writes a change to the journal, and once it is as durable as the learner wants it hands it to the engine.

        The order of these calls is the order in the journal, and that in which the engine applies the changes.

        Args:
            request: what the engine shall do, given the entry's position; called when the entry is written.

        Returns:
            The engine's answer; fails with `JournalUnavailable` if the entry could not be written, and so do all
            behind it until the log is mended.
        """
        durability = log.durability
        if entry.kind is not EntryKind.BATCH and durability is Durability.NONE:
            durability = Durability.FSYNC  # what is rare is kept
        if durability is not Durability.NONE:
            log.position += 1
        position = log.position
        if durability is Durability.NONE and not log.on_the_way and self._commit.passes(log.learner_uid):
            return self._engine.submit(request(position))
        log.on_the_way += 1
        applied: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        written = self._commit.add(entry.at(log.learner_uid, position), durability)
        written.add_done_callback(partial(self._written, log, partial(request, position), applied))
        return applied

    def _written(
        self,
        log: LearnerLog,
        request: Callable[[], messages.Change[AnswerT]],
        applied: "asyncio.Future[AnswerT]",
        written: "asyncio.Future[None]",
    ) -> None:
        log.on_the_way -= 1
        error = written.exception()
        if error is not None:
            applied.set_exception(error)
        else:
            pass_on(self._engine.submit(request()), applied)


def pass_on(source: "asyncio.Future[AnswerT]", target: "asyncio.Future[AnswerT]") -> None:
    """Completes `target` as `source` completes, if nobody has before."""

    def copy(done: "asyncio.Future[AnswerT]") -> None:
        if target.done():
            return
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(copy)
