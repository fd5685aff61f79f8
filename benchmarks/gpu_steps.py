"""Claim: a GPU trains stacks of learners near the speed of its memory.

    python benchmarks/gpu_steps.py [--quick]

Steps of a learner per second on the GPU, by how many learners `train_together` is given in one call, beside the plain
eager loop of one learner there (autograd and fused torch.optim). Messages start and results end in the host's memory;
the loop's tensors are on the GPU before. "Bandwidth" is what a step moves at least, each weight read twice and written
once, times the steps; "of copy" its share of what copying a large tensor reaches in the same rounds; where the weights
fit the GPU's cache it may exceed that. Skipped without a GPU.
"""

import argparse
from dataclasses import dataclass
from itertools import cycle

import ceilings
import torch
from baselines import PlainBackprop, stepping
from workloads import C, Contender, D, Net, Rounds, interleaved, machine, print_table

import cbp
from cbp import Batch, Learner

DEVICE = "cuda"
PLAIN, COPY, STACK = "plain", "copy", "stack"
DIFFERENT_MESSAGES = 8
"""All learners of a stack share so many, or the messages of thousands would not fit the host."""


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    """Of one turn."""
    floats: int
    """Of a large tensor."""
    counts: tuple[int, ...]
    """Learners in a stack."""


FULL = Effort(5, 0.5, 2**28, (1, 64, 1024, 8192))
QUICK = Effort(1, 0.01, 2**20, (1, 8))

#: Nets, and steps of each learner in one call.
CASES = ((D, 16), (C, 4))


def stack_of(net: Net, learners: int, steps: int) -> Contender:
    specs = [net.unmonitored.learner_spec(seed) for seed in range(learners)]
    messages = net.make_messages(min(learners, DIFFERENT_MESSAGES), steps * net.batch_size)
    batches = [Batch.validate(specs[0], *message) for message in messages]
    pairs = [
        (Learner(spec, device=DEVICE, engine="stacked"), batch)
        for spec, batch in zip(specs, cycle(batches), strict=False)
    ]
    return Contender(lambda: cbp.train_together(pairs), learners * steps)


def row(net: Net, learners: int, steps: int, measured: Rounds) -> list[str]:
    achieved = measured.rate(STACK) * ceilings.least_bytes(net)
    return [
        net.shape,
        f"{learners:,}",
        str(steps),
        f"{measured.rate(PLAIN):,.0f}",
        f"{measured.rate(STACK):,.0f}",
        f"{measured.times_as_fast(STACK, PLAIN):,.1f}×",
        f"{achieved / 1e9:,.1f} GB/s",
        f"{measured.rate(COPY) / 1e9:,.0f} GB/s",
        f"{achieved / measured.rate(COPY):.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    print(machine(), flush=True)
    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return
    print(torch.cuda.get_device_name(DEVICE), flush=True)
    rows = []
    for net, steps in CASES:
        for learners in effort.counts:
            contenders = {
                PLAIN: stepping(PlainBackprop(net, DEVICE), net, 64, DEVICE),
                STACK: stack_of(net, learners, steps),
                COPY: ceilings.copy(effort.floats, DEVICE),
            }
            measured = interleaved(contenders, effort.rounds, effort.seconds)
            rows.append(row(net, learners, steps, measured))
    print_table(
        f"Steps of a learner per second on the GPU, medians of {effort.rounds} interleaved rounds",
        ["net", "learners", "steps a call", "plain BP", "together", "of plain", "bandwidth", "copy", "of copy"],
        rows,
    )


if __name__ == "__main__":
    main()
