"""Claim: a step of Continual Backprop costs less than a step of ordinary backprop in PyTorch.

    python benchmarks/step_cost.py [--quick]

On one thread, without plasticity samples. "Plain" is the loop one would write: autograd and fused torch.optim.
"Literal" is Continual Backprop written down in eager PyTorch as its text reads. The engines are a Learner's, with
resets in all layers, called with one step or with many; a Learner also scores its predictions and accounts for its
examples. "CBP's own cost" is the time that ages, utilities and resets add to the compiled engine's steps.

The ceilings are measured in the same turns. "Products" are a step's matrix products and nothing else. "Memory" is how
often a step's least traffic, each weight read twice and written once, fits through the memory that copy and triad
measure; nets that fit the cache do not feel it, and at batch 1 the compiled engine leaves inactive units alone.

All sides run with the same settings of malloc, which the script sets for itself, see `workloads.MALLOC`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import ceilings
from baselines import LiteralContinualBackprop, PlainBackprop, stepping
from workloads import (
    MALLOC,
    A,
    B,
    C,
    Contender,
    D,
    Net,
    Rounds,
    interleaved,
    machine,
    one_thread,
    print_table,
    verdict,
    with_malloc_set,
)

from cbp import Batch, Learner, compile_ahead
from cbp.engines.compiled.engine import CompiledEngine
from cbp.engines.compiled.table import Table
from cbp.engines.names import EngineName

PLAIN, LITERAL, TORCH = "plain", "literal", "torch engine"
COMPILED_SINGLY, COMPILED, COMPILED_BACKPROP = "compiled, 1 a call", "compiled, many a call", "its backprop"
PRODUCTS, COPY, TRIAD = "products", "copy", "triad"


@dataclass(frozen=True)
class Case:
    net: Net
    per_call: int
    """Steps in one call, where it is not one."""
    singly: float | None = None
    """Target: steps, one a call, in the time of a plain one."""
    many: float | None = None
    """The same at `per_call`."""
    own_cost: float | None = None
    """Target: share of backprop's time in the same engine."""


CASES = (
    Case(A, 256, 25, 300),
    Case(D, 256, 12, 12, own_cost=0.25),
    Case(C, 256, 4, 4, own_cost=0.25),
    Case(B, 16, 4, 4, own_cost=0.25),
)
#: No target, for comparison.
ADAM = Case(replace(D, optimizer="adam"), 256)


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    """Of one turn."""
    baseline_steps: int
    """In one call of a baseline's loop."""
    floats: int
    """Of a large tensor."""


FULL = Effort(9, 0.15, 16, 2**26)
QUICK = Effort(1, 0.001, 1, 2**20)


def learning(
    net: Net, engine: EngineName, per_call: int, total: int, *, resets: bool = True, evaluates: bool = True
) -> Contender:
    """A learner that takes `total` steps, so many of them in one call of `train`."""
    spec = net.unmonitored.learner_spec()
    if not resets:
        spec = spec.model_copy(update={"resets": spec.resets.model_copy(update={"layers": "none"})})
    learner = Learner(spec, engine=engine)
    if not evaluates:
        assert isinstance(learner._engine, CompiledEngine)
        learner._engine.table[Table.EVALUATES] = 0
    messages = net.make_messages(total // per_call, per_call * net.batch_size)
    batches = [Batch.validate(spec, features, targets) for features, targets in messages]

    def run() -> None:
        for batch in batches:
            learner.train(batch)

    return Contender(run, total)


def contenders(case: Case, effort: Effort) -> dict[str, Contender]:
    net, steps = case.net, effort.baseline_steps
    made: dict[str, Callable[[], Contender]] = {
        PLAIN: lambda: stepping(PlainBackprop(net), net, steps),
        LITERAL: lambda: stepping(LiteralContinualBackprop(net), net, steps),
        TORCH: lambda: learning(net, "torch", case.per_call, case.per_call),
        COMPILED_SINGLY: lambda: learning(net, "compiled", 1, 16),
        COMPILED: lambda: learning(net, "compiled", case.per_call, case.per_call),
        COMPILED_BACKPROP: lambda: learning(
            net, "compiled", case.per_call, case.per_call, resets=False, evaluates=False
        ),
        PRODUCTS: lambda: ceilings.products(net),
        COPY: lambda: ceilings.copy(effort.floats),
        TRIAD: lambda: ceilings.triad(effort.floats),
    }
    if net.optimizer != "sgd":
        del made[LITERAL]
    return {name: make() for name, make in made.items()}


def step_row(case: Case, measured: Rounds) -> list[str]:
    net = case.net
    cost = 1 / measured.times_as_fast(COMPILED, COMPILED_BACKPROP) - 1
    reached = {}
    if case.singly is not None:
        reached[f"≥ {case.singly:g}× at 1"] = measured.times_as_fast(COMPILED_SINGLY, PLAIN) >= case.singly
    if case.many is not None:
        reached[f"≥ {case.many:g}× at {case.per_call}"] = measured.times_as_fast(COMPILED, PLAIN) >= case.many
    if case.own_cost is not None:
        reached[f"cost ≤ {case.own_cost:.0%}"] = cost <= case.own_cost
    return [
        f"{net.shape} {net.optimizer}",
        f"{measured.rate(PLAIN):,.0f}",
        relative(measured, LITERAL) if net.optimizer == "sgd" else "–",
        relative(measured, TORCH),
        relative(measured, COMPILED_SINGLY),
        f"{relative(measured, COMPILED)} at {case.per_call}",
        f"{cost:+.0%}",
        verdict(reached),
    ]


def ceiling_row(case: Case, measured: Rounds) -> list[str]:
    net = case.net
    bandwidth = max(measured.rate(COPY), measured.rate(TRIAD))
    memory = bandwidth / ceilings.least_bytes(net)
    return [
        f"{net.shape} {net.optimizer}",
        f"{measured.rate(COMPILED):,.0f}",
        f"{measured.rate(PRODUCTS):,.0f}",
        f"{measured.rate(PRODUCTS) * ceilings.product_flops(net) / 1e9:.1f}",
        f"{measured.times_as_fast(COMPILED, PRODUCTS):.2f}",
        f"{measured.rate(COPY) / 1e9:.1f}",
        f"{measured.rate(TRIAD) / 1e9:.1f}",
        f"{memory:,.0f}",
        f"{measured.rate(COMPILED) / memory:.2f}",
    ]


def relative(measured: Rounds, name: str) -> str:
    """Steps a second, and in brackets how many times those of plain backprop they are."""
    times = measured.times_as_fast(name, PLAIN)
    return f"{measured.rate(name):,.0f} ({times:.{0 if times >= 100 else 1 if times >= 10 else 2}f}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with_malloc_set()
    one_thread()
    print(f"{machine()}\n1 thread, medians of {effort.rounds} interleaved rounds, {' '.join(MALLOC)} set")
    started = time.perf_counter()
    compile_ahead()
    print(f"the compiled engine was ready after {time.perf_counter() - started:.1f} s", flush=True)
    cases = CASES[:1] if arguments.quick else (*CASES, ADAM)
    measured = [(case, interleaved(contenders(case, effort), effort.rounds, effort.seconds)) for case in cases]
    print_table(
        "Steps per second on one thread, and how many times those of the plain loop they are",
        ["net", "plain BP", "literal CBP", TORCH, COMPILED_SINGLY, COMPILED, "CBP's own cost", "targets"],
        [step_row(*each) for each in measured],
    )
    print_table(
        "Ceilings of the same rounds, in steps per second",
        ["net", "ours", PRODUCTS, "GFLOP/s", "ours of it", "copy GB/s", "triad GB/s", "memory", "ours of it"],
        [ceiling_row(*each) for each in measured],
    )


if __name__ == "__main__":
    main()
