"""Bounds the memory of batches that wait, over all streams: credits count messages, and messages differ in size."""

from cbp_server.loop.broadcast import Broadcast


class ByteBudget:
    """Bytes that may be taken before whoever brings more has to wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._freed = Broadcast()

    def take(self, size: int) -> None:
        """Never refuses: the last one in may go beyond the limit, so that no message is too large to ever fit."""
        self._taken += size

    def give_back(self, size: int) -> None:
        self._taken -= size
        self._freed.announce()

    async def wait_for_room(self) -> None:
        """Returns when less than the limit is taken."""
        while self._taken >= self._limit:
            await self._freed.wait()
