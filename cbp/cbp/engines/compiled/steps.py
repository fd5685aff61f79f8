"""Whole steps of Continual Backprop: `run` takes those of one learner, `run_each` of one after another.

They work in place on the memory of a `StackState`, found by address, and let other threads run. What they compute is
what `torch_engine` does; where sums come in another order, the last bits differ.

Shapes: B examples in a step, I inputs, C outputs, U hidden units of all layers side by side; one linear layer is
[out, in] with `out` and `in` the widths around it.
"""

import math

import numpy as np

from cbp.engines.compiled.backward import backward, skipping_backward
from cbp.engines.compiled.clipping import clip
from cbp.engines.compiled.compiling import as_written, exactly
from cbp.engines.compiled.large_layers import is_turned
from cbp.engines.compiled.nonlinearities import activate
from cbp.engines.compiled.products import affine, turned_affine
from cbp.engines.compiled.scores import cross_entropy, regression
from cbp.engines.compiled.table import (
    ADAM,
    CROSS_ENTROPY,
    RELU,
    SIGMOID,
    TANH,
    ZERO,
    Doubles,
    Floats,
    Integers,
    Number,
    Real,
    Sum,
    Table,
    double_rows_at,
    doubles_at,
    integers_at,
    row_at,
    rows_at,
)
from cbp.engines.compiled.units import evaluate
from cbp.engines.compiled.updates import adam_factors

_LAST_COUNT = np.float32(2.0**24)
"""Where a float32 count of Adam stops."""


@exactly
def _count_steps(table: Integers, steps: int) -> None:
    """Adam's count of every parameter."""
    count = 0
    for layer in range(table[Table.DEPTH]):
        count += table[Table.WIDTHS + layer + 1] * (table[Table.WIDTHS + layer] + 1)
    counts = row_at(table[Table.COUNTS], count)
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
    rows, width, outputs = table[Table.PROBE_ROWS], features.shape[1], values.shape[1]
    position = integers_at(table[Table.PROBE_POSITION], 2)
    following = position[0]
    for b in range(len(features)):
        if following >= rows:
            following = 0
        seen = row_at(table[Table.PROBE_FEATURES] + 4 * following * width, width)
        for i in range(width):
            seen[i] = features[b, i]
        if table[Table.LOSS] == CROSS_ENTROPY:
            integers_at(table[Table.PROBE_TARGETS] + 8 * following, 1)[0] = labels[b]
        else:
            seen_values = row_at(table[Table.PROBE_TARGETS] + 4 * following * outputs, outputs)
            for c in range(outputs):
                seen_values[c] = values[b, c]
        following += 1
    position[0] = following
    position[1] = min(position[1] + len(features), rows)


@as_written
def _add_to_tally(tally: Doubles, loss: Number, accuracy: Number) -> None:
    decay = tally[Sum.DECAY]
    share = 1.0 - decay
    tally[Sum.LOSS] += np.float64(loss)
    tally[Sum.ACCURACY] += np.float64(accuracy)
    tally[Sum.FADED_LOSS] = tally[Sum.FADED_LOSS] * decay + share * np.float64(loss)
    tally[Sum.FADED_ACCURACY] = tally[Sum.FADED_ACCURACY] * decay + share * np.float64(accuracy)


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
    depth, batch, width = table[Table.DEPTH], table[Table.BATCH], table[Table.WIDTHS]
    hidden = depth - 1
    units = 0
    widest = width
    for layer in range(1, depth + 1):
        widest = max(widest, table[Table.WIDTHS + layer])
        if layer <= hidden:
            units += table[Table.WIDTHS + layer]
    classes = table[Table.WIDTHS + depth]
    skips, evaluates, loss_kind = table[Table.SKIPS], table[Table.EVALUATES], table[Table.LOSS]
    reals = row_at(table[Table.REALS], Real.COUNT)
    outputs = rows_at(table[Table.OUTPUTS], table[Table.SCORE_ROWS], classes)
    scores = double_rows_at(table[Table.SCORES], 2, table[Table.SCORE_ROWS])
    weights = row_at(table[Table.WEIGHTS], len(features))
    tally = doubles_at(table[Table.TALLY], Sum.COUNT)
    if start == 0:
        tally[Sum.LOSS] = tally[Sum.ACCURACY] = tally[Sum.FADED_LOSS] = tally[Sum.FADED_ACCURACY] = 0.0
    is_adam = table[Table.OPTIMIZER] >= ADAM
    saves_pre = (
        table[Table.ACTIVATION] != RELU and table[Table.ACTIVATION] != TANH and table[Table.ACTIVATION] != SIGMOID
    )

    pre_at = table[Table.FLOATS]
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

    owed = doubles_at(table[Table.OWED], hidden)
    rates = doubles_at(table[Table.SCHEDULE], hidden)
    mature = doubles_at(table[Table.SCHEDULE] + 8 * hidden, hidden)

    done = 0
    due = 0
    parameter_sum = moment_sum = ZERO
    while done < steps and not due:
        begin = start + done * batch
        address = table[Table.PARAMETERS]

        # Forward
        layer_input = features[begin : begin + batch]
        before = width
        offset = 0
        for layer in range(depth):
            after = table[Table.WIDTHS + layer + 1]
            address_of_layer = address
            weight = rows_at(address, after, before)
            bias = row_at(address + 4 * after * before, after)
            address += 4 * after * (before + 1)
            if layer < hidden:
                layer_output = rows_at(pre_at + 4 * batch * offset, batch, after)
            else:
                layer_output = outputs[begin : begin + batch]
            if is_turned(table[Table.REMEMBERS], depth, layer, before, after):
                turned_affine(rows_at(address_of_layer, before, after), bias, layer_input[0], layer_output[0])
            else:
                affine(weight, bias, layer_input, layer_output)
            if layer < hidden:
                pre = row_at(pre_at + 4 * batch * offset, batch * after)
                post = row_at(post_at + 4 * batch * offset, batch * after)
                activate(table[Table.ACTIVATION], pre, post)
                layer_input = rows_at(post_at + 4 * batch * offset, batch, after)
                offset += after
            before = after

        # Loss and its gradient
        delta = rows_at(delta_at, batch, classes)
        scale = reals[Real.SCALE]
        for b in range(batch):
            factor = weights[begin + b] * scale
            if loss_kind == CROSS_ENTROPY:
                loss, right = cross_entropy(outputs[begin + b], labels[begin + b], factor, delta[b])
            else:
                loss, right = regression(
                    loss_kind, outputs[begin + b], values[begin + b], factor, reals[Real.DELTA], delta[b]
                )
            scores[0, begin + b] = loss
            scores[1, begin + b] = right
            _add_to_tally(tally, loss, right)

        if table[Table.CLIPPING]:
            clip(
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
        parameter_sum = moment_sum = ZERO
        if skips:
            parameter_sum = skipping_backward(
                table, reals, features[begin], post_at, delta_at, back_at, incoming_at, outgoing_at, activity_at
            )
        else:
            first_factors = row_at(first_factors_at, width + units + classes)
            second_factors = row_at(second_factors_at, width + units + classes)
            if is_adam:
                ages = integers_at(table[Table.AGES], units)
                adam_factors(ages, table[Table.STEPS] + 1, width, reals, first_factors, second_factors)
            parameter_sum, moment_sum = backward(
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
        table[Table.STEPS] += 1
        done += 1
        if not evaluates:
            continue
        offset = 0
        for layer in range(hidden):
            evaluate(
                table,
                reals,
                layer,
                offset,
                post_at + 4 * batch * offset,
                incoming_at + 4 * offset,
                outgoing_at + 4 * (width + offset),
                table[Table.RANDOM] + 4 * ((done - 1) * units + offset),
                activity_at,
                corrections_at,
            )
            offset += table[Table.WIDTHS + layer + 1]
        due = _falls_due(owed, rates, mature)

    if is_adam and done:
        _count_steps(table, done)
    _show_to_probe(
        table,
        features[start : start + done * batch],
        labels[start : start + done * batch],
        values[start : start + done * batch],
    )
    tally[Sum.PARAMETERS] = parameter_sum
    tally[Sum.MOMENTS] = moment_sum
    return -done if due else done


@as_written
def point_to(table: Integers, features: Floats, labels: Integers, values: Floats) -> None:
    """Lets `run_each` find what `run` gets."""
    table[Table.FEATURES], table[Table.EXAMPLES] = features.ctypes.data, len(features)
    table[Table.LABELS], table[Table.VALUES] = labels.ctypes.data, values.ctypes.data


@as_written
def run_each(tables: Integers, ahead: Integers) -> None:
    """`run` for one learner after another, found by the addresses of their tables.

    ahead [learners, 2]: the example to start with and the steps to take, in whose place comes what `run` returns.
    """
    for k in range(len(tables)):
        depth = integers_at(tables[k], 1)[Table.DEPTH]
        table = integers_at(tables[k], Table.WIDTHS + depth + 1)
        examples = table[Table.EXAMPLES]
        labels, values = (examples, 0) if table[Table.LOSS] == CROSS_ENTROPY else (0, examples)
        ahead[k, 1] = run(
            table,
            rows_at(table[Table.FEATURES], examples, table[Table.WIDTHS]),
            integers_at(table[Table.LABELS], labels),
            rows_at(table[Table.VALUES], values, table[Table.WIDTHS + depth]),
            ahead[k, 0],
            ahead[k, 1],
        )
