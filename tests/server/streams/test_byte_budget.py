"""The bound on waiting batches: whoever comes when it is taken waits until enough has been given back."""

import asyncio

from cbp_server.streams.byte_budget import ByteBudget


async def test_whoever_brings_more_waits_until_there_is_room():
    budget = ByteBudget(100)
    budget.take(99)
    await budget.wait_for_room()
    budget.take(50)
    waiting = asyncio.create_task(budget.wait_for_room())
    budget.give_back(20)
    await asyncio.sleep(0)
    assert not waiting.done()
    budget.give_back(50)
    await asyncio.wait_for(waiting, 5)


def test_a_server_with_little_room_still_learns_everything(start_server, connect, examples, learner_id):
    wire = connect(start_server("--max-queued-bytes", str(2**20)).grpc_target)
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    for sequence in range(1, 31):
        stream.send_batch(sequence, *examples(2000))
    assert stream.results(30)[-1].step == 60_000
