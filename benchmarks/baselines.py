"""What a learner is compared with: loops that one would write in eager PyTorch."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from ceilings import wait_for
from torch import Tensor, nn
from workloads import Contender, Net

#: Incoming weights of a unit that is replaced, from its hidden layer, its fan-in and the bound b of U(−b, b).
Draw = Callable[[int, int, float], Tensor]


def draw_uniform(_layer: int, fan_in: int, bound: float) -> Tensor:
    return torch.empty(fan_in).uniform_(-bound, bound)


def network_of(net: Net) -> nn.Sequential:
    modules: list[nn.Module] = []
    for into, out in pairwise(net.widths):
        modules += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def loss_of(net: Net) -> nn.Module:
    return nn.CrossEntropyLoss() if net.loss == "cross_entropy" else nn.MSELoss()


def optimizer_for(net: Net, network: nn.Module) -> torch.optim.Optimizer:
    """Fused: torch's fastest."""
    kind = torch.optim.SGD if net.optimizer == "sgd" else torch.optim.Adam
    return kind(network.parameters(), lr=net.spec["optimizer"]["lr"], fused=True)


class PlainBackprop:
    """The loop one would write: autograd and torch.optim, no resets."""

    def __init__(self, net: Net, device: str = "cpu") -> None:
        self.network = network_of(net).to(device)
        self.loss_of = loss_of(net)
        self.optimizer = optimizer_for(net, self.network)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss_of(self.network(inputs), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


class LiteralContinualBackprop:
    """Continual Backprop (Dohare et al. 2024), SGD and ReLU, utility adaptable_contribution, in the order of its text.

    After every optimizer step and for each hidden layer: ages, running means, utilities, eligible units, the remainder
    of the fractional count, and the worst units by a sort. Then the replacements, unit by unit. No thought is given to
    speed beyond what PyTorch does by itself.
    """

    def __init__(
        self,
        net: Net,
        *,
        learning_rate: float = 0.01,
        decay_rate: float = 0.99,
        maturity_threshold: int = 100,
        draw: Draw = draw_uniform,
    ) -> None:
        self.net = net
        self.linears = [nn.Linear(into, out) for into, out in pairwise(net.widths)]
        self.loss_of = loss_of(net)
        parameters = [parameter for linear in self.linears for parameter in linear.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=learning_rate, fused=True)
        self.decay_rate = decay_rate
        self.maturity_threshold = maturity_threshold
        self.draw = draw
        hidden = net.widths[1:-1]
        self.ages = [torch.zeros(width) for width in hidden]
        self.mean_activations = [torch.zeros(width) for width in hidden]
        self.utilities = [torch.zeros(width) for width in hidden]
        self.due = [0.0 for _ in hidden]

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        activations, hidden = [], inputs
        for linear in self.linears[:-1]:
            hidden = torch.relu(linear(hidden))
            activations.append(hidden)
        loss: Tensor = self.loss_of(self.linears[-1](hidden), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.generate_and_test(activations)
        return loss

    @torch.no_grad()
    def generate_and_test(self, activations: list[Tensor]) -> list[Tensor]:
        """The units replaced, by hidden layer."""
        replaced = [self.test(layer, activation) for layer, activation in enumerate(activations)]
        self.replace(replaced)
        return replaced

    def replace(self, replaced: list[Tensor]) -> None:
        for layer, units in enumerate(replaced):
            for unit in units.tolist():
                self.redraw_incoming(layer, unit)
        for layer, units in enumerate(replaced):
            for unit in units.tolist():
                self.zero_outgoing(layer, unit)

    def test(self, layer: int, activation: Tensor) -> Tensor:
        """The units of the layer to replace, after one more look at them."""
        decay = self.decay_rate
        age, mean, utility = self.ages[layer], self.mean_activations[layer], self.utilities[layer]
        age += 1
        correction = 1 - decay**age
        mean.mul_(decay).add_((1 - decay) * activation.mean(0))
        corrected_mean = mean / correction
        outgoing = self.linears[layer + 1].weight.abs().mean(0)
        incoming = self.linears[layer].weight.abs().mean(1)
        instantaneous = outgoing * (activation - corrected_mean).abs().mean(0) / incoming
        utility.mul_(decay).add_((1 - decay) * instantaneous)
        corrected_utility = utility / correction
        eligible = (age > self.maturity_threshold).nonzero()[:, 0]
        self.due[layer] += self.net.replacement_rate * len(eligible)
        count = int(self.due[layer])
        self.due[layer] -= count
        return eligible[corrected_utility[eligible].argsort()[:count]]

    def redraw_incoming(self, layer: int, unit: int) -> None:
        linear = self.linears[layer]
        bound = math.sqrt(2.0) * math.sqrt(3.0 / linear.in_features)  # Kaiming
        linear.weight[unit] = self.draw(layer, linear.in_features, bound)
        linear.bias[unit] = 0.0
        self.ages[layer][unit] = 0.0
        self.mean_activations[layer][unit] = 0.0
        self.utilities[layer][unit] = 0.0

    def zero_outgoing(self, layer: int, unit: int) -> None:
        self.linears[layer + 1].weight[:, unit] = 0.0


def stepping(loop: PlainBackprop | LiteralContinualBackprop, net: Net, steps: int, device: str = "cpu") -> Contender:
    """The loop over so many batches, whose tensors are made before."""
    ((features, targets),) = net.make_messages(1, steps * net.batch_size)
    inputs = torch.from_numpy(features).to(device).split(net.batch_size)
    wanted = torch.from_numpy(targets).to(device).split(net.batch_size)

    def run() -> None:
        for some_inputs, some_targets in zip(inputs, wanted, strict=True):
            loop.step(some_inputs, some_targets)
        wait_for(device)

    return Contender(run, steps)
