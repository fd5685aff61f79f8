"""Backward passes, each with its update: a row of weights is changed as soon as its gradient is known."""

import numpy as np

from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.large_layers import first_backward, is_remembered, remembered_sums, turned_backward
from cbp.engines.compiled.nonlinearities import differentiate
from cbp.engines.compiled.products import (
    ROWS_AT_ONCE,
    add_scaled,
    descend_rows,
    gradient_in_tiles,
    gradient_of_rows,
    hand_back,
)
from cbp.engines.compiled.rows import scaled, sum_examples, sum_of_magnitudes
from cbp.engines.compiled.table import (
    ADAM,
    MOMENTUM_RMSPROP,
    MOMENTUM_SGD,
    NESTEROV_SGD,
    SGD,
    ZERO,
    Floats,
    Integers,
    Number,
    Real,
    Table,
    integers_at,
    row_at,
    rows_at,
    words_at,
)
from cbp.engines.compiled.updates import (
    adam_row,
    momentum_row,
    nesterov_row,
    rmsprop_row,
    sgd_row,
    skip_first_row,
    skip_row,
    skipped_row,
)


@exactly
def backward(
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
    depth, batch, width = table[Table.DEPTH], table[Table.BATCH], table[Table.WIDTHS]
    kind, decays = table[Table.OPTIMIZER], table[Table.DECAYS_WEIGHTS]
    widest = 0
    unit = width  # the first unit of the layer, among inputs, hidden units and outputs
    place = 0  # its weights, among all parameters
    for layer in range(depth):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        widest = max(widest, before, after)
        unit += after
        place += after * (before + 1)
    bias_gradient_at, unused_at = gradient_at, gradient_at + 4 * widest
    gradient_at += 8 * widest
    parameter_sum = moment_sum = ZERO

    for layer in range(depth - 1, -1, -1):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        unit -= after
        place -= after * (before + 1)
        weight = rows_at(table[Table.PARAMETERS] + 4 * place, after, before)
        bias = row_at(table[Table.PARAMETERS] + 4 * (place + after * before), after)
        delta = rows_at(delta_at, batch, after)
        back = rows_at(back_at, batch, before)
        incoming = row_at(incoming_at + 4 * (unit - width), after)
        columns = row_at(outgoing_at + 4 * (unit - before if layer else 0), before)
        columns[:] = ZERO
        layer_input = features if layer == 0 else rows_at(post_at + 4 * batch * (unit - width - before), batch, before)
        in_tiles = gradient_in_tiles(batch, after)
        gradient = rows_at(gradient_at, ROWS_AT_ONCE if in_tiles else after if batch > 1 else 1, before)
        if batch > 1:
            if layer:
                hand_back(delta, weight, back)
            if not in_tiles:
                np.dot(delta.T, layer_input, gradient)
        elif layer:
            back[0, :] = ZERO
        first_of_tile = descended = 0
        if in_tiles and kind == SGD and not decays:
            descended = after - after % ROWS_AT_ONCE
            for o in range(0, descended, ROWS_AT_ONCE):
                descend_rows(
                    delta, layer_input, o, weight, reals[Real.NEGATIVE_LR], incoming, columns if layer else columns[:0]
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
                scaled(layer_input[0], delta[0, o], row_gradient)
            at = 4 * (place + o * before)
            if kind == SGD:
                incoming[o] = sgd_row(weight[o], row_gradient, reals, decays, columns if layer else columns[:0])
            elif kind == MOMENTUM_SGD:
                momentum = row_at(table[Table.MOMENTUM] + at, before)
                incoming[o] = momentum_row(weight[o], row_gradient, momentum, reals, decays, columns)
            elif kind == NESTEROV_SGD:
                momentum = row_at(table[Table.MOMENTUM] + at, before)
                incoming[o] = nesterov_row(weight[o], row_gradient, momentum, reals, decays, columns)
            elif kind < ADAM:
                momentum = row_at(table[Table.MOMENTUM] + at, before if kind == MOMENTUM_RMSPROP else 0)
                average = row_at(table[Table.SECOND_MOMENT] + at, before)
                incoming[o], moments = rmsprop_row(weight[o], row_gradient, momentum, average, reals, decays, columns)
                moment_sum += moments
            else:
                incoming[o], moments = adam_row(
                    weight[o],
                    row_gradient,
                    row_at(table[Table.MOMENTUM] + at, before),
                    row_at(table[Table.SECOND_MOMENT] + at, before),
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
        unused[:] = ZERO
        sum_examples(delta, bias_gradient)
        at = 4 * (place + after * before)
        if kind == SGD:
            parameter_sum += sgd_row(bias, bias_gradient, reals, decays, unused)
        elif kind == MOMENTUM_SGD:
            momentum = row_at(table[Table.MOMENTUM] + at, after)
            parameter_sum += momentum_row(bias, bias_gradient, momentum, reals, decays, unused)
        elif kind == NESTEROV_SGD:
            momentum = row_at(table[Table.MOMENTUM] + at, after)
            parameter_sum += nesterov_row(bias, bias_gradient, momentum, reals, decays, unused)
        elif kind < ADAM:
            momentum = row_at(table[Table.MOMENTUM] + at, after if kind == MOMENTUM_RMSPROP else 0)
            average = row_at(table[Table.SECOND_MOMENT] + at, after)
            magnitudes, moments = rmsprop_row(bias, bias_gradient, momentum, average, reals, decays, unused)
            parameter_sum += magnitudes
            moment_sum += moments
        else:
            magnitudes, moments = adam_row(
                bias,
                bias_gradient,
                row_at(table[Table.MOMENTUM] + at, after),
                row_at(table[Table.SECOND_MOMENT] + at, after),
                ZERO,
                ZERO,
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
                table[Table.ACTIVATION],
                row_at(pre_at + offset, batch * before),
                row_at(post_at + offset, batch * before),
                row_at(back_at, batch * before),
            )
            delta_at, back_at = back_at, delta_at
    return parameter_sum, moment_sum


@exactly
def skipping_backward(
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
    depth, width = table[Table.DEPTH], table[Table.WIDTHS]
    negative_lr, evaluates = reals[Real.NEGATIVE_LR], table[Table.EVALUATES]
    unit = width
    place = 0
    for layer in range(depth):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        unit += after
        place += after * (before + 1)
    parameter_sum = ZERO

    for layer in range(depth - 1, -1, -1):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
        unit -= after
        place -= after * (before + 1)
        weight = rows_at(table[Table.PARAMETERS] + 4 * place, after, before)
        bias = row_at(table[Table.PARAMETERS] + 4 * (place + after * before), after)
        delta, back = row_at(delta_at, after), row_at(back_at, before)
        incoming = row_at(incoming_at + 4 * (unit - width), after)
        columns = row_at(outgoing_at + 4 * (unit - before if layer else 0), before)
        layer_input = row_at(post_at + 4 * (unit - width - before), before) if layer else features
        if is_remembered(table, layer):
            known = integers_at(table[Table.MAGNITUDES] + 8 * layer, 1)
            fineness, incoming_sums, outgoing_sums = remembered_sums(table, layer)
            if layer:
                parameter_sum += turned_backward(
                    rows_at(table[Table.PARAMETERS] + 4 * place, before, after),
                    layer_input,
                    delta,
                    negative_lr,
                    evaluates,
                    fineness,
                    known,
                    incoming_sums,
                    outgoing_sums,
                    words_at(changes_at, after),
                    back,
                    incoming,
                    columns,
                )
            else:
                parameter_sum += first_backward(
                    weight, layer_input, delta, negative_lr, fineness, known, incoming_sums, incoming
                )
            for o in range(after):
                bias[o] += delta[o] * negative_lr
                parameter_sum += abs(bias[o])
        else:
            if layer:
                back[:] = ZERO
                columns[:] = ZERO
            for o in range(after):
                slope = delta[o]
                if slope != ZERO:
                    if layer:
                        incoming[o] = skip_row(weight[o], layer_input, slope, negative_lr, back, columns)
                    else:
                        incoming[o] = skip_first_row(weight[o], layer_input, slope, negative_lr)
                    bias[o] += slope * negative_lr
                elif not evaluates:
                    incoming[o] = ZERO
                elif layer:
                    incoming[o] = skipped_row(weight[o], columns)
                else:
                    incoming[o] = sum_of_magnitudes(weight[o])
                parameter_sum += incoming[o] + abs(bias[o])
        if layer:
            for i in range(before):
                if layer_input[i] <= ZERO:
                    back[i] = ZERO
            delta_at, back_at = back_at, delta_at
    return parameter_sum
