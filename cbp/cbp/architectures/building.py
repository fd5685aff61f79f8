"""From the record of a network to a module, its first values drawn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbp.architectures import image, perceptron, transformer
from cbp.architectures.inputs import ColumnTokens, EmbeddedTokens, all_inputs, running_normalization, tabular_inputs
from cbp.errors import FieldViolation, SpecError
from cbp.networks import initial_bound
from cbp.spec.network_spec import (
    AnyNetwork,
    ConvnetSpec,
    LinearSpec,
    MlpSpec,
    RegisteredSpec,
    ResnetSpec,
    TransformerSpec,
)
from cbp.units.discovery import Discovery, discover_units

ENTRY_POINT_GROUP = "cbp.networks"
"""Entry points are functions (shape of one example, number of outputs, settings by name) -> module, which takes float32
examples [N, *shape], gives [N, outputs], and starts from first values drawn from torch's own generator."""
LARGEST_NETWORK = 2**31
"""Parameters; a server allows far fewer."""
_EMBEDDING_DEVIATION = 0.02
"""Of the normal distribution of embeddings' first values; that of Radford et al. 2018."""


class Network(nn.Module):
    """[N, …] float32 examples to [N, C] outputs."""

    def __init__(self, inputs: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        """What has no units that could be reset."""
        self.body = body

    def forward(self, examples: Tensor) -> Tensor:
        outputs: Tensor = self.body(self.inputs(examples))
        return outputs


def assemble(network: AnyNetwork) -> Network:
    """The module, with whatever first values its layers draw. Raises `SpecError` if there is no such architecture."""
    inputs = network.inputs
    match network:
        case MlpSpec():
            return Network(tabular_inputs(network.in_features, inputs), perceptron.multilayer_perceptron(network))
        case LinearSpec():
            return Network(tabular_inputs(network.in_features, inputs), perceptron.linear_network(network))
        case ConvnetSpec():
            return Network(
                running_normalization(inputs, network.in_channels, axis=1), image.convolutional_network(network)
            )
        case ResnetSpec():
            return Network(running_normalization(inputs, network.in_channels, axis=1), image.residual_network(network))
        case TransformerSpec():
            return Network(_token_inputs(network), transformer.TransformerEncoder(network))
        case RegisteredSpec():
            return Network(nn.Identity(), _registered(network))


def _token_inputs(network: TransformerSpec) -> nn.Module:
    match network.input:
        case "tokens":
            return EmbeddedTokens(network.vocabulary, network.width)
        case "sequence":
            normalization = running_normalization(network.inputs, network.in_features, axis=2)
            return all_inputs([normalization, nn.Linear(network.in_features, network.width)])
        case "tabular":
            return ColumnTokens(network.in_features, network.inputs, network.width)


def _registered(network: RegisteredSpec) -> nn.Module:
    found = entry_points(group=ENTRY_POINT_GROUP)
    if network.name not in found.names:
        installed = ", ".join(sorted(found.names)) or "none"
        text = f"No architecture {network.name!r} is installed here; there are {installed}"
        raise SpecError([FieldViolation("network.name", text)])
    try:
        architecture: Callable[..., Any] = found[network.name].load()
        module = architecture(network.shape, network.out_features, dict(network.settings))
        if not isinstance(module, nn.Module):
            raise TypeError(f"it made a {type(module).__name__}, no torch.nn.Module")
    except Exception as error:  # an operator's code may raise anything
        text = f"The architecture {network.name!r} could not be built: {type(error).__name__}: {error}"
        raise SpecError([FieldViolation("network.settings", text)]) from error
    return module


def found_units(network: AnyNetwork, module: Network) -> Discovery:
    """The groups of units that can be reset: `hidden_0`, `hidden_1`, …

    Raises `SpecError` if a registered architecture cannot be traced.
    """
    # PyTorch's own distribution for a registered one, which draws its first weights itself.
    initializer = "default" if isinstance(network, RegisteredSpec) else network.initializer
    return discover_units(module.body, lambda _parameter: True, initializer)


def build(network: AnyNetwork, seed: int) -> Network:
    """The module of a newborn, on the CPU: what is reset is drawn as a reset draws it, biases are 0.

    Layers that are not reset draw from the initialiser's range for linear ones, embeddings from a normal distribution.
    A registered architecture keeps the values that its layers draw. Raises `SpecError` if it cannot be built.
    """
    if not isinstance(network, RegisteredSpec) and network.parameter_count > LARGEST_NETWORK:
        text = f"It has {network.parameter_count} parameters, at most {LARGEST_NETWORK} are possible; make it narrower"
        raise SpecError([FieldViolation("network", text)])
    with own_random_numbers(seed):
        module = assemble(network)
        if not isinstance(network, RegisteredSpec):
            _draw_first_values(network, module)
    return module


@contextmanager
def own_random_numbers(seed: int, devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Lets torch's own generators start from a seed, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def seeds_of(seed: int, *moment: int) -> tuple[int, int]:
    """Of first values and of what is drawn later, which must not be the same numbers."""
    first, later = np.random.SeedSequence((seed, *moment)).generate_state(2, np.uint64).tolist()
    return first >> 1, later >> 1


@torch.no_grad()
def _draw_first_values(
    network: MlpSpec | LinearSpec | ConvnetSpec | ResnetSpec | TransformerSpec, module: Network
) -> None:
    bounds: dict[nn.Module, float] = {}
    for group in found_units(network, module).groups:
        bounds |= {part.layer: part.bound for part in group.incoming}
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            positions = layer.weight[0, 0].numel()
            out, into = layer.weight.shape[:2]
            linear = initial_bound(network.initializer, None, into * positions, out * positions)
            bound = bounds.get(layer, linear)
            layer.weight.uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(std=_EMBEDDING_DEVIATION)
