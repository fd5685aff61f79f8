"""Which units a step replaces, and newborn units in their place."""

import numpy as np

from cbp.engines.compiled.averages import bias_correction, lerp
from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.large_layers import is_remembered, is_turned, multiples_of, remembered_sums
from cbp.engines.compiled.rows import sum_of_magnitudes
from cbp.engines.compiled.table import (
    ONE,
    ZERO,
    Floats,
    Integers,
    Number,
    Real,
    Sum,
    Table,
    doubles_at,
    integers_at,
    row_at,
    rows_at,
)


@exactly
def replace(table: Integers, counts: Integers, drawn: Floats, ranges: Floats, published_order: bool) -> None:
    """`cbp.units.replacement.select_units` and `replace_units`: counts[layer] units of every hidden layer.

    drawn: numbers for the incoming weights of all of them, one after another.
    ranges: per layer [widths and bounds], a weight is number · width − bound, as `draw_uniform` rounds it.

    What it adds to the sum of the parameters' magnitudes are those of the biases: bias compensation may overflow them.
    """
    depth = table[Table.DEPTH]
    reals = row_at(table[Table.REALS], Real.COUNT)
    strength, kept = reals[Real.STRENGTH], reals[Real.KEPT]
    chosen = np.empty((depth - 1, max(counts)), np.int64)
    place = 0
    unit = 0
    start = 0
    for layer in range(depth - 1):
        before, after, readers = (
            table[Table.WIDTHS + layer],
            table[Table.WIDTHS + layer + 1],
            table[Table.WIDTHS + layer + 2],
        )
        next_place = place + after * (before + 1)
        turned = is_turned(table[Table.REMEMBERS], depth, layer + 1, after, readers)
        if counts[layer]:
            _select(
                row_at(table[Table.UTILITIES] + 4 * unit, after),
                integers_at(table[Table.AGES] + 8 * unit, after),
                table[Table.MATURITY],
                reals[Real.LOG_DECAY],
                chosen[layer, : counts[layer]],
            )
        if counts[layer] and reals[Real.BIAS_COMPENSATION] != ZERO:
            _compensate(
                chosen[layer, : counts[layer]],
                integers_at(table[Table.AGES] + 8 * unit, after),
                row_at(table[Table.MEANS] + 4 * unit, after),
                rows_at(
                    table[Table.PARAMETERS] + 4 * next_place, after if turned else readers, readers if turned else after
                ),
                turned,
                row_at(table[Table.PARAMETERS] + 4 * (next_place + readers * after), readers),
                reals[Real.LOG_DECAY],
                reals[Real.BIAS_COMPENSATION],
            )
        for rank in range(counts[layer]):
            j = chosen[layer, rank]
            newborn = np.empty(before, np.float32)
            for i in range(before):
                newborn[i] = drawn[start + i] * ranges[0, layer] - ranges[1, layer]
            if strength != ONE:
                newborn = _approached(table, layer, place, j, newborn, strength)
            _put_incoming(table, layer, place, j, newborn)
            start += before
            bias = row_at(table[Table.PARAMETERS] + 4 * (place + after * before + j), 1)
            bias[0] = bias[0] * kept if strength != ONE else ZERO
            for slot in (table[Table.MOMENTUM], table[Table.SECOND_MOMENT], table[Table.COUNTS]):
                if slot:  # then no layer is turned
                    row_at(slot + 4 * (place + j * before), before)[:] = ZERO
                    row_at(slot + 4 * (place + after * before + j), 1)[0] = ZERO
            row_at(table[Table.UTILITIES] + 4 * (unit + j), 1)[0] = ZERO
            row_at(table[Table.MEANS] + 4 * (unit + j), 1)[0] = ZERO
            integers_at(table[Table.AGES] + 8 * (unit + j), 1)[0] = 0
        if published_order:
            _silence(table, layer, next_place, chosen[layer, : counts[layer]], strength, kept)
        place = next_place
        unit += after

    if not published_order:
        place = 0
        for layer in range(depth - 1):
            before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
            place += after * (before + 1)
            _silence(table, layer, place, chosen[layer, : counts[layer]], strength, kept)

    bias_sum = ZERO
    place = 0
    for layer in range(depth):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        bias_sum += sum_of_magnitudes(row_at(table[Table.PARAMETERS] + 4 * (place + after * before), after))
        place += after * (before + 1)
    doubles_at(table[Table.TALLY], Sum.COUNT)[Sum.PARAMETERS] += bias_sum


@exactly
def _select(utilities: Floats, ages: Integers, maturity: int, log_decay: Number, chosen: Integers) -> None:
    """The mature units of lowest bias-corrected utility, lowest first; among equals, the highest index first."""
    corrected = np.empty(len(utilities), np.float32)
    free = np.empty(len(utilities), np.bool_)
    for u in range(len(utilities)):
        free[u] = ages[u] > maturity
        corrected[u] = utilities[u] / bias_correction(ages[u], log_decay) if free[u] else ZERO
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
        handed_on = ZERO
        for rank in range(len(chosen)):
            j = chosen[rank]
            handed_on += (readers[j, o] if turned else readers[o, j]) * corrected[rank]
        readers_bias[o] += handed_on


@exactly
def _silence(table: Integers, layer: int, place: int, chosen: Integers, strength: Number, kept: Number) -> None:
    """Zeroes what the next layer, its weights at `place`, reads of the chosen units, or scales it down."""
    after, readers = table[Table.WIDTHS + layer + 1], table[Table.WIDTHS + layer + 2]
    if is_turned(table[Table.REMEMBERS], table[Table.DEPTH], layer + 1, after, readers):
        weight = rows_at(table[Table.PARAMETERS] + 4 * place, after, readers)
        fineness, incoming, outgoing = remembered_sums(table, layer + 1)
        for j in chosen:
            outgoing[j] = 0
            for o in range(readers):
                incoming[o] -= np.int64(multiples_of(weight[j, o], fineness))
                weight[j, o] = weight[j, o] * kept if strength != ONE else ZERO
                left = np.int64(multiples_of(weight[j, o], fineness))
                incoming[o] += left
                outgoing[j] += left
        return
    weight = rows_at(table[Table.PARAMETERS] + 4 * place, readers, after)
    for o in range(readers):
        for j in chosen:
            weight[o, j] = weight[o, j] * kept if strength != ONE else ZERO
    for slot in (table[Table.MOMENTUM], table[Table.SECOND_MOMENT], table[Table.COUNTS]):
        if slot:
            remembered = rows_at(slot + 4 * place, readers, after)
            for o in range(readers):
                for j in chosen:
                    remembered[o, j] = ZERO


@exactly
def _approached(table: Integers, layer: int, place: int, j: int, drawn: Floats, strength: Number) -> Floats:
    """Incoming weights of unit j, at `place`, so far on the way to the drawn ones."""
    before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
    turned = is_turned(table[Table.REMEMBERS], table[Table.DEPTH], layer, before, after)
    weight = rows_at(table[Table.PARAMETERS] + 4 * place, before if turned else after, after if turned else before)
    reached = np.empty(before, np.float32)
    for i in range(before):
        reached[i] = lerp(weight[i, j] if turned else weight[j, i], drawn[i], strength)
    return reached


@exactly
def _put_incoming(table: Integers, layer: int, place: int, j: int, drawn: Floats) -> None:
    """Gives unit j of a hidden layer, whose incoming weights are at `place`, the drawn ones."""
    before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
    turned = is_turned(table[Table.REMEMBERS], table[Table.DEPTH], layer, before, after)
    if not turned:
        row_at(table[Table.PARAMETERS] + 4 * (place + j * before), before)[:] = drawn
    if not is_remembered(table, layer):
        return
    fineness, incoming, outgoing = remembered_sums(table, layer)
    incoming[j] = 0
    for i in range(before):
        incoming[j] += np.int64(multiples_of(drawn[i], fineness))
    if turned:
        weight = rows_at(table[Table.PARAMETERS] + 4 * place, before, after)
        for i in range(before):
            outgoing[i] += np.int64(multiples_of(drawn[i], fineness)) - np.int64(multiples_of(weight[i, j], fineness))
            weight[i, j] = drawn[i]
