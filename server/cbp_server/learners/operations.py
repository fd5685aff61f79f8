"""What is asked for is carried through, whoever waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from cbp_server.errors import ServerDraining

AnswerT = TypeVar("AnswerT")


class Operations:
    """Operations on learners that are under way.

    Attributes:
        draining: whether the server is on its way down, and begins none any more.
    """

    def __init__(self) -> None:
        self.draining = False
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def under_way(self) -> list[asyncio.Future[Any]]:
        return list(self._under_way)

    async def complete(self, operation: Coroutine[Any, Any, AnswerT]) -> AnswerT:
        """Carries an operation through even if its caller goes away half-way: engine and records must agree.

        Raises:
            ServerDraining: the operation was not begun.
        """
        if self.draining:
            operation.close()
            raise ServerDraining
        task = asyncio.create_task(operation)
        self._under_way.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody does any more, it is nobody's
