"""Large layers, one example a step, ReLU and plain SGD.

Their time is that of moving weights, so units that are silent are passed over: with a unit's outgoing weights side by
side (`is_turned`), a silent one costs nothing, forward or backward. What its utility needs of it, sums of magnitudes,
is remembered: every magnitude is rounded to a multiple of 1 / fineness, and the multiples are summed as integers.
Those sums do not depend on the order, nor on whether they were made anew or brought up to date at every change; so a
learner restored from a snapshot, where they are not kept, has the same ones.

A multiple has 30 bits, and a sum can change by 31 in one step. If a weight is larger, all sums of its layer are made
in floating point at every step: slower, and just as independent of what was before. If a step could change more, they
are made anew after it.
"""

import numpy as np

from cbp.engines.compiled.compiling import as_written, exactly, in_any_order
from cbp.engines.compiled.rows import sum_of_magnitudes
from cbp.engines.compiled.table import HALF, ZERO, Floats, Integers, Number, Table, Words, integers_at, row_at
from cbp.engines.compiled.updates import skipped_row

LARGE = 512
"""A layer is large if it reads so many, and hands on so many if it is not the first."""
_TOO_LARGE = np.float32(2**30)
"""No multiple of a remembered weight's magnitude."""
_MOST_CHANGE_OF_WEIGHT = np.float32(2**29)
_MOST_CHANGE_OF_SUM = np.float32(1.9e9)
"""Less than 2³¹, with room for the rounding of each summand."""


@as_written
def is_turned(remembers: int, depth: int, layer: int, before: int, after: int) -> int:
    """1 if the weights of a layer lie [in, out] in memory instead of [out, in]."""
    return 1 if remembers and 0 < layer < depth - 1 and before >= LARGE and after >= LARGE else 0


@as_written
def is_remembered(table: Integers, layer: int) -> int:
    before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
    if table[Table.REMEMBERS] and layer == 0 and before >= LARGE:
        return 1
    return is_turned(table[Table.REMEMBERS], table[Table.DEPTH], layer, before, after)


@as_written
def multiples_of(weight: Number, fineness: Number) -> Number:
    """int32; the product is exact, for fineness is a power of two."""
    return np.int32(abs(weight) * fineness + HALF)


@in_any_order
def _turned_row(
    row: Floats, delta: Floats, value: Number, negative_lr: Number, fineness: Number, changes: Words
) -> tuple[Number, Number, Number]:
    """SGD by one example on what a unit hands on; `changes` gathers those of the readers' sums.

    Returns the gradient in the unit's activation, the change of its own sum, and all new multiples or-ed together.
    """
    back = ZERO
    change = bits = np.int32(0)
    for o in range(len(row)):
        old, slope = row[o], delta[o]
        back += old * slope
        new = old + (slope * value) * negative_lr
        row[o] = new
        multiples = np.int32(abs(new) * fineness + HALF)
        more = np.int32(multiples - np.int32(abs(old) * fineness + HALF))
        changes[o] = np.int32(changes[o] + more)
        change = np.int32(change + more)
        bits = np.int32(bits | multiples)
    return back, change, bits


@in_any_order
def _turned_row_alone(row: Floats, delta: Floats, value: Number, negative_lr: Number) -> Number:
    """The same without sums, for ordinary backprop."""
    back = ZERO
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
        multiples = np.int32(abs(new) * fineness + HALF)
        total = np.int32(total + multiples)
        bits = np.int32(bits | multiples)
    return total, bits


@in_any_order
def _largest_and_sum(values: Floats) -> tuple[Number, Number]:
    """Of the magnitudes; a NaN makes the sum one."""
    largest = total = ZERO
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
            if not abs(weight[r, c]) * fineness + HALF < _TOO_LARGE:
                fits = 0
                continue
            multiples = np.int64(multiples_of(weight[r, c], fineness))
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
def turned_backward(
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
            active = inputs[i] != ZERO
            back[i] = _turned_row_alone(weight[i], delta, inputs[i], negative_lr) if active else ZERO
        return ZERO
    fits = _change_fits(delta, inputs, negative_lr, fineness)
    bits = np.int32(0)
    changes[:] = 0
    for i in range(len(inputs)):
        if inputs[i] != ZERO:
            back[i], change, new_bits = _turned_row(weight[i], delta, inputs[i], negative_lr, fineness, changes)
            outgoing_sums[i] += np.int64(change)
            bits = np.int32(bits | new_bits)
        else:
            back[i] = ZERO
    if fits and known[0]:
        for o in range(len(delta)):
            incoming_sums[o] += np.int64(changes[o])
        known[0] = 1 if bits < _TOO_LARGE else 0
    else:
        known[0] = _sums_anew(weight, fineness, outgoing_sums, incoming_sums)
    if known[0]:
        _read_sums(incoming_sums, fineness, incoming)
        _read_sums(outgoing_sums, fineness, outgoing)
        return ZERO
    incoming[:] = ZERO
    total = ZERO
    for i in range(len(inputs)):
        outgoing[i] = skipped_row(weight[i], incoming)
        total += outgoing[i]
    return total


@exactly
def first_backward(
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
        if delta[o] != ZERO:
            last_bits, new_bits = _first_row(weight[o], inputs, delta[o], negative_lr, fineness)
            incoming_sums[o] += np.int64(np.int32(np.int64(last_bits) - incoming_sums[o]))
            bits = np.int32(bits | new_bits)
    if fits and known[0]:
        known[0] = 1 if bits < _TOO_LARGE else 0
    else:
        known[0] = _sums_anew(weight, fineness, incoming_sums, incoming_sums[:0])
    if known[0]:
        _read_sums(incoming_sums, fineness, incoming)
        return ZERO
    total = ZERO
    for o in range(len(delta)):
        incoming[o] = sum_of_magnitudes(weight[o])
        total += incoming[o]
    return total


@in_any_order
def hand_back_turned(weight: Floats, inputs: Floats, delta: Floats, back: Floats) -> None:
    """back [in] ← weight [in, out] · delta; 0 for units that are silent."""
    for i in range(len(inputs)):
        total = ZERO
        if inputs[i] != ZERO:
            for o in range(len(delta)):
                total += weight[i, o] * delta[o]
        back[i] = total


@exactly
def remembered_sums(table: Integers, layer: int) -> tuple[Number, Integers, Integers]:
    """A layer's fineness, the sums of its units' incoming weights, and of what the units before hand on to it; these
    are empty for the first layer."""
    depth = table[Table.DEPTH]
    units = first = 0
    for other in range(1, depth):
        if other <= layer:
            first += table[Table.WIDTHS + other]
        units += table[Table.WIDTHS + other]
    before, after = table[Table.WIDTHS + layer] if layer else 0, table[Table.WIDTHS + layer + 1]
    return (
        row_at(table[Table.FINENESS], depth)[layer],
        integers_at(table[Table.MAGNITUDES] + 8 * (depth + first), after),
        integers_at(table[Table.MAGNITUDES] + 8 * (depth + units + first - before), before),
    )
