"""An optimizer's update of one row of weights.

`columns` gathers the magnitudes of what comes out, from which utilities are made; each gives the sum of the row's own.
"""

import math

import numpy as np

from cbp.engines.compiled.averages import bias_correction
from cbp.engines.compiled.compiling import exactly, in_any_order
from cbp.engines.compiled.table import ADAMW, HALF, ONE, ZERO, Floats, Integers, Number, Real


@in_any_order
def sgd_row(row: Floats, gradient: Floats, reals: Floats, decays: int, columns: Floats) -> Number:
    """Returns the sum of the row's magnitudes after the update, as its siblings do. There need be no columns."""
    negative_lr, weight_decay = reals[Real.NEGATIVE_LR], reals[Real.WEIGHT_DECAY]
    if not decays:
        weight_decay = ZERO
    total = ZERO
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    if not len(columns):
        for i in range(len(row)):
            value = row[i] + gradient[i] * negative_lr
            row[i] = value
            total += abs(value)
        return total
    for i in range(len(row)):
        value = row[i] + gradient[i] * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total


@in_any_order
def momentum_row(
    row: Floats, gradient: Floats, momentum: Floats, reals: Floats, decays: int, columns: Floats
) -> Number:
    negative_lr, kept, weight_decay = reals[Real.NEGATIVE_LR], reals[Real.MOMENTUM], reals[Real.WEIGHT_DECAY]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = ZERO
    for i in range(len(row)):
        update = momentum[i] * kept + gradient[i]
        momentum[i] = update
        value = row[i] + update * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total


@in_any_order
def nesterov_row(
    row: Floats, gradient: Floats, momentum: Floats, reals: Floats, decays: int, columns: Floats
) -> Number:
    negative_lr, kept, weight_decay = reals[Real.NEGATIVE_LR], reals[Real.MOMENTUM], reals[Real.WEIGHT_DECAY]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = ZERO
    for i in range(len(row)):
        running = momentum[i] * kept + gradient[i]
        momentum[i] = running
        value = row[i] + (gradient[i] + running * kept) * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total


@in_any_order
def rmsprop_row(
    row: Floats, gradient: Floats, momentum: Floats, average: Floats, reals: Floats, decays: int, columns: Floats
) -> tuple[Number, Number]:
    """Without momentum its row is empty. Also returns the sum of the mean squares."""
    negative_lr, weight_decay, epsilon = reals[Real.NEGATIVE_LR], reals[Real.WEIGHT_DECAY], reals[Real.EPSILON]
    remembered, kept, gained = reals[Real.MOMENTUM], reals[Real.BETA2], reals[Real.ONE_MINUS_BETA2]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = averages = ZERO
    for i in range(len(row)):
        square = average[i] * kept + gradient[i] * gradient[i] * gained
        average[i] = square
        averages += square
        gradient[i] /= np.float32(math.sqrt(square)) + epsilon
    for i in range(len(momentum)):
        momentum[i] = momentum[i] * remembered + gradient[i]
        gradient[i] = momentum[i]
    for i in range(len(row)):
        value = row[i] + gradient[i] * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total, averages


@in_any_order
def adam_row(
    row: Floats,
    gradient: Floats,
    first: Floats,
    second: Floats,
    first_factor: Number,
    second_factor: Number,
    first_factors: Floats,
    second_factors: Floats,
    reals: Floats,
    kind: int,
    decays: int,
    columns: Floats,
) -> tuple[Number, Number]:
    """A weight was drawn when the younger of its two units was, and 1/(1 − βᵗ) falls with t: the larger factor holds.

    Also returns the sum of the second moments.
    """
    negative_lr, weight_decay, epsilon = reals[Real.NEGATIVE_LR], reals[Real.WEIGHT_DECAY], reals[Real.EPSILON]
    share, kept, gained = reals[Real.ONE_MINUS_BETA1], reals[Real.BETA2], reals[Real.ONE_MINUS_BETA2]
    if decays:
        if kind == ADAMW:
            shrinkage = reals[Real.SHRINKAGE]
            for i in range(len(row)):
                row[i] *= shrinkage
        else:
            for i in range(len(row)):
                gradient[i] += row[i] * weight_decay
    if share < HALF:
        for i in range(len(row)):
            first[i] += share * (gradient[i] - first[i])
    else:
        for i in range(len(row)):
            first[i] = gradient[i] - (gradient[i] - first[i]) * (ONE - share)
    total = moments = ZERO
    for i in range(len(row)):
        moment = second[i] * kept + gradient[i] * gradient[i] * gained
        second[i] = moment
        moments += moment
        corrected_first = first[i] * max(first_factor, first_factors[i])
        corrected_second = moment * max(second_factor, second_factors[i])
        value = row[i] + corrected_first / (np.float32(math.sqrt(corrected_second)) + epsilon) * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total, moments


@in_any_order
def skip_row(row: Floats, inputs: Floats, delta: Number, negative_lr: Number, back: Floats, columns: Floats) -> Number:
    """SGD by one example: backward and update in one pass."""
    total = ZERO
    for i in range(len(row)):
        old = row[i]
        back[i] += delta * old
        value = old + (delta * inputs[i]) * negative_lr
        row[i] = value
        magnitude = abs(value)
        columns[i] += magnitude
        total += magnitude
    return total


@in_any_order
def skip_first_row(row: Floats, inputs: Floats, delta: Number, negative_lr: Number) -> Number:
    """The same where nothing lies before."""
    total = ZERO
    for i in range(len(row)):
        value = row[i] + (delta * inputs[i]) * negative_lr
        row[i] = value
        total += abs(value)
    return total


@in_any_order
def skipped_row(row: Floats, columns: Floats) -> Number:
    """The same for a row that stays as it is."""
    total = ZERO
    for i in range(len(row)):
        magnitude = abs(row[i])
        columns[i] += magnitude
        total += magnitude
    return total


@exactly
def adam_factors(ages: Integers, total: int, inputs: int, reals: Floats, first: Floats, second: Floats) -> None:
    """1/(1 − β₁ᵗ) and 1/(1 − β₂ᵗ) of the step about to be taken: of the inputs, the hidden units, the outputs."""
    log1, log2 = reals[Real.LOG_BETA1], reals[Real.LOG_BETA2]
    first[:] = ONE / bias_correction(total, log1)
    second[:] = ONE / bias_correction(total, log2)
    known_age, factor1, factor2 = np.int64(-1), ZERO, ZERO
    for u in range(len(ages)):
        if ages[u] != known_age:
            known_age = ages[u]
            factor1 = ONE / bias_correction(known_age + 1, log1)
            factor2 = ONE / bias_correction(known_age + 1, log2)
        first[inputs + u] = factor1
        second[inputs + u] = factor2
