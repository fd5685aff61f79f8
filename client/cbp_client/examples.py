"""Examples as they go over the wire: which arrays are taken, in which types, and the message they make."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cbp_client.arguments import invalid, label
from cbp_client.arrays import numbers
from cbp_client.errors import InvalidArgument
from cbp_proto import encode_batch, encode_tensor
from cbp_proto.v1 import tensor_pb2

# Where unsigned integers of so many bytes go, since the wire has none beyond one byte.
_SIGNED: dict[int, type[np.generic]] = {2: np.int32, 4: np.int64, 8: np.float32}


def features_tensor(features: ArrayLike) -> tensor_pb2.Tensor:
    """Features [N, …]. Floats beyond single precision go as float32, which is what learners compute with;
    half precision, booleans and integers go as they are, or in the next type that the wire has.

    Raises:
        InvalidArgument: they are no array of numbers with a row for each example.
    """
    return encode_tensor(_features(features))


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

    def encode(self, *, task: str | int, return_outputs: bool) -> "EncodedBatch":
        """The message of one batch, which shares nothing with the arrays.

        Raises:
            InvalidArgument: the task is neither a text nor a whole number.
        """
        task = label("task", task)
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
            raise _refused(field, f"{len(array)} {field} for {len(examples)} examples")
    return examples


def _features(features: ArrayLike) -> NDArray[np.generic]:
    array = numbers("features", features)
    if array.ndim < 2:
        raise _refused("features", f"must be [N, …], one row for each example, not {list(array.shape)}")
    if array.dtype.kind == "u":
        return array.astype(_SIGNED.get(array.dtype.itemsize, array.dtype), copy=False)
    return array if array.dtype == np.float16 else _narrowed(array)


def _targets(targets: ArrayLike) -> NDArray[np.generic]:
    array = numbers("targets", targets)
    if array.ndim < 1:
        raise _refused("targets", "must be [N] or [N, out_features], one row for each example, not a single value")
    return array.astype(np.int64, copy=False) if array.dtype.kind in "iub" else _narrowed(array)


def _weights(weights: ArrayLike) -> NDArray[np.generic]:
    array = numbers("weights", weights)
    if array.ndim != 1:
        raise _refused("weights", f"must be [N], one for each example, not {list(array.shape)}")
    return array.astype(np.float32, copy=False)


def _narrowed(array: NDArray[np.generic]) -> NDArray[np.generic]:
    if array.dtype.kind != "f" or array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and the server names it
        return array.astype(np.float32, copy=False)


def _refused(field: str, description: str) -> InvalidArgument:
    return invalid(field, description, reason="INVALID_BATCH")
