"""TrainingService over the wire: what is learnt, what is said about it, and by whom."""

import time

import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor, from_plain, to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2
from tests.wire import batch_message


def test_learning_over_the_wire_is_learning_in_process(wire, learner_id, small_spec, examples):
    wire.create(learner_id)
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    stream = wire.stream(learner_id)

    for sequence in range(1, 6):
        features, targets = examples(40, seed=sequence)
        stream.send_batch(sequence, features, targets, task=f"t{sequence}", return_outputs=True)
        expected = local.train(Batch.validate(local.spec, features, targets, task=f"t{sequence}"), return_outputs=True)
        (result,) = stream.results(1)
        assert (result.sequence, result.step, result.steps, result.examples) == (sequence, 40 * sequence, 40, 40)
        assert (result.loss, result.accuracy) == (expected.loss, expected.accuracy)
        np.testing.assert_array_equal(decode_tensor(result.outputs), expected.outputs)

    probe, _ = examples(7, seed=99)
    predicted = wire.predict(learner_id, probe)
    assert predicted.step == 200
    np.testing.assert_array_equal(decode_tensor(predicted.outputs), local.predict(probe))
    progress = wire.get(learner_id).progress
    assert (progress.loss, progress.accuracy) == (local.progress.loss, local.progress.accuracy)
    assert [task.task for task in progress.tasks] == ["t1", "t2", "t3", "t4", "t5"]
    assert dict(progress.replacements) == local.progress.replacements


def test_weights_reach_the_learner(wire, learner_id, small_spec, examples):
    wire.create(learner_id)
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    features, targets = examples(20)
    weights = np.linspace(0, 2, 20)

    stream = wire.stream(learner_id)
    stream.send_batch(1, features, targets, weights=weights)
    stream.results(1)
    local.train(Batch.validate(local.spec, features, targets, weights))

    np.testing.assert_array_equal(decode_tensor(wire.predict(learner_id, features).outputs), local.predict(features))


def test_batches_in_one_message_are_as_many_messages(wire, learner_id, small_spec, examples):
    wire.create(learner_id)
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    features, targets = examples(20)
    parts = [slice(0, 7), slice(7, 8), slice(8, 20)]

    stream = wire.stream(learner_id)
    stream.send_together([batch_message(n, features[rows], targets[rows]) for n, rows in enumerate(parts, start=1)])
    results = stream.results(3)
    local.train(Batch.validate(local.spec, features, targets))

    assert [(result.sequence, result.examples) for result in results] == [(1, 7), (2, 1), (3, 12)]
    assert wire.get(learner_id).producers[0].applied_sequence == 3
    np.testing.assert_array_equal(decode_tensor(wire.predict(learner_id, features).outputs), local.predict(features))


def test_one_of_several_batches_is_rejected_by_itself(wire, learner_id, examples):
    wire.create(learner_id)
    features, targets = examples(4)
    good, bad = batch_message(1, features, targets), batch_message(2, features, targets + 100)

    stream = wire.stream(learner_id)
    stream.send_together([good, bad, batch_message(3, features, targets)])

    assert [result.sequence for result in stream.results(1)] == [1]
    rejection = stream.rejection()
    assert (rejection.sequence, rejection.reason) == (2, "INVALID_BATCH")
    following = stream.rejection()
    assert (following.sequence, following.reason, following.expected_sequence) == (3, "SEQUENCE_GAP", 2)


WIDE = {"network": {"kind": "mlp", "in_features": 1, "hidden": [4], "out_features": 1000}, "batch_size": 0}


def test_results_with_outputs_come_in_messages_that_every_client_takes(wire, learner_id):
    wire.create(learner_id, **WIDE)
    features, targets = np.zeros((300, 1), np.float32), np.zeros(300, np.int64)  # 1.2 MB of outputs
    stream = wire.stream(learner_id)
    stream.send_together([batch_message(n, features, targets, return_outputs=True) for n in range(1, 9)])
    results = stream.results(8)
    assert [result.sequence for result in results] == list(range(1, 9))
    assert {tuple(result.outputs.shape) for result in results} == {(300, 1000)}


def test_outputs_that_no_client_takes_are_refused_before_anything_is_learnt(wire, learner_id):
    wire.create(learner_id, **WIDE)
    features, targets = np.zeros((17_000, 1), np.float32), np.zeros(17_000, np.int64)
    stream = wire.stream(learner_id)
    stream.send_batch(1, features, targets, return_outputs=True)
    rejection = stream.rejection()
    assert (rejection.reason, [violation.field for violation in rejection.field_violations]) == (
        "INVALID_BATCH",
        ["features"],
    )
    assert "send at most 16760 examples at once, or do without return_outputs" in rejection.message
    assert wire.get(learner_id).progress.examples == 0
    stream.send_batch(1, features, targets)
    assert stream.results(1)[0].examples == 17_000


def test_a_prediction_whose_answer_no_client_takes_is_refused(wire, learner_id, refused):
    wire.create(learner_id, **WIDE)
    error = refused(lambda: wire.predict(learner_id, np.zeros((16_761, 1), np.float32)))
    assert (error.code, list(error.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["features"])
    assert "send at most 16760 examples at once" in error.message
    assert list(wire.predict(learner_id, np.zeros((900, 1), np.float32)).outputs.shape) == [900, 1000]


def test_a_remainder_waits_for_the_next_message(wire, learner_id, examples):
    wire.create(learner_id, batch_size=4)
    stream = wire.stream(learner_id)
    features, targets = examples(12)

    stream.send_batch(1, features[:3], targets[:3], return_outputs=True)
    (first,) = stream.results(1)
    stream.send_batch(2, features[3:9], targets[3:9], return_outputs=True)
    (second,) = stream.results(1)
    stream.send_batch(3, features[9:], targets[9:])
    (third,) = stream.results(1)

    assert (first.steps, first.examples, first.pending_examples) == (0, 0, 3)
    assert not first.HasField("loss")
    assert (second.steps, second.examples, second.pending_examples) == (2, 8, 1)
    assert list(second.outputs.shape) == [8, 3]
    assert (third.steps, third.pending_examples, third.step) == (1, 0, 3)


def test_batch_size_zero_makes_each_message_a_step(wire, learner_id, examples):
    wire.create(learner_id, batch_size=0)
    stream = wire.stream(learner_id)
    stream.send_batch(1, *examples(5))
    stream.send_batch(2, *examples(17))
    assert [(result.steps, result.examples) for result in stream.results(2)] == [(1, 5), (1, 17)]


def test_regression_has_no_accuracy(wire, learner_id):
    wire.create(learner_id, loss="mse", network={"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 2})
    stream = wire.stream(learner_id)
    stream.send_batch(1, np.ones((3, 4), np.float32), np.zeros((3, 2), np.float32))
    (result,) = stream.results(1)
    assert result.HasField("loss")
    assert not result.HasField("accuracy")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"])
def test_features_may_be_of_any_numeric_dtype(wire, learner_id, dtype):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    stream.send_batch(1, np.ones((2, 4), dtype=dtype), np.array([0, 1], dtype=np.uint8))
    assert stream.results(1)[0].examples == 2


def test_repeating_a_batch_repeats_the_acknowledgement_and_learns_nothing(wire, learner_id, examples):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    batch = examples(10)
    stream.send_batch(1, *batch)
    assert not stream.results(1)[0].duplicate

    stream.send_batch(1, *batch, return_outputs=True)  # asking for outputs does not make it another batch

    response = stream.receive()
    assert response.acknowledgement.results[0].duplicate
    assert response.acknowledgement.applied_sequence == 1
    assert response.credits == 1
    assert wire.get(learner_id).progress.examples == 10


def test_a_reopened_stream_continues_after_the_last_applied_batch(wire, learner_id, examples):
    wire.create(learner_id)
    first = wire.stream(learner_id)
    first.send_batch(1, *examples(10))
    first.send_batch(2, *examples(10))
    responses = first.finish()
    assert responses[-1].acknowledgement.applied_sequence == 2

    second = wire.stream(learner_id)
    assert second.opened.applied_sequence == 2
    assert second.opened.epoch == first.opened.epoch + 1
    assert second.opened.learner_uid == wire.get(learner_id).uid
    second.send_batch(3, *examples(10))
    assert second.results(1)[0].step == 30


def test_a_newer_stream_of_a_producer_fences_the_older(wire, learner_id, examples, explain):
    wire.create(learner_id)
    old = wire.stream(learner_id, "web")
    old.send_batch(1, *examples(10))
    old.results(1)

    new = wire.stream(learner_id, "web")

    error = explain(old.failure())
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "PRODUCER_FENCED")
    assert error.metadata["producer"] == "web"
    new.send_batch(2, *examples(10))
    assert new.results(1)[0].step == 20


def test_producers_count_on_their_own(wire, learner_id, examples):
    wire.create(learner_id)
    left, right = wire.stream(learner_id, "left"), wire.stream(learner_id, "right")
    left.send_batch(1, *examples(10))
    left.results(1)
    right.send_batch(1, *examples(10, seed=1))
    right.results(1)
    positions = {position.producer: position.applied_sequence for position in wire.get(learner_id).producers}
    assert positions == {"left": 1, "right": 1}
    assert wire.get(learner_id).progress.examples == 20


def test_credits_come_back_with_every_answer(wire, learner_id, examples):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    assert stream.credits == 64
    for sequence in range(1, 21):
        stream.send_batch(sequence, *examples(5))
    stream.send_batch(99, *examples(5))
    responses = stream.finish()
    assert sum(response.credits for response in responses) == 21
    sequences = [result.sequence for response in responses for result in response.acknowledgement.results]
    assert sequences == list(range(1, 21))


def test_a_live_update_takes_effect_between_the_batches_around_it(wire, learner_id, small_spec, examples):
    """The order of batches and updates is the order in which they were accepted, so the outcome is exact."""
    wire.create(learner_id)
    local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
    stream = wire.stream(learner_id)
    change = from_plain({"resets": {"layers": "none"}, "optimizer": {"lr": 0.2}}, spec_pb2.LearnerSpec)
    for sequence in (1, 2):
        features, targets = examples(60, seed=sequence)
        stream.send_batch(sequence, features, targets)
        stream.results(1)
        local.train(Batch.validate(local.spec, features, targets))
        if sequence == 1:
            wire.learners.UpdateLearner(
                learner_service_pb2.UpdateLearnerRequest(
                    learner=learner_pb2.Learner(name=f"learners/{learner_id}", spec=change),
                    update_mask=FieldMask(paths=["spec.resets.layers", "spec.optimizer.lr"]),
                )
            )
            plain = small_spec | {
                "resets": small_spec["resets"] | {"layers": "none"},
                "optimizer": small_spec["optimizer"] | {"lr": 0.2},
            }
            local.update(LearnerSpec.parse(plain))
    np.testing.assert_array_equal(decode_tensor(wire.predict(learner_id, features).outputs), local.predict(features))
    assert to_plain(wire.get(learner_id).spec)["resets"]["layers"] == ["none"]


def test_predictions_come_while_a_long_message_is_being_learnt(wire, learner_id, examples):
    """One message of many steps does not hold predictions up, and each sees a state between two of its steps."""
    wire.create(learner_id, monitoring={"interval": 20})  # samples take longer than the steps between them
    probe, _ = examples(1)
    wire.predict(learner_id, probe)
    stream = wire.stream(learner_id)
    stream.send_batch(1, *examples(20_000))

    steps = []
    deadline = time.monotonic() + 60
    while wire.get(learner_id).progress.step < 20_000:
        assert time.monotonic() < deadline
        steps.append(wire.predict(learner_id, probe).step)

    assert steps == sorted(steps)
    within = [step for step in steps if 0 < step < 20_000]
    assert len(within) > 3, "predictions should have come between the message's steps"


def test_deleting_a_learner_ends_its_streams(wire, learner_id, explain):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    wire.delete(learner_id)
    error = explain(stream.failure())
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LEARNER_NOT_FOUND")
