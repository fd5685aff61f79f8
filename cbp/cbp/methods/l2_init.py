"""L2 Init (Kumar, Marklund, Van Roy 2023, *Maintaining plasticity in continual learning via regenerative
regularization*): a penalty on the distance from the first parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.methods.parameters import Beside, optimized_parameters, refuse_closures
from cbp.spec.learner_spec import L2InitSpec


class L2Init:
    """Adds strength · (θ − θ₀) to the gradient inside `optimizer.step()`, with θ₀ the values at construction.

    The gradient of the paper's λ‖θ − θ₀‖² with strength = 2λ, so that `strength` is to θ₀ what the optimizer's
    `weight_decay` is to 0. Costs one copy of the parameters and one operation on each of them a step.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, strength: float) -> None:
        """For the setting see `L2InitSpec`. Construct it before training, or θ₀ is not the beginning.

        Raises `SpecError` if the setting is wrong or the optimizer has none of the module's parameters.
        """
        self._spec = L2InitSpec(strength=strength)
        self._parameters = optimized_parameters(module, optimizer)
        self._first = Beside(self._parameters, Tensor.clone)
        self._hook = optimizer.register_step_pre_hook(self._pull)

    def step(self) -> None:
        """Nothing is left to do after the optimizer's step."""

    def state_dict(self) -> dict[str, Any]:
        """The first parameters."""
        return {"first": self._first.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        self._first.resume(self._first.read_state(state, "first"))

    def remove(self) -> None:
        """Takes the hook off the optimizer."""
        self._hook.remove()

    @torch.no_grad()
    def _pull(self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closures(args, kwargs)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self._first[name], alpha=self._spec.strength)
