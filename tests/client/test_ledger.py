"""Whatever happens between them, the server applies each batch once and in order, except those that it rejects."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from cbp_client.ledger import HeldBatch, Ledger
from cbp_proto.v1 import training_service_pb2 as pb

_EVENTS = st.sampled_from(["append", "send", "send", "arrive", "arrive", "answer", "answer", "lose", "crash", "save"])


class World:
    """A ledger, a server, and the wire between them; batches carry their number in `task`."""

    def __init__(self, rejected: frozenset[int], credits: int) -> None:
        self.ledger = Ledger(resend_bytes=10**9)
        self.rejected = rejected
        self.credits = credits
        self.applied: list[int] = []
        self.durable = 0
        self.epoch = 0
        self.appended = 0
        self.to_server: deque[pb.TrainBatch] = deque()
        self.to_client: deque[pb.TrainResponse] = deque()
        self.heard_applied: list[int] = []
        self.heard_rejected: list[int] = []
        self.unanswered = 0
        self.open()

    def append(self) -> None:
        self.appended += 1
        request = pb.TrainRequest(batch=pb.TrainBatch(task=str(self.appended)))
        self.ledger.append(HeldBatch(number=self.appended, request=request, size=request.ByteSize()))

    def send(self) -> None:
        batch = self.ledger.take_next()
        if batch is not None:
            self.unanswered += 1
            assert self.unanswered <= self.credits
            sent = pb.TrainBatch()
            sent.CopyFrom(batch.request.batch)
            self.to_server.append(sent)

    def arrive(self) -> None:
        if not self.to_server:
            return
        batch = self.to_server.popleft()
        expected, number = len(self.applied) + 1, int(batch.task)
        if batch.sequence == expected and number not in self.rejected:
            self.applied.append(number)
            results = [pb.BatchResult(sequence=expected)]
            acknowledgement = pb.Acknowledgement(durable_sequence=self.durable, results=results)
            self.to_client.append(pb.TrainResponse(acknowledgement=acknowledgement, credits=1))
            return
        assert batch.sequence >= expected, "nothing that is applied is sent again while the stream is open"
        reason = "INVALID_BATCH" if batch.sequence == expected else "SEQUENCE_GAP"
        rejection = pb.Rejection(sequence=batch.sequence, reason=reason, expected_sequence=expected)
        self.to_client.append(pb.TrainResponse(rejection=rejection, credits=1))

    def answer(self) -> None:
        if not self.to_client:
            return
        response = self.to_client.popleft()
        self.unanswered -= 1
        self.ledger.credits += response.credits
        if response.HasField("rejection"):
            batch = self.ledger.rejected(response.rejection)
            if batch is not None:
                self.heard_rejected.append(batch.number)
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
        self.to_server.clear()
        self.to_client.clear()
        self.unanswered = 0
        self.epoch += 1
        self.ledger.opens += 1
        opened = pb.StreamOpened(
            epoch=self.epoch,
            applied_sequence=len(self.applied),
            durable_sequence=self.durable,
            learner_uid="uid",
            max_message_bytes=1000,
        )
        self.hear(self.ledger.opened(opened, self.credits))

    def lose(self) -> None:
        self.open()

    def crash(self) -> None:
        del self.applied[self.durable :]
        self.open()

    def save(self) -> None:
        self.durable = len(self.applied)

    def settle(self) -> None:
        while self.ledger.unapplied:
            self.send()
            self.arrive()
            self.answer()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(_EVENTS, max_size=120),
    st.frozensets(st.integers(min_value=1, max_value=20), max_size=6),
    st.integers(min_value=1, max_value=8),
)
def test_each_batch_is_applied_once_and_in_order(events: list[str], rejected: frozenset[int], credits: int) -> None:
    world = World(rejected, credits)
    for event in events:
        getattr(world, event)()
    world.settle()

    accepted = [number for number in range(1, world.appended + 1) if number not in rejected]
    assert world.applied == accepted
    assert world.heard_applied == accepted
    assert sorted(world.heard_rejected) == [number for number in range(1, world.appended + 1) if number in rejected]
    assert world.ledger.waiting_bytes == 0
