"""The compiled engine's products of a few examples, at sizes around those of its tiles."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cbp.engines.compiled import products

SIZES = [
    (2, 5, 3),
    (4, 16, 4),
    (7, 15, 9),
    (8, 17, 8),
    (9, 31, 10),
    (16, 64, 64),
    (31, 33, 17),
    (32, 100, 12),
    (33, 40, 9),
]


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("examples", "into", "out"), [(1, 7, 5), (1, 600, 5), *SIZES])
def test_outputs(examples: int, into: int, out: int) -> None:
    weight, bias, inputs = normal(out, into), normal(out), normal(examples, into)
    outputs = np.full((examples, out), np.nan, np.float32)
    products.affine(weight, bias, inputs, outputs)
    np.testing.assert_allclose(outputs, inputs @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("examples", "into", "out"), SIZES)
def test_gradient_in_the_inputs(examples: int, into: int, out: int) -> None:
    delta, weight = normal(examples, out), normal(out, into)
    back = np.full((examples, into), np.nan, np.float32)
    products.hand_back(delta, weight, back)
    np.testing.assert_allclose(back, delta @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("examples", "into", "out"), [size for size in SIZES if size[2] >= products.ROWS_AT_ONCE])
def test_gradient_in_the_weights_and_descent_by_it(examples: int, into: int, out: int) -> None:
    delta, inputs, weight = normal(examples, out), normal(examples, into), normal(out, into)
    first = out - products.ROWS_AT_ONCE
    expected = (delta.T @ inputs)[first:]
    gradient = np.full((products.ROWS_AT_ONCE, into), np.nan, np.float32)
    products.gradient_of_rows(delta, inputs, first, gradient)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

    descended = weight.copy()
    descended[first:] -= np.float32(0.1) * gradient
    for columns in (np.ones(into, np.float32), np.empty(0, np.float32)):
        updated, row_sums = weight.copy(), np.zeros(out, np.float32)
        products.descend_rows(delta, inputs, first, updated, np.float32(-0.1), row_sums, columns)
        np.testing.assert_allclose(updated, descended, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row_sums[first:], np.abs(descended[first:]).sum(1), rtol=1e-5)
        assert not row_sums[:first].any()
        if len(columns):
            np.testing.assert_allclose(columns, 1 + np.abs(descended[first:]).sum(0), rtol=1e-5)
