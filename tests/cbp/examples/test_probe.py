"""The probe holds the newest examples, however they came."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cbp.examples.pending import Probe


def examples(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(start, start + count)
    return np.stack([numbers, -numbers], axis=1).astype(np.float32), numbers


@given(st.integers(1, 12), st.integers(0, 20), st.lists(st.integers(0, 30), max_size=30))
def test_it_holds_the_newest_examples_in_order(size: int, first: int, counts: list[int]) -> None:
    probe = Probe(size, *examples(0, first))
    seen = first
    for count in (0, *counts):
        probe.extend(*examples(seen, count))
        seen += count
        features, targets = examples(max(seen - size, 0), min(seen, size))
        np.testing.assert_array_equal(probe.features, features)
        np.testing.assert_array_equal(probe.targets, targets)
        assert len(probe) == len(targets)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_another_size_keeps_the_newest(size: int, resized: int, count: int) -> None:
    probe = Probe(size, *examples(0, 0))
    probe.extend(*examples(0, count))
    kept = min(size, resized, count)
    np.testing.assert_array_equal(probe.resized(resized).targets, np.arange(count - kept, count))


def test_a_large_probe_is_not_copied_for_every_example() -> None:
    size = 1000
    probe = Probe(size, *examples(0, 0))
    moves, before = 0, probe.feature_rows
    for number in range(11 * size):
        probe.extend(*examples(number, 1))
        moves += probe.feature_rows is not before
        before = probe.feature_rows
    assert len(probe) == len(before) == size
    assert moves <= 11


def test_examples_handed_over_stay_their_owners() -> None:
    features, targets = examples(0, 5)
    probe = Probe(5, features, targets)
    probe.extend(*examples(5, 2))
    np.testing.assert_array_equal(targets, np.arange(5))
    features[:] = 0
    assert probe.features.all()
