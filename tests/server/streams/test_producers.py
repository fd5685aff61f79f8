"""The producer protocol against a model: every batch is accepted once, in order, by the newest stream only."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cbp_server.engine.messages import Position
from cbp_server.errors import ProducerFenced, SequenceGap, SequenceReused
from cbp_server.streams.producers import Producer


def test_a_newcomer_is_above_all_that_were_forgotten():
    producer = Producer.newcomer("web", epoch_floor=7)
    assert (producer.open(), producer.life, producer.accepted) == (8, 7, 0)
    assert (Producer.newcomer("web", 0).open(), Producer.newcomer("web", 0).life) == (1, 0)


def test_a_producer_is_settled_when_its_client_has_ended_and_all_is_durable():
    producer = Producer("web")
    producer.open()
    assert not producer.is_settled
    applied: asyncio.Future = asyncio.Future(loop=(loop := asyncio.new_event_loop()))
    producer.accept(1, "x", applied)
    producer.left(finished=True)
    assert not producer.is_settled  # the batch is under way
    producer.settle(1)
    assert not producer.is_settled  # and now in memory alone, as without a journal
    producer.make_durable(1)
    assert producer.is_settled
    again = Producer("web", Position(producer.epoch, 1))
    assert not again.is_settled
    again.has_been_away_like(producer)
    assert again.is_settled
    assert again.left_at == producer.left_at
    producer.left(finished=False)
    assert not producer.is_settled  # cut off, it may come back
    producer.left(finished=True)
    producer.open()
    assert not producer.is_settled
    loop.close()


class ProducerMachine(RuleBasedStateMachine):
    """The model is the list of payloads accepted so far and how many of them are applied."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.producer = Producer("web")
        self.accepted: list[str] = []
        self.applied = 0
        self.epochs = [self.producer.open()]

    def teardown(self) -> None:
        self.loop.close()

    @rule(payload=st.sampled_from("xyz"))
    def send_next(self, payload):
        sequence = len(self.accepted) + 1
        assert not self.producer.is_repeat(sequence, payload)
        self.producer.accept(sequence, payload, self.loop.create_future())
        self.accepted.append(payload)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def repeat(self, data):
        sequence = data.draw(st.integers(1, len(self.accepted)))
        assert self.producer.is_repeat(sequence, self.accepted[sequence - 1])
        with pytest.raises(SequenceReused):
            self.producer.is_repeat(sequence, "another")

    @rule(distance=st.integers(2, 9))
    def leave_a_gap(self, distance):
        with pytest.raises(SequenceGap) as caught:
            self.producer.is_repeat(len(self.accepted) + distance, "x")
        assert caught.value.metadata == {"expected_sequence": str(len(self.accepted) + 1)}

    @rule()
    def send_below_one(self):
        with pytest.raises(SequenceGap):
            self.producer.is_repeat(0, "x")

    @precondition(lambda self: self.applied < len(self.accepted))
    @rule()
    def apply_one(self):
        self.applied += 1
        self.producer.settle(self.applied)

    @precondition(lambda self: self.applied < len(self.accepted))
    @rule()
    def engine_refuses(self):
        """Everything not applied is retracted, and the sequences can be used again."""
        self.producer.retract(self.applied + 1)
        del self.accepted[self.applied :]

    @rule()
    def reopen(self):
        self.epochs.append(self.producer.open())

    @rule()
    def reload_from_checkpoint(self):
        """What is applied survives with its hashes; what was only accepted does not."""
        hashes = tuple((sequence + 1, payload) for sequence, payload in enumerate(self.accepted[: self.applied]))
        self.producer = Producer("web", Position(self.producer.epoch, self.applied, hashes))
        del self.accepted[self.applied :]

    @invariant()
    def the_newest_stream_alone_may_write(self):
        self.producer.check_epoch(self.epochs[-1])
        for epoch in self.epochs[:-1]:
            with pytest.raises(ProducerFenced):
                self.producer.check_epoch(epoch)

    @invariant()
    def positions_agree(self):
        assert (self.producer.accepted, self.producer.applied) == (len(self.accepted), self.applied)
        assert self.producer.durable <= self.producer.applied
        assert len(list(self.producer.under_way)) == len(self.accepted) - self.applied


TestProducer = ProducerMachine.TestCase
TestProducer.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_hashes_are_kept_for_a_bounded_number_of_sequences():
    producer = Producer("web", Position(1, 0))
    loop = asyncio.new_event_loop()
    for sequence in range(1, 400):
        producer.accept(sequence, "x", loop.create_future())
    loop.close()
    assert producer.is_repeat(1, "long forgotten")
    with pytest.raises(SequenceReused):
        producer.is_repeat(399, "another")
