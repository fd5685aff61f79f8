"""How much a step's gradient is scaled down.

Updates are made on the way back, each from the weights' gradient as soon as it is known; but by how much it is to be
scaled is known at the end only. So a learner that clips goes back twice. The gradient is linear in that of the loss
in the outputs: scaling this one scales all, and the second way is the one of a learner that does not clip.
"""

import math

import numpy as np

from cbp.engines.compiled.compiling import exactly, in_any_order
from cbp.engines.compiled.large_layers import hand_back_turned, is_turned
from cbp.engines.compiled.nonlinearities import differentiate
from cbp.engines.compiled.products import ROWS_AT_ONCE, add_scaled, gradient_in_tiles, gradient_of_rows, hand_back
from cbp.engines.compiled.rows import sum_examples
from cbp.engines.compiled.table import ONE, ZERO, Floats, Integers, Real, Table, row_at, rows_at


@exactly
def clip(
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
    depth, batch = table[Table.DEPTH], table[Table.BATCH]
    unit = place = 0
    for layer in range(depth):
        unit += table[Table.WIDTHS + layer]
        place += table[Table.WIDTHS + layer + 1] * (table[Table.WIDTHS + layer] + 1)
    unit -= table[Table.WIDTHS]  # hidden units up to the layer
    from_at, to_at = delta_at, back_at
    squares = 0.0
    for layer in range(depth - 1, -1, -1):
        before, after = table[Table.WIDTHS + layer], table[Table.WIDTHS + layer + 1]
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
            weight_at = table[Table.PARAMETERS] + 4 * place
            if is_turned(table[Table.REMEMBERS], depth, layer, before, after):
                hand_back_turned(rows_at(weight_at, before, after), layer_input[0], delta[0], back[0])
            elif batch > 1:
                hand_back(delta, rows_at(weight_at, after, before), back)
            else:
                weight = rows_at(weight_at, after, before)
                back[0, :] = ZERO
                for o in range(after):
                    add_scaled(weight[o], delta[0, o], back[0])
            differentiate(
                table[Table.ACTIVATION],
                row_at(pre_at + offset, batch * before),
                row_at(post_at + offset, batch * before),
                row_at(to_at, batch * before),
            )
            from_at, to_at = to_at, table[Table.CLIPPING] if to_at == back_at else back_at
    norm = math.sqrt(squares)
    factor = np.float32(reals[Real.CLIP_NORM] / (norm + reals[Real.NORM_MARGIN]))
    if norm < np.inf and factor < ONE:  # an infinite gradient is to be noticed, not to become one of zeros
        residual = row_at(delta_at, batch * table[Table.WIDTHS + depth])
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
    sum_examples(delta, bias_gradient)
    return squares + _sum_of_squares(bias_gradient)


@in_any_order
def _sum_of_squares(values: Floats) -> float:
    total = 0.0
    for k in range(len(values)):
        total += np.float64(values[k]) * np.float64(values[k])
    return total
