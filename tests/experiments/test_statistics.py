"""Intervals against the textbook."""

import math

import numpy as np
import pytest

from experiments.statistics import interval, paired_difference


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 0.0 in found
    assert not found.excludes_zero
    assert interval([1.0, 1.1, 0.9]).excludes_zero


def test_diverged_runs_do_not_count() -> None:
    assert interval([1.0, math.nan, 3.0]) == interval([1.0, 3.0])
    assert interval([math.nan]).count == 0


def test_one_run_has_no_interval() -> None:
    found = interval([0.5])
    assert (found.mean, found.count) == (0.5, 1)
    assert math.isnan(found.half_width)


def test_what_seeds_have_in_common_drops_out_of_a_paired_difference() -> None:
    luck = np.array([0.0, 10.0, -5.0, 3.0])
    found = paired_difference(luck + 1.0, luck[:3])
    assert (found.mean, found.half_width, found.count) == (1.0, 0.0, 3)


def test_the_interval_holds_the_mean_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    held = np.mean([7.0 in interval(random.normal(7.0, 2.0, 5)) for _ in range(4000)])
    assert held == pytest.approx(0.95, abs=0.015)
