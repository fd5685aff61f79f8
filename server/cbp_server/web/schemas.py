"""What the HTTP API answers with, and how it is read off the records. Keys are those of the protobuf messages."""

import math
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from cbp import LayerPlasticity, LearnerProgress
from cbp import Trainability as TrainabilityRecord
from cbp.plasticity.samples import QUANTILES
from cbp_server.records.learners import CheckpointRecord, LearnerRecord, ProducerRecord
from cbp_server.records.learners import Quarantine as QuarantineRecord
from cbp_server.records.samples import SampleRecord


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


#: JSON has no infinity; what a diverging learner overflows to is null.
Number = Annotated[float | None, AfterValidator(_finite)]


class Quantile(BaseModel):
    quantile: float = Field(description="From 0 to 1.")
    value: Number


class Layer(BaseModel):
    """Metrics of one layer. One that does not apply to the layer, or that the probe is too small for, is null."""

    layer: str = Field(description="`hidden_0`, `hidden_1`, … from the input on, then `output`.")
    units: int
    mean_abs_weight: Number = Field(description="Mean of abs(w) over the incoming weights.")
    weight_norm: Number = Field(description="Frobenius norm of the incoming weights.")
    distance_from_init: Number = Field(description="Euclidean distance of the parameters from their first values.")
    gradient_norm: Number = Field(description="Euclidean norm of the loss gradient on the probe examples.")
    dormant_fraction: Number = Field(
        description="Share of units whose normalised mean activation is at most the dormant threshold."
    )
    dead_fraction: Number = Field(description="Share of units that are zero on every probe example.")
    saturated_fraction: Number = Field(
        description="Share of activations near the bounds of a saturating nonlinearity; null for others."
    )
    feature_norm: Number = Field(description="Mean Euclidean norm of the activations on one probe example.")
    effective_rank: Number = Field(description="Of the activations on the probe examples.")
    stable_rank: Number = Field(description="Of the activations on the probe examples.")
    srank: int | None = Field(description="Fewest singular values of the activations that hold 99 % of their sum.")
    gradient_rank: Number = Field(
        description="Effective rank of the gradients of the newest 32 probe examples, at most 32."
    )
    replacements: int | None = Field(description="Units replaced so far.")
    age_quantiles: list[Quantile] = Field(description="Age of the units, in steps.")
    utility_quantiles: list[Quantile] = Field(description="Bias-corrected utility of the units.")

    @classmethod
    def of(cls, layer: LayerPlasticity) -> "Layer":
        return cls(
            layer=layer.layer,
            units=layer.units,
            mean_abs_weight=layer.mean_abs_weight,
            weight_norm=layer.weight_norm,
            distance_from_init=layer.distance_from_init,
            gradient_norm=layer.gradient_norm,
            dormant_fraction=layer.dormant_fraction,
            dead_fraction=layer.dead_fraction,
            saturated_fraction=layer.saturated_fraction,
            feature_norm=layer.feature_norm,
            effective_rank=layer.effective_rank,
            stable_rank=layer.stable_rank,
            srank=layer.srank,
            gradient_rank=layer.gradient_rank,
            replacements=layer.replacements,
            age_quantiles=_quantiles(layer.age_quantiles),
            utility_quantiles=_quantiles(layer.utility_quantiles),
        )


class Trainability(BaseModel):
    """What a copy of the learner made of a fresh task of random targets, and what the network that it began as made of
    it. A loss is null if its network diverged."""

    step: int = Field(description="The learner's when it was copied.")
    loss: Number = Field(description="The copy's mean loss over its last pass through the task.")
    fresh_loss: Number = Field(description="That of the network that the learner began as.")
    chance_loss: Number = Field(description="That of the best constant prediction.")
    score: Number = Field(
        description="(chance_loss - loss) / (chance_loss - fresh_loss): 1 is as trainable as at the beginning, 0 no "
        "better than chance. Null if a network diverged, or if the task was too hard for the fresh one."
    )

    @classmethod
    def of(cls, tested: TrainabilityRecord) -> "Trainability":
        return cls(
            step=tested.step,
            loss=tested.loss,
            fresh_loss=tested.fresh_loss,
            chance_loss=tested.chance_loss,
            score=tested.score,
        )


class PlasticitySample(BaseModel):
    """Plasticity metrics, taken between two steps on the learner's most recent examples."""

    step: int
    examples: int
    layers: list[Layer]
    sample_time: datetime
    trainability: Trainability | None = Field(description="Its newest test; null without any.")

    @classmethod
    def of(cls, record: SampleRecord) -> "PlasticitySample":
        sample = record.sample
        return cls(
            step=sample.step,
            examples=sample.examples,
            layers=[Layer.of(layer) for layer in sample.layers],
            sample_time=record.time,
            trainability=None if sample.trainability is None else Trainability.of(sample.trainability),
        )


class Task(BaseModel):
    """A run of examples that carried the same label."""

    task: str
    first_step: int
    examples: int
    loss: Number = Field(description="Mean over the task's examples, each predicted before it was learnt.")
    accuracy: Number = Field(description="As the loss; null for regression.")


class Progress(BaseModel):
    step: int = Field(description="Optimizer updates made.")
    examples: int = Field(description="Examples learnt from.")
    pending_examples: int = Field(description="Examples that wait for enough others to make a step.")
    loss: Number = Field(description="Exponential average of the loss before each update; null before the first.")
    accuracy: Number = Field(description="As the loss; null for regression.")
    replacements: dict[str, int] = Field(description="Units replaced so far, by hidden layer.")
    task_count: int = Field(description="Tasks seen so far.")
    tasks: list[Task] = Field(description="The most recent tasks, oldest first; the last one may still be growing.")

    @classmethod
    def of(cls, progress: LearnerProgress) -> "Progress":
        return cls(
            step=progress.step,
            examples=progress.examples,
            pending_examples=progress.pending,
            loss=progress.loss,
            accuracy=progress.accuracy,
            replacements=dict(progress.replacements),
            task_count=progress.task_count,
            tasks=[
                Task(
                    task=task.task,
                    first_step=task.first_step,
                    examples=task.examples,
                    loss=task.loss,
                    accuracy=task.accuracy,
                )
                for task in progress.tasks
            ],
        )


class Producer(BaseModel):
    """How far a named source of batches has come."""

    producer: str
    epoch: int = Field(description="Counts the streams opened for this producer; only the newest one may write.")
    applied_sequence: int = Field(description="Every batch up to this one has changed the learner.")
    durable_sequence: int = Field(description="Every batch up to this one is in the journal, on disk.")

    @classmethod
    def of(cls, record: ProducerRecord) -> "Producer":
        return cls(
            producer=record.producer,
            epoch=record.epoch,
            applied_sequence=record.applied_sequence,
            durable_sequence=record.durable_sequence,
        )


class Checkpoint(BaseModel):
    """The newest checkpoint on disk."""

    journal_position: int = Field(description="Of the last entry that it contains.")
    step: int
    time: datetime
    size_bytes: int

    @classmethod
    def of(cls, record: CheckpointRecord) -> "Checkpoint":
        return cls(journal_position=record.position, step=record.step, time=record.time, size_bytes=record.size_bytes)


class Quarantine(BaseModel):
    """The batch that a learner could not learn. It predicts as before that batch, and trains once it is resumed."""

    journal_position: int = Field(description="Of the batch; 0 if it is not in the journal.")
    producer: str = Field(description="Whose batch it is.")
    sequence: int = Field(description="Which of its producer's batches.")
    reason: str = Field(description="What went wrong, for people.")
    quarantine_time: datetime

    @classmethod
    def of(cls, record: QuarantineRecord) -> "Quarantine":
        return cls(
            journal_position=record.position,
            producer=record.producer,
            sequence=record.sequence,
            reason=record.reason,
            quarantine_time=record.time,
        )


class Learner(BaseModel):
    """A named model that never stops training."""

    id: str = Field(description="The last part of the name.")
    name: str = Field(description="learners/{id}, as in gRPC.")
    uid: str = Field(description="Differs from that of any other learner, also of one created under the same id later.")
    etag: str = Field(description="Changes whenever the spec does.")
    state: str = Field(
        description="`active`; `unavailable` while its engine process is down or restoring it; `evicted`: idle, and "
        "out of memory until it is used; `quarantined`: predicts, and trains again once it is resumed; `deleted`: can "
        "be undeleted until `purge_time`."
    )
    durability: str = Field(description="What an acknowledged batch survives: `fsync`, `os` or `none`.")
    quarantine: Quarantine | None = Field(description="The batch that it could not learn; null if there is none.")
    journal_position: int = Field(description="Of the last entry in its journal.")
    engine: str = Field(description="What takes its steps: `compiled`, `torch` or `stacked`. The server chooses.")
    spec: dict[str, Any] = Field(description="What the learner is, every field filled in.")
    create_time: datetime
    update_time: datetime
    delete_time: datetime | None = Field(description="Null unless it is deleted.")
    purge_time: datetime | None = Field(description="When it will be removed for good; null unless it is deleted.")
    queued_batches: int = Field(description="Batches accepted and not yet applied.")
    checkpoint: Checkpoint | None = Field(description="Null before the first.")
    producers: list[Producer]
    progress: Progress
    plasticity: PlasticitySample | None = Field(description="The newest sample; null before the first.")

    @classmethod
    def of(cls, record: LearnerRecord) -> "Learner":
        newest = record.samples.newest
        return cls(
            id=record.learner_id,
            name=f"learners/{record.learner_id}",
            uid=record.uid,
            etag=record.etag,
            state=record.state.value,
            durability=record.durability.value,
            quarantine=None if record.quarantine is None else Quarantine.of(record.quarantine),
            journal_position=record.journal_position,
            engine=record.engine,
            spec=record.spec.to_plain(),
            create_time=record.create_time,
            update_time=record.update_time,
            delete_time=record.delete_time,
            purge_time=record.purge_time,
            queued_batches=record.queued_batches,
            checkpoint=None if record.checkpoint is None else Checkpoint.of(record.checkpoint),
            producers=[Producer.of(record.producers[name]) for name in sorted(record.producers)],
            progress=Progress.of(record.progress),
            plasticity=PlasticitySample.of(newest) if newest is not None else None,
        )


class LearnerPage(BaseModel):
    learners: list[Learner] = Field(description="In the order of their ids.")
    next_page_token: str = Field(description="For the next page; empty on the last one.")


class PlasticityHistory(BaseModel):
    samples: list[PlasticitySample] = Field(description="Oldest first; the server keeps a bounded number, in memory.")


class Health(BaseModel):
    status: str = Field(description="`ok` or `unavailable`.")
    reasons: list[str] = Field(description="Why not; empty if ok.")


class Engine(BaseModel):
    up: bool
    device: str
    restarts: int = Field(description="Since the server started.")
    steps: int = Field(description="Training steps since the server started.")
    train_seconds: float = Field(description="Time spent in them.")
    resident_bytes: int = Field(description="Memory of the engine process, 0 if not known.")


class Journal(BaseModel):
    """While it cannot be written, nothing is accepted."""

    up: bool = Field(description="Whether the last write succeeded.")
    since: datetime = Field(description="When that changed last; at first, when the server started.")
    reason: str = Field(description="Why it cannot be written; empty if it can.")


class Server(BaseModel):
    """The server as a whole."""

    version: str
    torch_version: str
    start_time: datetime
    time: datetime = Field(description="The server's clock now.")
    ready: bool
    reasons: list[str] = Field(description="Why it is not ready; empty if it is.")
    engine: Engine
    journal: Journal
    learners: dict[str, int] = Field(description="How many there are, by state.")
    quarantined: list[str] = Field(description="Ids of those that wait to be resumed; the first 100.")
    unreadable: dict[str, str] = Field(description="Learners that could not be restored, or shown, and why.")
    open_streams: int = Field(description="Train streams open.")
    queued_batches: int = Field(description="Batches accepted and not yet applied, over all learners.")
    steps: int = Field(description="Optimizer updates of all learners together, without deleted ones.")
    examples: int = Field(description="Examples learnt from, over all learners, without deleted ones.")


def _quantiles(values: tuple[float, ...] | None) -> list[Quantile]:
    return [Quantile(quantile=quantile, value=value) for quantile, value in zip(QUANTILES, values or (), strict=False)]
