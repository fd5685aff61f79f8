"""Snapshots that are written over others, and their bytes made while something else runs."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec, SnapshotError

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]


def assert_equal(one: LearnerSnapshot, other: LearnerSnapshot) -> None:
    assert one.metadata == other.metadata
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@pytest.mark.parametrize("optimizer", [{"kind": "sgd", "lr": 0.1, "momentum": 0.5}, {"kind": "adam", "lr": 0.01}])
def test_a_snapshot_into_another_is_the_same_in_the_same_memory(
    optimizer: dict[str, object], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = make_spec(optimizer=optimizer, batch_size=3, monitoring__probe_size=10)
    learner = Learner(spec)
    learner.train(make_batch(spec, 31))
    old = learner.snapshot()
    memory = {name: tensor.data_ptr() for name, tensor in old.tensors.items()}
    learner.train(make_batch(spec, 31, seed=1))
    fresh = learner.snapshot()
    reused = learner.snapshot(into=old)
    assert_equal(reused, fresh)
    assert LearnerSnapshot.from_bytes(reused.to_bytes()).tensors.keys() == fresh.tensors.keys()
    fitting = [name for name in memory if name != "generator" and not name.startswith("pending.")]
    assert all(reused.tensors[name].data_ptr() == memory[name] for name in fitting)
    of_parameters = [name for name in fitting if name.startswith(("parameters.", "optimizer."))]
    assert not any(fresh.tensors[name].data_ptr() == memory[name] for name in of_parameters)


def test_what_does_not_fit_gets_memory_of_its_own(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    small, large = Learner(make_spec()), Learner(make_spec(network__hidden=[8, 9], optimizer__momentum=0.5))
    for learner in (small, large):
        learner.train(make_batch(learner.spec, 15))
    expected = large.snapshot()
    assert_equal(large.snapshot(into=small.snapshot()), expected)
    odd = small.snapshot()
    odd.tensors["parameters.hidden_0.weight"] = torch.zeros(6, 8).T
    odd.tensors["units.age"] = torch.zeros(1, 17)
    assert_equal(large.snapshot(into=odd), expected)


def test_another_learners_snapshot_leaves_that_learner_as_it_is(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    one, other = Learner(make_spec(seed=1)), Learner(make_spec(seed=2))
    for learner in (one, other):
        learner.train(make_batch(learner.spec, 20))
    expected = [learner.snapshot() for learner in (one, other)]
    taken = other.snapshot(into=one.snapshot())
    assert_equal(taken, expected[1])
    assert_equal(one.snapshot(), expected[0])
    assert_equal(Learner.restore(taken).snapshot(), expected[1])


def test_a_snapshot_does_not_follow_the_learner(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    learner = Learner(make_spec(optimizer={"kind": "adam", "lr": 0.01}))
    learner.train(make_batch(learner.spec, 20))
    snapshot = learner.snapshot(into=learner.snapshot())
    data = snapshot.to_bytes()
    learner.train(make_batch(learner.spec, 60, seed=1))
    learner.reset_units([0, 1], 1.0)
    assert snapshot.to_bytes() == data


def test_bytes_are_as_safetensors_writes_them(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(optimizer={"kind": "adam", "lr": 0.01}, batch_size=3)
    learner = Learner(spec)
    learner.train(make_batch(spec, 31, task="grün"))
    snapshot = learner.snapshot()
    data = snapshot.to_bytes({"note": 'a\n"b" ☃'})
    contents = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    assert data[-contents:] == safetensors.torch.save(snapshot.tensors)[-contents:]
    loaded = safetensors.torch.load(data)
    assert loaded.keys() == snapshot.tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in snapshot.tensors.items())
    assert (len(data) - contents) % 8 == 0
    assert LearnerSnapshot.from_bytes(data).extra == {"note": 'a\n"b" ☃'}


def test_types_that_no_snapshot_holds_are_refused(make_spec: MakeSpec) -> None:
    snapshot = Learner(make_spec()).snapshot()
    snapshot.tensors["units.age"] = snapshot.tensors["units.age"].double()
    with pytest.raises(SnapshotError, match=r"'units.age' is torch.float64"):
        snapshot.to_bytes()


def test_training_goes_on_while_bytes_are_made(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(optimizer={"kind": "adam", "lr": 0.01})
    learner, alone = Learner(spec), Learner(spec)
    spare: LearnerSnapshot | None = None
    for seed in range(6):
        batch = make_batch(spec, 30, seed=seed)
        snapshot = learner.snapshot(into=spare)
        written: list[bytes] = []
        writer = threading.Thread(target=lambda taken, out: out.append(taken.to_bytes()), args=(snapshot, written))
        writer.start()
        learner.train(batch)
        writer.join()
        assert_equal(LearnerSnapshot.from_bytes(written[0]), alone.snapshot())
        alone.train(batch)
        spare = snapshot
    np.testing.assert_array_equal(learner.predict(np.ones((1, 6))), alone.predict(np.ones((1, 6))))
