"""The table that a kernel gets: what stands where in it, and how memory is found by address."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

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

ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)


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
doubles_at: Callable[[int, int], Doubles] = _view(types.float64, 1)
double_rows_at: Callable[[int, int, int], Doubles] = _view(types.float64, 2)
integers_at: Callable[[int, int], Integers] = _view(types.int64, 1)
words_at: Callable[[int, int], Words] = _view(types.int32, 1)
