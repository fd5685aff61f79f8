"""Checkpoints, restores, copies, files, deletion, quarantine over the wire, beside local learners."""

import uuid

import grpc
import numpy as np
import pytest
import torch

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec
from cbp_proto import decode_tensor, from_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2

PROBE = np.random.default_rng(99).normal(size=(5, 4)).astype(np.float32)
REGRESSION = {"loss": "mse", "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9}}


def local(small_spec, **changes):
    return Learner(LearnerSpec.parse(small_spec | changes), engine="compiled")


def same(wire, learner_id, expected):
    """Whether the learner on the server is the local one, to the last bit of its outputs."""
    np.testing.assert_array_equal(decode_tensor(wire.predict(learner_id, PROBE).outputs), expected.predict(PROBE))


def teach(stream, learners, sequence, batch):
    """One batch for the server's learner and each local one; returns when it is applied."""
    stream.send_batch(sequence, *batch)
    for learner in learners:
        learner.train(Batch.validate(learner.spec, *batch))
    return stream.results(1)[0]


def copy_of(learner):
    return Learner.restore(learner.snapshot(), engine="compiled")


def request(kind, **fields):
    return getattr(learner_service_pb2, f"{kind}Request")(**fields)


def name(learner_id):
    return f"learners/{learner_id}"


def export(wire, learner_id, file_format=0):
    parts = wire.learners.ExportLearner(request("ExportLearner", name=name(learner_id), format=file_format))
    return b"".join(part.data for part in parts)


def import_(wire, learner_id, data, **header):
    def messages():
        yield request("ImportLearner", header=learner_service_pb2.ImportHeader(learner_id=learner_id, **header))
        for start in range(0, len(data), 10_000):
            yield request("ImportLearner", data=data[start : start + 10_000])

    return wire.learners.ImportLearner(messages())


def restore(wire, learner_id, **target):
    return wire.learners.RestoreLearner(request("RestoreLearner", name=name(learner_id), **target))


# -- checkpoints and restores --


def test_a_restored_learner_is_the_one_of_the_checkpoint_and_its_producers_go_on(
    wire, learner_id, small_spec, examples, explain
):
    wire.create(learner_id)
    learner = local(small_spec)
    stream = wire.stream(learner_id)
    teach(stream, [learner], 1, examples(30, seed=1))
    checkpoint = wire.learners.CreateCheckpoint(request("CreateCheckpoint", parent=name(learner_id)))
    assert (checkpoint.journal_position, checkpoint.step, checkpoint.pinned) == (2, 30, True)
    then = copy_of(learner)
    teach(stream, [learner], 2, examples(30, seed=2))
    same(wire, learner_id, learner)

    restored = restore(wire, learner_id, checkpoint=checkpoint.name)

    same(wire, learner_id, then)
    assert restored.progress.step == 30
    assert restored.state == learner_pb2.Learner.STATE_ACTIVE
    assert restored.producers[0].applied_sequence == 2  # what was sent since is not to be sent again
    assert explain(stream.failure()).code == grpc.StatusCode.UNAVAILABLE
    again = wire.stream(learner_id)
    assert again.opened.next_sequence == 3
    teach(again, [then], 3, examples(30, seed=3))
    same(wire, learner_id, then)


def test_every_journal_position_that_is_held_can_be_restored(wire, learner_id, small_spec, examples, refused):
    wire.create(learner_id)
    learner = local(small_spec)
    stream = wire.stream(learner_id)
    states = {0: copy_of(learner), 1: copy_of(learner)}  # the stream's opening is position 1
    for sequence in range(1, 6):
        teach(stream, [learner], sequence, examples(7, seed=sequence))
        states[sequence + 1] = copy_of(learner)
    listed = wire.learners.ListCheckpoints(request("ListCheckpoints", parent=name(learner_id)))
    assert (listed.first_restorable_position, listed.last_restorable_position) == (0, 6)
    for position in (4, 6, 0, 2):
        restore(wire, learner_id, journal_position=position)
        same(wire, learner_id, states[position])
    stream = wire.stream(learner_id)
    teach(stream, [states[2]], 6, examples(7, seed=6))
    same(wire, learner_id, states[2])

    for position in (-1, 1000):
        error = refused(lambda position=position: restore(wire, learner_id, journal_position=position))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POSITION_NOT_HELD")
        assert error.metadata["first"] == "0"
    error = refused(lambda: restore(wire, learner_id, checkpoint=f"{name(learner_id)}/checkpoints/77"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
    assert "checkpoint" in refused(lambda: restore(wire, learner_id, checkpoint="learners/other/checkpoints/1")).fields
    assert "checkpoint" in refused(lambda: restore(wire, learner_id)).fields
    same(wire, learner_id, states[2])


def test_checkpoints_are_listed_in_pages_and_pinned_ones_deleted(wire, learner_id, examples, refused):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    for sequence in range(1, 4):
        stream.send_batch(sequence, *examples(5, seed=sequence))
        stream.results(1)
        wire.learners.CreateCheckpoint(request("CreateCheckpoint", parent=name(learner_id)))
    names, token = [], ""
    while True:
        page = wire.learners.ListCheckpoints(
            request("ListCheckpoints", parent=name(learner_id), page_size=2, page_token=token)
        )
        names += [checkpoint.name for checkpoint in page.checkpoints if checkpoint.pinned]
        if not (token := page.next_page_token):
            break
    assert len(names) == 3
    assert names == sorted(names, reverse=True)
    wire.learners.DeleteCheckpoint(request("DeleteCheckpoint", name=names[1]))
    left = wire.learners.ListCheckpoints(request("ListCheckpoints", parent=name(learner_id)))
    assert names[1] not in [checkpoint.name for checkpoint in left.checkpoints]
    error = refused(lambda: wire.learners.DeleteCheckpoint(request("DeleteCheckpoint", name=names[1])))
    assert error.reason == "CHECKPOINT_NOT_FOUND"
    assert "name" in refused(lambda: wire.learners.DeleteCheckpoint(request("DeleteCheckpoint", name="x"))).fields


# -- copies and files --


def test_a_fork_is_the_same_learner_with_a_life_of_its_own(wire, learner_id, small_spec, examples, refused):
    wire.create(learner_id)
    learner = local(small_spec)
    stream = wire.stream(learner_id)
    teach(stream, [learner], 1, examples(33, seed=1))
    request_id = str(uuid.uuid4())
    fork = request("ForkLearner", name=name(learner_id), learner_id=learner_id + "-b", request_id=request_id)
    made = wire.learners.ForkLearner(fork)
    assert wire.learners.ForkLearner(fork).uid == made.uid  # the same request
    assert made.progress.step == 33
    assert not made.producers

    other = copy_of(learner)
    teach(stream, [learner], 2, examples(20, seed=2))
    teach(wire.stream(learner_id + "-b"), [other], 1, examples(20, seed=3))
    same(wire, learner_id, learner)
    same(wire, learner_id + "-b", other)
    taken = refused(
        lambda: wire.learners.ForkLearner(request("ForkLearner", name=name(learner_id), learner_id=learner_id))
    )
    assert taken.reason == "LEARNER_EXISTS"


def test_an_exported_learner_can_be_imported_and_goes_on_bit_for_bit(wire, learner_id, small_spec, examples, refused):
    wire.create(learner_id)
    learner = local(small_spec)
    teach(wire.stream(learner_id), [learner], 1, examples(33, seed=1))
    data = export(wire, learner_id)
    assert LearnerSnapshot.from_bytes(data).metadata["step"] == 33

    made = import_(wire, learner_id + "-b", data, durability=learner_pb2.DURABILITY_OS)
    assert made.durability == learner_pb2.DURABILITY_OS
    assert made.progress.step == 33
    teach(wire.stream(learner_id + "-b"), [learner], 1, examples(20, seed=2))
    same(wire, learner_id + "-b", learner)

    for wrong in (b"", b"nonsense", data[:-10], bytes([*data[:200], data[200] ^ 1, *data[201:]])):
        error = refused(lambda wrong=wrong: import_(wire, learner_id + "-c", wrong))
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "data" in error.fields
    assert refused(lambda: wire.get(learner_id + "-c")).reason == "LEARNER_NOT_FOUND"


def test_an_import_keeps_to_the_servers_limits(start_server, connect, small_spec, refused):
    wire = connect(start_server("--max-parameters", "50").grpc_target)
    data = local(small_spec).snapshot().to_bytes()
    error = refused(lambda: import_(wire, "clicks", data))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC")


def test_a_network_that_a_format_cannot_hold_is_refused_with_the_formats_that_can(wire, learner_id, refused):
    network = {"kind": "convnet", "in_channels": 1, "height": 4, "width": 4, "channels": [2], "out_features": 3}
    wire.create(learner_id, network=network)
    error = refused(lambda: export(wire, learner_id, learner_service_pb2.ExportLearnerRequest.FORMAT_ONNX))
    assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FORMAT_UNSUPPORTED")
    assert "not for this convnet" in error.message
    assert "safetensors" in error.message


def test_a_format_that_is_none_is_refused(wire, learner_id, refused):
    wire.create(learner_id)
    error = refused(lambda: export(wire, learner_id, 99))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, {"format": "is no Format: 99"})


def test_the_network_can_be_used_elsewhere(wire, learner_id, small_spec, examples, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    wire.create(learner_id)
    learner = local(small_spec)
    teach(wire.stream(learner_id), [learner], 1, examples(33, seed=1))
    formats = learner_service_pb2.ExportLearnerRequest

    session = onnxruntime.InferenceSession(export(wire, learner_id, formats.FORMAT_ONNX))
    np.testing.assert_allclose(session.run(["outputs"], {"features": PROBE})[0], learner.predict(PROBE), rtol=1e-5)

    path = tmp_path / "network.pt2"
    path.write_bytes(export(wire, learner_id, formats.FORMAT_TORCH_EXPORT))
    outputs = torch.export.load(path).module()(torch.from_numpy(PROBE)).detach().numpy()
    np.testing.assert_allclose(outputs, learner.predict(PROBE), rtol=1e-5)


# -- deletion --


def test_a_deleted_learner_frees_its_name_and_can_come_back(wire, learner_id, small_spec, examples, refused):
    wire.create(learner_id)
    learner = local(small_spec)
    teach(wire.stream(learner_id), [learner], 1, examples(33, seed=1))
    deleted = wire.learners.DeleteLearner(request("DeleteLearner", name=name(learner_id)))
    assert deleted.state == learner_pb2.Learner.STATE_DELETED
    assert deleted.purge_time.seconds - deleted.delete_time.seconds == 7 * 86_400
    assert refused(lambda: wire.get(learner_id)).reason == "LEARNER_NOT_FOUND"
    assert refused(lambda: wire.predict(learner_id, PROBE)).reason == "LEARNER_NOT_FOUND"

    def listed(**fields):
        learners = wire.learners.ListLearners(request("ListLearners", page_size=1000, **fields)).learners
        return [item.uid for item in learners if item.name == name(learner_id)]

    assert listed() == []
    assert listed(show_deleted=True) == [deleted.uid]
    second = wire.create(learner_id)
    undelete = request("UndeleteLearner", name=name(learner_id))
    assert refused(lambda: wire.learners.UndeleteLearner(undelete)).reason == "LEARNER_EXISTS"
    wire.delete(learner_id)
    assert set(listed(show_deleted=True)) == {deleted.uid, second.uid}

    back = wire.learners.UndeleteLearner(request("UndeleteLearner", name=name(learner_id), uid=deleted.uid))
    assert back.uid == deleted.uid
    assert not back.HasField("delete_time")
    same(wire, learner_id, learner)
    stream = wire.stream(learner_id)
    assert stream.opened.next_sequence == 2
    teach(stream, [learner], 2, examples(33, seed=2))
    same(wire, learner_id, learner)
    not_deleted = refused(
        lambda: wire.learners.PurgeLearner(request("PurgeLearner", name=name(learner_id), uid=back.uid))
    )
    assert (not_deleted.code, not_deleted.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_NOT_DELETED")
    wire.learners.PurgeLearner(request("PurgeLearner", name=name(learner_id), uid=second.uid))
    assert listed(show_deleted=True) == [back.uid]


def test_a_purged_learner_leaves_nothing_behind(own_server, connect, examples, refused):
    wire = connect(own_server.grpc_target)
    uid = wire.create("clicks").uid
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(10))
    stream.results(1)
    wire.learners.CreateCheckpoint(request("CreateCheckpoint", parent="learners/clicks"))
    files = own_server.data_dir / "checkpoints" / uid
    assert list(files.iterdir())
    wire.delete("clicks")
    assert list(files.iterdir())
    wire.learners.PurgeLearner(request("PurgeLearner", name="learners/clicks"))
    assert not files.exists()
    undelete = request("UndeleteLearner", name="learners/clicks")
    assert refused(lambda: wire.learners.UndeleteLearner(undelete)).reason == "LEARNER_NOT_FOUND"


# -- manual resets and durability --


def test_units_are_reset_by_hand_and_the_reset_is_replayed(own_server, connect, small_spec, examples, refused):
    wire = connect(own_server.grpc_target)
    wire.create("clicks")
    learner = local(small_spec)
    teach(wire.stream("clicks"), [learner], 1, examples(33, seed=1))
    counts = wire.learners.ResetUnits(request("ResetUnits", name="learners/clicks", layers=["first"], fraction=0.5))
    assert dict(counts.replacements) == {"hidden_0": 4}
    learner.reset_units([0], 0.5)
    same(wire, "clicks", learner)
    for wrong in ({"layers": ["hidden_9"], "fraction": 0.5}, {"layers": [], "fraction": 0.5}):
        error = refused(
            lambda wrong=wrong: wire.learners.ResetUnits(request("ResetUnits", name="learners/clicks", **wrong))
        )
        assert "layers" in error.fields
    error = refused(
        lambda: wire.learners.ResetUnits(request("ResetUnits", name="learners/clicks", layers=["all"], fraction=1.5))
    )
    assert "fraction" in error.fields

    own_server.kill()
    own_server.start()
    same(connect(own_server.grpc_target), "clicks", learner)


def test_durability_is_chosen_at_creation_and_changed_between_fsync_and_os(wire, learner_id, small_spec, refused):
    def create(suffix, durability):
        learner = learner_pb2.Learner(spec=from_plain(small_spec, spec_pb2.LearnerSpec), durability=durability)
        return wire.learners.CreateLearner(request("CreateLearner", learner_id=learner_id + suffix, learner=learner))

    def update(suffix, durability):
        learner = learner_pb2.Learner(name=name(learner_id + suffix), durability=durability)
        return wire.learners.UpdateLearner(
            request("UpdateLearner", learner=learner, update_mask={"paths": ["durability"]})
        )

    assert wire.create(learner_id).durability == learner_pb2.DURABILITY_FSYNC
    assert update("", learner_pb2.DURABILITY_OS).durability == learner_pb2.DURABILITY_OS
    assert wire.get(learner_id).durability == learner_pb2.DURABILITY_OS
    error = refused(lambda: update("", learner_pb2.DURABILITY_NONE))
    assert (error.code, list(error.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["durability"])
    assert create("-n", learner_pb2.DURABILITY_NONE).durability == learner_pb2.DURABILITY_NONE
    assert refused(lambda: update("-n", learner_pb2.DURABILITY_FSYNC)).code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ({"kind": "sgd", "lr": 0.05, "momentum": 0.5}, {"lr": 0.01, "nesterov": True}),
        ({"kind": "rmsprop", "lr": 0.01}, {"lr": 0.002, "alpha": 0.5, "momentum": 0.5}),
    ],
)
def test_an_optimizers_settings_are_live(wire, learner_id, small_spec, examples, optimizer, changes):
    wire.create(learner_id, optimizer=optimizer)
    expected, unchanged = local(small_spec, optimizer=optimizer), local(small_spec, optimizer=optimizer)
    stream = wire.stream(learner_id)
    teach(stream, [expected, unchanged], 1, examples(30))
    learner = learner_pb2.Learner(name=name(learner_id), spec=from_plain({"optimizer": changes}, spec_pb2.LearnerSpec))
    paths = [f"spec.optimizer.{field}" for field in changes]
    wire.learners.UpdateLearner(request("UpdateLearner", learner=learner, update_mask={"paths": paths}))
    expected.update(LearnerSpec.parse(small_spec | {"optimizer": optimizer | changes}))
    teach(stream, [expected, unchanged], 2, examples(30))
    same(wire, learner_id, expected)
    assert not np.allclose(expected.predict(PROBE), unchanged.predict(PROBE), atol=1e-3)


# -- quarantine --


def diverging():
    """Targets so large that a learning rate of 0.05 is too much."""
    features = np.random.default_rng(5).normal(size=(10, 4)).astype(np.float32)
    return features, np.full((10, 3), 1e15, np.float32)


def harmless(seed):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(10, 4)).astype(np.float32)
    return features, np.tanh(features[:, :3])


def quarantined(wire, learner_id, explain, small_spec, behind):
    """A learner quarantined at its second batch, with `behind` in the journal behind it; and the good state."""
    wire.create(learner_id, **REGRESSION)
    learner = local(small_spec, **REGRESSION)
    stream = wire.stream(learner_id, "web")
    teach(stream, [learner], 1, harmless(1))
    stream.send_batch(2, *diverging())
    for sequence, batch in enumerate(behind, start=3):
        stream.send_batch(sequence, *batch)
    assert explain(stream.failure()).code == grpc.StatusCode.UNAVAILABLE  # while it is rolled back
    return learner


def refusal(wire, learner_id, refused):
    """What a stream is refused with, once the learner has been rolled back."""
    while (error := refused(lambda: wire.stream(learner_id, "web"))).code == grpc.StatusCode.UNAVAILABLE:
        pass
    return error


def test_a_diverging_batch_is_rolled_back_and_the_learner_quarantined(wire, learner_id, small_spec, explain, refused):
    learner = quarantined(wire, learner_id, explain, small_spec, [])
    error = refusal(wire, learner_id, refused)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEARNER_QUARANTINED")
    assert (error.metadata["producer"], error.metadata["sequence"]) == ("web", "2")
    shown = wire.get(learner_id)
    assert shown.state == learner_pb2.Learner.STATE_QUARANTINED
    assert (shown.quarantine.producer, shown.quarantine.sequence, shown.quarantine.journal_position) == ("web", 2, 3)
    assert "finite" in shown.quarantine.reason
    assert shown.progress.step == 10
    same(wire, learner_id, learner)  # predictions from the last good state
    assert (
        refused(
            lambda: wire.learners.ResetUnits(request("ResetUnits", name=name(learner_id), layers=["all"], fraction=1.0))
        ).reason
        == "LEARNER_QUARANTINED"
    )


def test_a_quarantined_learner_resumes_with_a_lower_rate_and_loses_no_batch(
    wire, learner_id, small_spec, explain, refused
):
    behind = [harmless(3), harmless(4)]
    learner = quarantined(wire, learner_id, explain, small_spec, behind)
    refusal(wire, learner_id, refused)

    still = wire.learners.ResumeLearner(request("ResumeLearner", name=name(learner_id)))  # would diverge again
    assert still.state == learner_pb2.Learner.STATE_QUARANTINED
    assert (
        "lr"
        in refused(lambda: wire.learners.ResumeLearner(request("ResumeLearner", name=name(learner_id), lr=-1.0))).fields
    )
    resumed = wire.learners.ResumeLearner(request("ResumeLearner", name=name(learner_id), lr=1e-18))

    assert resumed.state == learner_pb2.Learner.STATE_ACTIVE
    assert not resumed.HasField("quarantine")
    assert resumed.spec.optimizer.lr == pytest.approx(1e-18)
    spec = learner.spec.to_plain()
    learner.update(LearnerSpec.parse(spec | {"optimizer": {**spec["optimizer"], "lr": 1e-18}}))
    sent = resumed.producers[0].applied_sequence  # how many of those behind had reached the journal
    for batch in [diverging(), *behind][: sent - 1]:
        learner.train(Batch.validate(learner.spec, *batch))
    same(wire, learner_id, learner)
    error = refused(lambda: wire.learners.ResumeLearner(request("ResumeLearner", name=name(learner_id))))
    assert error.reason == "LEARNER_NOT_QUARANTINED"


def test_a_quarantine_outlives_kill_9_and_its_batch_can_be_left_out(own_server, connect, small_spec, explain, refused):
    wire = connect(own_server.grpc_target)
    learner = quarantined(wire, "clicks", explain, small_spec, [])
    refusal(wire, "clicks", refused)
    for _ in range(2):
        own_server.kill()
        own_server.start()
        wire = connect(own_server.grpc_target)
        assert wire.get("clicks").state == learner_pb2.Learner.STATE_QUARANTINED
        same(wire, "clicks", learner)
    resumed = wire.learners.ResumeLearner(request("ResumeLearner", name="learners/clicks", skip_batch=True))
    assert resumed.state == learner_pb2.Learner.STATE_ACTIVE
    assert resumed.producers[0].applied_sequence == 2
    teach(wire.stream("clicks", "web"), [learner], 3, harmless(3))
    same(wire, "clicks", learner)
    own_server.kill()  # the journal still holds the batch that diverged, and the decision to leave it out
    own_server.start()
    same(connect(own_server.grpc_target), "clicks", learner)


def test_a_quarantined_learner_can_be_restored_instead(wire, learner_id, small_spec, explain, refused):
    learner = quarantined(wire, learner_id, explain, small_spec, [harmless(3)])
    refusal(wire, learner_id, refused)
    last = wire.learners.ListCheckpoints(request("ListCheckpoints", parent=name(learner_id))).last_restorable_position
    assert last == 2
    restored = restore(wire, learner_id, journal_position=last)
    assert restored.state == learner_pb2.Learner.STATE_ACTIVE
    stream = wire.stream(learner_id, "web")
    sequence = stream.opened.next_sequence
    assert sequence >= 3  # the batch that diverged is behind it
    teach(stream, [learner], sequence, harmless(7))
    same(wire, learner_id, learner)
