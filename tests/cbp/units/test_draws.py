"""Numbers drawn ahead are those that torch's own generator gives, and so is the state."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbp.units.draws import UniformGenerator, draw_uniform

#: Around what is drawn ahead, and beyond it.
counts = st.lists(st.one_of(st.integers(0, 70), st.integers(440, 600), st.just(2000)), max_size=30)
seeds = st.integers(0, 2**63 - 1)


@given(seeds, counts)
def test_numbers_are_torchs(seed: int, asked: list[int]) -> None:
    ours, torchs = UniformGenerator(seed), torch.Generator().manual_seed(seed)
    for count in asked:
        np.testing.assert_array_equal(ours.take(count), torch.rand(count, generator=torchs).numpy())
        assert torch.equal(ours.get_state(), torchs.get_state())
        if count % 3 == 0:
            ours.rest()


@given(seeds, counts, counts)
def test_a_state_is_gone_on_from(seed: int, before: list[int], after: list[int]) -> None:
    ours, other = UniformGenerator(seed), UniformGenerator(seed + 1)
    other.take(3)
    for count in before:
        ours.take(count)
    state = ours.get_state()
    other.set_state(state)
    torchs = torch.Generator()
    torchs.set_state(state)
    for count in after:
        numbers = torch.rand(count, generator=torchs).numpy()
        np.testing.assert_array_equal(ours.take(count), numbers)
        np.testing.assert_array_equal(other.take(count), numbers)


@pytest.mark.parametrize("bound", [1.0, 0.1, 1 / 3, 2.0**-20, 1e4])
def test_weights_are_rounded_as_torch_does(bound: float) -> None:
    ours = draw_uniform(bound, (300, 7), UniformGenerator(5))
    torchs = torch.rand(300, 7, generator=torch.Generator().manual_seed(5)).mul_(2.0 * bound).sub_(bound)
    assert torch.equal(ours, torchs)
