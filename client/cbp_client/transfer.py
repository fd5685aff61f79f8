"""Learners as files: streamed to and from the server, never whole in memory."""

# ruff: noqa: ASYNC109 - `timeout` covers a call with its retries, as users of gRPC know it

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import grpc

from cbp_client.arguments import invalid
from cbp_client.errors import ServerError
from cbp_client.rpc import Connection
from cbp_client.types import ExportFormat
from cbp_proto.v1 import learner_pb2, learner_service_pb2

#: A path, or a file opened in binary mode.
PathOrFile: TypeAlias = str | os.PathLike[str] | BinaryIO

#: What a file's name says of its format.
SUFFIXES: Final[dict[str, ExportFormat]] = {".safetensors": "safetensors", ".onnx": "onnx", ".pt2": "torch_export"}

_REFUSAL_SECONDS = 0.2  # an import is rare and not short, so this delays little
_PART_BYTES = 128 * 1024  # of a file on its way to the server, which must take messages of that size

_Upload = grpc.aio.StreamUnaryCall[learner_service_pb2.ImportLearnerRequest, learner_pb2.Learner]


def export_format(target: PathOrFile, given: ExportFormat | None) -> ExportFormat:
    """The format that was given, or else the one that the name of the file says.

    Raises:
        InvalidArgument: neither says one.
    """
    if given is not None:
        return given
    is_path = isinstance(target, str | os.PathLike)
    name = target if is_path else getattr(target, "name", None)
    suffix = Path(name).suffix.lower() if isinstance(name, str | os.PathLike) else ""
    found = SUFFIXES.get(suffix)
    if found is None and is_path:
        raise invalid("format", f"must be given, or the file's name end in {', '.join(SUFFIXES)}, not {suffix!r}")
    return found or "safetensors"


async def download(
    connection: Connection,
    request: learner_service_pb2.ExportLearnerRequest,
    target: PathOrFile,
    *,
    timeout: float | None,
) -> int:
    """Write an export to `target`; returns its size in bytes. A path is written whole or not at all."""
    if not isinstance(target, str | os.PathLike):
        return await _download(connection, request, target, timeout=timeout)

    async def attempt(request: learner_service_pb2.ExportLearnerRequest, /, *, timeout: float | None = None) -> int:
        with _replacing(Path(target)) as file:
            size = await _download(connection, request, file, timeout=timeout)
            await asyncio.to_thread(_sync, file)
            return size

    size: int = await connection.call(attempt, request, retry=True, timeout=timeout)
    return size


async def upload(
    connection: Connection,
    header: learner_service_pb2.ImportHeader,
    source: PathOrFile,
    *,
    timeout: float | None,
) -> learner_pb2.Learner:
    """Send `source` as a new learner. The header's request_id makes that safe to repeat, which a path is and a file
    that is open already is not."""
    if not isinstance(source, str | os.PathLike):
        return await _upload(connection, header, source, timeout=timeout)

    async def attempt(
        header: learner_service_pb2.ImportHeader, /, *, timeout: float | None = None
    ) -> learner_pb2.Learner:
        with await asyncio.to_thread(Path(source).open, "rb") as file:
            return await _upload(connection, header, file, timeout=timeout)

    learner: learner_pb2.Learner = await connection.call(attempt, header, retry=True, timeout=timeout)
    return learner


async def _download(
    connection: Connection,
    request: learner_service_pb2.ExportLearnerRequest,
    file: BinaryIO,
    *,
    timeout: float | None,
) -> int:
    size = 0
    responses = connection.learners.ExportLearner(request, timeout=timeout)
    async with contextlib.aclosing(connection.stream(responses)) as parts:
        async for part in parts:
            await asyncio.to_thread(file.write, part.data)
            size += len(part.data)
    if not size:
        raise ServerError("the server sent an empty file", reason="STREAM_PROTOCOL")
    return size


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an exception."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


async def _upload(
    connection: Connection, header: learner_service_pb2.ImportHeader, file: BinaryIO, *, timeout: float | None
) -> learner_pb2.Learner:
    call = connection.learners.ImportLearner(timeout=timeout)
    try:
        with connection.translated_errors():
            # A call that the server has ended takes no more messages; its outcome says why.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(learner_service_pb2.ImportLearnerRequest(header=header))
                await _wait_for_refusal(call)
                async for data in _parts(file):
                    await call.write(learner_service_pb2.ImportLearnerRequest(data=data))
                await call.done_writing()
            return await call
    finally:
        call.cancel()


async def _wait_for_refusal(call: _Upload) -> None:
    """A server that does not want the learner ends the call at its header. With a part of the file on its way at that
    moment, grpc.aio would lose the status that says why."""
    ended = asyncio.create_task(call.code())
    await asyncio.wait([ended], timeout=_REFUSAL_SECONDS)
    ended.cancel()


async def _parts(file: BinaryIO) -> AsyncIterator[bytes]:
    while data := await asyncio.to_thread(file.read, _PART_BYTES):
        yield data
