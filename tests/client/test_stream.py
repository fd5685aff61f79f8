"""A training stream against a server that restarts, forgets, rejects and withholds, on a real port."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from cbp_client import (
    AlreadyExists,
    AsyncClient,
    AsyncLearner,
    AsyncTrainingStream,
    BatchesLost,
    BatchRejected,
    BatchResult,
    DeadlineExceeded,
    Fenced,
    FieldViolation,
    InvalidArgument,
    LearnerQuarantined,
    LearnerReplaced,
    MessageTooLarge,
    NotFound,
    RejectedBatch,
    StreamClosed,
    Unavailable,
)
from tests.client.scripted_server import ScriptedServer, error

Arrays = tuple[list[list[float]], list[int]]


@pytest.fixture
async def learner(scripted: ScriptedServer) -> AsyncIterator[AsyncLearner]:
    async with AsyncClient(scripted.target) as client:
        yield await client.get_learner("clicks")


def batch(payload: float, examples: int = 1) -> Arrays:
    return [[payload, 0.0]] * examples, [1] * examples


async def test_every_batch_is_applied_in_order_and_its_result_comes_back(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    heard: list[BatchResult] = []
    async with learner.stream("web", on_result=heard.append) as stream:
        tickets = [await stream.send(*batch(payload, examples=2), task="day") for payload in range(10)]
        third = await tickets[2]

    assert scripted.producer().applied == list(range(10))
    assert third == BatchResult(
        number=3,
        sequence=3,
        task="day",
        step=3,
        steps=2,
        examples=2,
        pending_examples=0,
        loss=2.0,
        accuracy=0.5,
        outputs=None,
    )
    assert [result.number for result in heard] == list(range(1, 11))
    assert [ticket.result() for ticket in tickets] == heard
    assert stream.summary.batches == 10
    assert stream.summary.examples == 20
    assert stream.summary.loss == pytest.approx(4.5)
    assert stream.summary.accuracy == pytest.approx(0.5)
    assert stream.summary.reconnections == 0


async def test_an_acknowledgement_may_be_ahead_of_the_results(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.applied_ahead = 2
    async with learner.stream("web") as stream:
        tickets = [await stream.send(*batch(payload)) for payload in range(8)]
        results = [await ticket for ticket in tickets]

    assert [result.loss for result in results] == list(range(8))


async def test_outputs_come_back_if_asked_for(learner: AsyncLearner) -> None:
    async with learner.stream("web", return_outputs=True) as stream:
        result = await (await stream.send(*batch(7)))

    assert result.outputs is not None
    assert result.outputs.dtype == np.float32
    np.testing.assert_array_equal(result.outputs, [[7, 0]])


async def test_a_second_stream_goes_on_where_the_first_ended(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    for payload in (1, 2):
        async with learner.stream("web") as stream:
            assert stream.position.applied_sequence == payload - 1
            await stream.send(*batch(payload))

    assert scripted.received == [(1, 1), (2, 2)]


async def test_a_restart_in_the_middle_loses_and_repeats_nothing(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        for payload in range(5):
            await stream.send(*batch(payload))
        await stream.flush()
        scripted.answering.clear()
        for payload in range(5, 12):
            await stream.send(*batch(payload))
        await scripted.wait_for_batches(8)
        await scripted.stop()
        scripted.answering.set()
        await scripted.start()

    assert scripted.producer().applied == list(range(12))
    assert stream.summary.batches == 12
    assert stream.summary.reconnections == 1


async def test_a_draining_server_is_left_and_found_again(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web") as stream:
        for payload in range(6):
            await stream.send(*batch(payload))
            if payload == 2:
                scripted.drain()

    assert scripted.producer().applied == list(range(6))
    assert stream.summary.reconnections == 1


async def test_a_lost_acknowledgement_does_not_apply_a_batch_twice(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.lost_answers = 2
    async with learner.stream("web") as stream:
        tickets = [await stream.send(*batch(payload)) for payload in range(2)]
        await scripted.wait_until(lambda: len(scripted.producer().applied) == 2)
        scripted.drain()
        results = [await ticket for ticket in tickets]

    assert scripted.received == [(0, 1), (1, 2)]
    assert [(result.acknowledged, result.sequence, result.loss) for result in results] == [
        (False, 1, None),
        (False, 2, None),
    ]
    assert stream.summary.batches == 2


async def test_a_server_that_fell_back_to_a_checkpoint_gets_again_what_it_lost(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    heard: list[BatchResult] = []
    async with learner.stream("web", on_result=heard.append) as stream:
        for payload in range(3):
            await stream.send(*batch(payload))
        await stream.flush()
        await scripted.make_durable()
        for payload in range(3, 8):
            await stream.send(*batch(payload))
        await stream.flush()
        await scripted.crash()
        assert scripted.producer().applied == [0, 1, 2]
        await scripted.start()
        await stream.send(*batch(8))

    assert scripted.producer().applied == list(range(9))
    assert [result.number for result in heard] == list(range(1, 10)), "each batch is reported once"


async def test_a_server_that_fell_back_without_ending_the_stream_is_caught_up(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        for payload in range(4):
            await stream.send(*batch(payload))
        await stream.flush()
        del scripted.producer().applied[1:]
        await stream.send(*batch(4))

    assert scripted.producer().applied == list(range(5))


async def test_batches_let_go_before_they_were_durable_are_missed(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web", resend_bytes=0) as stream:
        for payload in range(5):
            await stream.send(*batch(payload))
        await stream.flush()
        await scripted.crash()
        await scripted.start()
        ticket = await stream.send(*batch(5))
        with pytest.raises(BatchesLost, match="5 batches are lost") as caught:
            await stream.flush()
        assert (caught.value.expected, caught.value.oldest_held, caught.value.count) == (1, 6, 5)
        with pytest.raises(BatchesLost):
            await ticket
        with pytest.raises(BatchesLost):
            await stream.send(*batch(6))
        await stream.abort()


async def test_the_resend_buffer_lets_go_of_the_oldest_first(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web", resend_bytes=100) as stream:
        for payload in range(20):
            await stream.send(*batch(payload))
        await stream.flush()
        del scripted.producer().applied[18:]  # the newest are still held
        await stream.send(*batch(20))

    assert scripted.producer().applied == list(range(21))


async def test_a_learner_created_anew_is_not_taken_for_the_old_one(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        await stream.send(*batch(0))
        await stream.flush()
        await scripted.stop()
        scripted.uid = "uid-2"
        await scripted.start()
        ticket = await stream.send(*batch(1))
        with pytest.raises(LearnerReplaced):
            await ticket
        await stream.abort()


async def test_a_newer_stream_of_the_same_producer_takes_over(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web") as old:
        await old.send(*batch(0))
        await old.flush()
        async with learner.stream("web") as new:
            ticket = await new.send(*batch(1))
            await ticket
        await scripted.wait_until(lambda: not old.connected)
        with pytest.raises(Fenced) as caught:
            await old.send(*batch(2))
        assert caught.value.reason == "PRODUCER_FENCED"
        await old.abort()


async def test_a_stream_that_is_taken_over_while_it_writes_does_not_take_back(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.credits = 1000  # with a message on its way out all the time, gRPC loses the status that ends the call

    async def send_for_ever(stream: AsyncTrainingStream) -> None:
        while True:
            await stream.send(*batch(0))

    async with learner.stream("web", max_in_flight_bytes=10_000) as old:
        sending = asyncio.create_task(send_for_ever(old))
        await scripted.wait_for_batches(20)
        async with learner.stream("web") as new:
            tickets = [await new.send(*batch(payload)) for payload in range(1, 100)]
            with pytest.raises(Fenced):
                await sending
            assert [(await ticket).loss for ticket in tickets] == list(range(1, 100))
        await old.abort()

    assert new.summary.reconnections == 0


@pytest.mark.parametrize("server_tells", [True, False])
async def test_what_another_stream_wrote_meanwhile_is_not_taken_for_ones_own(
    scripted: ScriptedServer, learner: AsyncLearner, server_tells: bool
) -> None:
    scripted.answering.clear()
    async with learner.stream("web") as stream:
        await stream.send(*batch(0))
        await scripted.wait_for_batches(1)
        await scripted.stop()
        if server_tells:
            scripted.producer().epoch, scripted.producer().stream_id = 2, "another"
        else:  # but has more than this stream ever sent
            scripted.producer().applied += [98, 99]
        scripted.answering.set()
        await scripted.start()
        with pytest.raises(Fenced) as caught:
            await stream.flush()
        assert caught.value.reason == "PRODUCER_FENCED"
        await stream.abort()


async def test_reopening_names_the_stream_its_epoch_and_its_learner(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        scripted.drain()
        await (await stream.send(*batch(0)))
    async with learner.stream("web"):
        pass

    first, second, other = scripted.opens
    assert (first.resumed_epoch, first.learner_uid) == (0, "")
    assert (second.resumed_epoch, second.learner_uid) == (1, "uid-1")
    assert (other.resumed_epoch, other.learner_uid) == (0, "")
    assert first.stream_id == second.stream_id != other.stream_id
    assert len(scripted.requests) == 1, "nothing but the fixture's GetLearner"


async def test_an_opening_whose_answer_was_lost_does_not_fence_its_own_stream(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        scripted.open_errors = [error(grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE") for _ in range(2)]
        scripted.drain()
        await (await stream.send(*batch(0)))

    assert [opening.resumed_epoch for opening in scripted.opens] == [0, 1, 1, 1]
    assert scripted.producer().applied == [0]


async def test_batches_that_the_server_has_are_not_sent_again(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.applying = False
    scripted.credits = 6
    async with learner.stream("web") as stream:
        tickets = [await stream.send(*batch(payload)) for payload in range(5)]
        await scripted.wait_until(lambda: len(scripted.producer().accepted) == 5)
        scripted.apply(1)
        scripted.drain()
        await scripted.wait_until(lambda: len(scripted.opens) == 2)
        await scripted.wait_until(lambda: stream.connected)
        assert stream.position.applied_sequence == 1
        assert stream.position.next_sequence == 6
        tickets += [await stream.send(*batch(payload)) for payload in range(5, 12)]
        await scripted.wait_for_batches(7)
        assert scripted.most_in_flight == 6, "credits are for batches beyond those that the server has"
        scripted.applying = True
        scripted.apply()
        results = [await ticket for ticket in tickets]

    assert scripted.received == [(payload, payload + 1) for payload in range(12)]
    assert [result.loss for result in results[1:]] == list(range(1, 12))
    assert scripted.most_in_flight == 6


async def test_a_stream_goes_on_behind_what_is_on_its_way_from_another(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.applying = False
    old = learner.stream("web")
    await old.open()
    for payload in range(3):
        await old.send(*batch(payload))
    await scripted.wait_until(lambda: len(scripted.producer().accepted) == 3)
    await old.abort()

    async with learner.stream("web") as stream:
        assert (stream.position.applied_sequence, stream.position.next_sequence) == (0, 4)
        await stream.flush()  # these are not its own
        ticket = await stream.send(*batch(3))
        await scripted.wait_until(lambda: len(scripted.producer().accepted) == 4)
        assert stream.position.next_sequence == 5
        scripted.apply(2)
        await scripted.wait_until(lambda: stream.position.applied_sequence == 2)
        assert not ticket.done()
        scripted.apply()
        assert (await ticket).sequence == 4

    assert scripted.received == [(payload, payload + 1) for payload in range(4)]
    assert stream.summary.batches == 1


async def test_a_server_that_lost_what_another_stream_sent_is_told_apart(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.applying = False
    old = learner.stream("web")
    await old.open()
    for payload in range(2):
        await old.send(*batch(payload))
    await scripted.wait_until(lambda: len(scripted.producer().accepted) == 2)
    await old.abort()

    async with learner.stream("web") as stream:
        await scripted.crash()
        await scripted.start()
        await stream.send(*batch(2))
        with pytest.raises(BatchesLost) as caught:
            await stream.flush()
        assert (caught.value.expected, caught.value.oldest_held) == (1, 3)
        await stream.abort()


async def test_a_quarantined_learner_ends_the_stream(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.applying = False
    facts = {"learner": "clicks", "journal_position": "17", "producer": "web", "sequence": "2"}
    quarantined = error(grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_QUARANTINED", metadata=facts)
    async with learner.stream("web") as stream:
        tickets = [await stream.send(*batch(payload)) for payload in range(3)]
        await scripted.wait_until(lambda: len(scripted.producer().accepted) == 3)
        scripted.apply(1)
        scripted.end_streams(quarantined)
        with pytest.raises(LearnerQuarantined) as caught:
            await stream.flush()
        with pytest.raises(LearnerQuarantined):
            await tickets[1]
        assert (await tickets[0]).loss == 0
        await stream.abort()
    error_found = caught.value
    assert (error_found.learner, error_found.journal_position) == ("clicks", 17)
    assert (error_found.producer, error_found.sequence) == ("web", 2)

    scripted.open_errors = [quarantined]
    with pytest.raises(LearnerQuarantined):
        await learner.stream("web").open()


async def test_rejected_batches_are_reported_once_and_the_others_move_up(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.credits = 8
    scripted.rejects = lambda payload: payload in (3, 6)
    scripted.answering.clear()
    async with learner.stream("web") as stream:
        tickets = [await stream.send(*batch(payload), task=f"task-{payload}") for payload in range(10)]
        await scripted.wait_for_batches(8)
        scripted.answering.set()
        reported: list[RejectedBatch] = []
        while not reported or stream.unapplied:
            try:
                await stream.flush()
            except BatchRejected as rejected:
                reported += rejected.batches
        await stream.flush()

    assert scripted.producer().applied == [0, 1, 2, 4, 5, 7, 8, 9]
    assert [(item.number, item.task) for item in reported] == [(4, "task-3"), (7, "task-6")]
    assert reported[0].violations == (FieldViolation("targets", "must be from 0 to 9"),)
    assert reported[0].reason == "INVALID_BATCH"
    results = [await tickets[payload] for payload in (0, 1, 2, 4, 5, 7, 8, 9)]
    assert [(result.sequence, result.acknowledged) for result in results] == [(n, True) for n in range(1, 9)]
    with pytest.raises(BatchRejected, match="batch 4 of the stream was rejected: because INVALID_BATCH"):
        await tickets[3]
    assert stream.summary.rejected == 2
    assert stream.summary.batches == 8
    assert stream.summary.reconnections == 0


async def test_send_raises_for_an_earlier_batch_and_does_not_take_the_new_one(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.rejects = lambda payload: payload == 0
    async with learner.stream("web") as stream:
        ticket = await stream.send(*batch(0))
        await scripted.wait_until(ticket.done)
        with pytest.raises(InvalidArgument, match="targets: must be from 0 to 9"):
            await stream.send(*batch(1))
        await stream.send(*batch(2))

    assert scripted.producer().applied == [2]


async def test_closing_reports_a_rejection(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.rejects = lambda payload: payload == 1
    stream = learner.stream("web")
    await stream.open()
    for payload in (0, 2, 1):
        await stream.send(*batch(payload))
    with pytest.raises(BatchRejected):
        await stream.close()

    assert scripted.producer().applied == [0, 2]


async def test_a_rejection_heard_from_its_ticket_is_not_raised_again(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.rejects = lambda payload: payload == 0
    async with learner.stream("web") as stream:
        with pytest.raises(BatchRejected):
            await (await stream.send(*batch(0)))


async def test_a_callback_can_take_the_rejections(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.rejects = lambda payload: payload % 2 == 1
    rejected: list[RejectedBatch] = []
    async with learner.stream("web", on_rejection=rejected.append) as stream:
        for payload in range(7):
            await stream.send(*batch(payload))

    assert scripted.producer().applied == [0, 2, 4, 6]
    assert [item.number for item in rejected] == [2, 4, 6]


async def test_a_rejection_survives_the_loss_of_the_connection(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.rejects = lambda payload: payload == 1
    rejected: list[RejectedBatch] = []

    def note(batch: RejectedBatch) -> None:
        rejected.append(batch)
        stopping.set()

    stopping = asyncio.Event()
    async with learner.stream("web", on_rejection=note) as stream:
        for payload in range(6):
            await stream.send(*batch(payload))
        await stopping.wait()
        await scripted.stop()
        await scripted.start()

    assert scripted.producer().applied == [0, 2, 3, 4, 5]
    assert len(rejected) == 1


async def test_a_batch_may_be_applied_once_and_then_rejected_by_a_server_that_fell_back(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    rejected: list[RejectedBatch] = []
    async with learner.stream("web", on_rejection=rejected.append) as stream:
        for payload in range(3):
            await stream.send(*batch(payload))
        await stream.flush()
        await scripted.crash()
        scripted.rejects = lambda payload: payload == 1
        await scripted.start()
        await stream.send(*batch(3))

    assert scripted.producer().applied == [0, 2, 3]
    assert [item.number for item in rejected] == [2]


async def test_a_sequence_used_by_another_batch_ends_the_stream(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        scripted.producer().applied.append(42)
        await stream.send(*batch(0))
        with pytest.raises(AlreadyExists) as caught:
            await stream.flush()
        assert caught.value.reason == "SEQUENCE_REUSED"
        await stream.abort()


async def test_no_more_batches_are_in_flight_than_the_server_granted(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.credits = 3
    async with learner.stream("web") as stream:
        for payload in range(50):
            await stream.send(*batch(payload))
            if payload == 25:
                scripted.drain()

    assert scripted.most_in_flight <= 3
    assert scripted.producer().applied == list(range(50))


async def test_sending_waits_for_room(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.answering.clear()
    async with learner.stream("web", max_in_flight_bytes=2000) as stream:
        for payload in range(2):
            await stream.send(*batch(payload, examples=50))
        third = asyncio.create_task(stream.send(*batch(2, examples=50)))
        await scripted.wait_for_batches(2)
        assert not third.done()
        assert stream.unapplied == 2
        scripted.answering.set()
        await third

    assert scripted.producer().applied == [0, 1, 2]


async def test_batches_are_sent_while_the_user_does_nothing_but_send(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        sent = 0
        while not scripted.producer().applied or stream.summary.batches == 0:
            await stream.send(*batch(sent))
            sent += 1

    assert scripted.producer().applied == list(range(sent))


async def test_one_batch_may_be_larger_than_the_bound(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web", max_in_flight_bytes=1) as stream:
        for payload in range(3):
            await stream.send(*batch(payload))

    assert scripted.most_in_flight == 1


async def test_concurrent_senders_keep_their_own_order(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web", max_in_flight_bytes=300) as stream:

        async def send_all(payloads: range) -> None:
            for payload in payloads:
                await stream.send(*batch(payload))

        await asyncio.gather(send_all(range(20)), send_all(range(100, 120)))

    applied = scripted.producer().applied
    assert [payload for payload in applied if payload < 100] == list(range(20))
    assert [payload for payload in applied if payload >= 100] == list(range(100, 120))


async def test_the_stream_fails_after_the_reconnect_timeout(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web", reconnect_timeout=0.3) as stream:
        await scripted.stop()
        ticket = await stream.send(*batch(0))
        with pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1"):
            await stream.flush()
        with pytest.raises(Unavailable):
            await ticket
        await stream.abort()


async def test_an_error_at_opening_is_raised_by_opening(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.open_errors = [error(grpc.StatusCode.NOT_FOUND, "LEARNER_NOT_FOUND", message="there is no learner")]
    with pytest.raises(NotFound, match="there is no learner") as caught:
        await learner.stream("web").open()

    assert caught.value.reason == "LEARNER_NOT_FOUND"


async def test_opening_waits_for_a_server_that_is_not_ready(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.open_errors = [error(grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE") for _ in range(2)]
    async with learner.stream("web") as stream:
        await stream.send(*batch(0))

    assert scripted.producer().applied == [0]


async def test_a_message_beyond_the_limit_is_refused_before_it_is_sent(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    async with learner.stream("web") as stream:
        with pytest.raises(MessageTooLarge, match=r"10000 examples make a message of 1600\d\d bytes"):
            await stream.send(np.zeros((10_000, 2), np.float32), np.zeros(10_000, int))

    assert scripted.received == []


async def test_large_arrays_are_cut_into_messages(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    features = np.arange(20_000, dtype=np.float32).reshape(10_000, 2)
    async with learner.stream("web") as stream:
        tickets = await stream.send_many(features, np.zeros(10_000, int), weights=np.ones(10_000), task="big")
        many = await stream.send_many(features[:10], np.zeros(10, int), examples_per_message=4)
        results = [await ticket for ticket in tickets]

    assert len(tickets) > 1
    assert sum(result.examples for result in results) == 10_000
    assert [(await ticket).examples for ticket in many] == [4, 4, 2]
    starts = scripted.producer().applied
    assert starts == [*sorted(starts[: len(tickets)]), 0.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("features", "targets", "weights", "field"),
    [
        ([[1.0, 2.0]], [1, 2], None, "targets"),
        ([[1.0, 2.0]], [1], [1.0, 2.0], "weights"),
        ([1.0, 2.0], [1, 2], None, "features"),
        ([[1.0], [2.0, 3.0]], [1, 2], None, "features"),
        ([["a"]], [1], None, "features"),
        ([[1.0]], 1, None, "targets"),
        ([[1.0]], [1], [[1.0]], "weights"),
    ],
)
async def test_what_no_learner_could_take_is_refused_at_once(
    learner: AsyncLearner, features: Any, targets: Any, weights: Any, field: str
) -> None:
    async with learner.stream("web") as stream:
        for sending in (stream.send, stream.send_many):
            with pytest.raises(InvalidArgument) as caught:
                await sending(features, targets, weights=weights)
            assert [violation.field for violation in caught.value.violations] == [field]


async def test_a_flush_that_takes_too_long_harms_nothing(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.answering.clear()
    async with learner.stream("web") as stream:
        ticket = await stream.send(*batch(0))
        with pytest.raises(DeadlineExceeded, match=r"1 batches are not applied after 0.05 s"):
            await stream.flush(timeout=0.05)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(ticket.result, timeout=0.01)
        scripted.answering.set()

    assert scripted.producer().applied == [0]


async def test_a_durable_flush_waits_for_the_checkpoint(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    async with learner.stream("web") as stream:
        await stream.send(*batch(0))
        await stream.flush()
        durable = asyncio.create_task(stream.flush(durable=True))
        with pytest.raises(DeadlineExceeded, match="not durable"):
            await stream.flush(durable=True, timeout=0.05)
        assert not durable.done()
        await scripted.make_durable()
        await durable
        assert stream.position.durable_sequence == 1


async def send_and_fail(stream: AsyncTrainingStream) -> None:
    async with stream:
        await stream.send(*batch(0))
        raise ZeroDivisionError


async def test_an_exception_in_the_body_does_not_wait_for_the_server(
    scripted: ScriptedServer, learner: AsyncLearner
) -> None:
    scripted.answering.clear()
    stream = learner.stream("web")
    with pytest.raises(ZeroDivisionError):
        await send_and_fail(stream)
    with pytest.raises(StreamClosed):
        await stream.send(*batch(1))


async def test_an_exception_in_a_callback_ends_the_stream(learner: AsyncLearner) -> None:
    def fail(_: BatchResult) -> None:
        raise ZeroDivisionError

    async with learner.stream("web", on_result=fail) as stream:
        await stream.send(*batch(0))
        with pytest.raises(ZeroDivisionError):
            await stream.flush()
        await stream.abort()


async def test_a_stream_is_closed_once_and_used_open(learner: AsyncLearner) -> None:
    stream = learner.stream("web")
    with pytest.raises(StreamClosed, match="not open"):
        await stream.send(*batch(0))
    await stream.open()
    await stream.open()
    assert stream.connected
    await stream.close()
    await stream.close()
    assert not stream.connected
    with pytest.raises(StreamClosed, match="is closed"):
        await stream.send(*batch(0))


async def test_closing_the_client_aborts_its_streams(scripted: ScriptedServer) -> None:
    client = AsyncClient(scripted.target)
    stream = (await client.get_learner("clicks")).stream("web")
    await stream.open()
    scripted.answering.clear()
    ticket = await stream.send(*batch(0))
    await client.close()
    with pytest.raises(StreamClosed):
        await ticket
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.get_learner("clicks")
