"""Matrix products of a layer's weights with the examples of one step, in the way that is fastest for their number.

A library's products are made for large matrices. For up to `_MOST_IN_TILES` examples ours are faster: they copy
nothing, and hold the sums of a tile (four examples by four outputs, or eight rows by 32 columns) in vector registers.
Tiles at the end of a matrix overlap those before, and compute the same numbers there once more.

Shapes: B examples in a step; a layer is [out, in].
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbp.engines.compiled.compiling import exactly, in_any_order
from cbp.engines.compiled.lanes import (
    LANE_BYTES,
    LANES,
    Lanes,
    absolute,
    add,
    fill,
    has_wide_registers,
    load,
    load_first,
    load_four,
    load_one,
    multiply_add,
    store_first,
    store_fours,
    sum_each,
    zeros,
)

Floats = NDArray[np.float32]
Number = Any
"""A scalar whose width matters: float32."""

ROWS_AT_ONCE = 8
"""Of a weight's gradient, in tiles."""

_ZERO = np.float32(0.0)
_LONG_ROW = 512
"""From here on a library's product of one example is faster than ours."""
_WIDE = has_wide_registers()
_MOST_IN_TILES = 32


@exactly
def affine(weight: Floats, bias: Floats, inputs: Floats, outputs: Floats) -> None:
    """outputs [B, out] ← inputs [B, in] · weightᵀ + bias."""
    examples, into = inputs.shape
    if examples == 1 and into < _LONG_ROW:
        _affine_of_one(weight, bias, inputs[0], outputs[0])
    elif _WIDE and 4 <= examples <= _MOST_IN_TILES and len(bias) >= 4:
        _affine_in_tiles(weight, bias, inputs, outputs)
    else:
        if examples == 1:
            np.dot(weight, inputs[0], outputs[0])
        else:
            np.dot(inputs, weight.T, outputs)
        add_bias(bias, outputs)


@exactly
def hand_back(delta: Floats, weight: Floats, back: Floats) -> None:
    """back [B, in] ← delta [B, out] · weight, for at least two examples."""
    examples, out = delta.shape
    into = weight.shape[1]
    if _WIDE and ROWS_AT_ONCE <= examples <= _MOST_IN_TILES:
        row = 4 * into
        for b in range(0, examples, ROWS_AT_ONCE):
            first = min(b, examples - ROWS_AT_ONCE)
            _eight_rows(
                delta.ctypes.data + 4 * first * out,
                4 * out,
                4,
                out,
                weight.ctypes.data,
                back.ctypes.data + row * first,
                into,
            )
    else:
        np.dot(delta, weight, back)


@exactly
def gradient_in_tiles(examples: int, out: int) -> bool:
    """Whether `gradient_of_rows` is the way to a weight's gradient."""
    return _WIDE and 1 < examples <= _MOST_IN_TILES and out >= ROWS_AT_ONCE


@exactly
def gradient_of_rows(delta: Floats, inputs: Floats, first: int, gradient: Floats) -> None:
    """gradient [8, in] ← rows of deltaᵀ [out, B] · inputs [B, in] from `first` on; there must be so many."""
    examples, out = delta.shape
    _eight_rows(
        delta.ctypes.data + 4 * first,
        4,
        4 * out,
        examples,
        inputs.ctypes.data,
        gradient.ctypes.data,
        inputs.shape[1],
    )


@exactly
def descend_rows(
    delta: Floats,
    inputs: Floats,
    first: int,
    weight: Floats,
    negative_lr: Number,
    row_sums: Floats,
    column_sums: Floats,
) -> None:
    """Eight rows of weight from `first` on += negative_lr · the same rows of deltaᵀ · inputs.

    row_sums [out] of these rows ← sums of the magnitudes after the update; column_sums [in] += those of the columns,
    unless there are none.
    """
    examples, out = delta.shape
    into = inputs.shape[1]
    sums = _descend_eight(
        delta.ctypes.data + 4 * first,
        4,
        4 * out,
        examples,
        inputs.ctypes.data,
        weight.ctypes.data + 4 * first * into,
        into,
        fill(negative_lr),
        column_sums.ctypes.data,
        len(column_sums) > 0,
    )
    store_first(row_sums.ctypes.data + 4 * first, ROWS_AT_ONCE, sums)


@in_any_order
def _affine_of_one(weight: Floats, bias: Floats, inputs: Floats, outputs: Floats) -> None:
    """outputs [out] ← weight · inputs [in] + bias."""
    out, into = weight.shape
    whole = out - out % 4
    for o in range(0, whole, 4):
        first = second = third = fourth = _ZERO
        for i in range(into):
            value = inputs[i]
            first += weight[o, i] * value
            second += weight[o + 1, i] * value
            third += weight[o + 2, i] * value
            fourth += weight[o + 3, i] * value
        outputs[o] = bias[o] + first
        outputs[o + 1] = bias[o + 1] + second
        outputs[o + 2] = bias[o + 2] + third
        outputs[o + 3] = bias[o + 3] + fourth
    for o in range(whole, out):
        total = _ZERO
        for i in range(into):
            total += weight[o, i] * inputs[i]
        outputs[o] = bias[o] + total


@exactly
def turned_affine(weight: Floats, bias: Floats, inputs: Floats, outputs: Floats) -> None:
    """outputs [out] ← inputs [in] · weight [in, out] + bias; inputs that are 0 cost nothing."""
    outputs[:] = bias
    for i in range(len(inputs)):
        if inputs[i] != _ZERO:
            add_scaled(weight[i], inputs[i], outputs)


@exactly
def add_scaled(row: Floats, factor: Number, total: Floats) -> None:
    for i in range(len(row)):
        total[i] += factor * row[i]


@exactly
def add_bias(bias: Floats, outputs: Floats) -> None:
    examples, out = outputs.shape
    for b in range(examples):
        for o in range(out):
            outputs[b, o] += bias[o]


# --- Tiles; everything by address, and distances in bytes -------------------------------------------------------------


@exactly
def _affine_in_tiles(weight: Floats, bias: Floats, inputs: Floats, outputs: Floats) -> None:
    """`affine` for at least four examples and four outputs: a sum has sixteen lanes, to be added up at its end."""
    examples, into = inputs.shape
    out = len(bias)
    row = 4 * into
    left = into % LANES
    whole = 4 * (into - left)
    for o in range(0, out, 4):
        first_output = min(o, out - 4)
        w0 = weight.ctypes.data + row * first_output
        w1, w2, w3 = w0 + row, w0 + 2 * row, w0 + 3 * row
        biases = load_four(bias.ctypes.data + 4 * first_output)
        for b in range(0, examples, 4):
            first_example = min(b, examples - 4)
            x0 = inputs.ctypes.data + row * first_example
            x1, x2, x3 = x0 + row, x0 + 2 * row, x0 + 3 * row
            sums = _eight_zeros() + _eight_zeros()
            for at in range(0, whole, LANE_BYTES):
                sums = _four_by_four(
                    sums,
                    (load(x0 + at), load(x1 + at), load(x2 + at), load(x3 + at)),
                    (load(w0 + at), load(w1 + at), load(w2 + at), load(w3 + at)),
                )
            if left:
                sums = _four_by_four(
                    sums,
                    (
                        load_first(x0 + whole, left),
                        load_first(x1 + whole, left),
                        load_first(x2 + whole, left),
                        load_first(x3 + whole, left),
                    ),
                    (
                        load_first(w0 + whole, left),
                        load_first(w1 + whole, left),
                        load_first(w2 + whole, left),
                        load_first(w3 + whole, left),
                    ),
                )
            tile = outputs.ctypes.data + 4 * (first_example * out + first_output)
            store_fours(tile, 4 * out, add(sum_each(sums), biases))


@exactly
def _four_by_four(
    sums: tuple[Lanes, ...], x: tuple[Lanes, Lanes, Lanes, Lanes], w: tuple[Lanes, Lanes, Lanes, Lanes]
) -> tuple[Lanes, ...]:
    """sums[4 b + o] + x[b] · w[o]."""
    return (
        multiply_add(x[0], w[0], sums[0]),
        multiply_add(x[0], w[1], sums[1]),
        multiply_add(x[0], w[2], sums[2]),
        multiply_add(x[0], w[3], sums[3]),
        multiply_add(x[1], w[0], sums[4]),
        multiply_add(x[1], w[1], sums[5]),
        multiply_add(x[1], w[2], sums[6]),
        multiply_add(x[1], w[3], sums[7]),
        multiply_add(x[2], w[0], sums[8]),
        multiply_add(x[2], w[1], sums[9]),
        multiply_add(x[2], w[2], sums[10]),
        multiply_add(x[2], w[3], sums[11]),
        multiply_add(x[3], w[0], sums[12]),
        multiply_add(x[3], w[1], sums[13]),
        multiply_add(x[3], w[2], sums[14]),
        multiply_add(x[3], w[3], sums[15]),
    )


@exactly
def _eight_rows(factors: int, across: int, along: int, count: int, matrix: int, product: int, columns: int) -> None:
    """product [8, columns] ← factors [8, count] · matrix [count, columns].

    The factors of a row are `along` bytes apart, the rows `across`.
    """
    row = 4 * columns
    left = columns % (2 * LANES)
    whole = 4 * (columns - left)
    for at in range(0, whole, 2 * LANE_BYTES):
        low, high = _wide_sums(factors, across, along, count, matrix + at, row)
        _store_eight(product + at, row, LANES, low)
        _store_eight(product + at + LANE_BYTES, row, LANES, high)
    for at in range(whole, row, LANE_BYTES):
        filled = min((row - at) // 4, LANES)
        _store_eight(product + at, row, filled, _narrow_sums(factors, across, along, count, matrix + at, row, filled))


@exactly
def _descend_eight(
    factors: int,
    across: int,
    along: int,
    count: int,
    matrix: int,
    weights: int,
    columns: int,
    rate: Lanes,
    column_sums: int,
    gathers: bool,
) -> Lanes:
    """weights [8, columns] += rate · product, with the product of `_eight_rows`, which is never stored.

    Returns the rows' sums of magnitudes; those of the columns, if they are gathered, are added to.
    """
    row = 4 * columns
    left = columns % (2 * LANES)
    whole = 4 * (columns - left)
    sums = _eight_zeros()
    for at in range(0, whole, 2 * LANE_BYTES):
        low, high = _wide_sums(factors, across, along, count, matrix + at, row)
        sums = _update_eight(weights + at, row, LANES, low, rate, sums, column_sums + at, gathers)
        after = at + LANE_BYTES
        sums = _update_eight(weights + after, row, LANES, high, rate, sums, column_sums + after, gathers)
    for at in range(whole, row, LANE_BYTES):
        filled = min((row - at) // 4, LANES)
        low = _narrow_sums(factors, across, along, count, matrix + at, row, filled)
        sums = _update_eight(weights + at, row, filled, low, rate, sums, column_sums + at, gathers)
    return sum_each(sums + _eight_zeros())


@exactly
def _update_eight(
    first: int,
    row: int,
    filled: int,
    slopes: tuple[Lanes, ...],
    rate: Lanes,
    sums: tuple[Lanes, ...],
    column_sums: int,
    gathers: bool,
) -> tuple[Lanes, ...]:
    new = (
        multiply_add(slopes[0], rate, load_first(first, filled)),
        multiply_add(slopes[1], rate, load_first(first + row, filled)),
        multiply_add(slopes[2], rate, load_first(first + 2 * row, filled)),
        multiply_add(slopes[3], rate, load_first(first + 3 * row, filled)),
        multiply_add(slopes[4], rate, load_first(first + 4 * row, filled)),
        multiply_add(slopes[5], rate, load_first(first + 5 * row, filled)),
        multiply_add(slopes[6], rate, load_first(first + 6 * row, filled)),
        multiply_add(slopes[7], rate, load_first(first + 7 * row, filled)),
    )
    _store_eight(first, row, filled, new)
    m0, m1, m2, m3 = absolute(new[0]), absolute(new[1]), absolute(new[2]), absolute(new[3])
    m4, m5, m6, m7 = absolute(new[4]), absolute(new[5]), absolute(new[6]), absolute(new[7])
    if gathers:
        eight = add(add(add(m0, m1), add(m2, m3)), add(add(m4, m5), add(m6, m7)))
        store_first(column_sums, filled, add(load_first(column_sums, filled), eight))
    return (
        add(sums[0], m0),
        add(sums[1], m1),
        add(sums[2], m2),
        add(sums[3], m3),
        add(sums[4], m4),
        add(sums[5], m5),
        add(sums[6], m6),
        add(sums[7], m7),
    )


@exactly
def _wide_sums(
    factors: int, across: int, along: int, count: int, matrix: int, row: int
) -> tuple[tuple[Lanes, ...], tuple[Lanes, ...]]:
    """Eight rows of the product, 32 columns of them."""
    low = high = _eight_zeros()
    for _ in range(count):
        eight = _eight_factors(factors, across)
        low = _eight_more(low, eight, load(matrix))
        high = _eight_more(high, eight, load(matrix + LANE_BYTES))
        factors += along
        matrix += row
    return low, high


@exactly
def _narrow_sums(
    factors: int, across: int, along: int, count: int, matrix: int, row: int, filled: int
) -> tuple[Lanes, ...]:
    """The same for up to 16 columns."""
    sums = _eight_zeros()
    for _ in range(count):
        sums = _eight_more(sums, _eight_factors(factors, across), load_first(matrix, filled))
        factors += along
        matrix += row
    return sums


@exactly
def _store_eight(first: int, row: int, filled: int, eight: tuple[Lanes, ...]) -> None:
    store_first(first, filled, eight[0])
    store_first(first + row, filled, eight[1])
    store_first(first + 2 * row, filled, eight[2])
    store_first(first + 3 * row, filled, eight[3])
    store_first(first + 4 * row, filled, eight[4])
    store_first(first + 5 * row, filled, eight[5])
    store_first(first + 6 * row, filled, eight[6])
    store_first(first + 7 * row, filled, eight[7])


@exactly
def _eight_zeros() -> tuple[Lanes, ...]:
    return zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()


@exactly
def _eight_factors(first: int, across: int) -> tuple[Lanes, ...]:
    return (
        load_one(first),
        load_one(first + across),
        load_one(first + 2 * across),
        load_one(first + 3 * across),
        load_one(first + 4 * across),
        load_one(first + 5 * across),
        load_one(first + 6 * across),
        load_one(first + 7 * across),
    )


@exactly
def _eight_more(sums: tuple[Lanes, ...], factors: tuple[Lanes, ...], term: Lanes) -> tuple[Lanes, ...]:
    return (
        multiply_add(factors[0], term, sums[0]),
        multiply_add(factors[1], term, sums[1]),
        multiply_add(factors[2], term, sums[2]),
        multiply_add(factors[3], term, sums[3]),
        multiply_add(factors[4], term, sums[4]),
        multiply_add(factors[5], term, sums[5]),
        multiply_add(factors[6], term, sums[6]),
        multiply_add(factors[7], term, sums[7]),
    )
