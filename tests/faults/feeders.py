"""Clients that stream to a server under faults, and remember what they were told."""

import contextlib
import random
import threading
from collections.abc import Callable
from typing import TypeVar

from cbp_client import Aborted, BatchesLost, BatchResult, Client, DeadlineExceeded, TrainingStream, Unavailable
from faults.learners import FedLearner, make_batch

AnswerT = TypeVar("AnswerT")

#: Batches between two flushes, which bound what is under way.
_FLUSHED = 20
#: One in so many flushes, the producer's process ends at once and another one takes its place.
_RESTARTS = 15


class Participant(threading.Thread):
    """A client's thread, which works until it is told to finish.

    Attributes:
        failure: what ended it, if it was not told to.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None
        self._finishing = threading.Event()

    def finish(self) -> None:
        """Begins no more; what is under way is waited for."""
        self._finishing.set()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.failure = error

    def work(self) -> None:
        """Until `finish`."""
        raise NotImplementedError


class Feeder(Participant):
    """One producer of one learner.

    Args:
        client: of its own, since a connection is a client's.
        learner: must exist.
        on_result: called whenever the server has applied a batch.
        may_lose: whether what was acknowledged may be gone after a power loss.

    Attributes:
        told: the last sequence that the server said is applied or durable; after a loss that may be, what is left.
        restarts: producers that took another one's place.
        losses: times that acknowledged batches were gone.
    """

    def __init__(
        self,
        client: Client,
        learner: FedLearner,
        producer: str,
        seed: int,
        *,
        on_result: Callable[[], None],
        may_lose: bool = False,
    ) -> None:
        super().__init__(f"{learner.name}/{producer}")
        self.learner = learner.name
        self.producer = producer
        self.told = 0
        self.restarts = 0
        self.losses = 0
        self._client = client
        self._seed = seed
        self._on_result = on_result
        self._may_lose = may_lose
        self._chance = random.Random(f"{seed} {self.name}")
        self._base = 0  # the sequence before the stream's first batch
        self._results = 0  # of the stream

    def work(self) -> None:
        while not self._stream():
            self.restarts += 1

    def _stream(self) -> bool:
        """One life of the producer's process; whether the feeder has been finished within it."""
        handle = until_available(lambda: self._client.get_learner(self.learner))
        stream = handle.stream(self.producer, on_result=self._take_result)
        try:
            stream.open()
            self._begin(stream.position.applied_sequence)
            return self._send(stream)
        except BatchesLost as lost:
            if not self._may_lose:
                raise
            self.losses += 1
            self.told = lost.expected - 1
            return False
        finally:
            stream.abort()

    def _begin(self, applied: int) -> None:
        if applied < self.told:
            assert self._may_lose, f"{self.name} was told of {self.told}, and now of {applied}"
            self.losses += 1
        self.told = self._base = applied
        self._results = 0

    def _send(self, stream: TrainingStream) -> bool:
        sequence = self._base
        while not self._finishing.is_set():
            sequence += 1
            features, targets, task = make_batch(self.learner, self.producer, sequence, self._seed)
            stream.send(features, targets, task=task)
            if sequence % _FLUSHED == 0:
                if self._chance.randrange(_RESTARTS) == 0:
                    return False
                self._flush(stream, durable=self._chance.random() < 0.5)
        self._flush(stream, durable=True)
        assert self.told >= sequence, f"{self.name} flushed {sequence} batches, but was told of {self.told}"
        return True

    def _flush(self, stream: TrainingStream, *, durable: bool) -> None:
        stream.flush(durable=durable)
        if durable:
            self.told = max(self.told, stream.position.durable_sequence)

    def _take_result(self, result: BatchResult) -> None:
        """Every batch has one result, in order."""
        self._results += 1
        assert result.number == self._results, f"{self.name} was told of {result.number} after {self._results - 1}"
        assert result.sequence == self._base + result.number, f"{self.name}: {result}"
        self.told = max(self.told, result.sequence)
        self._on_result()


class Operator(Participant):
    """Changes learners while they are fed.

    Attributes:
        updates: by learner, the updates that the server said it has made.
    """

    def __init__(self, client: Client, learners: tuple[FedLearner, ...], seed: int) -> None:
        super().__init__("operator")
        self.updates = {learner.name: 0 for learner in learners}
        self._client = client
        self._learners = learners
        self._chance = random.Random(f"{seed} operator")

    def work(self) -> None:
        while not self._finishing.wait(self._chance.uniform(0.0, 0.5)):
            with contextlib.suppress(Unavailable, DeadlineExceeded, Aborted):
                self._change(self._chance.choice(self._learners))

    def _change(self, learner: FedLearner) -> None:
        handle = self._client.get_learner(learner.name)
        rate = learner.optimizer["lr"] * self._chance.uniform(0.5, 1.0)
        handle.update(optimizer={"lr": rate})
        self.updates[learner.name] += 1


def until_available(call: Callable[[], AnswerT]) -> AnswerT:
    """The answer, however long it takes a server that is down to come back."""
    while True:
        try:
            return call()
        except (Unavailable, DeadlineExceeded):
            continue
