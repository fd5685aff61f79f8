"""Whole steps of Continual Backprop for one learner, compiled by numba: `run` takes steps, `replace` puts in newborns.

Both work in place on the memory of a `StackState`, found by address, and let other threads run. What they compute is
what `torch_engine` does; where sums come in another order, the last bits differ.

Shapes: B examples in a step, I inputs, C outputs, U hidden units of all layers side by side; one linear layer is
[out, in] with `out` and `in` the widths around it.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cbp.engines.compiling import as_written, exactly, in_any_order
from cbp.engines.products import (
    ROWS_AT_ONCE,
    add_scaled,
    affine,
    descend_rows,
    gradient_in_tiles,
    gradient_of_rows,
    hand_back,
    turned_affine,
)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Words = NDArray[np.int32]
Number = Any
"""A scalar whose width matters: float32 here, unless said otherwise."""


class Table(IntEnum):
    """What stands where in the int64 table that a kernel gets."""

    DEPTH = 0
    """Linear layers."""
    BATCH = 1
    ACTIVATION = 2
    LOSS = 3
    OPTIMIZER = 4
    UTILITY = 5
    DECAYS_WEIGHTS = 6
    SKIPS = 7
    """1 if units without a gradient may be passed over: ReLU, one example a step, nothing but the gradient in the
    update."""
    EVALUATES = 8
    """0 leaves ages and utilities alone: ordinary backprop, to compare with."""
    STEPS = 9
    """Steps the learner has taken so far; `run` counts on."""
    MATURITY = 10
    REALS = 11
    """Addresses from here on; this one is of the settings that `Real` lists."""
    PARAMETERS = 12
    MOMENTUM = 13
    SECOND_MOMENT = 14
    COUNTS = 15
    UTILITIES = 16
    AGES = 17
    MEANS = 18
    FLOATS = 19
    """Room for float32."""
    OWED = 20
    """float64, per hidden layer what is owed."""
    SCHEDULE = 21
    """float64: per hidden layer the rate, and how many units are mature."""
    RANDOM = 22
    """[steps, U] draws for the `random` utility; 0 if there are none."""
    CORRECTIONS = 23
    """1 − ηᵃ at every age a from 0 on, as far as `CORRECTION_COUNT`; float32."""
    OUTPUTS = 24
    """[rows, C] of a message, with at least N rows."""
    SCORES = 25
    """float64 [2, rows], losses and accuracies."""
    TALLY = 26
    """float64, what `Sum` lists."""
    PROBE_FEATURES = 27
    """[rows, I], the ring of recent examples."""
    PROBE_TARGETS = 28
    PROBE_POSITION = 29
    """int64: the row that is written next, and the rows that are filled."""
    PROBE_ROWS = 30
    SCORE_ROWS = 31
    CORRECTION_COUNT = 32
    REMEMBERS = 33
    """1 if the weights of large layers lie as `is_turned` says, and the sums of their magnitudes are remembered; only
    together with `SKIPS`."""
    MAGNITUDES = 34
    """int64 [depth + 2 U]: per layer 1 if its sums are right; the units' incoming sums; their outgoing sums."""
    FINENESS = 35
    """float32, per layer what a magnitude is multiplied by before it is rounded and summed; a power of two."""
    WEIGHTS = 36
    """Of a message's examples."""
    FEATURES = 37
    """What `run_each` takes of a message; the number of examples is `EXAMPLES`."""
    LABELS = 38
    VALUES = 39
    EXAMPLES = 40
    CLIPPING = 41
    """Room for [B, widest layer], if the gradient's norm is limited; or else 0."""
    WIDTHS = 42
    """I, hidden widths, C; to the end of the table."""


class Sum(IntEnum):
    """What stands where among the sums over a message, which are float64."""

    DECAY = 0
    """The decay δ of the averages."""
    LOSS = 1
    ACCURACY = 2
    FADED_LOSS = 3
    """Sum of (1 − δ) δᵏ times the loss, with k the number of examples after this one."""
    FADED_ACCURACY = 4
    PARAMETERS = 5
    """All parameters' magnitudes after the last step; not finite if one of them is not."""
    MOMENTS = 6
    """Adam's second moments, or RMSprop's mean squares, after the last step."""
    COUNT = 7


class Real(IntEnum):
    """What stands where in the float32 settings."""

    NEGATIVE_LR = 0
    MOMENTUM = 1
    WEIGHT_DECAY = 2
    ONE_MINUS_BETA1 = 3
    BETA2 = 4
    """Of RMSprop, alpha."""
    ONE_MINUS_BETA2 = 5
    LOG_BETA1 = 6
    LOG_BETA2 = 7
    EPSILON = 8
    SHRINKAGE = 9
    ONE_MINUS_DECAY = 10
    LOG_DECAY = 11
    BIAS_COMPENSATION = 12
    """The share of a unit's mean that is handed on."""
    DELTA = 13
    SCALE = 14
    """What the loss's residual is multiplied by, apart from the example's weight."""
    STRENGTH = 15
    """Of a reset."""
    KEPT = 16
    """1 − strength"""
    CLIP_NORM = 17
    NORM_MARGIN = 18
    COUNT = 19


RELU, LEAKY_RELU, ELU, SELU, GELU, SILU, TANH, SIGMOID, IDENTITY = range(9)
CROSS_ENTROPY, MSE, HUBER, BINARY_CROSS_ENTROPY = range(4)
SGD, MOMENTUM_SGD, NESTEROV_SGD, RMSPROP, MOMENTUM_RMSPROP, ADAM, ADAMW = range(7)
CONTRIBUTION, ZERO_CONTRIBUTION, ADAPTABLE_CONTRIBUTION, WEIGHT, ADAPTATION, FEATURE_BY_INPUT, RANDOM = range(7)

_DEPTH, _BATCH, _ACTIVATION, _LOSS = int(Table.DEPTH), int(Table.BATCH), int(Table.ACTIVATION), int(Table.LOSS)
_OPTIMIZER, _UTILITY, _DECAYS_WEIGHTS = int(Table.OPTIMIZER), int(Table.UTILITY), int(Table.DECAYS_WEIGHTS)
_SKIPS, _EVALUATES, _STEPS, _MATURITY = int(Table.SKIPS), int(Table.EVALUATES), int(Table.STEPS), int(Table.MATURITY)
_REALS, _PARAMETERS, _MOMENTUM = int(Table.REALS), int(Table.PARAMETERS), int(Table.MOMENTUM)
_SECOND_MOMENT, _COUNTS, _UTILITIES = int(Table.SECOND_MOMENT), int(Table.COUNTS), int(Table.UTILITIES)
_AGES, _MEANS, _FLOATS, _OWED = int(Table.AGES), int(Table.MEANS), int(Table.FLOATS), int(Table.OWED)
_SCHEDULE, _RANDOM, _CORRECTIONS = int(Table.SCHEDULE), int(Table.RANDOM), int(Table.CORRECTIONS)
_OUTPUTS, _SCORES, _TALLY = int(Table.OUTPUTS), int(Table.SCORES), int(Table.TALLY)
_PROBE_FEATURES, _PROBE_TARGETS = int(Table.PROBE_FEATURES), int(Table.PROBE_TARGETS)
_PROBE_POSITION, _PROBE_ROWS = int(Table.PROBE_POSITION), int(Table.PROBE_ROWS)
_SCORE_ROWS, _CORRECTION_COUNT, _WIDTHS = int(Table.SCORE_ROWS), int(Table.CORRECTION_COUNT), int(Table.WIDTHS)
_FEATURES, _LABELS, _VALUES = int(Table.FEATURES), int(Table.LABELS), int(Table.VALUES)
_WEIGHTS, _EXAMPLES, _CLIPPING = int(Table.WEIGHTS), int(Table.EXAMPLES), int(Table.CLIPPING)
_REMEMBERS, _MAGNITUDES, _FINENESS = int(Table.REMEMBERS), int(Table.MAGNITUDES), int(Table.FINENESS)

_AVERAGE_DECAY, _LOSS_SUM, _ACCURACY_SUM = int(Sum.DECAY), int(Sum.LOSS), int(Sum.ACCURACY)
_FADED_LOSS, _FADED_ACCURACY = int(Sum.FADED_LOSS), int(Sum.FADED_ACCURACY)
_PARAMETER_SUM, _MOMENT_SUM, _SUMS = int(Sum.PARAMETERS), int(Sum.MOMENTS), int(Sum.COUNT)

_NEGATIVE_LR, _MU, _WEIGHT_DECAY = int(Real.NEGATIVE_LR), int(Real.MOMENTUM), int(Real.WEIGHT_DECAY)
_ONE_MINUS_BETA1, _BETA2, _ONE_MINUS_BETA2 = int(Real.ONE_MINUS_BETA1), int(Real.BETA2), int(Real.ONE_MINUS_BETA2)
_LOG_BETA1, _LOG_BETA2, _EPSILON = int(Real.LOG_BETA1), int(Real.LOG_BETA2), int(Real.EPSILON)
_SHRINKAGE, _ONE_MINUS_DECAY, _LOG_DECAY = int(Real.SHRINKAGE), int(Real.ONE_MINUS_DECAY), int(Real.LOG_DECAY)
_BIAS_COMPENSATION, _DELTA, _SCALE = int(Real.BIAS_COMPENSATION), int(Real.DELTA), int(Real.SCALE)
_STRENGTH, _KEPT, _CLIP_NORM = int(Real.STRENGTH), int(Real.KEPT), int(Real.CLIP_NORM)
_NORM_MARGIN, _REAL_COUNT = int(Real.NORM_MARGIN), int(Real.COUNT)

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_LEAKY_SLOPE = np.float32(0.01)
_SELU_ALPHA_SCALE = np.float32(1.6732632423543772848170429916717 * 1.0507009873554804934193349852946)
_SELU_SCALE = np.float32(1.0507009873554804934193349852946)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_DENSITY_SCALE = np.float32(1.0 / math.sqrt(2.0 * math.pi))
_SMALLEST_INCOMING = np.float32(1e-12)
_LAST_COUNT = np.float32(2.0**24)
"""Where a float32 count of Adam stops."""

LARGE = 512
"""A layer is large if it reads so many, and hands on so many if it is not the first."""
_TOO_LARGE = np.float32(2**30)
"""No multiple of a remembered weight's magnitude."""
_MOST_CHANGE_OF_WEIGHT = np.float32(2**29)
_MOST_CHANGE_OF_SUM = np.float32(1.9e9)
"""Less than 2³¹, with room for the rounding of each summand."""


def _view(element: Any, dimensions: int) -> Any:
    """A function of an address and lengths that gives the array there; nobody owns its memory."""

    pack: Any = cgutils.pack_array

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.return_type
        array = context.make_array(array_type)(context, builder)
        element_type = context.get_data_type(element)
        size = context.get_abi_sizeof(element_type)
        lengths = list(arguments[1:])
        strides = [context.get_constant(types.intp, size)]
        for length in reversed(lengths[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        context.populate_array(
            array,
            data=builder.inttoptr(arguments[0], element_type.as_pointer()),
            shape=pack(builder, lengths),
            strides=pack(builder, strides),
            itemsize=context.get_constant(types.intp, size),
            meminfo=None,
        )
        return array._getvalue()

    array_type = types.Array(element, dimensions, "C")
    if dimensions == 1:

        def typing_of_row(_context: Any, address: Any, length: Any) -> Any:
            return array_type(address, length), code

        return intrinsic(typing_of_row)

    def typing_of_rows(_context: Any, address: Any, rows: Any, columns: Any) -> Any:
        return array_type(address, rows, columns), code

    return intrinsic(typing_of_rows)


row_at: Callable[[int, int], Floats] = _view(types.float32, 1)
rows_at: Callable[[int, int, int], Floats] = _view(types.float32, 2)
_doubles: Callable[[int, int], Doubles] = _view(types.float64, 1)
_double_rows: Callable[[int, int, int], Doubles] = _view(types.float64, 2)
integers_at: Callable[[int, int], Integers] = _view(types.int64, 1)
_words: Callable[[int, int], Words] = _view(types.int32, 1)


# --- Nonlinearities ---------------------------------------------------------------------------------------------------


@exactly
def activate(kind: int, pre: Floats, post: Floats) -> None:
    """post ← activations of pre; a NaN stays one."""
    count = len(pre)
    if kind == RELU:
        for k in range(count):
            value = pre[k]
            post[k] = _ZERO if value <= _ZERO else value
    elif kind == LEAKY_RELU:
        for k in range(count):
            value = pre[k]
            post[k] = value if value > _ZERO else value * _LEAKY_SLOPE
    elif kind == ELU:
        for k in range(count):
            value = pre[k]
            post[k] = value if value > _ZERO else np.float32(math.expm1(value))
    elif kind == SELU:
        for k in range(count):
            value = pre[k]
            post[k] = value * _SELU_SCALE if value > _ZERO else np.float32(math.expm1(value)) * _SELU_ALPHA_SCALE
    elif kind == GELU:
        for k in range(count):
            post[k] = pre[k] * _normal_distribution(pre[k])
    elif kind == SILU:
        for k in range(count):
            post[k] = pre[k] * _sigmoid(pre[k])
    elif kind == TANH:
        for k in range(count):
            post[k] = math.tanh(pre[k])
    elif kind == SIGMOID:
        for k in range(count):
            post[k] = _sigmoid(pre[k])
    else:
        for k in range(count):
            post[k] = pre[k]


@exactly
def differentiate(kind: int, pre: Floats, post: Floats, gradient: Floats) -> None:
    """gradient in the activations → gradient in the pre-activations, in place."""
    count = len(pre)
    if kind == RELU:
        for k in range(count):
            gradient[k] = _ZERO if post[k] <= _ZERO else gradient[k]
    elif kind == LEAKY_RELU:
        for k in range(count):
            gradient[k] = gradient[k] if pre[k] > _ZERO else gradient[k] * _LEAKY_SLOPE
    elif kind == ELU:
        for k in range(count):
            if pre[k] <= _ZERO:
                gradient[k] *= np.float32(math.exp(pre[k]))
    elif kind == SELU:
        for k in range(count):
            slope = _SELU_ALPHA_SCALE * np.float32(math.exp(pre[k])) if pre[k] <= _ZERO else _SELU_SCALE
            gradient[k] *= slope
    elif kind == GELU:
        for k in range(count):
            value = pre[k]
            density = np.float32(math.exp(-_HALF * value * value)) * _DENSITY_SCALE
            gradient[k] *= _normal_distribution(value) + value * density
    elif kind == SILU:
        for k in range(count):
            share = _sigmoid(pre[k])
            gradient[k] *= share * (_ONE + pre[k] * (_ONE - share))
    elif kind == TANH:
        for k in range(count):
            gradient[k] *= _ONE - post[k] * post[k]
    elif kind == SIGMOID:
        for k in range(count):
            gradient[k] *= (_ONE - post[k]) * post[k]


@exactly
def _sigmoid(value: Number) -> Number:
    return _ONE / (_ONE + np.float32(math.exp(-value)))


@exactly
def _normal_distribution(value: Number) -> Number:
    return _HALF * (_ONE + np.float32(math.erf(value * _ROOT_HALF)))


# --- Losses -----------------------------------------------------------------------------------------------------------


@exactly
def cross_entropy(outputs: Floats, label: int, factor: Number, residual: Floats) -> tuple[Number, Number]:
    """Loss and accuracy of one example; its gradient in the outputs, times `factor`, goes into `residual`."""
    classes = len(outputs)
    best = 0
    for c in range(1, classes):
        if outputs[c] > outputs[best]:
            best = c
    total = _ZERO
    for c in range(classes):
        residual[c] = math.exp(outputs[c] - outputs[best])
        total += residual[c]
    for c in range(classes):
        share = residual[c] / total
        residual[c] = (share - _ONE if c == label else share) * factor
    loss = np.float32(math.log(total)) + outputs[best] - outputs[label]
    return loss, _ONE if best == label else _ZERO


@exactly
def regression(
    kind: int, outputs: Floats, targets: Floats, factor: Number, delta: Number, residual: Floats
) -> tuple[Number, Number]:
    """As `cross_entropy`, for the losses that are a mean over the outputs."""
    total = right = _ZERO
    for c in range(len(outputs)):
        output, target = outputs[c], targets[c]
        error = output - target
        if kind == MSE:
            total += error * error
        elif kind == HUBER:
            size = abs(error)
            if size <= delta:
                total += _HALF * size * size
            else:
                total += delta * (size - _HALF * delta)
                error = delta if error > _ZERO else -delta
        else:
            positive = output if output > _ZERO else _ZERO
            total += positive - output * target + np.float32(math.log1p(np.float32(math.exp(-abs(output)))))
            error = _sigmoid(output) - target
            if (output > _ZERO) == (target > _HALF):
                right += _ONE
        residual[c] = error * factor
    count = np.float32(len(outputs))
    return total / count, right / count


# --- Rows -------------------------------------------------------------------------------------------------------------


@exactly
def _sum_examples(values: Floats, total: Floats) -> None:
    """total [out] ← sum of values [B, out] over the examples."""
    examples, out = values.shape
    for o in range(out):
        total[o] = values[0, o]
    for b in range(1, examples):
        for o in range(out):
            total[o] += values[b, o]


@exactly
def _scaled(inputs: Floats, factor: Number, row: Floats) -> None:
    for i in range(len(inputs)):
        row[i] = factor * inputs[i]


@in_any_order
def _sum_of_magnitudes(row: Floats) -> Number:
    total = _ZERO
    for i in range(len(row)):
        total += abs(row[i])
    return total


# --- Updates of one row of weights; `columns` gathers the magnitudes of what comes out --------------------------------


@in_any_order
def _sgd_row(row: Floats, gradient: Floats, reals: Floats, decays: int, columns: Floats) -> Number:
    """Returns the sum of the row's magnitudes after the update, as its siblings do. There need be no columns."""
    negative_lr, weight_decay = reals[_NEGATIVE_LR], reals[_WEIGHT_DECAY]
    if not decays:
        weight_decay = _ZERO
    total = _ZERO
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
def _momentum_row(
    row: Floats, gradient: Floats, momentum: Floats, reals: Floats, decays: int, columns: Floats
) -> Number:
    negative_lr, kept, weight_decay = reals[_NEGATIVE_LR], reals[_MU], reals[_WEIGHT_DECAY]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = _ZERO
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
def _nesterov_row(
    row: Floats, gradient: Floats, momentum: Floats, reals: Floats, decays: int, columns: Floats
) -> Number:
    negative_lr, kept, weight_decay = reals[_NEGATIVE_LR], reals[_MU], reals[_WEIGHT_DECAY]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = _ZERO
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
def _rmsprop_row(
    row: Floats, gradient: Floats, momentum: Floats, average: Floats, reals: Floats, decays: int, columns: Floats
) -> tuple[Number, Number]:
    """Without momentum its row is empty. Also returns the sum of the mean squares."""
    negative_lr, weight_decay, epsilon = reals[_NEGATIVE_LR], reals[_WEIGHT_DECAY], reals[_EPSILON]
    remembered, kept, gained = reals[_MU], reals[_BETA2], reals[_ONE_MINUS_BETA2]
    if decays:
        for i in range(len(row)):
            gradient[i] += row[i] * weight_decay
    total = averages = _ZERO
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


@exactly
def _lerp(start: Number, end: Number, share: Number) -> Number:
    """As torch.lerp rounds it."""
    if share < _HALF:
        return start + share * (end - start)
    return end - (end - start) * (_ONE - share)


@in_any_order
def _adam_row(
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
    negative_lr, weight_decay, epsilon = reals[_NEGATIVE_LR], reals[_WEIGHT_DECAY], reals[_EPSILON]
    share, kept, gained = reals[_ONE_MINUS_BETA1], reals[_BETA2], reals[_ONE_MINUS_BETA2]
    if decays:
        if kind == ADAMW:
            shrinkage = reals[_SHRINKAGE]
            for i in range(len(row)):
                row[i] *= shrinkage
        else:
            for i in range(len(row)):
                gradient[i] += row[i] * weight_decay
    if share < _HALF:
        for i in range(len(row)):
            first[i] += share * (gradient[i] - first[i])
    else:
        for i in range(len(row)):
            first[i] = gradient[i] - (gradient[i] - first[i]) * (_ONE - share)
    total = moments = _ZERO
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
def _skip_row(row: Floats, inputs: Floats, delta: Number, negative_lr: Number, back: Floats, columns: Floats) -> Number:
    """SGD by one example: backward and update in one pass."""
    total = _ZERO
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
def _skip_first_row(row: Floats, inputs: Floats, delta: Number, negative_lr: Number) -> Number:
    """The same where nothing lies before."""
    total = _ZERO
    for i in range(len(row)):
        value = row[i] + (delta * inputs[i]) * negative_lr
        row[i] = value
        total += abs(value)
    return total


@in_any_order
def _skipped_row(row: Floats, columns: Floats) -> Number:
    """The same for a row that stays as it is."""
    total = _ZERO
    for i in range(len(row)):
        magnitude = abs(row[i])
        columns[i] += magnitude
        total += magnitude
    return total


# --- Large layers, one example a step, ReLU and plain SGD -------------------------------------------------------------
#
# Their time is that of moving weights, so units that are silent are passed over: with a unit's outgoing weights side by
# side (`is_turned`), a silent one costs nothing, forward or backward. What its utility needs of it, sums of magnitudes,
# is remembered: every magnitude is rounded to a multiple of 1 / fineness, and the multiples are summed as integers.
# Those sums do not depend on the order, nor on whether they were made anew or brought up to date at every change; so a
# learner restored from a snapshot, where they are not kept, has the same ones.
#
# A multiple has 30 bits, and a sum can change by 31 in one step. If a weight is larger, all sums of its layer are made
# in floating point at every step: slower, and just as independent of what was before. If a step could change more, they
# are made anew after it.


@as_written
def is_turned(remembers: int, depth: int, layer: int, before: int, after: int) -> int:
    """1 if the weights of a layer lie [in, out] in memory instead of [out, in]."""
    return 1 if remembers and 0 < layer < depth - 1 and before >= LARGE and after >= LARGE else 0


@as_written
def _is_remembered(table: Integers, layer: int) -> int:
    before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
    if table[_REMEMBERS] and layer == 0 and before >= LARGE:
        return 1
    return is_turned(table[_REMEMBERS], table[_DEPTH], layer, before, after)


@as_written
def _multiples(weight: Number, fineness: Number) -> Number:
    """int32; the product is exact, for fineness is a power of two."""
    return np.int32(abs(weight) * fineness + _HALF)


@in_any_order
def _turned_row(
    row: Floats, delta: Floats, value: Number, negative_lr: Number, fineness: Number, changes: Words
) -> tuple[Number, Number, Number]:
    """SGD by one example on what a unit hands on; `changes` gathers those of the readers' sums.

    Returns the gradient in the unit's activation, the change of its own sum, and all new multiples or-ed together.
    """
    back = _ZERO
    change = bits = np.int32(0)
    for o in range(len(row)):
        old, slope = row[o], delta[o]
        back += old * slope
        new = old + (slope * value) * negative_lr
        row[o] = new
        multiples = np.int32(abs(new) * fineness + _HALF)
        more = np.int32(multiples - np.int32(abs(old) * fineness + _HALF))
        changes[o] = np.int32(changes[o] + more)
        change = np.int32(change + more)
        bits = np.int32(bits | multiples)
    return back, change, bits


@in_any_order
def _turned_row_alone(row: Floats, delta: Floats, value: Number, negative_lr: Number) -> Number:
    """The same without sums, for ordinary backprop."""
    back = _ZERO
    for o in range(len(row)):
        old, slope = row[o], delta[o]
        back += old * slope
        row[o] = old + (slope * value) * negative_lr
    return back


@in_any_order
def _first_row(
    row: Floats, inputs: Floats, delta: Number, negative_lr: Number, fineness: Number
) -> tuple[Number, Number]:
    """The same for what a unit of the first layer reads. Returns the last 32 bits of its sum instead of its change."""
    total = bits = np.int32(0)
    for i in range(len(row)):
        new = row[i] + (delta * inputs[i]) * negative_lr
        row[i] = new
        multiples = np.int32(abs(new) * fineness + _HALF)
        total = np.int32(total + multiples)
        bits = np.int32(bits | multiples)
    return total, bits


@in_any_order
def _largest_and_sum(values: Floats) -> tuple[Number, Number]:
    """Of the magnitudes; a NaN makes the sum one."""
    largest = total = _ZERO
    for k in range(len(values)):
        magnitude = abs(values[k])
        largest = max(largest, magnitude)
        total += magnitude
    return largest, total


@as_written
def _change_fits(delta: Floats, inputs: Floats, negative_lr: Number, fineness: Number) -> int:
    """1 if the step changes no weight, and no sum, by more than there is room for."""
    largest_delta, all_deltas = _largest_and_sum(delta)
    largest_input, all_inputs = _largest_and_sum(inputs)
    unit = abs(negative_lr) * fineness
    weight_fits = largest_delta * largest_input * unit < _MOST_CHANGE_OF_WEIGHT
    sum_fits = max(largest_delta * all_inputs, largest_input * all_deltas) * unit < _MOST_CHANGE_OF_SUM
    return 1 if weight_fits and sum_fits and all_deltas + all_inputs < np.inf else 0


@as_written
def _sums_anew(weight: Floats, fineness: Number, of_rows: Integers, of_columns: Integers) -> int:
    """Sums of the multiples of every row and, if there is room for them, of every column; 1 if no multiple is too
    large."""
    fits = 1
    of_columns[:] = 0
    for r in range(len(weight)):
        of_rows[r] = 0
        for c in range(weight.shape[1]):
            if not abs(weight[r, c]) * fineness + _HALF < _TOO_LARGE:
                fits = 0
                continue
            multiples = np.int64(_multiples(weight[r, c], fineness))
            of_rows[r] += multiples
            if c < len(of_columns):
                of_columns[c] += multiples
    return fits


@as_written
def _read_sums(sums: Integers, fineness: Number, magnitudes: Floats) -> None:
    unit = 1.0 / np.float64(fineness)
    for u in range(len(sums)):
        magnitudes[u] = np.float64(sums[u]) * unit


@exactly
def _turned_backward(
    weight: Floats,
    inputs: Floats,
    delta: Floats,
    negative_lr: Number,
    evaluates: int,
    fineness: Number,
    known: Integers,
    incoming_sums: Integers,
    outgoing_sums: Integers,
    changes: Words,
    back: Floats,
    incoming: Floats,
    outgoing: Floats,
) -> Number:
    """Backward and update for weight [in, out]. known [1]: whether the sums are right; changes: room.

    Returns the sum of all magnitudes if it may be infinite, or else 0.
    """
    if not evaluates:
        for i in range(len(inputs)):
            active = inputs[i] != _ZERO
            back[i] = _turned_row_alone(weight[i], delta, inputs[i], negative_lr) if active else _ZERO
        return _ZERO
    fits = _change_fits(delta, inputs, negative_lr, fineness)
    bits = np.int32(0)
    changes[:] = 0
    for i in range(len(inputs)):
        if inputs[i] != _ZERO:
            back[i], change, new_bits = _turned_row(weight[i], delta, inputs[i], negative_lr, fineness, changes)
            outgoing_sums[i] += np.int64(change)
            bits = np.int32(bits | new_bits)
        else:
            back[i] = _ZERO
    if fits and known[0]:
        for o in range(len(delta)):
            incoming_sums[o] += np.int64(changes[o])
        known[0] = 1 if bits < _TOO_LARGE else 0
    else:
        known[0] = _sums_anew(weight, fineness, outgoing_sums, incoming_sums)
    if known[0]:
        _read_sums(incoming_sums, fineness, incoming)
        _read_sums(outgoing_sums, fineness, outgoing)
        return _ZERO
    incoming[:] = _ZERO
    total = _ZERO
    for i in range(len(inputs)):
        outgoing[i] = _skipped_row(weight[i], incoming)
        total += outgoing[i]
    return total


@exactly
def _first_backward(
    weight: Floats,
    inputs: Floats,
    delta: Floats,
    negative_lr: Number,
    fineness: Number,
    known: Integers,
    incoming_sums: Integers,
    incoming: Floats,
) -> Number:
    """The same for weight [out, in] of the first layer, where only the incoming sums are needed."""
    fits = _change_fits(delta, inputs, negative_lr, fineness)
    bits = np.int32(0)
    for o in range(len(delta)):
        if delta[o] != _ZERO:
            last_bits, new_bits = _first_row(weight[o], inputs, delta[o], negative_lr, fineness)
            incoming_sums[o] += np.int64(np.int32(np.int64(last_bits) - incoming_sums[o]))
            bits = np.int32(bits | new_bits)
    if fits and known[0]:
        known[0] = 1 if bits < _TOO_LARGE else 0
    else:
        known[0] = _sums_anew(weight, fineness, incoming_sums, incoming_sums[:0])
    if known[0]:
        _read_sums(incoming_sums, fineness, incoming)
        return _ZERO
    total = _ZERO
    for o in range(len(delta)):
        incoming[o] = _sum_of_magnitudes(weight[o])
        total += incoming[o]
    return total


# --- Units ------------------------------------------------------------------------------------------------------------


@exactly
def _evaluate(
    table: Integers,
    reals: Floats,
    layer: int,
    unit: int,
    post_at: int,
    incoming_at: int,
    outgoing_at: int,
    random_at: int,
    activity_at: int,
    corrections_at: int,
) -> None:
    """`cbp.units.replacement.evaluate_units` for one hidden layer, whose first unit is `unit`.

    By address: the layer's activations [B, units]; per unit, sums of its weights' magnitudes, and this step's draws;
    and twice room for one value per unit.
    """
    units, fan_in, fan_out = table[_WIDTHS + layer + 1], table[_WIDTHS + layer], table[_WIDTHS + layer + 2]
    utility_kind = table[_UTILITY]
    activations = rows_at(post_at, table[_BATCH], units)
    incoming, outgoing = row_at(incoming_at, units), row_at(outgoing_at, units)
    ages = integers_at(table[_AGES] + 8 * unit, units)
    means = row_at(table[_MEANS] + 4 * unit, units)
    utilities = row_at(table[_UTILITIES] + 4 * unit, units)
    random = row_at(random_at, units)
    activity, corrections = row_at(activity_at, units), row_at(corrections_at, units)
    known_corrections = row_at(table[_CORRECTIONS], table[_CORRECTION_COUNT])
    examples = table[_BATCH]
    share, log_decay = reals[_ONE_MINUS_DECAY], reals[_LOG_DECAY]
    known_age, correction = np.int64(-1), _ZERO
    for u in range(units):
        age = ages[u] + 1
        ages[u] = age
        if age < len(known_corrections):
            corrections[u] = known_corrections[age]
        else:
            if age != known_age:
                known_age, correction = age, bias_correction(age, log_decay)
            corrections[u] = correction

    count = np.float32(examples)
    if examples == 1:
        for u in range(units):
            means[u] = _lerp(means[u], activations[0, u], share)
    else:
        _sum_examples(activations, activity)
        for u in range(units):
            means[u] = _lerp(means[u], activity[u] / count, share)

    if utility_kind == CONTRIBUTION:
        activity[:units] = _ZERO
        for b in range(examples):
            for u in range(units):
                activity[u] += abs(activations[b, u])
    else:
        activity[:units] = _ZERO
        for u in range(units):
            corrections[u] = means[u] / corrections[u]
        for b in range(examples):
            for u in range(units):
                activity[u] += abs(activations[b, u] - corrections[u])

    into, out = np.float32(fan_in), np.float32(fan_out)
    for u in range(units):
        mean_activity = activity[u] / count
        mean_incoming = max(incoming[u] / into, _SMALLEST_INCOMING)
        mean_outgoing = outgoing[u] / out
        if utility_kind == ADAPTABLE_CONTRIBUTION:
            value = mean_activity / mean_incoming * mean_outgoing
        elif utility_kind in (CONTRIBUTION, ZERO_CONTRIBUTION):
            value = mean_outgoing * mean_activity
        elif utility_kind == WEIGHT:
            value = mean_outgoing
        elif utility_kind == ADAPTATION:
            value = _ONE / mean_incoming
        elif utility_kind == FEATURE_BY_INPUT:
            value = mean_activity / mean_incoming
        else:
            value = random[u]
        utilities[u] = _lerp(utilities[u], value, share)


@exactly
def bias_correction(age: int, log_decay: Number) -> Number:
    return np.float32(-math.expm1(np.float32(age) * log_decay))


@exactly
def fill_corrections(log_decay: Number, corrections: Floats) -> None:
    """corrections[a] ← 1 − ηᵃ."""
    for age in range(len(corrections)):
        corrections[age] = bias_correction(age, log_decay)


@exactly
def _adam_factors(ages: Integers, total: int, inputs: int, reals: Floats, first: Floats, second: Floats) -> None:
    """1/(1 − β₁ᵗ) and 1/(1 − β₂ᵗ) of the step about to be taken: of the inputs, the hidden units, the outputs."""
    log1, log2 = reals[_LOG_BETA1], reals[_LOG_BETA2]
    first[:] = _ONE / bias_correction(total, log1)
    second[:] = _ONE / bias_correction(total, log2)
    known_age, factor1, factor2 = np.int64(-1), _ZERO, _ZERO
    for u in range(len(ages)):
        if ages[u] != known_age:
            known_age = ages[u]
            factor1 = _ONE / bias_correction(known_age + 1, log1)
            factor2 = _ONE / bias_correction(known_age + 1, log2)
        first[inputs + u] = factor1
        second[inputs + u] = factor2


# --- Clipping ---------------------------------------------------------------------------------------------------------
#
# Updates are made on the way back, each from the weights' gradient as soon as it is known; but by how much it is to be
# scaled is known at the end only. So a learner that clips goes back twice. The gradient is linear in that of the loss
# in the outputs: scaling this one scales all, and the second way is the one of a learner that does not clip.


@exactly
def _clip(
    table: Integers,
    reals: Floats,
    features: Floats,
    pre_at: int,
    post_at: int,
    delta_at: int,
    back_at: int,
    gradient_at: int,
) -> None:
    """Scales the loss's gradient in the outputs, at `delta_at`, as `cbp.optimizers` scales that of all parameters."""
    depth, batch = table[_DEPTH], table[_BATCH]
    unit = place = 0
    for layer in range(depth):
        unit += table[_WIDTHS + layer]
        place += table[_WIDTHS + layer + 1] * (table[_WIDTHS + layer] + 1)
    unit -= table[_WIDTHS]  # hidden units up to the layer
    from_at, to_at = delta_at, back_at
    squares = 0.0
    for layer in range(depth - 1, -1, -1):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        place -= after * (before + 1)
        unit -= before if layer else 0
        offset = 4 * batch * unit
        delta = rows_at(from_at, batch, after)
        layer_input = rows_at(post_at + offset, batch, before) if layer else features
        if batch == 1:  # the norm of a product of two vectors is the product of their norms
            squares += _sum_of_squares(delta[0]) * (_sum_of_squares(layer_input[0]) + 1.0)
        else:
            squares += squares_of_gradient(delta, layer_input, gradient_at)
        if layer:
            back = rows_at(to_at, batch, before)
            weight_at = table[_PARAMETERS] + 4 * place
            if is_turned(table[_REMEMBERS], depth, layer, before, after):
                _hand_back_turned(rows_at(weight_at, before, after), layer_input[0], delta[0], back[0])
            elif batch > 1:
                hand_back(delta, rows_at(weight_at, after, before), back)
            else:
                weight = rows_at(weight_at, after, before)
                back[0, :] = _ZERO
                for o in range(after):
                    add_scaled(weight[o], delta[0, o], back[0])
            differentiate(
                table[_ACTIVATION],
                row_at(pre_at + offset, batch * before),
                row_at(post_at + offset, batch * before),
                row_at(to_at, batch * before),
            )
            from_at, to_at = to_at, table[_CLIPPING] if to_at == back_at else back_at
    norm = math.sqrt(squares)
    factor = np.float32(reals[_CLIP_NORM] / (norm + reals[_NORM_MARGIN]))
    if norm < np.inf and factor < _ONE:  # an infinite gradient is to be noticed, not to become one of zeros
        residual = row_at(delta_at, batch * table[_WIDTHS + depth])
        for k in range(len(residual)):
            residual[k] *= factor


@exactly
def squares_of_gradient(delta: Floats, inputs: Floats, room: int) -> float:
    """Of a layer's weights and biases, for at least two examples; at `room` is that for the gradient."""
    examples, out = delta.shape
    into = inputs.shape[1]
    squares = 0.0
    if gradient_in_tiles(examples, out):
        tile = rows_at(room, ROWS_AT_ONCE, into)
        for o in range(0, out, ROWS_AT_ONCE):
            first = min(o, out - ROWS_AT_ONCE)
            gradient_of_rows(delta, inputs, first, tile)
            counted = o - first  # tiles at the end overlap those before
            squares += _sum_of_squares(row_at(room + 4 * counted * into, (ROWS_AT_ONCE - counted) * into))
    else:
        np.dot(delta.T, inputs, rows_at(room, out, into))
        squares += _sum_of_squares(row_at(room, out * into))
    bias_gradient = row_at(room, out)
    _sum_examples(delta, bias_gradient)
    return squares + _sum_of_squares(bias_gradient)


@in_any_order
def _sum_of_squares(values: Floats) -> float:
    total = 0.0
    for k in range(len(values)):
        total += np.float64(values[k]) * np.float64(values[k])
    return total


@in_any_order
def _hand_back_turned(weight: Floats, inputs: Floats, delta: Floats, back: Floats) -> None:
    """back [in] ← weight [in, out] · delta; 0 for units that are silent."""
    for i in range(len(inputs)):
        total = _ZERO
        if inputs[i] != _ZERO:
            for o in range(len(delta)):
                total += weight[i, o] * delta[o]
        back[i] = total


# --- Backward passes, each with its update ----------------------------------------------------------------------------


@exactly
def _backward(
    table: Integers,
    reals: Floats,
    features: Floats,
    pre_at: int,
    post_at: int,
    delta_at: int,
    back_at: int,
    incoming_at: int,
    outgoing_at: int,
    gradient_at: int,
    first_factors: Floats,
    second_factors: Floats,
) -> tuple[Number, Number]:
    """From the last layer to the first; for any optimizer. Returns the sums of the parameters' magnitudes, and of
    Adam's second moments or RMSprop's mean squares."""
    depth, batch, width = table[_DEPTH], table[_BATCH], table[_WIDTHS]
    kind, decays = table[_OPTIMIZER], table[_DECAYS_WEIGHTS]
    widest = 0
    unit = width  # the first unit of the layer, among inputs, hidden units and outputs
    place = 0  # its weights, among all parameters
    for layer in range(depth):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        widest = max(widest, before, after)
        unit += after
        place += after * (before + 1)
    bias_gradient_at, unused_at = gradient_at, gradient_at + 4 * widest
    gradient_at += 8 * widest
    parameter_sum = moment_sum = _ZERO

    for layer in range(depth - 1, -1, -1):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        unit -= after
        place -= after * (before + 1)
        weight = rows_at(table[_PARAMETERS] + 4 * place, after, before)
        bias = row_at(table[_PARAMETERS] + 4 * (place + after * before), after)
        delta = rows_at(delta_at, batch, after)
        back = rows_at(back_at, batch, before)
        incoming = row_at(incoming_at + 4 * (unit - width), after)
        columns = row_at(outgoing_at + 4 * (unit - before if layer else 0), before)
        columns[:] = _ZERO
        layer_input = features if layer == 0 else rows_at(post_at + 4 * batch * (unit - width - before), batch, before)
        in_tiles = gradient_in_tiles(batch, after)
        gradient = rows_at(gradient_at, ROWS_AT_ONCE if in_tiles else after if batch > 1 else 1, before)
        if batch > 1:
            if layer:
                hand_back(delta, weight, back)
            if not in_tiles:
                np.dot(delta.T, layer_input, gradient)
        elif layer:
            back[0, :] = _ZERO
        first_of_tile = descended = 0
        if in_tiles and kind == SGD and not decays:
            descended = after - after % ROWS_AT_ONCE
            for o in range(0, descended, ROWS_AT_ONCE):
                descend_rows(
                    delta, layer_input, o, weight, reals[_NEGATIVE_LR], incoming, columns if layer else columns[:0]
                )
            for o in range(descended):
                parameter_sum += incoming[o]
        for o in range(descended, after):
            if in_tiles:
                if o % ROWS_AT_ONCE == 0:
                    first_of_tile = min(o, after - ROWS_AT_ONCE)
                    gradient_of_rows(delta, layer_input, first_of_tile, gradient)
                row_gradient = gradient[o - first_of_tile]
            elif batch > 1:
                row_gradient = gradient[o]
            else:
                row_gradient = gradient[0]
                if layer:
                    add_scaled(weight[o], delta[0, o], back[0])
                _scaled(layer_input[0], delta[0, o], row_gradient)
            at = 4 * (place + o * before)
            if kind == SGD:
                incoming[o] = _sgd_row(weight[o], row_gradient, reals, decays, columns if layer else columns[:0])
            elif kind == MOMENTUM_SGD:
                momentum = row_at(table[_MOMENTUM] + at, before)
                incoming[o] = _momentum_row(weight[o], row_gradient, momentum, reals, decays, columns)
            elif kind == NESTEROV_SGD:
                momentum = row_at(table[_MOMENTUM] + at, before)
                incoming[o] = _nesterov_row(weight[o], row_gradient, momentum, reals, decays, columns)
            elif kind < ADAM:
                momentum = row_at(table[_MOMENTUM] + at, before if kind == MOMENTUM_RMSPROP else 0)
                average = row_at(table[_SECOND_MOMENT] + at, before)
                incoming[o], moments = _rmsprop_row(weight[o], row_gradient, momentum, average, reals, decays, columns)
                moment_sum += moments
            else:
                incoming[o], moments = _adam_row(
                    weight[o],
                    row_gradient,
                    row_at(table[_MOMENTUM] + at, before),
                    row_at(table[_SECOND_MOMENT] + at, before),
                    first_factors[unit + o],
                    second_factors[unit + o],
                    first_factors[unit - before : unit] if layer else first_factors[:before],
                    second_factors[unit - before : unit] if layer else second_factors[:before],
                    reals,
                    kind,
                    decays,
                    columns,
                )
                moment_sum += moments
            parameter_sum += incoming[o]

        bias_gradient = row_at(bias_gradient_at, after)
        unused = row_at(unused_at, after)
        unused[:] = _ZERO
        _sum_examples(delta, bias_gradient)
        at = 4 * (place + after * before)
        if kind == SGD:
            parameter_sum += _sgd_row(bias, bias_gradient, reals, decays, unused)
        elif kind == MOMENTUM_SGD:
            momentum = row_at(table[_MOMENTUM] + at, after)
            parameter_sum += _momentum_row(bias, bias_gradient, momentum, reals, decays, unused)
        elif kind == NESTEROV_SGD:
            momentum = row_at(table[_MOMENTUM] + at, after)
            parameter_sum += _nesterov_row(bias, bias_gradient, momentum, reals, decays, unused)
        elif kind < ADAM:
            momentum = row_at(table[_MOMENTUM] + at, after if kind == MOMENTUM_RMSPROP else 0)
            average = row_at(table[_SECOND_MOMENT] + at, after)
            magnitudes, moments = _rmsprop_row(bias, bias_gradient, momentum, average, reals, decays, unused)
            parameter_sum += magnitudes
            moment_sum += moments
        else:
            magnitudes, moments = _adam_row(
                bias,
                bias_gradient,
                row_at(table[_MOMENTUM] + at, after),
                row_at(table[_SECOND_MOMENT] + at, after),
                _ZERO,
                _ZERO,
                first_factors[unit : unit + after],
                second_factors[unit : unit + after],
                reals,
                kind,
                decays,
                unused,
            )
            parameter_sum += magnitudes
            moment_sum += moments

        if layer:
            offset = 4 * batch * (unit - width - before)
            differentiate(
                table[_ACTIVATION],
                row_at(pre_at + offset, batch * before),
                row_at(post_at + offset, batch * before),
                row_at(back_at, batch * before),
            )
            delta_at, back_at = back_at, delta_at
    return parameter_sum, moment_sum


@exactly
def _skipping_backward(
    table: Integers,
    reals: Floats,
    features: Floats,
    post_at: int,
    delta_at: int,
    back_at: int,
    incoming_at: int,
    outgoing_at: int,
    changes_at: int,
) -> Number:
    """For ReLU, plain SGD and one example: a unit that was silent has no gradient, and its weights stay as they are.

    Returns the sum of the parameters' magnitudes: of all, or at least of those that may not be finite.
    """
    depth, width = table[_DEPTH], table[_WIDTHS]
    negative_lr, evaluates = reals[_NEGATIVE_LR], table[_EVALUATES]
    unit = width
    place = 0
    for layer in range(depth):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        unit += after
        place += after * (before + 1)
    parameter_sum = _ZERO

    for layer in range(depth - 1, -1, -1):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        unit -= after
        place -= after * (before + 1)
        weight = rows_at(table[_PARAMETERS] + 4 * place, after, before)
        bias = row_at(table[_PARAMETERS] + 4 * (place + after * before), after)
        delta, back = row_at(delta_at, after), row_at(back_at, before)
        incoming = row_at(incoming_at + 4 * (unit - width), after)
        columns = row_at(outgoing_at + 4 * (unit - before if layer else 0), before)
        layer_input = row_at(post_at + 4 * (unit - width - before), before) if layer else features
        if _is_remembered(table, layer):
            known = integers_at(table[_MAGNITUDES] + 8 * layer, 1)
            fineness, incoming_sums, outgoing_sums = _sums_of(table, layer)
            if layer:
                parameter_sum += _turned_backward(
                    rows_at(table[_PARAMETERS] + 4 * place, before, after),
                    layer_input,
                    delta,
                    negative_lr,
                    evaluates,
                    fineness,
                    known,
                    incoming_sums,
                    outgoing_sums,
                    _words(changes_at, after),
                    back,
                    incoming,
                    columns,
                )
            else:
                parameter_sum += _first_backward(
                    weight, layer_input, delta, negative_lr, fineness, known, incoming_sums, incoming
                )
            for o in range(after):
                bias[o] += delta[o] * negative_lr
                parameter_sum += abs(bias[o])
        else:
            if layer:
                back[:] = _ZERO
                columns[:] = _ZERO
            for o in range(after):
                slope = delta[o]
                if slope != _ZERO:
                    if layer:
                        incoming[o] = _skip_row(weight[o], layer_input, slope, negative_lr, back, columns)
                    else:
                        incoming[o] = _skip_first_row(weight[o], layer_input, slope, negative_lr)
                    bias[o] += slope * negative_lr
                elif not evaluates:
                    incoming[o] = _ZERO
                elif layer:
                    incoming[o] = _skipped_row(weight[o], columns)
                else:
                    incoming[o] = _sum_of_magnitudes(weight[o])
                parameter_sum += incoming[o] + abs(bias[o])
        if layer:
            for i in range(before):
                if layer_input[i] <= _ZERO:
                    back[i] = _ZERO
            delta_at, back_at = back_at, delta_at
    return parameter_sum


@exactly
def _count_steps(table: Integers, steps: int) -> None:
    """Adam's count of every parameter."""
    count = 0
    for layer in range(table[_DEPTH]):
        count += table[_WIDTHS + layer + 1] * (table[_WIDTHS + layer] + 1)
    counts = row_at(table[_COUNTS], count)
    more = np.float32(steps)
    for p in range(count):
        counts[p] = min(counts[p] + more, _LAST_COUNT)


@as_written
def _falls_due(owed: Doubles, rates: Doubles, mature: Doubles) -> int:
    """`ReplacementSchedule.advance` for a step that replaces nothing; 1, and nothing is done, if this is none.

    Without any freedom in rounding: the sums must be those that Python makes.
    """
    for layer in range(len(rates)):
        if min(math.floor(owed[layer] + rates[layer] * mature[layer]), mature[layer]) >= 1.0:
            return 1
    for layer in range(len(rates)):
        owed[layer] = owed[layer] + rates[layer] * mature[layer]
    return 0


@exactly
def _show_to_probe(table: Integers, features: Floats, labels: Integers, values: Floats) -> None:
    """`cbp.examples.pending.Probe.extend`, where there is room."""
    rows, width, outputs = table[_PROBE_ROWS], features.shape[1], values.shape[1]
    position = integers_at(table[_PROBE_POSITION], 2)
    following = position[0]
    for b in range(len(features)):
        if following >= rows:
            following = 0
        seen = row_at(table[_PROBE_FEATURES] + 4 * following * width, width)
        for i in range(width):
            seen[i] = features[b, i]
        if table[_LOSS] == CROSS_ENTROPY:
            integers_at(table[_PROBE_TARGETS] + 8 * following, 1)[0] = labels[b]
        else:
            seen_values = row_at(table[_PROBE_TARGETS] + 4 * following * outputs, outputs)
            for c in range(outputs):
                seen_values[c] = values[b, c]
        following += 1
    position[0] = following
    position[1] = min(position[1] + len(features), rows)


@as_written
def _add_to_tally(tally: Doubles, loss: Number, accuracy: Number) -> None:
    decay = tally[_AVERAGE_DECAY]
    share = 1.0 - decay
    tally[_LOSS_SUM] += np.float64(loss)
    tally[_ACCURACY_SUM] += np.float64(accuracy)
    tally[_FADED_LOSS] = tally[_FADED_LOSS] * decay + share * np.float64(loss)
    tally[_FADED_ACCURACY] = tally[_FADED_ACCURACY] * decay + share * np.float64(accuracy)


# --- What Python calls ------------------------------------------------------------------------------------------------


@exactly
def run(
    table: Integers,
    features: Floats,
    labels: Integers,
    values: Floats,
    start: int,
    steps: int,
) -> int:
    """Takes up to `steps` steps, and stops early after one at which units are to be replaced.

    Returns how many it took; negative if units are to be replaced now.

    features [N, I], of which the examples from `start` on are learned from; labels [N] or values [N, C], the other one
    empty. Their weights are where `table` says, and there goes what it counts and adds up over a message.

    No unit may ripen within these steps: `table` says how many are mature.
    """
    depth, batch, width = table[_DEPTH], table[_BATCH], table[_WIDTHS]
    hidden = depth - 1
    units = 0
    widest = width
    for layer in range(1, depth + 1):
        widest = max(widest, table[_WIDTHS + layer])
        if layer <= hidden:
            units += table[_WIDTHS + layer]
    classes = table[_WIDTHS + depth]
    skips, evaluates, loss_kind = table[_SKIPS], table[_EVALUATES], table[_LOSS]
    reals = row_at(table[_REALS], _REAL_COUNT)
    outputs = rows_at(table[_OUTPUTS], table[_SCORE_ROWS], classes)
    scores = _double_rows(table[_SCORES], 2, table[_SCORE_ROWS])
    weights = row_at(table[_WEIGHTS], len(features))
    tally = _doubles(table[_TALLY], _SUMS)
    if start == 0:
        tally[_LOSS_SUM] = tally[_ACCURACY_SUM] = tally[_FADED_LOSS] = tally[_FADED_ACCURACY] = 0.0
    is_adam = table[_OPTIMIZER] >= ADAM
    saves_pre = table[_ACTIVATION] != RELU and table[_ACTIVATION] != TANH and table[_ACTIVATION] != SIGMOID

    pre_at = table[_FLOATS]
    post_at = pre_at + 4 * batch * units
    delta_at = post_at + 4 * batch * units
    back_at = delta_at + 4 * batch * widest
    incoming_at = back_at + 4 * batch * widest
    outgoing_at = incoming_at + 4 * (units + classes)
    activity_at = outgoing_at + 4 * (units + width)
    corrections_at = activity_at + 4 * widest
    first_factors_at = corrections_at + 4 * widest
    second_factors_at = first_factors_at + 4 * (width + units + classes)
    gradient_at = second_factors_at + 4 * (width + units + classes)
    if not saves_pre:
        pre_at = post_at

    owed = _doubles(table[_OWED], hidden)
    rates = _doubles(table[_SCHEDULE], hidden)
    mature = _doubles(table[_SCHEDULE] + 8 * hidden, hidden)

    done = 0
    due = 0
    parameter_sum = moment_sum = _ZERO
    while done < steps and not due:
        begin = start + done * batch
        address = table[_PARAMETERS]

        # Forward
        layer_input = features[begin : begin + batch]
        before = width
        offset = 0
        for layer in range(depth):
            after = table[_WIDTHS + layer + 1]
            address_of_layer = address
            weight = rows_at(address, after, before)
            bias = row_at(address + 4 * after * before, after)
            address += 4 * after * (before + 1)
            if layer < hidden:
                layer_output = rows_at(pre_at + 4 * batch * offset, batch, after)
            else:
                layer_output = outputs[begin : begin + batch]
            if is_turned(table[_REMEMBERS], depth, layer, before, after):
                turned_affine(rows_at(address_of_layer, before, after), bias, layer_input[0], layer_output[0])
            else:
                affine(weight, bias, layer_input, layer_output)
            if layer < hidden:
                pre = row_at(pre_at + 4 * batch * offset, batch * after)
                post = row_at(post_at + 4 * batch * offset, batch * after)
                activate(table[_ACTIVATION], pre, post)
                layer_input = rows_at(post_at + 4 * batch * offset, batch, after)
                offset += after
            before = after

        # Loss and its gradient
        delta = rows_at(delta_at, batch, classes)
        scale = reals[_SCALE]
        for b in range(batch):
            factor = weights[begin + b] * scale
            if loss_kind == CROSS_ENTROPY:
                loss, right = cross_entropy(outputs[begin + b], labels[begin + b], factor, delta[b])
            else:
                loss, right = regression(
                    loss_kind, outputs[begin + b], values[begin + b], factor, reals[_DELTA], delta[b]
                )
            scores[0, begin + b] = loss
            scores[1, begin + b] = right
            _add_to_tally(tally, loss, right)

        if table[_CLIPPING]:
            _clip(
                table,
                reals,
                features[begin : begin + batch],
                pre_at,
                post_at,
                delta_at,
                back_at,
                gradient_at + 8 * widest,
            )

        # Backward and update, layer by layer from the last
        parameter_sum = moment_sum = _ZERO
        if skips:
            parameter_sum = _skipping_backward(
                table, reals, features[begin], post_at, delta_at, back_at, incoming_at, outgoing_at, activity_at
            )
        else:
            first_factors = row_at(first_factors_at, width + units + classes)
            second_factors = row_at(second_factors_at, width + units + classes)
            if is_adam:
                ages = integers_at(table[_AGES], units)
                _adam_factors(ages, table[_STEPS] + 1, width, reals, first_factors, second_factors)
            parameter_sum, moment_sum = _backward(
                table,
                reals,
                features[begin : begin + batch],
                pre_at,
                post_at,
                delta_at,
                back_at,
                incoming_at,
                outgoing_at,
                gradient_at,
                first_factors,
                second_factors,
            )

        # Generate and test
        table[_STEPS] += 1
        done += 1
        if not evaluates:
            continue
        offset = 0
        for layer in range(hidden):
            _evaluate(
                table,
                reals,
                layer,
                offset,
                post_at + 4 * batch * offset,
                incoming_at + 4 * offset,
                outgoing_at + 4 * (width + offset),
                table[_RANDOM] + 4 * ((done - 1) * units + offset),
                activity_at,
                corrections_at,
            )
            offset += table[_WIDTHS + layer + 1]
        due = _falls_due(owed, rates, mature)

    if is_adam and done:
        _count_steps(table, done)
    _show_to_probe(
        table,
        features[start : start + done * batch],
        labels[start : start + done * batch],
        values[start : start + done * batch],
    )
    tally[_PARAMETER_SUM] = parameter_sum
    tally[_MOMENT_SUM] = moment_sum
    return -done if due else done


@as_written
def point_to(table: Integers, features: Floats, labels: Integers, values: Floats) -> None:
    """Lets `run_each` find what `run` gets."""
    table[_FEATURES], table[_EXAMPLES] = features.ctypes.data, len(features)
    table[_LABELS], table[_VALUES] = labels.ctypes.data, values.ctypes.data


@as_written
def run_each(tables: Integers, ahead: Integers) -> None:
    """`run` for one learner after another, found by the addresses of their tables.

    ahead [learners, 2]: the example to start with and the steps to take, in whose place comes what `run` returns.
    """
    for k in range(len(tables)):
        depth = integers_at(tables[k], 1)[_DEPTH]
        table = integers_at(tables[k], _WIDTHS + depth + 1)
        examples = table[_EXAMPLES]
        labels, values = (examples, 0) if table[_LOSS] == CROSS_ENTROPY else (0, examples)
        ahead[k, 1] = run(
            table,
            rows_at(table[_FEATURES], examples, table[_WIDTHS]),
            integers_at(table[_LABELS], labels),
            rows_at(table[_VALUES], values, table[_WIDTHS + depth]),
            ahead[k, 0],
            ahead[k, 1],
        )


@exactly
def replace(table: Integers, counts: Integers, drawn: Floats, ranges: Floats, published_order: bool) -> None:
    """`cbp.units.replacement.select_units` and `replace_units`: counts[layer] units of every hidden layer.

    drawn: numbers for the incoming weights of all of them, one after another.
    ranges: per layer [widths and bounds], a weight is number · width − bound, as `draw_uniform` rounds it.

    What it adds to the sum of the parameters' magnitudes are those of the biases: bias compensation may overflow them.
    """
    depth = table[_DEPTH]
    reals = row_at(table[_REALS], _REAL_COUNT)
    strength, kept = reals[_STRENGTH], reals[_KEPT]
    chosen = np.empty((depth - 1, max(counts)), np.int64)
    place = 0
    unit = 0
    start = 0
    for layer in range(depth - 1):
        before, after, readers = table[_WIDTHS + layer], table[_WIDTHS + layer + 1], table[_WIDTHS + layer + 2]
        next_place = place + after * (before + 1)
        turned = is_turned(table[_REMEMBERS], depth, layer + 1, after, readers)
        if counts[layer]:
            _select(
                row_at(table[_UTILITIES] + 4 * unit, after),
                integers_at(table[_AGES] + 8 * unit, after),
                table[_MATURITY],
                reals[_LOG_DECAY],
                chosen[layer, : counts[layer]],
            )
        if counts[layer] and reals[_BIAS_COMPENSATION] != _ZERO:
            _compensate(
                chosen[layer, : counts[layer]],
                integers_at(table[_AGES] + 8 * unit, after),
                row_at(table[_MEANS] + 4 * unit, after),
                rows_at(
                    table[_PARAMETERS] + 4 * next_place, after if turned else readers, readers if turned else after
                ),
                turned,
                row_at(table[_PARAMETERS] + 4 * (next_place + readers * after), readers),
                reals[_LOG_DECAY],
                reals[_BIAS_COMPENSATION],
            )
        for rank in range(counts[layer]):
            j = chosen[layer, rank]
            newborn = np.empty(before, np.float32)
            for i in range(before):
                newborn[i] = drawn[start + i] * ranges[0, layer] - ranges[1, layer]
            if strength != _ONE:
                newborn = _approached(table, layer, place, j, newborn, strength)
            _put_incoming(table, layer, place, j, newborn)
            start += before
            bias = row_at(table[_PARAMETERS] + 4 * (place + after * before + j), 1)
            bias[0] = bias[0] * kept if strength != _ONE else _ZERO
            for slot in (table[_MOMENTUM], table[_SECOND_MOMENT], table[_COUNTS]):
                if slot:  # then no layer is turned
                    row_at(slot + 4 * (place + j * before), before)[:] = _ZERO
                    row_at(slot + 4 * (place + after * before + j), 1)[0] = _ZERO
            row_at(table[_UTILITIES] + 4 * (unit + j), 1)[0] = _ZERO
            row_at(table[_MEANS] + 4 * (unit + j), 1)[0] = _ZERO
            integers_at(table[_AGES] + 8 * (unit + j), 1)[0] = 0
        if published_order:
            _silence(table, layer, next_place, chosen[layer, : counts[layer]], strength, kept)
        place = next_place
        unit += after

    if not published_order:
        place = 0
        for layer in range(depth - 1):
            before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
            place += after * (before + 1)
            _silence(table, layer, place, chosen[layer, : counts[layer]], strength, kept)

    bias_sum = _ZERO
    place = 0
    for layer in range(depth):
        before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
        bias_sum += _sum_of_magnitudes(row_at(table[_PARAMETERS] + 4 * (place + after * before), after))
        place += after * (before + 1)
    _doubles(table[_TALLY], _SUMS)[_PARAMETER_SUM] += bias_sum


@exactly
def _select(utilities: Floats, ages: Integers, maturity: int, log_decay: Number, chosen: Integers) -> None:
    """The mature units of lowest bias-corrected utility, lowest first; among equals, the highest index first."""
    corrected = np.empty(len(utilities), np.float32)
    free = np.empty(len(utilities), np.bool_)
    for u in range(len(utilities)):
        free[u] = ages[u] > maturity
        corrected[u] = utilities[u] / bias_correction(ages[u], log_decay) if free[u] else _ZERO
    for rank in range(len(chosen)):
        best = -1
        for u in range(len(utilities)):
            if free[u] and (best < 0 or not corrected[u] > corrected[best]):
                best = u
        chosen[rank] = best
        free[best] = False


@exactly
def _compensate(
    chosen: Integers,
    ages: Integers,
    means: Floats,
    readers: Floats,
    turned: int,
    readers_bias: Floats,
    log_decay: Number,
    share: Number,
) -> None:
    """readers: the weights of the next layer, [in, out] if turned; share of the means that is handed on."""
    corrected = np.empty(len(chosen), np.float32)
    for rank in range(len(chosen)):
        j = chosen[rank]
        corrected[rank] = means[j] / bias_correction(ages[j], log_decay) * share
    for o in range(len(readers_bias)):
        handed_on = _ZERO
        for rank in range(len(chosen)):
            j = chosen[rank]
            handed_on += (readers[j, o] if turned else readers[o, j]) * corrected[rank]
        readers_bias[o] += handed_on


@exactly
def _silence(table: Integers, layer: int, place: int, chosen: Integers, strength: Number, kept: Number) -> None:
    """Zeroes what the next layer, its weights at `place`, reads of the chosen units, or scales it down."""
    after, readers = table[_WIDTHS + layer + 1], table[_WIDTHS + layer + 2]
    if is_turned(table[_REMEMBERS], table[_DEPTH], layer + 1, after, readers):
        weight = rows_at(table[_PARAMETERS] + 4 * place, after, readers)
        fineness, incoming, outgoing = _sums_of(table, layer + 1)
        for j in chosen:
            outgoing[j] = 0
            for o in range(readers):
                incoming[o] -= np.int64(_multiples(weight[j, o], fineness))
                weight[j, o] = weight[j, o] * kept if strength != _ONE else _ZERO
                left = np.int64(_multiples(weight[j, o], fineness))
                incoming[o] += left
                outgoing[j] += left
        return
    weight = rows_at(table[_PARAMETERS] + 4 * place, readers, after)
    for o in range(readers):
        for j in chosen:
            weight[o, j] = weight[o, j] * kept if strength != _ONE else _ZERO
    for slot in (table[_MOMENTUM], table[_SECOND_MOMENT], table[_COUNTS]):
        if slot:
            remembered = rows_at(slot + 4 * place, readers, after)
            for o in range(readers):
                for j in chosen:
                    remembered[o, j] = _ZERO


@exactly
def _approached(table: Integers, layer: int, place: int, j: int, drawn: Floats, strength: Number) -> Floats:
    """Incoming weights of unit j, at `place`, so far on the way to the drawn ones."""
    before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
    turned = is_turned(table[_REMEMBERS], table[_DEPTH], layer, before, after)
    weight = rows_at(table[_PARAMETERS] + 4 * place, before if turned else after, after if turned else before)
    reached = np.empty(before, np.float32)
    for i in range(before):
        reached[i] = _lerp(weight[i, j] if turned else weight[j, i], drawn[i], strength)
    return reached


@exactly
def _put_incoming(table: Integers, layer: int, place: int, j: int, drawn: Floats) -> None:
    """Gives unit j of a hidden layer, whose incoming weights are at `place`, the drawn ones."""
    before, after = table[_WIDTHS + layer], table[_WIDTHS + layer + 1]
    turned = is_turned(table[_REMEMBERS], table[_DEPTH], layer, before, after)
    if not turned:
        row_at(table[_PARAMETERS] + 4 * (place + j * before), before)[:] = drawn
    if not _is_remembered(table, layer):
        return
    fineness, incoming, outgoing = _sums_of(table, layer)
    incoming[j] = 0
    for i in range(before):
        incoming[j] += np.int64(_multiples(drawn[i], fineness))
    if turned:
        weight = rows_at(table[_PARAMETERS] + 4 * place, before, after)
        for i in range(before):
            outgoing[i] += np.int64(_multiples(drawn[i], fineness)) - np.int64(_multiples(weight[i, j], fineness))
            weight[i, j] = drawn[i]


@exactly
def _sums_of(table: Integers, layer: int) -> tuple[Number, Integers, Integers]:
    """A layer's fineness, the sums of its units' incoming weights, and of what the units before hand on to it; these
    are empty for the first layer."""
    depth = table[_DEPTH]
    units = first = 0
    for other in range(1, depth):
        if other <= layer:
            first += table[_WIDTHS + other]
        units += table[_WIDTHS + other]
    before, after = table[_WIDTHS + layer] if layer else 0, table[_WIDTHS + layer + 1]
    return (
        row_at(table[_FINENESS], depth)[layer],
        integers_at(table[_MAGNITUDES] + 8 * (depth + first), after),
        integers_at(table[_MAGNITUDES] + 8 * (depth + units + first - before), before),
    )


ENTRY_POINTS = (run, run_each, point_to, replace, fill_corrections, is_turned)
"""All that Python calls."""
