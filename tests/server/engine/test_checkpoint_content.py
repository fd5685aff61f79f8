"""What a checkpoint says beside the snapshot: it is refused by name, or can be gone on from."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from forging import SPECS, VALUES, batch_of, paths, replaced

from cbp import Learner, LearnerSnapshot, LearnerSpec, SnapshotError, Trainability
from cbp_server.engine import messages
from cbp_server.engine.checkpoint_content import Content, Copy
from cbp_server.engine.hosted_learner import HostedLearner
from cbp_server.learners.hosted import Summary
from cbp_server.records.samples import unpack
from cbp_server.rpc.convert import sample_to_message

_KEY = "cbp_server"


@pytest.fixture(scope="module")
def snapshot() -> LearnerSnapshot:
    """In the checkpoint of a learner with producers, samples and a test of its trainability."""
    spec = LearnerSpec.parse(SPECS["mlp, adam"])
    hosted = HostedLearner(Learner(spec), "2026-11-22T08:00:00+00:00", journal_position=9)
    hosted.trainability = Trainability(step=3, loss=0.5, fresh_loss=None, chance_loss=1.0)
    for seed in range(2):
        hosted.learner.train(batch_of(spec, 18, seed))
        hosted.stamp([hosted.learner.sample_plasticity()])
    hashes = ((1, "a" * 32), (2, "b" * 32))
    hosted.place({"web": messages.Position(3, 2, hashes, "stream", 2), "other": messages.Position()}, 4)
    return LearnerSnapshot.from_bytes(Copy(hosted, None).to_bytes("uid"))


def saying(snapshot: LearnerSnapshot, service: Any) -> Content:
    """The checkpoint when this stands beside the snapshot."""
    return Content(replace(snapshot, extra={_KEY: json.dumps(service)}).to_bytes(), "uid")


def test_what_was_written_is_read(snapshot: LearnerSnapshot) -> None:
    service = json.loads(snapshot.extra[_KEY])
    hosted = saying(snapshot, service).hosted(Learner.restore(snapshot))
    written = LearnerSnapshot.from_bytes(Copy(hosted, None).to_bytes("uid"))
    assert json.loads(written.extra[_KEY]) == service


def test_whatever_is_replaced_is_refused_by_name_or_can_be_shown(snapshot: LearnerSnapshot) -> None:
    service, learner = json.loads(snapshot.extra[_KEY]), Learner.restore(snapshot)
    everything = [(path, by) for path in paths(service) if path for by in VALUES]
    unnamed, taken = [], 0
    for path, by in random.Random(5).sample(everything, 700):
        try:
            hosted = saying(snapshot, replaced(service, path, VALUES[by])).hosted(learner)
        except SnapshotError as error:
            if not error.violations and by != "nested" and path != ("learner",):
                unnamed.append((path, by, str(error)))
            continue
        taken += 1
        report = hosted.report
        assert Summary.from_plain(json.loads(json.dumps(Summary.of(report).to_plain()))) == Summary.of(report)
        for packed in hosted.samples.packed:
            sample_to_message(unpack(packed))
        Copy(hosted, None).to_bytes("uid")
    assert unnamed == []
    assert 20 < taken < 350


def test_what_is_no_object_is_refused(snapshot: LearnerSnapshot) -> None:
    for wrong in (None, [], "x", 1):
        with pytest.raises(SnapshotError, match="JSON object"):
            saying(snapshot, wrong)
    with pytest.raises(SnapshotError, match="no checkpoint"):
        Content(replace(snapshot, extra={}).to_bytes(), "uid")


def test_an_engine_that_does_not_run_the_network_is_refused(snapshot: LearnerSnapshot) -> None:
    with pytest.raises(SnapshotError, match="'module' does not run this network"):
        saying(snapshot, json.loads(snapshot.extra[_KEY]) | {"engine": "module"})


def test_samples_of_another_network_are_refused(snapshot: LearnerSnapshot) -> None:
    service = json.loads(snapshot.extra[_KEY])
    del service["samples"][0]["layers"][0]
    with pytest.raises(SnapshotError, match="hidden_0, hidden_1, output"):
        saying(snapshot, service).hosted(Learner.restore(snapshot))


def test_what_an_earlier_version_said_is_read(snapshot: LearnerSnapshot) -> None:
    service = json.loads(snapshot.extra[_KEY]) | {"host": "here"}
    del service["epoch_floor"]
    for position in service["positions"].values():
        del position["life"]
    hosted = saying(snapshot, service).hosted(Learner.restore(snapshot))
    assert (hosted.journal_position, hosted.epoch_floor, hosted.producers["web"].life) == (9, 0, 0)
