import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cbp import CbpError, ContinualBackprop, SnapshotError, SpecError

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
}
BUSY: dict[str, Any] = {"replacement_rate": 0.1, "maturity_threshold": 5, "decay_rate": 0.9}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def inputs() -> Iterator[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(3, 4, generator=random)


def train(
    module: nn.Sequential, optimizer: Optimizer, resets: ContinualBackprop, stream: Iterator[Any], n: int
) -> None:
    for _ in range(n):
        example = next(stream)
        optimizer.zero_grad()
        (module(example) - example[:, :2].sin()).square().mean().backward()
        optimizer.step()
        resets.step()


class PerElementAdam:
    """Adam by the book for every element, with a step count of its own."""

    def __init__(self, module: nn.Sequential, *, decoupled: bool, decay: float, amsgrad: bool) -> None:
        self.parameters = [parameter.detach().double().clone() for parameter in module.parameters()]
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.largest = [torch.zeros_like(p) for p in self.parameters]
        self.count = [torch.zeros_like(p) for p in self.parameters]
        self.decoupled, self.decay, self.amsgrad = decoupled, decay, amsgrad

    def step(self, module: nn.Sequential) -> None:
        for index, parameter in enumerate(module.parameters()):
            assert parameter.grad is not None
            value, gradient = self.parameters[index], parameter.grad.double()
            if self.decoupled:
                value.mul_(1 - 0.01 * self.decay)
            else:
                gradient = gradient + self.decay * value
            self.count[index] += 1
            self.first[index].mul_(0.9).add_(0.1 * gradient)
            self.second[index].mul_(0.999).add_(0.001 * gradient**2)
            torch.maximum(self.largest[index], self.second[index], out=self.largest[index])
            second = self.largest[index] if self.amsgrad else self.second[index]
            count = self.count[index]
            value -= 0.01 * (self.first[index] / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)

    def follow(self, module: nn.Sequential, before: list[torch.Tensor]) -> int:
        """Takes over the resets: whatever changed since `before`, which only cbp.step() can have done."""
        changed = 0
        for index, (parameter, old) in enumerate(zip(module.parameters(), before, strict=True)):
            new = parameter.detach() != old
            self.parameters[index][new] = parameter.detach()[new].double()
            for state in (self.first, self.second, self.largest, self.count):
                state[index][new] = 0.0
            changed += int(new.sum())
        return changed


@pytest.mark.parametrize("kind", ["adam", "adamw", "amsgrad"])
def test_fresh_weights_take_adams_first_steps(kind: str) -> None:
    """torch.optim counts steps once for a whole tensor; a reset weight needs a count of its own."""
    module = network()
    optimizer = OPTIMIZERS[kind](module.parameters())
    resets = ContinualBackprop(module, optimizer, bias_compensation=False, **BUSY)
    decay = optimizer.param_groups[0]["weight_decay"]
    reference = PerElementAdam(module, decoupled=kind == "adamw", decay=decay, amsgrad=kind == "amsgrad")
    stream, changed = inputs(), 0
    for _ in range(150):
        example = next(stream)
        optimizer.zero_grad()
        (module(example) - example[:, :2].sin()).square().mean().backward()
        reference.step(module)
        optimizer.step()
        for parameter, expected in zip(module.parameters(), reference.parameters, strict=True):
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        resets.step()
        changed += reference.follow(module, before)
        for parameter, expected in zip(module.parameters(), reference.parameters, strict=True):
            expected.copy_(parameter.detach())  # rounding must not add up to another trajectory
    assert changed > 500


def test_without_resets_adam_is_bitwise_that_of_torch() -> None:
    plain, watched = network(), network()
    plain_optimizer, optimizer = Adam(plain.parameters(), lr=0.01), Adam(watched.parameters(), lr=0.01)
    resets = ContinualBackprop(watched, optimizer, layers="none")
    stream = inputs()
    for _ in range(30):
        example = next(stream)
        for module, its_optimizer in ((plain, plain_optimizer), (watched, optimizer)):
            its_optimizer.zero_grad()
            module(example).square().mean().backward()
            its_optimizer.step()
        resets.step()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saved_and_loaded_resets_continue_bit_for_bit(kind: str) -> None:
    module = network()
    optimizer = OPTIMIZERS[kind](module.parameters())
    resets = ContinualBackprop(module, optimizer, seed=3, **BUSY)
    stream = inputs()
    train(module, optimizer, resets, stream, 60)

    twin = network()
    twin.load_state_dict(module.state_dict())
    twin_optimizer = OPTIMIZERS[kind](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it hands out the tensors themselves
    twin_resets = ContinualBackprop(twin, twin_optimizer, **BUSY)
    twin_resets.load_state_dict(resets.state_dict())
    examples = [next(stream) for _ in range(60)]
    train(module, optimizer, resets, iter(examples), 60)
    train(twin, twin_optimizer, twin_resets, iter(examples), 60)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resets.replacements == twin_resets.replacements
    assert sum(resets.replacements.values()) > 20


def test_momentum_of_replaced_weights_is_zeroed() -> None:
    module = network()
    optimizer = OPTIMIZERS["momentum"](module.parameters())
    resets = ContinualBackprop(module, optimizer, **BUSY)
    stream = inputs()
    while not resets.replacements["hidden_0"]:
        train(module, optimizer, resets, stream, 1)
    newborn = (resets.state_dict()["age"][0, :8] == 0).nonzero()[:, 0]
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in module.parameters()]
    assert not momentum[0][newborn].any()
    assert not momentum[1][newborn].any()
    assert not momentum[2][:, newborn].any()
    assert torch.count_nonzero(momentum[1]) == 8 - len(newborn)


def test_evaluation_leaves_no_trace() -> None:
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    resets = ContinualBackprop(module, optimizer)
    module.eval()
    module(next(inputs()))
    module.train()
    with torch.no_grad():
        module(next(inputs()))
    module(next(inputs()))  # in training mode, but nothing is learned from it
    with pytest.raises(CbpError, match="forward pass in training mode"):
        resets.step()


def test_passes_that_are_not_learned_from_take_no_memory() -> None:
    """Acting in training mode, or a loop that skips `step`, must not pile activations up."""
    module = network()
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    resets = ContinualBackprop(module, optimizer)
    example = next(inputs())
    for _ in range(50):
        module(example)
    assert resets._module_units.activations.passes == [0, 0]
    for _ in range(50):
        module(example).sum().backward()
        optimizer.step()
    assert resets._module_units.activations.passes == [1, 1]


def test_a_step_looks_at_what_the_last_optimizer_step_learned_from() -> None:
    states = []
    first, second = (torch.full((3, 4), value) for value in (5.0, 1.0))
    for skipped in ([first], []):
        module = network()
        optimizer = SGD(module.parameters(), lr=0.0)
        resets = ContinualBackprop(module, optimizer)
        for example in (*skipped, second):
            module(example).sum().backward()
            module(example * 7)
            optimizer.step()
        resets.step()
        states.append(resets.state_dict())
    assert torch.equal(states[0]["mean_activation"], states[1]["mean_activation"])
    assert torch.equal(states[0]["utility"], states[1]["utility"])


def test_a_graph_walked_twice_counts_once() -> None:
    module = network()
    resets = ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
    loss = module(next(inputs())).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert resets._module_units.activations.passes == [1, 1]


def test_passes_before_a_step_count_as_one_batch() -> None:
    states = []
    example = next(inputs())
    for parts in (example.split(1), (example,)):
        module = network()
        resets = ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
        for part in parts:
            module(part).sum().backward()
        resets.step()
        states.append(resets.state_dict())
    torch.testing.assert_close(states[0]["mean_activation"], states[1]["mean_activation"])
    torch.testing.assert_close(states[0]["utility"], states[1]["utility"])


def test_the_module_stays_as_it_is() -> None:
    module = network()
    names, count = set(module.state_dict()), len(list(module.parameters()))
    resets = ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
    assert set(module.state_dict()) == names
    assert len(list(module.parameters())) == count
    resets.remove()
    module(next(inputs()))
    with pytest.raises(CbpError):
        resets.step()


def test_one_activation_module_may_serve_several_layers() -> None:
    shared = nn.ReLU()
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), shared, nn.Linear(8, 6), shared, nn.Linear(6, 2))
    optimizer = OPTIMIZERS["adam"](module.parameters())
    resets = ContinualBackprop(module, optimizer, layers="first", **BUSY)
    train(module, optimizer, resets, inputs(), 60)
    assert resets.replacements["hidden_0"] > 0
    assert resets.replacements["hidden_1"] == 0


def test_layers_without_bias_have_nothing_that_takes_over_a_mean() -> None:
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    optimizer = OPTIMIZERS["adam"](module.parameters())
    resets = ContinualBackprop(module, optimizer, **BUSY)
    assert "2 has nothing that takes over a mean" in resets.explain()
    train(module, optimizer, resets, inputs(), 40)
    assert resets.replacements["hidden_0"] > 0


LINEAR = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("module", "field"),
    [
        (nn.Linear(4, 2), "module"),
        (nn.Sequential(nn.Linear(4, 2)), "module"),
        (nn.Sequential(LINEAR, nn.ReLU(), LINEAR), "module"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=1), nn.Linear(4, 2)), "module"),
        (nn.Sequential(nn.Conv1d(1, 4, 1), nn.Linear(4, 4), nn.ReLU()), "module"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double(), "module"),
    ],
)
def test_unsupported_modules_are_refused(module: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
    assert caught.value.violations[0].field == field


def test_unsupported_optimizers_and_settings_are_refused() -> None:
    module = network()
    with pytest.raises(SpecError, match="optimizer: Adagrad is not supported; use SGD, Adam, AdamW or RMSprop"):
        ContinualBackprop(module, torch.optim.Adagrad(module.parameters()))
    with pytest.raises(SpecError, match=r"2\.weight is not among the optimizer's parameters"):
        ContinualBackprop(module, SGD(module[0].parameters(), lr=0.1))
    with pytest.raises(SpecError, match="replacement_rate"):
        ContinualBackprop(module, SGD(module.parameters(), lr=0.1), replacement_rate=2.0)
    initializer: Any = "orthogonal"
    with pytest.raises(SpecError, match="initializer: Expected one of kaiming"):
        ContinualBackprop(module, SGD(module.parameters(), lr=0.1), initializer=initializer)
    with pytest.raises(SpecError, match="layers: No hidden layer 'hidden_5'"):
        ContinualBackprop(module, SGD(module.parameters(), lr=0.1), layers=[5])


def test_a_state_of_another_network_is_refused() -> None:
    module = network()
    resets = ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
    state = resets.state_dict()
    with pytest.raises(SnapshotError, match="utility"):
        resets.load_state_dict(state | {"utility": torch.zeros(1, 3)})
    with pytest.raises(SnapshotError, match=r"adam_steps\.7\.weight"):
        resets.load_state_dict(state | {"adam_steps": {"7.weight": torch.zeros(3)}})
    with pytest.raises(SnapshotError, match="step"):
        resets.load_state_dict({key: value for key, value in state.items() if key != "step"})
    with pytest.raises(SnapshotError, match="replacements_in_window"):
        resets.load_state_dict(state | {"replacements_in_window": [0]})


def test_a_state_from_before_replacements_were_limited_is_taken() -> None:
    module = network()
    resets = ContinualBackprop(module, OPTIMIZERS["sgd"](module.parameters()))
    state = resets.state_dict()
    del state["replacements_in_window"]
    resets.load_state_dict(state)
    assert resets.state_dict()["replacements_in_window"] == [0, 0]
