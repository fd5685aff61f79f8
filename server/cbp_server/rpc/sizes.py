"""Answers that hold many things: as many as fit into a message."""

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message

from cbp_proto import MAX_MESSAGE_BYTES

MessageT = TypeVar("MessageT", bound=Message)

#: Of an answer that others of its kind follow: every client takes so much, whatever its gRPC was told.
COMPACT_BYTES = 3 * 2**20
#: Of an answer that is alone.
WHOLE_BYTES = MAX_MESSAGE_BYTES - 2**16


def fitting(messages: Iterable[MessageT], most_bytes: int) -> list[MessageT]:
    """The first of `messages` that take so many bytes together, but one at least; those behind them are not made."""
    taken: list[MessageT] = []
    for message in messages:
        most_bytes -= message.ByteSize()
        if taken and most_bytes < 0:
            break
        taken.append(message)
    return taken
