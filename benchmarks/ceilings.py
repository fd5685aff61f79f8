"""What the machine gives at most: its memory, and its matrix products at a net's shapes."""

from itertools import pairwise

import torch
from workloads import Contender, Net

FLOAT_BYTES = 4
STACKED_FLOATS = 2**17
"""Weights of the nets whose products are measured at once; with their gradients they fit a cache of 1 MiB."""


def copy(floats: int, device: str = "cpu") -> Contender:
    """A large tensor copied; the units of work are bytes read and written."""
    source, target = torch.ones(floats, device=device), torch.zeros(floats, device=device)

    def run() -> None:
        target.copy_(source)
        wait_for(device)

    return Contender(run, 2 * FLOAT_BYTES * floats)


def triad(floats: int, device: str = "cpu") -> Contender:
    """a = b + 2 c for large tensors; the units of work are bytes read and written."""
    first, second, target = (torch.ones(floats, device=device) for _ in range(3))

    def run() -> None:
        torch.add(first, second, alpha=2.0, out=target)
        wait_for(device)

    return Contender(run, 3 * FLOAT_BYTES * floats)


def products(net: Net) -> Contender:
    """Nothing but a step's matrix products, into memory that is there: forward, weight gradients, input gradients.

    Of as many nets at once as keep a small net from being measured by what a call costs, and still fit a cache.
    """
    nets, examples = max(1, STACKED_FLOATS // net.parameter_count), net.batch_size
    activations = [torch.rand(nets, examples, width) for width in net.widths]
    gradients = [torch.rand(nets, examples, width) for width in net.widths]
    weights = [torch.rand(nets, out, into) for into, out in pairwise(net.widths)]
    weight_gradients = [torch.zeros_like(weight) for weight in weights]
    layers = range(len(weights))

    def run() -> None:
        for layer in layers:
            torch.bmm(activations[layer], weights[layer].mT, out=activations[layer + 1])
        for layer in reversed(layers):
            torch.bmm(gradients[layer + 1].mT, activations[layer], out=weight_gradients[layer])
            if layer:
                torch.bmm(gradients[layer + 1], weights[layer], out=gradients[layer])

    return Contender(run, nets)


def product_flops(net: Net) -> float:
    """Of the products of one step."""
    pairs = list(pairwise(net.widths))
    return 2.0 * net.batch_size * (3 * sum(into * out for into, out in pairs) - pairs[0][0] * pairs[0][1])


def least_bytes(net: Net) -> int:
    """That a step of SGD moves if no weight stays in a cache: each is read forward, and read and written backward."""
    return 3 * FLOAT_BYTES * net.parameter_count


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)
