"""Steps in which parts of a module take no part: heads that are not used, layers that are frozen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from cbp import CbpError, ContinualBackprop, HiddenUnits, ReDo, SelfNormalizedResets


class Experts(nn.Module):
    """Experts of which one is used at a time, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.joint = nn.Linear(8, 10)
        self.heads = nn.ModuleList(nn.Linear(10, 2) for _ in range(3))

    def forward(self, x: Tensor, expert: int, task: int) -> Tensor:
        return self.heads[task](torch.relu(self.joint(torch.relu(self.experts[expert](x)))))


UNITS = [
    HiddenUnits(producers="joint", activation="relu", consumers=["heads.0", "heads.1", "heads.2"]),
]


def batches(count: int, seed: int = 0) -> Iterator[Tensor]:
    return iter(torch.randn(count, 7, 6, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("make", [ContinualBackprop, ReDo, SelfNormalizedResets])
def test_heads_that_are_not_used_keep_nobody_from_a_step(make: Any) -> None:
    torch.manual_seed(0)
    module = Experts()
    optimizer = Adam(module.parameters(), lr=0.01)
    resets = make(module, optimizer, units=UNITS)
    for step, x in enumerate(batches(9)):
        optimizer.zero_grad()
        module(x, 0, step % 3).sum().backward()
        optimizer.step()
        resets.step()


def test_a_unit_is_worth_what_all_heads_make_of_it() -> None:
    torch.manual_seed(0)
    module = Experts()
    optimizer = SGD(module.parameters(), lr=0.0)
    resets = ContinualBackprop(module, optimizer, units=UNITS, utility="contribution", decay_rate=0.0)
    [x] = batches(1)
    module(x, 0, 1).sum().backward()
    optimizer.step()
    resets.step()
    hidden = torch.relu(module.joint(torch.relu(module.experts[0](x)))).detach()
    weights = torch.cat([head.weight for head in module.heads]).abs()
    torch.testing.assert_close(resets.state_dict()["utility"][0], hidden.abs().mean(0) * weights.mean(0).detach())


class Halves(nn.Module):
    """Two networks, of which each step uses one."""

    def __init__(self) -> None:
        super().__init__()
        for side in ("left", "right"):
            setattr(self, f"{side}_in", nn.Linear(6, 8))
            setattr(self, f"{side}_out", nn.Linear(8, 2))

    def forward(self, x: Tensor, side: str) -> Tensor:
        return getattr(self, f"{side}_out")(torch.relu(getattr(self, f"{side}_in")(x)))


SIDES = [HiddenUnits(producers=f"{side}_in", activation="relu", consumers=f"{side}_out") for side in ("left", "right")]


def test_units_of_a_group_that_rests_do_not_age_and_are_not_replaced() -> None:
    def run(sides: list[str]) -> ContinualBackprop:
        torch.manual_seed(0)
        module = Halves()
        optimizer = SGD(module.parameters(), lr=0.05)
        resets = ContinualBackprop(module, optimizer, units=SIDES, replacement_rate=0.02, maturity_threshold=10, seed=3)
        given = {"left": batches(200, 1), "right": batches(200, 2)}
        for side in sides:
            optimizer.zero_grad()
            module(next(given[side]), side).square().sum().backward()
            optimizer.step()
            resets.step()
        return resets

    alternating, rarely = run(["left", "right"] * 60), run(["left"] * 60)
    state, others = alternating.state_dict(), rarely.state_dict()
    assert alternating.replacements["hidden_0"] == rarely.replacements["hidden_0"] > 3
    assert alternating.replacements["hidden_1"] > 3
    torch.testing.assert_close(state["age"][0, :8], others["age"][0, :8], rtol=0, atol=0)
    assert rarely.replacements["hidden_1"] == 0
    assert not others["age"][0, 8:].any()
    assert not others["utility"][0, 8:].any()


def test_a_step_without_any_pass_is_refused() -> None:
    module = Experts()
    optimizer = SGD(module.parameters(), lr=0.1)
    resets = ContinualBackprop(module, optimizer, units=UNITS)
    with pytest.raises(CbpError, match="needs a forward pass"):
        resets.step()


@pytest.mark.parametrize("frozen", ["0", "2"])
@pytest.mark.parametrize("make", [ContinualBackprop, ReDo, SelfNormalizedResets])
def test_a_layer_that_is_frozen_later_stays_as_it_is(make: Any, frozen: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = SGD(module.parameters(), lr=0.01)
    quick: dict[Any, dict[str, Any]] = {
        ContinualBackprop: {"replacement_rate": 0.02, "maturity_threshold": 10},
        ReDo: {"interval": 5, "dormant_threshold": 0.9},
        SelfNormalizedResets: {"longest_silence": 2},
    }
    resets = make(module, optimizer, **quick[make])

    def learn(count: int) -> None:
        for x in batches(count):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
            resets.step()

    learn(30)
    layer = module.get_submodule(frozen).requires_grad_(False)
    kept = [value.clone() for value in layer.state_dict().values()]
    before = dict(resets.replacements)
    learn(60)
    assert all(torch.equal(mine, now) for mine, now in zip(kept, layer.state_dict().values(), strict=True))
    assert resets.replacements["hidden_0"] == before["hidden_0"]
    if make is SelfNormalizedResets:  # whose units are seldom silent for long here
        return
    assert (resets.replacements["hidden_1"] > before["hidden_1"]) == (frozen == "0")
    layer.requires_grad_(True)
    learn(60)
    assert resets.replacements["hidden_0"] > before["hidden_0"]


def test_frozen_units_are_not_reset_by_hand() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = SGD(module.parameters(), lr=0.01)
    resets = ContinualBackprop(module, optimizer, maturity_threshold=0)
    [x, y] = batches(2)
    module(x).sum().backward()
    optimizer.step()
    resets.step()
    module[0].bias.requires_grad_(False)
    module(y).sum().backward()
    optimizer.step()
    resets.step()
    assert resets.reset_units([4]) == (0,)
    module[0].bias.requires_grad_(True)
    assert resets.reset_units([4]) == (4,)
