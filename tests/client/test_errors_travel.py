"""Errors reach other processes whole: multiprocessing, concurrent.futures, Ray and the like pickle them."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest

import cbp_client
import cbp_client.cli
from cbp_client import BatchesLost, BatchRejected, CbpClientError, FieldViolation, RejectedBatch

_VIOLATION = FieldViolation("features", "must be numbers")
#: How to make an error of a class whose constructor differs from that of `CbpClientError`.
_SAMPLES: dict[type[CbpClientError], Callable[[], CbpClientError]] = {
    BatchRejected: lambda: BatchRejected(
        [RejectedBatch(n, "day", "why", "INVALID_BATCH", (_VIOLATION,)) for n in (1, 2)]
    ),
    BatchesLost: lambda: BatchesLost(expected=3, oldest_held=9),
}


def _family(error_type: type[CbpClientError]) -> Iterator[type[CbpClientError]]:
    yield error_type
    for child in error_type.__subclasses__():
        yield from _family(child)


def _sample(error_type: type[CbpClientError]) -> CbpClientError:
    if error_type.__init__ is not CbpClientError.__init__:
        return _SAMPLES[error_type]()
    return error_type(
        "what is wrong", reason="REASON", violations=[_VIOLATION], metadata={"sequence": "7"}, retry_after=1.5
    )


def test_every_public_error_is_of_the_family() -> None:
    public = {getattr(cbp_client, name) for name in cbp_client.__all__}
    errors = {item for item in public if isinstance(item, type) and issubclass(item, BaseException)}

    assert errors == {item for item in _family(CbpClientError) if item.__module__.startswith("cbp_client")}


@pytest.mark.parametrize("error_type", list(_family(CbpClientError)))
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickle_and_copies(error_type: type[CbpClientError], protocol: int) -> None:
    error = _sample(error_type)
    error.add_note("seen by the worker")

    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is error_type
        assert (str(back), repr(back), back.args) == (str(error), repr(error), error.args)
        assert back.__dict__ == error.__dict__
