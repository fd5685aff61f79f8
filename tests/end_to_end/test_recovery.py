"""What a learner is after failures and absences: always the one that learnt the same batches undisturbed."""

import contextlib
import os
import signal
import sqlite3
import threading
import time

import grpc
import httpx
import numpy as np
import pytest
from server_process import engine_pid, wait_until

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor, from_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2

#: It is up sooner than compiled code, which is what other tests have.
pytestmark = pytest.mark.server_flags("--engine", "torch")

PROBE = np.random.default_rng(99).normal(size=(5, 4)).astype(np.float32)


def view(server, learner="clicks"):
    return httpx.get(f"{server.http_url}/v1/learners/{learner}").json()


def create(wire, learner_id, small_spec, durability=learner_pb2.DURABILITY_FSYNC):
    learner = learner_pb2.Learner(spec=from_plain(small_spec, spec_pb2.LearnerSpec), durability=durability)
    request = learner_service_pb2.CreateLearnerRequest(learner_id=learner_id, learner=learner)
    return wire.learners.CreateLearner(request)


def checkpoint(wire, learner_id):
    return wire.learners.CreateCheckpoint(learner_service_pb2.CreateCheckpointRequest(parent=f"learners/{learner_id}"))


def stream_when_back(wire, learner="clicks"):
    """As clients do: tries again while the server says that it is a matter of time."""
    while True:
        try:
            return wire.stream(learner)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


class Taught:
    """A learner on the server and its twin beside it, which are taught the same."""

    def __init__(self, small_spec, learner_id="clicks"):
        self.id = learner_id
        self.local = Learner(LearnerSpec.parse(small_spec), engine="torch")
        self.sequence = 0

    def teach(self, stream, batch, **fields):
        self.sequence += 1
        stream.send_batch(self.sequence, *batch, **fields)
        self.local.train(Batch.validate(self.local.spec, *batch))

    def check(self, wire):
        outputs = decode_tensor(wire.predict(self.id, PROBE).outputs)
        np.testing.assert_array_equal(outputs, self.local.predict(PROBE), err_msg=self.id)


# -- eviction --


def test_one_process_owns_more_learners_than_it_has_room_for(start_server, connect, small_spec, examples):
    server = start_server("--max-live-learners", "3", "--checkpoint-interval", "0.2")
    wire = connect(server.grpc_target)
    taught = [Taught(small_spec, f"learner-{number}") for number in range(8)]
    for learner in taught:
        wire.create(learner.id)

    def states():
        found = [item["state"] for item in httpx.get(f"{server.http_url}/v1/learners").json()["learners"]]
        return found.count("active"), found.count("evicted")

    for round_ in range(3):
        for number, learner in enumerate(taught):
            stream = stream_when_back(wire, learner.id)
            learner.teach(stream, examples(20, seed=10 * number + round_))
            stream.results(1)
            stream.close()
            learner.check(wire)
    wait_until(lambda: states() == (3, 5))
    assert view(server, "learner-0")["progress"]["step"] == 60  # known without bringing it back
    assert wire.get("learner-0").state == learner_pb2.Learner.STATE_EVICTED

    server.kill()
    server.start()
    wire = connect(server.grpc_target)
    assert sum(states()) == 8
    assert view(server, "learner-0")["progress"]["step"] == 60
    for learner in taught:
        learner.check(wire)


def test_an_idle_learner_leaves_memory_and_whatever_is_asked_of_it_brings_it_back(
    start_server, connect, small_spec, examples
):
    server = start_server("--evict-after", "0.3", "--checkpoint-interval", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(20))
    stream.results(1)
    stream.close()
    uses = [
        lambda: learner.check(wire),
        lambda: checkpoint(wire, "clicks"),
        lambda: wire.learners.GetPlasticity(
            learner_service_pb2.GetPlasticityRequest(name="learners/clicks", fresh=True)
        ),
        lambda: wire.learners.ForkLearner(
            learner_service_pb2.ForkLearnerRequest(name="learners/clicks", learner_id="copy")
        ),
        lambda: b"".join(
            part.data
            for part in wire.learners.ExportLearner(learner_service_pb2.ExportLearnerRequest(name="learners/clicks"))
        ),
        lambda: learner.teach(wire.stream("clicks"), examples(20, seed=2)),
    ]
    for use in uses:
        wait_until(lambda: view(server)["state"] == "evicted")
        use()
        assert view(server)["state"] == "active"
    wait_until(lambda: view(server)["progress"]["step"] == 40)
    learner.check(wire)


# -- durability --


def test_os_durability_survives_kill_9(own_server, connect, small_spec, examples):
    wire = connect(own_server.grpc_target)
    create(wire, "clicks", small_spec, learner_pb2.DURABILITY_OS)
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    for seed in range(20):
        learner.teach(stream, examples(10, seed=seed))
    assert stream.results(20)[-1].sequence == 20
    own_server.kill()
    own_server.start()
    learner.check(connect(own_server.grpc_target))


def test_without_a_journal_a_crash_goes_back_to_the_checkpoint_and_says_so(own_server, connect, small_spec, examples):
    wire = connect(own_server.grpc_target)
    create(wire, "clicks", small_spec, learner_pb2.DURABILITY_NONE)
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    assert stream.receive().acknowledgement.durable_sequence == 0
    checkpoint(wire, "clicks")
    told = stream.receive().acknowledgement  # news without a batch
    assert (told.durable_sequence, list(told.results)) == (1, [])
    saved = Learner.restore(learner.local.snapshot(), engine="torch")
    learner.teach(stream, examples(10, seed=2))
    assert stream.receive().acknowledgement.durable_sequence == 1
    with contextlib.closing(sqlite3.connect(own_server.data_dir / "journal.db")) as database:
        assert database.execute("SELECT DISTINCT kind FROM journal").fetchall() == [("open",)]

    own_server.kill()
    own_server.start()

    wire = connect(own_server.grpc_target)
    learner.local, learner.sequence = saved, 1
    learner.check(wire)
    again = wire.stream("clicks")
    assert (again.opened.next_sequence, again.opened.durable_sequence) == (2, 1)
    learner.teach(again, examples(10, seed=3))
    again.results(1)
    assert own_server.stop() == 0  # an orderly end saves everything
    own_server.start()
    learner.check(connect(own_server.grpc_target))


# -- checkpoints --


@pytest.mark.parametrize("flags", [("--checkpoint-steps", "50"), ("--checkpoint-bytes", "2000")])
def test_checkpoints_come_by_steps_and_by_bytes_and_the_journal_ends_below_the_oldest(
    start_server, connect, small_spec, examples, flags
):
    server = start_server("--checkpoint-interval", "3600", "--checkpoints-kept", "3", *flags)
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    for seed in range(60):
        learner.teach(stream, examples(10, seed=seed))
        stream.results(1)
    database = sqlite3.connect(server.data_dir / "journal.db")
    with contextlib.closing(database):

        def rows():
            checkpoints = database.execute("SELECT number, position FROM checkpoints ORDER BY number").fetchall()
            (first,) = database.execute("SELECT min(position) FROM journal").fetchone()
            return checkpoints, first

        (uid,) = database.execute("SELECT uid FROM learners").fetchone()

        def is_tidy():
            checkpoints, first = rows()
            files = sorted(path.name for path in (server.data_dir / "checkpoints" / uid).iterdir())
            names = sorted(f"{number}.safetensors" for number, _ in checkpoints)
            return len(checkpoints) == 3 and first == checkpoints[0][1] + 1 and files == names

        wait_until(is_tidy)
        assert rows()[0][-1][0] >= 5
    server.kill()
    server.start()
    learner.check(connect(server.grpc_target))


def test_checkpoints_in_an_object_store(start_server, connect, small_spec, examples, monkeypatch):
    moto_server = pytest.importorskip("moto.server")
    s3 = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"FSSPEC_S3_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    try:
        assert httpx.put(f"{endpoint}/learners").status_code == 200
        server = start_server("--checkpoint-url", "s3://learners/production", "--checkpoint-interval", "0.2")
        wire = connect(server.grpc_target)
        wire.create("clicks")
        learner = Taught(small_spec)
        stream = wire.stream("clicks")
        for seed in range(10):
            learner.teach(stream, examples(30, seed=seed))
            stream.results(1)
        made = checkpoint(wire, "clicks")
        then = Learner.restore(learner.local.snapshot(), engine="torch")
        learner.teach(stream, examples(30, seed=99))
        stream.results(1)
        server.kill()
        server.start()
        wire = connect(server.grpc_target)
        learner.check(wire)
        restore = learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", checkpoint=made.name)
        wire.learners.RestoreLearner(restore)
        learner.local = then
        learner.check(wire)
        assert not (server.data_dir / "checkpoints").exists()

        s3.stop()  # a storage that is away has not lost anything
        server.kill()
        server.launch()
        wait_until(lambda: "learner waits for its storage" in server.log)
        s3 = moto_server.ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
        s3.start()
        server.wait_until_ready()
        learner.check(connect(server.grpc_target))
        assert server.stop() == 0
    finally:
        s3.stop()


def damage(path):
    path.write_bytes(path.read_bytes()[:-9])


def file_of(server, made):
    (directory,) = (server.data_dir / "checkpoints").iterdir()
    return directory / f"{made.rpartition('/')[2]}.safetensors"


@pytest.mark.parametrize("target", ["checkpoint", "journal_position"])
def test_a_restore_whose_own_checkpoint_is_damaged_is_made_again(own_server, connect, small_spec, examples, target):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(20, seed=1))
    stream.results(1)
    made = checkpoint(wire, "clicks")
    then = Learner.restore(learner.local.snapshot(), engine="torch")
    for seed in (2, 3):
        learner.teach(stream, examples(20, seed=seed))
    stream.results(2)
    where = {"checkpoint": made.name} if target == "checkpoint" else {"journal_position": made.journal_position}
    wire.learners.RestoreLearner(learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", **where))
    learner.local = then
    again = stream_when_back(wire)
    learner.teach(again, examples(20, seed=4))
    again.results(1)
    own_server.kill()
    damage(file_of(own_server, "2"))  # the restore's
    own_server.start()
    wire = connect(own_server.grpc_target)
    learner.check(wire)
    stream = wire.stream("clicks")
    assert stream.opened.next_sequence == 5
    learner.teach(stream, examples(20, seed=5))
    stream.results(1)
    learner.check(wire)


def test_a_damaged_checkpoint_is_not_counted_among_those_to_fall_back_to(start_server, connect, small_spec, examples):
    server = start_server("--checkpoint-interval", "3600", "--checkpoint-steps", "20")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)

    def numbers():
        with contextlib.closing(sqlite3.connect(server.data_dir / "journal.db")) as database:
            return [number for (number,) in database.execute("SELECT number FROM checkpoints ORDER BY number")]

    def teach_and_save(expected):
        stream = stream_when_back(wire)
        learner.teach(stream, examples(25, seed=expected[-1]))
        stream.results(1)
        stream.close()
        wait_until(lambda: numbers() == expected)

    teach_and_save([1])
    teach_and_save([1, 2])
    server.kill()
    damage(file_of(server, "2"))
    server.start()
    wire = connect(server.grpc_target)
    learner.check(wire)
    teach_and_save([1, 3])
    server.kill()
    damage(file_of(server, "3"))
    server.start()
    learner.check(connect(server.grpc_target))


# -- recovery --


def test_learners_serve_as_each_is_ready_and_the_server_is_ready_when_all_are(
    start_server, connect, small_spec, examples
):
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    long, short = Taught(small_spec, "long"), Taught(small_spec, "short")
    for learner, batches, size in ((long, 16, 1000), (short, 1, 10)):
        wire.create(learner.id)
        stream = wire.stream(learner.id)
        for seed in range(batches):
            learner.teach(stream, examples(size, seed=seed))
        stream.results(batches)
    server.kill()
    server.launch()

    def is_answering():
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{server.http_url}/livez").status_code == 200

    wait_until(is_answering)
    wire = connect(server.grpc_target)

    def short_is_back():
        with contextlib.suppress(grpc.RpcError):
            return wire.get("short").state == learner_pb2.Learner.STATE_ACTIVE

    wait_until(short_is_back)
    short.check(wire)
    short.teach(wire.stream("short"), examples(10, seed=5))
    assert wire.get("long").state == learner_pb2.Learner.STATE_UNAVAILABLE
    ready = httpx.get(f"{server.http_url}/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["learners are being restored"])
    server.wait_until_ready()
    assert httpx.get(f"{server.http_url}/readyz").status_code == 200
    long.check(wire)
    short.check(wire)
    replayed = {e["learner"]: e["entries"] for e in server.log_events() if e["event"] == "journal replayed"}
    assert replayed == {"long": 17, "short": 2}


POISON = """
import os
from cbp import Learner
train = Learner.train
def train_or_die(learner, batch, **options):
    if batch.task == "poison":
        os.kill(os.getpid(), 9)
    return train(learner, batch, **options)
Learner.train = train_or_die
"""


def test_a_batch_that_the_engine_dies_of_is_found_and_left_alone(
    start_server, connect, small_spec, examples, refused, tmp_path, monkeypatch
):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    own_server = start_server()
    wire = connect(own_server.grpc_target)
    clicks, other = Taught(small_spec), Taught(small_spec, "other")
    for learner in (clicks, other):
        wire.create(learner.id)
        stream = wire.stream(learner.id)
        learner.teach(stream, examples(10, seed=1))
        stream.results(1)
    poisoned = wire.stream("clicks")
    poisoned.send_batch(2, *examples(10, seed=2), task="poison")

    wait_until(lambda: view(own_server)["state"] == "quarantined")
    wait_until(lambda: httpx.get(f"{own_server.http_url}/readyz").status_code == 200)
    error = refused(lambda: wire.stream("clicks"))
    assert (error.reason, error.metadata["sequence"]) == ("LEARNER_QUARANTINED", "2")
    clicks.check(wire)
    other.check(wire)
    own_server.kill()  # and a new server does not fall into it again
    own_server.start()
    wire = connect(own_server.grpc_target)
    clicks.check(wire)
    wire.learners.ResumeLearner(learner_service_pb2.ResumeLearnerRequest(name="learners/clicks", skip_batch=True))
    clicks.sequence = 2
    stream = wire.stream("clicks")
    clicks.teach(stream, examples(10, seed=3))
    stream.results(1)
    clicks.check(wire)


def test_engine_deaths_that_are_nobodys_fault_quarantine_nobody(own_server, connect, small_spec, examples):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    for seed in range(3):
        stream = stream_when_back(wire)
        learner.teach(stream, examples(2000, seed=seed))
        wait_until(lambda sequence=learner.sequence: view(own_server)["producers"][0]["durable_sequence"] == sequence)
        os.kill(engine_pid(own_server), signal.SIGKILL)
        wait_until(lambda count=seed + 1: own_server.log.count("engine process ended") == count)
    stream_when_back(wire).close()
    learner.check(wire)


# -- the journal ends where the checkpoints do --


def journal_rows(server):
    with contextlib.closing(sqlite3.connect(server.data_dir / "journal.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM journal").fetchone()
        return count


def newest_file(server):
    return max((server.data_dir / "checkpoints").glob("*/*.safetensors"), key=lambda path: int(path.stem))


def test_positions_that_a_truncated_journal_does_not_hold_are_not_restored(
    start_server, connect, small_spec, examples, refused
):
    server = start_server("--checkpoints-kept", "1", "--checkpoint-interval", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    for seed in range(3):
        learner.teach(stream, examples(10, seed=seed))
        if seed == 0:
            stream.results(1)
            checkpoint(wire, "clicks")
    stream.results(2)
    wait_until(lambda: journal_rows(server) == 0)
    listed = wire.learners.ListCheckpoints(learner_service_pb2.ListCheckpointsRequest(parent="learners/clicks"))
    assert (listed.first_restorable_position, listed.last_restorable_position) == (4, 4)
    for position in (1, 3):
        restore = learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", journal_position=position)
        assert refused(lambda restore=restore: wire.learners.RestoreLearner(restore)).reason == "POSITION_NOT_HELD"
    learner.check(wire)


def test_an_old_checkpoint_without_the_journal_behind_it_does_not_stand_in_for_a_damaged_one(
    start_server, connect, small_spec, examples, refused
):
    server = start_server("--checkpoints-kept", "1", "--checkpoint-interval", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    stream.results(1)
    checkpoint(wire, "clicks")
    learner.teach(stream, examples(10, seed=2))
    stream.results(1)
    wait_until(lambda: journal_rows(server) == 0)
    server.kill()
    newest_file(server).write_bytes(b"damaged")
    server.start()
    wire = connect(server.grpc_target)
    assert refused(lambda: wire.get("clicks")).reason == "UNREADABLE_STATE"


# -- a batch that the engine dies of, once more --


def patch(tmp_path, monkeypatch, code):
    """Runs `code` at the start of the server's processes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)


@pytest.mark.torture
def test_a_batch_that_the_engine_dies_of_is_found_whenever_it_is_replayed(
    start_server, connect, small_spec, examples, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, POISON)
    server = start_server()
    wire = connect(server.grpc_target)
    clicks, other = Taught(small_spec), Taught(small_spec, "other")
    for learner in (clicks, other):
        wire.create(learner.id)
        stream = wire.stream(learner.id)
        learner.teach(stream, examples(10, seed=1))
        stream.results(1)
    wire.stream("clicks").send_batch(2, *examples(10, seed=2), task="poison")
    wait_until(lambda: "engine process ended" in server.log)
    server.kill()  # before anything is known of the batch
    server.launch()
    wait_until(lambda: '"learner quarantined"' in server.log, seconds=40)
    server.wait_until_ready()
    wire = connect(server.grpc_target)
    clicks.check(wire)
    other.check(wire)


# -- what is durable --

FAILING_JOURNAL = """
import os
from sqlalchemy.exc import OperationalError
from cbp_server.store.journal import Journal
append = Journal.append
def failing(self, entries, *, sync=True):
    if os.path.exists(os.environ["FLAG"]):
        raise OperationalError("INSERT", {}, Exception("database is away"))
    append(self, entries, sync=sync)
Journal.append = failing
"""


def test_without_a_journal_of_batches_nothing_becomes_durable_by_a_recovery_in_memory(
    start_server, connect, small_spec, examples, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, FAILING_JOURNAL)
    flag = tmp_path / "flag"
    monkeypatch.setenv("FLAG", str(flag))
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    create(wire, "clicks", small_spec, learner_pb2.DURABILITY_NONE)
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    assert stream.receive().acknowledgement.durable_sequence == 0
    flag.touch()
    with pytest.raises(grpc.RpcError, match="database is away"):
        wire.stream("clicks", "other")
    flag.unlink()
    again = stream_when_back(wire)
    assert (again.opened.applied_sequence, again.opened.durable_sequence) == (1, 0)
    learner.check(wire)
    checkpoint(wire, "clicks")
    assert again.receive().acknowledgement.durable_sequence == 1


def test_a_new_process_is_not_told_of_batches_that_a_crash_could_still_take(own_server, connect, small_spec, examples):
    """It goes on in its source behind what it is told of, and nobody else would send what is missing."""
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    first = wire.stream("clicks")
    with contextlib.closing(sqlite3.connect(own_server.data_dir / "journal.db")) as database:
        database.execute("BEGIN IMMEDIATE")  # the server waits for its turn to write
        first.send_batch(1, *examples(10, seed=1))
        wait_until(lambda: view(own_server)["queued_batches"] == 1)
        first.close()
        told = []

        def begin_second():
            with contextlib.suppress(grpc.RpcError):
                told.append(wire.stream("clicks").opened)

        second = threading.Thread(target=begin_second)
        second.start()
        wait_until(lambda: view(own_server)["producers"][0]["epoch"] == 2)
        own_server.kill()
        second.join()
    assert told == []

    own_server.start()
    wire = connect(own_server.grpc_target)
    learner = Taught(small_spec)
    again = wire.stream("clicks")
    assert again.opened.next_sequence == 1
    learner.teach(again, examples(10, seed=1))
    again.results(1)
    learner.check(wire)


SLOW_CHECKPOINTS = """
import os, time
from cbp_server.store.checkpoints import CheckpointFiles
write = CheckpointFiles.write
def slow(self, uid, number, data):
    open(os.environ["FLAG"], "w").close()
    time.sleep(float(os.environ["SLOW"]))
    write(self, uid, number, data)
CheckpointFiles.write = slow
"""


def test_an_orderly_end_waits_for_a_checkpoint_under_way(
    start_server, connect, small_spec, examples, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, SLOW_CHECKPOINTS)
    flag = tmp_path / "flag"
    monkeypatch.setenv("FLAG", str(flag))
    monkeypatch.setenv("SLOW", "2")
    server = start_server("--checkpoint-interval", "0.3")
    wire = connect(server.grpc_target)
    create(wire, "clicks", small_spec, learner_pb2.DURABILITY_NONE)
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    stream.results(1)
    wait_until(flag.exists)
    assert server.stop() == 0
    server.start()
    learner.check(connect(server.grpc_target))


# -- commits in doubt --

IN_DOUBT = """
import os
from sqlalchemy.exc import OperationalError
from cbp_server.store.catalog import Catalog
def doubtful(name):
    method = getattr(Catalog, name)
    def call(self, *args, **kwargs):
        method(self, *args, **kwargs)
        if os.path.exists(os.environ["FLAG"]):
            os.unlink(os.environ["FLAG"])
            raise OperationalError("COMMIT", {}, Exception("connection lost"))
    setattr(Catalog, name, call)
for name in ("add", "add_checkpoint", "resume", "restore"):
    doubtful(name)
"""


@pytest.fixture
def in_doubt(tmp_path, monkeypatch):
    """Touching it loses the connection behind the next commit of an operation."""
    patch(tmp_path, monkeypatch, IN_DOUBT)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    return tmp_path / "flag"


def twice(refused, flag, action):
    """Loses the connection at the first attempt; returns what the second one answers."""
    flag.touch()
    assert refused(action).reason == "JOURNAL_UNAVAILABLE"
    return action()


def test_an_operation_whose_commit_is_in_doubt_can_be_repeated(
    in_doubt, start_server, connect, small_spec, examples, refused
):
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    request_id = "6f8a1f0e-0d7c-4b52-9d55-0c1d0f8c6a01"
    twice(refused, in_doubt, lambda: wire.create("clicks", request_id))
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    stream.results(1)
    made = twice(refused, in_doubt, lambda: checkpoint(wire, "clicks"))
    then = Learner.restore(learner.local.snapshot(), engine="torch")
    learner.teach(stream, examples(10, seed=2))
    stream.results(1)

    restore = learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", checkpoint=made.name)

    def restored():
        while True:
            try:
                return wire.learners.RestoreLearner(restore)
            except grpc.RpcError as error:
                if "brought back" not in error.details():
                    raise

    twice(refused, in_doubt, restored)
    learner.local = then
    learner.check(wire)
    fork = learner_service_pb2.ForkLearnerRequest(
        name="learners/clicks", learner_id="copy", request_id="6f8a1f0e-0d7c-4b52-9d55-0c1d0f8c6a02"
    )
    twice(refused, in_doubt, lambda: wire.learners.ForkLearner(fork))
    checkpoint(wire, "clicks")
    again = stream_when_back(wire)
    learner.teach(again, examples(10, seed=3))
    again.results(1)
    server.kill()
    server.start()
    wire = connect(server.grpc_target)
    learner.check(wire)
    wire.get("copy")


def test_a_resume_whose_commit_is_in_doubt_can_be_repeated(in_doubt, start_server, connect, refused):
    server = start_server()
    wire = connect(server.grpc_target)
    wire.create("clicks", loss="mse")
    stream = wire.stream("clicks")
    huge = np.full((4, 4), 3e38, np.float32), np.full((4, 3), 3e38, np.float32)
    stream.send_batch(1, *huge)
    stream.failure()
    wait_until(lambda: view(server)["state"] == "quarantined")
    resume = learner_service_pb2.ResumeLearnerRequest(name="learners/clicks", skip_batch=True)
    twice(refused, in_doubt, lambda: wire.learners.ResumeLearner(resume))
    assert stream_when_back(wire).opened.next_sequence == 2


DIES_OF_RENAME = """
import os
from cbp_server.engine import messages
from cbp_server.engine.process import EngineProcess
submit = EngineProcess.submit
def dying(self, request):
    if isinstance(request, messages.Rename) and os.path.exists(os.environ["FLAG"]):
        os.unlink(os.environ["FLAG"])
        os.kill(self.pid, 9)
    return submit(self, request)
EngineProcess.submit = dying
"""


def test_a_restore_counts_once_the_catalog_has_it_whatever_becomes_of_the_engine(
    start_server, connect, small_spec, examples, refused, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, DIES_OF_RENAME)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(10, seed=1))
    stream.results(1)
    then = Learner.restore(learner.local.snapshot(), engine="torch")
    learner.teach(stream, examples(10, seed=2))
    stream.results(1)
    (tmp_path / "flag").touch()
    restore = learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", journal_position=2)
    refused(lambda: wire.learners.RestoreLearner(restore))
    learner.local = then
    again = stream_when_back(wire)
    learner.teach(again, examples(10, seed=3))
    again.results(1)
    checkpoint(wire, "clicks")
    learner.check(wire)


# -- coming and going at the same time --

SLOW_BATCHES = """
import os, time
from cbp import Learner
train = Learner.train
def slow(learner, batch, **options):
    if os.path.exists(os.environ["FLAG"]):
        time.sleep(0.2)
    return train(learner, batch, **options)
Learner.train = slow
"""


def test_a_learner_deleted_while_it_is_brought_back_stays_deleted(
    start_server, connect, small_spec, examples, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, SLOW_BATCHES)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    server = start_server("--checkpoint-interval", "3600")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    for seed in range(10):
        learner.teach(stream, examples(2, seed=seed))
    stream.results(10)
    server.kill()
    (tmp_path / "flag").touch()
    server.launch()

    def deleted():
        with contextlib.suppress(grpc.RpcError, OSError):
            wire.delete("clicks", timeout=1.0)
            return True

    wait_until(lambda: server.log.count('"engine process ready"') == 2)
    time.sleep(0.3)  # into the replay
    wait_until(deleted)
    server.wait_until_ready()
    listed = wire.learners.ListLearners(learner_service_pb2.ListLearnersRequest(show_deleted=True)).learners
    assert [found.state for found in listed] == [learner_pb2.Learner.STATE_DELETED]
    wire.learners.UndeleteLearner(learner_service_pb2.UndeleteLearnerRequest(name="learners/clicks"))
    learner.check(wire)


def test_a_restore_that_the_servers_end_cuts_off_says_so(
    start_server, connect, small_spec, examples, explain, tmp_path, monkeypatch
):
    patch(tmp_path, monkeypatch, SLOW_BATCHES)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    server = start_server("--checkpoint-interval", "3600", "--drain-timeout", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    for seed in range(10):
        learner.teach(stream, examples(2, seed=seed))
    stream.results(10)
    (tmp_path / "flag").touch()
    restore = learner_service_pb2.RestoreLearnerRequest(name="learners/clicks", journal_position=10)
    restoring = wire.learners.RestoreLearner.future(restore)
    wait_until(lambda: view(server)["state"] == "active")
    time.sleep(0.3)  # into the replay
    server.begin_stop()
    assert explain(restoring.exception()).reason == "SERVER_DRAINING"
    assert server.wait() == 0
    (tmp_path / "flag").unlink()
    server.start()
    learner.check(connect(server.grpc_target))


FAILING_RECOVERY = """
from cbp_server.store.journal import Journal
def failing(*_):
    raise KeyError("at")
Journal.resumes = failing
"""


def test_a_learner_whose_recovery_fails_unexpectedly_is_named(own_server, connect, refused, tmp_path, monkeypatch):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    assert own_server.stop() == 0
    patch(tmp_path, monkeypatch, FAILING_RECOVERY)
    own_server.tolerate("learner not restored")
    own_server.start()
    error = refused(lambda: connect(own_server.grpc_target).get("clicks"))
    assert (error.reason, "KeyError" in error.message) == ("UNREADABLE_STATE", True)


SLOW_PURGE = """
import os, time
from cbp_server.store.catalog import Catalog
purge = Catalog.purge
def slow(self, uid):
    open(os.environ["FLAG"], "w").close()
    time.sleep(1)
    purge(self, uid)
Catalog.purge = slow
"""


def test_a_learner_that_is_being_purged_is_not_undeleted(start_server, connect, refused, tmp_path, monkeypatch):
    patch(tmp_path, monkeypatch, SLOW_PURGE)
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    wire = connect(start_server().grpc_target)
    wire.create("clicks")
    wire.delete("clicks")
    purging = wire.learners.PurgeLearner.future(learner_service_pb2.PurgeLearnerRequest(name="learners/clicks"))
    wait_until((tmp_path / "flag").exists)
    undelete = learner_service_pb2.UndeleteLearnerRequest(name="learners/clicks")
    assert refused(lambda: wire.learners.UndeleteLearner(undelete)).reason == "LEARNER_NOT_FOUND"
    purging.result()


# -- PostgreSQL --


def test_a_database_that_goes_away_and_comes_back_loses_nothing(
    start_server, make_postgres, connect, small_spec, examples, explain
):
    postgres = make_postgres()
    postgres.start()
    server = start_server("--store-url", postgres.url, "--checkpoint-interval", "0.2")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    learner = Taught(small_spec)
    stream = wire.stream("clicks")
    learner.teach(stream, examples(20, seed=1))
    stream.results(1)

    postgres.stop()
    stream.send_batch(2, *examples(20, seed=2))
    error = explain(stream.failure())
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "JOURNAL_UNAVAILABLE", True)
    learner.check(wire)  # it still predicts
    postgres.start()

    again = stream_when_back(wire)
    assert again.opened.next_sequence == 2
    for seed in (2, 3):
        learner.teach(again, examples(20, seed=seed))
    again.results(2)
    server.kill()
    server.start()
    learner.check(connect(server.grpc_target))
    assert not (server.data_dir / "journal.db").exists()


def test_a_second_server_on_the_same_database_refuses_to_start(start_server, make_postgres):
    postgres = make_postgres()
    postgres.start()
    start_server("--store-url", postgres.url)
    with pytest.raises(AssertionError, match="another server uses this database"):
        start_server("--store-url", postgres.url)
