"""Tensor messages to numpy arrays and back."""

import math
from collections.abc import Sequence
from typing import Protocol

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
MOST_DIMENSIONS = 8


class TensorError(ValueError):
    """A message that describes no tensor, or an array that no message can hold."""


class TensorMessage(Protocol):
    """A tensor as it is on the wire: `cbp.v1.Tensor`, or a view of a received one."""

    @property
    def dtype(self) -> int: ...

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def data(self) -> bytes | memoryview: ...


def encode_tensor(array: NDArray[np.generic]) -> tensor_pb2.Tensor:
    """The message that holds `array`, of any shape.

    Raises:
        TensorError: the dtype has no counterpart on the wire (unsigned beyond 8 bits, complex, object, text).
    """
    data_type, data = wire_form(array)
    return tensor_pb2.Tensor(dtype=data_type, shape=array.shape, data=data.tobytes())


def wire_form(array: NDArray[np.generic]) -> tuple[tensor_pb2.DataType.ValueType, NDArray[np.generic]]:
    """The type of the array's elements, and an array that lies in memory as they are sent: itself if it does.

    Raises as `encode_tensor` does.
    """
    dtype = array.dtype.newbyteorder("<")
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        names = ", ".join(known.name for known in _DATA_TYPES)
        raise TensorError(f"dtype {array.dtype} cannot be sent; convert the array to one of {names}")
    return tensor_pb2.DataType.ValueType(data_type), np.ascontiguousarray(array, dtype=dtype)


def decode_tensor(tensor: TensorMessage) -> NDArray[np.generic]:
    """The array that `tensor` describes: read-only, a view of its data.

    Raises:
        TensorError: unknown dtype, more than 8 dimensions, an extent that no data can have, data of another length than
            the shape asks for, or a boolean that is neither 0 nor 1.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TensorError(f"dtype {tensor.dtype} is not a known DataType")
    if len(tensor.shape) > MOST_DIMENSIONS:  # before anything looks at them: there may be millions
        raise TensorError(f"shape has more than {MOST_DIMENSIONS} dimensions")
    shape = tuple(tensor.shape)
    if any(extent < 0 for extent in shape):
        raise TensorError(f"shape {list(shape)} has a negative extent")
    data = tensor.data  # once, since each access to a message's bytes copies them
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise TensorError(f"shape {list(shape)} of {dtype.name} takes {expected} bytes, data has {len(data)}")
    if tensor.dtype == tensor_pb2.DATA_TYPE_BOOL and bytes(data).translate(None, delete=b"\0\1"):
        raise TensorError("a bool must be stored as 0 or 1")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as error:  # an extent beyond the address space beside an extent of 0
        raise TensorError(f"shape {list(shape)}: {error}") from error
