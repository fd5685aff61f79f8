"""What is attached to a module and its optimizer: nobody but them sees it, and what it counts is what was learnt."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from cbp import CbpError, ContinualBackprop, ReDo, SelfNormalizedResets

METHODS: list[Callable[[nn.Module, Optimizer], Any]] = [ContinualBackprop, ReDo, SelfNormalizedResets]
METHOD_IDS = ["cbp", "redo", "snr"]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


class Agent:
    """A module with its optimizer and resets, as a program keeps them together."""

    def __init__(self, make: Callable[..., Any] = ContinualBackprop, optimizer: Callable[..., Any] = SGD) -> None:
        torch.manual_seed(0)
        self.module = network()
        self.optimizer = optimizer(self.module.parameters(), lr=0.05)
        quick = {"replacement_rate": 0.05, "maturity_threshold": 5} if make is ContinualBackprop else {}
        self.resets = make(self.module, self.optimizer, **quick)

    def learn(self, steps: int, seed: int = 1) -> None:
        for x in torch.randn(steps, 12, 8, generator=torch.Generator().manual_seed(seed)):
            self.optimizer.zero_grad()
            self.module(x).square().mean().backward()
            self.optimizer.step()
            self.resets.step()

    @property
    def passes(self) -> list[int]:
        attached = self.resets._module_units if isinstance(self.resets, ContinualBackprop) else self.resets._units
        return attached.activations.passes

    def state(self) -> list[Tensor]:
        found = [*self.module.state_dict().values()]
        for value in self.resets.state_dict().values():
            found += [value] if isinstance(value, Tensor) else []
        return found


def assert_same(one: Agent, other: Agent) -> None:
    for mine, others in zip(one.state(), other.state(), strict=True):
        torch.testing.assert_close(mine, others, rtol=0, atol=0)


# -- copies and pickles --


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_a_copy_of_the_module_learns_for_itself(make: Any) -> None:
    agent, other = Agent(make), Agent(make)
    twin = copy.deepcopy(agent.module)
    twins_optimizer = SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        twin(torch.randn(4, 8)).sum().backward()
        twins_optimizer.step()
    assert agent.passes == [0]
    with pytest.raises(CbpError, match="needs a forward pass"):
        agent.resets.step()
    agent.learn(20)
    other.learn(20)
    assert_same(agent, other)
    assert type(twin[2]._forward_hooks) is type(network()[2]._forward_hooks)
    assert not twin[2]._forward_hooks


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_module_optimizer_and_resets_go_on_together_in_a_copy(by: str, make: Any, optimizer: Any) -> None:
    agent = Agent(make, optimizer)
    agent.learn(30)
    copied = copy.deepcopy(agent) if by == "deepcopy" else pickle.loads(pickle.dumps(agent))
    agent.learn(30, seed=2)
    kept = agent.state()
    copied.learn(30, seed=2)
    assert_same(agent, copied)
    copied.learn(5, seed=3)
    for before, now in zip(kept, agent.state(), strict=True):
        assert torch.equal(before, now)


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_a_module_is_saved_as_if_nothing_were_attached(make: Any) -> None:
    agent = Agent(make)
    saved = io.BytesIO()
    torch.save(agent.module, saved)
    assert b"cbp" not in saved.getvalue()
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert not loaded[2]._forward_hooks
    loaded(torch.randn(2, 8)).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_module_is_compiled_to_torchscript() -> None:
    agent = Agent()
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.jit.script(agent.module)(x), agent.module(x))


def test_hooks_of_others_stay_theirs() -> None:
    module, seen = network(), []
    earlier = module[2].register_forward_hook(lambda *_: seen.append("earlier"))
    resets = ContinualBackprop(module, SGD(module.parameters(), lr=0.1))
    later = module[2].register_forward_hook(lambda *_: seen.append("later"))
    copy.deepcopy(module)(torch.randn(2, 8)).sum().backward()
    assert seen == ["earlier", "later"]
    assert resets._module_units.activations.passes == [0]
    earlier.remove()
    later.remove()
    resets.remove()
    module(torch.randn(2, 8))
    assert seen == ["earlier", "later"]
    assert not module[2]._forward_hooks


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_resets_that_nobody_has_any_more_gather_nothing(make: Any) -> None:
    agent = Agent(make, Adam)
    agent.learn(1)
    gone = weakref.ref(agent.resets)
    del agent.resets
    gc.collect()
    assert gone() is None
    agent.module(torch.randn(2, 8)).sum().backward()
    agent.optimizer.step()


# -- passes that count --


def step_on(agent: Agent, loss: Tensor) -> None:
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()


def dropped_by_zero_grad(agent: Agent, x: Tensor) -> None:
    agent.module(x).sum().backward()
    agent.optimizer.zero_grad()


def dropped_by_zeroing(agent: Agent, x: Tensor) -> None:
    agent.module(x).sum().backward()
    agent.optimizer.zero_grad(set_to_none=False)


def through_a_frozen_critic(agent: Agent, x: Tensor) -> None:
    agent.module.requires_grad_(False)
    agent.module(x.clone().requires_grad_()).sum().backward()
    agent.module.requires_grad_(True)


def gradients_of_inputs(agent: Agent, x: Tensor) -> None:
    given = x.clone().requires_grad_()
    torch.autograd.grad(agent.module(given).sum(), given)


def other_parameters(agent: Agent, x: Tensor) -> None:
    fast = {name: value.detach().clone().requires_grad_() for name, value in agent.module.named_parameters()}
    functional_call(agent.module, fast, (x,)).sum().backward()


def transformed(agent: Agent, x: Tensor) -> None:
    values = {name: value.detach() for name, value in agent.module.named_parameters()}
    grad(lambda given: functional_call(agent.module, given, (x,)).sum())(values)


def without_gradients(agent: Agent, x: Tensor) -> None:
    with torch.no_grad():
        agent.module(x)


def in_evaluation(agent: Agent, x: Tensor) -> None:
    agent.module.eval()
    agent.module(x)
    agent.module.train()


def interrupted(agent: Agent, x: Tensor) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = agent.module[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        agent.module(x)
    handle.remove()


DROPPED = [
    dropped_by_zero_grad, dropped_by_zeroing, through_a_frozen_critic, gradients_of_inputs, other_parameters,
    transformed, without_gradients, in_evaluation, interrupted,
]  # fmt: skip


@pytest.mark.parametrize("dropped", DROPPED, ids=lambda dropped: dropped.__name__)
@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_a_pass_that_nothing_learns_from_does_not_count(make: Any, dropped: Callable[[Agent, Tensor], None]) -> None:
    agent, other = Agent(make), Agent(make)
    odd = torch.full((6, 8), 30.0)
    for x in torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(3)):
        dropped(agent, odd)
        for each in (agent, other):
            if dropped is not dropped_by_zeroing:
                each.optimizer.zero_grad()
            else:
                each.optimizer.zero_grad(set_to_none=False)
            each.module(x).square().mean().backward()
            each.optimizer.step()
            each.resets.step()
        dropped(agent, odd)
    agent.optimizer.zero_grad()
    assert_same(agent, other)


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_a_batch_that_is_not_finite_and_skipped_leaves_no_trace(make: Any) -> None:
    agent = Agent(make)
    for t, x in enumerate(torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(3))):
        if t % 7 == 3:
            x[3, 2] = torch.nan
        agent.optimizer.zero_grad()
        agent.module(x).square().mean().backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(agent.module.parameters(), 1.0)):
            continue
        agent.optimizer.step()
        agent.resets.step()
    assert all(value.isfinite().all() for value in agent.state() if value.is_floating_point())


def test_what_is_not_finite_never_enters_an_average() -> None:
    agent = Agent()
    agent.learn(10)
    before = agent.resets.state_dict()
    x = torch.randn(4, 8)
    hidden = agent.module[1](agent.module[0](x)).detach()
    hidden[:, 3] = torch.inf
    agent.optimizer.zero_grad()
    output = agent.module[2](hidden)
    output.nan_to_num(0, 0, 0).sum().backward()
    agent.module[2].weight.grad = torch.zeros(3, 16)
    agent.optimizer.step()
    agent.resets._module_units.activations._gathered[0] = [hidden]
    agent.resets._module_units.activations._learned = True
    agent.resets.step()
    after = agent.resets.state_dict()
    assert after["mean_activation"].isfinite().all()
    assert after["utility"].isfinite().all()
    assert after["mean_activation"][0, 3] == before["mean_activation"][0, 3]


def test_several_losses_and_passes_of_one_step_count_together() -> None:
    agent, other = Agent(), Agent()
    one, two = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    step_on(agent, agent.module(torch.cat([one, two])).sum())
    other.optimizer.zero_grad()
    other.module(one).sum().backward()
    other.module(two).sum().backward()
    other.optimizer.step()
    for each in (agent, other):
        each.resets.step()
    for name in ("mean_activation", "utility"):
        torch.testing.assert_close(agent.resets.state_dict()[name], other.resets.state_dict()[name])


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_a_step_that_the_optimizer_skips_is_none_of_the_resets(make: Any) -> None:
    agent = Agent(make)
    before = agent.state()
    for _ in range(3):  # as under a gradient scaler that looks for its scale
        agent.optimizer.zero_grad()
        agent.module(torch.randn(4, 8)).sum().backward()
        agent.resets.step()
    for mine, others in zip(before, agent.state(), strict=True):
        assert torch.equal(mine, others)
    agent.learn(1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_passes_count_once(reentrant: bool) -> None:
    agent, other = Agent(), Agent()
    for x in torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(3)):
        step_on(agent, checkpoint(agent.module, x.requires_grad_(), use_reentrant=reentrant).square().sum())
        step_on(other, other.module(x).square().sum())
        for each in (agent, other):
            each.resets.step()
    assert_same(agent, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo itself
def test_a_module_compiled_by_torch_counts_as_it_is() -> None:
    agent, other = Agent(), Agent()
    compiled = torch.compile(agent.module, backend="eager")
    for x in torch.randn(12, 6, 8, generator=torch.Generator().manual_seed(3)):
        step_on(agent, compiled(x).square().sum())
        step_on(other, other.module(x).square().sum())
        for each in (agent, other):
            each.resets.step()
    assert_same(agent, other)


# -- another optimizer --


@pytest.mark.parametrize("make", METHODS, ids=METHOD_IDS)
def test_an_optimizer_that_the_resets_do_not_know_is_noticed(make: Any) -> None:
    agent = Agent(make)
    agent.learn(3)
    agent.optimizer = SGD(agent.module.parameters(), lr=0.1)
    with pytest.raises(CbpError, match=r"use_optimizer\(optimizer\)"):
        agent.learn(3)
    agent.resets.use_optimizer(agent.optimizer)
    agent.learn(3)


def test_newborns_start_afresh_in_the_optimizer_that_there_is_now() -> None:
    agent = Agent(optimizer=Adam)
    agent.learn(5)
    agent.optimizer = Adam(agent.module.parameters(), lr=0.01)
    agent.resets.use_optimizer(agent.optimizer)
    agent.learn(6)
    assert agent.resets.reset_units([2])[0] == 2
    [silent] = [unit.nonzero()[:, 0] for unit in [(agent.module[2].weight == 0).all(dim=0)]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not agent.optimizer.state[agent.module[0].weight][name][silent].any()


def test_an_optimizer_of_other_parameters_is_refused_and_changes_nothing() -> None:
    agent = Agent()
    with pytest.raises(Exception, match=r"does not move 2\.weight"):
        agent.resets.use_optimizer(SGD(agent.module[0].parameters(), lr=0.1))
    agent.learn(3)


@pytest.mark.parametrize("change", ["cleared", "loaded"])
def test_adams_counts_follow_a_state_that_is_cleared_or_loaded(change: str) -> None:
    agent = Agent(optimizer=Adam)
    agent.learn(4)
    early = copy.deepcopy(agent.optimizer.state_dict())
    agent.learn(6, seed=2)
    if change == "cleared":
        agent.optimizer.state.clear()
    else:
        agent.optimizer.load_state_dict(early)
    agent.learn(2, seed=3)
    counts = agent.resets._module_units.slots.adam_steps[agent.module[0].weight]
    assert counts.max() == (2 if change == "cleared" else 6)
