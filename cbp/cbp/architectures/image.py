"""Convolutional networks for small images.

Every operation has a deterministic gradient on every device; an adaptive pooling has none on GPUs.
"""

from collections import OrderedDict
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn

from cbp.activations import NONLINEARITIES
from cbp.spec.network_spec import Activation, ConvnetSpec, Normalization, ResnetSpec

_MOST_IN_A_GROUP = 8


def convolutional_network(network: ConvnetSpec) -> nn.Module:
    """[N, channels, height, width] to [N, C]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    into, height, width = network.input_shape
    for index, (before, channels) in enumerate(pairwise((into, *network.channels))):
        name = f"convolution_{index}"
        layers[name] = nn.Conv2d(before, channels, network.kernel_size, padding=network.kernel_size // 2)
        if network.normalization != "none":
            layers[f"{name}_normalization"] = _normalization(network.normalization, channels)
        layers[f"{name}_activation"] = _activation(network.activation)
        if network.pooling > 1:
            layers[f"{name}_pooling"] = nn.MaxPool2d(network.pooling)
            height, width = height // network.pooling, width // network.pooling
    layers["flattening"] = nn.Flatten()
    into = network.channels[-1] * height * width
    for index, units in enumerate(network.hidden):
        layers[f"linear_{index}"] = nn.Linear(into, units)
        layers[f"linear_{index}_activation"] = _activation(network.activation)
        into = units
    layers["output"] = nn.Linear(into, network.out_features)
    return nn.Sequential(layers)


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of one pixel where shapes differ."""

    def __init__(self, into: int, channels: int, stride: int, network: ResnetSpec) -> None:
        super().__init__()
        bias = network.normalization == "none"
        self.convolution_0 = nn.Conv2d(into, channels, 3, stride, padding=1, bias=bias)
        self.normalization_0 = _normalization(network.normalization, channels)
        self.activation = _activation(network.activation)
        self.convolution_1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.normalization_1 = _normalization(network.normalization, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or into != channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    convolution=nn.Conv2d(into, channels, 1, stride, bias=bias),
                    normalization=_normalization(network.normalization, channels),
                )
            )

    def forward(self, images: Tensor) -> Tensor:
        within = self.activation(self.normalization_0(self.convolution_0(images)))
        added: Tensor = self.normalization_1(self.convolution_1(within)) + self.shortcut(images)
        activated: Tensor = self.activation(added)
        return activated


class _MeanOverPositions(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.mean(images, dim=(2, 3))


def residual_network(network: ResnetSpec) -> nn.Module:
    """[N, channels, height, width] to [N, C]."""
    first = network.channels[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(network.in_channels, first, 3, padding=1, bias=network.normalization == "none"),
        stem_normalization=_normalization(network.normalization, first),
        stem_activation=_activation(network.activation),
    )
    into = first
    for stage, channels in enumerate(network.channels):
        for block in range(network.blocks):
            stride = 2 if stage and not block else 1
            layers[f"stage_{stage}_block_{block}"] = _ResidualBlock(into, channels, stride, network)
            into = channels
    layers["mean"] = _MeanOverPositions()
    layers["output"] = nn.Linear(into, network.out_features)
    return nn.Sequential(layers)


def _activation(activation: Activation) -> nn.Module:
    return NONLINEARITIES[activation].module()


def _normalization(kind: Normalization, channels: int) -> nn.Module:
    match kind:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            size = gcd(channels, _MOST_IN_A_GROUP)
            return nn.GroupNorm(channels // size if size > 1 else 1, channels)
