"""What a learner asks of its engine, and the answer in eager PyTorch, on any device.

Losses and accuracies are of predictions made before the examples were learned from.

Shapes: N examples of a message, I inputs, C outputs.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbp import losses
from cbp.engines.eager_measures import measure_perceptron
from cbp.engines.learner_state import CheckedState
from cbp.engines.names import EngineName
from cbp.engines.torch_engine import StackState, TorchEngine
from cbp.examples.pending import Examples, Probe
from cbp.plasticity.samples import LayerPlasticity
from cbp.progress import Tally
from cbp.spec.learner_spec import LearnerSpec
from cbp.units.replacement import DrawSource


class Work(Protocol):
    """A message on its way through an engine; the steps are taken in the order of its examples."""

    def run(self, steps: int) -> None:
        """Takes the next steps, and shows their examples to the probe."""

    @staticmethod
    def run_together(turns: Sequence[tuple[Any, int]]) -> None:
        """Takes the next steps, so many, of works of this class and of distinct learners; what each does is what its
        own `run` does."""

    def outputs(self) -> NDArray[np.float32]:
        """[N, C] of all examples; 0 where no step was taken yet."""

    def tally(self) -> tuple[Tally, bool]:
        """Of the examples learned from so far; and whether all is finite: False if losses, parameters or the
        optimizer's state may be infinite or not numbers. Numbers that are huge but finite can make it so, too."""

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Losses [n] of the examples learned from so far, and their accuracies [n]; None for regression."""


class LearnerEngine(Protocol):
    """Takes the steps of one learner."""

    name: EngineName

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        """Takes over changed settings; the state is left as it is, but for the optimizer's record."""

    def predict(self, inputs: Tensor) -> Tensor:
        """[1, n, C] outputs for inputs [1, n, …]."""

    def reset_units(self, wanted: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """See `TorchEngine.reset_units`."""

    def begin(self, examples: Examples, step_size: int, probe: Probe) -> Work:
        """Takes up a message; nothing changes yet. The examples stay as they are until the work is done, and what comes
        of it can be asked for until the next one begins."""

    def steps_between_calls(self, step_size: int, learners: int) -> int:
        """How many steps to take at once where somebody wants to be called between those of so many learners that run
        together."""

    def measure(self, probe: Probe, between_layers: Callable[[], None] | None) -> tuple[LayerPlasticity, ...]:
        """Measures every layer on the probe; changes nothing."""


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

    def begin(self, examples: Examples, step_size: int, probe: Probe) -> Work:
        return EagerWork(self, examples, step_size, probe)

    def steps_between_calls(self, step_size: int, learners: int) -> int:
        del step_size, learners
        return 1

    def measure(self, probe: Probe, between_layers: Callable[[], None] | None) -> tuple[LayerPlasticity, ...]:
        return measure_perceptron(self.spec, self.state, probe, between_layers)


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array's own memory if it may be written to: torch warns of tensors over memory that may not."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


class SteppingEngine(Protocol):
    """Takes the steps of one learner one by one."""

    spec: LearnerSpec
    device: torch.device

    @property
    def state(self) -> CheckedState: ...

    def step(self, inputs: Tensor, targets: Tensor, scale: Tensor, outputs: Tensor) -> None:
        """See `TorchEngine.step`; inputs may have more axes."""


class EagerWork:
    def __init__(self, engine: SteppingEngine, examples: Examples, step_size: int, probe: Probe) -> None:
        self._engine = engine
        self._examples, self._step_size, self._probe = examples, step_size, probe
        self._loss = engine.spec.loss
        device, outputs = engine.device, engine.spec.network.out_features
        features = _tensor(examples.features, device).unsqueeze(0)
        targets = _tensor(examples.targets, device).unsqueeze(0)
        weights = _tensor(examples.known_weights(), device).reshape(1, -1, 1)
        scale = weights * (losses.gradient_scale(self._loss, outputs) / step_size)
        self._targets = losses.encode_targets(self._loss, targets, outputs)
        self._outputs = torch.zeros(1, len(examples), outputs, device=device)
        self._steps = _split((features, self._targets, scale, self._outputs), step_size)
        self._applied = 0
        self._read: tuple[int, NDArray[np.float64], bool] | None = None

    def run(self, steps: int) -> None:
        begin = self._applied
        try:
            for of_one_step in islice(self._steps, steps):
                self._engine.step(*of_one_step)
                self._applied += self._step_size
        finally:
            applied = slice(begin, self._applied)
            self._probe.extend(self._examples.features[applied], self._examples.targets[applied])

    @staticmethod
    def run_together(turns: Sequence[tuple["EagerWork", int]]) -> None:
        for work, steps in turns:
            work.run(steps)

    def outputs(self) -> NDArray[np.float32]:
        predicted: NDArray[np.float32] = self._outputs[0].cpu().numpy()
        return predicted

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        on_host, _ = self._measured()
        return on_host[0], on_host[1] if len(on_host) > 1 else None

    def tally(self) -> tuple[Tally, bool]:
        _, finite = self._measured()
        return Tally.of(*self.scores(), self._engine.spec.monitoring.average_decay), finite

    def _measured(self) -> tuple[NDArray[np.float64], bool]:
        """[1 or 2, n] losses and accuracies, and whether all is finite. The one place where training reads from the
        device."""
        count = self._applied
        if self._read is None or self._read[0] != count:
            outputs, targets = self._outputs[0, :count], self._targets[0, :count]
            measured = [losses.example_losses(self._loss, outputs, targets)]
            right = losses.example_accuracies(self._loss, outputs, targets)
            if right is not None:
                measured.append(right)
            # A sum passes infinities and NaN on at the price of one pass, the cheapest way to look for them.
            sums = [numbers.sum().reshape(1) for _, numbers in self._engine.state.checked_numbers()]
            read = torch.cat([*measured, *sums]).cpu().to(torch.float64).numpy()
            on_host = read[: len(measured) * count].reshape(len(measured), count)
            self._read = count, on_host, bool(np.isfinite(read).all())
        return self._read[1:]


def _split(parts: tuple[Tensor, ...], step_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """[1, N, …] tensors, step by step."""
    if not parts[0].shape[1]:
        return iter(())
    features, targets, scale, outputs = (torch.split(part, step_size, dim=1) for part in parts)
    return zip(features, targets, scale, outputs, strict=True)
