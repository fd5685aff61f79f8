"""Messages to domain values and back. Pure; nothing here decides about learners."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import numpy as np
import xxhash
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from cbp import Batch, BatchError, FieldViolation, LayerPlasticity, LearnerSpec, SpecError, Trainability
from cbp.errors import shown
from cbp.plasticity.samples import QUANTILES
from cbp_proto import (
    PlainError,
    TensorError,
    TensorMessage,
    WireBatch,
    WireTensor,
    decode_tensor,
    encode_tensor,
    from_plain,
    read_batch,
    to_plain,
)
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2, tensor_pb2, training_service_pb2
from cbp_server.engine.messages import TrainReport
from cbp_server.errors import InvalidRequest
from cbp_server.limits import Limits, check_prediction, check_spec, check_training
from cbp_server.records.learners import Durability, LearnerRecord, LearnerState, Quarantine
from cbp_server.records.samples import SampleRecord
from cbp_server.rpc.errors import brief_description
from cbp_server.store.catalog import StoredCheckpoint
from cbp_server.streams.sessions import Accepted, IncomingBatch, Rejected

_COLLECTION = "learners/"
_PRESETS = ("all", "first", "none")
_WHOLE_SPEC = ("*", "spec")
_DURABILITY = "durability"
#: In a path, the kind of network stands where a plain specification has none.
_NETWORK_KINDS = frozenset(spec_pb2.Network.DESCRIPTOR.fields_by_name)
_UPDATABLE = {"optimizer", "resets", "monitoring"}
#: In bytes; one of 64 layers with a rate for each has about 2000.
_LARGEST_SPEC = 2**16
_TENSORS = ("features", "targets", "weights")
_FLOAT32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)
_STATES = {
    LearnerState.ACTIVE: learner_pb2.Learner.STATE_ACTIVE,
    LearnerState.UNAVAILABLE: learner_pb2.Learner.STATE_UNAVAILABLE,
    LearnerState.EVICTED: learner_pb2.Learner.STATE_EVICTED,
    LearnerState.QUARANTINED: learner_pb2.Learner.STATE_QUARANTINED,
    LearnerState.DELETED: learner_pb2.Learner.STATE_DELETED,
}
_DURABILITIES = {
    Durability.FSYNC: learner_pb2.DURABILITY_FSYNC,
    Durability.OS: learner_pb2.DURABILITY_OS,
    Durability.NONE: learner_pb2.DURABILITY_NONE,
}
_CHECKPOINTS = "checkpoints/"
_PRODUCERS = "producers/"
_FORMATS: dict[int, str] = {
    learner_service_pb2.ExportLearnerRequest.FORMAT_UNSPECIFIED: "safetensors",
    learner_service_pb2.ExportLearnerRequest.FORMAT_SAFETENSORS: "safetensors",
    learner_service_pb2.ExportLearnerRequest.FORMAT_ONNX: "onnx",
    learner_service_pb2.ExportLearnerRequest.FORMAT_TORCH_EXPORT: "torch_export",
}


def learner_id_of(name: str, field: str) -> str:
    """The id in a resource name; `field` is where the name stood in the request."""
    learner_id = name.removeprefix(_COLLECTION)
    if not name.startswith(_COLLECTION) or not learner_id:
        raise InvalidRequest(FieldViolation(field, f"must have the form learners/{{learner_id}}, not {shown(name)}"))
    return learner_id


def learner_name(learner_id: str) -> str:
    return f"{_COLLECTION}{learner_id}"


def checkpoint_of(name: str, field: str) -> tuple[str, int]:
    """The learner's id and the checkpoint's number in a resource name."""
    learner, _, number = name.removeprefix(_COLLECTION).partition(f"/{_CHECKPOINTS}")
    if not name.startswith(_COLLECTION) or not learner or not re.fullmatch(r"[1-9][0-9]{0,17}", number):
        description = f"must have the form learners/{{learner_id}}/checkpoints/{{number}}, not {shown(name)}"
        raise InvalidRequest(FieldViolation(field, description))
    return learner, int(number)


def producer_of(name: str, field: str) -> tuple[str, str]:
    """The learner's id and the producer in a resource name; slashes may be in the producer's own name."""
    learner, _, producer = name.removeprefix(_COLLECTION).partition(f"/{_PRODUCERS}")
    if not name.startswith(_COLLECTION) or not learner or not producer:
        description = f"must have the form learners/{{learner_id}}/producers/{{producer}}, not {shown(name)}"
        raise InvalidRequest(FieldViolation(field, description))
    return learner, producer


def durability_of(value: int, field: str) -> Durability | None:
    """None if it is left to the server."""
    if value == learner_pb2.DURABILITY_UNSPECIFIED:
        return None
    for durability, number in _DURABILITIES.items():
        if number == value:
            return durability
    raise InvalidRequest(FieldViolation(field, f"is no Durability: {value}"))


def export_format(value: int) -> str:
    if value not in _FORMATS:
        raise InvalidRequest(FieldViolation("format", f"is no Format: {value}"))
    return _FORMATS[value]


def updated_durability(request: learner_service_pb2.UpdateLearnerRequest) -> tuple[Durability | None, FieldMask, bool]:
    """The durability that an update asks for, the mask without it, and whether it asks for anything else."""
    wanted = durability_of(request.learner.durability, "learner.durability")
    paths = list(request.update_mask.paths)
    if not paths:
        return wanted, FieldMask(), True
    named = _DURABILITY in paths
    if named and wanted is None:
        wanted = Durability.FSYNC  # the default
    rest = FieldMask(paths=[path for path in paths if path != _DURABILITY])
    return wanted if named or "*" in paths else None, rest, bool(rest.paths)


# -- specs --


def spec_from_message(message: spec_pb2.LearnerSpec, limits: Limits) -> LearnerSpec:
    """Raises `SpecError` with the violations, also if it claims more than the limits allow."""
    spec = LearnerSpec.parse(_plain_spec(message))
    check_spec(spec, limits)
    return spec


def spec_to_message(spec: LearnerSpec) -> spec_pb2.LearnerSpec:
    return from_plain(spec.to_plain(), spec_pb2.LearnerSpec)


def check_imported(spec: LearnerSpec, limits: Limits) -> None:
    """Raises `SpecError` if a spec that came in no message claims more than the limits allow, or than one can say."""
    check_spec(spec, limits)
    try:
        spec_to_message(spec)
    except PlainError as error:
        raise SpecError([FieldViolation(error.field, error.description)]) from error


def revised_spec(present: LearnerSpec, changes: spec_pb2.LearnerSpec, mask: FieldMask, limits: Limits) -> LearnerSpec:
    """`present` with the fields that `mask` names taken from `changes`; named but not set there means the default.

    Without a mask, every field set in `changes` is taken. `*` and `spec` name every field: those that can be updated
    are replaced altogether, the others must be as they are, or not set.

    Raises:
        InvalidRequest: a path that is no field of a learner's spec.
        SpecError: the spec that comes out is wrong.
    """
    plain, given = present.to_plain(), _plain_spec(changes)
    paths = set(mask.paths)
    for path in sorted(paths - set(_WHOLE_SPEC)):
        if not _is_spec_path(path):
            description = (
                f"{shown(path)} is not a field of a learner's spec, like spec.resets.layers, nor durability or '*'"
            )
            raise InvalidRequest(FieldViolation("update_mask", description))
    if not paths:
        plain = _merged(plain, given)
    elif not paths.isdisjoint(_WHOLE_SPEC):
        plain = _merged({key: plain[key] for key in plain.keys() - _UPDATABLE}, given)
        plain["optimizer"] = {"kind": present.optimizer.kind} | given.get("optimizer", {})
    else:
        for path in sorted(paths):  # what contains another comes before it
            _copy_field(plain, given, [part for part in path.split(".")[1:] if part not in _NETWORK_KINDS])
    present.check_kinds(plain)
    spec = LearnerSpec.parse(plain)
    check_spec(spec, limits)
    return spec


def _is_spec_path(path: str) -> bool:
    descriptor = spec_pb2.LearnerSpec.DESCRIPTOR
    return path.startswith("spec.") and FieldMask(paths=[path.removeprefix("spec.")]).IsValidForDescriptor(descriptor)


def _plain_spec(message: spec_pb2.LearnerSpec) -> dict[str, Any]:
    if (size := message.ByteSize()) > _LARGEST_SPEC:  # before millions of layers or names are looked at
        raise SpecError([FieldViolation("spec", f"has {size} bytes, at most {_LARGEST_SPEC} are allowed")])
    plain = to_plain(message)
    layers = plain.get("resets", {}).get("layers")
    if layers is not None and len(layers) == 1 and layers[0] in _PRESETS:
        plain["resets"]["layers"] = layers[0]
    return plain


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = (
            isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "layer_replacement_rates"
        )
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _copy_field(target: dict[str, Any], source: Mapping[str, Any], path: list[str]) -> None:
    *parents, leaf = path
    for part in parents:
        target = target.setdefault(part, {})
        source = source.get(part) or {}
    if leaf in source:
        target[leaf] = source[leaf]
    else:
        target.pop(leaf, None)


# -- batches --


def incoming_batch(received: WireBatch, limits: Limits) -> IncomingBatch:
    def validate(spec: LearnerSpec) -> Batch:
        return _batch(received, spec, limits)

    return IncomingBatch(
        sequence=received.sequence,
        payload_hash=_payload_hash(received),
        payload=cast(bytes, received.encoded),  # databases and checksums take either
        return_outputs=received.return_outputs,
        validate=validate,
    )


def journaled_batch(payload: bytes, spec: LearnerSpec) -> Batch:
    """The batch in an entry of the journal: its values were checked when it was accepted, and are not once more where
    nothing has to be converted. Raises `BatchError` if it does not fit the learner."""
    received = read_batch(payload)
    if received.weights is None:
        features, targets = (_array(getattr(received, field), field, []) for field in _TENSORS[:2])
        if _is_as_learnt(features, targets, spec):
            return Batch(
                features=cast(NDArray[np.float32], features),
                targets=cast(NDArray[np.int64], targets),
                weights=None,
                task=received.task,
            )
    return _batch(received, spec, limits=None)


def _is_as_learnt(features: NDArray[np.generic], targets: NDArray[np.generic], spec: LearnerSpec) -> bool:
    count, width = len(features) if features.ndim else 0, spec.network.out_features
    wanted = ((count,), _INT64) if spec.loss.kind == "cross_entropy" else ((count, width), _FLOAT32)
    return (
        count > 0
        and (features.shape, features.dtype) == ((count, *spec.network.input_shape), _FLOAT32)
        and (targets.shape, targets.dtype) == wanted
    )


def _batch(received: WireBatch, spec: LearnerSpec, limits: Limits | None) -> Batch:
    violations: list[FieldViolation] = []
    features = _array(received.features, "features", violations)
    targets = _array(received.targets, "targets", violations)
    weights = None
    if received.weights is not None:
        weights = _array(received.weights, "weights", violations)
    if violations:
        raise BatchError(violations)
    if limits is not None:
        examples = len(features) if features.ndim else 0
        check_training(spec, examples, limits, return_outputs=received.return_outputs)
    return Batch.validate(spec, features, targets, weights, received.task)


def features_of(tensor: tensor_pb2.Tensor, spec: LearnerSpec, limits: Limits) -> NDArray[np.generic]:
    """Raises `BatchError` if the message describes no tensor, or more examples than one prediction may have."""
    violations: list[FieldViolation] = []
    features = _array(tensor, "features", violations)
    if violations:
        raise BatchError(violations)
    check_prediction(spec, len(features) if features.ndim else 0, limits)
    return features


def _array(tensor: TensorMessage, field: str, violations: list[FieldViolation]) -> NDArray[np.generic]:
    try:
        return decode_tensor(tensor)
    except TensorError as error:
        violations.append(FieldViolation(field, str(error)))
        return np.empty(0)


def _payload_hash(received: WireBatch) -> str:
    """Equal for equal examples, whatever the sequence and the wish for outputs; tells mistakes, not forgeries."""
    digest = xxhash.xxh3_128(received.task.encode())
    for tensor in (received.features, received.targets, received.weights or WireTensor()):
        # Shapes of more dimensions are refused, however many millions they name.
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def acknowledgement(
    epoch: int, applied_sequence: int, durable_sequence: int, batches: Iterable[Accepted]
) -> training_service_pb2.TrainResponse:
    """Cumulative positions and the results of `batches`, all of them applied."""
    results = [_batch_result(batch) for batch in batches]
    return training_service_pb2.TrainResponse(
        acknowledgement=training_service_pb2.Acknowledgement(
            epoch=epoch, applied_sequence=applied_sequence, durable_sequence=durable_sequence, results=results
        ),
        credits=len(results),
    )


def _batch_result(batch: Accepted) -> training_service_pb2.BatchResult:
    report: TrainReport | None = batch.applied.result() if batch.applied is not None else None
    if batch.duplicate or report is None:
        step = report.step if report is not None else 0
        return training_service_pb2.BatchResult(sequence=batch.sequence, step=step, duplicate=True)
    result = report.result
    return training_service_pb2.BatchResult(
        sequence=batch.sequence,
        step=report.step,
        steps=result.steps,
        examples=result.examples,
        pending_examples=result.pending,
        loss=result.loss,
        accuracy=result.accuracy,
        outputs=encode_tensor(result.outputs) if result.outputs is not None else None,
    )


def rejection(rejected: Rejected) -> training_service_pb2.TrainResponse:
    description = brief_description(rejected.error)
    return training_service_pb2.TrainResponse(
        rejection=training_service_pb2.Rejection(
            sequence=rejected.sequence,
            code=description.code.value[0],
            reason=description.reason,
            message=description.message,
            field_violations=[
                training_service_pb2.FieldViolation(field=violation.field, description=violation.description)
                for violation in description.violations
            ],
            expected_sequence=rejected.expected_sequence,
        ),
        credits=1,
    )


# -- learners --


def learner_to_message(record: LearnerRecord) -> learner_pb2.Learner:
    progress = record.progress
    return learner_pb2.Learner(
        name=learner_name(record.learner_id),
        uid=record.uid,
        spec=spec_to_message(record.spec),
        etag=record.etag,
        create_time=_timestamp(record.create_time),
        update_time=_timestamp(record.update_time),
        state=_STATES[record.state],
        progress=learner_pb2.LearnerProgress(
            step=progress.step,
            examples=progress.examples,
            pending_examples=progress.pending,
            loss=progress.loss,
            accuracy=progress.accuracy,
            replacements=progress.replacements,
            tasks=[
                learner_pb2.TaskRecord(
                    task=task.task,
                    first_step=task.first_step,
                    examples=task.examples,
                    loss=task.loss,
                    accuracy=task.accuracy,
                )
                for task in progress.tasks
            ],
            task_count=progress.task_count,
        ),
        producers=[
            learner_pb2.ProducerPosition(
                producer=producer.producer,
                epoch=producer.epoch,
                applied_sequence=producer.applied_sequence,
                durable_sequence=producer.durable_sequence,
            )
            for producer in record.producers.values()
        ],
        durability=_DURABILITIES[record.durability],
        quarantine=None if record.quarantine is None else _quarantine(record.quarantine),
        delete_time=None if record.delete_time is None else _timestamp(record.delete_time),
        purge_time=None if record.purge_time is None else _timestamp(record.purge_time),
        journal_position=record.journal_position,
        engine=record.engine,
    )


def _quarantine(quarantine: Quarantine) -> learner_pb2.Quarantine:
    return learner_pb2.Quarantine(
        journal_position=quarantine.position,
        producer=quarantine.producer,
        sequence=quarantine.sequence,
        reason=quarantine.reason,
        quarantine_time=_timestamp(quarantine.time),
    )


def checkpoint_to_message(learner_id: str, checkpoint: StoredCheckpoint) -> learner_pb2.Checkpoint:
    return learner_pb2.Checkpoint(
        name=f"{learner_name(learner_id)}/{_CHECKPOINTS}{checkpoint.number}",
        journal_position=checkpoint.position,
        step=checkpoint.step,
        examples=checkpoint.examples,
        size_bytes=checkpoint.size_bytes,
        create_time=_timestamp(checkpoint.time),
        pinned=checkpoint.pinned,
    )


def sample_to_message(record: SampleRecord) -> learner_pb2.PlasticitySample:
    return learner_pb2.PlasticitySample(
        step=record.sample.step,
        examples=record.sample.examples,
        layers=[_layer_to_message(layer) for layer in record.sample.layers],
        sample_time=_timestamp(record.time),
        trainability=_trainability(record.sample.trainability),
    )


def _trainability(tested: Trainability | None) -> learner_pb2.Trainability | None:
    if tested is None:
        return None
    return learner_pb2.Trainability(
        step=tested.step,
        loss=tested.loss,
        fresh_loss=tested.fresh_loss,
        chance_loss=tested.chance_loss,
        score=tested.score,
    )


def _layer_to_message(layer: LayerPlasticity) -> learner_pb2.LayerPlasticity:
    return learner_pb2.LayerPlasticity(
        layer=layer.layer,
        units=layer.units,
        mean_abs_weight=layer.mean_abs_weight,
        weight_norm=layer.weight_norm,
        distance_from_init=layer.distance_from_init,
        gradient_norm=layer.gradient_norm,
        dormant_fraction=layer.dormant_fraction,
        dead_fraction=layer.dead_fraction,
        effective_rank=layer.effective_rank,
        stable_rank=layer.stable_rank,
        replacements=layer.replacements,
        age_quantiles=_quantiles(layer.age_quantiles),
        utility_quantiles=_quantiles(layer.utility_quantiles),
        saturated_fraction=layer.saturated_fraction,
        feature_norm=layer.feature_norm,
        srank=layer.srank,
        gradient_rank=layer.gradient_rank,
    )


def _quantiles(values: Sequence[float] | None) -> list[learner_pb2.Quantile]:
    pairs = zip(QUANTILES, values, strict=True) if values else ()
    return [learner_pb2.Quantile(quantile=quantile, value=value) for quantile, value in pairs]


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp
