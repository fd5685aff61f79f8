"""Each method's rule, computed by hand or by the book."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from cbp import (
    CbpError,
    HiddenUnits,
    L2Init,
    ReDo,
    SelectiveWeightReinitialization,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpecError,
    Upgd,
)
from cbp.methods.self_normalized_resets import first_times


class Weights(nn.Module):
    """Parameters of given values, whose gradients are given too."""

    def __init__(self, **values: Sequence[object]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def take(self, optimizer: Optimizer, **gradients: Sequence[object]) -> None:
        for name, gradient in gradients.items():
            self.get_parameter(name).grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=found.dtype), rtol=1e-12, atol=1e-12)


def test_l2_init_pulls_towards_the_first_values() -> None:
    module = Weights(w=[1.0, -2.0])
    optimizer = SGD(module.parameters(), lr=0.1)
    L2Init(module, optimizer, strength=0.5)
    module.take(optimizer, w=[1.0, 0.0])  # at the first values there is no pull
    close(module.w, [0.9, -2.0])
    module.take(optimizer, w=[1.0, 0.0])  # 1 + 0.5 · (0.9 − 1) = 0.95
    close(module.w, [0.805, -2.0])


@given(
    start=st.floats(-3, 3),
    gradients=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    strength=st.floats(0.01, 1),
    lr=st.floats(0.01, 1),
)
@settings(max_examples=30)
def test_l2_init_is_weight_decay_around_the_first_values(
    start: float, gradients: list[float], strength: float, lr: float
) -> None:
    """Shifting the origin to the first values turns one into the other."""
    pulled, decayed = Weights(w=[start]), Weights(w=[0.0])
    optimizer = SGD(pulled.parameters(), lr=lr)
    L2Init(pulled, optimizer, strength=strength)
    decaying = SGD(decayed.parameters(), lr=lr, weight_decay=strength)
    for gradient in gradients:
        pulled.take(optimizer, w=[gradient])
        decayed.take(decaying, w=[gradient])
    torch.testing.assert_close(pulled.w - start, decayed.w, rtol=1e-9, atol=1e-9)


def test_shrink_and_perturb_mixes_with_a_fresh_draw() -> None:
    module = Weights(weight=[[4.0, 4.0], [4.0, 4.0]], bias=[0.0, 0.0])
    optimizer = SGD(module.parameters(), lr=1.0)
    method = ShrinkAndPerturb(module, optimizer, shrink=0.5, perturb=0.25, interval=2)
    module.take(optimizer, weight=[[2.0, 2.0], [2.0, 2.0]], bias=[-8.0, -8.0])
    method.step()
    close(module.bias, [8.0, 8.0])
    method.step()
    close(module.weight, [[2.0, 2.0], [2.0, 2.0]])  # 0.5 · 2 + 0.25 · 4: whatever is drawn, it is a 4
    close(module.bias, [4.0, 4.0])  # biases began at 0, so there is nothing to add


def test_perturbation_has_the_distribution_of_first_values() -> None:
    torch.manual_seed(0)
    module = nn.Linear(100, 100)
    first = module.weight.detach().clone()
    method = ShrinkAndPerturb(module, SGD(module.parameters(), lr=0.1), shrink=0.0, perturb=1.0)
    method.step()
    drawn = module.weight.detach()
    assert not torch.equal(drawn, first)
    assert drawn.abs().max() <= 0.1
    assert drawn.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    assert abs(np.corrcoef(drawn.flatten().numpy(), first.flatten().numpy())[0, 1]) < 0.03


def test_upgd_moves_useless_weights_most() -> None:
    module = Weights(w=[1.0, -1.0], b=[2.0])
    optimizer = SGD(module.parameters(), lr=0.1)
    Upgd(module, optimizer, noise=0.0, decay_rate=0.5)
    module.take(optimizer, w=[-1.0, -1.0], b=[0.0])
    # u = 0.5 · (−g·w) = [0.5, −0.5], 0; the largest is 0.5
    useful, useless, neither = (1 - 1 / (1 + math.exp(-scaled)) for scaled in (1.0, -1.0, 0.0))
    close(module.w, [1.0 + 0.1 * useful, -1.0 + 0.1 * useless])
    assert neither == 0.5
    close(module.b, [2.0])
    module.take(optimizer, w=[0.0, 0.0], b=[-1.0])
    # u = [0.25, −0.25], 0.5 · 2 = 1, now the largest
    close(module.b, [2.0 + 0.1 * useful])


def test_upgd_perturbs_by_what_is_not_useful() -> None:
    runs = []
    for noise in (0.0, 0.5):
        module = Weights(w=[1.0] * 5000, b=[1.0])
        optimizer = SGD(module.parameters(), lr=0.1, weight_decay=0.2)
        Upgd(module, optimizer, noise=noise, decay_rate=0.0)
        module.take(optimizer, w=[0.0] * 5000, b=[-1.0])
        runs.append(module.w.detach())
    close(runs[0][:1], [1.0 - 0.1 * 0.2])  # decay is the optimizer's, and is not gated
    assert (runs[1] - runs[0]).std().item() == pytest.approx(0.1 * 0.5 * 0.5, rel=0.05)


@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_upgd_bears_a_network_without_useful_weights(gradient: float) -> None:
    """The published code divides by a largest utility of 0 here."""
    module = Weights(w=[1.0, 2.0])
    optimizer = SGD(module.parameters(), lr=0.1)
    Upgd(module, optimizer, noise=0.0)
    module.take(optimizer, w=[gradient, gradient])
    close(module.w, [1.0 - 0.1 * gradient, 2.0 - 0.1 * gradient])


@pytest.mark.parametrize("optimizer", [Adam, lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)])
def test_upgd_needs_plain_gradients(optimizer: type[Adam]) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(SpecError, match="use SGD without momentum"):
        Upgd(module, optimizer(module.parameters()))


class Prescribed(nn.Module):
    """Hidden units whose activations are the inputs."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(units, units)
        self.head = nn.Linear(units, 1)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(units))
            self.hidden.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


UNITS = [HiddenUnits(producers="hidden", activation="identity", consumers="head")]


def see(module: nn.Module, optimizer: Optimizer, activations: Sequence[Sequence[float]]) -> None:
    """A batch [B, U]; the optimizer has a learning rate of 0."""
    optimizer.zero_grad()
    module(torch.tensor(activations)).sum().backward()
    optimizer.step()


def newborns(module: Prescribed) -> list[int]:
    return [unit for unit, weight in enumerate(module.head.weight[0].tolist()) if weight == 0]


def test_redo_resets_the_dormant_at_every_interval() -> None:
    module = Prescribed(4)
    optimizer = SGD(module.parameters(), lr=0.0)
    method = ReDo(module, optimizer, interval=2, dormant_threshold=0.25, units=UNITS)
    # mean |h| over both steps: 3, 1, 0.5, 3.5; of their mean, 2: 1.5, 0.5, 0.25, 1.75
    see(module, optimizer, [[2.0, 1.0, -1.0, 4.0], [-2.0, -1.0, 0.0, 4.0]])
    method.step()
    assert method.replacements == {"hidden_0": 0}
    see(module, optimizer, [[4.0, 1.0, 0.5, 3.0]])
    method.step()
    assert newborns(module) == [2]
    assert method.replacements == {"hidden_0": 1}
    assert torch.equal(module.hidden.weight[[0, 1, 3]], torch.eye(4)[[0, 1, 3]])
    assert (module.hidden.weight[2].abs() <= 0.5).all()
    assert module.hidden.weight[2].abs().min() > 0


def test_redo_forgets_the_window_before() -> None:
    module = Prescribed(2)
    optimizer = SGD(module.parameters(), lr=0.0)
    method = ReDo(module, optimizer, interval=1, dormant_threshold=0.1, units=UNITS)
    see(module, optimizer, [[1.0, 1.0]])
    method.step()
    assert newborns(module) == []
    see(module, optimizer, [[1.0, 0.0]])
    method.step()
    assert newborns(module) == [1]


def test_redo_resets_all_of_a_dead_layer() -> None:
    module = Prescribed(3)
    optimizer = SGD(module.parameters(), lr=0.0)
    method = ReDo(module, optimizer, interval=1, dormant_threshold=0.0, units=UNITS)
    see(module, optimizer, [[0.0, 0.0, 0.0]])
    method.step()
    assert newborns(module) == [0, 1, 2]


def fire(pattern: str, **settings: float) -> tuple[list[int], SelfNormalizedResets]:
    """The steps, from 1 on, at which a unit that fires where the pattern has a 1 is reset; another one always fires."""
    module = Prescribed(2)
    optimizer = SGD(module.parameters(), lr=0.0)
    method = SelfNormalizedResets(module, optimizer, units=UNITS, **settings)  # type: ignore[arg-type]
    steps = []
    for step, mark in enumerate(pattern, start=1):
        with torch.no_grad():
            module.hidden.weight.copy_(torch.eye(2))
            module.hidden.bias.zero_()
        before = method.replacements["hidden_0"]
        see(module, optimizer, [[1.0 if mark == "1" else -1.0, 1.0], [-1.0, 1.0]])
        method.step()
        if method.replacements["hidden_0"] > before:
            steps.append(step)
    return steps, method


@pytest.mark.parametrize(
    ("pattern", "level", "resets"),
    [
        ("1111" + "0000", 0.25, [6]),  # four times of 1; P(A ≥ 1) = 1 and P(A ≥ 2) = 0
        ("111" + "0" * 9, 0.25, []),  # three times cannot tell what happens in a quarter of cases
        ("1101" + "1000", 0.25, [7]),  # times 1, 1, 2, 1: P(A ≥ 2) = ¼
        ("101010101" + "0000", 0.2, [12]),  # times 1, 2, 2, 2, 2: P(A ≥ 2) = 0.8, P(A ≥ 3) = 0
        ("0001" + "11111" + "000000", 0.17, [14]),  # times 4, 1, 1, 1, 1, 1: P(A ≥ 2) = ⅙ already
    ],
)
def test_a_unit_is_reset_when_its_silence_is_too_rare(pattern: str, level: float, resets: list[int]) -> None:
    assert fire(pattern, rejection_level=level, longest_silence=1000)[0][:1] == [r if r != 14 else 11 for r in resets]


def test_after_a_reset_the_history_begins_anew() -> None:
    steps, method = fire("1111" + "0" * 20 + "1111" + "00", rejection_level=0.25, longest_silence=1000)
    assert steps == [6, 30]
    assert method.state_dict()["times"].sum(dim=1).tolist() == [0, 30]


def test_who_is_silent_for_too_long_goes_in_any_case() -> None:
    assert fire("1" + "0" * 11, rejection_level=0.01, longest_silence=5)[0] == [6, 11]


@given(
    times=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    silence=st.integers(1, 60),
    level=st.floats(0.01, 0.9),
)
@settings(max_examples=60)
def test_resets_are_never_early_and_at_most_a_bin_late(times: list[int], silence: int, level: float) -> None:
    method = fire("", rejection_level=level, longest_silence=100)[1]
    bins = first_times(100)
    for time in times:
        method._silence.fill_(time)
        method._times.scatter_add_(1, method._bin_of(method._silence), torch.ones(2, 1, dtype=torch.int64))
    method._silence.fill_(silence)
    found = bool(method._has_evidence()[0])
    enough = len(times) * level >= 1

    def rare(least: int) -> bool:
        return sum(time >= least for time in times) <= len(times) * level

    if found:
        assert enough
        assert rare(silence)
    elif enough:
        first_of_bin = int(bins[bins <= silence].max())
        assert not rare(first_of_bin)


def test_bins_are_single_where_times_are_short() -> None:
    bins = first_times(10_000).tolist()
    assert bins[:16] == list(range(1, 17))
    assert all(after / before < 1.13 for before, after in pairwise(bins[15:]))
    assert first_times(2).tolist() == [1, 2]


def test_weights_of_least_utility_are_redrawn() -> None:
    module = Weights(weight=[[1.0, 2.0], [3.0, 4.0]], bias=[5.0, 5.0])
    optimizer = SGD(module.parameters(), lr=1.0, momentum=0.5)
    method = SelectiveWeightReinitialization(
        module, optimizer, replacement_rate=0.375, interval=2, decay_rate=0.0, seed=1
    )
    first = {1.0, 2.0, 3.0, 4.0}
    for expected in (1, 2):  # 1.5 are owed each time
        module.take(optimizer, weight=[[1.0, 1.0], [1.0, 1.0]], bias=[0.0, 0.0])
        method.step()
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[10.0, -20.0], [30.0, 40.0]]))
        assert module.weight.grad is not None
        module.weight.grad.copy_(torch.tensor([[3.0, 0.5], [1.0, -0.1]]))  # |g·w| = 30, 10, 30, 4
        method.step()
        assert module.weight[1, 1].item() in first
        assert (module.weight[0, 1].item() in first) == (expected == 2)
        assert module.weight[:, 0].tolist() == [10.0, 30.0]
        momentum = optimizer.state[module.weight]["momentum_buffer"]
        assert momentum[1, 1] == 0
        assert (momentum[0, 1] == 0) == (expected == 2)
        assert (momentum[:, 0] != 0).all()
    assert method.redrawn_weights == {"weight": 3}
    close(module.bias, [5.0, 5.0])


def test_utility_of_weights_is_averaged_and_starts_over() -> None:
    module = Weights(weight=[[1.0, 1.0]])
    optimizer = SGD(module.parameters(), lr=0.0)
    method = SelectiveWeightReinitialization(module, optimizer, replacement_rate=0.1, interval=3, decay_rate=0.75)
    for utility in ([0.25, 0.5], [0.4375, 0.625]):
        module.take(optimizer, weight=[[1.0, -2.0]] if utility[0] == 0.25 else [[1.0, 1.0]])
        method.step()
        close(method.state_dict()["utility"]["weight"], [utility])
    method.step()
    close(method.state_dict()["utility"]["weight"], [[0.0, 0.0]])


@given(rate=st.floats(0, 1), steps=st.integers(1, 40), width=st.integers(1, 30))
@settings(max_examples=40)
def test_as_many_weights_are_redrawn_as_the_rate_asks_for(rate: float, steps: int, width: int) -> None:
    module = Weights(weight=[[1.0] * width])
    optimizer = SGD(module.parameters(), lr=0.0)
    method = SelectiveWeightReinitialization(module, optimizer, replacement_rate=rate, interval=1)
    for _ in range(steps):
        module.take(optimizer, weight=[[1.0] * width])
        method.step()
    assert abs(method.redrawn_weights["weight"] - rate * width * steps) < 1 + 1e-6


def test_redrawn_weights_take_adams_first_steps() -> None:
    """torch.optim counts steps once for a whole tensor."""
    module = Weights(weight=[[1.0, 1.0]])
    optimizer = Adam(module.parameters(), lr=0.125, betas=(0.5, 0.75), eps=0.0)
    method = SelectiveWeightReinitialization(module, optimizer, replacement_rate=0.5, interval=5, decay_rate=0.0)
    for _ in range(5):
        module.take(optimizer, weight=[[0.1, 1.0]])
        method.step()
    assert module.weight[0, 0] == 1.0
    module.take(optimizer, weight=[[0.1, 1.0]])
    # m̂/√v̂ = 1 at the first step; by the tensor's count of 6 it would be 0.92
    torch.testing.assert_close(module.weight[0, 0].item(), 1.0 - 0.125, rtol=1e-7, atol=0.0)


def test_weights_need_their_gradients() -> None:
    module = Weights(weight=[[1.0]])
    optimizer = SGD(module.parameters(), lr=0.1)
    method = SelectiveWeightReinitialization(module, optimizer, replacement_rate=0.5)
    with pytest.raises(CbpError, match="before they are zeroed"):
        method.step()
    biases = Weights(bias=[1.0])
    optimizer = SGD(biases.parameters(), lr=0.1)
    with pytest.raises(SpecError, match="no parameter of two or more axes"):
        SelectiveWeightReinitialization(biases, optimizer, replacement_rate=0.5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda module, optimizer: L2Init(module, optimizer, strength=0.0), "strength"),
        (lambda module, optimizer: ShrinkAndPerturb(module, optimizer, shrink=1.5, perturb=0.0), "shrink"),
        (lambda module, optimizer: ReDo(module, optimizer, interval=0), "interval"),
        (lambda module, optimizer: SelfNormalizedResets(module, optimizer, rejection_level=1.0), "rejection_level"),
        (lambda module, optimizer: Upgd(module, optimizer, decay_rate=1.0), "decay_rate"),
        (
            lambda module, optimizer: SelectiveWeightReinitialization(module, optimizer, replacement_rate=-1.0),
            "replacement_rate",
        ),
    ],
)
def test_wrong_settings_are_named(make: type[L2Init], field: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(SpecError) as caught:
        make(module, SGD(module.parameters(), lr=0.1))
    assert caught.value.violations[0].field == field
