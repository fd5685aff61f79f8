"""Frames on the socket between front and engine: lists of messages, pickled, with large arrays behind them as they
lie in memory.

    header | lengths of the arrays | pickle | padding, array | padding, array …

A frame is gathered from its parts by the kernel when it is sent, and received into one block of memory, of which the
arrays are then parts: neither end copies them.
"""

import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import TypeAlias, cast

import numpy as np

#: Parts of a frame, to be sent in this order.
Parts: TypeAlias = list[memoryview]

_HEADER = struct.Struct("<QII")  # bytes behind the header, bytes of the pickle, number of arrays
_LENGTH = struct.Struct("<Q")
#: Arrays of fewer bytes are copied into the pickle.
_LARGE = 16 * 1024
#: Of an array within its frame, so that the widest dtype can be read where it lies.
_ALIGNMENT = 16
_PADDING = bytes(_ALIGNMENT)
#: Many small frames are received at a time.
_RECEIVED_AT_ONCE = 256 * 1024


def encode_frame(messages: Sequence[object]) -> Parts:
    """A frame of these messages, whose arrays must not change until its parts are sent."""
    arrays: list[memoryview] = []

    def is_small(buffer: pickle.PickleBuffer) -> bool:
        data = buffer.raw()
        if data.nbytes < _LARGE:
            return True
        arrays.append(data)
        return False

    payload = pickle.dumps(list(messages), protocol=5, buffer_callback=is_small)
    lengths = b"".join(_LENGTH.pack(array.nbytes) for array in arrays)
    end = _HEADER.size + len(lengths) + len(payload)
    parts: Parts = []
    for array in arrays:
        padding = -end % _ALIGNMENT
        if padding:
            parts.append(memoryview(_PADDING)[:padding])
        parts.append(array)
        end += padding + array.nbytes
    head = _HEADER.pack(end - _HEADER.size, len(payload), len(arrays))
    return [memoryview(b"".join((head, lengths, payload))), *parts]


def receive_frame(connection: socket.socket) -> list[object] | None:
    """The messages of the next frame, waiting for it; None if the other end has closed, or ends within a frame.

    Frames are received where they stay, by a thread that holds the interpreter's lock only to decode them.
    """
    header = memoryview(bytearray(_HEADER.size))
    if not _filled(connection, header):
        return None
    frame = np.empty(_HEADER.size + _HEADER.unpack_from(header)[0], np.uint8).data
    frame[: _HEADER.size] = header
    return _decoded(frame) if _filled(connection, frame[_HEADER.size :]) else None


def _filled(connection: socket.socket, space: memoryview) -> bool:
    while space:  # a signal may end a call early
        count = connection.recv_into(space, 0, socket.MSG_WAITALL)
        if not count:
            return False
        space = space[count:]
    return True


class FrameReader:
    """Cuts what is received into frames.

    Usage: receive into `space()`, then take what `received(count)` gives.
    """

    def __init__(self) -> None:
        self._ahead = memoryview(bytearray(_RECEIVED_AT_ONCE))
        self._filled = 0
        self._large: memoryview | None = None  # a frame that does not fit there
        self._missing = 0  # bytes of it

    def space(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        if self._large is not None:
            return self._large[len(self._large) - self._missing :]
        return self._ahead[self._filled :]

    def received(self, count: int) -> Iterator[list[object]]:
        """The messages of each frame that is whole with these `count` bytes; to be exhausted before the next ones."""
        if self._large is None:
            self._filled += count
            yield from self._cut()
            return
        self._missing -= count
        if not self._missing:
            frame, self._large = self._large, None
            yield _decoded(frame)

    def _cut(self) -> Iterator[list[object]]:
        start = 0
        while (rest := self._filled - start) >= _HEADER.size:
            size = _HEADER.size + _HEADER.unpack_from(self._ahead, start)[0]
            if rest >= size:
                # A copy: what is received next must not overwrite arrays that are still in use.
                yield _decoded(memoryview(bytearray(self._ahead[start : start + size])))
                start += size
                continue
            if size > len(self._ahead):
                self._large, self._missing = np.empty(size, np.uint8).data, size - rest
                self._large[:rest] = self._ahead[start : self._filled]
                start = self._filled
            break
        left = self._ahead[start : self._filled]
        if start and left:
            self._ahead[: len(left)] = bytes(left)
        self._filled = len(left)


def _decoded(frame: memoryview) -> list[object]:
    """The messages in a whole frame, which came from the other end of this process's own socket pair."""
    _, payload_bytes, count = _HEADER.unpack_from(frame)
    start = _HEADER.size + count * _LENGTH.size
    payload = frame[start : start + payload_bytes]
    lengths = [_LENGTH.unpack_from(frame, _HEADER.size + index * _LENGTH.size)[0] for index in range(count)]
    arrays = []
    end = start + payload_bytes
    for length in lengths:
        end += -end % _ALIGNMENT
        arrays.append(frame[end : end + length])
        end += length
    return cast(list[object], pickle.loads(payload, buffers=arrays))
