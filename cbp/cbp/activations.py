"""The hidden units' nonlinearities, each with its closed-form derivative."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from cbp.spec.learner_spec import Activation

_LEAKY_SLOPE = 0.01
_ELU_ALPHA = 1.0
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946
_RELU_GAIN = math.sqrt(2.0)

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Nonlinearity:
    apply: Callable[[Tensor], Tensor]
    """Activations from pre-activations."""
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Gradient in the pre-activations, from (gradient in the activations, pre-activations, activations)."""
    gain: float
    """Factor of the Kaiming and Xavier bounds, as in PyTorch; SiLU, ELU and GELU use that of ReLU."""
    module: type[nn.Module]
    """The layer that computes the same by default."""
    saturated_outside: tuple[float, float] | None = None
    """Activations beyond these bounds count as saturated; None where nothing bounds them. Sigmoid's are tanh's, since
    tanh(x) = 2 sigmoid(2x) − 1."""


NONLINEARITIES: Mapping[Activation, Nonlinearity] = MappingProxyType(
    {
        "relu": Nonlinearity(
            apply=torch.relu,
            backward=lambda gradient, _pre, post: _aten.threshold_backward(gradient, post, 0),
            gain=_RELU_GAIN,
            module=nn.ReLU,
        ),
        "leaky_relu": Nonlinearity(
            apply=lambda pre: torch.nn.functional.leaky_relu(pre, _LEAKY_SLOPE),
            backward=lambda gradient, pre, _post: _aten.leaky_relu_backward(gradient, pre, _LEAKY_SLOPE, False),
            gain=math.sqrt(2.0 / (1.0 + _LEAKY_SLOPE**2)),
            module=nn.LeakyReLU,
        ),
        "elu": Nonlinearity(
            apply=torch.nn.functional.elu,
            backward=lambda gradient, pre, _post: _aten.elu_backward(gradient, _ELU_ALPHA, 1.0, 1.0, False, pre),
            gain=_RELU_GAIN,
            module=nn.ELU,
        ),
        "selu": Nonlinearity(
            apply=torch.selu,
            backward=lambda gradient, pre, _post: _aten.elu_backward(
                gradient, _SELU_ALPHA, _SELU_SCALE, 1.0, False, pre
            ),
            gain=1.0,
            module=nn.SELU,
        ),
        "gelu": Nonlinearity(
            apply=torch.nn.functional.gelu,
            backward=lambda gradient, pre, _post: _aten.gelu_backward(gradient, pre, approximate="none"),
            gain=_RELU_GAIN,
            module=nn.GELU,
        ),
        "silu": Nonlinearity(
            apply=torch.nn.functional.silu,
            backward=lambda gradient, pre, _post: _aten.silu_backward(gradient, pre),
            gain=_RELU_GAIN,
            module=nn.SiLU,
        ),
        "tanh": Nonlinearity(
            apply=torch.tanh,
            backward=lambda gradient, _pre, post: _aten.tanh_backward(gradient, post),
            gain=5.0 / 3.0,
            module=nn.Tanh,
            saturated_outside=(-0.9, 0.9),
        ),
        "sigmoid": Nonlinearity(
            apply=torch.sigmoid,
            backward=lambda gradient, _pre, post: _aten.sigmoid_backward(gradient, post),
            gain=1.0,
            module=nn.Sigmoid,
            saturated_outside=(0.05, 0.95),
        ),
        "identity": Nonlinearity(
            apply=lambda pre: pre,
            backward=lambda gradient, _pre, _post: gradient,
            gain=1.0,
            module=nn.Identity,
        ),
    }
)
