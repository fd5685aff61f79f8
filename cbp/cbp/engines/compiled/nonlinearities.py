"""The hidden units' nonlinearities and their derivatives, in place."""

import math

import numpy as np

from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.table import (
    ELU,
    GELU,
    HALF,
    LEAKY_RELU,
    ONE,
    RELU,
    SELU,
    SIGMOID,
    SILU,
    TANH,
    ZERO,
    Floats,
    Number,
)

_LEAKY_SLOPE = np.float32(0.01)
_SELU_ALPHA_SCALE = np.float32(1.6732632423543772848170429916717 * 1.0507009873554804934193349852946)
_SELU_SCALE = np.float32(1.0507009873554804934193349852946)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_DENSITY_SCALE = np.float32(1.0 / math.sqrt(2.0 * math.pi))


@exactly
def activate(kind: int, pre: Floats, post: Floats) -> None:
    """post ← activations of pre; a NaN stays one."""
    count = len(pre)
    if kind == RELU:
        for k in range(count):
            value = pre[k]
            post[k] = ZERO if value <= ZERO else value
    elif kind == LEAKY_RELU:
        for k in range(count):
            value = pre[k]
            post[k] = value if value > ZERO else value * _LEAKY_SLOPE
    elif kind == ELU:
        for k in range(count):
            value = pre[k]
            post[k] = value if value > ZERO else np.float32(math.expm1(value))
    elif kind == SELU:
        for k in range(count):
            value = pre[k]
            post[k] = value * _SELU_SCALE if value > ZERO else np.float32(math.expm1(value)) * _SELU_ALPHA_SCALE
    elif kind == GELU:
        for k in range(count):
            post[k] = pre[k] * _normal_distribution(pre[k])
    elif kind == SILU:
        for k in range(count):
            post[k] = pre[k] * sigmoid(pre[k])
    elif kind == TANH:
        for k in range(count):
            post[k] = math.tanh(pre[k])
    elif kind == SIGMOID:
        for k in range(count):
            post[k] = sigmoid(pre[k])
    else:
        for k in range(count):
            post[k] = pre[k]


@exactly
def differentiate(kind: int, pre: Floats, post: Floats, gradient: Floats) -> None:
    """gradient in the activations → gradient in the pre-activations, in place."""
    count = len(pre)
    if kind == RELU:
        for k in range(count):
            gradient[k] = ZERO if post[k] <= ZERO else gradient[k]
    elif kind == LEAKY_RELU:
        for k in range(count):
            gradient[k] = gradient[k] if pre[k] > ZERO else gradient[k] * _LEAKY_SLOPE
    elif kind == ELU:
        for k in range(count):
            if pre[k] <= ZERO:
                gradient[k] *= np.float32(math.exp(pre[k]))
    elif kind == SELU:
        for k in range(count):
            slope = _SELU_ALPHA_SCALE * np.float32(math.exp(pre[k])) if pre[k] <= ZERO else _SELU_SCALE
            gradient[k] *= slope
    elif kind == GELU:
        for k in range(count):
            value = pre[k]
            density = np.float32(math.exp(-HALF * value * value)) * _DENSITY_SCALE
            gradient[k] *= _normal_distribution(value) + value * density
    elif kind == SILU:
        for k in range(count):
            share = sigmoid(pre[k])
            gradient[k] *= share * (ONE + pre[k] * (ONE - share))
    elif kind == TANH:
        for k in range(count):
            gradient[k] *= ONE - post[k] * post[k]
    elif kind == SIGMOID:
        for k in range(count):
            gradient[k] *= (ONE - post[k]) * post[k]


@exactly
def sigmoid(value: Number) -> Number:
    return ONE / (ONE + np.float32(math.exp(-value)))


@exactly
def _normal_distribution(value: Number) -> Number:
    return HALF * (ONE + np.float32(math.erf(value * _ROOT_HALF)))
