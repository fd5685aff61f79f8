"""What a network takes, before it is built: found on a module that has shapes but no memory."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cbp.architectures.building import Network, assemble, found_units
from cbp.errors import FieldViolation, SpecError
from cbp.spec.network_spec import AnyNetwork, RegisteredSpec

LARGEST_NETWORK = 2**31
"""Parameters; a server allows far fewer."""


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """Counts of one network."""

    parameters: int
    multiplications: int
    """For one example, forwards."""
    activation_values: int
    """Values that layers give for one example, all together."""
    hidden_units: tuple[int, ...]
    """Per group of units that can be reset."""


@lru_cache(maxsize=1024)
def profile_of(kind: type[AnyNetwork], plain: str) -> NetworkProfile:
    """Of the network that the JSON describes. Raises `SpecError` if it cannot be built, or is too large to be seen."""
    network = kind.model_validate_json(plain)
    try:
        with torch.device("meta"):
            module = assemble(network)
    except RuntimeError as error:  # sizes whose product no integer holds
        raise _unfit(network, f"It is too large: {error}") from error
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if parameters > LARGEST_NETWORK:
        raise _unfit(
            network, f"It has {parameters} parameters, at most {LARGEST_NETWORK} are possible; make it narrower"
        )
    # Batch normalisation needs two examples where there is but one position.
    examples = 2 if network.normalizes_batches else 1
    values, multiplications = _passed(network, module, examples)
    return NetworkProfile(
        parameters=parameters,
        multiplications=max(multiplications // examples, parameters),
        activation_values=values // examples,
        hidden_units=tuple(group.units for group in found_units(network, module).groups),
    )


def _passed(network: AnyNetwork, module: Network, examples: int) -> tuple[int, int]:
    """Values that layers give, and multiplications, in a forward pass of so many examples."""
    values = 0

    def count(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, Tensor) else 0

    hooks = [
        layer.register_forward_hook(count) for layer in module.modules() if not any(True for _ in layer.children())
    ]
    shape = (examples, *network.input_shape)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = module(torch.zeros(shape, device="meta"))
    except Exception as error:  # an operator's code may raise anything
        raise _unfit(network, f"It does not take examples {list(shape)}: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if tuple(outputs.shape) != (examples, network.out_features):
        raise _unfit(network, f"It gives {list(outputs.shape)} where [N, {network.out_features}] is expected")
    return max(values - prod(outputs.shape), 0), counter.get_total_flops() // 2


def _unfit(network: AnyNetwork, description: str) -> SpecError:
    field = "network.name" if isinstance(network, RegisteredSpec) else "network"
    return SpecError([FieldViolation(field, description)])
