"""Between wire messages and what users see: pure functions, nothing else knows both."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from cbp_client.arguments import invalid, text
from cbp_client.errors import ServerError
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
from cbp_proto import TensorError, decode_tensor, to_plain
from cbp_proto.plain import shown
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


def learner_name(learner_id: str) -> str:
    """The wire name of the learner that users call `learner_id`.

    Raises:
        InvalidArgument: that is no text.
    """
    return _NAME_PREFIX + text("learner_id", learner_id)


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


def _float32(tensor: tensor_pb2.Tensor) -> NDArray[np.float32]:
    try:
        return decode_tensor(tensor).astype(np.float32, copy=False)
    except TensorError as error:
        raise ServerError(f"outputs: the server sent no tensor: {error}", reason="INVALID_TENSOR") from error


def _wire_value(field: str, words: Mapping[NumberT, str], word: object) -> NumberT:
    for number, known in words.items():
        if word == known:
            return number
    raise invalid(field, f"must be one of {', '.join(words.values())}, not {shown(word)}")


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
