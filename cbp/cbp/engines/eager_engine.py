"""What a learner asks of its engine, and the answer in eager PyTorch, on any device.

Shapes: N examples of a message, I inputs, C outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbp import losses
from cbp.engines.torch_engine import StackState, TorchEngine
from cbp.pending import Examples
from cbp.replacement import DrawSource
from cbp.spec import LearnerSpec

EngineName = Literal["torch", "compiled", "stacked"]


@dataclass(frozen=True)
class Scores:
    """Of predictions made before the examples were learned from."""

    losses: NDArray[np.float64]
    """[n]"""
    accuracies: NDArray[np.float64] | None
    """[n]; None for regression."""
    finite: bool
    """False if losses, parameters or the optimizer's state may be infinite or not numbers; numbers that are huge but
    finite can make it so, too."""


class Work(Protocol):
    """A message on its way through an engine; the steps are taken in the order of its examples."""

    def run(self, steps: int) -> None:
        """Takes the next steps."""

    def outputs(self) -> NDArray[np.float32]:
        """[N, C] of all examples; 0 where no step was taken yet."""

    def scores(self, count: int) -> Scores:
        """Of the first examples, when they were learned from."""


class LearnerEngine(Protocol):
    """Takes the steps of one learner."""

    name: EngineName

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        """Takes over changed settings; the state is left as it is, but for the optimizer's record."""

    def predict(self, inputs: Tensor) -> Tensor:
        """[1, n, C] outputs for inputs [1, n, I]."""

    def reset_units(self, wanted: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """See `TorchEngine.reset_units`."""

    def begin(self, examples: Examples, step_size: int) -> Work:
        """Takes up a message; nothing changes yet. The examples stay as they are until the work is done."""

    def steps_between_calls(self, step_size: int) -> int:
        """How many steps to take at once where somebody wants to be called between them."""


class EagerEngine(TorchEngine):
    """One learner's steps, operation by operation."""

    name: EngineName = "torch"

    def __init__(
        self,
        spec: LearnerSpec,
        state: StackState,
        device: torch.device,
        draws: DrawSource | None = None,
        *,
        published_order: bool = False,
    ) -> None:
        super().__init__([spec], state, device, draws, published_order=published_order)
        self.spec = spec

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        super().configure(specs)
        [self.spec] = specs

    def begin(self, examples: Examples, step_size: int) -> Work:
        return EagerWork(self, examples, step_size)

    def steps_between_calls(self, step_size: int) -> int:
        del step_size
        return 1


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array's own memory if it may be written to: torch warns of tensors over memory that may not."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


class EagerWork:
    def __init__(self, engine: EagerEngine, examples: Examples, step_size: int) -> None:
        self._engine = engine
        self._loss = engine.spec.loss
        device, outputs = engine.device, engine.spec.network.out_features
        features = _tensor(examples.features, device).unsqueeze(0)
        targets = _tensor(examples.targets, device).unsqueeze(0)
        weights = _tensor(examples.weights, device).reshape(1, -1, 1)
        scale = weights * (losses.gradient_scale(self._loss, outputs) / step_size)
        self._targets = losses.encode_targets(self._loss, targets, outputs)
        self._outputs = torch.zeros(1, len(examples), outputs, device=device)
        self._steps = _split((features, self._targets, scale, self._outputs), step_size)

    def run(self, steps: int) -> None:
        for of_one_step in islice(self._steps, steps):
            self._engine.step(*of_one_step)

    def outputs(self) -> NDArray[np.float32]:
        predicted: NDArray[np.float32] = self._outputs[0].cpu().numpy()
        return predicted

    def scores(self, count: int) -> Scores:
        """The one place where training reads from the device."""
        outputs, targets = self._outputs[0, :count], self._targets[0, :count]
        measured = [losses.example_losses(self._loss, outputs, targets)]
        right = losses.example_accuracies(self._loss, outputs, targets)
        if right is not None:
            measured.append(right)
        # A sum passes infinities and NaN on at the price of one pass, which is the cheapest way to look for them.
        sums = [numbers.sum().reshape(1) for _, numbers in self._engine.state.checked_numbers()]
        read = torch.cat([*measured, *sums]).cpu().to(torch.float64).numpy()
        on_host = read[: len(measured) * count].reshape(len(measured), count)
        return Scores(on_host[0], None if right is None else on_host[1], bool(np.isfinite(read).all()))


def _split(parts: tuple[Tensor, ...], step_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """[1, N, …] tensors, step by step."""
    if not parts[0].shape[1]:
        return iter(())
    features, targets, scale, outputs = (torch.split(part, step_size, dim=1) for part in parts)
    return zip(features, targets, scale, outputs, strict=True)
