"""What a step of Continual Backprop costs beside a plain PyTorch backprop loop.

    python benchmarks/step_cost.py

Interleaved rounds on one thread, medians of steps per second. "backprop" is the loop one would write: autograd and
torch.optim. A Learner also scores its predictions and accounts for its examples.

The first table is of the torch engine: resets in no layer (but ages and utilities kept), in the first, in all. The
second is of the compiled engine with resets in all layers and without plasticity samples, by the steps in one call of
`Learner.train`; "its backprop" is the same engine without ages, utilities and resets, and "CBP's cost" the time that
those add.

All sides run with the same settings of malloc, which the script sets for itself: without them every large tensor is
mapped and unmapped anew, and net B's eager loop is two to three times slower.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cbp import Batch, Learner, LearnerSpec, compile_ahead
from cbp.engines.compiled_engine import CompiledEngine
from cbp.engines.eager_engine import EngineName
from cbp.engines.kernels import Table

MASKS = ("none", "first", "all")
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
MESSAGE = 256
"""Steps in one call, where it is not one."""
SGD: dict[str, object] = {"kind": "sgd", "lr": 0.01}
ADAM: dict[str, object] = {"kind": "adam", "lr": 0.001}


@dataclass(frozen=True)
class Case:
    name: str
    widths: tuple[int, ...]
    batch_size: int
    loss: str
    replacement_rate: float
    steps: int
    """In one round."""

    @property
    def shape(self) -> str:
        return "-".join(map(str, self.widths)) + f" b{self.batch_size}"


CASES = (
    Case("A", (20, 5, 1), 1, "mse", 1e-3, 1024),
    Case("D", (64, 64, 64, 10), 16, "cross_entropy", 1e-4, 512),
    Case("C", (784, 100, 100, 100, 10), 16, "cross_entropy", 1e-4, 256),
    Case("B", (784, 2000, 2000, 2000, 10), 1, "cross_entropy", 1e-4, 16),
)


def examples(case: Case, steps: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    count = steps * case.batch_size
    features = random.normal(size=(count, case.widths[0])).astype(np.float32)
    if case.loss == "cross_entropy":
        return features, random.integers(0, case.widths[-1], count)
    return features, random.normal(size=(count, case.widths[-1])).astype(np.float32)


def plain_backprop(case: Case, kind: str = "sgd") -> Callable[[], None]:
    modules: list[nn.Module] = []
    for into, out in zip(case.widths, case.widths[1:], strict=False):
        modules += [nn.Linear(into, out), nn.ReLU()]
    network = nn.Sequential(*modules[:-1])
    parameters = network.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01) if kind == "sgd" else torch.optim.Adam(parameters, lr=0.001)
    loss_of = nn.CrossEntropyLoss() if case.loss == "cross_entropy" else nn.MSELoss()
    features, targets = (torch.from_numpy(array).split(case.batch_size) for array in examples(case, case.steps))

    def run() -> None:
        for feature, target in zip(features, targets, strict=True):
            loss = loss_of(network(feature), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def continual_backprop(
    case: Case,
    layers: str = "all",
    engine: EngineName = "torch",
    per_call: int | None = None,
    optimizer: dict[str, object] = SGD,
    evaluates: bool = True,
) -> Callable[[], None]:
    spec = LearnerSpec.parse(
        {
            "network": {
                "kind": "mlp",
                "in_features": case.widths[0],
                "hidden": list(case.widths[1:-1]),
                "out_features": case.widths[-1],
            },
            "loss": case.loss,
            "optimizer": optimizer,
            "batch_size": case.batch_size,
            "resets": {"layers": layers, "replacement_rate": case.replacement_rate},
            # A plasticity sample takes as long as thousands of compiled steps of net A; they would hide the steps.
            "monitoring": {"interval": 1000 if engine == "torch" else 0},
        }
    )
    learner = Learner(spec, engine=engine)
    if not evaluates:
        assert isinstance(learner._engine, CompiledEngine)
        learner._engine.table[Table.EVALUATES] = 0
    features, targets = examples(case, case.steps)
    size = (per_call or case.steps) * case.batch_size
    batches = [
        Batch.validate(spec, features[start : start + size], targets[start : start + size])
        for start in range(0, len(features), size)
    ]

    def run() -> None:
        for batch in batches:
            learner.train(batch)

    return run


def measure(case: Case, rounds: int, methods: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds per step, by method."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / case.steps)
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_row(name: str, seconds: dict[str, float], more: str = "") -> None:
    row = f"{name:28}{1 / seconds['backprop']:>10,.0f}"
    for method, time_of_step in seconds.items():
        if method != "backprop":
            relative = seconds["backprop"] / time_of_step
            row += f"{f'{1 / time_of_step:,.0f} ({relative:.2f}x)':>22}"
    print(row + more, flush=True)


def torch_table(rounds: int) -> None:
    print(f"\n{'torch engine':28}{'backprop':>10}" + "".join(f"{'layers ' + mask:>22}" for mask in MASKS))
    for case in CASES:
        learners = {mask: continual_backprop(case, mask) for mask in MASKS}
        seconds = measure(case, rounds, {"backprop": plain_backprop(case)} | learners)
        print_row(f"{case.name} {case.shape}", seconds)


def compiled_table(rounds: int) -> None:
    columns = ("1 step a call", f"{MESSAGE} a call", "its backprop")
    header = "".join(f"{column:>22}" for column in columns)
    print(f"\n{'compiled engine':28}{'backprop':>10}{header}  CBP's cost")
    for case, optimizer in [*((case, SGD) for case in CASES), (CASES[1], ADAM)]:
        kind = str(optimizer["kind"])
        a_message = min(MESSAGE, case.steps)
        seconds = measure(
            case,
            rounds,
            {
                "backprop": plain_backprop(case, kind),
                columns[0]: continual_backprop(case, "all", "compiled", 1, optimizer),
                columns[1]: continual_backprop(case, "all", "compiled", a_message, optimizer),
                columns[2]: continual_backprop(case, "none", "compiled", a_message, optimizer, evaluates=False),
            },
        )
        cost = seconds[columns[1]] / seconds[columns[2]] - 1
        print_row(f"{case.name} {case.shape} {kind}", seconds, f"  {cost:+.0%}")
    print("batches of `N a call` hold fewer steps where a round does: B 16")


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  absent outside Linux
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which the median counts (default 9)")
    parser.add_argument("--engine", choices=("torch", "compiled"), help="only this engine's table")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)  # malloc reads them at its start
    torch.set_num_threads(1)
    print(f"{processor()}; torch {torch.__version__}, 1 thread; medians of {arguments.rounds} rounds")
    print("steps per second, and in brackets the speed relative to backprop")
    if arguments.engine != "compiled":
        torch_table(arguments.rounds)
    if arguments.engine != "torch":
        start = time.perf_counter()
        compile_ahead()
        print(f"\nthe compiled engine was ready after {time.perf_counter() - start:.1f} s")
        compiled_table(arguments.rounds)


if __name__ == "__main__":
    main()
