"""What the client returns: frozen records, arrays in numpy."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

LearnerState = Literal["active", "unavailable", "evicted", "quarantined", "deleted"]
Durability = Literal["fsync", "os", "none"]
ExportFormat = Literal["safetensors", "onnx", "torch_export"]


@dataclass(frozen=True)
class TaskRecord:
    """A run of examples that carried the same label.

    Attributes:
        loss: mean over the task's examples, each predicted before it was learnt.
        accuracy: likewise; None for regression.
    """

    task: str
    first_step: int
    examples: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class LearnerProgress:
    """How far a learner has come.

    Attributes:
        step: optimizer updates made.
        examples: examples learnt from.
        pending_examples: examples that wait for enough others to make a step of batch_size.
        loss: exponential average of the loss of predictions made before each update; None before the first.
        accuracy: likewise; None for regression.
        replacements: units replaced so far, by hidden layer.
        tasks: the most recent tasks, oldest first; the last one may still be growing.
        task_count: tasks seen so far.
    """

    step: int
    examples: int
    pending_examples: int
    loss: float | None
    accuracy: float | None
    replacements: dict[str, int]
    tasks: tuple[TaskRecord, ...]
    task_count: int


@dataclass(frozen=True)
class ProducerPosition:
    """How far a producer has come with a learner.

    Attributes:
        epoch: counts the streams opened for the producer; only the newest may write.
        applied_sequence: every batch up to this one has changed the learner.
        durable_sequence: every batch up to this one is on the server's disk.
    """

    producer: str
    epoch: int
    applied_sequence: int
    durable_sequence: int


@dataclass(frozen=True)
class Quarantine:
    """The batch that a learner could not learn, for which it does not train until it is resumed.

    Attributes:
        journal_position: where the batch is in the learner's journal.
        producer: whose batch it is.
        sequence: which of the producer's.
        reason: what went wrong, for people.
    """

    journal_position: int
    producer: str
    sequence: int
    reason: str
    time: datetime


@dataclass(frozen=True)
class Checkpoint:
    """A learner's whole state at one position of its journal, kept by the server.

    Attributes:
        number: counts the learner's checkpoints from 1.
        size_bytes: of the file.
        pinned: kept until it is deleted; others are removed when newer ones have taken their place.
    """

    number: int
    journal_position: int
    step: int
    examples: int
    size_bytes: int
    create_time: datetime
    pinned: bool


@dataclass(frozen=True)
class CheckpointList:
    """A learner's checkpoints, newest first; iterates over them.

    Attributes:
        first_restorable_position: the learner can be restored to every journal position from here on,
        last_restorable_position: up to here, besides those of the checkpoints.
    """

    checkpoints: tuple[Checkpoint, ...]
    first_restorable_position: int
    last_restorable_position: int

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, index: int) -> Checkpoint:
        return self.checkpoints[index]


@dataclass(frozen=True)
class LearnerInfo:
    """A learner as the server described it at one moment.

    Attributes:
        id: the name that users type; `learners/{id}` on the wire.
        uid: differs from that of any other learner, also of one created under the same id later.
        spec: network, loss, optimizer, batch_size, seed, precision, resets, methods and monitoring, every field
            filled in.
        etag: changes whenever the spec does.
        state: "active"; "unavailable" while its engine process starts; "evicted" while it is idle and out of memory,
            which the first use ends; "quarantined", see below; "deleted", until it is undeleted or purged.
        durability: what an acknowledged batch survives: "fsync" power loss, "os" a crash of the server, "none" nothing
            before the next checkpoint.
        journal_position: of the last entry in the learner's journal.
        engine: what takes the learner's steps: "compiled", "torch", "stacked" or "module".
        quarantine: why it does not train; None unless the state is "quarantined".
        delete_time: None unless it is deleted.
        purge_time: when a deleted learner is removed for good.
    """

    id: str
    uid: str
    spec: dict[str, Any]
    etag: str
    state: LearnerState
    create_time: datetime
    update_time: datetime
    progress: LearnerProgress
    producers: tuple[ProducerPosition, ...]
    durability: Durability
    journal_position: int
    engine: str
    quarantine: Quarantine | None
    delete_time: datetime | None
    purge_time: datetime | None

    @property
    def tasks(self) -> tuple[TaskRecord, ...]:
        """The most recent tasks, oldest first."""
        return self.progress.tasks


@dataclass(frozen=True)
class LayerPlasticity:
    """Plasticity metrics of one layer; a metric that does not apply, or could not be measured, is None.

    Attributes:
        units: units of the layer.
        mean_abs_weight: mean of abs(w) over the incoming weights.
        weight_norm: Frobenius norm of the incoming weights.
        distance_from_init: Euclidean distance of weights and biases from their initial values.
        gradient_norm: Euclidean norm of the loss gradient on the probe examples.
        dormant_fraction: share of units whose normalised mean activation is at most the dormant threshold.
        dead_fraction: share of units that are zero on every probe example.
        effective_rank: of the layer's activations on the probe examples.
        stable_rank: likewise.
        replacements: units replaced so far.
        age_quantiles: age of the units in steps, by quantile.
        utility_quantiles: bias-corrected utility of the units, by quantile.
        saturated_fraction: share of the activations near the bounds of a saturating nonlinearity.
        feature_norm: mean Euclidean norm of the activations on one probe example.
        srank: fewest singular values of the activations that hold 99 % of the sum of all.
        gradient_rank: effective rank of the gradients of the newest 32 probe examples, at most 32.
    """

    layer: str
    units: int
    mean_abs_weight: float | None
    weight_norm: float | None
    distance_from_init: float | None
    gradient_norm: float | None
    dormant_fraction: float | None
    dead_fraction: float | None
    effective_rank: float | None
    stable_rank: float | None
    replacements: int | None
    age_quantiles: dict[float, float]
    utility_quantiles: dict[float, float]
    saturated_fraction: float | None
    feature_norm: float | None
    srank: int | None
    gradient_rank: float | None


@dataclass(frozen=True)
class Trainability:
    """What a copy of the learner made of a fresh task of random targets, against the network that it began as.

    Attributes:
        step: the learner's when it was copied.
        loss: the copy's mean loss over its last pass through the task; None if it diverged.
        fresh_loss: likewise of the network that the learner began as.
        chance_loss: of the best constant prediction.
        score: 1 is as trainable as at the beginning, 0 no better than chance; None if a network diverged, or if the
            task was too hard for the fresh one.
    """

    step: int
    loss: float | None
    fresh_loss: float | None
    chance_loss: float
    score: float | None


@dataclass(frozen=True)
class PlasticitySample:
    """Plasticity metrics of a learner between two steps: hidden layers from the input on, then the output layer.

    Attributes:
        trainability: its newest test, of this step or an earlier one; None without any.
    """

    step: int
    examples: int
    time: datetime
    layers: tuple[LayerPlasticity, ...]
    trainability: Trainability | None


@dataclass(frozen=True)
class WatchedLearner:
    """A learner that has changed; `plasticity` is None before its first sample."""

    info: LearnerInfo
    plasticity: PlasticitySample | None


@dataclass(frozen=True)
class WatchUpdate:
    """What has changed since the update before; the first one holds every watched learner.

    Attributes:
        deleted: ids of the learners that are gone.
    """

    learners: tuple[WatchedLearner, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Outputs [N, out_features] float32 for N examples, made with the state after `step` updates. numpy takes it for
    its outputs."""

    outputs: NDArray[np.float32]
    step: int

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        wanted = self.outputs.dtype if dtype is None else np.dtype(dtype)
        if copy is False and wanted != self.outputs.dtype:
            raise ValueError(f"outputs are {self.outputs.dtype}, so they cannot be {wanted} without a copy")
        return self.outputs.astype(wanted, copy=bool(copy))

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] the class with the largest output; for classifiers."""
        labels: NDArray[np.int64] = np.argmax(self.outputs, axis=1)
        return labels

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """[N, out_features] softmax of the outputs; for learners whose loss is cross_entropy."""
        exponentials = np.exp(self.outputs - self.outputs.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities


@dataclass(frozen=True)
class BatchResult:
    """What a batch did to its learner.

    Attributes:
        number: the `Ticket.number` that `send` returned for the batch.
        sequence: the number under which the server applied it.
        task: the label that it was sent with.
        step: the learner's step after it.
        steps: steps made with it.
        examples: examples that those steps learnt from; examples left waiting by earlier batches come first.
        pending_examples: examples now waiting for the next batch.
        loss: mean over `examples`, each predicted before it was learnt; None where there are none.
        accuracy: likewise; None for regression.
        outputs: [examples, out_features] raw outputs before each update, if the stream asked for them.
        acknowledged: False where the batch was applied once, but a lost connection took its result along; then all
            of the above from `step` on is 0 or None.
    """

    number: int
    sequence: int
    task: str
    step: int
    steps: int
    examples: int
    pending_examples: int
    loss: float | None
    accuracy: float | None
    outputs: NDArray[np.float32] | None
    acknowledged: bool = True


@dataclass(frozen=True)
class StreamSummary:
    """Running totals of a stream.

    Attributes:
        batches: batches applied.
        examples: examples learnt from, as far as results came back.
        steps: optimizer updates made with them.
        loss: mean over the examples, each predicted before it was learnt; None before the first.
        accuracy: likewise; None for regression.
        rejected: batches that the server did not accept.
        reconnections: times that the stream was opened again after its connection was lost.
    """

    batches: int = 0
    examples: int = 0
    steps: int = 0
    loss: float | None = None
    accuracy: float | None = None
    rejected: int = 0
    reconnections: int = 0
