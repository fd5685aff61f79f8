"""One row of weights or activations."""

from cbp.engines.compiled.compiling import exactly, in_any_order
from cbp.engines.compiled.table import ZERO, Floats, Number


@exactly
def sum_examples(values: Floats, total: Floats) -> None:
    """total [out] ← sum of values [B, out] over the examples."""
    examples, out = values.shape
    for o in range(out):
        total[o] = values[0, o]
    for b in range(1, examples):
        for o in range(out):
            total[o] += values[b, o]


@exactly
def scaled(inputs: Floats, factor: Number, row: Floats) -> None:
    for i in range(len(inputs)):
        row[i] = factor * inputs[i]


@in_any_order
def sum_of_magnitudes(row: Floats) -> Number:
    total = ZERO
    for i in range(len(row)):
        total += abs(row[i])
    return total
