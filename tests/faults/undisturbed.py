"""What a learner must be: one that met the same log without a server, a crash or a network."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cbp import Batch, EngineName, Learner, LearnerSnapshot, LearnerSpec
from cbp_proto import decode_tensor
from cbp_proto.v1 import training_service_pb2
from cbp_server.engine.training import Pace, TrainingJob
from faults.audit import CheckpointRow, History, LogEntry
from faults.learners import FedLearner, make_batch


def check_learner(
    history: History, fed: FedLearner, seed: int, told: Mapping[str, int], confirmed: Mapping[str, int]
) -> int:
    """Checks all that the store says of a learner, after a server that was stopped in order.

    Args:
        told: by producer, the last sequence that its client was told is applied, or durable.
        confirmed: by kind of entry, how many its operator was told have been made.

    Returns:
        The number of batches.

    Raises:
        AssertionError: a batch is lost, applied twice or out of order, is not what was sent, or the learner is not the
            undisturbed one, or it diverged, so that comparing it would say nothing.
    """
    uid = history.uids()[fed.name]
    log = history.log(uid)
    batches = check_batches(fed.name, log, seed, told)
    for kind, count in confirmed.items():
        assert sum(entry.kind == kind for entry in log) >= count, f"{fed.name} lacks entries of kind {kind}"
    stored = LearnerSnapshot.from_bytes(history.newest_file(uid).read_bytes())
    service = json.loads(stored.extra["cbp_server"])
    lacking = [entry for entry in log[service["journal_position"] :] if entry.kind != "open"]
    assert not lacking, f"{fed.name}: the last checkpoint lacks the end of the log: {lacking}"
    # A producer that has opened, but sent nothing, may be in the log alone.
    sequences = {producer: position["sequence"] for producer, position in service["positions"].items()}
    applied, logged = +Counter(sequences), Counter({producer: len(found) for producer, found in batches.items()})
    assert applied == +logged, f"{fed.name}: the last checkpoint has {applied}, the log {logged}"
    undisturbed = Undisturbed(fed, history.engine(uid), log, history.checkpoints(uid))
    assert_same(fed.name, stored, undisturbed.at_end())
    return sum(map(len, batches.values()))


def check_fork(history: History, name: str, source: FedLearner) -> None:
    """Checks a copy of a learner that nobody has fed since.

    Raises:
        AssertionError: it is not as the undisturbed source was at any time.
    """
    uids = history.uids()
    checkpoints = history.checkpoints(uids[name])
    assert all(entry.kind == "engine" for entry in history.log(uids[name])), f"{name} has learnt something"
    origin = uids[source.name]
    undisturbed = Undisturbed(source, history.engine(origin), history.log(origin), history.checkpoints(origin))
    stored = LearnerSnapshot.from_bytes(history.newest_file(uids[name]).read_bytes())
    assert_same(name, stored, undisturbed.described_by(checkpoints[0].summary, len(undisturbed.log)))


def check_batches(learner: str, log: Sequence[LogEntry], seed: int, told: Mapping[str, int]) -> dict[str, list[int]]:
    """Each producer's sequences, which are exactly 1, 2, 3, …, in this order, up to at least what it was told."""
    sequences: dict[str, list[int]] = {}
    for entry in log:
        if entry.producer is None:
            continue
        of_producer = sequences.setdefault(entry.producer, [])
        if entry.kind == "batch":
            of_producer.append(entry.sequence or 0)
            _check_payload(learner, entry, seed)
    for producer, found in sequences.items():
        assert found == list(range(1, len(found) + 1)), f"{learner}/{producer}: {found}"
    for producer, sequence in told.items():
        has = len(sequences.get(producer, ()))
        assert has >= sequence, f"{learner}/{producer} was told of {sequence} batches, but {has} are there"
    return sequences


class Undisturbed:
    """A learner's states along its log.

    Args:
        engine: that the learner was born with.
        checkpoints: all that the learner ever had; they say to which earlier state it was restored.
    """

    def __init__(
        self, fed: FedLearner, engine: EngineName, log: Sequence[LogEntry], checkpoints: Sequence[CheckpointRow]
    ) -> None:
        self.log = log
        self._fed = fed
        self._engine = engine
        self._summaries = {checkpoint.number: checkpoint.summary for checkpoint in checkpoints}
        self._restores = {entry.position: self._summary(entry) for entry in log if entry.kind == "restore"}
        self._kept: dict[str, LearnerSnapshot] = {}  # states that the learner was restored to, by what describes them

    def at_end(self) -> Learner:
        """The learner with the whole log in it."""
        *_, last = self._states(len(self.log))
        return last

    def described_by(self, summary: Mapping[str, Any], last: int) -> Learner:
        """The learner at the position, up to `last`, at which it is as the summary of a checkpoint says.

        The summary has running means of loss and accuracy, to the last bit, so it fits one state only.
        """
        wanted = _description(summary)
        for learner in self._states(last):
            if _description_of(learner) == wanted:
                return learner
        raise AssertionError(f"{self._fed.name} was restored or forked to a state that it never had: {summary}")

    def _states(self, last: int) -> Iterator[Learner]:
        """The learner before the first entry and behind each one up to position `last`; changed by each next state."""
        learner = Learner(LearnerSpec.parse(self._fed.spec), engine=self._engine)
        self._keep(learner)
        yield learner
        for entry in self.log[:last]:
            if entry.kind == "restore":
                learner = self._restored_by(entry)
            else:
                _apply(learner, entry)
                self._keep(learner)
            yield learner

    def _keep(self, learner: Learner) -> None:
        """Keeps the state if the learner is restored to it further on."""
        if any(summary["progress"]["step"] == learner.progress.step for summary in self._restores.values()):
            description = _description_of(learner)
            if description not in self._kept:
                self._kept[description] = learner.snapshot()

    def _restored_by(self, entry: LogEntry) -> Learner:
        summary = self._restores[entry.position]
        description = _description(summary)
        assert description in self._kept, f"{self._fed.name} was restored to a state that it never had: {summary}"
        return Learner.restore(self._kept[description], engine=summary["engine"])

    def _summary(self, entry: LogEntry) -> Mapping[str, Any]:
        return self._summaries[json.loads(entry.payload)["checkpoint"]]


def _description(summary: Mapping[str, Any]) -> str:
    """Of one state only: the running means of loss and accuracy are in it, to the last bit."""
    return json.dumps([summary[key] for key in ("spec", "engine", "progress")], sort_keys=True)


def _description_of(learner: Learner) -> str:
    plain = {"spec": learner.spec.to_plain(), "engine": learner.engine, "progress": learner.progress.to_plain()}
    return _description(plain)


def assert_same(name: str, stored: LearnerSnapshot, undisturbed: Learner) -> None:
    """Bit for bit; differences are named."""
    expected = undisturbed.snapshot()
    assert np.isfinite(undisturbed.progress.loss or 0.0), f"{name} diverged, so its comparison would say nothing"
    different = {
        key: (stored.metadata.get(key), expected.metadata.get(key))
        for key in stored.metadata.keys() | expected.metadata.keys()
        if stored.metadata.get(key) != expected.metadata.get(key)
    }
    assert not different, (name, different)
    assert stored.tensors.keys() == expected.tensors.keys(), name
    for key, tensor in expected.tensors.items():
        assert torch.isfinite(tensor.double()).all(), f"{name} diverged: {key}"
        np.testing.assert_array_equal(stored.tensors[key].numpy(), tensor.numpy(), err_msg=f"{name} {key}")


def _apply(learner: Learner, entry: LogEntry) -> None:
    match entry.kind:
        case "batch":
            message = training_service_pb2.TrainBatch.FromString(entry.payload)
            features, targets = decode_tensor(message.features), decode_tensor(message.targets)
            _learn(learner, Batch.validate(learner.spec, features, targets, None, message.task))
        case "update":
            learner.update(LearnerSpec.parse(json.loads(entry.payload)["spec"]))
        case "reset":
            plain = json.loads(entry.payload)
            learner.reset_units(plain["layers"], plain["fraction"])
        case "engine":
            learner.switch_engine(entry.payload.decode())
        case "open" | "forget":
            pass  # concerns the producer only
        case kind:
            raise AssertionError(f"the harness does not know what entries of kind {kind} do")


def _learn(learner: Learner, batch: Batch) -> None:
    """In slices, as an engine does: which they are shows in the last bit of the mean loss."""
    job = TrainingJob(learner, batch, Pace.of(learner.spec), return_outputs=False)
    while not job.finished:
        job.learn_alone(between_steps=lambda: None)


def _check_payload(learner: str, entry: LogEntry, seed: int) -> None:
    message = training_service_pb2.TrainBatch.FromString(entry.payload)
    features, targets, task = make_batch(learner, entry.producer or "", entry.sequence or 0, seed)
    where = f"{learner}/{entry.producer} {entry.sequence}"
    np.testing.assert_array_equal(decode_tensor(message.features), features, err_msg=where)
    np.testing.assert_array_equal(decode_tensor(message.targets), targets, err_msg=where)
    assert message.task == task, where
