"""UPGD (Elsayed & Mahmood 2024, *Addressing loss of plasticity and catastrophic forgetting in continual learning*)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from cbp.errors import FieldViolation, SpecError
from cbp.methods.parameters import Beside, optimized_parameters, refuse_closures
from cbp.networks import to_device
from cbp.spec.learner_spec import UpgdSpec
from cbp.units.draws import take_generator_state


class Upgd:
    """w ← w − lr · (g + ξ)(1 − Ū): useful weights keep still, useless ones are moved and perturbed.

    First order and global: u is a running average of −g·w with decay β, Ū = sigmoid(u / max u) with the maximum over
    all parameters, ξ ~ N(0, σ²). The correction 1 − βᵗ of the average is common to all weights and cancels. Inside
    `optimizer.step()` the gradient is replaced by (g + ξ)(1 − Ū), and plain SGD does the rest: its `weight_decay` is
    that of the paper's UPGD-W. A weight without utility has Ū = 1/2 and takes half the learning rate; the published
    code doubles it to make up for that, which is left to `lr` here.

    Where no utility is above 0, the maximum counts as the smallest positive number: nothing is worth keeping.

    Costs one tensor of running utilities and as many normal random numbers as parameters at every step.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, noise: float = 1e-3, decay_rate: float = 0.999, seed: int = 0
    ) -> None:
        """For the settings see `UpgdSpec`.

        Raises `SpecError` if a setting is wrong, or the optimizer is not SGD without momentum or has none of the
        module's parameters.
        """
        self._spec = UpgdSpec(noise=noise, decay_rate=decay_rate)
        if not isinstance(optimizer, SGD) or any(group["momentum"] for group in optimizer.param_groups):
            text = (
                f"UPGD is an update rule for plain gradients; use SGD without momentum, not {type(optimizer).__name__}"
            )
            raise SpecError([FieldViolation("optimizer", text)])
        self._parameters = optimized_parameters(module, optimizer)
        self._utility = Beside(self._parameters, torch.zeros_like)
        self._generator = torch.Generator().manual_seed(seed)
        self._hook = optimizer.register_step_pre_hook(self._gate)

    def step(self) -> None:
        """Nothing is left to do after the optimizer's step."""

    def state_dict(self) -> dict[str, Any]:
        """The running utilities and the generator."""
        return {"utility": self._utility.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        utility = self._utility.read_state(state, "utility")
        generator = take_generator_state(state, "generator")
        self._utility.resume(utility)
        self._generator.set_state(generator)

    def remove(self) -> None:
        """Takes the hook off the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _gate(self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closures(args, kwargs)
        largest = self._update_utilities()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            noise = torch.randn(parameter.shape, generator=self._generator, dtype=parameter.dtype)
            keeping = torch.sigmoid(self._utility[name] / largest.to(parameter.dtype))
            perturbed = parameter.grad.add_(to_device(noise, parameter.device), alpha=self._spec.noise)
            perturbed.mul_(1 - keeping)

    def _update_utilities(self) -> Tensor:
        """Returns the largest, a scalar above 0."""
        largest = []
        for name, parameter in self._parameters.items():
            utility = self._utility[name].mul_(self._spec.decay_rate)
            if parameter.grad is not None:
                utility.addcmul_(parameter.grad, parameter, value=self._spec.decay_rate - 1)
            largest.append(utility.max().to(torch.float64))
        return torch.stack(largest).max().clamp_min(torch.finfo(torch.float32).tiny)
