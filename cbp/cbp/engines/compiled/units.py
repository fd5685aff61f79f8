"""Ages, running averages and utilities of one layer's units, after a step."""

import numpy as np

from cbp.engines.compiled.averages import bias_correction, lerp
from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.rows import sum_examples
from cbp.engines.compiled.table import (
    ADAPTABLE_CONTRIBUTION,
    ADAPTATION,
    CONTRIBUTION,
    FEATURE_BY_INPUT,
    ONE,
    WEIGHT,
    ZERO,
    ZERO_CONTRIBUTION,
    Floats,
    Integers,
    Real,
    Table,
    integers_at,
    row_at,
    rows_at,
)

_SMALLEST_INCOMING = np.float32(1e-12)


@exactly
def evaluate(
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
    units, fan_in, fan_out = (
        table[Table.WIDTHS + layer + 1],
        table[Table.WIDTHS + layer],
        table[Table.WIDTHS + layer + 2],
    )
    utility_kind = table[Table.UTILITY]
    activations = rows_at(post_at, table[Table.BATCH], units)
    incoming, outgoing = row_at(incoming_at, units), row_at(outgoing_at, units)
    ages = integers_at(table[Table.AGES] + 8 * unit, units)
    means = row_at(table[Table.MEANS] + 4 * unit, units)
    utilities = row_at(table[Table.UTILITIES] + 4 * unit, units)
    random = row_at(random_at, units)
    activity, corrections = row_at(activity_at, units), row_at(corrections_at, units)
    known_corrections = row_at(table[Table.CORRECTIONS], table[Table.CORRECTION_COUNT])
    examples = table[Table.BATCH]
    share, log_decay = reals[Real.ONE_MINUS_DECAY], reals[Real.LOG_DECAY]
    known_age, correction = np.int64(-1), ZERO
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
            means[u] = lerp(means[u], activations[0, u], share)
    else:
        sum_examples(activations, activity)
        for u in range(units):
            means[u] = lerp(means[u], activity[u] / count, share)

    if utility_kind == CONTRIBUTION:
        activity[:units] = ZERO
        for b in range(examples):
            for u in range(units):
                activity[u] += abs(activations[b, u])
    else:
        activity[:units] = ZERO
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
            value = ONE / mean_incoming
        elif utility_kind == FEATURE_BY_INPUT:
            value = mean_activity / mean_incoming
        else:
            value = random[u]
        utilities[u] = lerp(utilities[u], value, share)
