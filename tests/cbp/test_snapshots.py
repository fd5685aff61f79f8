import json
import struct
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec, SnapshotError
from cbp.spec.learner_spec import Utility

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]

OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "sgd", "lr": 0.05},
    {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"kind": "rmsprop", "lr": 0.005},
    {"kind": "rmsprop", "lr": 0.005, "momentum": 0.5},
    {"kind": "adam", "lr": 0.01},
    {"kind": "adamw", "lr": 0.01},
]


def assert_same(one: Learner, other: Learner) -> None:
    first, second = one.snapshot(), other.snapshot()
    assert first.metadata == second.metadata
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


@pytest.mark.parametrize("utility", get_args(Utility))
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: "_".join(map(str, optimizer)))
def test_a_restored_learner_continues_bit_for_bit(
    utility: str, optimizer: dict[str, Any], make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    spec = make_spec(
        optimizer=optimizer, resets__utility=utility, batch_size=3, monitoring__interval=4, monitoring__probe_size=20
    )
    uninterrupted = Learner(spec)
    uninterrupted.train(make_batch(spec, 61, task="a", weighted=True))
    data = uninterrupted.snapshot().to_bytes()
    restored = Learner.restore(LearnerSnapshot.from_bytes(data))
    assert_same(uninterrupted, restored)

    uninterrupted.take_samples()
    for seed, task in ((1, "a"), (2, "b")):
        batch = make_batch(spec, 32, seed=seed, task=task)
        expected, actual = (learner.train(batch, return_outputs=True) for learner in (uninterrupted, restored))
        np.testing.assert_array_equal(expected.outputs, actual.outputs)
        assert (expected.loss, expected.accuracy, expected.steps) == (actual.loss, actual.accuracy, actual.steps)
    assert_same(uninterrupted, restored)
    assert uninterrupted.progress == restored.progress
    assert uninterrupted.take_samples() == restored.take_samples()
    assert sum(restored.progress.replacements.values()) > 5


def test_a_snapshot_is_a_copy(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(batch_size=3)
    learner = Learner(spec)
    learner.train(make_batch(spec, 31))
    snapshot = learner.snapshot()
    twin = Learner.restore(snapshot)
    learner.train(make_batch(spec, 31, seed=1))
    assert_same(twin, Learner.restore(snapshot))


def test_a_newborn_can_be_saved(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec(loss="mse", optimizer__momentum=0.5)
    learner = Learner(spec)
    restored = Learner.restore(LearnerSnapshot.from_bytes(learner.snapshot().to_bytes()))
    for each in (learner, restored):
        each.train(make_batch(spec, 20))
    assert_same(learner, restored)


def test_an_updated_learner_can_be_saved(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    spec = make_spec()
    learner = Learner(spec)
    learner.train(make_batch(spec, 30))
    learner.update(make_spec(optimizer__momentum=0.5, resets__layers="first", resets__maturity_threshold=2))
    learner.train(make_batch(spec, 30, seed=1))
    restored = Learner.restore(learner.snapshot())
    for each in (learner, restored):
        each.train(make_batch(spec, 30, seed=2))
    assert_same(learner, restored)


def test_callers_may_add_metadata_of_their_own(make_spec: MakeSpec) -> None:
    snapshot = Learner(make_spec()).snapshot()
    read = LearnerSnapshot.from_bytes(snapshot.to_bytes({"server": json.dumps({"journal": 7})}))
    assert read.extra == {"server": '{"journal": 7}'}
    again = LearnerSnapshot.from_bytes(read.to_bytes({"other": "x"}))
    assert again.extra == {"server": '{"journal": 7}', "other": "x"}
    with pytest.raises(SnapshotError, match="taken"):
        snapshot.to_bytes({"cbp": "mine"})


def test_other_tools_can_read_the_parameters(make_spec: MakeSpec) -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    learner = Learner(make_spec())
    tensors = safetensors_torch.load(learner.snapshot().to_bytes())
    assert tensors["parameters.hidden_1.weight"].shape == (7, 8)
    assert tensors["parameters.output.bias"].shape == (3,)


@pytest.fixture
def data(make_spec: MakeSpec, make_batch: MakeBatch) -> bytes:
    spec = make_spec()
    learner = Learner(spec)
    learner.train(make_batch(spec, 21))
    return learner.snapshot().to_bytes()


def test_every_truncation_is_noticed(data: bytes) -> None:
    for length in [*range(0, 40), *range(40, len(data), 97), len(data) - 1]:
        with pytest.raises(SnapshotError, match="snapshot"):
            LearnerSnapshot.from_bytes(data[:length])


def test_flipped_bits_are_noticed(data: bytes) -> None:
    """Anywhere in the contents, and in the header wherever it still is JSON and means something else."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for position in [*range(0, 8), *range(header, len(data), 101), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(SnapshotError):
            LearnerSnapshot.from_bytes(bytes(damaged))


def test_other_safetensors_files_are_refused() -> None:
    safetensors_torch = pytest.importorskip("safetensors.torch")
    with pytest.raises(SnapshotError, match="another kind"):
        LearnerSnapshot.from_bytes(safetensors_torch.save({"weight": torch.zeros(2)}))


@pytest.mark.parametrize("junk", [b"", b"\x00" * 8, b"\x02" + b"\x00" * 7 + b"[]", b"\x05" + b"\x00" * 7 + b"hello"])
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(SnapshotError, match="snapshot"):
        LearnerSnapshot.from_bytes(junk)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda snapshot: snapshot.metadata.update(format_version=99), "format version 99"),
        (lambda snapshot: snapshot.metadata.update(replacements_in_window=[1]), "Expected 2 numbers"),
        (lambda snapshot: snapshot.metadata.pop("step"), "step"),
        (lambda snapshot: snapshot.metadata["spec"].update(batch_size=-1), "batch_size"),
        (lambda snapshot: snapshot.metadata.update(replacements=[0]), "Expected 2 numbers"),
        (lambda snapshot: snapshot.tensors.pop("units.age"), "lacks the tensor 'units.age'"),
        (lambda snapshot: snapshot.tensors.update({"units.age": torch.zeros(1, 15)}), "int64"),
        (
            lambda snapshot: snapshot.tensors.update({"parameters.output.bias": torch.zeros(4)}),
            "parameters.output.bias",
        ),
        (
            lambda snapshot: snapshot.tensors.update({"generator": torch.zeros(5056, dtype=torch.uint8)}),
            "no state of a random generator",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    damage: Callable[[LearnerSnapshot], object], says: str, make_spec: MakeSpec
) -> None:
    snapshot = Learner(make_spec()).snapshot()
    damage(snapshot)
    with pytest.raises(SnapshotError, match=says):
        Learner.restore(snapshot)


def test_a_snapshot_from_before_newer_settings_is_taken(make_spec: MakeSpec, make_batch: MakeBatch) -> None:
    """What it does not name has its default, with which learners go on as they did."""
    spec = make_spec(optimizer={"kind": "sgd", "lr": 0.05, "momentum": 0.9})
    learner = Learner(spec)
    learner.train(make_batch(spec, 40))
    snapshot = learner.snapshot()
    del snapshot.metadata["replacements_in_window"]
    for setting in ("nesterov", "clip_norm"):
        del snapshot.metadata["spec"]["optimizer"][setting]
    for setting in ("strength", "max_replacements", "replacement_window"):
        del snapshot.metadata["spec"]["resets"][setting]
    restored = Learner.restore(LearnerSnapshot.from_bytes(snapshot.to_bytes()))
    for each in (learner, restored):
        each.train(make_batch(spec, 40, seed=1))
    assert_same(learner, restored)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop"])
@pytest.mark.parametrize("momenta", [(0.0, 0.5), (0.5, 0.0), (0.5, 0.0, 0.5)])
@pytest.mark.parametrize("normalization", ["none", "layer"])
def test_a_learner_whose_momentum_was_changed_can_be_saved_at_once(
    normalization: str, momenta: tuple[float, ...], kind: str, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    specs = [
        make_spec(network__normalization=normalization, optimizer={"kind": kind, "lr": 0.01, "momentum": momentum})
        for momentum in momenta
    ]
    learner = Learner(specs[0], engine="auto")
    for spec in specs:
        learner.update(spec)
        restored = Learner.restore(learner.snapshot(), engine="auto")
        for each in (learner, restored):
            each.train(make_batch(spec, 12))
        assert_same(learner, restored)
