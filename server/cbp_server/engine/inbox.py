"""The order in which an engine process takes up its requests."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from threading import Condition

from cbp_server.engine.messages import AbortTraining, Call, Checkpoint, Predict, Train


class Inbox:
    """Requests that wait, fair to all: predictions and learners alternate, and learners take turns.

    Filled by one thread and emptied by another. Requests of one learner keep their order, but for checkpoints, which go
    before batches that have not begun: what is durable must not wait for a long queue.

    Args:
        group_wait: seconds that a request waits for others, if nobody has waited for a turn when it came.
    """

    def __init__(self, group_wait: float = 0.0) -> None:
        self._group_wait = group_wait
        self._take_from = 0.0  # monotonic; nobody has a turn before
        self._condition = Condition()
        self._urgent: deque[Call] = deque()
        self._predictions: deque[Call] = deque()
        self._waiting: dict[str, deque[Call]] = {}  # by learner; never an empty queue
        self._turns: deque[str] = deque()  # learners in _waiting, next one first
        self._begun: set[str] = set()  # learners whose first request is half done
        self._predicted_last = False
        self._dropped: list[Call] = []
        self._closed = False
        #: Set from the moment that training is to be given up.
        self.aborting = False

    def put(self, *calls: Call) -> None:
        with self._condition:
            for call in calls:
                self._put(call)
            self._condition.notify()

    def _put(self, call: Call) -> None:
        match call.request:
            case Predict():
                self._predictions.append(call)
            case AbortTraining():
                self.aborting = True
                self._drop_training()
                self._urgent.append(call)
            case Checkpoint(learner=learner):
                self._queue(learner).insert(learner in self._begun, call)
            case request:
                self._queue(request.learner).append(call)

    def put_back(self, call: Call) -> None:
        """Returns a request that is half done: first of its learner's, when the others have had their turns."""
        with self._condition:
            learner = call.request.learner
            self._begun.add(learner)
            self._queue(learner).appendleft(call)

    def close(self) -> None:
        """Ends `take` at once; what still waits is dropped."""
        with self._condition:
            self._closed = True
            self.aborting = True
            self._condition.notify()

    def take(self) -> Call | None:
        """The next request, waiting for one; None once closed."""
        with self._condition:
            while not (self._closed or self._urgent or self._predictions or self._has_turn_now()):
                self._condition.wait(self._early() if self._turns else None)
            if self._closed:
                return None
            if self._urgent:
                return self._urgent.popleft()
            if self._predictions and not (self._predicted_last and self._has_turn_now()):
                self._predicted_last = True
                return self._predictions.popleft()
            self._predicted_last = False
            return self._take_turn()

    def take_batches_behind(self, first: Call, most: int) -> list[Call]:
        """The learner's next requests, as far as they are batches and not more than so many."""
        with self._condition:
            learner = first.request.learner
            queue = self._waiting.get(learner)
            batches: list[Call] = []
            if queue is None:
                return batches
            while queue and len(batches) < most and isinstance(queue[0].request, Train):
                batches.append(queue.popleft())
            if not queue:
                del self._waiting[learner]
                self._turns.remove(learner)
            return batches

    def give_back(self, batches: Sequence[Call]) -> None:
        """Returns batches of a learner that have not begun: they are its next ones again."""
        if not batches:
            return
        with self._condition:
            if self.aborting:
                self._dropped += batches
                return
            queue = self._queue(batches[0].request.learner)
            place = sum(1 for _ in takewhile(lambda call: isinstance(call.request, Checkpoint), queue))
            for call in reversed(batches):
                queue.insert(place, call)

    def take_company(self, first: Call, wanted: Callable[[str], bool], most: int) -> list[Call]:
        """What goes together with `first`: the first requests of other learners, as far as they are batches of
        learners that are `wanted`; whoever is passed over keeps its place."""
        company: list[Call] = []
        with self._condition:
            for learner in list(self._turns):
                if len(company) == most:
                    break
                if learner == first.request.learner or not wanted(learner):
                    continue
                if isinstance(self._waiting[learner][0].request, Train):
                    self._turns.remove(learner)
                    company.append(self._take_first(learner))
        return company

    def take_prediction(self) -> Call | None:
        """A waiting prediction, if there is one; cheap enough to ask between any two steps."""
        if not self._predictions:
            return None
        with self._condition:
            return self._predictions.popleft() if self._predictions else None

    def take_dropped(self) -> list[Call]:
        """The batches that an abort has kept from beginning."""
        with self._condition:
            dropped, self._dropped = self._dropped, []
            return dropped

    @property
    def would_wait(self) -> bool:
        """Whether `take` would, because nothing is here whose time has come."""
        return not (self._urgent or self._predictions or self._has_turn_now())

    @property
    def has_predictions(self) -> bool:
        """Whether a prediction waits."""
        return bool(self._predictions)

    def has_turns(self) -> bool:
        """Whether anybody waits for a turn, or the training under way is to be given up."""
        return bool(self._turns) or self.aborting

    def has_training(self, learner: str) -> bool:
        """Whether another batch of the learner waits."""
        with self._condition:
            return any(isinstance(call.request, Train) for call in self._waiting.get(learner, ()))

    def _queue(self, learner: str) -> deque[Call]:
        queue = self._waiting.get(learner)
        if queue is None:
            queue = self._waiting[learner] = deque()
            if self._group_wait and not self._turns:
                self._take_from = time.monotonic() + self._group_wait
            self._turns.append(learner)
        return queue

    def _has_turn_now(self) -> bool:
        return bool(self._turns) and not self._early()

    def _early(self) -> float:
        """Seconds before anybody has a turn."""
        return max(self._take_from - time.monotonic(), 0.0) if self._group_wait else 0.0

    def _take_turn(self) -> Call:
        return self._take_first(self._turns.popleft())

    def _take_first(self, learner: str) -> Call:
        """The first request of a learner that has been taken out of the turns; it takes turns again if it has more."""
        queue = self._waiting[learner]
        call = queue.popleft()
        self._begun.discard(learner)
        if queue:
            self._turns.append(learner)
        else:
            del self._waiting[learner]
        return call

    def _drop_training(self) -> None:
        """Takes out every batch that has not begun; those that have are given up by whoever began them."""
        for learner, queue in list(self._waiting.items()):
            kept = deque[Call]()
            for index, call in enumerate(queue):
                begun = index == 0 and learner in self._begun
                if isinstance(call.request, Train) and not begun:
                    self._dropped.append(call)
                else:
                    kept.append(call)
            if kept:
                self._waiting[learner] = kept
            else:
                del self._waiting[learner]
                self._turns.remove(learner)
