"""What a learner must be: one that met the same log without a server, a crash or a network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cbp import Batch, Learner, LearnerSpec
from cbp_proto import decode_tensor
from cbp_proto.v1 import training_service_pb2
from faults.audit import LogEntry, whole_log
from faults.learners import FedLearner, make_batch
from faults.stored import newest_checkpoint


def check_learner(data_dir: Path, fed: FedLearner, seed: int, told: Mapping[str, int]) -> int:
    """Checks all that the store says of a learner, after a server that was stopped in order.

    Args:
        told: by producer, the last sequence that its client was told is applied, or durable.

    Returns:
        The number of batches.

    Raises:
        AssertionError: a batch is lost, applied twice or out of order, is not what was sent, or the learner is not the
            undisturbed one, or it diverged, so that comparing it would say nothing.
    """
    stored = newest_checkpoint(data_dir, fed.name)
    log = whole_log(data_dir, stored.uid)
    batches = check_batches(fed.name, log, seed, told)
    assert stored.journal_position == len(log), (fed.name, stored.journal_position, len(log))
    assert stored.sequences == {producer: len(sequences) for producer, sequences in batches.items()}, fed.name
    undisturbed = Learner(LearnerSpec.parse(fed.spec))
    for entry in log:
        _apply(undisturbed, entry)
    assert_same_learner(fed.name, stored.snapshot.tensors, stored.snapshot.metadata, undisturbed)
    return sum(map(len, batches.values()))


def check_batches(
    learner: str, log: Sequence[LogEntry], seed: int, told: Mapping[str, int]
) -> dict[str, Sequence[int]]:
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
        assert len(sequences.get(producer, ())) >= sequence, f"{learner}/{producer} lacks what it was told to have"
    return dict(sequences)


def assert_same_learner(
    name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object], undisturbed: Learner
) -> None:
    """Bit for bit; differences are named."""
    expected = undisturbed.snapshot()
    assert np.isfinite(undisturbed.progress.loss or 0.0), f"{name} diverged, so its comparison would say nothing"
    different = {
        key: (metadata.get(key), expected.metadata.get(key))
        for key in metadata.keys() | expected.metadata.keys()
        if metadata.get(key) != expected.metadata.get(key)
    }
    assert not different, (name, different)
    assert tensors.keys() == expected.tensors.keys(), name
    for key, tensor in expected.tensors.items():
        assert torch.isfinite(tensor.double()).all(), f"{name} diverged: {key}"
        np.testing.assert_array_equal(tensors[key].numpy(), tensor.numpy(), err_msg=f"{name} {key}")


def _apply(learner: Learner, entry: LogEntry) -> None:
    match entry.kind:
        case "batch":
            message = training_service_pb2.TrainBatch.FromString(entry.payload)
            features, targets = decode_tensor(message.features), decode_tensor(message.targets)
            learner.train(Batch.validate(learner.spec, features, targets, None, message.task))
        case "update":
            learner.update(LearnerSpec.parse(json.loads(entry.payload)["spec"]))
        case "open":
            pass  # concerns the producer only
        case kind:
            raise AssertionError(f"the harness does not know what entries of kind {kind} do")


def _check_payload(learner: str, entry: LogEntry, seed: int) -> None:
    message = training_service_pb2.TrainBatch.FromString(entry.payload)
    features, targets, task = make_batch(learner, entry.producer or "", entry.sequence or 0, seed)
    where = f"{learner}/{entry.producer} {entry.sequence}"
    np.testing.assert_array_equal(decode_tensor(message.features), features, err_msg=where)
    np.testing.assert_array_equal(decode_tensor(message.targets), targets, err_msg=where)
    assert message.task == task, where
