"""The producer protocol: who may write to a learner, and which batch is next. Pure bookkeeping, no input or output."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping

from cbp_server.engine.messages import HASHES_KEPT, Position, TrainReport
from cbp_server.errors import ProducerFenced, SequenceGap, SequenceReused
from cbp_server.records.learners import ProducerRecord


class Producer:
    """One producer's position with one learner.

    Sequences run 1, 2, 3, …: `accepted` is the last one handed to the engine, `applied` the last one that changed the
    learner, `durable` the last one in the journal; applied ≤ durable ≤ accepted.
    """

    def __init__(self, name: str, position: Position | None = None) -> None:
        self.name = name
        self.epoch = position.epoch if position else 0
        self.stream_id = position.stream_id if position else ""
        self.life = position.life if position else 0
        self.accepted = self.applied = self.durable = position.sequence if position else 0
        self._hashes: OrderedDict[int, str] = OrderedDict(position.hashes if position else ())
        self._under_way: dict[int, asyncio.Future[TrainReport]] = {}
        self.left_at = time.monotonic()  # when its last stream ended; or when this was made of a position
        self._finished = False  # by the client, rather than cut off

    @classmethod
    def newcomer(cls, name: str, epoch_floor: int) -> "Producer":
        """One that begins at sequence 1, with epochs above those of all that were forgotten."""
        return cls(name, Position(epoch=epoch_floor, life=epoch_floor))

    def left(self, *, finished: bool) -> None:
        """Its stream is over.

        Args:
            finished: the client has ended it; otherwise it may come back.
        """
        self.left_at = time.monotonic()
        self._finished = finished

    def has_been_away_like(self, earlier: "Producer") -> None:
        """`earlier` was this producer before its learner was brought back."""
        self.left_at, self._finished = earlier.left_at, earlier._finished

    @property
    def is_settled(self) -> bool:
        """Whether the client has ended its last stream, and all that it sent is applied and durable: it has nothing to
        send again."""
        return self._finished and self.durable >= self.accepted and not self._under_way

    @property
    def record(self) -> ProducerRecord:
        return ProducerRecord(self.name, self.epoch, self.applied, self.durable)

    @property
    def under_way(self) -> Mapping[int, asyncio.Future[TrainReport]]:
        """Batches accepted and not yet applied, by sequence, in order."""
        return self._under_way

    def open(self, stream_id: str = "", resumed_epoch: int = 0) -> int:
        """A new epoch, which fences every stream opened before.

        Args:
            stream_id: names the stream through its reconnections.
            resumed_epoch: the epoch that the stream had before; 0 if it takes the producer over.

        Raises:
            ProducerFenced: the stream is resumed, but another one has been opened since.
        """
        if resumed_epoch and self.epoch > resumed_epoch and stream_id != self.stream_id:
            raise ProducerFenced(self.name, self.epoch)
        self.epoch = max(self.epoch, resumed_epoch) + 1
        self.stream_id = stream_id
        self._finished = False
        return self.epoch

    def check_epoch(self, epoch: int) -> None:
        """Raises `ProducerFenced` if a newer stream has opened since `epoch`."""
        if epoch != self.epoch:
            raise ProducerFenced(self.name, self.epoch)

    def is_repeat(self, sequence: int, payload_hash: str) -> bool:
        """Whether this batch was accepted before; False if it is the next one.

        Raises:
            SequenceReused: another payload was accepted under this sequence. Hashes are kept for a bounded number of
                sequences; a repeat of an older one is taken to be the same payload.
            SequenceGap: it is neither.
        """
        if sequence == self.accepted + 1:
            return False
        if not 1 <= sequence <= self.accepted:
            raise SequenceGap(sequence, self.accepted + 1)
        if self._hashes.get(sequence, payload_hash) != payload_hash:
            raise SequenceReused(sequence)
        return True

    def accept(self, sequence: int, payload_hash: str, applied: asyncio.Future[TrainReport]) -> None:
        """Takes the next batch; `applied` completes when the engine has applied it."""
        self.accepted = sequence
        self._hashes[sequence] = payload_hash
        while len(self._hashes) > HASHES_KEPT:
            self._hashes.popitem(last=False)
        self._under_way[sequence] = applied

    def make_durable(self, sequence: int) -> None:
        """The batch is in the journal."""
        self.durable = max(self.durable, sequence)

    def settle(self, sequence: int) -> None:
        """The batch has been applied."""
        self._under_way.pop(sequence, None)
        self.applied = max(self.applied, sequence)

    def retract(self, sequence: int) -> None:
        """The engine refused the batch: it and every one behind it were not applied, and their sequences are free."""
        for later in [number for number in self._hashes if number >= sequence]:
            del self._hashes[later]
        for later in [number for number in self._under_way if number >= sequence]:
            del self._under_way[later]
        self.accepted = min(self.accepted, sequence - 1)

    def applied_future(self, sequence: int) -> asyncio.Future[TrainReport] | None:
        """Completes when an accepted batch is applied; None if it has been."""
        return self._under_way.get(sequence)
