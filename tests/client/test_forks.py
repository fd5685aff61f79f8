"""A process that was forked after a client had been used says so at once: gRPC would hang or crash in it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from cbp_client import AsyncClient, Client

_NETWORK = {"in_features": 4, "hidden": [4], "out_features": 2}
_PROGRAM = Path(__file__).with_name("forking.py")


class Server(Protocol):
    grpc_target: str


def test_what_belongs_to_a_process_says_so_when_it_is_pickled(server: Server, learner_id: str) -> None:
    with Client(server.grpc_target) as client:
        learner = client.create_learner(learner_id, network=_NETWORK, loss="mse", optimizer={"kind": "sgd", "lr": 0.1})
        with learner.stream("web") as stream:
            ticket = stream.send([[0.0] * 4], [[0.0] * 2])
            for item in (client, learner, stream, ticket, AsyncClient()):
                with pytest.raises(TypeError, match=f"^{type(item).__name__} can't be .* make a client there"):
                    pickle.dumps(item)
        pickle.loads(pickle.dumps([learner.info, ticket.result(), learner.predict([[0.0] * 4])]))


def test_forks_are_told_at_once_and_harm_nobody(server: Server, learner_id: str) -> None:
    with Client(server.grpc_target) as client:
        client.create_learner(learner_id, network=_NETWORK, loss="cross_entropy", optimizer={"kind": "sgd", "lr": 0.1})

    ended = subprocess.run(
        [sys.executable, str(_PROGRAM), server.grpc_target, learner_id], capture_output=True, text=True, timeout=120
    )

    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["made before the fork, used behind it"] == {"Client": 1, "AsyncClient": 1}
    refused = "CLIENT_FORKED"
    assert found["a client was closed, new ones behind the fork"] == {"Client": refused, "AsyncClient": refused}
    open_client = found["a client is open"]
    assert {name for name, how in open_client.items() if how != refused} == {
        "a result that is there",
        "abort the stream",
        "close",
        "close AsyncClient",
    }
    assert open_client["a result that is there"] == 1
    assert open_client["close"] is None
    assert found["once more"] == open_client
    assert found["ends by itself"] == [0] * 8
    assert found["in a fork of a fork"] == {"child": {"a call": refused}}
    assert found["spawned"] == 1
    assert found["the process before goes on"] == [1, 1]
    assert "Traceback" not in ended.stderr
