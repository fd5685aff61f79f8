"""Learners as the catalog has them, whatever stands there."""

import json
import random
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest
from forging import SPECS, VALUES, batch_of, paths, replaced

from cbp import Learner, LearnerSpec, SnapshotError
from cbp_proto import PlainError
from cbp_server.engine.hosted_learner import HostedLearner
from cbp_server.learners.hosted import Hosted, Summary, hosted_from_rows
from cbp_server.records.learners import Durability, LearnerState
from cbp_server.rpc.convert import learner_to_message
from cbp_server.store.catalog import StoredCheckpoint, StoredLearner, UnreadableRow
from cbp_server.web.schemas import Learner as Shown

NOW = datetime(2026, 11, 22, 8, tzinfo=UTC)
SPEC = SPECS["mlp, adam"]
ROW = StoredLearner(
    uid="uid",
    learner_id="clicks",
    spec=LearnerSpec.parse(SPEC).to_plain(),
    engine="compiled",
    durability=Durability.FSYNC,
    born=True,
    create_time=NOW,
)


@pytest.fixture(scope="module")
def checkpoint() -> StoredCheckpoint:
    hosted = HostedLearner(Learner(LearnerSpec.parse(SPEC)), "2026-11-22T08:00:00+00:00", journal_position=9)
    for task in ("first", "second"):
        hosted.learner.train(batch_of(hosted.learner.spec, 18, task=task))
    hosted.producer("web").sequence = 2
    report = hosted.report
    return StoredCheckpoint(
        learner_uid="uid",
        number=1,
        position=9,
        step=report.progress.step,
        examples=report.progress.examples,
        size_bytes=1000,
        time=NOW,
        pinned=False,
        summary=json.loads(json.dumps(Summary.of(report).to_plain())),
    )


def show(hosted: Hosted) -> None:
    learner_to_message(hosted.record).SerializeToString()
    Shown.of(hosted.record).model_dump_json()


def test_a_learner_is_as_its_newest_checkpoint_leaves_it(checkpoint: StoredCheckpoint) -> None:
    hosted = hosted_from_rows(ROW, checkpoint, 10)
    assert (hosted.unreadable, hosted.record.state) == ("", LearnerState.EVICTED)
    assert Summary.from_plain(checkpoint.summary).progress == hosted.record.progress
    assert hosted.record.progress.task_count == 2
    assert asdict(hosted.record.producers["web"])["applied_sequence"] == 2
    show(hosted)


def test_a_summary_of_nonsense_is_not_shown_and_the_learner_brought_back(checkpoint: StoredCheckpoint) -> None:
    taken = 0
    everything = [(path, by) for path in paths(checkpoint.summary) if path for by in VALUES]
    for path, by in random.Random(6).sample(everything, 400):
        summary = replaced(checkpoint.summary, path, VALUES[by])
        hosted = hosted_from_rows(ROW, replace(checkpoint, summary=summary), 10)
        assert not hosted.unreadable
        assert (hosted.checkpoint_number, hosted.saved_position) == (1, 9)
        with suppress(PlainError):  # sizes that no message holds: then it is not shown, and hides no other
            show(hosted)
        try:
            Summary.from_plain(summary)
            taken += 1
        except SnapshotError:
            assert hosted.record.state is LearnerState.UNAVAILABLE
            assert hosted.record.progress.step == 0
    assert taken


@pytest.mark.parametrize("delete_time", [None, NOW])
@pytest.mark.parametrize("cause", ["row", "spec", "checkpoint"])
def test_what_cannot_be_is_there_by_name(cause: str, delete_time: datetime | None) -> None:
    row: StoredLearner | UnreadableRow = replace(ROW, delete_time=delete_time)
    checkpoint = None
    if cause == "row":
        row = UnreadableRow(uid="uid", learner_id="clicks", deleted=delete_time is not None, reason="no JSON")
    elif cause == "spec":
        row = replace(ROW, spec={"network": {"kind": "mlp"}}, delete_time=delete_time)
    else:
        checkpoint = SnapshotError("no JSON")
    hosted = hosted_from_rows(row, checkpoint, 10)
    assert (hosted.uid, hosted.learner_id) == ("uid", "clicks")
    assert "network.in_features" in hosted.unreadable if cause == "spec" else hosted.unreadable == "no JSON"
    deleted = delete_time is not None
    assert hosted.record.state is (LearnerState.DELETED if deleted else LearnerState.EVICTED)
    assert (hosted.stored.delete_time is not None) == deleted
    show(hosted)
