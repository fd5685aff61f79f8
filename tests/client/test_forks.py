"""A process that was forked after a client had been used says so at once: gRPC would hang or crash in it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from cbp_client import Client

_PROGRAM = Path(__file__).with_name("forking.py")


class Server(Protocol):
    grpc_target: str


def test_forks_are_told_at_once_and_harm_nobody(server: Server, learner_id: str) -> None:
    network = {"in_features": 4, "hidden": [4], "out_features": 2}
    with Client(server.grpc_target) as client:
        client.create_learner(learner_id, network=network, loss="cross_entropy", optimizer={"kind": "sgd", "lr": 0.1})

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
