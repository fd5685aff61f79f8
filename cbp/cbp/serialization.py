"""A learner's whole state as tensors and plain values, and as bytes: safetensors, which other tools can read.

The plain values travel as one JSON string under the key "cbp" of the file's metadata; callers may add keys of their
own.
"""

import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from cbp.errors import FieldViolation, SnapshotError, SpecError, shown
from cbp.spec.learner_spec import LearnerSpec

FORMAT_VERSION = 1
_METADATA_KEY = "cbp"
_CHECKSUM_KEY = "cbp_checksum"
_HEADER_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8
_DTYPE_NAMES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
_DEEPEST_NESTING = 32
"""Of JSON: what goes through it one level after another must not run out of stack."""


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
        if version != FORMAT_VERSION or isinstance(version, bool | float):
            text = f"The snapshot has format version {shown(version)}; this package reads {FORMAT_VERSION}"
            raise SnapshotError(text, [FieldViolation("format_version", f"Expected {FORMAT_VERSION}")])
        if "spec" not in self.metadata:
            raise SnapshotError.of([FieldViolation("spec", "Field required")])
        try:
            return LearnerSpec.parse(self.metadata["spec"])
        except SpecError as error:
            raise SnapshotError.of_spec(error) from error

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
        for name, tensor in tensors.items():
            _dtype_name(name, tensor)
        if header[_CHECKSUM_KEY] != _checksum(tensors, header[_METADATA_KEY]):
            raise SnapshotError("The snapshot is damaged: its checksum does not match its contents")
        metadata = read_object(header[_METADATA_KEY], "metadata")
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
        dtype = _dtype_name(name, tensor)
        parts.append(_bytes_of(tensor))
        end = start + tensor.nbytes
        header[name] = {
            "dtype": dtype,
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


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPE_NAMES:
        text = f"The snapshot's tensor {shown(name)} is {tensor.dtype}, which no snapshot holds"
        raise SnapshotError(text, [FieldViolation(name, f"Expected float32, int64 or uint8, got {tensor.dtype}")])
    return _DTYPE_NAMES[tensor.dtype]


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
    metadata = _read_json(data[_HEADER_LENGTH_BYTES:end], "header").get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SnapshotError("The snapshot is damaged: its metadata is not an object of strings")
    return metadata


def read_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in a part of a snapshot. Raises `SnapshotError`, also if it is nested too deeply."""
    value = _read_json(text, what)
    level: list[Any] = [value]
    depth = 0
    while level := [inner for outer in level for inner in _values_in(outer) if isinstance(inner, dict | list)]:
        depth += 1
        if depth == _DEEPEST_NESTING:
            raise SnapshotError(f"The snapshot is damaged: its {what} is nested more than {depth} levels deep")
    return value


def _read_json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"The snapshot is damaged: its {what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise SnapshotError(f"The snapshot is damaged: its {what} is not a JSON object")
    return value


def _values_in(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _checksum(tensors: Mapping[str, Tensor], metadata: str) -> str:
    """CRC-32 over names, types, shapes and contents: safetensors itself would not notice a flipped bit."""
    checksum = zlib.crc32(metadata.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes_of(tensor).data, checksum)
    return f"{checksum:08x}"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Which numbers a tensor may hold: finite ones, within bounds."""

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False


FINITE = Numbers()
NOT_NEGATIVE = Numbers(least=0.0)


def counts(most: int) -> Numbers:
    """Whole numbers from 0 on."""
    return Numbers(least=0, most=most, whole=True)


def take_tensor(
    tensors: Mapping[str, Any],
    name: str,
    shape: Iterable[int | None],
    dtype: torch.dtype,
    numbers: Numbers | None = None,
) -> Tensor:
    """The named tensor, checked; None in the shape fits any length, and `numbers` None any number, also none.

    Raises `SnapshotError`.
    """
    expected = list(shape)
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        raise SnapshotError(f"The snapshot lacks the tensor {name!r}", [FieldViolation(name, "Field required")])
    fits = len(expected) == tensor.dim() and all(
        want is None or want == has for want, has in zip(expected, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = ["any" if want is None else want for want in expected]
        problem = f"should be {dtype} {wanted}, but is {tensor.dtype} {list(tensor.shape)}"
        raise SnapshotError(f"The snapshot's tensor {name!r} {problem}", [FieldViolation(name, problem)])
    if numbers is not None:
        check_numbers(name, tensor, numbers)
    return tensor


def check_numbers(name: str, tensor: Tensor, numbers: Numbers) -> None:
    """Raises `SnapshotError` if the tensor, of this name in the snapshot, holds others."""
    if not tensor.numel():
        return
    on_host = tensor.detach().cpu()
    values = (on_host.float() if on_host.dtype in (torch.bfloat16, torch.float16) else on_host).numpy()
    low, high = values.min(), values.max()  # NaN if any is: no comparison holds for it
    fits = -math.inf < low and high < math.inf and numbers.least <= low and high <= numbers.most
    if fits and numbers.whole and values.dtype.kind == "f":
        fits = bool((np.floor(values) == values).all())
    if not fits:
        kind = "whole numbers" if numbers.whole else "finite numbers"
        bounds = "" if numbers == FINITE else f" from {numbers.least:g}"
        bounds += f" to {numbers.most:.17g}" if numbers.most < math.inf else ""
        problem = f"should hold {kind}{bounds}; its least is {low}, its largest {high}"
        raise SnapshotError(f"The snapshot's tensor {name!r} {problem}", [FieldViolation(name, problem)])
