"""The order in which an engine process takes up its requests."""

from collections import deque
from threading import Condition

from cbp_server.engine.messages import Call, Predict, Train


class Inbox:
    """Requests that wait, fair over learners: predictions first, then one request of each learner in turn.

    Filled by one thread and emptied by another. Requests of one learner keep their order.
    """

    def __init__(self) -> None:
        self._condition = Condition()
        self._predictions: deque[Call] = deque()
        self._waiting: dict[str, deque[Call]] = {}  # by learner; never an empty queue
        self._turns: deque[str] = deque()  # learners in _waiting, next one first
        self._closed = False

    def put(self, call: Call) -> None:
        with self._condition:
            if isinstance(call.request, Predict):
                self._predictions.append(call)
            elif (queue := self._waiting.get(call.request.learner_id)) is not None:
                queue.append(call)
            else:
                self._waiting[call.request.learner_id] = deque([call])
                self._turns.append(call.request.learner_id)
            self._condition.notify()

    def close(self) -> None:
        """Ends `take` at once; what still waits is dropped."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self) -> Call | None:
        """The next request, waiting for one; None once closed."""
        with self._condition:
            while not (self._closed or self._predictions or self._turns):
                self._condition.wait()
            if self._closed:
                return None
            if self._predictions:
                return self._predictions.popleft()
            learner_id = self._turns.popleft()
            queue = self._waiting[learner_id]
            call = queue.popleft()
            if queue:
                self._turns.append(learner_id)
            else:
                del self._waiting[learner_id]
            return call

    def take_prediction(self) -> Call | None:
        """A waiting prediction, if there is one; cheap enough to ask between any two steps."""
        if not self._predictions:
            return None
        with self._condition:
            return self._predictions.popleft() if self._predictions else None

    def has_training(self, learner_id: str) -> bool:
        """Whether another batch of the learner waits."""
        with self._condition:
            return any(isinstance(call.request, Train) for call in self._waiting.get(learner_id, ()))
