"""The wire contract: generated messages and stubs in `cbp_proto.v1`, conversions that both sides need."""

from cbp_proto.batches import (
    WireBatch,
    WireTensor,
    encode_batch,
    encode_train_request,
    read_batch,
    read_train_request,
)
from cbp_proto.plain import PlainError, from_plain, to_plain
from cbp_proto.sizes import MAX_MESSAGE_BYTES
from cbp_proto.tensors import TensorError, TensorMessage, decode_tensor, encode_tensor

__all__ = [
    "MAX_MESSAGE_BYTES",
    "PlainError",
    "TensorError",
    "TensorMessage",
    "WireBatch",
    "WireTensor",
    "decode_tensor",
    "encode_batch",
    "encode_tensor",
    "encode_train_request",
    "from_plain",
    "read_batch",
    "read_train_request",
    "to_plain",
]
