"""The multilayer perceptron: its parameters, their first values, the forward pass and the gradient.

Shapes: L learners of one architecture, B examples in a step, U hidden units in all hidden layers together,
P parameters of one learner; `in` and `out` are the widths around one linear layer.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from cbp.activations import NONLINEARITIES, Nonlinearity
from cbp.spec.learner_spec import Activation, Initializer, MlpSpec


@dataclass(frozen=True, kw_only=True)
class LinearLayers:
    """One value per parameter of a stack of linear layers: the parameters themselves, or what goes with them."""

    weights: tuple[Tensor, ...]
    """Per layer [L, out, in]."""
    biases: tuple[Tensor | None, ...]
    """Per layer [L, out]; None where a layer has no bias."""


@dataclass(frozen=True, kw_only=True)
class FlatLayers(LinearLayers):
    """Linear layers whose values lie in one tensor, so that one operation reaches them all."""

    flat: Tensor
    """[L, P]; `weights` and `biases` are views of it."""
    biases: tuple[Tensor, ...]
    """Per layer [L, out]; every layer has one."""


_ROW_ALIGNMENT = 32
"""Floats. Where a row begins in memory decides how products and vector instructions take it apart, and so how they
round; all learners of a stack begin alike."""


_WORTH_HUGE_PAGES = 8 * 2**20
"""Bytes; four huge pages."""


def flat_layers(network: MlpSpec, learners: int, device: torch.device) -> FlatLayers:
    """Zeros for every parameter."""
    shapes = layer_shapes(network)
    count = sum(out * (into + 1) for out, into in shapes)
    room = -(-count // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    flat = _zeros(learners * room, device).view(learners, room)[:, :count]
    weights, biases = [], []
    start = 0
    for out, into in shapes:
        weights.append(flat[:, start : start + out * into].view(learners, out, into))
        start += out * into
        biases.append(flat[:, start : start + out])
        start += out
    return FlatLayers(flat=flat, weights=tuple(weights), biases=tuple(biases))


def _zeros(count: int, device: torch.device) -> Tensor:
    """[count]; many of them in huge pages, where the host has such: steps of a large network go through all of its
    memory, and with small pages spend a twelfth of their time on finding it."""
    size = 4 * count
    if device.type != "cpu" or size < _WORTH_HUGE_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zeros
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def laid_out(layers: FlatLayers, turned: Sequence[bool]) -> FlatLayers:
    """The same layers in the same memory, where the weights of turned ones now lie [L, in, out] and of others
    [L, out, in]; `weights` shows all of them as [L, out, in]."""
    weights = []
    start = 0
    for weight, turn in zip(layers.weights, turned, strict=True):
        learners, out, into = weight.shape
        if weight.stride(1 if turn else 2) != 1:
            values = weight.clone()
            room = layers.flat[:, start : start + out * into]
            weight = room.view(learners, into, out).mT if turn else room.view(learners, out, into)
            weight.copy_(values)
        weights.append(weight)
        start += out * (into + 1)
    return FlatLayers(flat=layers.flat, weights=tuple(weights), biases=layers.biases)


def layer_shapes(network: MlpSpec) -> list[tuple[int, int]]:
    """(out, in) of every linear layer."""
    widths = (network.in_features, *network.hidden, network.out_features)
    return [(out, into) for into, out in pairwise(widths)]


def initial_bound(initializer: Initializer, activation: Activation | None, fan_in: int, fan_out: int) -> float:
    """The b of the U(−b, b) from which incoming weights are drawn; activation None is a linear output layer."""
    gain = 1.0 if activation is None else NONLINEARITIES[activation].gain
    if activation == "selu" and initializer == "kaiming":
        initializer = "lecun"  # self-normalisation needs a variance of 1/fan_in (Klambauer et al. 2017)
    match initializer:
        case "kaiming":
            return gain * math.sqrt(3.0 / fan_in)
        case "xavier":
            return gain * math.sqrt(6.0 / (fan_in + fan_out))
        case "lecun":
            return math.sqrt(3.0 / fan_in)
        case "default":
            return math.sqrt(1.0 / fan_in)


def initial_bounds(network: MlpSpec) -> tuple[float, ...]:
    """The bound of every layer, output layer last."""
    *hidden, last = layer_shapes(network)
    bounds = [initial_bound(network.initializer, network.plain_activation, into, out) for out, into in hidden]
    return (*bounds, initial_bound(network.initializer, None, last[1], last[0]))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; neither host nor device waits for the other."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class ForwardPass:
    """What the backward pass needs from the forward pass."""

    pre_activations: list[Tensor]
    """Per hidden layer [L, B, units]."""
    activations: list[Tensor]
    """Per hidden layer [L, B, units]."""
    outputs: Tensor
    """[L, B, C]"""


class Mlp:
    """Forward and backward pass over given parameters; holds no state of its own."""

    def __init__(self, activation: Activation) -> None:
        self._nonlinearity: Nonlinearity = NONLINEARITIES[activation]

    def forward(self, parameters: FlatLayers, inputs: Tensor, outputs: Tensor | None = None) -> ForwardPass:
        """inputs [L, B, in]; the result's outputs are written into `outputs` [L, B, C] if given."""
        pre_activations, activations = [], []
        apply = self._nonlinearity.apply
        layer_input = inputs
        for weight, bias in zip(parameters.weights[:-1], parameters.biases[:-1], strict=True):
            pre = _affine(weight, bias, layer_input)
            layer_input = apply(pre)
            pre_activations.append(pre)
            activations.append(layer_input)
        outputs = _affine(parameters.weights[-1], parameters.biases[-1], layer_input, outputs)
        return ForwardPass(pre_activations, activations, outputs)

    def backward(
        self,
        parameters: FlatLayers,
        inputs: Tensor,
        passed: ForwardPass,
        output_gradient: Tensor,
        gradient: FlatLayers,
        deltas: list[Tensor] | None = None,
    ) -> None:
        """Writes the gradient, summed over the examples, into `gradient`. output_gradient [L, B, C].

        `deltas` gets each layer's gradient in its pre-activations [L, B, out], output layer first.
        """
        delta = output_gradient
        for layer in range(len(parameters.weights) - 1, -1, -1):
            if deltas is not None:
                deltas.append(delta)
            layer_input = passed.activations[layer - 1] if layer else inputs
            torch.bmm(delta.transpose(1, 2), layer_input, out=gradient.weights[layer])
            torch.sum(delta, dim=1, out=gradient.biases[layer])
            if layer:
                delta = self._nonlinearity.backward(
                    torch.bmm(delta, parameters.weights[layer]),
                    passed.pre_activations[layer - 1],
                    passed.activations[layer - 1],
                )


def _affine(weight: Tensor, bias: Tensor, layer_input: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), layer_input, weight.transpose(1, 2), out=out)
