"""One producer's open stream into one learner, without the wire."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cbp import Batch, BatchError, CbpError, LearnerSpec
from cbp_server.engine.messages import TrainReport
from cbp_server.errors import CreditsExceeded, MessageTooLarge, SequenceGap, SequenceReused
from cbp_server.records.learners import LearnerRecord
from cbp_server.streams.producers import Producer

#: What one batch can be refused for while its stream goes on.
_REJECTIONS = (BatchError, MessageTooLarge, SequenceGap, SequenceReused)


@dataclass(frozen=True)
class Accepted:
    """A batch is on its way; `applied` completes when the learner has learnt it, or is None if that was long ago."""

    sequence: int
    applied: asyncio.Future[TrainReport] | None
    duplicate: bool

    @property
    def output_bytes(self) -> int:
        """Of the outputs in its answer, once it is applied."""
        outputs = self.applied.result().result.outputs if self.applied is not None else None
        return 0 if outputs is None or self.duplicate else outputs.nbytes


@dataclass(frozen=True)
class Rejected:
    """A batch was refused, and nothing changed."""

    sequence: int
    error: CbpError
    expected_sequence: int


@dataclass(frozen=True)
class Ended:
    """The stream is over; what was accepted before comes before it. No error: the client has finished."""

    error: Exception | None


@dataclass(frozen=True)
class Durable:
    """What was applied before has become durable since."""


Event = Accepted | Rejected | Durable | Ended


@dataclass(frozen=True)
class IncomingBatch:
    """A batch as it came from the client."""

    sequence: int
    payload_hash: str
    payload: bytes  # the message as it goes into the journal; may be a view of one received
    return_outputs: bool
    validate: Callable[[LearnerSpec], Batch]  # raises BatchError


class BatchSink(Protocol):
    """Hands an accepted batch to the engine."""

    def __call__(
        self, producer: Producer, epoch: int, incoming: IncomingBatch, batch: Batch
    ) -> asyncio.Future[TrainReport]: ...


class TrainSession:
    """Decides about each incoming batch and keeps the order in which the client hears of it.

    Made when the producer has just been opened, so that its epoch is this session's.

    Args:
        credits: batches that may be unanswered at a time.
        max_message_bytes: largest batch.
        wait_for_room: to be awaited before the next batch is read.
        on_close: called once when the stream is over on this side.
    """

    def __init__(
        self,
        record: LearnerRecord,
        producer: Producer,
        *,
        credits: int,
        max_message_bytes: int,
        sink: BatchSink,
        wait_for_room: Callable[[], Awaitable[None]],
        on_rejected: Callable[[CbpError], None],
        on_close: Callable[["TrainSession"], None],
    ) -> None:
        self.record = record
        self.producer = producer
        self.epoch = producer.epoch
        self.acknowledged_sequence = producer.applied
        self.credits = credits
        self._max_message_bytes = max_message_bytes
        self._sink = sink
        self.wait_for_room = wait_for_room
        self._on_rejected = on_rejected
        self._on_close = on_close
        self._ended = False
        self.finished = False  # by the client
        # What an earlier stream of the producer has sent is answered on this one.
        self._events: deque[Event] = deque(
            Accepted(sequence, applied, duplicate=False) for sequence, applied in producer.under_way.items()
        )
        self._unanswered = len(self._events)
        self.next_sequence = producer.accepted + 1
        self._arrived = asyncio.Event()

    def offer(self, incoming: IncomingBatch) -> None:
        """Accepts or rejects one batch; the outcome is an event."""
        if self._ended:
            return  # the client will hear why the stream ended; this batch was not accepted
        self._unanswered += 1
        if self._unanswered > self.credits:
            self.end(CreditsExceeded())
            return
        try:
            self._push(self._accept(incoming))
        except _REJECTIONS as error:
            self._on_rejected(error)
            self._push(Rejected(incoming.sequence, error, self.producer.accepted + 1))
        except CbpError as error:
            self.end(error)

    def _accept(self, incoming: IncomingBatch) -> Accepted:
        self.producer.check_epoch(self.epoch)
        if self.producer.is_repeat(incoming.sequence, incoming.payload_hash):
            return Accepted(incoming.sequence, self.producer.applied_future(incoming.sequence), duplicate=True)
        if len(incoming.payload) > self._max_message_bytes:
            raise MessageTooLarge(len(incoming.payload), self._max_message_bytes)
        batch = incoming.validate(self.record.spec)
        applied = self._sink(self.producer, self.epoch, incoming, batch)
        self.producer.accept(incoming.sequence, incoming.payload_hash, applied)
        return Accepted(incoming.sequence, applied, duplicate=False)

    def end(self, error: Exception | None) -> None:
        """Takes no more batches; the stream ends once the client has heard of the accepted ones."""
        if not self._ended:
            self._ended, self.finished = True, error is None
            self._push(Ended(error))

    def note_durable(self) -> None:
        """The producer's durable sequence has grown without a batch being applied."""
        if not self._ended:
            self._push(Durable())

    @property
    def unused_credits(self) -> int:
        """Batches that the client may send now."""
        return max(0, self.credits - self._unanswered)

    def _push(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def next_event(self) -> Event:
        """The next event, in the order of the client's batches."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    def take_applied(self, room_bytes: int) -> Accepted | None:
        """The next event, if it is a batch that the learner has learnt already, whose outputs take no more room."""
        event = self._events[0] if self._events else None
        if not isinstance(event, Accepted):
            return None
        if event.applied is not None and (not event.applied.done() or event.applied.exception() is not None):
            return None
        if event.output_bytes > room_bytes:
            return None
        self._events.popleft()
        return event

    def under_way(self, share: int) -> "asyncio.Future[TrainReport] | None":
        """Completes when one in `share` of the batches that wait to be learnt has been; None if those are none."""
        index = len(self._events) // share - 1
        event = self._events[index] if index >= 0 else None
        return event.applied if isinstance(event, Accepted) else None

    def answered(self, batches: int) -> None:
        """The client has heard of this many batches more and may send as many again."""
        self._unanswered -= batches

    def acknowledge(self, batches: Sequence[Accepted]) -> None:
        """The client hears of these applied batches, so that positions never run ahead of results."""
        self.answered(len(batches))
        if batches:
            self.acknowledged_sequence = max(self.acknowledged_sequence, batches[-1].sequence)

    @property
    def durable_sequence(self) -> int:
        """The last batch that is in the journal; it may not be applied yet."""
        return self.producer.durable

    def close(self) -> None:
        """The stream is over, however that came about."""
        self._ended = True
        self._on_close(self)
