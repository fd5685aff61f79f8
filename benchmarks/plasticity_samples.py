"""Claim: plasticity samples at the default interval take a small share of the time that the steps take.

    python benchmarks/plasticity_samples.py [--quick]

On one thread, with the compiled engine. The sample is of a full probe of 512 examples; the steps are as many as lie
between two samples by default. The test of trainability is timed without the rests that it takes in the service.
"""

import argparse
from dataclasses import dataclass

from workloads import (
    A,
    B,
    C,
    Contender,
    D,
    Net,
    Rounds,
    interleaved,
    machine,
    milliseconds,
    one_thread,
    print_table,
    verdict,
    with_malloc_set,
)

from cbp import Batch, Learner, compile_ahead, measure_trainability

STEPS, SAMPLE, TEST = "steps", "sample", "test of trainability"


@dataclass(frozen=True)
class Case:
    net: Net
    per_call: int
    share: float | None = None
    """Target: a sample's time, of the time of the steps between two samples."""
    tested: bool = True
    """Whether a test of trainability is timed; the largest net's takes ten seconds."""


CASES = (Case(A, 256), Case(D, 256, 0.25), Case(C, 256, 0.15), Case(B, 16, 0.15, tested=False))


def contenders(case: Case) -> dict[str, Contender]:
    net = case.net
    spec = net.unmonitored.learner_spec()
    learner = Learner(spec, engine="compiled")
    size = max(case.per_call * net.batch_size, spec.monitoring.probe_size)
    [message] = net.make_messages(1, size)
    batch = Batch.validate(spec, *message)
    learner.train(batch)
    snapshot = learner.snapshot()
    made = {
        STEPS: Contender(lambda: _discard(learner.train(batch)), size / net.batch_size),
        SAMPLE: Contender(lambda: _discard(learner.sample_plasticity())),
    }
    if case.tested:
        made[TEST] = Contender(lambda: _discard(measure_trainability(snapshot, engine="compiled")))
    return made


def _discard(result: object) -> None:
    del result


def row(case: Case, measured: Rounds) -> list[str]:
    interval = case.net.learner_spec().monitoring.interval
    between, sample = interval / measured.rate(STEPS), 1 / measured.rate(SAMPLE)
    reached = {} if case.share is None else {f"≤ {case.share:.0%}": sample <= case.share * between}
    return [
        case.net.shape,
        milliseconds(between),
        milliseconds(sample),
        f"{sample / between:.0%}",
        milliseconds(1 / measured.rate(TEST)) if case.tested else "–",
        verdict(reached),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs, not figures")
    arguments = parser.parse_args()
    rounds, seconds = (1, 0.001) if arguments.quick else (5, 0.1)
    with_malloc_set()
    one_thread()
    print(f"{machine()}\n1 thread, medians of {rounds} interleaved rounds")
    compile_ahead()
    cases = CASES[:1] if arguments.quick else CASES
    print_table(
        "A plasticity sample against the steps between two of them, and a test of trainability without its rests",
        ["net", "1,000 steps", SAMPLE, "of the steps", TEST, "targets"],
        [row(case, interleaved(contenders(case), rounds, seconds)) for case in cases],
    )


if __name__ == "__main__":
    main()
