"""What a step of Continual Backprop costs beside a plain PyTorch backprop loop.

    python benchmarks/step_cost.py

Interleaved rounds on one thread, medians of steps per second. "backprop" is the loop one would write: autograd and
torch.optim.SGD. "layers none" is a Learner that keeps ages and utilities but resets nothing; "first" and "all" reset.
Every Learner also scores its predictions and accounts for its examples.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cbp import Batch, Learner, LearnerSpec

MASKS = ("none", "first", "all")


@dataclass(frozen=True)
class Case:
    name: str
    widths: tuple[int, ...]
    batch_size: int
    loss: str
    replacement_rate: float

    @property
    def shape(self) -> str:
        return "-".join(map(str, self.widths)) + f" b{self.batch_size}"


CASES = (
    Case("A", (20, 5, 1), 1, "mse", 1e-3),
    Case("D", (64, 64, 64, 10), 16, "cross_entropy", 1e-4),
    Case("C", (784, 100, 100, 100, 10), 16, "cross_entropy", 1e-4),
)


def examples(case: Case, steps: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    count = steps * case.batch_size
    features = random.normal(size=(count, case.widths[0])).astype(np.float32)
    if case.loss == "cross_entropy":
        return features, random.integers(0, case.widths[-1], count)
    return features, random.normal(size=(count, case.widths[-1])).astype(np.float32)


def plain_backprop(case: Case, steps: int) -> Callable[[], None]:
    modules: list[nn.Module] = []
    for into, out in zip(case.widths, case.widths[1:], strict=False):
        modules += [nn.Linear(into, out), nn.ReLU()]
    network = nn.Sequential(*modules[:-1])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss_of = nn.CrossEntropyLoss() if case.loss == "cross_entropy" else nn.MSELoss()
    features, targets = (torch.from_numpy(array).split(case.batch_size) for array in examples(case, steps))

    def run() -> None:
        for feature, target in zip(features, targets, strict=True):
            loss = loss_of(network(feature), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def continual_backprop(case: Case, steps: int, layers: str) -> Callable[[], None]:
    spec = LearnerSpec.parse(
        {
            "network": {
                "kind": "mlp",
                "in_features": case.widths[0],
                "hidden": list(case.widths[1:-1]),
                "out_features": case.widths[-1],
            },
            "loss": case.loss,
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "batch_size": case.batch_size,
            "resets": {"layers": layers, "replacement_rate": case.replacement_rate},
        }
    )
    learner = Learner(spec)
    features, targets = examples(case, steps)
    batch = Batch.validate(spec, features, targets)

    def run() -> None:
        learner.train(batch)

    return run


def measure(case: Case, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds per step, by method."""
    methods = {"backprop": plain_backprop(case, steps)}
    methods |= {mask: continual_backprop(case, steps, mask) for mask in MASKS}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  absent outside Linux
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps per round (default 500)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which the median counts (default 9)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}; torch {torch.__version__}, 1 thread; {arguments.steps} steps x {arguments.rounds} rounds")
    print("steps per second, and in brackets the speed relative to backprop")
    print(f"{'net':26}{'backprop':>10}" + "".join(f"{'layers ' + mask:>20}" for mask in MASKS))
    for case in CASES:
        seconds = measure(case, arguments.steps, arguments.rounds)
        row = f"{case.name} {case.shape:24}{1 / seconds['backprop']:>10,.0f}"
        for mask in MASKS:
            relative = seconds["backprop"] / seconds[mask]
            row += f"{f'{1 / seconds[mask]:,.0f} ({relative:.2f}x)':>20}"
        print(row)


if __name__ == "__main__":
    main()
