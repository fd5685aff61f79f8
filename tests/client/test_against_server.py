"""The SDK against a real server."""

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from cbp_client import (
    AlreadyExists,
    AsyncClient,
    BatchRejected,
    Client,
    EtagMismatch,
    Fenced,
    InvalidArgument,
    Learner,
    NotFound,
    WatchUpdate,
)
from cbp_proto import encode_train_request
from tests.client.command import command

_DOCS = Path(__file__).parents[2] / "docs" / "client.md"
SPEC: dict[str, Any] = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8, 6], "out_features": 3, "activation": "relu"},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.05},
    "batch_size": 1,
    "seed": 3,
    "resets": {"layers": "all", "replacement_rate": 0.01, "maturity_threshold": 5},
    "monitoring": {"interval": 50},
}
Batches = list[tuple[NDArray[np.float32], NDArray[np.int64]]]


class Server(Protocol):
    grpc_target: str

    def start(self, *flags: str) -> None: ...
    def stop(self) -> int: ...
    def kill(self) -> None: ...


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.grpc_target) as client:
        yield client


@pytest.fixture
def learner(client: Client, learner_id: str) -> Learner:
    return client.create_learner(learner_id, **SPEC)


def make_batches(count: int, examples: int = 16) -> Batches:
    random = np.random.default_rng(0)
    return [
        (random.normal(size=(examples, 4)).astype(np.float32), random.integers(0, 3, examples)) for _ in range(count)
    ]


def outputs_after(learner: Learner) -> NDArray[np.float32]:
    return learner.predict(make_batches(1)[0][0]).outputs


def test_all_that_the_documentation_shows(
    own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = _DOCS.read_text()
    first, second = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    (shell,) = (part.partition("```")[0] for part in text.split("```sh\n") if part.startswith("python -"))
    variables: dict[str, Any] = {}

    exec(first.replace("localhost:50051", own_server.grpc_target), variables)

    assert variables["stream"].summary.examples == 1000
    assert variables["prediction"].step == 1000
    assert variables["prediction"].outputs.shape == (20, 10)
    assert [layer.layer for layer in variables["layers"]] == ["hidden_0", "hidden_1", "hidden_2", "output"]
    assert variables["learner"].info.spec["resets"]["layers"] == ["all"]
    assert "StreamSummary(batches=50, examples=1000" in capfd.readouterr().out

    exec(second.replace("localhost:50051", own_server.grpc_target), variables)

    assert variables["found"][0].number == variables["saved"].number
    assert variables["learner"].info.durability == "fsync"
    assert (tmp_path / "ads.safetensors").stat().st_size > 0

    cbp = command(own_server.grpc_target, monkeypatch, capfd)
    program, _, commands = shell.partition("\nEND\n")
    exec(program.partition("\n")[2], {})
    failures = []
    for line in filter(None, commands.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        name, *arguments = [word for word in words if word not in ("||", "true")]
        end = arguments.index(">") if ">" in arguments else len(arguments)
        result = cbp(*arguments[:end])
        assert name == "cbp"
        assert result.status == 0 or words[-2:] == ["||", "true"], f"{line}: {result}"
        failures += [result.err] if result.status else []
        for file in arguments[end + 1 :]:
            Path(file).write_text(result.out)

    assert len(failures) == 1
    assert "cbp learners resume visits-trial" in failures[0]
    with np.load("out.npz") as arrays:
        assert arrays["outputs"].shape == (1000, 10)
    with Client(own_server.grpc_target) as client:
        assert {learner.id for learner in client.list_learners()} == {"clicks", "ads"}


def test_the_life_of_a_learner(client: Client, learner: Learner, learner_id: str) -> None:
    assert learner.id == learner_id
    assert learner.info.state == "active"
    defaults = {"initializer": "kaiming", "normalization": "none", "inputs": {"window": 100_000}}
    assert learner.info.spec["network"] == SPEC["network"] | defaults
    assert learner_id in [other.id for other in client.list_learners()]
    with pytest.raises(AlreadyExists):
        client.create_learner(learner_id, **SPEC)
    assert client.create_learner(learner_id, **SPEC, exist_ok=True).info.uid == learner.info.uid
    with pytest.raises(AlreadyExists, match="exists with seed 3, not 4"):
        client.create_learner(learner_id, **SPEC | {"seed": 4}, exist_ok=True)

    same = client.get_learner(learner_id)
    learner.update(resets={"layers": "first"}, optimizer={"lr": 0.01})
    assert learner.info.spec["resets"] == same.info.spec["resets"] | {"layers": ["first"]}
    assert learner.info.spec["optimizer"] == same.info.spec["optimizer"] | {"lr": 0.01}
    with pytest.raises(EtagMismatch):
        same.update(optimizer={"lr": 0.02}, if_unchanged=True)
    same.refresh()
    same.update(optimizer={"lr": 0.02}, if_unchanged=True)
    with pytest.raises(InvalidArgument):
        same.update(optimizer={"lr": -1.0})
    with pytest.raises(EtagMismatch):
        learner.delete(if_unchanged=True)

    learner.delete()
    with pytest.raises(NotFound) as caught:
        learner.refresh()
    assert caught.value.reason == "LEARNER_NOT_FOUND"
    with pytest.raises(NotFound):
        client.delete_learner(learner_id)
    with pytest.raises(NotFound):
        learner.stream("web").open()


def test_streaming_shows_in_progress_and_plasticity(learner: Learner) -> None:
    with learner.stream("web", return_outputs=True) as stream:
        tickets = [stream.send(*batch, task="day", weights=np.ones(16)) for batch in make_batches(8)]
        results = [ticket.result(timeout=30) for ticket in tickets]
        stream.flush()

    assert [result.step for result in results] == list(range(16, 129, 16))
    assert all(result.outputs is not None and result.outputs.shape == (16, 3) for result in results)
    assert stream.summary.loss == pytest.approx(np.mean([result.loss for result in results]))
    info = learner.refresh()
    assert info.progress.step == 128
    assert info.tasks[-1].task == "day"
    assert info.tasks[-1].loss == pytest.approx(stream.summary.loss)
    assert [(item.producer, item.applied_sequence) for item in info.producers] == [("web", 8)]
    history = learner.plasticity(history=10)
    assert [sample.step for sample in history] == sorted(sample.step for sample in history)
    assert len(learner.plasticity(fresh=True)) == 1


async def test_batches_that_wait_share_messages(
    server: Server, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []

    def encode(batches: Sequence[tuple[int, bytes]]) -> bytes:
        together.append(len(batches))
        return encode_train_request(batches)

    monkeypatch.setattr("cbp_client.stream.encode_train_request", encode)
    async with AsyncClient(server.grpc_target) as asynchronous:
        async with (await asynchronous.get_learner(learner.id)).stream("feeder") as stream:
            tickets = [await stream.send(*batch) for batch in make_batches(200, examples=2)]
        results = [await ticket for ticket in tickets]

    assert [result.step for result in results] == list(range(2, 402, 2))
    assert sum(together) == 200
    assert 1 < max(together) <= 64


def test_a_rejected_batch_leaves_the_others_whole(learner: Learner) -> None:
    batches = make_batches(6)
    with learner.stream("web") as stream:
        tickets = [stream.send(*batch) for batch in batches[:3]]
        wrong = stream.send(batches[3][0], batches[3][1] + 100)
        with pytest.raises(BatchRejected) as caught:
            wrong.result(timeout=30)
        tickets += [stream.send(*batch) for batch in batches[3:]]
        assert [ticket.result(timeout=30).sequence for ticket in tickets] == [1, 2, 3, 4, 5, 6]

    assert caught.value.violations[0].field == "targets"
    assert learner.refresh().progress.examples == 96


def test_rejections_in_a_full_pipeline_change_nothing(client: Client, learner: Learner, learner_id: str) -> None:
    batches = make_batches(60)
    rejected: list[int] = []
    with learner.stream("web", on_rejection=lambda batch: rejected.append(batch.number)) as stream:
        for index, (features, targets) in enumerate(batches):
            stream.send(features, targets + 100 if index % 7 == 3 else targets)
    assert rejected == [index + 1 for index in range(60) if index % 7 == 3]

    twin = client.create_learner(f"twin-{learner_id}"[:60].rstrip("-"), **SPEC)
    with twin.stream("web") as stream:
        for index, batch in enumerate(batches):
            if index % 7 != 3:
                stream.send(*batch)
    np.testing.assert_array_equal(outputs_after(learner), outputs_after(twin))


@pytest.mark.parametrize("way", [pytest.param("stop", marks=pytest.mark.torture), "kill"])
def test_a_restarted_server_ends_up_where_an_undisturbed_one_does(
    start_server: Callable[..., Server], learner: Learner, way: str
) -> None:
    batches = make_batches(60)
    with learner.stream("web") as stream:
        for batch in batches:
            stream.send(*batch)

    other = start_server()
    with Client(other.grpc_target) as other_client:
        disturbed = other_client.create_learner("disturbed", **SPEC)
        with disturbed.stream("web") as stream:
            for index, batch in enumerate(batches):
                ticket = stream.send(*batch)
                if index == 30:
                    ticket.result(timeout=30)
                    getattr(other, way)()
                    other.start()
        assert stream.summary.batches == 60
        assert stream.summary.reconnections >= 1
        assert disturbed.predict(batches[0][0]).step == 960
        np.testing.assert_array_equal(outputs_after(disturbed), outputs_after(learner))


def test_a_newer_stream_fences_the_older(learner: Learner) -> None:
    batch = make_batches(1)[0]
    with learner.stream("web") as old:
        old.send(*batch).result(timeout=30)
        with learner.stream("web") as new:
            new.send(*batch)
            with pytest.raises(Fenced):
                old.send(*batch).result(timeout=30)
        with pytest.raises(Fenced):
            old.flush(timeout=30)
        old.abort()
    assert learner.refresh().progress.examples == 32


def test_threads_may_share_a_stream(learner: Learner) -> None:
    with learner.stream("web", max_in_flight_bytes=2000) as stream:
        threads = [threading.Thread(target=lambda: [stream.send(*batch) for batch in make_batches(20)]) for _ in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert stream.summary.batches == 60


def test_a_callback_that_calls_the_client_is_told_rather_than_stuck(learner: Learner) -> None:
    stream = learner.stream("web", on_result=lambda _: stream.flush())
    stream.open()
    stream.send(*make_batches(1)[0])
    with pytest.raises(RuntimeError, match="a callback of a stream must not call the client"):
        stream.flush()
    stream.abort()


def test_watching(client: Client, learner: Learner) -> None:
    updates = client.watch([learner.id], interval=0.05)
    first = next(updates)
    assert [watched.info.id for watched in first.learners] == [learner.id]
    with learner.stream("web") as stream:
        stream.send(*make_batches(1, examples=64)[0])

    def learnt(update: WatchUpdate) -> bool:
        return any(watched.info.progress.step == 64 for watched in update.learners)

    assert learnt(next(update for update in updates if learnt(update)))
    learner.delete()
    assert next(update for update in updates if update.deleted).deleted == (learner.id,)


async def test_the_asynchronous_client(server: Server, learner_id: str) -> None:
    async with AsyncClient(server.grpc_target) as client:
        await client.wait_until_ready()
        learner = await client.create_learner(learner_id, **SPEC)
        async with learner.stream("web") as stream:
            tickets = await stream.send_many(*make_batches(1, examples=100)[0], examples_per_message=30)
            assert [(await ticket).examples for ticket in tickets] == [30, 30, 30, 10]
        assert (await learner.refresh()).progress.step == 100
        async for update in client.watch([learner_id]):
            assert update.learners[0].info.progress.step == 100
            break
        await learner.delete()


def test_a_closed_client_says_so(server: Server) -> None:
    client = Client(server.grpc_target)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.get_learner("any")


def test_a_process_that_ends_without_closing_ends_quietly(server: Server, learner: Learner) -> None:
    code = f"""
import numpy as np
from cbp_client import Client
client = Client("{server.grpc_target}")
stream = client.get_learner("{learner.id}").stream("web")
stream.open()
stream.send(np.zeros((1, 4)), np.zeros(1, int)).result(timeout=30)
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert learner.refresh().progress.examples == 1
