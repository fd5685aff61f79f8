"""The catalog covers the whole error tree and says each error as both protocols need it."""

import base64
import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Literal, get_args, get_origin, get_type_hints
from urllib.parse import quote

import grpc
import pytest

import cbp
import cbp_proto
import cbp_server
from cbp import BatchError, CbpError, DivergenceError, FieldViolation, FormatError, SnapshotError, SpecError
from cbp_server import errors
from cbp_server.records.learners import Quarantine
from cbp_server.rpc.errors import brief_description, rich_status


def tree(root: type[CbpError]) -> Iterator[type[CbpError]]:
    for child in root.__subclasses__():
        yield child
        yield from tree(child)


INSTANCES = [
    SpecError([FieldViolation("batch_size", "must be positive")]),
    BatchError([FieldViolation("features", "wrong shape")]),
    SnapshotError("torn"),
    FormatError("ONNX is for plain ones"),
    errors.InvalidRequest(FieldViolation("name", "wrong form")),
    errors.MalformedRequest("cbp.v1.GetLearnerRequest"),
    errors.LearnerNotFound("clicks"),
    errors.LearnerExists("clicks"),
    DivergenceError(7, "loss"),
    errors.LearnerReplaced("clicks", "uid"),
    errors.LearnerNotDeleted("clicks"),
    errors.LearnerQuarantined("clicks", Quarantine(4, "web", 3, "diverged", datetime(2026, 1, 1, tzinfo=UTC))),
    errors.LearnerNotQuarantined("clicks"),
    errors.CheckpointNotFound("clicks", 3),
    errors.CheckpointNeeded("clicks", 3),
    errors.PositionNotHeld("clicks", 1, 9),
    errors.NotInEngine(),
    errors.BatchNotLearnt(4, "web", 3, "diverged", diverged=True),
    errors.ExportFailed("no reason given"),
    errors.RequestIdReused("a-b"),
    errors.EtagMismatch("clicks", "abc"),
    errors.LimitReached(3),
    errors.MessageTooLarge(10, 5),
    errors.StreamProtocolError("open first"),
    errors.CreditsExceeded(),
    errors.SequenceGap(5, 3),
    errors.SequenceReused(5),
    errors.ProducerFenced("web", 2),
    errors.ProducerNotFound("clicks", "web"),
    errors.TooManyProducers(1000, 12, 300.0),
    errors.EngineUnavailable(),
    errors.EngineFault("Sample failed"),
    errors.CheckpointFailed("disk full"),
    errors.CheckpointsUnreachable("connection refused"),
    errors.JournalUnavailable("database or disk is full"),
    errors.JournalDamaged("uid", 3),
    errors.ServerDraining(),
]


def test_every_error_that_can_be_raised_is_in_the_catalog():
    leaves = {error for error in tree(CbpError) if not error.__subclasses__() and not error.__name__.startswith("_")}
    assert leaves == set(errors.CATALOG)
    assert leaves == {type(instance) for instance in INSTANCES}


def test_reasons_are_unique():
    reasons = [entry.reason for entry in errors.CATALOG.values()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_process_boundary(error):
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert errors.describe(copied) == errors.describe(error)


#: An argument of each type that an error takes.
ARGUMENTS = {
    str: "why",
    int: 7,
    float: 0.5,
    bool: True,
    FieldViolation: FieldViolation("features", "wrong shape"),
    Iterable[FieldViolation]: [FieldViolation("features", "wrong shape")],
    Quarantine: Quarantine(4, "web", 3, "diverged", datetime(2026, 1, 1, tzinfo=UTC)),
}


def raisable() -> list[type[Exception]]:
    """Every exception that a module of the server, or of what it hosts, defines."""
    found: dict[type[Exception], None] = {}
    for package in (cbp, cbp_proto, cbp_server):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.rpartition(".")[2].startswith("__") and ".migrations." not in info.name:
                values = vars(importlib.import_module(info.name)).values()
                found |= {cls: None for cls in values if isinstance(cls, type) and issubclass(cls, Exception)}
    return [cls for cls in found if cls.__module__.partition(".")[0] in ("cbp", "cbp_proto", "cbp_server")]


def made(cls: type[Exception]) -> Exception:
    """One with every argument that it takes."""
    if not inspect.isfunction(cls.__init__):  # it is that of Exception, or of ValueError
        return cls("why")
    types = get_type_hints(cls.__init__)
    arguments: list[object] = []
    keywords: dict[str, object] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        options = get_args(types[name]) if get_origin(types[name]) is Literal else ()
        value = options[0] if options else ARGUMENTS[types[name]]
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[name] = value
        else:
            arguments.append(value)
    return cls(*arguments, **keywords)


@pytest.mark.parametrize("cls", raisable(), ids=lambda cls: cls.__name__)
def test_whatever_can_be_raised_is_the_same_behind_any_process_boundary(cls):
    error = made(cls)
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(copied) is cls
        assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
def test_every_error_says_something_in_both_protocols(error):
    description = errors.describe(error)
    assert description.message == str(error) != ""
    assert 400 <= description.http_status < 600
    assert description.code is not grpc.StatusCode.OK
    status = rich_status(error)
    assert status.details == str(error)
    assert status.code is description.code


HUGE = "é\0" * 10**5
HUGE_ERRORS = [
    SpecError([FieldViolation(HUGE, HUGE)] * 100),
    errors.InvalidRequest(FieldViolation(HUGE, HUGE)),
    SnapshotError(HUGE),
    errors.LearnerNotFound(HUGE),
    errors.ProducerFenced("🙂" * 128, 2),
    errors.EngineFault(HUGE),
]


@pytest.mark.parametrize("error", HUGE_ERRORS, ids=lambda error: type(error).__name__)
def test_no_error_is_too_long_for_a_status(error):
    """Trailers over 8 KiB may not arrive, and the message in them is sent with three bytes for one beyond ASCII."""
    status = rich_status(error)
    size = len(quote(status.details)) + sum(len(base64.b64encode(value)) for _, value in status.trailing_metadata)
    assert size < 7900


def test_the_first_of_many_violations_are_told_and_the_others_counted():
    description = brief_description(SpecError(FieldViolation(f"hidden[{n}]", "is 0") for n in range(1000)))
    assert description.violations[0] == FieldViolation("hidden[0]", "is 0")
    assert description.violations[-1] == FieldViolation("…", "and 980 more")
    assert len(description.violations) == 21
    whole = SpecError(FieldViolation(f"hidden[{n}]", "is 0") for n in range(20))
    assert brief_description(whole).violations == whole.violations


def test_a_clipped_text_is_whole_characters():
    for length in range(590, 605):
        message = brief_description(errors.EngineFault("x" * (length - 590) + "é" * 400)).message
        assert len(message.encode()) <= 600
        assert message.endswith("é…")


def test_only_failures_that_pass_ask_for_a_retry():
    for error, entry in errors.CATALOG.items():
        assert (entry.retry_seconds is not None) == (entry.code is grpc.StatusCode.UNAVAILABLE), error


def test_a_foreign_error_gives_no_detail_away():
    description = errors.describe(RuntimeError("password is 1234"))
    assert description.code is grpc.StatusCode.INTERNAL
    assert "1234" not in description.message
