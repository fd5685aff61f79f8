"""Shrink and perturb (Ash & Adams 2020, *On warm-starting neural network training*)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.methods.parameters import Beside, optimized_parameters, redrawn
from cbp.saved.methods import SavedSteps
from cbp.saved.parts import read_part
from cbp.spec.learner_spec import ShrinkAndPerturbSpec
from cbp.units.draws import take_generator_state


class ShrinkAndPerturb:
    """θ ← shrink · θ + perturb · ε every `interval` steps, with ε as if the network were drawn anew.

    As in the authors' code ε has the distribution of first values, not a normal one: a bias that starts at 0 is only
    shrunk, the scale of a normalisation gains perturb · 1. The optimizer's state stays as it is. Costs one copy of the
    parameters, and as many random numbers as parameters each time.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        shrink: float,
        perturb: float,
        interval: int = 1,
        seed: int = 0,
    ) -> None:
        """For the settings see `ShrinkAndPerturbSpec`. Construct it before training: fresh values are drawn from those
        at construction.

        Raises `SpecError` if a setting is wrong or the optimizer has none of the module's parameters.
        """
        self._spec = ShrinkAndPerturbSpec(shrink=shrink, perturb=perturb, interval=interval)
        self._parameters = optimized_parameters(module, optimizer)
        self._first = Beside(self._parameters, Tensor.clone)
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0

    @torch.no_grad()
    def step(self) -> None:
        """Shrinks and perturbs if it is time; call it after `optimizer.step()`."""
        self._step += 1
        if self._step % self._spec.interval:
            return
        for name, parameter in self._parameters.items():
            noise = redrawn(self._first[name], parameter.numel(), self._generator).view(parameter.shape)
            parameter.mul_(self._spec.shrink).add_(noise, alpha=self._spec.perturb)

    def state_dict(self) -> dict[str, Any]:
        """The step, the first parameters and the generator."""
        return {"step": self._step, "first": self._first.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        saved = read_part(SavedSteps, state)
        first = self._first.read_state(state, "first")
        generator = take_generator_state(state, "generator")
        self._step = saved.step
        self._first.resume(first)
        self._generator.set_state(generator)

    def remove(self) -> None:
        """There are no hooks to take off."""
