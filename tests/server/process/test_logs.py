"""A library that repeats itself does not fill the log."""

import logging

from cbp_server.process.logs import RepeatFilter


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(message, *args, name="uvicorn.error", error=None):
    exc_info = (type(error), error, None) if error else None
    return logging.LogRecord(name, logging.ERROR, __file__, 1, message, args, exc_info)


def test_a_line_that_repeats_comes_once_and_says_later_how_often_it_was_left_out():
    clock = Clock()
    repeats = RepeatFilter(clock)
    assert [repeats.filter(record("Invalid request\nfrom %d", peer)) for peer in range(5)] == [True] + 4 * [False]
    clock.now += 10
    again = record("Invalid request\nfrom 9")
    assert repeats.filter(again)
    assert vars(again)["left_out"] == 4
    clock.now += 10
    calm = record("Invalid request\nfrom 9")
    assert repeats.filter(calm)
    assert "left_out" not in vars(calm)


def test_what_differs_passes():
    repeats = RepeatFilter(Clock())
    different = [
        record("request %d failed", 1),
        record("request %d failed", 2),
        record("request %d failed", 2, name="asyncio"),
        record("request %d failed", 2, error=OSError("full")),
        record("request %d failed", 2, error=OSError("gone")),
    ]
    assert all(repeats.filter(one) for one in different)


def test_what_the_server_says_itself_passes():
    repeats = RepeatFilter(Clock())
    assert all(repeats.filter(record({"event": "learner created", "learner": "clicks"})) for _ in range(3))


def test_it_remembers_a_bounded_number_of_lines():
    repeats = RepeatFilter(Clock())
    assert all(repeats.filter(record("line %d", number)) for number in range(1000))
    assert not repeats.filter(record("line 999"))
    assert repeats.filter(record("line 0"))
