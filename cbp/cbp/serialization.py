"""A learner's whole state as tensors and plain values, and as bytes: safetensors, which other tools can read.

The plain values travel as one JSON string under the key "cbp" of the file's metadata; callers may add keys of their
own.
"""

import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from cbp.errors import SnapshotError, SpecError
from cbp.spec.learner_spec import LearnerSpec

FORMAT_VERSION = 1
_METADATA_KEY = "cbp"
_CHECKSUM_KEY = "cbp_checksum"
_HEADER_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8
_DTYPE_NAMES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(frozen=True, kw_only=True)
class LearnerSnapshot:
    """Everything that a learner is; `Learner.restore` continues from it as if nothing had happened."""

    tensors: dict[str, Tensor]
    """CPU copies by name, for instance `parameters.hidden_0.weight` [out, in]."""
    metadata: dict[str, Any]
    """JSON-able: the specification, counters, averages, and `format_version`."""
    extra: dict[str, str] = field(default_factory=dict)
    """What the caller stored beside it."""

    def read_spec(self) -> LearnerSpec:
        """The learner's specification. Raises `SnapshotError` if this package cannot read it."""
        version = self.metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise SnapshotError(f"The snapshot has format version {version!r}; this package reads {FORMAT_VERSION}")
        try:
            return LearnerSpec.parse(self.metadata["spec"])
        except (KeyError, SpecError) as error:
            raise SnapshotError(f"The snapshot's specification cannot be read: {error}") from error

    def to_bytes(self, extra: Mapping[str, str] | None = None) -> bytes:
        """A safetensors file; `extra` is added to what the snapshot holds already. Raises `SnapshotError`.

        Other threads run meanwhile, whatever the size; the tensors must not change.
        """
        joined = self.extra | dict(extra or {})
        for key in (_METADATA_KEY, _CHECKSUM_KEY):
            if key in joined:
                raise SnapshotError(f"extra[{key!r}]: the key is taken by the snapshot itself; choose another")
        metadata = json.dumps(self.metadata, allow_nan=True, separators=(",", ":"))
        own = {_METADATA_KEY: metadata, _CHECKSUM_KEY: _checksum(self.tensors, metadata)}
        return _serialize(self.tensors, joined | own)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "LearnerSnapshot":
        """The snapshot in a file, such as a checkpoint of the service. Raises `OSError`, and as `from_bytes` does."""
        return cls.from_bytes(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "LearnerSnapshot":
        """The snapshot that `to_bytes` wrote, with its `extra`. Raises `SnapshotError` if the bytes are damaged."""
        header = _header_metadata(data)
        if _METADATA_KEY not in header or _CHECKSUM_KEY not in header:
            raise SnapshotError("These are not the bytes of a learner's snapshot: a safetensors file of another kind")
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise SnapshotError(f"The snapshot is damaged: {error}") from error
        if header[_CHECKSUM_KEY] != _checksum(tensors, header[_METADATA_KEY]):
            raise SnapshotError("The snapshot is damaged: its checksum does not match its contents")
        try:
            metadata = json.loads(header[_METADATA_KEY])
        except ValueError as error:
            raise SnapshotError(f"The snapshot is damaged: {error}") from error
        extra = {key: value for key, value in header.items() if key not in (_METADATA_KEY, _CHECKSUM_KEY)}
        return cls(tensors=tensors, metadata=metadata, extra=extra)


def _serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What `safetensors.torch.save` makes, which would copy everything twice and let no other thread run meanwhile."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[NDArray[np.uint8]] = []
    start = 0
    # The widest types first, so that all values are aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise SnapshotError(f"The snapshot's tensor {name!r} is {tensor.dtype}, which no snapshot holds")
        parts.append(_bytes_of(tensor))
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    head = len(encoded).to_bytes(_HEADER_LENGTH_BYTES, "little") + encoded
    # Zeroed memory takes no time before it is written to, and `getvalue` hands it over without a copy.
    file = io.BytesIO(bytes(len(head) + start))
    with file.getbuffer() as buffer:
        buffer[: len(head)] = head
        _write_behind(len(head), parts, buffer)
    return file.getvalue()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """[nbytes], the tensor's own memory if it lies in one piece."""
    contents: NDArray[np.uint8] = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
    return contents


def _write_behind(start: int, parts: Iterable[NDArray[np.uint8]], buffer: memoryview) -> None:
    room = np.frombuffer(buffer, np.uint8)
    for part in parts:
        room[start : start + len(part)] = part
        start += len(part)


def _header_metadata(data: bytes) -> dict[str, str]:
    """safetensors reads metadata from files only; from bytes, its header is eight bytes of length and then JSON."""
    length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    end = _HEADER_LENGTH_BYTES + length
    if len(data) < _HEADER_LENGTH_BYTES or end > len(data):
        raise SnapshotError(f"The snapshot is cut off: it has {len(data)} bytes, its header says at least {end}")
    try:
        header = json.loads(data[_HEADER_LENGTH_BYTES:end])
    except ValueError as error:
        raise SnapshotError(f"The snapshot is damaged: its header is not JSON ({error})") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict):
        raise SnapshotError("The snapshot is damaged: its metadata is not an object")
    return metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """CRC-32 over names, types, shapes and contents: safetensors itself would not notice a flipped bit."""
    checksum = zlib.crc32(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes_of(tensor).data, checksum)
    return f"{checksum:08x}"


def take_tensor(tensors: Mapping[str, Tensor], name: str, shape: Iterable[int | None], dtype: torch.dtype) -> Tensor:
    """The named tensor, checked; None in the shape fits any length. Raises `SnapshotError`."""
    expected = list(shape)
    if name not in tensors:
        raise SnapshotError(f"The snapshot lacks the tensor {name!r}")
    tensor = tensors[name]
    fits = len(expected) == tensor.dim() and all(
        want is None or want == has for want, has in zip(expected, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = ["any" if want is None else want for want in expected]
        raise SnapshotError(
            f"The snapshot's tensor {name!r} should be {dtype} {wanted}, but is {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


@contextmanager
def refusing_misfits() -> Iterator[None]:
    """Turns what reading a state of the wrong form raises into `SnapshotError`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"The state cannot be loaded: {type(error).__name__}: {error}") from error
