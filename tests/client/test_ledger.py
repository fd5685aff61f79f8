"""Whatever happens between them, the server applies each batch once and in order, except those that it rejects."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbp_client import BatchesLost, Fenced, LearnerReplaced
from cbp_client.examples import EncodedBatch
from cbp_client.ledger import HeldBatch, Ledger
from cbp_proto.v1 import training_service_pb2 as pb

_ORDINARY = ["append", "send", "send", "arrive", "arrive", "apply", "apply", "answer", "answer", "save", "tell"]
_BATCH_BYTES = 10
_EVENTS = st.sampled_from([*_ORDINARY, "lose", "crash", "fall_back", "start_anew"])


class World:
    """A ledger, a server, and the wire between them; batches carry their number in `task`.

    The server accepts a batch, then applies it. Of the batches that it has accepted, the first `durable` survive a
    crash, and the first `applied` have been applied.
    """

    def __init__(self, rejected: frozenset[int], limit: int, together: int) -> None:
        self.rejected = rejected
        self.limit = limit
        self.together = together
        self.accepted: list[int] = []
        self.applied = self.durable = 0
        self.epoch = 0
        self.appended = 0
        self.heard_rejected: set[int] = set()
        self.begin_stream()

    def begin_stream(self) -> None:
        self.ledger = Ledger(resend_bytes=10**9)
        self.heard_applied: list[int] = []
        self.open()
        self.begun_behind = len(self.accepted)
        position = self.ledger.position
        assert position is not None
        assert position.next_sequence == len(self.accepted) + 1

    def append(self) -> None:
        self.appended += 1
        self.hold(self.appended)

    def hold(self, number: int) -> None:
        self.ledger.append(held_batch(number))

    def send(self) -> None:
        batches = self.ledger.take_next(2 * _BATCH_BYTES)
        assert len(batches) <= max(1, min(self.together, 2))
        for batch in batches:
            self.unanswered += 1
            assert self.unanswered <= self.limit
            assert batch.sequence > self.accepted_at_opening, "what the server has is not sent again"
            self.to_server.append(pb.TrainBatch(task=batch.batch.task, sequence=batch.sequence))

    def arrive(self) -> None:
        if not self.to_server:
            return
        batch = self.to_server.popleft()
        expected, number = len(self.accepted) + 1, int(batch.task)
        if batch.sequence == expected and number not in self.rejected:
            self.accepted.append(number)
            return
        assert batch.sequence >= expected, "nothing that is accepted is sent again"
        reason = "INVALID_BATCH" if batch.sequence == expected else "SEQUENCE_GAP"
        rejection = pb.Rejection(sequence=batch.sequence, reason=reason, expected_sequence=expected)
        self.to_client.append(pb.TrainResponse(rejection=rejection, credits=1))

    def apply(self) -> None:
        if self.applied == len(self.accepted):
            return
        self.applied += 1
        acknowledgement = pb.Acknowledgement(
            applied_sequence=self.applied,
            durable_sequence=self.durable,
            results=[pb.BatchResult(sequence=self.applied)],
        )
        self.to_client.append(pb.TrainResponse(acknowledgement=acknowledgement, credits=1))

    def answer(self) -> None:
        if not self.to_client:
            return
        response = self.to_client.popleft()
        self.unanswered -= response.credits
        self.ledger.credits += response.credits
        if response.HasField("rejection"):
            batch = self.ledger.rejected(response.rejection)
            if batch is not None:
                assert batch.number not in self.heard_rejected or batch.number in self.rejected
                self.heard_rejected.add(batch.number)
        else:
            self.hear(self.ledger.acknowledged(response.acknowledgement))
        if self.ledger.must_reopen:
            self.open()

    def hear(self, batches: list[HeldBatch]) -> None:
        for batch in batches:
            if not batch.finished:
                batch.finished = True
                self.heard_applied.append(batch.number)

    def open(self) -> None:
        self.to_server: deque[pb.TrainBatch] = deque()
        self.to_client: deque[pb.TrainResponse] = deque()
        self.accepted_at_opening = len(self.accepted)
        self.unanswered = len(self.accepted) - self.applied
        self.epoch += 1
        opened = pb.StreamOpened(
            epoch=self.epoch,
            applied_sequence=self.applied,
            durable_sequence=self.durable,
            learner_uid="uid",
            max_message_bytes=1000,
            next_sequence=len(self.accepted) + 1,
            max_batches_per_message=self.together,
        )
        self.hear(self.ledger.opened(opened, max(0, self.limit - self.unanswered)))

    def lose(self) -> None:
        """The connection is lost."""
        self.open()

    def crash(self) -> None:
        """The server comes back with what is durable, and has applied it again."""
        if self.durable < self.begun_behind:
            return  # batches of an earlier stream would be lost, which no stream can mend: see below
        del self.accepted[self.durable :]
        self.applied = len(self.accepted)
        self.open()

    def fall_back(self) -> None:
        """The engine comes back with an older state, and applies again what is in the journal."""
        if self.durable < self.begun_behind:
            return
        del self.accepted[self.durable :]
        self.applied = min(self.applied, self.durable) // 2
        self.open()

    def save(self) -> None:
        self.durable = len(self.accepted)

    def tell(self) -> None:
        """An acknowledgement without results."""
        acknowledgement = pb.Acknowledgement(applied_sequence=self.applied, durable_sequence=self.durable)
        self.to_client.append(pb.TrainResponse(acknowledgement=acknowledgement))

    def start_anew(self) -> None:
        """The client's process ends; the next one goes on in its source behind what the server has."""
        last = self.accepted[-1] if self.accepted else 0
        self.begin_stream()
        for number in range(last + 1, self.appended + 1):
            self.hold(number)

    def settle(self) -> None:
        while self.ledger.unapplied:
            self.send()
            self.arrive()
            self.apply()
            self.answer()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(_EVENTS, max_size=150),
    st.frozensets(st.integers(min_value=1, max_value=20), max_size=6),
    st.integers(min_value=1, max_value=8),
    st.integers(min_value=0, max_value=3),
)
def test_each_batch_is_applied_once_and_in_order(
    events: list[str], rejected: frozenset[int], limit: int, together: int
) -> None:
    world = World(rejected, limit, together)
    for event in events:
        getattr(world, event)()
    world.settle()

    wanted = [number for number in range(1, world.appended + 1) if number not in rejected]
    assert world.accepted == wanted
    assert world.heard_applied == wanted[world.begun_behind :]
    assert world.ledger.waiting_bytes == 0
    position = world.ledger.position
    assert position is not None
    assert position.next_sequence == len(wanted) + 1
    world.save()
    world.tell()
    while world.to_client:
        world.answer()
    assert world.ledger.durable
    assert world.ledger.kept_bytes == 0


def held(count: int, resend_bytes: int = 10**9) -> Ledger:
    """A ledger whose `count` batches were sent after the server had 10 of an earlier stream."""
    ledger = Ledger(resend_bytes=resend_bytes)
    ledger.opened(opened(applied=7, next_sequence=11), credits=100)
    for number in range(1, count + 1):
        ledger.append(held_batch(number))
        ledger.take_next()
    return ledger


def held_batch(number: int) -> HeldBatch:
    return HeldBatch(number, EncodedBatch(bytes(_BATCH_BYTES), examples=1, task=str(number)))


def sent(ledger: Ledger) -> list[HeldBatch]:
    """All that may be sent now, one by one."""
    return [batch for batches in iter(ledger.take_next, []) for batch in batches]


def opened(*, applied: int, next_sequence: int, uid: str = "uid") -> pb.StreamOpened:
    return pb.StreamOpened(learner_uid=uid, applied_sequence=applied, next_sequence=next_sequence)


def results(*sequences: int) -> pb.Acknowledgement:
    return pb.Acknowledgement(results=[pb.BatchResult(sequence=sequence) for sequence in sequences])


@pytest.mark.parametrize(
    ("applied", "next_sequence", "untold", "sent_again"),
    [
        (7, 16, [], []),  # it has everything, and has applied none of it
        (7, 13, [], [13, 14, 15]),
        (12, 14, [1, 2], [14, 15]),
        (15, 16, [1, 2, 3, 4, 5], []),
        (10, 11, [], [11, 12, 13, 14, 15]),
    ],
)
def test_only_what_the_server_lacks_is_sent_again(
    applied: int, next_sequence: int, untold: list[int], sent_again: list[int]
) -> None:
    ledger = held(5)

    assert [batch.number for batch in ledger.opened(opened(applied=applied, next_sequence=next_sequence), 9)] == untold
    assert [batch.sequence for batch in sent(ledger)] == sent_again
    assert ledger.credits == 9 - len(sent_again)
    assert [batch.number for batch in ledger.acknowledged(results(15))] == list(range(len(untold) + 1, 6))


def test_a_server_may_apply_again_what_is_no_longer_held_as_long_as_it_has_it() -> None:
    ledger = held(5, resend_bytes=0)
    ledger.acknowledged(results(11, 12, 13))

    assert ledger.opened(opened(applied=8, next_sequence=15), 9) == []
    assert ledger.acknowledged(results(9, 10, 11)) == [], "heard of before"
    assert [batch.sequence for batch in sent(ledger)] == [15]
    assert [batch.number for batch in ledger.acknowledged(results(14, 15))] == [4, 5]


@pytest.mark.parametrize("next_sequence", [10, 13])
def test_what_is_neither_held_nor_with_the_server_is_lost(next_sequence: int) -> None:
    ledger = held(5, resend_bytes=0)
    ledger.acknowledged(results(13))

    with pytest.raises(BatchesLost) as caught:
        ledger.opened(opened(applied=8, next_sequence=next_sequence), 9)
    assert (caught.value.expected, caught.value.oldest_held) == (next_sequence, 14)


def test_more_than_was_ever_sent_is_another_streams() -> None:
    ledger = held(5)
    ledger.append(held_batch(6))

    with pytest.raises(Fenced):
        ledger.opened(opened(applied=7, next_sequence=17), 9)


def test_what_was_sent_behind_a_rejected_batch_was_not_taken() -> None:
    ledger = held(5)
    rejected = ledger.rejected(pb.Rejection(sequence=13, reason="INVALID_BATCH", expected_sequence=13))
    assert rejected is not None
    assert rejected.number == 3

    with pytest.raises(Fenced):
        ledger.opened(opened(applied=7, next_sequence=14), 9)


def test_another_learner_is_not_written_to() -> None:
    with pytest.raises(LearnerReplaced, match="5 batches"):
        held(5).opened(opened(applied=0, next_sequence=1, uid="another"), 9)


@pytest.mark.parametrize(
    ("most_bytes", "most_batches", "credits", "together"),
    [
        (0, 64, 9, [1, 1, 1, 1, 1]),
        (3 * _BATCH_BYTES, 64, 9, [3, 2]),
        (10**9, 2, 9, [2, 2, 1]),
        (10**9, 0, 9, [1, 1, 1, 1, 1]),  # a server that knows no messages of several
        (10**9, 64, 4, [4]),
    ],
)
def test_batches_go_together_as_far_as_both_sides_allow(
    most_bytes: int, most_batches: int, credits: int, together: list[int]
) -> None:
    ledger = Ledger(resend_bytes=10**9)
    ledger.opened(
        pb.StreamOpened(max_message_bytes=1000, next_sequence=1, max_batches_per_message=most_batches), credits
    )
    for number in range(1, 6):
        ledger.append(held_batch(number))

    messages = list(iter(lambda: ledger.take_next(most_bytes), []))

    assert [len(batches) for batches in messages] == together
    assert [batch.sequence for batches in messages for batch in batches] == list(range(1, sum(together) + 1))


def test_batches_that_go_together_are_no_larger_than_the_servers_largest_message() -> None:
    ledger = Ledger(resend_bytes=10**9)
    ledger.opened(pb.StreamOpened(max_message_bytes=25, next_sequence=1, max_batches_per_message=64), 9)
    for number in range(1, 4):
        ledger.append(held_batch(number))

    assert [len(batches) for batches in iter(lambda: ledger.take_next(10**9), [])] == [2, 1]
