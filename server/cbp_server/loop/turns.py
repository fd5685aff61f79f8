"""Long work on the event loop, divided."""

import asyncio
import time

_TURN_SECONDS = 0.001


class Turns:
    """Divides long work on the event loop, so that nobody waits for the whole of it: after each millisecond, or another
    number of seconds, the others have their turn.

        if turns.over:
            await turns.give_way()
    """

    def __init__(self, seconds: float = _TURN_SECONDS) -> None:
        self._seconds = seconds
        self._end = time.perf_counter() + seconds

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self._end

    async def give_way(self) -> None:
        """Returns when everybody who was ready has had a turn."""
        await asyncio.sleep(0)
        self._end = time.perf_counter() + self._seconds
