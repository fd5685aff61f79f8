"""What takes a learner's steps is chosen by the server, and changes only where the learner's journal says so."""

import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
from server_process import engine_pid, wait_until

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor

PROBE = np.linspace(-1.0, 1.0, 20, dtype=np.float32).reshape(5, 4)


def teach(wire, local, batches):
    """Teaches the learner on the server and its twin beside it the same."""
    stream = wire.stream("clicks")
    for sequence, batch in enumerate(batches, stream.opened.next_sequence):
        stream.send_batch(sequence, *batch)
        stream.results(1)
        local.train(Batch.validate(local.spec, *batch))
    stream.close()


def check(wire, local):
    outputs = decode_tensor(wire.predict("clicks", PROBE).outputs)
    np.testing.assert_array_equal(outputs, local.predict(PROBE))


def wait_for_engine(wire, engine):
    wait_until(lambda: wire.get("clicks").engine == engine, seconds=240.0)  # it may have to be compiled


def test_compiled_code_takes_the_steps_unless_told_otherwise(start_server, connect):
    server = start_server()
    wire = connect(server.grpc_target)
    assert wire.create("clicks").engine == "compiled"
    assert httpx.get(f"{server.http_url}/v1/learners/clicks").json()["engine"] == "compiled"

    other = start_server("--engine", "torch")
    assert connect(other.grpc_target).create("clicks").engine == "torch"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has loaded is not to be seen in /proc")
def test_the_process_that_answers_does_without_torch(start_server, connect, small_spec, examples):
    """It would be up a second later, and hundreds of megabytes larger."""
    server = start_server()
    wire = connect(server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    teach(wire, local, [examples(20)])
    check(wire, local)
    assert httpx.get(f"{server.http_url}/metrics").status_code == 200
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{engine_pid(server)}/maps").read_text()


def test_products_of_the_engine_are_repeatable_unless_told_otherwise(start_server, monkeypatch):
    """Or a stack's learners would differ with their company on some processors, where these tests may not run."""

    def setting(server):
        variables = Path(f"/proc/{engine_pid(server)}/environ").read_text().split("\0")
        return [value for name, _, value in (each.partition("=") for each in variables) if name == "MKL_CBWR"]

    server = start_server()
    assert setting(server) == ["AUTO,STRICT"]
    assert server.stop() == 0
    monkeypatch.setattr(server, "environment", lambda: type(server).environment(server) | {"MKL_CBWR": "AVX2"})
    server.start()
    assert setting(server) == ["AVX2"]


def test_another_engine_takes_over_at_an_entry_of_the_journal(start_server, connect, small_spec, examples):
    server = start_server("--checkpoint-interval", "1000000")
    wire = connect(server.grpc_target)
    wire.create("clicks")
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    for seed, engine in enumerate(["torch", "compiled"]):
        teach(wire, local, [examples(37, seed=seed)])
        server.kill()
        server.start("--engine", engine)
        wire = connect(server.grpc_target)
        wait_for_engine(wire, engine)
        check(wire, local)  # all that was learnt before has been learnt again with the engines of then
        local.switch_engine(engine)
    teach(wire, local, [examples(37, seed=9)])
    assert server.stop() == 0
    server.start("--engine", "compiled")
    wire = connect(server.grpc_target)
    check(wire, local)
    assert wire.get("clicks").engine == "compiled"


@pytest.mark.timeout(400)
def test_a_stream_does_not_wait_for_the_compiler(start_server, connect, small_spec, examples, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    server = start_server("--checkpoint-interval", "1000000")
    wire = connect(server.grpc_target)
    assert wire.create("clicks").engine == "torch"
    spec = LearnerSpec.parse(small_spec)
    unused = Learner(spec)
    teach(wire, unused, [examples(20, seed=seed) for seed in range(3)])
    assert wire.get("clicks").engine == "torch"
    wait_for_engine(wire, "compiled")
    teach(wire, unused, [examples(20, seed=seed) for seed in range(3, 6)])

    server.kill()
    local = Learner(spec, engine="torch")
    batches = iter([examples(20, seed=seed) for seed in range(6)])
    with closing(sqlite3.connect(server.data_dir / "journal.db")) as database:
        kinds = [kind for (kind,) in database.execute("SELECT kind FROM journal ORDER BY position")]
    for kind in kinds:
        if kind == "engine":
            local.switch_engine("compiled")
        elif kind == "batch":
            local.train(Batch.validate(spec, *next(batches)))
    assert kinds.count("engine") == 1
    server.start()
    wire = connect(server.grpc_target)
    assert wire.get("clicks").engine == "compiled"
    check(wire, local)


def test_company_changes_nothing_that_a_learner_learns(start_server, connect, small_spec, examples):
    """Learners of several streams share engine calls; each is the one that has learnt alone, also after a kill."""
    server = start_server("--engine", "stacked", "--group-wait", "0.01", "--checkpoint-interval", "1000000")
    wire = connect(server.grpc_target)
    names = [f"learner-{number}" for number in range(5)]
    streams = {name: (wire.create(name), wire.stream(name))[1] for name in names}
    locals_ = {name: Learner(LearnerSpec.parse(small_spec), engine="stacked") for name in names}
    for sequence in range(1, 13):
        for number, name in enumerate(names):
            batch = examples(5 * number + sequence, seed=100 * number + sequence)
            streams[name].send_batch(sequence, *batch)
            locals_[name].train(Batch.validate(locals_[name].spec, *batch))
    for stream in streams.values():
        stream.results(12)

    def check_all():
        for name, local in locals_.items():
            outputs = decode_tensor(wire.predict(name, PROBE).outputs)
            np.testing.assert_array_equal(outputs, local.predict(PROBE), err_msg=name)

    check_all()
    server.kill()
    server.start()
    wire = connect(server.grpc_target)
    check_all()


def test_in_company_one_that_diverges_is_the_only_one_that_stops(start_server, connect, small_spec, examples):
    server = start_server("--engine", "stacked", "--group-wait", "0.05")
    wire = connect(server.grpc_target)
    names = ["wild", "clicks"]
    streams = {name: (wire.create(name), wire.stream(name))[1] for name in names}
    local = Learner(LearnerSpec.parse(small_spec), engine="stacked")
    features, targets = examples(40)
    streams["wild"].send_batch(1, np.full_like(features, 1e30), targets)
    streams["clicks"].send_batch(1, features, targets)
    local.train(Batch.validate(local.spec, features, targets))
    streams["clicks"].results(1)
    check(wire, local)
    wait_until(lambda: wire.get("wild").HasField("quarantine"))
    assert wire.get("wild").quarantine.sequence == 1
