"""Producers that are forgotten, over the wire."""

import grpc
import numpy as np
import pytest

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor
from cbp_proto.v1 import learner_service_pb2

PROBE = np.random.default_rng(99).normal(size=(5, 4)).astype(np.float32)


def forget(wire, learner_id, producer):
    name = f"learners/{learner_id}/producers/{producer}"
    wire.learners.DeleteProducer(learner_service_pb2.DeleteProducerRequest(name=name))


def positions(wire, learner_id):
    return {producer.producer: producer.applied_sequence for producer in wire.get(learner_id).producers}


class Taught:
    """A learner on the server, and beside it one that gets the same batches."""

    def __init__(self, wire, learner_id, small_spec, examples):
        self.wire, self.learner_id, self.examples = wire, learner_id, examples
        self.local = Learner(LearnerSpec.parse(small_spec), engine="compiled")
        self.batches = 0

    def teach(self, stream, sequence):
        self.batches += 1
        batch = self.examples(9, seed=self.batches)
        stream.send_batch(sequence, *batch)
        self.local.train(Batch.validate(self.local.spec, *batch))
        (result,) = stream.results(1)
        assert not result.duplicate

    def check(self):
        outputs = self.wire.predict(self.learner_id, PROBE).outputs
        np.testing.assert_array_equal(decode_tensor(outputs), self.local.predict(PROBE))


@pytest.fixture
def taught(wire, learner_id, small_spec, examples):
    wire.create(learner_id)
    return Taught(wire, learner_id, small_spec, examples)


@pytest.mark.parametrize("producer", ["web-1", "pods/7d9f 3/producers/ő", "x" * 128])
def test_a_forgotten_producer_begins_anew(wire, learner_id, taught, refused, producer):
    stream = wire.stream(learner_id, producer)
    for sequence in (1, 2, 3):
        taught.teach(stream, sequence)
    stream.finish()
    for life in range(2):
        forget(wire, learner_id, producer)
        assert positions(wire, learner_id) == {}
        again = wire.stream(learner_id, producer)
        assert again.opened.next_sequence == 1
        assert again.opened.epoch > stream.opened.epoch
        taught.teach(again, 1)
        taught.teach(again, 2)
        again.finish()
        assert positions(wire, learner_id) == {producer: 2}, life
    taught.check()
    error = refused(lambda: forget(wire, learner_id, "nobody"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "PRODUCER_NOT_FOUND")


def test_the_streams_of_a_forgotten_producer_are_dead(wire, learner_id, taught, explain):
    stream = wire.stream(learner_id, "web", stream_id="a")
    taught.teach(stream, 1)
    forget(wire, learner_id, "web")
    ended = explain(stream.failure())
    assert (ended.code, ended.reason) == (grpc.StatusCode.ABORTED, "PRODUCER_FENCED")
    assert "has been forgotten" in ended.message
    for stream_id in ("a", ""):  # what was open would come back
        with pytest.raises(grpc.RpcError) as caught:
            wire.stream(learner_id, "web", stream_id=stream_id, resumed_epoch=stream.opened.epoch)
        assert explain(caught.value).reason == "PRODUCER_FENCED"
    taught.teach(wire.stream(learner_id, "web"), 1)
    taught.check()


def test_what_was_accepted_before_is_learnt(wire, learner_id, examples):
    wire.create(learner_id)
    stream = wire.stream(learner_id, "web")
    for sequence in range(1, 9):
        stream.send_batch(sequence, *examples(200, seed=sequence))
    stream.results(1)
    forget(wire, learner_id, "web")
    learnt = wire.get(learner_id).progress.examples // 200
    assert positions(wire, learner_id) == {}
    assert 1 <= learnt <= 8
    assert wire.stream(learner_id, "web").opened.next_sequence == 1
    assert wire.get(learner_id).progress.examples == 200 * learnt


def test_a_restore_leaves_producers_forgotten_and_the_others_where_they_are(wire, learner_id, taught, explain):
    web, other = wire.stream(learner_id, "web"), wire.stream(learner_id, "other")
    taught.teach(web, 1)
    taught.teach(web, 2)
    taught.teach(other, 1)
    position = wire.get(learner_id).journal_position
    local = taught.local.snapshot()
    forget(wire, learner_id, "web")
    taught.teach(other, 2)
    again = wire.stream(learner_id, "web")
    taught.teach(again, 1)
    wire.learners.RestoreLearner(
        learner_service_pb2.RestoreLearnerRequest(name=f"learners/{learner_id}", journal_position=position)
    )
    taught.local = Learner.restore(local, engine="compiled")
    taught.check()
    assert positions(wire, learner_id) == {"web": 1, "other": 2}
    with pytest.raises(grpc.RpcError) as caught:
        wire.stream(learner_id, "gone", resumed_epoch=web.opened.epoch)
    assert explain(caught.value).reason == "PRODUCER_FENCED"
    taught.teach(wire.stream(learner_id, "web"), 2)
    taught.check()


@pytest.mark.parametrize(
    "name", ["", "learners/clicks", "learners/clicks/producers/", "learners//producers/web", "producers/web"]
)
def test_a_name_of_another_form_is_refused(wire, refused, name):
    error = refused(lambda: wire.learners.DeleteProducer(learner_service_pb2.DeleteProducerRequest(name=name)))
    assert (error.code, list(error.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, ["name"])
