"""Every argument of every public method, given something absurd: the error is the client's, names the argument and
says what it has to be, and nothing is sent."""

import asyncio
import inspect
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cbp_client import (
    AsyncClient,
    AsyncLearner,
    AsyncTrainingStream,
    Client,
    InvalidArgument,
    Learner,
    Ticket,
    TrainingStream,
)
from tests.client.scripted_server import ScriptedServer

NETWORK = {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3}
FEATURES, TARGETS = np.zeros((2, 4)), [0, 1]
NAN, LONE_SURROGATE = float("nan"), "\ud800"


async def _asynchronous(_: Any) -> None: ...


_TEXT: list[Any] = [None, 3, b"clicks", ["clicks"], LONE_SURROGATE]
_FLAG: list[Any] = [None, "no", 1, []]
_WHOLE: list[Any] = ["3", 2.5, True, NAN, 2**70, [3], object()]
_NUMBER: list[Any] = ["0.1", NAN, float("inf"), 10**400, [0.1], object()]
_SECONDS: list[Any] = ["3", -1, NAN, float("inf"), 1e300, True, object()]
_PLAIN: list[Any] = [3, [1], {"nothing": 1}, {3: 4}, {LONE_SURROGATE: 1}, object()]
_ARRAY: list[Any] = [
    None,
    "abc",
    object(),
    {1: 2},
    3.5,
    [[1.0], [1.0, 2.0]],
    [["a"]],
    [[None, 1.0]],
    [[1j]],
    [[10**400]],
    np.ma.masked_array([[1.0, 2.0]], mask=[[True, False]]),
    [np.ma.masked_array([1.0, 2.0], mask=[True, False])],
    np.zeros((2, 4), "M8[s]"),
    np.zeros((2, 4), [("a", "f4")]),
    iter([[1.0]]),
]
_DURABILITY: list[Any] = ["disk", 3, ["fsync"], object()]
_FILE: list[Any] = [None, 3, b"file", "", "a\0b.onnx", io.StringIO()]
_CALLBACK: list[Any] = ["print", 3, _asynchronous]

#: What each method is given besides the absurd value, and the absurd values of each argument.
_TABLE: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "Client.__init__": (
        {},
        {
            "target": [None, 3, "", "a b", "http://localhost:50051", "localhost:", "localhost:port", "h:0", "h:65536"],
            "timeout": _SECONDS,
            "credentials": ["secret", object()],
        },
    ),
    "Client.wait_until_ready": ({}, {"timeout": _SECONDS}),
    "Client.create_learner": (
        {"learner_id": "clicks", "network": NETWORK},
        {
            "learner_id": _TEXT,
            "network": [*_PLAIN, None, "mlp", {"kind": "nothing"}, {"kind": []}, NETWORK | {"hidden": "64"}],
            "loss": [*_PLAIN, "nothing", {"kind": "huber", "delta": "x"}],
            "optimizer": [*_PLAIN, "nothing", {"kind": "sgd", "lr": "fast"}, {"kind": "sgd", "lr": 10**400}],
            "batch_size": [value for value in _WHOLE if value is not True],
            "seed": [value for value in _WHOLE if value is not True],
            "precision": ["float16", 3, []],
            "resets": _PLAIN,
            "methods": [3, [3], ["nothing"], [{"kind": "nothing"}], object()],
            "monitoring": [*_PLAIN, {"interval": 2**70}],
            "durability": _DURABILITY,
            "exist_ok": _FLAG,
        },
    ),
    "Client.get_learner": ({}, {"learner_id": _TEXT}),
    "Client.list_learners": ({}, {"show_deleted": _FLAG}),
    "Client.delete_learner": ({}, {"learner_id": _TEXT}),
    "Client.undelete_learner": ({"learner_id": "clicks"}, {"learner_id": _TEXT, "uid": _TEXT[1:]}),
    "Client.purge_learner": ({"learner_id": "clicks"}, {"learner_id": _TEXT, "uid": _TEXT[1:]}),
    "Client.import_learner": (
        {"learner_id": "clicks", "source": __file__},
        {"learner_id": _TEXT, "source": _FILE, "durability": _DURABILITY, "timeout": _SECONDS},
    ),
    "Client.watch": (
        {},
        {"learner_ids": [3, [3], b"clicks", {"clicks": 1}, [LONE_SURROGATE]], "interval": [*_SECONDS, None]},
    ),
    "Learner.update": (
        {},
        {
            "resets": ["all", *_PLAIN],
            "optimizer": ["adam", *_PLAIN],
            "monitoring": _PLAIN,
            "durability": _DURABILITY,
            "if_unchanged": _FLAG,
            "unchangeable": [],  # below
        },
    ),
    "Learner.delete": ({}, {"if_unchanged": _FLAG}),
    "Learner.fork": ({"learner_id": "copy"}, {"learner_id": _TEXT, "durability": _DURABILITY}),
    "Learner.delete_checkpoint": ({}, {"number": [*_WHOLE, 0, None]}),
    "Learner.forget_producer": ({}, {"producer": _TEXT}),
    "Learner.restore": ({}, {"checkpoint": [*_WHOLE, 0], "position": [*_WHOLE, -1], "if_unchanged": []}),
    "Learner.resume": ({}, {"lr": _NUMBER, "skip_batch": _FLAG}),
    "Learner.reset_units": (
        {"layers": "all", "fraction": 0.5},
        {"layers": [None, 2.5, b"all", {"all": 1}, [None], [True], [2.5], object()], "fraction": [*_NUMBER, None]},
    ),
    "Learner.export": (
        {"target": "file.onnx"},
        {"target": _FILE, "format": ["pickle", 3, []], "timeout": _SECONDS},
    ),
    "Learner.predict": ({"features": FEATURES}, {"features": [*_ARRAY, [1.0, 2.0]], "timeout": _SECONDS}),
    "Learner.plasticity": ({}, {"history": [*_WHOLE, 0, 2**31, None], "fresh": _FLAG}),
    "Learner.stream": (
        {"producer": "web"},
        {
            "producer": _TEXT,
            "return_outputs": _FLAG,
            "max_in_flight_bytes": [*_WHOLE, -1, None],
            "resend_bytes": [*_WHOLE, -1, None],
            "reconnect_timeout": _SECONDS,
            "on_result": _CALLBACK,
            "on_rejection": _CALLBACK,
        },
    ),
    "TrainingStream.send": (
        {"features": FEATURES, "targets": TARGETS},
        {
            "features": [*_ARRAY, [1.0, 2.0]],
            "targets": [*_ARRAY, [0, 1, 2]],
            "weights": [*_ARRAY[1:], [[1.0], [1.0]], [1.0]],
            "task": [None, 2.5, True, b"day", ["day"], LONE_SURROGATE],
        },
    ),
    "TrainingStream.send_many": (
        {"features": FEATURES, "targets": TARGETS},
        {
            "features": _ARRAY,
            "targets": _ARRAY,
            "weights": _ARRAY[1:],
            "task": [None, 2.5, True, b"day", ["day"], LONE_SURROGATE],
            "examples_per_message": [*_WHOLE, 0, -1],
        },
    ),
    "TrainingStream.flush": ({}, {"durable": _FLAG, "timeout": _SECONDS}),
    "Ticket.result": ({}, {"timeout": _SECONDS}),
}  # fmt: skip


def _arguments(method: Any, options: type | None = None) -> set[str]:
    parameters = inspect.signature(method).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.name not in ("self", "options")}
    return named | (set(options.__annotations__) if options else set())


def _methods() -> Iterator[tuple[str, set[str]]]:
    from cbp_client import StreamOptions

    for owner in (Client, Learner, TrainingStream, Ticket):
        for name, member in vars(owner).items():
            if inspect.isfunction(member) and ((name == "__init__" and owner is Client) or not name.startswith("_")):
                arguments = _arguments(member, StreamOptions if name == "stream" else None)
                if arguments:
                    yield f"{owner.__name__}.{name}", arguments


def test_the_table_has_every_argument_of_every_method() -> None:
    assert {name: set(absurd) for name, (_, absurd) in _TABLE.items()} == dict(_methods())


@pytest.mark.parametrize(
    ("synchronous", "asynchronous"),
    [(Client, AsyncClient), (Learner, AsyncLearner), (TrainingStream, AsyncTrainingStream)],
)
def test_both_clients_have_the_same_arguments(synchronous: type, asynchronous: type) -> None:
    for name in ["__init__"] * (synchronous is Client) + [
        name for name in vars(synchronous) if not name.startswith("_")
    ]:
        method = getattr(synchronous, name)
        if inspect.isfunction(method):
            mine, other = (inspect.signature(getattr(owner, name)) for owner in (synchronous, asynchronous))
            assert str(mine).partition(" ->")[0] == str(other).partition(" ->")[0], name


def _cases() -> list[Any]:
    return [
        pytest.param(name, argument, value, id=f"{name}-{argument}-{place}")
        for name, (_, arguments) in _TABLE.items()
        for argument, values in arguments.items()
        for place, value in enumerate(values)
    ]


@pytest.fixture
async def owners(scripted: ScriptedServer) -> Any:
    """What the methods are called on, by class."""
    async with AsyncClient(scripted.target, timeout=5) as client:
        learner = await client.get_learner("clicks")
        async with learner.stream("web") as stream:
            yield {
                "Client": client,
                "Learner": learner,
                "TrainingStream": stream,
                "Ticket": await stream.send([[1.0, 2.0]], [1]),
            }


async def _call(owner: Any, method: str, arguments: dict[str, Any]) -> None:
    if method == "__init__":
        type(owner)(**arguments)
        return
    answer = getattr(owner, method)(**arguments)
    if inspect.isasyncgen(answer):
        async for _ in answer:
            return
    elif inspect.iscoroutine(answer):
        await answer


async def test_absurd_values_are_refused_by_name(scripted: ScriptedServer, owners: dict[str, Any]) -> None:
    wrong = []
    requests = list(scripted.requests)
    for case in _cases():
        name, argument, value = case.values
        owner, method = name.split(".")
        try:
            await asyncio.wait_for(_call(owners[owner], method, _TABLE[name][0] | {argument: value}), 5)
            wrong.append(f"{case.id}: accepted")
        except InvalidArgument as error:
            text = str(error)
            if not error.violations or not text.startswith(argument) or not text.isprintable() or len(text) > 400:
                wrong.append(f"{case.id}: {text}")
        except Exception as error:
            wrong.append(f"{case.id}: {error!r}")

    assert wrong == []
    assert scripted.requests == requests
    assert [payload for payload, _ in scripted.received] == [1.0]
