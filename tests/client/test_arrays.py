"""Arrays of whatever kind users have, and what each goes as."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cbp_client import InvalidArgument
from cbp_client.arrays import numbers

ROWS = [[1.5, -2.0], [0.0, 3.0]]


_TENSORS: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda _, rows: rows,
    "requires a gradient": lambda _, rows: rows.requires_grad_(),
    "result of a graph": lambda _, rows: rows.requires_grad_() * 1.0,
    "a parameter": lambda torch, rows: torch.nn.Parameter(rows),
    "bfloat16": lambda torch, rows: rows.to(torch.bfloat16),
    "float8": lambda torch, rows: rows.to(torch.float8_e5m2),
    "negated view": lambda torch, rows: torch.complex(rows, -rows).conj().imag,
    "transposed": lambda _, rows: rows.t().contiguous().t(),
    "a list": lambda _, rows: [row.requires_grad_() for row in rows],
}


@pytest.mark.parametrize("name", _TENSORS)
def test_tensors_are_taken(name: str) -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(numbers("features", _TENSORS[name](torch, torch.tensor(ROWS))), ROWS)


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_taken() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    np.testing.assert_array_equal(numbers("features", torch.tensor(ROWS, device="cuda", requires_grad=True)), ROWS)


def test_bfloat16_keeps_every_number() -> None:
    torch = pytest.importorskip("torch")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    sent = numbers("features", every)

    assert sent.dtype == np.float32
    bits = np.arange(-(2**15), 2**15).astype(np.int16).view(np.uint16).astype(np.uint32) << 16
    exact = bits.view(np.float32)
    np.testing.assert_array_equal(sent[~np.isnan(exact)], exact[~np.isnan(exact)])


def test_bfloat16_of_numpy_is_taken() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sent = numbers("features", np.array(ROWS).astype(ml_dtypes.bfloat16))

    assert sent.dtype == np.float32
    np.testing.assert_array_equal(sent, ROWS)


def test_a_tensor_that_no_array_holds_is_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.tensor(ROWS).to_sparse(), torch.zeros(2, 2, device="meta"), torch.zeros(2, 2) * 1j):
        with pytest.raises(InvalidArgument, match=r"^features: (is not an array of numbers|must be numbers)"):
            numbers("features", tensor)


def test_tensors_need_no_torch_in_the_client() -> None:
    code = "import sys; from cbp_client.arrays import numbers; numbers('f', [[1.0]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.ma.masked_array(ROWS, mask=[[0, 1], [0, 0]]), r"has masked values; fill them, such as with filled\(0\.0\)"),
        ([np.ma.masked_array([1.0, 2.0], mask=[0, 1])], "has masked values"),
        ([[np.ma.masked_array([1.0, 2.0], mask=[0, 1])]], "has masked values"),
        (np.array([[1.0, None]], dtype=object), r"must be numbers, but \[0\]\[1\] is None; fill in what is missing"),
        (
            np.array([[1.0], ["n/a"]], dtype=object),
            r".* \[1\]\[0\] is 'n/a'; .* encode what is no number",
        ),
        (
            np.array([[1.0, 2]], dtype=object),
            r"must be numbers, not Python objects; .* with astype\('float32'\)",
        ),
        (None, "must be an array of numbers, not None"),
        ({1: 2}, "must be an array of numbers, not a value of type dict"),
        (np.array(["2026-01-02"], "M8[D]"), r"must be numbers, not datetime64\[D\]"),
        ([[1.0], [1.0, 2.0]], "is not an array of numbers: setting an array element"),
    ],
)
def test_what_is_missing_or_no_number_is_refused(values: Any, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^features: {problem}"):
        numbers("features", values)


def test_a_masked_array_without_masked_values_is_taken() -> None:
    for mask in (False, np.zeros((2, 2), bool)):
        np.testing.assert_array_equal(numbers("features", np.ma.masked_array(ROWS, mask=mask)), ROWS)
