"""What an engine process has to say, on its way to the front."""

import threading
import time
from collections.abc import Callable

import structlog

from cbp import CbpError
from cbp_server.engine.messages import Answer, Answers, Call
from cbp_server.errors import EngineFault

#: Answers that go together at most, and seconds that one is held back.
_MOST_TOGETHER = 16
_LONGEST_HOLD = 1e-3

log = structlog.get_logger("cbp_server.engine")


class Outbox:
    """Sends answers, many at a time where they come fast: each sending wakes the front, which costs both.

    Args:
        send: called on whichever thread answers, one call at a time.
    """

    def __init__(self, send: Callable[[Answers], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._held: list[Answer] = []
        self._held_since = 0.0  # monotonic
        self._train_seconds = 0.0
        self._steps = 0

    def hold(self, answer: Answer) -> None:
        """Sends the answer soon; until then `flush_due` is to be called every now and then, and `flush` before waiting
        for anything."""
        with self._lock:
            if not self._held:
                self._held_since = time.monotonic()
            self._held.append(answer)
            if len(self._held) >= _MOST_TOGETHER:
                self._flush()

    def put(self, answer: Answer) -> None:
        """Sends the answer now, behind those held."""
        with self._lock:
            self._held.append(answer)
            self._flush()

    def reply(self, call: Call, action: Callable[[], object]) -> None:
        """Answers with what the action returns or raises."""
        try:
            value = action()
        except Exception as error:
            self.refuse(call, error)
            return
        if not call.quiet:
            self.put(Answer(call.number, value=value))

    def refuse(self, call: Call, error: Exception) -> None:
        """Answers with an error of any kind; one that is not of the service's vocabulary is logged, and named
        briefly."""
        if not isinstance(error, CbpError):
            request = type(call.request).__name__
            log.exception("request failed", request=request, learner=call.request.learner, exc_info=error)
            error = EngineFault(f"{request} failed in the engine: {type(error).__name__}: {error}")
        self.fail(call, error)

    def fail(self, call: Call, error: CbpError) -> None:
        self.put(Answer(call.number, error=error))

    def count(self, seconds: float, steps: int) -> None:
        """Notes time spent in steps."""
        with self._lock:
            self._train_seconds += seconds
            self._steps += steps

    def flush_due(self) -> None:
        """Sends what has been held for long enough."""
        if self._held and time.monotonic() - self._held_since > _LONGEST_HOLD:
            self.flush()

    def flush(self) -> None:
        """Sends what is held."""
        if self._held:
            with self._lock:
                self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        answers, self._held = tuple(self._held), []
        seconds, self._train_seconds = self._train_seconds, 0.0
        steps, self._steps = self._steps, 0
        self._send(Answers(answers, seconds, steps))
