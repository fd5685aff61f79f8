"""Between wire messages and what users see: pure functions, nothing else knows both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import ArrayLike, NDArray

from cbp_client.errors import FieldViolation, InvalidArgument
from cbp_client.types import (
    BatchResult,
    Checkpoint,
    Durability,
    ExportFormat,
    LayerPlasticity,
    LearnerInfo,
    LearnerProgress,
    LearnerState,
    PlasticitySample,
    Prediction,
    ProducerPosition,
    Quarantine,
    TaskRecord,
    Trainability,
    WatchedLearner,
    WatchUpdate,
)
from cbp_proto import TensorError, decode_tensor, encode_batch, encode_tensor, to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, tensor_pb2, training_service_pb2

NumberT = TypeVar("NumberT", bound=int)

_NAME_PREFIX = "learners/"
_STATES: dict[int, LearnerState] = {
    learner_pb2.Learner.STATE_ACTIVE: "active",
    learner_pb2.Learner.STATE_UNAVAILABLE: "unavailable",
    learner_pb2.Learner.STATE_EVICTED: "evicted",
    learner_pb2.Learner.STATE_QUARANTINED: "quarantined",
    learner_pb2.Learner.STATE_DELETED: "deleted",
}
_DURABILITIES: dict[learner_pb2.Durability.ValueType, Durability] = {
    learner_pb2.DURABILITY_FSYNC: "fsync",
    learner_pb2.DURABILITY_OS: "os",
    learner_pb2.DURABILITY_NONE: "none",
}
_FORMATS: dict[learner_service_pb2.ExportLearnerRequest.Format.ValueType, ExportFormat] = {
    learner_service_pb2.ExportLearnerRequest.FORMAT_SAFETENSORS: "safetensors",
    learner_service_pb2.ExportLearnerRequest.FORMAT_ONNX: "onnx",
    learner_service_pb2.ExportLearnerRequest.FORMAT_TORCH_EXPORT: "torch_export",
}

# Where unsigned integers of so many bytes go, since the wire has none beyond one byte.
_SIGNED: dict[int, type[np.generic]] = {2: np.int32, 4: np.int64, 8: np.float32}


def learner_name(learner_id: str) -> str:
    """The wire name of the learner that users call `learner_id`."""
    return _NAME_PREFIX + learner_id


def learner_id(name: str) -> str:
    """The id within a wire name."""
    return name.removeprefix(_NAME_PREFIX)


def producer_name(learner_id: str, producer: str) -> str:
    """The wire name of a learner's producer."""
    return f"{learner_name(learner_id)}/producers/{producer}"


def checkpoint_name(learner_id: str, number: int) -> str:
    """The wire name of a learner's checkpoint."""
    return f"{learner_name(learner_id)}/checkpoints/{number}"


def durability(value: Durability | None) -> learner_pb2.Durability.ValueType:
    """The wire's word for a durability; unspecified for None.

    Raises:
        InvalidArgument: there is no such durability.
    """
    return learner_pb2.DURABILITY_UNSPECIFIED if value is None else _wire_value("durability", _DURABILITIES, value)


def export_format(value: ExportFormat) -> learner_service_pb2.ExportLearnerRequest.Format.ValueType:
    """The wire's word for a format.

    Raises:
        InvalidArgument: there is no such format.
    """
    return _wire_value("format", _FORMATS, value)


def layers(given: str | int | Sequence[str | int]) -> list[str]:
    """Hidden layers as the wire names them: `all`, `first`, indices and names."""
    return [str(layer) for layer in ([given] if isinstance(given, str | int) else given)]


def by_layer(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of the layers, which the wire does not keep: hidden_2 before hidden_10."""
    return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))


def learner_info(learner: learner_pb2.Learner) -> LearnerInfo:
    """The record of a learner."""
    return LearnerInfo(
        id=learner_id(learner.name),
        uid=learner.uid,
        spec=to_plain(learner.spec),
        etag=learner.etag,
        state=_STATES.get(learner.state, "unavailable"),
        create_time=_time(learner.create_time),
        update_time=_time(learner.update_time),
        progress=_progress(learner.progress),
        producers=tuple(
            ProducerPosition(item.producer, item.epoch, item.applied_sequence, item.durable_sequence)
            for item in learner.producers
        ),
        durability=_DURABILITIES.get(learner.durability, "fsync"),
        journal_position=learner.journal_position,
        engine=learner.engine,
        quarantine=_quarantine(learner.quarantine) if learner.HasField("quarantine") else None,
        delete_time=_time(learner.delete_time) if learner.HasField("delete_time") else None,
        purge_time=_time(learner.purge_time) if learner.HasField("purge_time") else None,
    )


def checkpoint(checkpoint: learner_pb2.Checkpoint) -> Checkpoint:
    """The record of a checkpoint."""
    return Checkpoint(
        number=int(checkpoint.name.rpartition("/")[2]),
        journal_position=checkpoint.journal_position,
        step=checkpoint.step,
        examples=checkpoint.examples,
        size_bytes=checkpoint.size_bytes,
        create_time=_time(checkpoint.create_time),
        pinned=checkpoint.pinned,
    )


def plasticity_sample(sample: learner_pb2.PlasticitySample) -> PlasticitySample:
    """The record of a plasticity sample."""
    return PlasticitySample(
        step=sample.step,
        examples=sample.examples,
        time=_time(sample.sample_time),
        layers=tuple(_layer(layer) for layer in sample.layers),
        trainability=_trainability(sample.trainability) if sample.HasField("trainability") else None,
    )


def watch_update(response: learner_service_pb2.WatchLearnersResponse) -> WatchUpdate:
    """The record of one message of a watch."""
    return WatchUpdate(
        learners=tuple(
            WatchedLearner(
                info=learner_info(watched.learner),
                plasticity=plasticity_sample(watched.plasticity) if watched.HasField("plasticity") else None,
            )
            for watched in response.learners
        ),
        deleted=tuple(learner_id(name) for name in response.deleted),
    )


def prediction(response: training_service_pb2.PredictResponse) -> Prediction:
    """The record of a prediction."""
    return Prediction(outputs=_float32(response.outputs), step=response.step)


def batch_result(result: training_service_pb2.BatchResult, *, number: int, task: str) -> BatchResult:
    """The record of what the batch with this number and task did."""
    return BatchResult(
        number=number,
        sequence=result.sequence,
        task=task,
        step=result.step,
        steps=result.steps,
        examples=result.examples,
        pending_examples=result.pending_examples,
        loss=_optional(result, "loss"),
        accuracy=_optional(result, "accuracy"),
        outputs=_float32(result.outputs) if result.HasField("outputs") else None,
        acknowledged=not result.duplicate,
    )


def invalid(field: str, description: str, reason: str = "INVALID_REQUEST") -> InvalidArgument:
    """The error for one field of a request that is not even sent."""
    violation = FieldViolation(field, description)
    return InvalidArgument(f"{field}: {description}", reason=reason, violations=[violation])


def features_tensor(features: ArrayLike) -> tensor_pb2.Tensor:
    """Features [N, …]. Floats beyond single precision go as float32, which is what learners compute with;
    half precision, booleans and integers go as they are, or in the next type that the wire has."""
    return encode_tensor(_features(features))


def targets_tensor(targets: ArrayLike) -> tensor_pb2.Tensor:
    """Targets: integers and booleans as int64 labels, all other numbers as float32."""
    return encode_tensor(_targets(targets))


@dataclass(frozen=True)
class Examples:
    """Arrays as they go into batches; made by `examples_of`."""

    features: NDArray[np.generic]
    targets: NDArray[np.generic]
    weights: NDArray[np.generic] | None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self.features.nbytes + self.targets.nbytes + (0 if self.weights is None else self.weights.nbytes)

    def parts(self, count: int) -> Iterator["Examples"]:
        """Parts of so many examples; the last may have fewer."""
        for start in range(0, len(self), count):
            rows = slice(start, start + count)
            yield Examples(
                self.features[rows], self.targets[rows], None if self.weights is None else self.weights[rows]
            )

    def encode(self, *, task: str, return_outputs: bool) -> "EncodedBatch":
        """The message of one batch, which shares nothing with the arrays."""
        encoded = encode_batch(self.features, self.targets, self.weights, task=task, return_outputs=return_outputs)
        return EncodedBatch(encoded, len(self), task)


@dataclass(frozen=True)
class EncodedBatch:
    """A `TrainBatch` on its way.

    Attributes:
        encoded: serialised, without the sequence.
        examples: in it.
        task: in it.
    """

    encoded: bytes
    examples: int
    task: str


def examples_of(features: ArrayLike, targets: ArrayLike, weights: ArrayLike | None) -> Examples:
    """What is sent for the arrays that a user gives.

    Raises:
        InvalidArgument: something is not an array of numbers, or the lengths differ.
    """
    examples = Examples(_features(features), _targets(targets), None if weights is None else _weights(weights))
    for field, array in (("targets", examples.targets), ("weights", examples.weights)):
        if array is not None and len(array) != len(examples):
            raise _invalid(field, f"{len(array)} {field} for {len(examples)} examples")
    return examples


def _features(features: ArrayLike) -> NDArray[np.generic]:
    array = _numbers(features, "features")
    if array.ndim < 2:
        raise _invalid("features", f"must be [N, …], one row for each example, not {list(array.shape)}")
    if array.dtype.kind == "u":
        return array.astype(_SIGNED.get(array.dtype.itemsize, array.dtype), copy=False)
    return array if array.dtype == np.float16 else _narrowed(array)


def _targets(targets: ArrayLike) -> NDArray[np.generic]:
    array = _numbers(targets, "targets")
    if array.ndim < 1:
        raise _invalid("targets", "must be [N] or [N, out_features], one row for each example, not a single value")
    return array.astype(np.int64, copy=False) if array.dtype.kind in "iub" else _narrowed(array)


def _weights(weights: ArrayLike) -> NDArray[np.generic]:
    array = _numbers(weights, "weights")
    if array.ndim != 1:
        raise _invalid("weights", f"must be [N], one for each example, not {list(array.shape)}")
    return array.astype(np.float32, copy=False)


def _numbers(values: ArrayLike, field: str) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.asarray(values)
    except ValueError as error:  # ragged nesting
        raise _invalid(field, f"is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise _invalid(field, f"must be numbers, not {array.dtype}")
    return array


def _narrowed(array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.dtype.kind != "f" or array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and the server names it
        return array.astype(np.float32, copy=False)


def _float32(tensor: tensor_pb2.Tensor) -> NDArray[np.float32]:
    try:
        return decode_tensor(tensor).astype(np.float32, copy=False)
    except TensorError as error:
        raise _invalid("outputs", f"the server sent no tensor: {error}") from error


def _invalid(field: str, description: str) -> InvalidArgument:
    return invalid(field, description, reason="INVALID_BATCH")


def _wire_value(field: str, words: Mapping[NumberT, str], word: str) -> NumberT:
    for number, known in words.items():
        if word == known:
            return number
    raise invalid(field, f"must be one of {', '.join(words.values())}, not {word}")


def _quarantine(quarantine: learner_pb2.Quarantine) -> Quarantine:
    return Quarantine(
        journal_position=quarantine.journal_position,
        producer=quarantine.producer,
        sequence=quarantine.sequence,
        reason=quarantine.reason,
        time=_time(quarantine.quarantine_time),
    )


def _progress(progress: learner_pb2.LearnerProgress) -> LearnerProgress:
    return LearnerProgress(
        step=progress.step,
        examples=progress.examples,
        pending_examples=progress.pending_examples,
        loss=_optional(progress, "loss"),
        accuracy=_optional(progress, "accuracy"),
        replacements=by_layer(progress.replacements),
        tasks=tuple(
            TaskRecord(item.task, item.first_step, item.examples, _optional(item, "loss"), _optional(item, "accuracy"))
            for item in progress.tasks
        ),
        task_count=progress.task_count,
    )


def _layer(layer: learner_pb2.LayerPlasticity) -> LayerPlasticity:
    return LayerPlasticity(
        layer=layer.layer,
        units=layer.units,
        mean_abs_weight=_optional(layer, "mean_abs_weight"),
        weight_norm=_optional(layer, "weight_norm"),
        distance_from_init=_optional(layer, "distance_from_init"),
        gradient_norm=_optional(layer, "gradient_norm"),
        dormant_fraction=_optional(layer, "dormant_fraction"),
        dead_fraction=_optional(layer, "dead_fraction"),
        effective_rank=_optional(layer, "effective_rank"),
        stable_rank=_optional(layer, "stable_rank"),
        replacements=_optional(layer, "replacements"),
        age_quantiles={item.quantile: item.value for item in layer.age_quantiles},
        utility_quantiles={item.quantile: item.value for item in layer.utility_quantiles},
        saturated_fraction=_optional(layer, "saturated_fraction"),
        feature_norm=_optional(layer, "feature_norm"),
        srank=_optional(layer, "srank"),
        gradient_rank=_optional(layer, "gradient_rank"),
    )


def _trainability(tested: learner_pb2.Trainability) -> Trainability:
    return Trainability(
        step=tested.step,
        loss=_optional(tested, "loss"),
        fresh_loss=_optional(tested, "fresh_loss"),
        chance_loss=tested.chance_loss,
        score=_optional(tested, "score"),
    )


def _optional(message: Message, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
