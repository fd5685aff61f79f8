"""Saved and restored is uninterrupted, bit for bit; and no part of the state could be left out of what is saved.

One suite over everything that takes steps of Continual Backprop, every optimizer and every utility.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cbp import Batch, ContinualBackprop, Learner, LearnerSnapshot, LearnerSpec
from cbp.engines.names import EngineName
from cbp.spec.learner_spec import Utility

MakeSpec = Callable[..., LearnerSpec]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.05},
    "momentum": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "nesterov": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "rmsprop": {"kind": "rmsprop", "lr": 0.005, "momentum": 0.5},
    "adam": {"kind": "adam", "lr": 0.01},
    "adamw": {"kind": "adamw", "lr": 0.01},
}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PARTS = ("optimizer", "units", "generator", "owed")
"""The state beside the weights: the optimizer's; ages, utilities and mean activations; the random numbers' source; and
the fractions of units that the rates owe."""


class Run(Protocol):
    """Something that learns a stream."""

    def learn(self, seed: int) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that decides how it goes on, by name."""

    def resumed(self, *forgotten: str) -> Self:
        """Another that goes on from what this one saved; the forgotten parts are those of a newborn."""


def examples(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 6)).astype(np.float32), random.integers(0, 3, count)


class LearnerRun:
    engine: EngineName = "torch"

    def __init__(self, spec: LearnerSpec, device: str) -> None:
        self._device = device
        self._learner = Learner(spec, device=device, engine=self.engine)

    def learn(self, seed: int) -> None:
        features, labels = examples(seed, 61)  # steps of 3: one or two examples wait when the message has ended
        self._learner.train(Batch.validate(self._learner.spec, features, labels))

    def state(self) -> dict[str, Tensor]:
        snapshot = self._learner.snapshot()
        owed = torch.tensor(snapshot.metadata["accumulated_replacements"], dtype=torch.float64)
        return snapshot.tensors | {"owed": owed}

    def resumed(self, *forgotten: str) -> Self:
        snapshot = LearnerSnapshot.from_bytes(self._learner.snapshot().to_bytes())
        newborn = Learner(self._learner.spec).snapshot()
        for name in snapshot.tensors:
            if name.split(".")[0] in forgotten:
                snapshot.tensors[name] = newborn.tensors[name]
        if "owed" in forgotten:
            snapshot.metadata["accumulated_replacements"] = newborn.metadata["accumulated_replacements"]
        run = type(self)(self._learner.spec, self._device)
        run._learner = Learner.restore(snapshot, device=self._device, engine=self.engine)
        return run


class CompiledLearnerRun(LearnerRun):
    engine: EngineName = "compiled"


class StackedLearnerRun(LearnerRun):
    engine: EngineName = "stacked"


class ModuleRun:
    """`ContinualBackprop` beside an optimizer of torch."""

    _UNITS = ("utility", "age", "mean_activation")

    def __init__(self, spec: LearnerSpec, device: str) -> None:
        self._spec, self._device = spec, device
        torch.manual_seed(0)
        self._module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).to(device)
        settings = spec.optimizer.model_dump(exclude={"kind", "beta1", "beta2", "epsilon", "clip_norm"})
        kinds: Mapping[str, Any] = {
            "sgd": torch.optim.SGD,
            "rmsprop": torch.optim.RMSprop,
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
        }
        self._optimizer = kinds[spec.optimizer.kind](self._module.parameters(), **settings)
        resets = spec.resets
        self._resets = ContinualBackprop(
            self._module,
            self._optimizer,
            replacement_rate=resets.replacement_rate,
            maturity_threshold=resets.maturity_threshold,
            decay_rate=resets.decay_rate,
            utility=resets.utility,
        )

    def learn(self, seed: int) -> None:
        features, labels = (torch.from_numpy(array).to(self._device) for array in examples(seed, 60))
        for start in range(0, 60, 3):
            step = slice(start, start + 3)
            self._optimizer.zero_grad()
            nn.functional.cross_entropy(self._module(features[step]), labels[step]).backward()
            self._optimizer.step()
            self._resets.step()

    def state(self) -> dict[str, Tensor]:
        saved = self._resets.state_dict()
        state = {f"parameters.{name}": tensor.cpu().clone() for name, tensor in self._module.state_dict().items()}
        for place, kept in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{place}.{name}": value.clone() for name, value in kept.items() if value is not None}
        state |= {f"units.{name}": saved[name] for name in self._UNITS}
        state |= {f"adam_steps.{name}": steps for name, steps in saved["adam_steps"].items()}
        owed = torch.tensor(saved["accumulated_replacements"], dtype=torch.float64)
        return state | {"generator": saved["generator"], "owed": owed}

    def resumed(self, *forgotten: str) -> "ModuleRun":
        run = ModuleRun(self._spec, self._device)
        newborn = run._resets.state_dict()
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self._module, self._optimizer, self._resets)], file)
        file.seek(0)
        module, optimizer, resets = torch.load(file)
        belongs = {"optimizer": ("adam_steps",), "units": self._UNITS, "owed": ("accumulated_replacements",)}
        for part in forgotten:
            resets |= {key: newborn[key] for key in belongs.get(part, (part,))}
        run._module.load_state_dict(module)
        if "optimizer" not in forgotten:
            run._optimizer.load_state_dict(optimizer)
        run._resets.load_state_dict(resets)
        return run


def same(one: Run, other: Run) -> bool:
    first, second = one.state(), other.state()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def furthest_weight(one: Run, other: Run) -> float:
    """The largest difference between any two parameters."""
    first, second = one.state(), other.state()
    return max(float((first[name] - second[name]).abs().max()) for name in first if name.startswith("parameters."))


@pytest.mark.parametrize(
    ("optimizer", "utility"),
    [*((optimizer, "contribution") for optimizer in OPTIMIZERS), *(("adam", utility) for utility in get_args(Utility))],
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [LearnerRun, CompiledLearnerRun, StackedLearnerRun, ModuleRun])
def test_resumed_is_uninterrupted_and_weights_alone_are_not(
    kind: Callable[[LearnerSpec, str], Run], device: str, optimizer: str, utility: str, make_spec: MakeSpec
) -> None:
    if kind is CompiledLearnerRun and device != "cpu":
        pytest.skip("the compiled engine runs on the CPU")
    spec = make_spec(
        optimizer=OPTIMIZERS[optimizer], resets__utility=utility, batch_size=3, resets__replacement_rate=0.06
    )
    uninterrupted = kind(spec, device)
    uninterrupted.learn(1)
    resumed = uninterrupted.resumed()
    lesser = {part: uninterrupted.resumed(part) for part in PARTS if (part, optimizer) != ("optimizer", "sgd")}
    weights_only = uninterrupted.resumed(*PARTS)
    for other in (resumed, weights_only, *lesser.values()):
        assert furthest_weight(uninterrupted, other) == 0.0, "all start from the same weights"

    for run in (uninterrupted, resumed, weights_only, *lesser.values()):
        run.learn(2)
        run.learn(3)

    assert same(uninterrupted, resumed)
    assert furthest_weight(uninterrupted, weights_only) > 1e-2
    for part, run in lesser.items():
        assert furthest_weight(uninterrupted, run) > 1e-3, f"{part} was forgotten, and nobody noticed"
