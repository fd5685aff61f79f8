"""Clients that stream to a server under faults, and remember what they were told."""

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from cbp_client import (
    Aborted,
    AlreadyExists,
    BatchesLost,
    BatchResult,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    StreamPosition,
    TrainingStream,
    Unavailable,
)
from faults.learners import FedLearner, make_batch

AnswerT = TypeVar("AnswerT")

#: Batches between two flushes, which bound what is under way.
_FLUSHED = 20
#: One in so many flushes, the producer's process ends at once and another one takes its place.
_RESTARTS = 15
_MOST_FORKS = 8


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
            self._begin(stream.position)
            return self._send(stream)
        except BatchesLost as lost:
            if not self._may_lose:
                raise
            self.losses += 1
            self.told = lost.expected - 1
            return False
        finally:
            stream.abort()

    def _begin(self, position: StreamPosition) -> None:
        """Batches that are on their way already come first, but their results were promised to another stream."""
        if position.applied_sequence < self.told:
            assert self._may_lose, f"{self.name} was told of {self.told}, and now of {position.applied_sequence}"
            self.losses += 1
            self.told = position.applied_sequence
        self._base = position.next_sequence - 1
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
        confirmed: by learner and kind of journal entry, the changes that the server said it has made.
        forks: copies that it has asked for, and of which learner.
    """

    def __init__(self, client: Client, learners: Sequence[FedLearner], seed: int) -> None:
        super().__init__("operator")
        self.confirmed: dict[str, Counter[str]] = {learner.name: Counter() for learner in learners}
        self.forks: dict[str, FedLearner] = {}
        self._client = client
        self._learners = learners
        self._chance = random.Random(f"{seed} operator")

    def work(self) -> None:
        changes = (self._update, self._update, self._reset, self._restore, self._checkpoint, self._fork, self._remove)
        while not self._finishing.wait(self._chance.uniform(0.0, 0.5)):
            change, learner = self._chance.choice(changes), self._chance.choice(self._learners)
            # FailedPrecondition and AlreadyExists: an earlier change was made whose answer was lost on its way.
            with contextlib.suppress(Unavailable, DeadlineExceeded, Aborted, FailedPrecondition, AlreadyExists):
                change(learner)

    def _update(self, learner: FedLearner) -> None:
        rate = learner.optimizer["lr"] * self._chance.uniform(0.5, 1.0)
        self._client.get_learner(learner.name).update(optimizer={"lr": rate})
        self.confirmed[learner.name]["update"] += 1

    def _reset(self, learner: FedLearner) -> None:
        self._client.get_learner(learner.name).reset_units("all", self._chance.uniform(0.1, 0.5))
        self.confirmed[learner.name]["reset"] += 1

    def _restore(self, learner: FedLearner) -> None:
        """To a checkpoint, or to any position that can be reached."""
        handle = self._client.get_learner(learner.name)
        checkpoints = handle.checkpoints()
        if len(checkpoints) and self._chance.random() < 0.5:
            number = self._chance.choice(checkpoints.checkpoints).number
            try:
                handle.restore(checkpoint=number)
            except NotFound:
                return  # a newer one has taken its place
        else:
            first, last = checkpoints.first_restorable_position, checkpoints.last_restorable_position
            handle.restore(position=self._chance.randint(first, last))
        self.confirmed[learner.name]["restore"] += 1

    def _checkpoint(self, learner: FedLearner) -> None:
        self._client.get_learner(learner.name).checkpoint()

    def _fork(self, learner: FedLearner) -> None:
        if len(self.forks) < _MOST_FORKS:
            name = f"{learner.name}-fork-{len(self.forks)}"
            self.forks[name] = learner
            self._client.get_learner(learner.name).fork(name)

    def _remove(self, _: FedLearner) -> None:
        """A fork, which then comes back."""
        if self.forks:
            name = self._chance.choice(sorted(self.forks))
            with contextlib.suppress(NotFound):  # the answer to the fork, or to an earlier removal, was lost
                self._client.delete_learner(name)
            with contextlib.suppress(NotFound):
                self._client.undelete_learner(name)


def until_available(call: Callable[[], AnswerT]) -> AnswerT:
    """The answer, however long it takes a server that is down to come back."""
    while True:
        try:
            return call()
        except (Unavailable, DeadlineExceeded):
            continue
