"""Batches in the wire format, read and written without the copies that generated code makes of their arrays.

A message of examples is large, and nearly all of it is a field of bytes. Generated code copies that when it parses,
again when the field is read, and twice when it serialises. Here a batch that was received is a view of its message, and
one to be sent is copied once into its encoding and once into its message. What serialisers write in the ordinary way is
read here; whatever else the format allows, generated code parses and writes anew, and so decides what is valid.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from google.protobuf.descriptor import Descriptor
from numpy.typing import NDArray

from cbp_proto.tensors import MOST_DIMENSIONS, wire_form
from cbp_proto.v1 import tensor_pb2
from cbp_proto.v1.training_service_pb2 import OpenStream, TrainBatch, TrainBatches, TrainRequest

_Fields: TypeAlias = dict[int, Any]  # a number or a slice of the message, as the tag says

_NUMBER, _BYTES = 0, 2  # how fields are encoded, as their tags say
_MOST_NUMBER_BYTES = 10
#: Of one message, known or not; there may be millions, for which Python is too slow.
_MOST_FIELDS = 32
_LEAST_TAG, _MOST_TAG = 1 << 3, 2**32 - 1


def _tag(message: Descriptor, field: str, kind: int) -> int:
    return message.fields_by_name[field].number << 3 | kind


_IN_REQUEST, _IN_BATCHES, _IN_BATCH, _IN_TENSOR = (
    message.DESCRIPTOR for message in (TrainRequest, TrainBatches, TrainBatch, tensor_pb2.Tensor)
)
_BATCH, _BATCHES = _tag(_IN_REQUEST, "batch", _BYTES), _tag(_IN_REQUEST, "batches", _BYTES)
_PACKED_BATCH = _tag(_IN_BATCHES, "batches", _BYTES)
_SEQUENCE, _RETURN_OUTPUTS = _tag(_IN_BATCH, "sequence", _NUMBER), _tag(_IN_BATCH, "return_outputs", _NUMBER)
_FEATURES, _TARGETS, _WEIGHTS, _TASK = (
    _tag(_IN_BATCH, field, _BYTES) for field in ("features", "targets", "weights", "task")
)
_DTYPE, _SHAPE, _DATA = (
    _tag(_IN_TENSOR, "dtype", _NUMBER),
    _tag(_IN_TENSOR, "shape", _BYTES),
    _tag(_IN_TENSOR, "data", _BYTES),
)
_LOOSE_EXTENT = _tag(_IN_TENSOR, "shape", _NUMBER)  # not packed


class WireTensor(NamedTuple):
    """A `cbp.v1.Tensor` that was received; `decode_tensor` makes an array of it."""

    dtype: int = tensor_pb2.DATA_TYPE_UNSPECIFIED
    shape: tuple[int, ...] = ()
    """As far as one extent more than a tensor may have."""
    data: memoryview = memoryview(b"")


class WireBatch(NamedTuple):
    """A `cbp.v1.TrainBatch` that was received. Its tensors are views of the message."""

    sequence: int
    features: WireTensor
    targets: WireTensor
    weights: WireTensor | None
    task: str
    return_outputs: bool
    encoded: memoryview
    """All of it, in the wire format."""


class _UnusualError(Exception):
    """The message may be valid, but is none that a serialiser would write."""


# -- reading --


def read_train_request(encoded: bytes, most_batches: int) -> OpenStream | list[WireBatch]:
    """What a serialised TrainRequest holds: the opening of a stream, or batches, none if it is empty.

    Args:
        most_batches: of more than these only one is read, so that a message of very many costs nothing.

    Raises:
        DecodeError: it is no TrainRequest.
    """
    try:
        return _batches(memoryview(encoded), most_batches)
    except (_UnusualError, IndexError, UnicodeDecodeError):
        message = TrainRequest.FromString(encoded)
    match message.WhichOneof("message"):
        case None:
            return []
        case "open":
            return message.open
    message.DiscardUnknownFields()
    return _batches(memoryview(message.SerializeToString()), most_batches)


def read_batch(encoded: bytes | memoryview) -> WireBatch:
    """A serialised TrainBatch.

    Raises:
        DecodeError: it is none.
    """
    view = memoryview(encoded)
    try:
        return _batch(view, slice(0, len(view)))
    except (_UnusualError, IndexError, UnicodeDecodeError):
        message = TrainBatch.FromString(bytes(view))
    message.DiscardUnknownFields()
    view = memoryview(message.SerializeToString())
    return _batch(view, slice(0, len(view)))


def _batches(view: memoryview, most: int) -> list[WireBatch]:
    tag, at = _number(view, 0)
    length, at = _number(view, at)
    if at + length != len(view):
        raise _UnusualError
    if tag == _BATCH:
        return [_batch(view, slice(at, len(view)))]
    if tag != _BATCHES:
        raise _UnusualError
    batches: list[WireBatch] = []
    while at < len(view) and len(batches) <= most:
        tag, at = _number(view, at)
        length, at = _number(view, at)
        if tag != _PACKED_BATCH or at + length > len(view):
            raise _UnusualError
        batches.append(_batch(view, slice(at, at + length)))
        at += length
    return batches


def _batch(view: memoryview, place: slice) -> WireBatch:
    fields = _fields(view, place)
    task = fields.get(_TASK)
    weights = fields.get(_WEIGHTS)
    return WireBatch(
        sequence=_signed(fields.get(_SEQUENCE, 0)),
        features=_tensor(view, fields.get(_FEATURES)),
        targets=_tensor(view, fields.get(_TARGETS)),
        weights=None if weights is None else _tensor(view, weights),
        task="" if task is None else bytes(view[task]).decode(),
        return_outputs=bool(fields.get(_RETURN_OUTPUTS, 0)),
        encoded=view[place],
    )


def _tensor(view: memoryview, place: slice | None) -> WireTensor:
    if place is None:
        return WireTensor()
    fields = _fields(view, place)
    dtype = _signed(fields.get(_DTYPE, 0))
    if _LOOSE_EXTENT in fields or not -(2**31) <= dtype < 2**31:
        raise _UnusualError
    shape, data = fields.get(_SHAPE), fields.get(_DATA, slice(0, 0))
    return WireTensor(dtype, () if shape is None else _extents(view, shape), view[data])


def _extents(view: memoryview, place: slice) -> tuple[int, ...]:
    extents: list[int] = []
    at = place.start
    while at < place.stop and len(extents) <= MOST_DIMENSIONS:
        extent, at = _number(view, at)
        extents.append(_signed(extent))
    return tuple(extents)


def _fields(view: memoryview, place: slice) -> _Fields:
    """The fields of a message, numbers and places of bytes, by tag."""
    fields: _Fields = {}
    at, end = place.start, place.stop
    while at < end:
        tag, at = _number(view, at)
        value, at = _number(view, at)
        if tag in fields or not _LEAST_TAG <= tag <= _MOST_TAG or len(fields) == _MOST_FIELDS:
            raise _UnusualError
        kind = tag & 7
        if kind == _BYTES:
            fields[tag] = slice(at, at + value)
            at += value
        elif kind == _NUMBER:
            fields[tag] = value
        else:
            raise _UnusualError
    if at != end:
        raise _UnusualError
    return fields


def _number(view: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = view[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 7 * _MOST_NUMBER_BYTES, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value < 2**64:
            return value, at
    raise _UnusualError


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# -- writing --


def encode_batch(
    features: NDArray[np.generic],
    targets: NDArray[np.generic],
    weights: NDArray[np.generic] | None,
    *,
    task: str,
    return_outputs: bool,
) -> bytes:
    """A serialised TrainBatch without its sequence, for `encode_train_request`.

    Raises:
        TensorError: an array's dtype has no counterpart on the wire.
    """
    parts = [*_tensor_parts(_FEATURES, features), *_tensor_parts(_TARGETS, targets)]
    if weights is not None:
        parts += _tensor_parts(_WEIGHTS, weights)
    if task:
        encoded = task.encode()
        parts += [_encoded(_TASK, len(encoded)), encoded]
    if return_outputs:
        parts.append(_encoded(_RETURN_OUTPUTS, 1))
    return b"".join(parts)


def encode_train_request(batches: Sequence[tuple[int, bytes]]) -> bytes:
    """A serialised TrainRequest.

    Args:
        batches: sequences, each with what `encode_batch` gave; one at least.
    """
    tag = _BATCH if len(batches) == 1 else _PACKED_BATCH
    parts: list[bytes] = []
    for number, rest in batches:
        sequence = _encoded(_SEQUENCE, number)
        parts += (_encoded(tag, len(sequence) + len(rest)), sequence, rest)
    if tag == _PACKED_BATCH:
        parts.insert(0, _encoded(_BATCHES, sum(map(len, parts))))
    return b"".join(parts)


def _tensor_parts(tag: int, array: NDArray[np.generic]) -> list[bytes | memoryview]:
    data_type, data = wire_form(array)
    return [_tensor_head(tag, data_type, array.shape, data.nbytes), data.data]


@lru_cache  # batches of one stream mostly have the same shapes
def _tensor_head(tag: int, data_type: int, shape: tuple[int, ...], nbytes: int) -> bytes:
    """All of a tensor's field that comes before its data."""
    extents = b"".join(map(_varint, shape))
    head = _encoded(_DTYPE, data_type)
    if extents:
        head += _encoded(_SHAPE, len(extents)) + extents
    head += _encoded(_DATA, nbytes)
    return _encoded(tag, len(head) + nbytes) + head


def _encoded(tag: int, value: int) -> bytes:
    return _varint(tag) + _varint(value)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
