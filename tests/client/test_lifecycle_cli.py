"""`cbp learners` where it saves, copies, restores and removes: against the scripted server."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from cbp_proto import from_plain
from cbp_proto.v1 import learner_pb2, spec_pb2
from tests.client.command import Result, command
from tests.client.scripted_server import ScriptedServer, error

SPEC: dict[str, Any] = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3, "activation": "relu"},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.01},
    "batch_size": 1,
    "resets": {"layers": "first"},
}
Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def cbp(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `cbp learners` with these arguments."""
    scripted.learner.spec.CopyFrom(from_plain(SPEC, spec_pb2.LearnerSpec))
    run = command(scripted.target, monkeypatch, capfd)

    async def run_beside_the_server(*arguments: str, answer: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        return await asyncio.to_thread(run, "learners", *arguments)

    return run_beside_the_server


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fork", "clicks", "copy", "--durability", "os"), "copied learner clicks to copy, at step 0"),
        (("checkpoint", "clicks"), "checkpoint 12 of learner clicks: journal position 120, step 1200, 1000 bytes"),
        (("delete-checkpoint", "clicks", "3", "--yes"), "deleted checkpoint 3 of learner clicks"),
        (("forget-producer", "clicks", "web-1", "--yes"), "forgot producer web-1 of learner clicks"),
        (("restore", "clicks", "--checkpoint", "3", "--yes"), "restored learner clicks to checkpoint 3: step 0"),
        (("restore", "clicks", "--position", "0", "-y"), "restored learner clicks to journal position 0: step 0"),
        (("resume", "clicks", "--lr", "0.001", "--skip-batch"), "resumed learner clicks"),
        (("reset", "clicks", "--fraction", "0.5"), "reset units of learner clicks: hidden_0 4, hidden_1 0"),
        (("undelete", "clicks", "--uid", "uid-7"), "learner clicks is back, at step 0"),
        (("purge", "clicks", "--yes"), "purged every deleted learner clicks"),
        (("purge", "clicks", "--uid", "u", "--yes"), "purged the deleted learner clicks with uid u"),
        (("update", "clicks", "--durability", "os"), "updated learner clicks"),
    ],
)
async def test_what_was_done_is_said(cbp: Run, arguments: tuple[str, ...], said: str) -> None:
    done = await cbp(*arguments)

    assert (done.status, done.out, done.err) == (0, "", f"{said}\n")


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (("fork", "clicks", "copy"), "id", "copy"),
        (("checkpoint", "clicks"), "number", 12),
        (("checkpoints", "clicks"), "first_restorable_position", 10),
        (("restore", "clicks", "--checkpoint", "3", "--yes"), "journal_position", 100),
        (("resume", "clicks"), "id", "clicks"),
        (("reset", "clicks", "--fraction", "0.5"), "hidden_0", 4),
        (("delete", "clicks", "--yes"), "purge_time", "2026-11-29T10:00:00+00:00"),
        (("undelete", "clicks"), "id", "clicks"),
    ],
)
async def test_records_are_printed_as_json(cbp: Run, arguments: tuple[str, ...], key: str, value: Any) -> None:
    done = await cbp(*arguments, "--json")

    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out)[key] == value


async def test_what_is_asked_for_is_sent(scripted: ScriptedServer, cbp: Run) -> None:
    await cbp("reset", "clicks", "--fraction", "0.5", "--layers", "0,hidden_2")
    assert list(scripted.requests[-1].layers) == ["0", "hidden_2"]
    await cbp("resume", "clicks", "--lr", "0.001", "--skip-batch")
    assert (scripted.requests[-1].lr, scripted.requests[-1].skip_batch) == (0.001, True)
    await cbp("undelete", "clicks", "--uid", "uid-7")
    assert scripted.requests[-1].uid == "uid-7"


async def test_checkpoints_are_listed(cbp: Run) -> None:
    listed = await cbp("checkpoints", "clicks")

    assert listed.status == 0
    assert [line.split()[:5] for line in listed.out.splitlines()[1:5]] == [
        [str(number), str(10 * number), str(100 * number), str(200 * number), "1000"] for number in (4, 3, 2, 1)
    ]
    assert "Restorable besides: journal positions 10 to 99" in listed.out


async def test_deleting_says_how_to_undo_it(cbp: Run) -> None:
    deleted = await cbp("delete", "clicks", "--yes")

    assert deleted.err.startswith("deleted learner clicks; until 2026-11-")
    assert deleted.err.endswith(" cbp learners undelete clicks brings it back\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("restore", "clicks", "--checkpoint", "3"),
        ("purge", "clicks"),
        ("delete", "clicks"),
        ("delete-checkpoint", "clicks", "3"),
        ("forget-producer", "clicks", "web-1"),
    ],
)
@pytest.mark.parametrize("answer", ["n\n", ""])
async def test_what_cannot_be_undone_is_asked_for(
    scripted: ScriptedServer, cbp: Run, arguments: tuple[str, ...], answer: str
) -> None:
    refused = await cbp(*arguments, answer=answer)
    assert (refused.status, refused.out) == (1, "")
    assert "cbp: nothing was done; answer y, or give --yes" in refused.err
    assert scripted.requests == []

    assert (await cbp(*arguments, answer="y\n")).status == 0
    assert scripted.requests != []


async def test_deleted_learners_are_listed_with_what_undeleting_needs(scripted: ScriptedServer, cbp: Run) -> None:
    scripted.learner.uid = "uid-7"
    scripted.learner.state = learner_pb2.Learner.STATE_DELETED
    scripted.learner.purge_time.CopyFrom(Timestamp(seconds=1_795_946_400))
    line = (await cbp("list", "--deleted")).out.splitlines()[1]

    assert line.split()[:2] == ["l0", "deleted"]
    assert line.endswith("uid-7")
    assert "2026-11-" in line
    assert "uid-7" not in (await cbp("list")).out


async def test_showing_a_quarantined_learner_names_the_batch_and_the_way_on(scripted: ScriptedServer, cbp: Run) -> None:
    scripted.learner.state = learner_pb2.Learner.STATE_QUARANTINED
    scripted.learner.durability = learner_pb2.DURABILITY_OS
    scripted.learner.journal_position = 17
    scripted.learner.engine = "compiled"
    scripted.learner.quarantine.CopyFrom(
        learner_pb2.Quarantine(journal_position=15, producer="web", sequence=3, reason="the loss is inf")
    )
    shown = (await cbp("show", "clicks")).out

    assert "clicks (quarantined)" in shown
    assert "batch 3 of web, journal position 15: the loss is inf; go on with cbp learners resume clicks" in shown
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.split())
    assert facts["durability"].strip() == "os"
    assert facts["journal"].strip() == "position 17"
    assert facts["engine"].strip() == "compiled"
    assert json.loads((await cbp("show", "clicks", "--json")).out)["learner"]["quarantine"]["sequence"] == 3


@pytest.mark.parametrize(
    ("name", "flags", "sent"),
    [
        ("a.safetensors", (), "FORMAT_SAFETENSORS"),
        ("a.onnx", (), "FORMAT_ONNX"),
        ("a.pt2", (), "FORMAT_TORCH_EXPORT"),
        ("a", ("--format", "onnx"), "FORMAT_ONNX"),
    ],
)
async def test_export_and_import(
    scripted: ScriptedServer, cbp: Run, tmp_path: Path, name: str, flags: tuple[str, ...], sent: str
) -> None:
    file = tmp_path / name
    exported = await cbp("export", "clicks", str(file), *flags)
    assert (exported.status, exported.out) == (0, "")
    assert exported.err.endswith(", 11 bytes\n")
    request = scripted.requests[-1]
    assert type(request).Format.Name(request.format) == sent

    imported = await cbp("import", "copy", str(file), "--durability", "none")
    assert imported.err == f"created learner copy from {file}, at step 0\n"
    assert scripted.imported == b"firstsecond"
    assert json.loads((await cbp("import", "copy", str(file), "--json")).out)["id"] == "copy"


@pytest.mark.parametrize(
    ("reason", "arguments", "fix"),
    [
        ("CHECKPOINT_NOT_FOUND", ("delete-checkpoint", "clicks", "9", "-y"), "see cbp learners checkpoints clicks"),
        ("PRODUCER_NOT_FOUND", ("forget-producer", "clicks", "web", "-y"), "see cbp learners show clicks"),
        ("POSITION_NOT_HELD", ("restore", "clicks", "--position", "9", "-y"), "see cbp learners checkpoints clicks"),
        ("LEARNER_NOT_DELETED", ("purge", "clicks", "-y"), "first: cbp learners delete clicks"),
        ("LEARNER_QUARANTINED", ("reset", "clicks", "--fraction", "1"), "go on with cbp learners resume clicks"),
    ],
)
async def test_an_error_names_the_command_that_puts_it_right(
    scripted: ScriptedServer, cbp: Run, reason: str, arguments: tuple[str, ...], fix: str
) -> None:
    failure = error(grpc.StatusCode.FAILED_PRECONDITION, reason, metadata={"learner": "clicks"}, message="it is so")
    scripted.unary_errors = [failure]
    failed = await cbp(*arguments)

    assert failed.status == 1
    assert failed.err.startswith(f"cbp: it is so; {fix}")
    assert failed.err.count("\n") == 1


async def test_files_that_cannot_be_used_are_named(cbp: Run, tmp_path: Path) -> None:
    for arguments in (("export", "clicks", str(tmp_path / "none" / "a.onnx")), ("import", "a", str(tmp_path / "none"))):
        failed = await cbp(*arguments)
        assert failed.err == f"cbp: {arguments[2]}: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("restore", "clicks"),
        ("restore", "clicks", "--checkpoint", "1", "--position", "1"),
        ("reset", "clicks"),
        ("fork", "clicks"),
        ("export", "clicks", "file.txt"),
        ("export", "clicks", "file.onnx", "--format", "pickle"),
        ("import", "clicks", "file", "--durability", "disk"),
        ("update", "clicks", "--durability", "disk"),
    ],
)
async def test_wrong_usage_is_status_2(scripted: ScriptedServer, cbp: Run, arguments: tuple[str, ...]) -> None:
    assert (await cbp(*arguments)).status == 2
    assert scripted.requests == []
