"""Whoever waits for a batch, on the event loop or on a thread, early or late, hears what became of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cbp_client import (
    AsyncClient,
    AsyncLearner,
    AsyncTrainingStream,
    BatchRejected,
    BatchResult,
    DeadlineExceeded,
    StreamClosed,
    Ticket,
)
from tests.client.scripted_server import ScriptedServer

BATCH = [[0.0, 0.0]], [1]
Wait = Callable[[Ticket], Awaitable[BatchResult]]
TIMEOUT = 30.0


async def on_the_loop(ticket: Ticket) -> BatchResult:
    return await ticket


async def on_a_thread(ticket: Ticket) -> BatchResult:
    return await asyncio.to_thread(ticket.result, TIMEOUT)


@pytest.fixture(params=[on_the_loop, on_a_thread])
def wait(request: pytest.FixtureRequest) -> Wait:
    found: Wait = request.param
    return found


@pytest.fixture
async def stream(scripted: ScriptedServer) -> AsyncIterator[AsyncTrainingStream]:
    """Its batches stay unanswered until `scripted.answering` is set."""
    async with AsyncClient(scripted.target) as client:
        learner: AsyncLearner = await client.get_learner("clicks")
        async with learner.stream("web") as stream:
            scripted.answering.clear()
            yield stream
            scripted.answering.set()


async def begun(wait: Wait, ticket: Ticket) -> asyncio.Task[BatchResult]:
    """The wait, under way before the batch has its result."""
    waiting = asyncio.ensure_future(wait(ticket))
    await asyncio.sleep(0.02)
    assert not ticket.done()
    assert not waiting.done()
    return waiting


async def test_the_result_of_an_applied_batch(
    scripted: ScriptedServer, stream: AsyncTrainingStream, wait: Wait
) -> None:
    ticket = await stream.send(*BATCH)
    early = [await begun(wait, ticket) for _ in range(2)]

    scripted.answering.set()
    results = [await waiting for waiting in early]

    assert ticket.done()
    assert [*results, await wait(ticket), ticket.result(0)] == [results[0]] * 4
    assert results[0].number == 1


async def test_the_rejection_of_a_batch(scripted: ScriptedServer, stream: AsyncTrainingStream, wait: Wait) -> None:
    scripted.rejects = lambda _: True
    ticket = await stream.send(*BATCH)
    early = await begun(wait, ticket)

    scripted.answering.set()
    for waiting in (early, wait(ticket)):
        with pytest.raises(BatchRejected):
            await waiting
    assert ticket.done()
    await stream.flush()  # does not raise again what was heard from the ticket


async def test_the_end_of_a_stream(stream: AsyncTrainingStream, wait: Wait) -> None:
    ticket = await stream.send(*BATCH)
    early = await begun(wait, ticket)

    await stream.abort()
    for waiting in (early, wait(ticket)):
        with pytest.raises(StreamClosed):
            await waiting
    assert ticket.done()


async def test_a_ticket_asked_for_the_first_time_when_all_is_over(
    scripted: ScriptedServer, stream: AsyncTrainingStream, wait: Wait
) -> None:
    applied, given_up = [await stream.send(*BATCH) for _ in range(2)]
    scripted.applying = False
    scripted.answering.set()
    await scripted.wait_until(lambda: len(scripted.producer().accepted) == 2)
    scripted.apply(1)
    await scripted.wait_until(applied.done)
    await stream.abort()

    assert (await wait(applied)).number == 1
    with pytest.raises(StreamClosed):
        await wait(given_up)


async def test_one_who_gives_up_waiting_takes_nothing_from_the_others(
    scripted: ScriptedServer, stream: AsyncTrainingStream, wait: Wait
) -> None:
    ticket = await stream.send(*BATCH)
    staying = await begun(wait, ticket)
    leaving = await begun(on_the_loop, ticket)
    leaving.cancel()
    with pytest.raises(DeadlineExceeded, match=r"batch 1 is not applied after 0.01 s"):
        await asyncio.to_thread(ticket.result, 0.01)

    scripted.answering.set()
    assert (await staying).number == 1
    assert leaving.cancelled()


async def test_threads_that_ask_just_when_results_come(scripted: ScriptedServer, stream: AsyncTrainingStream) -> None:
    scripted.answering.set()
    count = 300
    tickets = [await stream.send(*BATCH) for _ in range(count)]

    def results() -> list[int]:
        return [ticket.result(TIMEOUT).number for ticket in tickets]

    heard = await asyncio.gather(*(asyncio.to_thread(results) for _ in range(3)))

    assert heard == [list(range(1, count + 1))] * 3
