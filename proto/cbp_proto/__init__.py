"""The wire contract: generated messages and stubs in `cbp_proto.v1`, conversions that both sides need."""

from cbp_proto.plain import PlainError, from_plain, to_plain
from cbp_proto.tensors import TensorError, decode_tensor, encode_tensor, fill_tensor

__all__ = ["PlainError", "TensorError", "decode_tensor", "encode_tensor", "fill_tensor", "from_plain", "to_plain"]
