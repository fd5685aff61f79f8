"""Changes reach the engine in the order in which they were recorded, whatever each has to wait for."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from cbp_server.engine import messages
from cbp_server.records.learners import Durability
from cbp_server.store.group_commit import GroupCommit
from cbp_server.store.journal import Entry, EntryKind
from cbp_server.streams.change_log import ChangeLog, LearnerLog, NewEntry


class HeardEngine:
    """Carries out nothing, and notes for whom it was asked to."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(self, request: messages.Change[Any]) -> "asyncio.Future[Any]":
        self.asked.append(request.learner)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.set_result(None)
        return answer


async def test_a_batch_that_is_not_written_waits_for_what_is_written_before_it_and_for_nothing_else() -> None:
    may_write = threading.Event()

    def append(_entries: Sequence[Entry], _sync: bool) -> None:
        assert may_write.wait(10)

    engine, log = HeardEngine(), LearnerLog("uid", Durability.NONE)
    commit = GroupCommit(append, lambda _reason: None)
    changes = ChangeLog(engine, commit)  # type: ignore[arg-type]  # half an engine is enough

    def record(kind: EntryKind, name: str) -> "asyncio.Future[None]":
        return changes.record(log, NewEntry(kind=kind), lambda position: messages.Pass(name, position))

    record(EntryKind.BATCH, "first")
    assert engine.asked == ["first"]
    update, behind = record(EntryKind.UPDATE, "update"), record(EntryKind.BATCH, "behind")
    assert engine.asked == ["first"]
    may_write.set()
    await asyncio.gather(update, behind)
    assert engine.asked == ["first", "update", "behind"]
    record(EntryKind.BATCH, "last")
    assert engine.asked == ["first", "update", "behind", "last"]
    await commit.close()
