"""Start, end and failure of a whole server: what was acknowledged is there afterwards, and callers hear the truth."""

import contextlib
import math
import os
import shutil
import signal
import sqlite3
import threading
import time
import uuid

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import engine_pid, wait_until

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec
from cbp_proto import decode_tensor
from cbp_proto.v1 import learner_service_pb2


def is_ready(server) -> bool:
    return httpx.get(f"{server.http_url}/readyz").status_code == 200


def view(server, learner="clicks") -> dict:
    return httpx.get(f"{server.http_url}/v1/learners/{learner}").json()


def queued_batches(server, learner="clicks") -> int:
    return view(server, learner)["queued_batches"]


def checkpoint_files(server, learner="clicks"):
    """Oldest first."""
    with contextlib.closing(journal_of(server)) as database:
        query = "SELECT uid FROM learners WHERE learner_id = ? AND delete_time IS NULL"
        ((uid,),) = database.execute(query, [learner]).fetchall()
    return sorted((server.data_dir / "checkpoints" / uid).glob("*.safetensors"), key=lambda path: int(path.stem))


def newest_checkpoint(server, learner="clicks"):
    return checkpoint_files(server, learner)[-1]


def assert_same(wire, local, examples, learner="clicks"):
    """The learner on the server is the local one, as far as its outputs tell, which is to the last bit."""
    probe, _ = examples(5, seed=99)
    np.testing.assert_array_equal(decode_tensor(wire.predict(learner, probe).outputs), local.predict(probe))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def stream_when_back(wire, learner="clicks"):
    """As clients do: tries again while the server says that it is a matter of time."""
    while True:
        try:
            return wire.stream(learner)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


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
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    stream = wire.stream("clicks")
    for sequence in range(1, 11):
        learn(stream, local, sequence, examples(500, seed=sequence))
    first = stream.receive()

    def all_are_accepted():
        learner = view(own_server)
        return learner["queued_batches"] + learner["producers"][0]["applied_sequence"] == 10

    wait_until(all_are_accepted)  # some may be under way
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


def test_a_draining_server_says_so_everywhere(start_server, connect, examples, refused):
    own_server = start_server("--engine", "torch")  # which takes a while
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


def test_a_drain_has_its_time_and_what_it_gives_up_is_in_the_journal(start_server, connect, small_spec, examples):
    """What has begun when the time is up stops between two steps; the next start goes on exactly there."""
    server = start_server("--drain-timeout", "0.5", "--engine", "torch")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec))
    stream = wire.stream("clicks")
    learn(stream, local, 1, examples(20))
    stream.results(1)
    batches = [examples(10_000, seed=sequence) for sequence in (2, 3)]
    for sequence, batch in enumerate(batches, start=2):
        stream.send_batch(sequence, *batch)
    wait_until(lambda: view(server)["producers"][0]["durable_sequence"] == 3)
    assert queued_batches(server) == 2

    assert server.stop() == 0
    assert "drain timeout" in server.log
    saved = checkpoint_files(server)
    assert not saved or LearnerSnapshot.from_bytes(saved[-1].read_bytes()).metadata["step"] < 20_020
    for batch in batches:
        local.train(Batch.validate(local.spec, *batch))

    server.start()
    wire = connect(server.grpc_target)
    restored = wire.get("clicks")
    assert restored.producers[0].applied_sequence == 3
    assert (restored.progress.step, restored.progress.pending_examples) == (20_020, 0)
    assert_same(wire, local, examples)


def test_a_batch_that_finishes_late_in_the_drain_is_saved(start_server, connect, examples):
    """Acknowledged at the last moment, while other learners are being saved already."""
    server = start_server("--drain-timeout", "0.3", "--engine", "torch")
    wire = connect(server.grpc_target)
    streams = {}
    for name in ("a", "b", "c", "d"):
        wire.create(name)
        streams[name] = wire.stream(name)
        streams[name].send_batch(1, *examples(3000))
    wait_until(lambda: sum(queued_batches(server, name) for name in streams) >= 1)
    server.begin_stop()
    heard = {}
    for name, stream in streams.items():
        heard[name] = 0
        with contextlib.suppress(grpc.RpcError):
            while True:
                heard[name] = stream.receive().acknowledgement.applied_sequence
    assert server.wait() == 0
    server.start()
    wire = connect(server.grpc_target)
    for name, sequence in heard.items():
        positions = wire.get(name).producers
        assert (positions[0].applied_sequence if positions else 0) >= sequence, name


def test_the_engine_process_is_restarted_and_its_learners_restored(
    start_server, connect, small_spec, examples, explain
):
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    wire.create("other")
    stream = wire.stream("clicks")
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    learn(stream, local, 1, examples(50))
    stream.results(1)
    pid = engine_pid(server)

    os.kill(pid, signal.SIGKILL)

    error = explain(stream.failure())
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", True)
    wait_until(lambda: engine_pid(server) != pid and is_ready(server))
    again = wire.stream("clicks")
    assert (again.opened.applied_sequence, again.opened.durable_sequence, again.opened.epoch) == (1, 1, 2)
    learn(again, local, 2, examples(50, seed=5))
    again.results(1)
    assert_same(wire, local, examples)
    assert wire.get("other").progress.step == 0
    assert "cbp_engine_restarts_total 1.0" in httpx.get(f"{server.http_url}/metrics").text


def test_a_killed_front_takes_its_engine_along_and_comes_back_from_its_checkpoints(start_server, connect, examples):
    server = start_server("--checkpoint-interval", "0.1")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(50))
    assert stream.receive().acknowledgement.durable_sequence == 1
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
    for _ in range(2):
        stream = wire.stream("destroyed")
        stream.send_batch(stream.opened.next_sequence, *examples(10))
        stream.results(1)
        assert own_server.stop() == 0
        own_server.start()
        wire = connect(own_server.grpc_target)
    assert own_server.stop() == 0
    newest = newest_checkpoint(own_server, "damaged")
    newest.write_bytes(newest.read_bytes()[:-7])
    both = checkpoint_files(own_server, "destroyed")  # so that the journal does not reach back to its birth
    for path in both:
        path.write_bytes(b"\0" * 100)

    own_server.start()

    wire = connect(own_server.grpc_target)
    assert wire.get("damaged").progress.step == 10  # its birth, and the batch from the journal
    assert wire.get("healthy").progress.step == 0
    assert is_ready(own_server)
    error = refused(lambda: wire.get("destroyed"))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "UNREADABLE_STATE")
    assert "checkpoint 2 is unreadable" in error.message
    assert refused(lambda: wire.create("destroyed")).code is grpc.StatusCode.ALREADY_EXISTS
    assert [path.exists() for path in both] == [True, True]  # kept for whoever can repair them
    wire.delete("destroyed")
    wire.create("destroyed")


def test_a_server_that_cannot_use_its_device_says_so_at_start(start_server):
    with pytest.raises(AssertionError, match="ended with status 1") as caught:
        start_server("--device", "cuda")
    assert "--device auto or cpu" in str(caught.value)


def test_learning_goes_on_while_a_checkpoint_is_written(start_server, connect, small_spec, examples):
    server = start_server("--checkpoint-interval", "0.05")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
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


def test_trainability_is_tested_in_the_background_and_survives_a_restart(own_server, connect, examples):
    """The learner itself learns what it would have learnt unwatched."""
    wire = connect(own_server.grpc_target)
    watched = wire.create("clicks", monitoring={"interval": 100, "trainability_interval": 200})
    wire.create("alone", monitoring={"interval": 0})
    assert watched.spec.monitoring.trainability_interval == 200
    streams = {learner: wire.stream(learner) for learner in ("clicks", "alone")}

    def send(sequence: int) -> dict:
        for stream in streams.values():
            stream.send_batch(sequence, *examples(100, seed=sequence))
            stream.results(1)
        return view(own_server)["plasticity"]["trainability"]

    sent = 1
    while send(sent) is None and sent < 300:
        sent += 1
        time.sleep(0.02)
    tested = view(own_server)["plasticity"]["trainability"]
    assert tested["step"] >= 200
    assert tested["step"] % 100 == 0
    assert 0 < tested["loss"] < math.inf
    assert tested["chance_loss"] > 0
    probe, _ = examples(20, seed=1000)
    predicted = [decode_tensor(wire.predict(learner, probe).outputs) for learner in ("clicks", "alone")]
    np.testing.assert_array_equal(*predicted)

    own_server.stop()
    own_server.start()
    after = view(own_server)["plasticity"]["trainability"]
    assert after["step"] >= tested["step"]
    wire = connect(own_server.grpc_target)
    request = learner_service_pb2.GetPlasticityRequest(name="learners/clicks", fresh=True)
    [fresh] = wire.learners.GetPlasticity(request).samples
    assert fresh.trainability.step == after["step"], "known until the next test"


def test_a_server_can_be_stopped_while_its_engine_starts_again(own_server):
    os.kill(engine_pid(own_server), signal.SIGKILL)
    wait_until(lambda: "starting it again" in own_server.log)
    own_server.begin_stop()
    assert own_server.wait() == 0


def test_a_supervisor_that_signals_the_whole_group_loses_nothing(own_server, connect, examples):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(50))
    stream.results(1)
    for pid in (engine_pid(own_server), own_server.pid):
        os.kill(pid, signal.SIGTERM)
    assert own_server.wait() == 0
    own_server.start()
    assert connect(own_server.grpc_target).get("clicks").progress.step == 50


def test_a_call_given_up_by_its_caller_is_still_carried_through(own_server, connect):
    """Deadlines expire while the engine does not answer; front and engine must agree on what happened."""
    wire = connect(own_server.grpc_target)
    wire.create("gone")
    request_id = str(uuid.uuid4())

    late = grpc.StatusCode.DEADLINE_EXCEEDED
    os.kill(engine_pid(own_server), signal.SIGSTOP)
    try:
        assert refused_code(lambda: wire.create("fresh", request_id, timeout=0.2)) is late
        assert refused_code(lambda: wire.delete("gone", timeout=0.2)) is late
    finally:
        os.kill(engine_pid(own_server), signal.SIGCONT)

    wait_until(lambda: refused_code(lambda: wire.get("gone")) is grpc.StatusCode.NOT_FOUND)
    assert wire.create("fresh", request_id).name == "learners/fresh"
    wire.create("gone")


def refused_code(action):
    try:
        action()
    except grpc.RpcError as error:
        return error.code()
    return None


def test_checkpoints_do_not_wait_for_a_busy_learners_queue(start_server, connect, examples):
    server = start_server("--checkpoint-interval", "0.3", "--engine", "torch")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    busy = wire.stream("clicks")
    for sequence in range(1, 15):
        busy.send_batch(sequence, *examples(8000))
    wait_until(lambda: (view(server)["checkpoint"] or {"step": 0})["step"] > 0)
    assert queued_batches(server) > 5


def test_a_long_message_gives_other_learners_their_turns(start_server, connect, examples):
    own_server = start_server("--engine", "torch")  # which takes a while
    wire = connect(own_server.grpc_target)
    for name in ("long", "short"):
        wire.create(name)
    long, short = wire.stream("long"), wire.stream("short")
    long.send_batch(1, *examples(50_000))
    wait_until(lambda: queued_batches(own_server, "long") == 1)
    short.send_batch(1, *examples(1))
    assert short.results(1)[0].step == 1
    assert queued_batches(own_server, "long") == 1


def test_checkpoints_go_on_after_a_learner_was_deleted_and_made_again(start_server, connect, examples):
    server = start_server("--checkpoint-interval", "0.1")
    wire = connect(server.grpc_target)
    for _ in range(3):
        wire.create("clicks")
        stream = wire.stream("clicks")
        stream.send_batch(1, *examples(2000))
        stream.results(1)
        wire.delete("clicks")
    wire.create("clicks")
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(10))
    wait_until(lambda: (view(server)["checkpoint"] or {}).get("step") == 10)
    assert "checkpoint failed" not in server.log


def test_a_file_that_cannot_be_read_or_is_another_learners_stops_nothing(own_server, connect, examples, refused):
    wire = connect(own_server.grpc_target)
    for name in ("clicks", "broken", "stranger"):
        wire.create(name)
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(50))
    stream.results(1)
    for name in ("clicks", "broken", "stranger"):
        wire.learners.CreateCheckpoint(learner_service_pb2.CreateCheckpointRequest(parent=f"learners/{name}"))
    own_server.stop()
    shutil.copy(newest_checkpoint(own_server), newest_checkpoint(own_server, "stranger"))
    broken = newest_checkpoint(own_server, "broken")
    broken.unlink()
    broken.symlink_to("nowhere")
    with contextlib.closing(journal_of(own_server)) as database:  # or they would go back to their births
        database.execute("UPDATE learners SET born = 0")
        database.commit()

    own_server.start()

    wire = connect(own_server.grpc_target)
    assert wire.get("clicks").progress.step == 50
    for name in ("broken", "stranger"):
        assert refused(lambda name=name: wire.get(name)).reason == "UNREADABLE_STATE"


def test_epochs_only_grow_across_orderly_restarts(own_server, connect):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    for epoch in (1, 2, 3):
        assert wire.stream("clicks").opened.epoch == epoch
    own_server.stop()
    own_server.start()
    assert connect(own_server.grpc_target).stream("clicks").opened.epoch == 4


def test_predictions_leave_learning_its_share(own_server, connect, examples):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    probe, _ = examples(1)
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(500))
    stream.results(1)
    started = time.monotonic()
    stream.send_batch(2, *examples(4000))
    stream.results(1)
    alone = time.monotonic() - started

    done = threading.Event()

    def keep_asking():
        own = connect(own_server.grpc_target)
        while not done.is_set():
            own.predict("clicks", probe)

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    for asker in askers:
        asker.start()
    started = time.monotonic()
    stream.send_batch(3, *examples(4000))
    stream.results(1)
    asked = time.monotonic() - started
    done.set()
    for asker in askers:
        asker.join()
    assert asked < 20 * alone + 5  # starved, it would take as long as anybody asks


def test_it_listens_on_ipv6_loopback(start_server, connect):
    server = start_server("--host", "::1")
    assert httpx.get(f"http://[::1]:{server.http_url.rpartition(':')[2]}/readyz").status_code == 200
    assert connect(f"[::1]:{server.grpc_target.rpartition(':')[2]}").create("clicks").name == "learners/clicks"


def journal_of(server) -> sqlite3.Connection:
    return sqlite3.connect(server.data_dir / "journal.db", timeout=10)


def test_while_the_journal_cannot_be_written_nothing_is_accepted_and_nothing_lost(
    own_server, connect, small_spec, examples, explain
):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    stream = wire.stream("clicks")
    learn(stream, local, 1, examples(30))
    stream.results(1)
    with contextlib.closing(journal_of(own_server)) as journal:
        journal.execute("CREATE TRIGGER full BEFORE INSERT ON journal BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
        journal.commit()

        stream.send_batch(2, *examples(30, seed=2))
        stream.send_batch(3, *examples(30, seed=3))
        error = explain(stream.failure())
        assert (error.code, error.reason, error.retryable) == (
            grpc.StatusCode.UNAVAILABLE,
            "JOURNAL_UNAVAILABLE",
            True,
        )
        assert "disk is full" in error.message
        assert wire.get("clicks").progress.step == 30

        journal.execute("DROP TRIGGER full")
        journal.commit()
    again = stream_when_back(wire)
    assert again.opened.applied_sequence == 1
    for sequence in (2, 3):
        learn(again, local, sequence, examples(30, seed=sequence))
    again.results(2)
    own_server.kill()
    own_server.start()
    assert_same(connect(own_server.grpc_target), local, examples)
