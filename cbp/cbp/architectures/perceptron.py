"""Linear layers, with layer normalisation and with activations that the engines for stacks do not have."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from cbp.activations import NONLINEARITIES
from cbp.spec.network_spec import LinearSpec, MlpSpec


class Crelu(nn.Module):
    """relu(z) and relu(−z), side by side along the last axis (Shang et al. 2016, concatenated ReLU)."""

    def forward(self, values: Tensor) -> Tensor:
        negative = torch.relu(-values)  # first: what is found last is the activation that the units count as having
        return torch.cat([torch.relu(values), negative], dim=-1)


def linear_network(network: LinearSpec) -> nn.Module:
    """[N, D] to [N, C]."""
    return nn.Sequential(OrderedDict(output=nn.Linear(network.inputs.width(network.in_features), network.out_features)))


def multilayer_perceptron(network: MlpSpec) -> nn.Module:
    """[N, D] to [N, C], with layers `hidden_0`, `hidden_0_normalization`, `hidden_0_activation`, …, `output`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    into = network.inputs.width(network.in_features)
    for index, units in enumerate(network.hidden):
        layers[f"hidden_{index}"] = nn.Linear(into, units)
        if network.normalization == "layer":
            layers[f"hidden_{index}_normalization"] = nn.LayerNorm(units)
        crelu = network.activation == "crelu"
        layers[f"hidden_{index}_activation"] = Crelu() if crelu else NONLINEARITIES[network.plain_activation].module()
        into = 2 * units if crelu else units
    layers["output"] = nn.Linear(into, network.out_features)
    return nn.Sequential(layers)
