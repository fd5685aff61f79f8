"""Loss and accuracy of one example, and the residual that goes back: the loss's gradient in the outputs."""

import math

import numpy as np

from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.nonlinearities import sigmoid
from cbp.engines.compiled.table import HALF, HUBER, MSE, ONE, ZERO, Floats, Number


@exactly
def cross_entropy(outputs: Floats, label: int, factor: Number, residual: Floats) -> tuple[Number, Number]:
    """Loss and accuracy of one example; its gradient in the outputs, times `factor`, goes into `residual`."""
    classes = len(outputs)
    best = 0
    for c in range(1, classes):
        if outputs[c] > outputs[best]:
            best = c
    total = ZERO
    for c in range(classes):
        residual[c] = math.exp(outputs[c] - outputs[best])
        total += residual[c]
    for c in range(classes):
        share = residual[c] / total
        residual[c] = (share - ONE if c == label else share) * factor
    loss = np.float32(math.log(total)) + outputs[best] - outputs[label]
    return loss, ONE if best == label else ZERO


@exactly
def regression(
    kind: int, outputs: Floats, targets: Floats, factor: Number, delta: Number, residual: Floats
) -> tuple[Number, Number]:
    """As `cross_entropy`, for the losses that are a mean over the outputs."""
    total = right = ZERO
    for c in range(len(outputs)):
        output, target = outputs[c], targets[c]
        error = output - target
        if kind == MSE:
            total += error * error
        elif kind == HUBER:
            size = abs(error)
            if size <= delta:
                total += HALF * size * size
            else:
                total += delta * (size - HALF * delta)
                error = delta if error > ZERO else -delta
        else:
            positive = output if output > ZERO else ZERO
            total += positive - output * target + np.float32(math.log1p(np.float32(math.exp(-abs(output)))))
            error = sigmoid(output) - target
            if (output > ZERO) == (target > HALF):
                right += ONE
        residual[c] = error * factor
    count = np.float32(len(outputs))
    return total / count, right / count
