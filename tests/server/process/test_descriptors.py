"""As many file descriptors as there may be."""

import asyncio
import errno
import resource
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from cbp_server.process.descriptors import raise_descriptor_limit, tell_of_exhaustion


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_becomes_the_hard_one_and_the_log_says_so(limits):
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    with capture_logs() as logged:
        raise_descriptor_limit()
        raise_descriptor_limit()  # nothing to do any more
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 2**20)
    assert [(line["limit"], line["before"]) for line in logged] == [(min(hard, 2**20), 200)]


@pytest.mark.parametrize(("hard", "wanted"), [(resource.RLIM_INFINITY, 2**20), (2**30, 2**20), (4096, 4096)])
def test_a_limit_that_is_none_is_not_asked_for(monkeypatch, hard, wanted):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    raise_descriptor_limit()
    assert asked == [(wanted, hard)]


async def test_other_exceptions_of_the_loop_are_told_as_before():
    loop = asyncio.get_running_loop()
    told = []
    loop.default_exception_handler = told.append
    tell_of_exhaustion(loop)
    with capture_logs() as logged:
        for _ in range(3):
            loop.call_exception_handler({"message": "accept", "exception": OSError(errno.EMFILE, "many"), "socket": 1})
        loop.call_exception_handler({"message": "bug", "exception": ValueError("why")})
        loop.call_exception_handler({"message": "file", "exception": OSError(errno.EMFILE, "many")})
    assert [line["error"] for line in logged] == ["many"]
    assert [context["message"] for context in told] == ["bug", "file"]
