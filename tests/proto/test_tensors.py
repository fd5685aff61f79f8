"""Arrays survive the wire bit by bit; messages that describe no array are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cbp_proto import TensorError, decode_tensor, encode_tensor
from cbp_proto.v1 import tensor_pb2

DTYPES = ["?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


def arrays() -> st.SearchStrategy[NDArray[np.generic]]:
    dtypes = st.sampled_from(DTYPES).flatmap(
        lambda code: st.sampled_from([np.dtype(code), np.dtype(code).newbyteorder(">")])
    )
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    return st.tuples(dtypes, shapes).flatmap(lambda drawn: hnp.arrays(*drawn))


@given(arrays())
def test_an_array_comes_back_bit_by_bit(array: NDArray[np.generic]) -> None:
    decoded = decode_tensor(encode_tensor(array))

    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype.newbyteorder("<")
    assert decoded.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@given(arrays())
def test_a_tensor_survives_serialisation(array: NDArray[np.generic]) -> None:
    tensor = encode_tensor(array)

    assert tensor_pb2.Tensor.FromString(tensor.SerializeToString()) == tensor


def test_strides_do_not_matter() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)

    np.testing.assert_array_equal(decode_tensor(encode_tensor(array.T[::2])), array.T[::2])


def test_elements_lie_little_endian_in_row_major_order() -> None:
    tensor = encode_tensor(np.array([[1, 2], [3, 4]], dtype=">i2", order="F"))

    assert tensor.data == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    assert list(tensor.shape) == [2, 2]
    assert tensor.dtype == tensor_pb2.DATA_TYPE_INT16


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "c8", "O", "U3", "S3", "M8[s]", "m8[s]", [("a", "i4")]])
def test_a_dtype_without_counterpart_is_refused(dtype: object) -> None:
    with pytest.raises(TensorError, match="cannot be sent"):
        encode_tensor(np.zeros(2, dtype=dtype))  # type: ignore[call-overload]


@given(
    st.integers(min_value=-1, max_value=12),
    st.lists(st.integers(min_value=-(2**63), max_value=2**63 - 1) | st.integers(min_value=0, max_value=4), max_size=70),
    st.binary(max_size=64),
)
def test_any_message_is_decoded_or_refused(dtype: int, shape: list[int], data: bytes) -> None:
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DataType.ValueType(dtype), shape=shape, data=data)
    try:
        decoded = decode_tensor(tensor)
    except TensorError:
        return
    assert decoded.shape == tuple(shape)
    assert decoded.nbytes == len(data)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (tensor_pb2.Tensor(shape=[1], data=b"\0"), "not a known DataType"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[-1], data=b""), "negative extent"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"1234567"), "takes 8 bytes"),
        (
            tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[0, 2**62, 2**62], data=b""),
            r"shape \[0, 46\d*, 46\d*\]: ",
        ),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_INT8, shape=[1] * 70, data=b"1"), "more than 8 dimensions"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BOOL, shape=[2], data=b"\1\2"), "0 or 1"),
    ],
)
def test_what_is_wrong_is_named(message: tensor_pb2.Tensor, problem: str) -> None:
    with pytest.raises(TensorError, match=problem):
        decode_tensor(message)


@pytest.mark.parametrize("extents", [[2**62] * 200_000, [2**62] * 300, [1] * 9, [0] * 9])
def test_a_shape_of_many_dimensions_is_refused_at_once_and_briefly(extents: list[int]) -> None:
    """The product of that many extents is a number of millions of digits: it takes minutes and cannot be printed."""
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=extents, data=b"")
    with pytest.raises(TensorError, match="shape has more than 8 dimensions") as caught:
        decode_tensor(message)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("shape", [[2**62] * 8, [2**62, 0], [3, 2**62, 5]])
def test_extents_that_no_data_can_have_are_refused(shape: list[int]) -> None:
    with pytest.raises(TensorError) as caught:
        decode_tensor(tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT64, shape=shape, data=b""))
    assert len(str(caught.value)) < 500


def test_a_decoded_array_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        decode_tensor(encode_tensor(np.zeros(3, dtype=np.float32)))[0] = 1
