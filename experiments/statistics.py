"""Means over seeds and how sure they are.

Shapes: S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval by Student's t, for values of seeds that are about normal."""

    mean: float
    half_width: float
    """NaN with fewer than two values."""
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Of values [S]; those that are NaN, of runs that diverged, do not count."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    count = len(known)
    if not count:
        return Interval(math.nan, math.nan, 0)
    if count == 1:
        return Interval(float(known[0]), math.nan, 1)
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Interval(float(known.mean()), quantile * float(known.std(ddof=1)) / math.sqrt(count), count)


def paired_difference(values: NDArray[np.float64], others: NDArray[np.float64]) -> Interval:
    """Of values [S] minus others [S'], seed by seed, as far as both have them: what seeds have in common drops out."""
    seeds = min(len(values), len(others))
    return interval(values[:seeds] - others[:seeds])
