"""The disk is full, read-only or broken: nothing more is acknowledged, nothing that was is lost, and once the cause is
gone the service goes on by itself."""

import contextlib
import os

import grpc
import httpx
import numpy as np
import pytest
from faults.server import FaultyServer
from faults.storage import Failures
from server_process import wait_until

from cbp import Batch, Learner, LearnerSpec
from cbp_client import Client, Unavailable
from cbp_proto import decode_tensor


@pytest.fixture
def server(tmp_path, watched_sqlite):  # noqa: ARG001 - tells whether these tests are possible
    faulty = FaultyServer(tmp_path, "--checkpoint-interval", "0.2")
    faulty.start()
    yield faulty
    faulty.close()


@pytest.fixture
def local(small_spec):
    """What the learner on the server must be."""
    return Learner(LearnerSpec.parse(small_spec), engine="compiled")


def learn(stream, local, sequence, batch):
    stream.send_batch(sequence, *batch)
    local.train(Batch.validate(local.spec, *batch))


def assert_same(wire, local, examples):
    probe, _ = examples(5, seed=99)
    np.testing.assert_array_equal(decode_tensor(wire.predict("clicks", probe).outputs), local.predict(probe))


def saved_step(server):
    checkpoint = httpx.get(f"{server.http_url}/v1/learners/clicks").json()["checkpoint"]
    return checkpoint and checkpoint["step"]


def events(server, event):
    return [record for record in server.log_events() if record["event"].startswith(event)]


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        (Failures(database="full"), "database or disk is full"),
        (Failures(database="read-only"), "readonly database"),
        (Failures(database="write-error"), "disk I/O error"),
    ],
    ids=["full", "read-only", "write-error"],
)
def test_while_the_disk_takes_nothing_nothing_is_acknowledged_and_then_it_goes_on(
    server, connect, local, examples, explain, failures, reason
):
    wire = connect(server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    learn(stream, local, 1, examples(30))
    stream.results(1)

    failures.begin(server.failures)
    stream.send_batch(2, *examples(30, seed=2))
    stream.send_batch(3, *examples(30, seed=3))
    error = explain(stream.failure())
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "JOURNAL_UNAVAILABLE", True)
    assert reason in error.message
    assert wire.get("clicks").progress.step == 30
    assert_same(wire, local, examples)  # it can still be asked
    assert httpx.get(f"{server.http_url}/livez").status_code == 200

    server.failures.unlink()
    again = reopened(wire)
    assert again.opened.applied_sequence == 1
    for sequence in (2, 3):
        learn(again, local, sequence, examples(30, seed=sequence))
    again.results(2)
    assert len(events(server, "journal not written")) == 1
    assert len(events(server, "journal is written again")) == 1
    server.kill_everything()
    server.start()
    assert_same(connect(server.grpc_target), local, examples)


def reopened(wire):
    """A stream, as soon as the learner takes one."""
    opened = []

    def try_open():
        with contextlib.suppress(grpc.RpcError):
            opened.append(wire.stream("clicks"))
        return opened

    wait_until(try_open)
    return opened[0]


def test_a_client_sends_again_by_itself_what_a_full_disk_refused(server, small_spec, local, examples):
    with Client(server.grpc_target) as client:
        handle = client.create_learner("clicks", **small_spec)
        with handle.stream("ada") as stream:
            for number in range(60):
                if number in (20, 40):
                    Failures(database="full").begin(server.failures)
                if number in (30, 50):
                    server.failures.unlink()
                batch = examples(10, seed=number)
                stream.send(*batch)
                local.train(Batch.validate(local.spec, *batch))
            stream.flush(durable=True, timeout=60)
            assert stream.position.durable_sequence == 60
        probe, _ = examples(5, seed=99)
        np.testing.assert_array_equal(handle.predict(probe).outputs, local.predict(probe))


def test_a_failed_fsync_ends_the_server_loudly_and_nothing_acknowledged_is_lost(server, connect, local, examples):
    wire = connect(server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    learn(stream, local, 1, examples(30))
    stream.results(1)

    Failures(database_sync=True).begin(server.failures)
    stream.send_batch(2, *examples(30, seed=2))
    stream.failure()
    assert server.wait() == os.EX_IOERR
    (said,) = events(server, "fsync failed")
    assert said["level"] == "critical"

    server.failures.unlink()
    server.start()
    wire = connect(server.grpc_target)
    again = wire.stream("clicks")
    if again.opened.next_sequence == 2:  # the batch is in the journal, or it is not: either is right
        again.send_batch(2, *examples(30, seed=2))
        again.results(1)
    local.train(Batch.validate(local.spec, *examples(30, seed=2)))
    assert wire.get("clicks").progress.step == 60
    assert_same(wire, local, examples)


def test_a_failed_fsync_ends_the_server_whatever_it_was_for(server, small_spec):
    """What the kernel dropped may be anybody's, and the next fsync would not tell."""
    with Client(server.grpc_target) as client:
        handle = client.create_learner("clicks", **small_spec)
        Failures(database_sync=True).begin(server.failures)
        with contextlib.suppress(Unavailable):
            handle.checkpoint()
        assert server.wait() == os.EX_IOERR


@pytest.mark.parametrize(
    "failures", [Failures(checkpoints="ENOSPC"), Failures(checkpoints="EROFS")], ids=["ENOSPC", "EROFS"]
)
def test_without_room_for_checkpoints_learning_goes_on_from_the_journal(server, connect, local, examples, failures):
    wire = connect(server.grpc_target)
    wire.create("clicks")
    failures.begin(server.failures)
    stream = wire.stream("clicks")
    for sequence in range(1, 6):
        learn(stream, local, sequence, examples(30, seed=sequence))
        stream.results(1)
    wait_until(lambda: events(server, "checkpoint failed"))
    assert_same(wire, local, examples)
    server.kill_everything()
    server.start()
    wire = connect(server.grpc_target)
    assert_same(wire, local, examples)

    server.failures.unlink()
    wait_until(lambda: saved_step(server) == 150)
    leftovers = [path for path in (server.data_dir / "checkpoints").rglob("*") if path.suffix == ".writing"]
    assert not leftovers
