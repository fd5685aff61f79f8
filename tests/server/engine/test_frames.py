"""What front and engine say to each other arrives whole, however the kernel cuts it."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from cbp_server.engine.connection import EngineConnection
from cbp_server.engine.frames import FrameReader, encode_frame, receive_frame

LARGE = np.arange(300_001, dtype=np.float32)
MESSAGES = [
    "small",
    {"features": np.arange(6, dtype=np.float32).reshape(2, 3)},
    ("labels", np.arange(4_099, dtype=np.int64), np.arange(65_537, dtype=np.uint8), LARGE),
    bytes(400_000),
    None,
    LARGE[:30_000:2],
]


def received(reader: FrameReader, data: bytes, piece: int) -> list[object]:
    messages: list[object] = []
    while data:
        space = reader.space()[:piece]
        count = min(len(space), len(data))
        space[:count] = data[:count]
        data = data[count:]
        for frame in reader.received(count):
            messages += frame
    return messages


def encoded(*frames: list[object]) -> bytes:
    return b"".join(part for frame in frames for part in encode_frame(frame))


@pytest.mark.parametrize("piece", [1_009, 65_536, 2**22])
def test_messages_arrive_as_they_were_sent(piece: int) -> None:
    arrived = received(FrameReader(), encoded(*([message] for message in MESSAGES), MESSAGES), piece)

    assert len(arrived) == 2 * len(MESSAGES)
    for message, sent in zip(arrived, MESSAGES + MESSAGES, strict=True):
        np.testing.assert_equal(message, sent)


def test_messages_of_a_few_bytes_may_come_byte_by_byte() -> None:
    assert received(FrameReader(), encoded(["first"], ["second", "third"]), 1) == ["first", "second", "third"]


def test_a_thread_receives_frame_by_frame_until_the_other_end_has_closed() -> None:
    ours, theirs = socket.socketpair()
    sending = threading.Thread(target=ours.sendall, args=(encoded(MESSAGES, ["last"]) + encoded(["cut off"])[:-1],))
    with theirs:
        with ours:
            sending.start()
            np.testing.assert_equal(receive_frame(theirs), MESSAGES)
            assert receive_frame(theirs) == ["last"]
            sending.join()
        assert receive_frame(theirs) is None


def test_arrays_stay_as_they_are_when_more_is_received() -> None:
    reader = FrameReader()
    first, second = (encoded([np.full(20_000, value, dtype=np.float32)]) for value in (1, 2))
    [array] = received(reader, first, 2**20)
    received(reader, second, 2**20)

    assert isinstance(array, np.ndarray)
    assert (array == 1).all()
    assert array.flags.aligned
    assert array.flags.writeable


def test_large_arrays_are_sent_from_where_they_lie() -> None:
    assert any(np.shares_memory(np.frombuffer(part, dtype=np.uint8), LARGE) for part in encode_frame([LARGE]))


@asynccontextmanager
async def connected(arrived: list[object]) -> AsyncIterator[tuple[EngineConnection, socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = EngineConnection(ours, arrived.append)
    with theirs:
        yield connection, theirs
        connection.close()


def read(end: socket.socket, count: int) -> list[object]:
    end.settimeout(10)
    reader, messages = FrameReader(), list[object]()
    while len(messages) < count:
        for frame in reader.received(end.recv_into(reader.space())):
            messages += frame
    return messages


async def test_what_is_urgent_overtakes_what_is_not_on_its_way() -> None:
    async with connected([]) as (connection, theirs):
        for number in range(20):
            connection.send((number, LARGE), LARGE.nbytes)
        connection.send("urgent", urgent=True)
        connection.send("last")
        messages = await asyncio.to_thread(read, theirs, 22)

    kinds = [message[0] if isinstance(message, tuple) else message for message in messages]
    assert kinds[-1] == "last"
    assert [kind for kind in kinds if isinstance(kind, int)] == list(range(20))
    assert kinds.index("urgent") < 19


async def test_the_other_end_is_heard_out_before_the_connection_closes() -> None:
    arrived: list[object] = []
    async with connected(arrived) as (connection, theirs):
        for message in MESSAGES:
            await asyncio.to_thread(theirs.sendall, encoded([message]))
        theirs.close()
        connection.send("lost")
        await asyncio.wait_for(connection.wait_closed(), 10)

    np.testing.assert_equal(arrived, MESSAGES)


async def test_what_a_message_fails_with_ends_the_connection() -> None:
    def fail(message: object) -> None:
        raise ValueError(message)

    ours, theirs = socket.socketpair()
    connection = EngineConnection(ours, fail)
    with theirs:
        theirs.sendall(encoded(["bad"]))
        with pytest.raises(ValueError, match="bad"):
            await asyncio.wait_for(connection.wait_closed(), 10)
