"""Claim: many learners of one shape learn together faster than one after another.

    python benchmarks/stacked_steps.py [--quick]

A step of one learner, when `train_together` is given a group's messages in one call, beside the plain loop of one
learner (autograd and fused torch.optim), and beside the same learners called one after another. The groups' engines may
use all cores; the plain loop has one thread. Without plasticity samples; malloc as in step_cost.py.
"""

import argparse
from dataclasses import dataclass

from baselines import PlainBackprop, stepping
from workloads import (
    A,
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

import cbp
from cbp import Batch, Learner, compile_ahead
from cbp.engines.names import EngineName

PLAIN = "plain"


@dataclass(frozen=True)
class Group:
    net: Net
    learners: int
    steps: int
    """Of each learner in one call."""
    target: float | None = None
    """Steps in the time of a plain one."""


GROUPS = (
    Group(A, 512, 1),
    Group(A, 512, 64, target=300),
    Group(A, 512, 256, target=300),
    Group(D, 64, 16),
    Group(D, 512, 16),
    Group(C, 8, 16),
    Group(C, 64, 16),
)


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    """Of one turn."""
    groups: tuple[Group, ...]


FULL = Effort(5, 0.25, GROUPS)
QUICK = Effort(1, 0.001, (Group(A, 4, 2),))


def contenders(group: Group) -> dict[str, Contender]:
    made = {PLAIN: stepping(PlainBackprop(group.net), group.net, 16)}
    engines: tuple[EngineName, ...] = ("compiled", "stacked")
    for engine in engines:
        made[f"together, {engine}"] = together(group, engine)
    made["one by one, compiled"] = one_by_one(group)
    return made


def together(group: Group, engine: EngineName) -> Contender:
    pairs = learners_with_messages(group, engine)
    return Contender(lambda: cbp.train_together(pairs), group.learners * group.steps)


def one_by_one(group: Group) -> Contender:
    pairs = learners_with_messages(group, "compiled")

    def run() -> None:
        for learner, batch in pairs:
            learner.train(batch)

    return Contender(run, group.learners * group.steps)


def learners_with_messages(group: Group, engine: EngineName) -> list[tuple[Learner, Batch]]:
    net = group.net.unmonitored
    specs = [net.learner_spec(seed) for seed in range(group.learners)]
    messages = net.make_messages(group.learners, group.steps * net.batch_size)
    return [
        (Learner(spec, engine=engine), Batch.validate(spec, *message))
        for spec, message in zip(specs, messages, strict=True)
    ]


def row(group: Group, measured: Rounds) -> list[str]:
    best = max(("together, compiled", "together, stacked"), key=measured.rate)
    times = measured.times_as_fast(best, PLAIN)
    return [
        group.net.shape,
        str(group.learners),
        str(group.steps),
        *(f"{measured.rate(name):,.0f}" for name in (PLAIN, "one by one, compiled")),
        *(
            f"{measured.rate(name):,.0f} ({measured.times_as_fast(name, PLAIN):,.1f}×)"
            for name in ("together, compiled", "together, stacked")
        ),
        f"{measured.rate(best) / group.steps:,.0f}",
        verdict({} if group.target is None else {f"≥ {group.target:g}×": times >= group.target}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with_malloc_set()
    one_thread()
    print(machine(), flush=True)
    compile_ahead()
    rows = [row(group, interleaved(contenders(group), effort.rounds, effort.seconds)) for group in effort.groups]
    print_table(
        f"Steps of a learner per second, medians of {effort.rounds} interleaved rounds (times the plain loop)",
        ["net", "learners", "steps a call", "plain BP", "one by one", "compiled", "stacked", "learners/s", "target"],
        rows,
    )


if __name__ == "__main__":
    main()
