"""Another client, in a process of its own, that keeps a learner busy whenever it is told to."""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event

from workloads import Net

from cbp_client import AsyncClient


class Feeder:
    """Streams to one learner as fast as it can while it is on."""

    def __init__(self, feeding: Event) -> None:
        self._feeding = feeding

    def turn_on(self) -> None:
        self._feeding.set()

    def turn_off(self) -> None:
        self._feeding.clear()


@contextmanager
def feeder(target: str, learner_id: str, net: Net, message_size: int) -> Iterator[Feeder]:
    """A feeder that is off, for a learner of that net."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    feeding, ended = context.Event(), context.Event()
    process = context.Process(target=_run, args=(target, learner_id, net, message_size, feeding, ended))
    process.start()
    try:
        yield Feeder(feeding)
    finally:
        feeding.clear()
        ended.set()
        process.join()


def _run(target: str, learner_id: str, net: Net, message_size: int, feeding: Event, ended: Event) -> None:
    asyncio.run(_feed(target, learner_id, net, message_size, feeding, ended))


async def _feed(target: str, learner_id: str, net: Net, message_size: int, feeding: Event, ended: Event) -> None:
    messages = net.make_messages(10, message_size)
    async with AsyncClient(target) as client:
        learner = await client.get_learner(learner_id)
        while not ended.is_set():
            if not feeding.is_set():
                await asyncio.sleep(0.01)
                continue
            async with learner.stream("feeder") as stream:
                while feeding.is_set():
                    for message in messages:
                        await stream.send(*message)
