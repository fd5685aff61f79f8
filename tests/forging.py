"""Snapshots with one thing in them replaced by another, as anybody can make them who has a file and a text editor."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from network_kinds import METHODS, NETWORKS, OPTIMIZERS, plain_spec
from torch import Tensor

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec

_MISSING = object()
_DEEP: Any = "bottom"
for _ in range(600):
    _DEEP = [_DEEP]

VALUES: dict[str, Any] = {
    "missing": _MISSING,
    "null": None,
    "true": True,
    "false": False,
    "text": "nonsense",
    "number as text": "1",
    "no text": "",
    "unprintable text": "a\n\x00\ud800",
    "long text": "x" * 5000,
    "list": [1],
    "empty list": [],
    "long list": [0] * 3000,
    "object": {"a": 1},
    "empty object": {},
    "tensor": {"tensor": "generator"},
    "nested": _DEEP,
    "-1": -1,
    "0": 0,
    "1": 1,
    "7": 7,
    "0.5": 0.5,
    "-0.5": -0.5,
    "2**31": 2**31,
    "2**63 - 1": 2**63 - 1,
    "2**63": 2**63,
    "10**30": 10**30,
    "10**400": 10**400,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e39": 1e39,
    "1e308": 1e308,
}
"""What a leaf of the metadata is replaced by."""

_PLAIN_MLP = {"kind": "mlp", "in_features": 5, "hidden": [8, 7], "out_features": 3}
_WITH_UNITS = "mlp with layer normalization"


def _plain(**changes: Any) -> dict[str, Any]:
    return plain_spec("linear", **{"network": _PLAIN_MLP, **changes})


SPECS: dict[str, dict[str, Any]] = {
    **{f"mlp, {name}": _plain(optimizer=optimizer) for name, optimizer in OPTIMIZERS.items()},
    "mlp, random utility, wide": _plain(
        network={**_PLAIN_MLP, "hidden": [140, 6]},
        optimizer=OPTIMIZERS["sgd"],
        batch_size=1,
        resets={"utility": "random", "replacement_rate": 0.01, "maturity_threshold": 2, "max_replacements": 2},
    ),
    "mlp, regression": _plain(loss="mse"),
    "mlp, bits": _plain(loss="binary_cross_entropy"),
    "mlp, any step": _plain(batch_size=0),
    **{name: plain_spec(name) for name in NETWORKS},
    **{f"{_WITH_UNITS}, {name}": plain_spec(_WITH_UNITS, **method) for name, method in METHODS.items()},
}
"""Every kind of network and loss that a snapshot can be of, each optimizer, each method."""


def batch_of(spec: LearnerSpec, count: int, seed: int = 0, task: str = "") -> Batch:
    """Random examples that fit the specification."""
    random = np.random.default_rng(seed)
    network, loss = spec.network, spec.loss.kind
    features: Any = random.normal(size=(count, *network.input_shape))
    if network.vocabulary_size is not None:
        features = random.integers(0, network.vocabulary_size, size=features.shape)
    for column in network.inputs.columns:
        features[:, column.column] = random.integers(0, 4, count)
    targets: Any = random.random((count, network.out_features))
    if loss == "cross_entropy":
        targets = random.integers(0, network.out_features, count)
    return Batch.validate(spec, features, targets, random.random(count), task)


def good_snapshot(plain: dict[str, Any], engine: Any = "auto") -> LearnerSnapshot:
    """Of a learner of three tasks, with examples that wait and units that were replaced."""
    spec = LearnerSpec.parse(plain)
    learner = Learner(spec, engine=engine)
    for seed, task in enumerate(("first", "second", "")):
        learner.train(batch_of(spec, 17, seed, task))
    return learner.snapshot()


@dataclass(frozen=True)
class Forgery:
    """One change of a snapshot."""

    place: str
    """What is replaced; a path in the metadata, or a tensor's name."""
    by: str
    change: Callable[[LearnerSnapshot], LearnerSnapshot]

    def __str__(self) -> str:
        return f"{self.place} ← {self.by}"


def forgeries(snapshot: LearnerSnapshot) -> list[Forgery]:
    """All that there are of it, in one order."""
    return [*_of_metadata(snapshot), *_of_tensors(snapshot)]


def _of_metadata(snapshot: LearnerSnapshot) -> Iterator[Forgery]:
    for path in paths(snapshot.metadata):
        name = ".".join(map(str, path)) or "metadata"
        for by, value in VALUES.items():

            def change(whole: LearnerSnapshot, path: tuple[Any, ...] = path, value: Any = value) -> LearnerSnapshot:
                return replace(whole, metadata=replaced(whole.metadata, path, value))

            if path or isinstance(value, dict):
                yield Forgery(name, by, change)

        def stranger(whole: LearnerSnapshot, path: tuple[Any, ...] = path) -> LearnerSnapshot:
            metadata = copy.deepcopy(whole.metadata)
            _at(metadata, path)["stranger"] = 1
            return replace(whole, metadata=metadata)

        if isinstance(_at(snapshot.metadata, path), dict):
            yield Forgery(name, "one key more", stranger)


def _of_tensors(snapshot: LearnerSnapshot) -> Iterator[Forgery]:
    for name in snapshot.tensors:
        for by, make in _TENSORS.items():

            def change(
                whole: LearnerSnapshot, name: str = name, make: Callable[[Tensor], Tensor | None] = make
            ) -> LearnerSnapshot:
                made = make(whole.tensors[name].clone())
                others = {other: value for other, value in whole.tensors.items() if other != name}
                return replace(whole, tensors=others if made is None else {**others, name: made})

            yield Forgery(name, by, change)
    yield Forgery(
        "tensors", "one more", lambda whole: replace(whole, tensors={**whole.tensors, "stranger": torch.zeros(3)})
    )


def _held(value: float, dtype: torch.dtype) -> float:
    """The value, or what of this type comes near it."""
    if dtype.is_floating_point:
        return value
    limits = torch.iinfo(dtype)
    return int(min(max(value, limits.min), limits.max)) if not math.isnan(value) else limits.max


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """Its last element is this."""

    def make(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1)
        flat[-1:] = _held(value, tensor.dtype)
        return flat.view(tensor.shape)

    return make


def _every(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.fill_(_held(value, tensor.dtype))


_TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda _: None,
    "empty": lambda tensor: tensor.reshape(-1)[:0],
    "no rows": lambda tensor: tensor[:0] if tensor.dim() else tensor.reshape(1)[:0],
    "one row more": lambda tensor: torch.cat([tensor.reshape(-1), torch.zeros(1, dtype=tensor.dtype)]),
    "one axis more": lambda tensor: tensor.unsqueeze(0),
    "a scalar": lambda tensor: torch.zeros((), dtype=tensor.dtype),
    "a hundred rows": lambda tensor: torch.zeros((100, *tensor.shape[1:]), dtype=tensor.dtype),
    "turned": lambda tensor: tensor.mT.contiguous() if tensor.dim() > 1 else tensor.flip(0) if tensor.dim() else tensor,
    "float32": lambda tensor: tensor.to(torch.float32) if tensor.dtype is not torch.float32 else None,
    "int64": lambda tensor: tensor.to(torch.int64) if tensor.dtype is not torch.int64 else None,
    "uint8": lambda tensor: tensor.to(torch.uint8) if tensor.dtype is not torch.uint8 else None,
    **{
        f"one is {value}": _filled(value)
        for value in (-1, 0.5, 3, 50, 2.0**31, 1e9, 2.0**62, 3e38, math.nan, math.inf, -math.inf)
    },
    **{f"all are {value}": _every(value) for value in (-1, 0, 1, 255, math.nan)},
}


def paths(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """To everything in it, and itself."""
    yield path
    entries = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list | tuple) else ()
    for key, value in entries:
        yield from paths(value, (*path, key))


def _at(plain: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def replaced(plain: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(plain)
    parent = _at(changed, path[:-1])
    if value is not _MISSING:
        parent[path[-1]] = value
    else:
        del parent[path[-1]]
    return changed
