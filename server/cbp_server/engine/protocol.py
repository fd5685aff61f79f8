"""The boundary itself: what the front asks of whatever executes steps."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol, TypeVar

from cbp_server.engine import messages
from cbp_server.records.learners import EngineStatus

AnswerT = TypeVar("AnswerT")


class Engine(Protocol):
    """Executes the steps of many learners; `EngineProcess` does."""

    @property
    def status(self) -> EngineStatus: ...

    def submit(self, request: messages.Request[AnswerT]) -> "asyncio.Future[AnswerT]":
        """Sends the request; requests of one learner are carried out in the order of these calls."""
        ...

    def submit_all(self, changes: "Sequence[messages.Change[object]]") -> "asyncio.Future[Mapping[int, Exception]]":
        """Sends changes of one learner, whose answers do not matter; completes when all have been carried out.

        The result says what failed, by index in `changes`.
        """
        ...

    def call(self, request: messages.Request[AnswerT]) -> Awaitable[AnswerT]:
        """The answer, awaited."""
        ...
