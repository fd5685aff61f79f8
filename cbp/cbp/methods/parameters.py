"""What methods that act on single parameters share: which these are, and tensors beside them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.errors import CbpError, FieldViolation, SnapshotError, SpecError
from cbp.networks import to_device
from cbp.serialization import FINITE, Numbers
from cbp.units.optimizer_slots import take_tensors


def optimized_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The module's parameters that the optimizer moves, by name. Raises `SpecError` if there are none."""
    moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: parameter for name, parameter in module.named_parameters() if parameter in moved}
    if not found:
        raise SpecError([FieldViolation("optimizer", "It has none of the module's parameters; give it those")])
    return found


def refuse_closures(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """For hooks that change gradients before the step: a closure would make them anew. Raises `CbpError`.

    The arguments are those of the optimizer's hooks; the first one is the optimizer itself.
    """
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise CbpError(
            "optimizer.step() was given a closure, whose gradients no method sees; call backward() before it"
        )


class Beside:
    """One tensor for each of some parameters, of its shape and dtype, on its device."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], make: Callable[[Tensor], Tensor]) -> None:
        """`make` gives the first tensor beside a parameter."""
        self._parameters = dict(parameters)
        self._values = {name: make(parameter.detach()) for name, parameter in parameters.items()}

    def __getitem__(self, name: str) -> Tensor:
        value, device = self._values[name], self._parameters[name].device
        if value.device != device:
            value = self._values[name] = value.to(device)
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, by parameter."""
        return {name: self[name].clone() for name in self._values}

    def read_state(self, state: Mapping[str, Any], part: str, numbers: Numbers | None = FINITE) -> dict[str, Tensor]:
        """What `state_dict` returned and is this part of a state, for `resume`. Raises `SnapshotError` if it does not
        fit, or has other numbers."""
        read = take_tensors(state, part, self._parameters, numbers)
        if missing := [name for name in self._parameters if name not in read]:
            raise SnapshotError.of([FieldViolation(f"{part}.{missing[0]}", "Field required")])
        return read

    def resume(self, values: dict[str, Tensor]) -> None:
        self._values = values


def redrawn(first: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count] values from the distribution that the first values of a parameter came from, on their device.

    Each is one of the first values, drawn with replacement. So whatever a layer starts with is met, without knowing
    the layer: a uniform distribution, zeros of a bias, ones of a normalisation. The generator is on the CPU.
    """
    chosen = torch.randint(first.numel(), (count,), generator=generator)
    return first.flatten()[to_device(chosen, first.device)]
