"""Tensor messages to numpy arrays and back."""

import math

import numpy as np
from numpy.typing import NDArray

from cbp_proto.v1 import tensor_pb2

_DTYPES: dict[int, np.dtype[np.generic]] = {
    tensor_pb2.DATA_TYPE_BOOL: np.dtype("?"),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_INT8: np.dtype("i1"),
    tensor_pb2.DATA_TYPE_INT16: np.dtype("<i2"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_DATA_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
#: Far more than any message of examples needs, and few enough for every product of extents to be cheap.
_MOST_DIMENSIONS = 8


class TensorError(ValueError):
    """A message that describes no tensor, or an array that no message can hold."""


def encode_tensor(array: NDArray[np.generic]) -> tensor_pb2.Tensor:
    """The message that holds `array`, of any shape. Raises as `fill_tensor` does."""
    tensor = tensor_pb2.Tensor()
    fill_tensor(tensor, array)
    return tensor


def fill_tensor(tensor: tensor_pb2.Tensor, array: NDArray[np.generic]) -> None:
    """Puts `array`, of any shape, into an empty message, such as a field of another one, which would copy a tensor.

    Raises:
        TensorError: the dtype has no counterpart on the wire (unsigned beyond 8 bits, complex, object, text).
    """
    dtype = array.dtype.newbyteorder("<")
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        names = ", ".join(known.name for known in _DATA_TYPES)
        raise TensorError(f"dtype {array.dtype} cannot be sent; convert the array to one of {names}")
    tensor.dtype = tensor_pb2.DataType.ValueType(data_type)
    tensor.shape.extend(array.shape)
    tensor.data = np.ascontiguousarray(array, dtype=dtype).tobytes()


def decode_tensor(tensor: tensor_pb2.Tensor, data: bytes | None = None) -> NDArray[np.generic]:
    """The array that `tensor` describes: read-only, a view of `data`.

    Args:
        data: tensor.data, if that has been read already: each access copies it.

    Raises:
        TensorError: unknown dtype, more than 8 dimensions, an extent that no data can have, data of another length than
            the shape asks for, or a boolean that is neither 0 nor 1.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TensorError(f"dtype {tensor.dtype} is not a known DataType")
    if len(tensor.shape) > _MOST_DIMENSIONS:  # before anything looks at them: there may be millions
        raise TensorError(f"shape has {len(tensor.shape)} dimensions, at most {_MOST_DIMENSIONS} are known")
    shape = tuple(tensor.shape)
    if any(extent < 0 for extent in shape):
        raise TensorError(f"shape {list(shape)} has a negative extent")
    data = tensor.data if data is None else data
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise TensorError(f"shape {list(shape)} of {dtype.name} takes {expected} bytes, data has {len(data)}")
    if tensor.dtype == tensor_pb2.DATA_TYPE_BOOL and data.translate(None, delete=b"\0\1"):
        raise TensorError("a bool must be stored as 0 or 1")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # an extent beyond the address space beside an extent of 0
        raise TensorError(f"shape {list(shape)}: {error}") from error
