"""The book of one producer's batches: which are held, sent, applied and durable. No input or output happens here.

    applied and durable   applied, kept for resending     not applied: sent | waiting
    ───────────────────┼──────────────────────────────┼──────────────────┼─────────────
                       durable                        applied            applied + in_flight

The server knows batches by sequence, without gaps. A batch gets its sequence when it is sent, from its place in the
book, so that leaving out a rejected batch renumbers all later ones; those were sent under numbers that the server no
longer expects, so they have to be sent again on a new stream.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cbp_client.errors import AlreadyExists, BatchesLost, Fenced, LearnerReplaced, SequenceGap, ServerError
from cbp_proto.v1 import training_service_pb2


@dataclass(eq=False)
class HeldBatch:
    """A batch on its way. `number` counts the batches of one stream and never changes; the sequence may."""

    number: int
    request: training_service_pb2.TrainRequest
    size: int  # bytes of the request
    finished: bool = False  # its result is known, so that applying it once more is nobody's news

    @property
    def sequence(self) -> int:
        """The sequence that it was last sent with; 0 before that."""
        return self.request.batch.sequence


@dataclass(frozen=True)
class StreamPosition:
    """Where the producer stands with the server."""

    learner_uid: str
    epoch: int
    applied_sequence: int
    durable_sequence: int
    max_message_bytes: int


@dataclass
class Ledger:
    """Batches of one stream, in order.

    Attributes:
        resend_bytes: bound on the applied but not yet durable batches that are kept; the oldest go first.
        credits: batches that may be sent now.
        opens: streams asked for since one was last opened, of which the server may have counted some.
    """

    resend_bytes: int
    position: StreamPosition | None = None
    credits: int = 0
    opens: int = 0
    kept_bytes: int = 0
    waiting_bytes: int = 0
    _kept: deque[HeldBatch] = field(default_factory=deque)
    _waiting: deque[HeldBatch] = field(default_factory=deque)
    _in_flight: int = 0
    _rejected_sequence: int | None = None
    _unexpected_gap: int | None = None

    @property
    def unapplied(self) -> int:
        """Batches that are not known to be applied."""
        return len(self._waiting)

    @property
    def durable(self) -> bool:
        """Whether every batch is applied and on the server's disk."""
        return not self._waiting and (
            self.position is None or self.position.durable_sequence >= self.position.applied_sequence
        )

    @property
    def must_reopen(self) -> bool:
        """Whether a batch was rejected and all results that were to come before it have come."""
        return self._rejected_sequence is not None and self._applied_sequence >= self._rejected_sequence - 1

    def append(self, batch: HeldBatch) -> None:
        """Put a batch behind all others."""
        self._waiting.append(batch)
        self.waiting_bytes += batch.size

    def take_next(self) -> HeldBatch | None:
        """The batch to send now, with its sequence; None if there is none or the server wants none yet."""
        if self.credits == 0 or self._in_flight == len(self._waiting) or self._rejected_sequence is not None:
            return None
        batch = self._waiting[self._in_flight]
        batch.request.batch.sequence = self._applied_sequence + 1 + self._in_flight
        self._in_flight += 1
        self.credits -= 1
        return batch

    def may_open(self, learner_uid: str, epoch: int) -> None:
        """Check, with what the server says of the producer, that the stream may be opened again.

        Opening ends whichever stream of the producer is open, so one that was replaced while it was disconnected must
        not even try.

        Raises:
            LearnerReplaced: the learner is another one than before.
            Fenced: another stream of the producer has been opened.
        """
        before = self._opened_position
        if learner_uid != before.learner_uid:
            raise LearnerReplaced(
                "the learner was deleted and created anew while the stream was open; "
                f"{self.unapplied} batches were meant for the old one"
            )
        if epoch > before.epoch + self.opens:
            raise Fenced(
                "another stream of the same producer took over while this one was disconnected",
                reason="PRODUCER_FENCED",
            )

    def opened(self, opened: training_service_pb2.StreamOpened, credits: int) -> list[HeldBatch]:
        """Begin anew from what the server says it has; the batches that it applied without telling are returned.

        Raises:
            LearnerReplaced: the learner is another one than before.
            BatchesLost: the server lacks batches that are no longer held.
            Fenced: another stream has written for this producer.
        """
        before = self.position
        if before is not None:
            self.may_open(opened.learner_uid, opened.epoch)
            self._check_held(before.applied_sequence, opened.applied_sequence)
        self.position = StreamPosition(
            learner_uid=opened.learner_uid,
            epoch=opened.epoch,
            applied_sequence=opened.applied_sequence,
            durable_sequence=opened.durable_sequence,
            max_message_bytes=opened.max_message_bytes,
        )
        self.opens = 0
        self.credits = credits
        self._in_flight = 0
        self._rejected_sequence = None
        if before is None:
            return []
        for _ in range(before.applied_sequence - opened.applied_sequence):
            batch = self._kept.pop()
            self.kept_bytes -= batch.size
            self._waiting.appendleft(batch)
            self.waiting_bytes += batch.size
        untold = [self._apply() for _ in range(opened.applied_sequence - before.applied_sequence)]
        self._forget_kept()
        return untold

    def acknowledged(self, acknowledgement: training_service_pb2.Acknowledgement) -> list[HeldBatch]:
        """Note what is applied and durable; returns the batches newly applied, in order.

        Every batch gets a result, but `applied_sequence` may already count batches whose results come with a later
        acknowledgement. They are taken to be applied when their results are there, so that none is missed.
        """
        position = self._opened_position
        applied = max((result.sequence for result in acknowledgement.results), default=0)
        newly_applied = max(0, applied - position.applied_sequence)
        if newly_applied > self._in_flight:
            raise ServerError(
                f"the server acknowledges batch {applied}, which was not sent",
                reason="STREAM_PROTOCOL",
            )
        self.position = replace(
            position,
            applied_sequence=position.applied_sequence + newly_applied,
            durable_sequence=max(position.durable_sequence, acknowledgement.durable_sequence),
        )
        if newly_applied:
            self._unexpected_gap = None
        self._in_flight -= newly_applied
        batches = [self._apply() for _ in range(newly_applied)]
        self._forget_kept()
        return batches

    def rejected(self, rejection: training_service_pb2.Rejection) -> HeldBatch | None:
        """Take a rejected batch out of the book and return it; None if its rejection only follows from another's.

        Raises:
            AlreadyExists: the sequence was used for another batch: somebody else writes for this producer.
            SequenceGap: the server twice expects another sequence than the one that it said it would take.
        """
        if rejection.reason == "SEQUENCE_REUSED":
            raise AlreadyExists(rejection.message, reason=rejection.reason)
        if rejection.reason == "SEQUENCE_GAP":
            if self._rejected_sequence is None:
                self._note_gap(rejection)
            return None
        batch = next((batch for batch in self._sent() if batch.sequence == rejection.sequence), None)
        if batch is None:
            return None
        self._waiting.remove(batch)
        self.waiting_bytes -= batch.size
        self._in_flight -= 1
        self._rejected_sequence = min(self._rejected_sequence or rejection.sequence, rejection.sequence)
        return batch

    def abandon(self) -> list[HeldBatch]:
        """Let go of everything; returns the batches that are not known to be applied."""
        abandoned = list(self._waiting)
        self._waiting.clear()
        self._kept.clear()
        self._in_flight = self.kept_bytes = self.waiting_bytes = 0
        return abandoned

    @property
    def _opened_position(self) -> StreamPosition:
        if self.position is None:
            raise RuntimeError("the stream has not been opened")
        return self.position

    @property
    def _applied_sequence(self) -> int:
        return self._opened_position.applied_sequence

    def _check_held(self, before: int, now: int) -> None:
        oldest_held = before - len(self._kept) + 1
        if now + 1 < oldest_held:
            raise BatchesLost(expected=now + 1, oldest_held=oldest_held)
        if now - before > len(self._waiting):
            raise Fenced(
                f"another stream of the same producer wrote batches up to {now} while this one was disconnected",
                reason="PRODUCER_FENCED",
            )

    def _note_gap(self, rejection: training_service_pb2.Rejection) -> None:
        if self._unexpected_gap == rejection.expected_sequence:
            raise SequenceGap(
                rejection.message,
                reason=rejection.reason,
                metadata={"expected_sequence": str(rejection.expected_sequence)},
            )
        self._unexpected_gap = rejection.expected_sequence
        self._rejected_sequence = self._applied_sequence + 1  # reopen at once, and hear from where to go on

    def _sent(self) -> Iterator[HeldBatch]:
        for index in range(self._in_flight):
            yield self._waiting[index]

    def _apply(self) -> HeldBatch:
        batch = self._waiting.popleft()
        self.waiting_bytes -= batch.size
        self._kept.append(batch)
        self.kept_bytes += batch.size
        return batch

    def _forget_kept(self) -> None:
        position = self._opened_position
        not_durable = max(0, position.applied_sequence - position.durable_sequence)
        while self._kept and (len(self._kept) > not_durable or self.kept_bytes > self.resend_bytes):
            self.kept_bytes -= self._kept.popleft().size
