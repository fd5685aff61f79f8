"""Plasticity samples of one learner, compiled by numba: `look` sends the probe through the network and back, `measure`
sums one layer up.

What they find is what `cbp.plasticity.measures` says, to rounding. There a sample of a small network is some three
hundred operations, each of which costs more than all the arithmetic; here it is that arithmetic.

Shapes: n probe examples, I inputs, C outputs, U hidden units of all layers side by side; one linear layer is [out, in].
What is known of the probe lies layer after layer, each [n, units].
"""

import math
from enum import IntEnum
from typing import Any

import numpy as np

from cbp.engines.compiled.averages import bias_correction
from cbp.engines.compiled.clipping import squares_of_gradient
from cbp.engines.compiled.compiling import as_written, exactly, in_any_order
from cbp.engines.compiled.large_layers import is_turned
from cbp.engines.compiled.nonlinearities import activate, differentiate
from cbp.engines.compiled.products import ROWS_AT_ONCE, add_bias, affine, hand_back
from cbp.engines.compiled.scores import cross_entropy, regression
from cbp.engines.compiled.table import (
    CROSS_ENTROPY,
    Doubles,
    Floats,
    Integers,
    Number,
    Real,
    Table,
    integers_at,
    row_at,
    rows_at,
)
from cbp.plasticity.measures import DECIDED_BY_ROUNDING, GRADIENT_EXAMPLES, SAMPLES_PER_UNIT, SRANK_DELTA
from cbp.plasticity.samples import QUANTILES, LayerPlasticity


class Measure(IntEnum):
    """What stands where in a layer's float64 measures; what cannot be known is NaN."""

    MEAN_ABS_WEIGHT = 0
    WEIGHT_NORM = 1
    DISTANCE_FROM_INIT = 2
    GRADIENT_NORM = 3
    GRADIENT_RANK = 4
    DORMANT_FRACTION = 5
    DEAD_FRACTION = 6
    SATURATED_FRACTION = 7
    """Without meaning where the nonlinearity has no bounds."""
    FEATURE_NORM = 8
    EFFECTIVE_RANK = 9
    STABLE_RANK = 10
    SRANK = 11
    AGES = 12
    """Its quantiles, as those of the utilities."""
    UTILITIES = 15
    COUNT = 18


_ZERO = np.float32(0.0)
_CACHE_LINE = 16
"""Columns of turned weights that are compared at a time: what was drawn is then read in whole cache lines, too."""
_LEAST_OF_LARGEST = np.finfo(np.float64).eps


@exactly
def look(
    table: Integers, features: Floats, labels: Integers, values: Floats, scale: float, post: Floats, delta: Floats
) -> None:
    """post [n · U] ← activations; delta [n · (U + C)] ← gradients of the probe's loss in the pre-activations.

    features [n, I] of at least one example, with labels [n] or values [n, C], the other one empty; `scale` is what the
    loss's residual of one of them is multiplied by.
    """
    examples = len(features)
    depth, reals = table[Table.DEPTH], row_at(table[Table.REALS], Real.COUNT)
    pre = np.empty_like(post)
    address = table[Table.PARAMETERS]
    unit = 0
    for layer in range(depth):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        layer_input = _inputs(features, post, unit, before, layer)
        layer_output = (
            _units(pre, examples, unit, after) if layer < depth - 1 else np.empty((examples, after), np.float32)
        )
        bias = row_at(address + 4 * after * before, after)
        if is_turned(table[Table.REMEMBERS], depth, layer, before, after):
            np.dot(layer_input, rows_at(address, before, after), layer_output)
            add_bias(bias, layer_output)
        else:
            affine(rows_at(address, after, before), bias, layer_input, layer_output)
        if layer < depth - 1:
            of_layer = slice(examples * unit, examples * (unit + after))
            activate(table[Table.ACTIVATION], pre[of_layer], post[of_layer])
            unit += after
        else:
            factor, residual = np.float32(scale), _units(delta, examples, unit, after)
            for n in range(examples):
                if table[Table.LOSS] == CROSS_ENTROPY:
                    cross_entropy(layer_output[n], labels[n], factor, residual[n])
                else:
                    regression(table[Table.LOSS], layer_output[n], values[n], factor, reals[Real.DELTA], residual[n])
        address += 4 * after * (before + 1)

    for layer in range(depth - 1, 0, -1):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        address -= 4 * after * (before + 1)
        of_outputs, of_inputs = _units(delta, examples, unit, after), _units(delta, examples, unit - before, before)
        if is_turned(table[Table.REMEMBERS], depth, layer, before, after):
            np.dot(of_outputs, rows_at(address, before, after).T, of_inputs)
        else:
            hand_back(of_outputs, rows_at(address, after, before), of_inputs)
        unit -= before
        of_layer = slice(examples * unit, examples * (unit + before))
        differentiate(table[Table.ACTIVATION], pre[of_layer], post[of_layer], delta[of_layer])


@exactly
def measure(
    table: Integers,
    layer: int,
    first: Floats,
    features: Floats,
    post: Floats,
    delta: Floats,
    dormant_threshold: float,
    low: float,
    high: float,
    found: Doubles,
) -> None:
    """found [Measure.COUNT] ← what there is to know of one layer.

    first [P]: the parameters as they were drawn, [out, in] in every layer. Post and delta are of `look`, and empty if
    there are no examples. Activations outside of low and high are saturated.
    """
    examples, depth = len(features), table[Table.DEPTH]
    place = unit = 0
    for earlier in range(layer):
        place += table[Table.WIDTHS + earlier + 1] * (table[Table.WIDTHS + earlier] + 1)
        unit += table[Table.WIDTHS + earlier + 1]
    before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
    found[:] = np.nan

    drawn = first[place : place + after * before].reshape(after, before)
    address = table[Table.PARAMETERS] + 4 * place
    if is_turned(table[Table.REMEMBERS], depth, layer, before, after):
        magnitudes, squares, moved = _compare(rows_at(address, before, after).T, drawn, _CACHE_LINE)
    else:
        magnitudes, squares, moved = _compare(rows_at(address, after, before), drawn, before)
    found[Measure.MEAN_ABS_WEIGHT] = magnitudes / (before * after)
    found[Measure.WEIGHT_NORM], found[Measure.DISTANCE_FROM_INIT] = math.sqrt(squares), math.sqrt(moved)

    if examples:
        layer_input = _inputs(features, post, unit, before, layer)
        deltas = _units(delta, examples, unit, after)
        room = np.empty(max(after, ROWS_AT_ONCE) * max(before, 1), np.float32)
        found[Measure.GRADIENT_NORM] = math.sqrt(squares_of_gradient(deltas, layer_input, room.ctypes.data))
        found[Measure.GRADIENT_RANK] = _gradient_rank(layer_input, deltas)
    if layer < depth - 1:
        if examples:
            _measure_activations(_units(post, examples, unit, after), dormant_threshold, low, high, found)
        _measure_units(
            integers_at(table[Table.AGES] + 8 * unit, after),
            row_at(table[Table.UTILITIES] + 4 * unit, after),
            row_at(table[Table.REALS], Real.COUNT)[Real.LOG_DECAY],
            found,
        )


@exactly
def _units(values: Floats, examples: int, unit: int, units: int) -> Floats:
    """[n, units] of the layer whose first unit is `unit`."""
    return values[examples * unit : examples * (unit + units)].reshape(examples, units)


@exactly
def _inputs(features: Floats, post: Floats, unit: int, before: int, layer: int) -> Floats:
    """[n, in] that the layer reads; `unit` is the first behind it."""
    return _units(post, len(features), unit - before, before) if layer else features


@in_any_order
def _compare(weight: Floats, drawn: Floats, columns: int) -> tuple[float, float, float]:
    """Sums over all weights: of magnitudes, of squares, and of the squares of what they have changed by.

    Both are [out, in], however they lie in memory; so many columns are gone through at a time.
    """
    out, into = weight.shape
    magnitudes: Number = 0.0
    squares: Number = 0.0
    moved: Number = 0.0
    for first in range(0, into, columns):
        for o in range(out):
            row_magnitudes = row_squares = row_moved = _ZERO
            for i in range(first, min(first + columns, into)):
                now = weight[o, i]
                change = now - drawn[o, i]
                row_magnitudes += abs(now)
                row_squares += now * now
                row_moved += change * change
            magnitudes += row_magnitudes
            squares += row_squares
            moved += row_moved
    return magnitudes, squares, moved


@exactly
def _gradient_rank(inputs: Floats, deltas: Floats) -> float:
    """See `cbp.plasticity.measures.gradient_rank`."""
    if len(inputs) < GRADIENT_EXAMPLES:
        return np.nan
    newest = inputs[len(inputs) - GRADIENT_EXAMPLES :].astype(np.float64)
    pulls = deltas[len(deltas) - GRADIENT_EXAMPLES :].astype(np.float64)
    gram = (np.dot(newest, newest.T) + 1.0) * np.dot(pulls, pulls.T)
    return _effective_rank(_spectrum(gram)) if _all_finite(gram.reshape(gram.size)) else np.nan


@exactly
def _measure_activations(
    activations: Floats, dormant_threshold: float, low: float, high: float, found: Doubles
) -> None:
    """See `cbp.plasticity.measures.measure_activations`."""
    examples, units = activations.shape
    values = activations.astype(np.float64)
    if not _all_finite(values.reshape(values.size)):
        return
    activity, alive = np.zeros(units), np.zeros(units)
    saturated, lengths = 0, 0.0
    for n in range(examples):
        squares = 0.0
        for u in range(units):
            value = values[n, u]
            activity[u] += abs(value)
            alive[u] += value != 0.0
            saturated += (value < low) | (value > high)
            squares += value * value
        lengths += math.sqrt(squares)
    most = dormant_threshold * activity.mean()
    dormant = dead = 0
    for u in range(units):
        dormant += activity[u] <= most
        dead += alive[u] == 0.0
    found[Measure.DORMANT_FRACTION], found[Measure.DEAD_FRACTION] = dormant / units, dead / units
    found[Measure.SATURATED_FRACTION] = saturated / (examples * units)
    found[Measure.FEATURE_NORM] = lengths / examples
    if examples >= SAMPLES_PER_UNIT * units:
        spectrum = _spectrum(np.dot(values.T, values))
        found[Measure.EFFECTIVE_RANK] = _effective_rank(spectrum)
        found[Measure.STABLE_RANK] = _stable_rank(spectrum)
        found[Measure.SRANK] = _srank(spectrum)


@exactly
def _measure_units(ages: Integers, utilities: Floats, log_decay: Number, found: Doubles) -> None:
    _quantiles(ages.astype(np.float64), found[Measure.AGES : Measure.UTILITIES])
    corrected = np.empty(len(ages))
    count = 0
    for u in range(len(ages)):
        if ages[u] > 0:  # a unit born at this very step has no utility yet; it must not hide the others'
            corrected[count] = utilities[u] / bias_correction(ages[u], log_decay)
            count += 1
    _quantiles(corrected[:count], found[Measure.UTILITIES : Measure.COUNT])


@exactly
def _quantiles(values: Doubles, found: Doubles) -> None:
    """Interpolated linearly between neighbours."""
    if not len(values) or not _all_finite(values):
        return
    ordered = np.sort(values)
    last = len(ordered) - 1
    for k in range(len(QUANTILES)):
        place = QUANTILES[k] * last
        below = int(place)
        above = min(below + 1, last)
        found[k] = ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@as_written
def _all_finite(values: Doubles) -> bool:
    total = 0.0
    for k in range(len(values)):
        total += values[k] * 0.0  # 0, or NaN of what is not finite
    return total == 0.0


@exactly
def _spectrum(gram: Doubles) -> Doubles:
    """[m] ascending, roots of the eigenvalues of [m, m]; 0 where one is lost in the largest one's rounding."""
    squares = np.linalg.eigvalsh(gram)
    least = len(squares) * _LEAST_OF_LARGEST * squares[-1]
    roots = np.zeros(len(squares))
    for k in range(len(squares)):
        if squares[k] > least:
            roots[k] = math.sqrt(squares[k])
    return roots


@exactly
def _effective_rank(spectrum: Doubles) -> float:
    total = spectrum.sum()
    if total <= 0.0:
        return 0.0
    entropy = 0.0
    for k in range(len(spectrum)):
        share = spectrum[k] / total
        if share > 0.0:
            entropy -= share * math.log(share)
    return math.exp(entropy)


@exactly
def _stable_rank(spectrum: Doubles) -> float:
    largest = spectrum[-1]
    if largest <= 0.0:
        return 0.0
    total = 0.0
    for k in range(len(spectrum)):
        total += (spectrum[k] / largest) ** 2
    return total


@exactly
def _srank(spectrum: Doubles) -> int:
    held, total = 0.0, spectrum.sum()
    if total <= 0.0:
        return 0
    for k in range(len(spectrum)):
        held += spectrum[len(spectrum) - 1 - k]
        if held >= (1.0 - SRANK_DELTA - DECIDED_BY_ROUNDING) * total:
            return k + 1
    return len(spectrum)


ENTRY_POINTS = (look, measure)
"""All that Python calls."""


def layer_plasticity(
    name: str, units: int, replacements: int | None, found: Doubles, *, saturates: bool
) -> LayerPlasticity:
    """A layer's measures as a record; replacements are None of the output layer."""
    known: list[Any] = [value if math.isfinite(value) else None for value in found.tolist()]
    srank = known[Measure.SRANK]
    ages, utilities = known[Measure.AGES : Measure.UTILITIES], known[Measure.UTILITIES :]
    return LayerPlasticity(
        layer=name,
        units=units,
        mean_abs_weight=known[Measure.MEAN_ABS_WEIGHT],
        weight_norm=known[Measure.WEIGHT_NORM],
        distance_from_init=known[Measure.DISTANCE_FROM_INIT],
        gradient_norm=known[Measure.GRADIENT_NORM],
        gradient_rank=known[Measure.GRADIENT_RANK],
        dormant_fraction=known[Measure.DORMANT_FRACTION],
        dead_fraction=known[Measure.DEAD_FRACTION],
        saturated_fraction=known[Measure.SATURATED_FRACTION] if saturates else None,
        feature_norm=known[Measure.FEATURE_NORM],
        effective_rank=known[Measure.EFFECTIVE_RANK],
        stable_rank=known[Measure.STABLE_RANK],
        srank=None if srank is None else int(srank),
        replacements=replacements,
        age_quantiles=None if None in ages else tuple(ages),
        utility_quantiles=None if None in utilities else tuple(utilities),
    )
