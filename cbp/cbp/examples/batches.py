"""Examples on their way into a learner: everything is checked here, before anything changes.

Shapes: N examples, C outputs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbp.errors import BatchError, FieldViolation, shown
from cbp.spec.learner_spec import LearnerSpec
from cbp.spec.network_spec import LARGEST_WHOLE, CategoricalColumn

LONGEST_TASK_LABEL = 128


class _UnfitError(Exception):
    """What is wrong with one array."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples that fit a learner; made by `validate`."""

    features: NDArray[np.float32]
    """[N, …], the shape of the network's examples behind N."""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """[N] labels for cross_entropy, [N, C] values otherwise."""
    weights: NDArray[np.float32] | None
    """[N], each example's factor in the loss; None is 1 for all."""
    task: str
    """A label under which progress is reported, of printable characters; it has no influence on learning. Empty for
    none."""

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def validate(
        cls,
        spec: LearnerSpec,
        features: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike | None = None,
        task: str = "",
    ) -> "Batch":
        """The examples in the form the learner trains on.

        Features, weights and regression targets may be of any real dtype and become float32; labels are integers.
        Raises `BatchError` with a violation for every argument that does not fit.
        """
        violations: list[FieldViolation] = []
        checked: dict[str, Any] = {"features": None, "targets": None, "weights": None}
        count: int | None = None

        try:
            checked["features"] = check_features(spec, features)
            count = len(checked["features"])
        except _UnfitError as problem:
            violations.append(FieldViolation("features", str(problem)))
        try:
            checked["targets"] = _check_targets(spec, targets, count)
        except _UnfitError as problem:
            violations.append(FieldViolation("targets", str(problem)))
        if weights is not None:
            try:
                checked["weights"] = _check_weights(weights, count)
            except _UnfitError as problem:
                violations.append(FieldViolation("weights", str(problem)))
        if (unfit := problem_with_task(task)) is not None:
            violations.append(FieldViolation("task", unfit))

        if violations:
            raise BatchError(violations)
        return cls(task=task, **checked)


def validate_features(spec: LearnerSpec, features: ArrayLike) -> NDArray[np.float32]:
    """[N, …] features on their own, for a prediction. Raises `BatchError`."""
    try:
        return check_features(spec, features)
    except _UnfitError as problem:
        raise BatchError([FieldViolation("features", str(problem))]) from None


def check_features(spec: LearnerSpec, features: ArrayLike) -> NDArray[np.float32]:
    array = _as_array(features)
    network = spec.network
    shape = network.input_shape
    if array.shape[1:] != shape or not array.ndim or len(array) < 1:
        wanted = ", ".join(["N", *map(str, shape)])
        raise _UnfitError(f"Expected shape [{wanted}] with N of at least 1, got {list(array.shape)}")
    if network.vocabulary_size is not None:
        _check_whole(array, 0, network.vocabulary_size - 1, "whole numbers", "the network's vocabulary")
    for column in network.inputs.columns:
        _check_column(array[:, column.column], column)
    return _as_float32(array)


def _check_column(values: NDArray[Any], column: CategoricalColumn) -> None:
    what = f"categories in column {column.column}"
    if column.cardinality:
        _check_whole(values, 0, column.cardinality - 1, what, "its cardinality; or give it hash_buckets")
    else:
        text = "what float32 holds exactly; hash longer ones to 24 bits before"
        _check_whole(values, -LARGEST_WHOLE, LARGEST_WHOLE, what, text)


def _check_whole(values: NDArray[Any], least: int, most: int, what: str, limit: str) -> None:
    with np.errstate(invalid="ignore"):
        refused = ~((values >= least) & (values <= most))
    if values.dtype.kind == "f":
        refused |= values != np.round(values)
    _refuse_first(refused, values, f"Expected {what} from {least} to {most}, by {limit}")


def _check_targets(spec: LearnerSpec, targets: ArrayLike, count: int | None) -> NDArray[np.int64] | NDArray[np.float32]:
    array = _as_array(targets)
    if spec.loss.kind == "cross_entropy":
        return _check_labels(array, spec.network.out_features, count)
    return _check_values(array, spec, count)


def _check_labels(array: NDArray[Any], classes: int, count: int | None) -> NDArray[np.int64]:
    if array.dtype.kind not in "iub":
        raise _UnfitError(f"Expected integer labels for cross_entropy, got dtype {array.dtype}")
    if array.ndim != 1 or count not in (None, len(array)):
        raise _UnfitError(f"Expected shape [{'N' if count is None else count}], got {list(array.shape)}")
    if array.dtype.kind == "b":
        return array.astype(np.int64)
    if len(array) and not (array.min() >= 0 and array.max() < classes):
        _refuse_first((array < 0) | (array >= classes), array, f"Expected labels from 0 to {classes - 1}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_values(array: NDArray[Any], spec: LearnerSpec, count: int | None) -> NDArray[np.float32]:
    width = spec.network.out_features
    if width == 1 and array.ndim == 1:
        array = array[:, np.newaxis]
    if array.ndim != 2 or array.shape[1] != width or count not in (None, len(array)):
        raise _UnfitError(f"Expected shape [{'N' if count is None else count}, {width}], got {list(array.shape)}")
    values = _as_float32(array)
    if spec.loss.kind == "binary_cross_entropy":
        _refuse_first((values < 0) | (values > 1), array, "Expected targets from 0 to 1 for binary_cross_entropy")
    return values


def _check_weights(weights: ArrayLike, count: int | None) -> NDArray[np.float32]:
    array = _as_array(weights)
    if array.ndim != 1 or count not in (None, len(array)):
        raise _UnfitError(f"Expected shape [{'N' if count is None else count}], got {list(array.shape)}")
    values = _as_float32(array)
    _refuse_first(values < 0, array, "Expected weights of at least 0")
    return values


def problem_with_task(task: object) -> str | None:
    """What is wrong with a task's label; None if nothing is."""
    if not isinstance(task, str):
        return f"Expected text, got {type(task).__name__}"
    if len(task) > LONGEST_TASK_LABEL:
        return f"Expected text of at most {LONGEST_TASK_LABEL} characters, got {len(task)}"
    if not task.isprintable():  # it appears in pages, tables and logs
        return f"Expected printable characters only, got {shown(task)}"
    return None


def _as_array(value: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise _UnfitError(f"Expected a rectangular array of numbers: {error}") from None
    if array.dtype.kind not in "fiub":
        raise _UnfitError(f"Expected real numbers, got dtype {array.dtype}")
    return array


def _as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is refused below, with its position
        converted = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(converted)
    if not finite.all():
        _refuse_first(~finite, array, "Expected values that are finite in float32")
    return converted


def _refuse_first(refused: NDArray[np.bool_], values: NDArray[Any], expectation: str) -> None:
    if refused.any():
        position = np.unravel_index(int(refused.argmax()), refused.shape)
        place = ", ".join(str(int(index)) for index in position)
        raise _UnfitError(f"{expectation}, got {values[position].item()} at [{place}]")
