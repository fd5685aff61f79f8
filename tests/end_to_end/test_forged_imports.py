"""Files with one thing in them replaced, sent to a real server: each is refused by name, or makes a learner that harms
nobody, neither at once nor at the next start."""

import random
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing

import grpc
import httpx
import pytest
from forging import SPECS, batch_of, forgeries, good_snapshot
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess, engine_pid
from wire import RichError, Wire

from cbp import LearnerSnapshot
from cbp_proto.v1 import learner_service_pb2

_SHORT = {"mlp, adam": 14, "mlp, random utility, wide": 12, "mlp with columns": 8, "convnet with batches": 6}
_AT_ONCE = 2**20
_ROWS: list[tuple[str, str, object]] = [
    ("learners", "spec", "nonsense"),
    ("learners", "spec", "[" * 100_000),
    ("learners", "spec", '{"network": {"kind": "mlp"}}'),
    ("learners", "engine", "steam"),
    ("learners", "durability", 7),
    ("learners", "create_time", "yesterday"),
    ("learners", "quarantine", '{"position": "1"}'),
    ("checkpoints", "summary", "{}"),
    ("checkpoints", "summary", '{"progress": {"step": true}}'),
    ("checkpoints", "step", "many"),
    ("checkpoints", "position", -(2**62)),
    ("checkpoints", "time", "soon"),
]
"""Table, column and what is written there."""


def import_(wire: Wire, learner_id: str, data: bytes) -> None:
    def messages() -> Iterator[learner_service_pb2.ImportLearnerRequest]:
        yield learner_service_pb2.ImportLearnerRequest(header=learner_service_pb2.ImportHeader(learner_id=learner_id))
        for start in range(0, len(data), _AT_ONCE):
            yield learner_service_pb2.ImportLearnerRequest(data=data[start : start + _AT_ONCE])

    wire.learners.ImportLearner(messages(), timeout=60)


def import_all(wire: Wire, forged: Iterator[tuple[str, bytes]]) -> dict[str, str]:
    """By the learner's id what was taken, and from what. What was refused was refused by name."""
    taken = {}
    for number, (what, data) in enumerate(forged):
        try:
            import_(wire, f"forged-{number}", data)
            taken[f"forged-{number}"] = what
        except grpc.RpcError as error:
            refusal = RichError(error)
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT, (what, refusal.message)
            assert refusal.fields, what
    return taken


def forge_rows(server: ServerProcess, rows: dict[str, tuple[str, str, object]]) -> None:
    """Writes what cannot be into the catalog's rows of these learners, as somebody who has the database can."""
    with closing(sqlite3.connect(server.data_dir / "journal.db")) as database, database:
        for learner_id, (table, column, value) in rows.items():
            key = "uid" if table == "learners" else "learner_uid"
            uid = "(SELECT uid FROM learners WHERE learner_id = ?)"
            changed = database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = {uid}", (value, learner_id))
            assert changed.rowcount == 1, learner_id


def assert_served(server: ServerProcess, wire: Wire, expected: set[str], unreadable: Collection[str] = ()) -> None:
    """All of them are listed, watched, shown and scraped; others are named as unreadable."""
    listed: set[str] = set()
    token = ""
    while True:
        page = wire.learners.ListLearners(
            learner_service_pb2.ListLearnersRequest(page_size=1000, page_token=token), timeout=60
        )
        listed |= {learner.name.removeprefix("learners/") for learner in page.learners}
        if not (token := page.next_page_token):
            break
    assert listed == expected

    watched: set[str] = set()
    call = wire.learners.WatchLearners(learner_service_pb2.WatchLearnersRequest(), timeout=60)
    for message in call:
        watched |= {each.learner.name.removeprefix("learners/") for each in message.learners}
        if not message.more_follow:
            break
    call.cancel()
    assert watched == expected

    with httpx.Client(base_url=server.http_url, timeout=60) as http:
        shown = http.get("/v1/learners", params={"page_size": 1000})
        assert {learner["id"] for learner in shown.json()["learners"]} == expected
        assert set(http.get("/v1/server").json()["unreadable"]) == set(unreadable)
        assert http.get("/").status_code == 200
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    assert any(family.name == "cbp_learner_steps" for family in families)


def use(wire: Wire, learner_id: str) -> None:
    """Predicts, measures and trains; a batch may be too much for it, but not for the server."""
    message = wire.get(learner_id)
    exported = LearnerSnapshot.from_bytes(exported_by(wire, learner_id))
    spec = exported.read_spec()
    batch = batch_of(spec, 7)
    assert message.progress.step >= 0
    wire.predict(learner_id, batch.features)
    wire.learners.GetPlasticity(
        learner_service_pb2.GetPlasticityRequest(name=f"learners/{learner_id}", fresh=True), timeout=60
    )
    stream = wire.stream(learner_id)
    stream.send_batch(1, batch.features, batch.targets)
    code = grpc.StatusCode.OK
    try:
        stream.results(1)
        stream.finish()
    except grpc.RpcError as error:
        code = error.code()
    # Where it diverges it goes back to before the batch.
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)


def exported_by(wire: Wire, learner_id: str) -> bytes:
    request = learner_service_pb2.ExportLearnerRequest(name=f"learners/{learner_id}")
    return b"".join(part.data for part in wire.learners.ExportLearner(request, timeout=60))


def test_what_is_imported_is_refused_by_name_or_harms_nobody(
    own_server: ServerProcess, connect: Callable[[str], Wire]
) -> None:
    wire, pid = connect(own_server.grpc_target), engine_pid(own_server)
    wire.create("bystander")
    sampled = random.Random(3)

    def forged() -> Iterator[tuple[str, bytes]]:
        for kind, count in _SHORT.items():
            snapshot = good_snapshot(SPECS[kind])
            for forgery in sampled.sample(forgeries(snapshot), count):
                yield f"{kind}: {forgery}", forgery.change(snapshot).to_bytes()
            yield f"{kind}, as it was", snapshot.to_bytes()

    taken = import_all(wire, forged())
    assert len(_SHORT) <= len(taken) < sum(_SHORT.values())
    everyone = {"bystander", *taken}
    assert_served(own_server, wire, everyone)
    for learner_id in taken:
        use(wire, learner_id)
    assert_served(own_server, wire, everyone)
    assert engine_pid(own_server) == pid

    rows = {f"row-{number}": forgery for number, forgery in enumerate(_ROWS)}
    for learner_id in rows:
        wire.create(learner_id)
        wire.learners.CreateCheckpoint(
            learner_service_pb2.CreateCheckpointRequest(parent=f"learners/{learner_id}"), timeout=60
        )
    assert own_server.stop() == 0
    forge_rows(own_server, rows)
    own_server.start()
    wire = connect(own_server.grpc_target)
    unreadable = {learner_id for learner_id, (table, column, _) in rows.items() if column != "summary"}
    assert_served(own_server, wire, everyone | (set(rows) - unreadable), unreadable)
    for learner_id in taken:
        spec = LearnerSnapshot.from_bytes(exported_by(wire, learner_id)).read_spec()
        wire.predict(learner_id, batch_of(spec, 2).features)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_ten_thousand_forged_imports(own_server: ServerProcess, connect: Callable[[str], Wire]) -> None:
    wire, pid = connect(own_server.grpc_target), engine_pid(own_server)
    wire.create("bystander")
    sampled = random.Random(10_000)
    snapshots = {kind: good_snapshot(plain) for kind, plain in SPECS.items()}
    everything = {kind: forgeries(snapshot) for kind, snapshot in snapshots.items()}
    for _ in range(100):
        chosen = [(kind, sampled.choice(everything[kind])) for kind in sampled.choices(list(SPECS), k=100)]
        taken = import_all(
            wire, ((f"{kind}: {forgery}", forgery.change(snapshots[kind]).to_bytes()) for kind, forgery in chosen)
        )
        assert_served(own_server, wire, {"bystander", *taken})
        for learner_id in taken:
            use(wire, learner_id)
        assert_served(own_server, wire, {"bystander", *taken})
        assert engine_pid(own_server) == pid
        for learner_id in taken:
            wire.delete(learner_id)
            wire.learners.PurgeLearner(learner_service_pb2.PurgeLearnerRequest(name=f"learners/{learner_id}"))
    assert own_server.stop() == 0
