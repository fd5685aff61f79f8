"""The book of one producer's batches: which are held, sent, applied and durable. No input or output happens here.

    applied and durable   applied, kept for resending     not applied: in flight | waiting
    ───────────────────┼──────────────────────────────┼───────────────────────┼─────────────
                       durable                        settled                 settled + in flight

The server knows batches by sequence, without gaps. A batch gets its sequence when it is sent, from its place in the
book, so that leaving out a rejected batch renumbers all later ones; those were sent under numbers that the server no
longer expects, so they have to be sent again on a new stream. Batches that the server has are never sent again: those
that it had not applied when the stream was opened are in flight from the beginning.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import islice

from cbp_client.errors import AlreadyExists, BatchesLost, Fenced, LearnerReplaced, SequenceGap, ServerError
from cbp_client.examples import EncodedBatch
from cbp_proto.v1 import training_service_pb2


@dataclass(eq=False)
class HeldBatch:
    """A batch on its way. `number` counts the batches of one stream and never changes; the sequence may."""

    number: int
    batch: EncodedBatch
    sequence: int = 0  # that it was last sent with; 0 before that
    finished: bool = False  # its result is known, so that applying it once more is nobody's news

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.batch.encoded)


@dataclass(frozen=True)
class StreamPosition:
    """Where the producer stands with the server.

    Attributes:
        learner_uid: of the learner that the stream writes to.
        epoch: of the stream's newest connection; higher than that of every older stream of the producer.
        applied_sequence: every batch up to this one has changed the learner.
        durable_sequence: every batch up to this one is on the server's disk; it may not be applied yet.
        next_sequence: what the next batch sent will have. Right after opening: one more than the producer's batches
            that the server has, also from streams and processes before this one.
        max_message_bytes: largest message that the server takes.
    """

    learner_uid: str
    epoch: int
    applied_sequence: int
    durable_sequence: int
    next_sequence: int
    max_message_bytes: int


@dataclass
class Ledger:
    """Batches of one stream, in order.

    Attributes:
        resend_bytes: bound on the applied but not yet durable batches that are kept; the oldest go first.
        position: where the producer stands; None before the stream is opened.
        credits: batches that may be sent now.
        max_batches_per_message: that the server takes; 0 if it knows no such messages.
    """

    resend_bytes: int
    position: StreamPosition | None = None
    credits: int = 0
    max_batches_per_message: int = 0
    kept_bytes: int = 0
    waiting_bytes: int = 0
    _kept: deque[HeldBatch] = field(default_factory=deque)
    _waiting: deque[HeldBatch] = field(default_factory=deque)
    # Every batch up to here is out of this stream's hands: applied once, or taken from a stream before this one.
    # Never before position.applied_sequence; after it where the server is still applying such batches.
    _settled: int = 0
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
        return not self._waiting and (self.position is None or self.position.durable_sequence >= self._settled)

    @property
    def must_reopen(self) -> bool:
        """Whether a batch was rejected and all results that were to come before it have come."""
        return self._rejected_sequence is not None and self._settled >= self._rejected_sequence - 1

    def append(self, batch: HeldBatch) -> None:
        """Put a batch behind all others."""
        self._waiting.append(batch)
        self.waiting_bytes += batch.size

    def take_next(self, most_bytes: int = 0) -> list[HeldBatch]:
        """The batches to send now in one message, with their sequences; none if there are none or the server wants none
        yet.

        Args:
            most_bytes: how large several may be together, if the server takes messages that large.
        """
        if self.credits == 0 or self._in_flight == len(self._waiting) or self._rejected_sequence is not None:
            return []
        most = min(self.credits, self.max_batches_per_message or 1)
        most_bytes = min(most_bytes, self._opened_position.max_message_bytes)
        batches: list[HeldBatch] = []
        size = 0
        for batch in islice(self._waiting, self._in_flight, self._in_flight + most):
            size += batch.size
            if batches and size > most_bytes:
                break
            batch.sequence = self._next_sequence + len(batches)
            batches.append(batch)
        self._in_flight += len(batches)
        self.credits -= len(batches)
        self.position = replace(self._opened_position, next_sequence=self._next_sequence)
        return batches

    def opened(self, opened: training_service_pb2.StreamOpened, credits: int) -> list[HeldBatch]:
        """Begin anew from what the server says it has; the batches that it applied without telling are returned.

        Raises:
            LearnerReplaced: the learner is another one than before.
            BatchesLost: the server lacks batches that are no longer held.
            Fenced: another stream has written for this producer.
        """
        accepted = max(opened.next_sequence - 1, opened.applied_sequence)
        if self.position is None:
            self._settled = accepted
        else:
            self._check_continues(self.position, opened.learner_uid, accepted)
        self._hold_again(max(0, self._settled - accepted))
        untold = [self._apply() for _ in range(opened.applied_sequence - self._settled)]
        self._in_flight = accepted - self._settled
        self._rejected_sequence = None
        self.credits = credits
        self.max_batches_per_message = opened.max_batches_per_message
        self.position = StreamPosition(
            learner_uid=opened.learner_uid,
            epoch=opened.epoch,
            applied_sequence=opened.applied_sequence,
            durable_sequence=opened.durable_sequence,
            next_sequence=self._next_sequence,
            max_message_bytes=opened.max_message_bytes,
        )
        self._forget_kept()
        return untold

    def acknowledged(self, acknowledgement: training_service_pb2.Acknowledgement) -> list[HeldBatch]:
        """Note what is applied and durable; returns the batches newly applied, in order.

        Every batch gets a result, but `applied_sequence` may already count batches whose results come with a later
        acknowledgement. They are taken to be applied when their results are there, so that none is missed.
        """
        position = self._opened_position
        applied = max((result.sequence for result in acknowledgement.results), default=0)
        newly_applied = max(0, applied - self._settled)
        if newly_applied > self._in_flight:
            raise ServerError(
                f"the server acknowledges batch {applied}, which was not sent",
                reason="STREAM_PROTOCOL",
            )
        self.position = replace(
            position,
            applied_sequence=max(position.applied_sequence, applied),
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
        place = rejection.sequence - self._settled - 1
        if not 0 <= place < self._in_flight:
            return None
        batch = self._waiting[place]
        del self._waiting[place]
        self.waiting_bytes -= batch.size
        self._in_flight = place  # the server took none of those behind it
        self._rejected_sequence = rejection.sequence
        self.position = replace(self._opened_position, next_sequence=self._next_sequence)
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
    def _next_sequence(self) -> int:
        return self._settled + self._in_flight + 1

    def _check_continues(self, before: StreamPosition, learner_uid: str, accepted: int) -> None:
        """Whether what the server has is this stream's, and followed by a batch that is held."""
        if learner_uid != before.learner_uid:
            raise LearnerReplaced(
                "the learner was deleted and created anew while the stream was open; "
                f"{self.unapplied} batches were meant for the old one"
            )
        oldest_held = self._settled - len(self._kept) + 1
        if accepted + 1 < oldest_held:
            raise BatchesLost(expected=accepted + 1, oldest_held=oldest_held)
        if accepted >= self._next_sequence:
            raise Fenced(
                f"another stream of the same producer wrote batches up to {accepted} while this one was disconnected",
                reason="PRODUCER_FENCED",
            )

    def _hold_again(self, count: int) -> None:
        """The server has lost the last `count` batches that it had applied."""
        for _ in range(count):
            batch = self._kept.pop()
            self.kept_bytes -= batch.size
            self._waiting.appendleft(batch)
            self.waiting_bytes += batch.size
        self._settled -= count

    def _note_gap(self, rejection: training_service_pb2.Rejection) -> None:
        if self._unexpected_gap == rejection.expected_sequence:
            raise SequenceGap(
                rejection.message,
                reason=rejection.reason,
                metadata={"expected_sequence": str(rejection.expected_sequence)},
            )
        self._unexpected_gap = rejection.expected_sequence
        self._rejected_sequence = self._settled + 1  # reopen at once, and hear from where to go on

    def _apply(self) -> HeldBatch:
        batch = self._waiting.popleft()
        self.waiting_bytes -= batch.size
        self._kept.append(batch)
        self.kept_bytes += batch.size
        self._settled += 1
        return batch

    def _forget_kept(self) -> None:
        not_durable = max(0, self._settled - self._opened_position.durable_sequence)
        while self._kept and (len(self._kept) > not_durable or self.kept_bytes > self.resend_bytes):
            self.kept_bytes -= self._kept.popleft().size
