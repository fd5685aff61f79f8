"""Durability, deletion, checkpoints, restoring, copies and files: what goes over the wire and what comes back."""

import asyncio
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from cbp_client import (
    AlreadyExists,
    AsyncClient,
    AsyncLearner,
    Checkpoint,
    Client,
    FailedPrecondition,
    InvalidArgument,
    Quarantine,
    Unavailable,
)
from cbp_client.convert import learner_info
from cbp_proto.v1 import learner_pb2
from tests.client.scripted_server import ScriptedServer, error

NETWORK = {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3}
TEN = datetime(2026, 11, 22, 10, tzinfo=UTC)
UNAVAILABLE = error(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")


@pytest.fixture
async def client(scripted: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(scripted.target) as client:
        yield client


@pytest.fixture
async def learner(client: AsyncClient) -> AsyncLearner:
    return await client.get_learner("clicks")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_learner_tells_of_its_life() -> None:
    message = learner_pb2.Learner(
        name="learners/clicks",
        state=learner_pb2.Learner.STATE_QUARANTINED,
        durability=learner_pb2.DURABILITY_OS,
        journal_position=17,
        quarantine=learner_pb2.Quarantine(journal_position=15, producer="web", sequence=3, reason="the loss is inf"),
    )
    message.quarantine.quarantine_time.FromJsonString("2026-11-22T10:00:00Z")
    info = learner_info(message)

    assert (info.state, info.durability, info.journal_position) == ("quarantined", "os", 17)
    assert info.quarantine == Quarantine(15, "web", 3, "the loss is inf", TEN)
    assert (info.delete_time, info.purge_time) == (None, None)
    message.ClearField("quarantine")
    message.delete_time.FromJsonString("2026-11-22T10:00:00Z")
    assert learner_info(message).quarantine is None
    assert learner_info(message).delete_time == TEN


@pytest.mark.parametrize("state", learner_pb2.Learner.State.values()[1:])
def test_every_state_has_its_word(state: learner_pb2.Learner.State.ValueType) -> None:
    name = learner_pb2.Learner.State.Name(state)
    assert learner_info(learner_pb2.Learner(state=state)).state == name.removeprefix("STATE_").lower()


@pytest.mark.parametrize("durability", ["fsync", "os", "none"])
async def test_durability_is_chosen_at_creation(scripted: ScriptedServer, client: AsyncClient, durability: Any) -> None:
    await client.create_learner("clicks", network=NETWORK, durability=durability)

    name = learner_pb2.Durability.Name(scripted.requests[0].learner.durability)
    assert name == f"DURABILITY_{durability.upper()}"


async def test_a_durability_that_there_is_not_is_refused(scripted: ScriptedServer, client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument, match="durability: must be one of fsync, os, none, not 'disk'"):
        await client.create_learner("clicks", network=NETWORK, durability="disk")  # type: ignore[arg-type]
    assert scripted.requests == []


async def test_durability_is_updated_alone_or_with_the_spec(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    await learner.update(durability="os")
    assert list(scripted.requests[-1].update_mask.paths) == ["durability"]
    info = await learner.update(optimizer={"lr": 0.1}, durability="fsync")
    assert list(scripted.requests[-1].update_mask.paths) == ["spec.optimizer.lr", "durability"]
    assert info.durability == "fsync"


async def test_deleting_tells_until_when_it_can_be_undone(
    scripted: ScriptedServer, client: AsyncClient, learner: AsyncLearner
) -> None:
    for info in (await learner.delete(), await client.delete_learner("clicks")):
        assert (info.state, info.delete_time) == ("deleted", TEN)
        assert info.purge_time is not None
    assert learner.info.state == "deleted"

    assert (await client.undelete_learner("clicks")).id == "clicks"
    assert scripted.requests[-1].uid == ""
    assert (await client.undelete_learner("clicks", uid="uid-7")).info.uid == "uid-7"
    await client.purge_learner("clicks", uid="uid-7")
    assert (scripted.requests[-1].name, scripted.requests[-1].uid) == ("learners/clicks", "uid-7")


async def test_deleted_learners_are_listed_if_asked_for(scripted: ScriptedServer, client: AsyncClient) -> None:
    assert len([learner async for learner in client.list_learners()]) == 6
    assert not any(request.show_deleted for request in scripted.requests)
    scripted.requests.clear()
    assert len([learner async for learner in client.list_learners(show_deleted=True)]) == 6
    assert all(request.show_deleted for request in scripted.requests)


async def test_a_fork_is_repeated_under_one_request_id(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    scripted.requests.clear()
    scripted.unary_errors = [UNAVAILABLE]
    fork = await learner.fork("copy", durability="none")

    assert (fork.id, fork.info.durability) == ("copy", "none")
    assert learner.id == "clicks"
    first, second = scripted.requests
    assert first == second
    assert first.request_id
    assert (first.name, first.learner_id) == ("learners/clicks", "copy")


async def test_checkpoints(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    made = await learner.checkpoint()
    assert made == Checkpoint(12, 120, 1200, 2400, 1000, TEN, pinned=True)

    listed = await learner.checkpoints()
    assert [checkpoint.number for checkpoint in listed] == [4, 3, 2, 1]
    assert (len(listed), listed[0].number, listed[-1].number) == (4, 4, 1)
    assert (listed.first_restorable_position, listed.last_restorable_position) == (10, 99)

    await learner.delete_checkpoint(3)
    assert scripted.requests[-1].name == "learners/clicks/checkpoints/3"


async def test_forgetting_a_producer(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    await learner.forget_producer("web/7d9f 3")
    assert scripted.requests[-1].name == "learners/clicks/producers/web/7d9f 3"


async def test_restoring(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    info = await learner.restore(checkpoint=3)
    assert scripted.requests[-1].checkpoint == "learners/clicks/checkpoints/3"
    assert scripted.requests[-1].etag == ""
    assert info.journal_position == learner.info.journal_position == 100

    await learner.restore(position=0)
    assert scripted.requests[-1].WhichOneof("target") == "journal_position"

    made = len(scripted.requests)
    for neither_or_both in ({}, {"checkpoint": 1, "position": 2}):
        with pytest.raises(InvalidArgument, match="either the number of a checkpoint or a position"):
            await learner.restore(**neither_or_both)
    assert len(scripted.requests) == made


async def test_a_conditional_restore_sends_the_etag(scripted: ScriptedServer, client: AsyncClient) -> None:
    learner = await client.create_learner("clicks", network=NETWORK)
    learner._info = learner_info(learner_pb2.Learner(name="learners/clicks", etag="abc"))
    await learner.restore(checkpoint=1, if_unchanged=True)

    assert scripted.requests[-1].etag == "abc"


async def test_resuming(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    await learner.resume()
    assert not scripted.requests[-1].HasField("lr")
    assert not scripted.requests[-1].skip_batch
    await learner.resume(lr=0.001, skip_batch=True)
    assert scripted.requests[-1].lr == 0.001
    assert scripted.requests[-1].skip_batch


@pytest.mark.parametrize(
    ("layers", "sent"), [("all", ["all"]), (0, ["0"]), ([0, "hidden_1"], ["0", "hidden_1"]), ((), [])]
)
async def test_resetting_units(scripted: ScriptedServer, learner: AsyncLearner, layers: Any, sent: list[str]) -> None:
    assert await learner.reset_units(layers, 0.25) == {"hidden_0": 4, "hidden_1": 0}
    assert list(scripted.requests[-1].layers) == sent
    assert scripted.requests[-1].fraction == 0.25


@pytest.mark.parametrize(
    "call",
    [
        lambda learner: learner.delete(),
        lambda learner: learner.checkpoint(),
        lambda learner: learner.delete_checkpoint(1),
        lambda learner: learner.restore(checkpoint=1),
        lambda learner: learner.resume(),
        lambda learner: learner.reset_units("all", 0.1),
    ],
)
async def test_what_is_not_safe_to_repeat_is_not_repeated(
    scripted: ScriptedServer, learner: AsyncLearner, call: Any
) -> None:
    made = len(scripted.requests)
    scripted.unary_errors = [UNAVAILABLE]
    with pytest.raises(Unavailable):
        await call(learner)

    assert len(scripted.requests) == made + 1


@pytest.mark.parametrize(
    ("format", "sent"),
    [("safetensors", "FORMAT_SAFETENSORS"), ("onnx", "FORMAT_ONNX"), ("torch_export", "FORMAT_TORCH_EXPORT")],
)
async def test_exporting_to_a_path(
    scripted: ScriptedServer, learner: AsyncLearner, tmp_path: Path, format: Any, sent: str
) -> None:
    target = tmp_path / "clicks"
    target.write_bytes(b"the export before")
    assert await learner.export(target, format=format) == 11

    assert target.read_bytes() == b"firstsecond"
    assert names(tmp_path) == [target.name]
    request = scripted.requests[-1]
    assert type(request).Format.Name(request.format) == sent


async def test_an_export_that_is_cut_off_begins_anew(
    scripted: ScriptedServer, learner: AsyncLearner, tmp_path: Path
) -> None:
    scripted.unary_errors = [UNAVAILABLE]
    assert await learner.export(str(tmp_path / "clicks.safetensors")) == 11
    assert (tmp_path / "clicks.safetensors").read_bytes() == b"firstsecond"


async def test_an_export_that_fails_leaves_what_was_there(
    scripted: ScriptedServer, learner: AsyncLearner, tmp_path: Path
) -> None:
    target = tmp_path / "clicks.safetensors"
    target.write_bytes(b"the export before")
    scripted.unary_errors = [error(grpc.StatusCode.FAILED_PRECONDITION, "EXPORT_UNSUPPORTED")]
    with pytest.raises(FailedPrecondition):
        await learner.export(target)
    scripted.answering.clear()
    with pytest.raises(Exception, match="Deadline"):
        await learner.export(target, timeout=0.2)

    assert target.read_bytes() == b"the export before"
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize(
    ("name", "sent"),
    [("a.safetensors", "FORMAT_SAFETENSORS"), ("a.ONNX", "FORMAT_ONNX"), ("a.b.pt2", "FORMAT_TORCH_EXPORT")],
)
async def test_the_format_is_what_the_name_says(
    scripted: ScriptedServer, learner: AsyncLearner, tmp_path: Path, name: str, sent: str
) -> None:
    await learner.export(tmp_path / name)
    with (tmp_path / name).open("wb") as file:
        await learner.export(file)

    assert [type(request).Format.Name(request.format) for request in scripted.requests[-2:]] == [sent, sent]


@pytest.mark.parametrize("name", ["clicks", "clicks.bin"])
async def test_a_name_that_says_no_format_is_refused(learner: AsyncLearner, tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"^format: must be given, or the file's name end in \.safetensors, \.onnx"
    ):
        await learner.export(tmp_path / name)
    assert names(tmp_path) == []


async def test_exporting_to_an_open_file(scripted: ScriptedServer, learner: AsyncLearner) -> None:
    file = io.BytesIO()
    assert await learner.export(file) == 11
    assert file.getvalue() == b"firstsecond"
    scripted.unary_errors = [UNAVAILABLE]
    with pytest.raises(Unavailable):  # what is written cannot be taken back, so it is not tried again
        await learner.export(file)

    with pytest.raises(InvalidArgument, match="format: must be one of safetensors, onnx, torch_export, not 'pickle'"):
        await learner.export(file, format="pickle")  # type: ignore[arg-type]


async def test_importing(scripted: ScriptedServer, client: AsyncClient, tmp_path: Path) -> None:
    source = tmp_path / "clicks.safetensors"
    content = bytes(range(256)) * 4000  # several parts
    source.write_bytes(content)
    scripted.unary_errors = [UNAVAILABLE]
    learner = await client.import_learner("copy", source, durability="os")

    assert (learner.id, learner.info.durability) == ("copy", "os")
    assert scripted.imported == content
    first, second = scripted.requests
    assert first == second
    assert first.request_id

    with source.open("rb") as file:
        await client.import_learner("copy", file)
    assert scripted.imported == content
    assert scripted.requests[-1].request_id != first.request_id


async def test_an_import_that_is_refused_says_why(
    scripted: ScriptedServer, client: AsyncClient, tmp_path: Path
) -> None:
    source = tmp_path / "clicks.safetensors"
    source.write_bytes(bytes(8_000_000))
    for _ in range(20):  # whether or not a part is on its way when the server answers
        scripted.unary_errors = [error(grpc.StatusCode.ALREADY_EXISTS, "LEARNER_EXISTS")] * 4
        with pytest.raises(AlreadyExists):
            await client.import_learner("copy", source)
    with pytest.raises(FileNotFoundError):
        await client.import_learner("copy", tmp_path / "missing")


async def test_the_synchronous_client_does_all_this_too(scripted: ScriptedServer, tmp_path: Path) -> None:
    def live() -> list[Any]:
        with Client(scripted.target) as client:
            learner = client.create_learner("clicks", network=NETWORK, durability="os")
            learner.update(durability="fsync")
            made = [learner.checkpoint().number, len(learner.checkpoints()), learner.fork("copy").id]
            learner.delete_checkpoint(12)
            learner.restore(checkpoint=1)
            learner.resume(lr=0.1)
            learner.reset_units("all", 0.5)
            learner.export(tmp_path / "clicks.safetensors")
            made += [client.import_learner("twin", tmp_path / "clicks.safetensors").id, learner.delete().state]
            made += [client.delete_learner("clicks").state, client.undelete_learner("clicks").id]
            client.purge_learner("clicks")
            return [*made, len(list(client.list_learners(show_deleted=True)))]

    assert await asyncio.to_thread(live) == [12, 4, "copy", "twin", "deleted", "deleted", "clicks", 6]
