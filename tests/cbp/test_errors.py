"""Errors reach other processes whole: DataLoader workers, multiprocessing, Ray and the like pickle them."""

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator

import pytest

import cbp
from cbp.errors import BatchError, CbpError, DivergenceError, FieldViolation, FormatError, SnapshotError, SpecError

for module in pkgutil.walk_packages(cbp.__path__, "cbp."):
    importlib.import_module(module.name)  # for every error that the package defines

_VIOLATIONS = [FieldViolation("optimizer.lr", "must be positive"), FieldViolation("loss", "must be given")]
_SAMPLES: dict[type[CbpError], Callable[[], CbpError]] = {
    CbpError: lambda: CbpError("what is wrong"),
    SpecError: lambda: SpecError(iter(_VIOLATIONS)),
    BatchError: lambda: BatchError(_VIOLATIONS),
    DivergenceError: lambda: DivergenceError(3, "loss"),
    FormatError: lambda: FormatError("ONNX cannot hold it"),
    SnapshotError: lambda: SnapshotError("it is damaged"),
}


def _family(error_type: type[CbpError]) -> Iterator[type[CbpError]]:
    yield error_type
    for child in error_type.__subclasses__():
        yield from _family(child)


_PUBLIC = [
    item for item in _family(CbpError) if not item.__name__.startswith("_") and item.__module__.startswith("cbp.")
]


@pytest.mark.parametrize("error_type", _PUBLIC)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickle_and_copies(error_type: type[CbpError], protocol: int) -> None:
    error = _SAMPLES[error_type]()
    error.add_note("seen by the worker")

    for back in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is error_type
        assert (str(back), repr(back), back.args) == (str(error), repr(error), error.args)
        assert back.__dict__ == error.__dict__
