"""Start, end and failure of a whole server: what was acknowledged is there afterwards, and callers hear the truth."""

import os
import signal
import time

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor


def engine_pid(server) -> int:
    return [event["pid"] for event in server.log_events() if event["event"] == "engine process ready"][-1]


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def is_ready(server) -> bool:
    return httpx.get(f"{server.http_url}/readyz").status_code == 200


def queued_batches(server) -> int:
    return httpx.get(f"{server.http_url}/v1/learners/clicks").json()["queued_batches"]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def learn(stream, local, sequence, batch):
    """One batch on both sides."""
    stream.send_batch(sequence, *batch)
    local.train(Batch.validate(local.spec, *batch))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_told_to_stop_finishes_what_it_accepted_and_saves_it(
    own_server, connect, small_spec, examples, explain, signal_number
):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec))
    stream = wire.stream("clicks")
    for sequence in range(1, 11):
        learn(stream, local, sequence, examples(500, seed=sequence))
    first = stream.receive()  # the others are under way

    os.kill(own_server.pid, signal_number)

    results = [*first.acknowledgement.results, *stream.results(10 - len(first.acknowledgement.results))]
    error = explain(stream.failure())
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", True)
    assert own_server.wait() == 0
    assert results[-1].sequence == 10

    own_server.start()
    wire = connect(own_server.grpc_target)
    again = wire.stream("clicks")
    assert (again.opened.applied_sequence, again.opened.durable_sequence) == (10, 10)
    assert again.opened.epoch == 2
    learn(again, local, 11, examples(100, seed=11))
    again.results(1)
    probe, _ = examples(5, seed=99)
    np.testing.assert_array_equal(decode_tensor(wire.predict("clicks", probe).outputs), local.predict(probe))


def test_a_draining_server_says_so_everywhere(own_server, connect, examples, refused):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(30_000))
    wait_until(lambda: queued_batches(own_server) == 1)
    watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    own_server.begin_stop()

    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    ready = httpx.get(f"{own_server.http_url}/readyz")
    assert ready.status_code == 503
    assert ready.json()["reasons"] == ["the server is shutting down"]
    assert httpx.get(f"{own_server.http_url}/livez").status_code == 200
    error = refused(lambda: wire.create("late"))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert stream.results(1)[0].step == 30_000
    assert own_server.wait() == 0


def test_a_drain_that_takes_too_long_gives_up_what_was_not_acknowledged(start_server, connect, examples):
    server = start_server("--drain-timeout", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(20))
    stream.results(1)
    stream.send_batch(2, *examples(60_000))
    wait_until(lambda: queued_batches(server) == 1)
    server.stop()
    assert "drain timeout" in server.log

    server.start()
    again = connect(server.grpc_target).stream("clicks")
    assert again.opened.applied_sequence in (1, 2)


def test_the_engine_process_is_restarted_and_its_learners_restored(
    start_server, connect, small_spec, examples, explain
):
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    wire.create("other")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(50))
    stream.results(1)
    pid = engine_pid(server)

    os.kill(pid, signal.SIGKILL)

    error = explain(stream.failure())
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", True)
    wait_until(lambda: engine_pid(server) != pid and is_ready(server))
    # Without a journal, what no checkpoint held is lost, and the server says so: the producer starts again at 1.
    again = wire.stream("clicks")
    assert again.opened.applied_sequence == 0
    local = Learner(LearnerSpec.parse(small_spec))
    learn(again, local, 1, examples(50, seed=5))
    again.results(1)
    probe, _ = examples(5, seed=99)
    np.testing.assert_array_equal(decode_tensor(wire.predict("clicks", probe).outputs), local.predict(probe))
    assert wire.get("other").progress.step == 0
    assert "cbp_engine_restarts_total 1.0" in httpx.get(f"{server.http_url}/metrics").text


def test_a_killed_front_takes_its_engine_along_and_comes_back_from_its_checkpoints(start_server, connect, examples):
    server = start_server("--checkpoint-interval", "0.1")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(50))
    while stream.receive().acknowledgement.durable_sequence < 1:
        pass  # a checkpoint announces itself on the open stream
    pid = engine_pid(server)

    server.kill()

    wait_until(lambda: not is_running(pid))
    server.start()
    again = connect(server.grpc_target).stream("clicks")
    assert (again.opened.applied_sequence, again.opened.durable_sequence) == (1, 1)


def test_a_front_killed_in_the_middle_of_traffic_leaves_no_engine_behind(own_server, connect, examples):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    for sequence in range(1, 60):
        stream.send_batch(sequence, *examples(20))
    stream.results(1)
    pid = engine_pid(own_server)
    os.kill(own_server.pid, signal.SIGSTOP)  # answers pile up unread, so the engine's end is cut off, not closed
    time.sleep(0.3)
    own_server.kill()
    wait_until(lambda: not is_running(pid))


def test_a_corrupt_checkpoint_falls_back_and_an_unreadable_learner_keeps_no_other_from_serving(
    own_server, connect, examples, refused
):
    wire = connect(own_server.grpc_target)
    for name in ("damaged", "destroyed", "healthy"):
        wire.create(name)
    stream = wire.stream("damaged")
    stream.send_batch(1, *examples(10))
    stream.results(1)
    stream.finish()
    assert own_server.stop() == 0
    learners = own_server.data_dir / "learners"
    newest = sorted((learners / "damaged").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    (only,) = (learners / "destroyed").iterdir()
    only.write_bytes(b"\0" * 100)

    own_server.start()

    wire = connect(own_server.grpc_target)
    assert wire.get("damaged").progress.step == 0  # its first checkpoint, from before the batch
    assert wire.get("healthy").progress.step == 0
    assert is_ready(own_server)
    error = refused(lambda: wire.get("destroyed"))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "UNREADABLE_STATE")
    assert only.name in error.message
    assert refused(lambda: wire.create("destroyed")).code is grpc.StatusCode.ALREADY_EXISTS
    assert only.exists()  # kept for whoever can repair it


def test_a_server_that_cannot_use_its_device_says_so_at_start(start_server):
    with pytest.raises(AssertionError, match="ended with status 1") as caught:
        start_server("--device", "cuda")
    assert "--device auto or cpu" in str(caught.value)


def test_learning_goes_on_while_a_checkpoint_is_written(start_server, connect, small_spec, examples):
    server = start_server("--checkpoint-interval", "0.05")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec))
    stream = wire.stream("clicks")
    for sequence in range(1, 41):
        learn(stream, local, sequence, examples(100, seed=sequence))
    stream.results(40)
    probe, _ = examples(5, seed=99)
    np.testing.assert_array_equal(decode_tensor(wire.predict("clicks", probe).outputs), local.predict(probe))
    server.kill()
    server.start()
    restored = connect(server.grpc_target).get("clicks")
    assert restored.progress.step == 100 * restored.producers[0].applied_sequence


def test_a_server_whose_engine_keeps_dying_can_still_be_stopped(own_server):
    for _ in range(2):
        pid = engine_pid(own_server)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: engine_pid(own_server) != pid)
    own_server.begin_stop()
    assert own_server.wait() == 0


def test_a_diverged_learner_is_still_reported_saved_and_deleted(own_server, connect):
    """Weights that are no longer numbers must not make any of the windows onto the server fail."""
    wire = connect(own_server.grpc_target)
    wire.create("wild", loss="mse", optimizer={"kind": "sgd", "lr": 1e6}, monitoring={"interval": 10})
    stream = wire.stream("wild")
    stream.send_batch(1, np.ones((200, 4), np.float32), np.ones((200, 3), np.float32))
    (result,) = stream.results(1)
    assert not np.isfinite(result.loss)

    learner = httpx.get(f"{own_server.http_url}/v1/learners/wild")
    assert learner.status_code == 200
    assert learner.json()["progress"]["loss"] is None
    assert learner.json()["plasticity"]["step"] == 200
    metrics = httpx.get(f"{own_server.http_url}/metrics")
    assert metrics.status_code == 200
    assert 'cbp_learner_steps_total{learner="wild"} 200.0' in metrics.text
    assert np.isnan(decode_tensor(wire.predict("wild", np.ones((1, 4))).outputs)).all()
    assert own_server.stop() == 0
    own_server.start()
    wire = connect(own_server.grpc_target)
    assert wire.get("wild").progress.step == 200
    wire.delete("wild")


def test_plasticity_history_survives_a_restart(own_server, connect, examples):
    wire = connect(own_server.grpc_target)
    wire.create("clicks", monitoring={"interval": 50})
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(160))
    stream.results(1)
    history = f"{own_server.http_url}/v1/learners/clicks/plasticity?max_samples=10"
    before = httpx.get(history).json()
    assert [sample["step"] for sample in before["samples"]] == [50, 100, 150]
    own_server.stop()
    own_server.start()
    assert httpx.get(history).json() == before
