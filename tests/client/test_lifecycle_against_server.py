"""Durability, checkpoints, copies, files, deletion and quarantine with the SDK against a real server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from cbp_client import (
    AlreadyExists,
    Client,
    EtagMismatch,
    FailedPrecondition,
    InvalidArgument,
    Learner,
    LearnerQuarantined,
    NotFound,
)
from tests.client.command import command

SPEC: dict[str, Any] = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8, 6], "out_features": 3, "activation": "relu"},
    "loss": "cross_entropy",
    "optimizer": {"kind": "adam", "lr": 0.01},
    "batch_size": 1,
    "seed": 3,
    "resets": {"layers": "all", "replacement_rate": 0.01, "maturity_threshold": 5},
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


def make_batches(count: int, seed: int = 0) -> Batches:
    random = np.random.default_rng(seed)
    return [(random.normal(size=(16, 4)).astype(np.float32), random.integers(0, 3, 16)) for _ in range(count)]


def train(learner: Learner, batches: Batches, producer: str = "web") -> None:
    with learner.stream(producer) as stream:
        for batch in batches:
            stream.send(*batch)


def outputs_of(learner: Learner) -> NDArray[np.float32]:
    return learner.predict(make_batches(1)[0][0]).outputs


def renamed(learner_id: str, prefix: str) -> str:
    return f"{prefix}-{learner_id}"[:60].rstrip("-")


def test_a_checkpoint_is_where_restoring_goes(learner: Learner) -> None:
    train(learner, make_batches(5))
    saved, then = learner.checkpoint(), outputs_of(learner)
    assert (saved.pinned, saved.examples) == (True, 80)
    train(learner, make_batches(5, seed=1))
    assert not np.array_equal(outputs_of(learner), then)

    listed = learner.checkpoints()
    assert saved.number in [item.number for item in listed]
    assert [item.number for item in listed] == sorted((item.number for item in listed), reverse=True)

    info = learner.restore(checkpoint=saved.number)
    np.testing.assert_array_equal(outputs_of(learner), then)
    assert info.progress.examples == 80
    assert info.journal_position > saved.journal_position
    with learner.stream("web") as stream:
        assert stream.position.next_sequence == 11, "producers stay where they are"
        stream.send(*make_batches(1, seed=2)[0])
    assert learner.refresh().progress.examples == 96


def test_every_journal_position_held_can_be_restored(learner: Learner) -> None:
    states: dict[int, NDArray[np.float32]] = {}
    for batch in make_batches(4):
        train(learner, [batch])
        states[learner.refresh().journal_position] = outputs_of(learner)

    listed = learner.checkpoints()
    for position, outputs in states.items():
        assert listed.first_restorable_position <= position <= listed.last_restorable_position
        learner.restore(position=position)
        np.testing.assert_array_equal(outputs_of(learner), outputs)
    with pytest.raises(FailedPrecondition) as caught:
        learner.restore(position=10_000)
    assert caught.value.reason == "POSITION_NOT_HELD"
    with pytest.raises(NotFound) as missing:
        learner.restore(checkpoint=10_000)
    assert missing.value.reason == "CHECKPOINT_NOT_FOUND"


def test_an_open_stream_outlives_a_restore(learner: Learner) -> None:
    first, later = make_batches(5), make_batches(5, seed=1)
    with learner.stream("web") as stream:
        for batch in first:
            stream.send(*batch)
        stream.flush()
        saved = learner.checkpoint()
        for batch in later:
            stream.send(*batch)
        stream.flush()
        learner.restore(checkpoint=saved.number)
        for batch in later:
            stream.send(*batch)
        stream.flush()
    assert stream.summary.batches == 15
    assert learner.refresh().progress.examples == 160


def test_a_fork_goes_its_own_way_bit_for_bit(learner: Learner, learner_id: str) -> None:
    train(learner, make_batches(5))
    fork = learner.fork(renamed(learner_id, "fork"), durability="os")
    assert (fork.info.durability, fork.info.producers) == ("os", ())
    assert fork.info.uid != learner.info.uid
    np.testing.assert_array_equal(outputs_of(fork), outputs_of(learner))
    with pytest.raises(AlreadyExists):
        learner.fork(fork.id)

    then = outputs_of(learner)
    train(fork, make_batches(5, seed=1))
    np.testing.assert_array_equal(outputs_of(learner), then)
    train(learner, make_batches(5, seed=1))
    np.testing.assert_array_equal(outputs_of(fork), outputs_of(learner))


def test_an_exported_learner_is_imported_bit_for_bit(
    client: Client, learner: Learner, learner_id: str, tmp_path: Path
) -> None:
    train(learner, make_batches(5))
    file = tmp_path / "learner.safetensors"
    assert learner.export(file) == file.stat().st_size
    twin = client.import_learner(renamed(learner_id, "twin"), file, durability="none")
    assert twin.info.durability == "none"

    for one in (learner, twin):
        train(one, make_batches(5, seed=1))
    np.testing.assert_array_equal(outputs_of(twin), outputs_of(learner))

    (tmp_path / "damaged").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidArgument):
        client.import_learner(renamed(learner_id, "bad"), tmp_path / "damaged")


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_the_network_is_exported_for_use_elsewhere(learner: Learner, tmp_path: Path, format: Any) -> None:
    train(learner, make_batches(2))
    file = tmp_path / "network"
    assert learner.export(file, format=format) == file.stat().st_size > 0


def test_deleting_can_be_undone_until_it_is_purged(client: Client, learner: Learner, learner_id: str) -> None:
    train(learner, make_batches(3))
    then, uid = outputs_of(learner), learner.info.uid
    deleted = learner.delete()
    assert deleted.state == "deleted"
    assert deleted.delete_time is not None
    assert deleted.purge_time is not None
    assert deleted.delete_time < deleted.purge_time
    assert learner_id not in [item.id for item in client.list_learners()]
    assert uid in [item.info.uid for item in client.list_learners(show_deleted=True)]

    namesake = client.create_learner(learner_id, **SPEC)
    with pytest.raises(AlreadyExists):
        client.undelete_learner(learner_id)
    namesake.delete()
    back = client.undelete_learner(learner_id, uid=uid)
    np.testing.assert_array_equal(outputs_of(back), then)
    with back.stream("web") as stream:
        assert stream.position.next_sequence == 4

    with pytest.raises(FailedPrecondition) as caught:
        client.purge_learner(learner_id, uid=uid)
    assert caught.value.reason == "LEARNER_NOT_DELETED"
    back.delete()
    client.purge_learner(learner_id)
    with pytest.raises(NotFound):
        client.undelete_learner(learner_id)


@pytest.mark.parametrize("durability", ["fsync", "os", "none"])
def test_durability(client: Client, learner_id: str, durability: Any) -> None:
    learner = client.create_learner(learner_id, **SPEC, durability=durability)
    assert learner.info.durability == durability
    train(learner, make_batches(3))
    with learner.stream("web") as stream:
        stream.send(*make_batches(1)[0])
        stream.flush()
        learner.checkpoint()
        stream.flush(durable=True, timeout=30)
    if durability != "none":
        changed = "os" if durability == "fsync" else "fsync"
        assert learner.update(durability=changed).durability == changed
    stale = client.get_learner(learner_id)
    learner.update(optimizer={"lr": 0.5})
    with pytest.raises(EtagMismatch):
        stale.restore(checkpoint=1, if_unchanged=True)


def test_units_are_reset_by_hand(learner: Learner) -> None:
    train(learner, make_batches(5))
    before = learner.refresh().progress.replacements
    reset = learner.reset_units(["hidden_0"], 0.5)
    assert reset == {"hidden_0": 4}
    after = learner.refresh().progress.replacements
    assert after["hidden_0"] == before["hidden_0"] + 4
    assert after["hidden_1"] == before["hidden_1"]
    with pytest.raises(InvalidArgument):
        learner.reset_units("all", 2.0)


@pytest.mark.parametrize("way", ["skip_batch", "restart"])
def test_a_batch_that_cannot_be_learnt_puts_its_learner_into_quarantine(
    start_server: Callable[..., Server], learner_id: str, way: str
) -> None:
    own_server = start_server()
    with Client(own_server.grpc_target) as client:
        learner = client.create_learner(learner_id, **SPEC)
        good, later = make_batches(3), make_batches(3, seed=1)
        train(learner, good)
        then = outputs_of(learner)
        wrong = (np.full((16, 4), 3e38, np.float32), np.zeros(16, np.int64))
        stream = learner.stream("web")
        stream.open()
        ticket = stream.send(*wrong)
        with pytest.raises(LearnerQuarantined) as caught:
            ticket.result(timeout=30)
        stream.abort()
        assert (caught.value.learner, caught.value.producer, caught.value.sequence) == (learner_id, "web", 4)
        if way == "restart":
            own_server.kill()
            own_server.start()

        quarantine = learner.refresh().quarantine
        assert learner.info.state == "quarantined"
        assert quarantine is not None
        assert (quarantine.producer, quarantine.sequence) == ("web", 4)
        assert quarantine.journal_position == caught.value.journal_position
        np.testing.assert_array_equal(outputs_of(learner), then)
        with pytest.raises(LearnerQuarantined):
            learner.stream("web").open()

        resumed = learner.resume(skip_batch=True)
        assert (resumed.state, resumed.quarantine) == ("active", None)
        with pytest.raises(FailedPrecondition) as refused:
            learner.resume()
        assert refused.value.reason == "LEARNER_NOT_QUARANTINED"
        with learner.stream("web") as stream:
            assert stream.position.next_sequence == 5, "the batch left out keeps its sequence"
            for batch in later:
                stream.send(*batch)

        undisturbed = client.create_learner("undisturbed", **SPEC)
        train(undisturbed, good + later)
        np.testing.assert_array_equal(outputs_of(learner), outputs_of(undisturbed))


def test_a_process_that_follows_another_goes_on_behind_what_the_server_has(
    start_server: Callable[..., Server], learner_id: str
) -> None:
    own_server = start_server()
    batches = make_batches(200)
    with Client(own_server.grpc_target) as client:
        learner = client.create_learner(learner_id, **SPEC)
        for _ in range(4):
            stream = learner.stream("web")
            stream.open()
            for batch in batches[stream.position.next_sequence - 1 :][:60]:
                stream.send(*batch)
            stream.abort()  # whatever is on its way by now
        with learner.stream("web") as stream:
            for batch in batches[stream.position.next_sequence - 1 :]:
                stream.send(*batch)

        undisturbed = client.create_learner("undisturbed", **SPEC)
        train(undisturbed, batches)
        np.testing.assert_array_equal(outputs_of(learner), outputs_of(undisturbed))


def test_the_commands(
    server: Server,
    learner: Learner,
    learner_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = command(server.grpc_target, monkeypatch, capfd)

    def cbp(*arguments: str) -> Any:
        done = run("learners", *arguments)
        assert done.status == 0, done.err
        return json.loads(done.out) if "--json" in arguments else done.out

    train(learner, make_batches(3))
    number = str(cbp("checkpoint", learner_id, "--json")["number"])
    assert cbp("checkpoints", learner_id, "--json")["checkpoints"][0]["number"] == int(number)
    assert cbp("restore", learner_id, "--checkpoint", number, "--yes", "--json")["progress"]["examples"] == 48
    copy, twin = renamed(learner_id, "copy"), renamed(learner_id, "twin")
    assert cbp("fork", learner_id, copy, "--durability", "os", "--json")["durability"] == "os"
    assert cbp("reset", copy, "--fraction", "0.5", "--json") == {"hidden_0": 4, "hidden_1": 3}
    file = str(tmp_path / "learner.safetensors")
    cbp("export", learner_id, file)
    assert cbp("import", twin, file, "--json")["progress"]["examples"] == 48
    assert cbp("delete", copy, "--yes", "--json")["state"] == "deleted"
    assert copy in cbp("list", "--deleted")
    assert cbp("undelete", copy, "--json")["state"] == "active"
    cbp("delete", copy, "-y")
    cbp("purge", copy, "-y")
    assert "journal" in cbp("show", learner_id)
    missing = run("learners", "restore", learner_id, "--checkpoint", "999", "--yes")
    assert missing.status == 1
    assert missing.err.count("\n") == 1
    assert f"see cbp learners checkpoints {learner_id}" in missing.err
