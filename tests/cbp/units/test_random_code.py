"""Whatever code stands between two layers: where units are found that can be reset, a newborn that nobody reads moves
nothing."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from cbp import ContinualBackprop, SpecError

WIDTH = 6
Between = Callable[[Tensor], Tensor]

#: Of [N, 6] to [N, 6]; some mix units.
OPERATIONS: dict[str, Between] = {
    "minus mean, right": lambda h: h - h.mean(-1, keepdim=True),
    "minus mean, left": lambda h: h - h.mean(1, keepdim=True),
    "minus mean of examples": lambda h: h - h.mean(0, keepdim=True),
    "over largest": lambda h: h / (1 + h.amax(1, keepdim=True)),
    "over sum": lambda h: h / (1 + h.sum(dim=1, keepdim=True)),
    "over norm": lambda h: h / (1 + h.norm(dim=1, keepdim=True)),
    "normalized": lambda h: functional.normalize(h, dim=1),
    "softmax": lambda h: h.softmax(1),
    "summed up": lambda h: h.cumsum(1),
    "rolled": lambda h: h + h.roll(1, 1),
    "flipped": lambda h: h + h.flip(1),
    "first unit": lambda h: h - h[:, :1],
    "first unit, unsqueezed": lambda h: h - h[:, 0].unsqueeze(1),
    "halves swapped": lambda h: torch.cat([h[:, 3:], h[:, :3]], 1),
    "chunks swapped": lambda h: torch.cat(list(h.chunk(2, dim=1))[::-1], dim=1),
    "split and added": lambda h: torch.cat([h.split(3, dim=-1)[0], h.split(3, dim=-1)[1]], -1),
    "transposed": lambda h: h.t().t(),
    "transposed, mean": lambda h: h - h.transpose(0, 1).mean(0).unsqueeze(1),
    "viewed": lambda h: h.view(-1, WIDTH),
    "viewed as pairs": lambda h: h.view(-1, 2, 3).flip(1).reshape(-1, WIDTH),
    "unsqueezed": lambda h: h.unsqueeze(1).squeeze(1),
    "unsqueezed behind": lambda h: h.unsqueeze(-1).squeeze(-1),
    "unsqueezed behind, summed": lambda h: h * h.unsqueeze(-1).sum(1),
    "unsqueezed before, mean": lambda h: h.unsqueeze(1).mean(1),
    "stacked": lambda h: torch.stack([h, h], 1).sum(1),
    "of pairs": lambda h: functional.max_pool1d(h.unsqueeze(1), 3, 1, 1).squeeze(1),
    "sorted": lambda h: h.sort(1)[0],
    "gathered": lambda h: h.gather(1, torch.arange(WIDTH).flip(0).expand(h.shape[0], WIDTH)),
    "einsum": lambda h: torch.einsum("ni,nj->nj", h, h),
    "layer norm": lambda h: functional.layer_norm(h, (WIDTH,)),
    "scaled": lambda h: 2 * h + 1,
    "tanh": torch.tanh,
    "squared": lambda h: h * h,
    "padded": lambda h: functional.pad(h, (1, 0))[:, :WIDTH],
}


class Code(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self._names = names

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        for name in self._names:
            h = OPERATIONS[name](h)
        return self.last(h)


def moved_by_a_newborn(names: list[str]) -> float | None:
    """How far outputs move at most when a unit that was just reset computes something else; None if none is reset."""
    torch.manual_seed(0)
    module = Code(names)
    optimizer = SGD(module.parameters(), lr=0.01)
    try:
        resets = ContinualBackprop(module, optimizer, maturity_threshold=0, replacement_rate=0.0)
    except SpecError:
        return None
    x = torch.randn(12, 5)
    module(x).sum().backward()
    optimizer.step()
    resets.step()
    resets.reset_units([1])
    [unit] = (module.last.weight == 0).all(dim=0).nonzero()[:, 0].tolist()
    before = module(x).detach()
    with torch.no_grad():
        # The units are in other places where halves were swapped; whichever was redrawn has bias 0.
        module.first.weight[module.first.bias == 0] += 3
    assert 0 <= unit < WIDTH
    return float((module(x) - before).detach().abs().max())


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_newborn_that_nobody_reads_moves_nothing(name: str) -> None:
    assert moved_by_a_newborn([name]) in (None, 0.0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=2, max_size=4))
def test_nor_where_several_things_happen(names: list[str]) -> None:
    assert moved_by_a_newborn(names) in (None, 0.0)


def test_units_are_found_where_they_are_kept_apart() -> None:
    kept = {name for name in OPERATIONS if moved_by_a_newborn([name]) is not None}
    assert {"scaled", "tanh", "squared", "viewed", "split and added", "minus mean of examples"} <= kept
