"""What learners still know of earlier tasks, and how well they learn new ones, with and without limits on their resets.

The small setting of docs/paper.md: 8×8 digits whose pixels are permuted anew for every task, three layers of 100 ReLU,
SGD, one example a step. Everything the limits do not concern is the package's default.

Shapes: S seeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbp import Batch, DivergenceError, Learner, LearnerSpec, train_together
from experiments.statistics import interval, paired_difference
from experiments.streams import Examples, Stream
from experiments.tables import markdown, show

STREAM = Stream(images="digits_8x8", examples=1797)
LAGS = (1, 5)
"""How many tasks back the learner is asked."""

_REFERENCE = "CBP, ρ = 10⁻³"
RESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "backprop": {"layers": "none"},
        "CBP, ρ = 10⁻⁴": {"replacement_rate": 1e-4},
        _REFERENCE: {"replacement_rate": 1e-3},
        "strength 0.75": {"replacement_rate": 1e-3, "strength": 0.75},
        "strength 0.5": {"replacement_rate": 1e-3, "strength": 0.5},
        "strength 0.25": {"replacement_rate": 1e-3, "strength": 0.25},
        "at most 60 a task": {"replacement_rate": 1e-3, "max_replacements": 60, "replacement_window": STREAM.examples},
        "at most 20 a task": {"replacement_rate": 1e-3, "max_replacements": 20, "replacement_window": STREAM.examples},
        "at most 1 in 90 steps": {"replacement_rate": 1e-3, "max_replacements": 1, "replacement_window": 90},
        "first layer only": {"replacement_rate": 1e-3, "layers": "first"},
        "first layer protected": {"replacement_rate": 1e-3, "layers": [1, 2]},
    }
)
"""Named as in the table; below the reference, what differs from it."""


@dataclass(frozen=True)
class Outcome:
    """Of one setting."""

    online: NDArray[np.float64]
    """[S] accuracy before learning, mean over the scored tasks."""
    retained: Mapping[int, NDArray[np.float64]]
    """By lag, [S] accuracy at the end of a scored task on the examples of the one so many before."""
    resets: float
    """Units a task, in all layers together."""


def spec_of(name: str, seed: int) -> LearnerSpec:
    return LearnerSpec.parse(
        {
            "network": {"in_features": STREAM.features, "hidden": [100] * 3, "out_features": STREAM.outputs},
            "loss": "cross_entropy",
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "seed": seed,
            "resets": RESETS[name],
            "monitoring": {"interval": 0},
        }
    )


def measured(
    seeds: int, tasks: int, scored: int, on_task: Callable[[int], None] = lambda _: None
) -> dict[str, Outcome]:
    """Runs all settings, task by task, and scores the last `scored` tasks; `on_task` hears how many are done."""
    learners = {
        (name, seed): Learner(spec_of(name, seed), engine="compiled") for seed in range(seeds) for name in RESETS
    }
    accuracies = {name: np.zeros((1 + len(LAGS), seeds, scored)) for name in RESETS}
    recent: list[list[Examples]] = []
    for number in range(tasks):
        recent = [[STREAM.task(seed, number) for seed in range(seeds)], *recent[: max(LAGS)]]
        pairs = [(learner, Batch.validate(learner.spec, *recent[0][seed])) for (_, seed), learner in learners.items()]
        results = train_together(pairs)
        place = number - (tasks - scored)
        for (name, seed), result in zip(learners, results, strict=True):
            if isinstance(result, DivergenceError):
                raise result
            if place >= 0:
                of_earlier = [_accuracy(learners[name, seed], recent[lag][seed]) for lag in LAGS]
                accuracies[name][:, seed, place] = result.accuracy, *of_earlier
        on_task(number + 1)
    means = {name: values.mean(axis=2) for name, values in accuracies.items()}
    return {
        name: Outcome(
            online=means[name][0],
            retained=dict(zip(LAGS, means[name][1:], strict=True)),
            resets=sum(sum(learners[name, seed].progress.replacements.values()) for seed in range(seeds))
            / (seeds * tasks),
        )
        for name in RESETS
    }


def _accuracy(learner: Learner, examples: Examples) -> float:
    features, labels = examples
    return float((learner.predict(features).argmax(axis=1) == labels).mean())


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Accuracies, and their differences from the reference, paired by seed."""
    reference = outcomes[_REFERENCE]
    rows = []
    for name, found in outcomes.items():
        differences = [
            (found.online, reference.online),
            *((found.retained[lag], reference.retained[lag]) for lag in LAGS),
        ]
        rows.append(
            [
                name,
                f"{found.resets:.0f}",
                *(show(interval(values)) for values, _ in differences),
                *("–" if name == _REFERENCE else show(paired_difference(*pair), signed=True) for pair in differences),
            ]
        )
    asked = ["online", *(f"{lag} task{'s' * (lag > 1)} back" for lag in LAGS)]
    return markdown(["resets", "units a task", *asked, *(f"{what} − reference" for what in asked)], rows)
