"""What is read and written here is what generated code reads and writes, whatever the bytes."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cbp_proto import (
    TensorError,
    WireBatch,
    WireTensor,
    decode_tensor,
    encode_batch,
    encode_tensor,
    encode_train_request,
    read_batch,
    read_train_request,
)
from cbp_proto.v1.tensor_pb2 import Tensor
from cbp_proto.v1.training_service_pb2 import OpenStream, TrainBatch, TrainBatches, TrainRequest

MOST = 64
INT64 = st.integers(-(2**63), 2**63 - 1)


def arrays() -> st.SearchStrategy[NDArray[np.generic]]:
    dtypes = st.sampled_from(["?", "u1", "<i4", ">i8", "<f2", ">f4", "<f8"])
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return st.tuples(dtypes, shapes).flatmap(lambda drawn: hnp.arrays(*drawn))


def tensors() -> st.SearchStrategy[Tensor]:
    """Also such as describe no array."""
    return st.builds(
        Tensor,
        dtype=st.integers(-(2**31), 2**31 - 1),
        shape=st.lists(INT64, max_size=12),
        data=st.binary(max_size=40),
    )


def batches() -> st.SearchStrategy[TrainBatch]:
    return st.builds(
        TrainBatch,
        sequence=INT64,
        features=st.none() | tensors(),
        targets=st.none() | tensors(),
        weights=st.none() | tensors(),
        task=st.text(max_size=5),
        return_outputs=st.booleans(),
    )


def requests() -> st.SearchStrategy[TrainRequest]:
    return st.one_of(
        st.builds(TrainRequest),
        st.builds(TrainRequest, open=st.builds(OpenStream, learner=st.text(max_size=5), resumed_epoch=INT64)),
        st.builds(TrainRequest, batch=batches()),
        st.builds(TrainRequest, batches=st.builds(TrainBatches, batches=st.lists(batches(), max_size=3))),
    )


def assert_same_tensor(read: WireTensor, expected: Tensor) -> None:
    assert read.dtype == expected.dtype
    assert read.shape == tuple(expected.shape)[:9]
    assert bytes(read.data) == expected.data


def assert_same_batch(read: WireBatch, expected: TrainBatch) -> None:
    assert read.sequence == expected.sequence
    assert_same_tensor(read.features, expected.features)
    assert_same_tensor(read.targets, expected.targets)
    assert (read.weights is not None) == expected.HasField("weights")
    if read.weights is not None:
        assert_same_tensor(read.weights, expected.weights)
    assert (read.task, read.return_outputs) == (expected.task, expected.return_outputs)
    again = TrainBatch.FromString(bytes(read.encoded))
    for message in (again, expected):
        message.DiscardUnknownFields()  # type: ignore[no-untyped-call]
    assert again == expected


def assert_same(encoded: bytes) -> None:
    """Generated code is right."""
    try:
        expected = TrainRequest.FromString(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_train_request(encoded, MOST)
        return
    read = read_train_request(encoded, MOST)
    if expected.HasField("open"):
        assert read == expected.open
        return
    assert isinstance(read, list)
    whole = [expected.batch] if expected.HasField("batch") else list(expected.batches.batches)
    assert len(read) == len(whole)
    for batch, message in zip(read, whole, strict=True):
        assert_same_batch(batch, message)


@given(requests())
def test_requests_are_read_as_generated_code_reads_them(request: TrainRequest) -> None:
    assert_same(request.SerializeToString())


@given(requests(), st.data())
def test_so_are_damaged_ones(request: TrainRequest, data: st.DataObject) -> None:
    encoded = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(encoded)))
        rest = encoded[place + data.draw(st.integers(0, 2)) :]
        encoded = encoded[:place] + data.draw(st.binary(max_size=3)) + rest
    assert_same(bytes(encoded))


@given(st.lists(requests(), min_size=2, max_size=3))
def test_so_are_requests_merged_of_several(parts: list[TrainRequest]) -> None:
    assert_same(b"".join(part.SerializeToString() for part in parts))


@given(batches(), st.binary(max_size=6))
def test_so_are_batches_with_what_this_version_does_not_know(batch: TrainBatch, unknown: bytes) -> None:
    batch.ClearField("features")
    features = Tensor(shape=[2, 3]).SerializeToString() + encoded_field(15, unknown)
    body = encoded_field(2, features) + batch.SerializeToString() + encoded_field(14, unknown)

    assert_same(encoded_field(2, body))


def encoded_field(number: int, body: bytes) -> bytes:
    """A field of bytes, with its length in an unusually long form."""
    length = len(body)
    return bytes((number << 3 | 2, length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14)) + body


@pytest.mark.parametrize(
    "tensor",
    [
        bytes.fromhex("08 08 10 02 10 03 1a 01 00"),  # extents that are not packed
        bytes.fromhex("08 08 12 01 02 10 03 12 01 04"),  # both, mixed
        bytes.fromhex("08 88 80 80 80 10"),  # a dtype of more than 32 bits
        bytes.fromhex("08 ff ff ff ff ff ff ff ff ff 01"),  # a dtype of -1
        bytes.fromhex("0d 00 00 00 00"),  # a dtype that is encoded as a fixed32
        bytes.fromhex("08 ff ff ff ff ff ff ff ff ff 7f"),  # a number of more than 64 bits
        bytes.fromhex("08 80 80 80 80 80 80 80 80 80 80 01"),  # a number of more than ten bytes
        bytes.fromhex("00 01"),  # a field without a number
        bytes.fromhex("9b 06 08 01 9c 06"),  # a group
        bytes.fromhex("12 02 02"),  # cut off
        bytes.fromhex("12 01 82"),  # an extent that is cut off
    ],
)
def test_unusual_tensors_are_read_as_generated_code_reads_them(tensor: bytes) -> None:
    assert_same(encoded_field(2, encoded_field(2, tensor)))


@given(
    arrays(),
    arrays(),
    st.none() | arrays(),
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.integers(1, 2**63 - 1), min_size=1, max_size=3),
)
def test_what_is_written_is_the_message(
    features: NDArray[np.generic],
    targets: NDArray[np.generic],
    weights: NDArray[np.generic] | None,
    task: str,
    return_outputs: bool,
    sequences: list[int],
) -> None:
    encoded = encode_batch(features, targets, weights, task=task, return_outputs=return_outputs)
    expected = [
        TrainBatch(
            sequence=sequence,
            features=encode_tensor(features),
            targets=encode_tensor(targets),
            weights=None if weights is None else encode_tensor(weights),
            task=task,
            return_outputs=return_outputs,
        )
        for sequence in sequences
    ]

    request = TrainRequest.FromString(encode_train_request([(batch.sequence, encoded) for batch in expected]))

    assert request == (
        TrainRequest(batch=expected[0]) if len(expected) == 1 else TrainRequest(batches=TrainBatches(batches=expected))
    )


def test_a_batch_that_was_read_is_a_view_of_its_message() -> None:
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    encoded = encode_batch(features, np.arange(3), None, task="", return_outputs=False)

    batch = read_batch(encoded)

    decoded = decode_tensor(batch.features)
    np.testing.assert_array_equal(decoded, features)
    assert np.shares_memory(decoded, np.frombuffer(encoded, np.uint8))
    assert not decoded.flags.writeable


def test_a_batch_that_is_sent_shares_nothing_with_the_arrays() -> None:
    features = np.zeros((2, 2), np.float32)
    encoded = encode_batch(features, np.zeros(2), None, task="", return_outputs=False)
    features[:] = 1

    np.testing.assert_array_equal(decode_tensor(read_batch(encoded).features), np.zeros((2, 2)))


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(DecodeError):
        read_batch(b"\x12\x05")


def test_a_shape_of_many_dimensions_is_read_as_far_as_it_takes_to_refuse_it() -> None:
    message = TrainBatch(features=Tensor(dtype=8, shape=[2**62] * 200_000))

    tensor = read_batch(message.SerializeToString()).features

    assert len(tensor.shape) == 9
    with pytest.raises(TensorError, match="more than 8 dimensions"):
        decode_tensor(tensor)


def test_a_dtype_without_counterpart_is_refused() -> None:
    with pytest.raises(TensorError, match="cannot be sent"):
        encode_batch(np.zeros(2, dtype="c8"), np.zeros(2), None, task="", return_outputs=False)


@pytest.mark.parametrize("first", [b"", b"\x08\x01\x08\x02"])
def test_of_too_many_batches_one_too_many_is_read(first: bytes) -> None:
    encoded = encoded_field(3, encoded_field(1, first) + bytes((1 << 3 | 2, 0)) * 1000)

    batches = read_train_request(encoded, 5)

    assert isinstance(batches, list)
    assert len(batches) == 6


def test_fields_without_number_or_end_do_not_hold_up_a_reader() -> None:
    unknown = b"".join(encoded_field(number, b"") for number in (7, 8, 9, 10, 11, 12, 13, 14, 15)) + b"".join(
        bytes((number & 0x7F | 0x80, number >> 7, 1)) for number in range(128, 2000, 8)
    )
    batch = TrainBatch(sequence=3, task="t").SerializeToString() + unknown

    assert_same(encoded_field(2, batch))
