"""What a registered architecture takes: measured on a module that has shapes but no memory."""

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cbp.architectures.building import LARGEST_NETWORK, Network, assemble, found_units
from cbp.errors import FieldViolation, SpecError
from cbp.spec.network_profile import NetworkProfile
from cbp.spec.network_spec import RegisteredSpec


@lru_cache(maxsize=1024)
def measure(network: RegisteredSpec) -> NetworkProfile:
    """Raises `SpecError` if it cannot be built, or is too large."""
    try:
        with torch.device("meta"):
            module = assemble(network)
    except RuntimeError as error:  # sizes whose product no integer holds
        raise _unfit(f"It is too large: {error}") from error
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if parameters > LARGEST_NETWORK:
        raise _unfit(f"It has {parameters} parameters, at most {LARGEST_NETWORK} are possible; make it narrower")
    values, multiplications = _passed(network, module)
    return NetworkProfile(
        parameters=parameters,
        multiplications=max(multiplications, parameters),
        activation_values=values,
        hidden_units=tuple(group.units for group in found_units(network, module).groups),
    )


def _passed(network: RegisteredSpec, module: Network) -> tuple[int, int]:
    """Values that layers but the last give, and multiplications, in a forward pass of one example."""
    values = 0

    def count(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, Tensor) else 0

    hooks = [
        layer.register_forward_hook(count) for layer in module.modules() if not any(True for _ in layer.children())
    ]
    shape = (1, *network.input_shape)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = module(torch.zeros(shape, device="meta"))
    except Exception as error:  # an operator's code may raise anything
        raise _unfit(f"It does not take examples {list(shape)}: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if tuple(outputs.shape) != (1, network.out_features):
        raise _unfit(f"It gives {list(outputs.shape)} where [N, {network.out_features}] is expected")
    return max(values - prod(outputs.shape), 0), counter.get_total_flops() // 2


def _unfit(description: str) -> SpecError:
    return SpecError([FieldViolation("network.name", description)])
