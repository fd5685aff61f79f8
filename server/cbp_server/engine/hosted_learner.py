"""A learner in the engine, and what its checkpoints say besides its state."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from cbp import Learner, LearnerSpec, PlasticitySample, Trainability
from cbp_server.engine import messages
from cbp_server.engine.training import Pace
from cbp_server.errors import EngineFault, SequenceGap
from cbp_server.records.samples import PackedSample, SampleHistory, SampleRecord, pack

#: Newest plasticity samples saved with each checkpoint, so that a restart does not blind its watchers.
SAMPLES_SAVED = 100


@dataclass
class ProducerState:
    """A `messages.Position` that changes in place: with every batch, of which hundreds of hashes are remembered."""

    epoch: int
    sequence: int
    hashes: deque[tuple[int, str]]
    stream_id: str
    life: int

    @classmethod
    def at(cls, position: messages.Position) -> "ProducerState":
        hashes = deque(position.hashes, maxlen=messages.HASHES_KEPT)
        return cls(position.epoch, position.sequence, hashes, position.stream_id, position.life)

    @property
    def position(self) -> messages.Position:
        return messages.Position(self.epoch, self.sequence, tuple(self.hashes), self.stream_id, self.life)


@dataclass
class HostedLearner:
    """A learner and what its checkpoints say besides its state."""

    learner: Learner
    update_time: str = ""
    producers: dict[str, ProducerState] = field(default_factory=dict)
    epoch_floor: int = 0  # see messages.LearnerReport
    journal_position: int = 0
    samples: SampleHistory = field(default_factory=lambda: SampleHistory(SAMPLES_SAVED))
    reported_at: float = 0.0  # monotonic seconds
    trainability: Trainability | None = None  # the newest test
    pace: Pace = field(init=False)
    test_interval: int = field(init=False)  # steps; 0 is never
    test_begun_at: int = field(init=False)  # step

    def __post_init__(self) -> None:
        self.pace = Pace.of(self.learner.spec)
        self.test_interval = self.learner.spec.monitoring.trainability_interval
        self.test_begun_at = self.learner.progress.step

    def revise(self, spec: LearnerSpec, update_time: str) -> None:
        """Goes on with another spec."""
        self.learner.update(spec)
        self.update_time = update_time
        self.test_interval = spec.monitoring.trainability_interval

    def begins_test(self, step: int) -> bool:
        """Whether a test of trainability is due at this step; if so, the next one is when an interval has passed."""
        due = self.test_interval > 0 and step // self.test_interval > self.test_begun_at // self.test_interval
        if due:
            self.test_begun_at = step
        return due

    def applied(self, change: messages.Change[object]) -> None:
        """The learner contains this entry of the journal now."""
        self.journal_position = change.journal_position

    def advance(self, request: messages.Train | messages.Skip) -> None:
        """The learner contains this batch of its producer's now, or passes over it."""
        producer = self.producer(request.producer)
        producer.epoch, producer.sequence = request.epoch, request.sequence
        producer.hashes.append((request.sequence, request.payload_hash))
        self.applied(request)

    def producer(self, name: str) -> ProducerState:
        """Where the producer stands, perhaps at the beginning."""
        producer = self.producers.get(name)
        if producer is None:
            producer = self.producers[name] = ProducerState.at(messages.Position(life=self.epoch_floor))
        return producer

    def sequence_of(self, name: str) -> int:
        """The producer's last one that the learner contains."""
        producer = self.producers.get(name)
        return producer.sequence if producer is not None else 0

    def forget(self, name: str) -> None:
        """Gives a producer's name free."""
        producer = self.producers.pop(name, None)
        if producer is not None:
            self.epoch_floor = max(self.epoch_floor, producer.epoch)

    def place(self, positions: Mapping[str, messages.Position], epoch_floor: int) -> None:
        """Where all its producers stand."""
        self.producers = {name: ProducerState.at(position) for name, position in positions.items()}
        self.epoch_floor = epoch_floor

    def stamp(self, samples: Sequence[PlasticitySample]) -> tuple[PackedSample, ...]:
        """The samples with the present time and the newest test, kept for the next checkpoint."""
        if not samples:
            return ()
        now = datetime.now(UTC)
        stamped = tuple(pack(SampleRecord(replace(sample, trainability=self.trainability), now)) for sample in samples)
        self.samples.extend(stamped)
        return stamped

    @property
    def report(self) -> messages.LearnerReport:
        return messages.LearnerReport(
            self.learner.spec,
            self.learner.engine,
            self.update_time,
            self.learner.progress,
            {name: producer.position for name, producer in self.producers.items()},
            self.journal_position,
            self.epoch_floor,
        )


def check_order(position: int, before: int) -> None:
    """Raises `EngineFault` unless the entry before the one to be applied, `before`, is the last that was applied."""
    if before != position:
        raise EngineFault(f"the change behind position {before} came when the learner was at {position}")


def check_sequence(sequence: int, request: messages.Train | messages.Skip) -> None:
    """Raises `SequenceGap` unless the batch follows its producer's last one, which is `sequence`."""
    if request.sequence != sequence + 1:  # one before it was refused here: nothing may overtake that
        raise SequenceGap(request.sequence, sequence + 1)
