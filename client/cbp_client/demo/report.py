"""The demo's result as a table and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from cbp_client.demo.contest import Outcome
from cbp_client.types import LayerPlasticity, PlasticitySample

#: Distinct for all common kinds of colour vision (Okabe & Ito).
_COLOURS = {"none": "#D55E00", "first": "#0072B2", "all": "#009E73"}
_INK, _FAINT = "#222222", "#BBBBBB"
_WINDOW = 5


def ends(outcome: Outcome) -> tuple[float, float]:
    """Mean online accuracy over the first and over the last tenth of the tasks, at least one task each."""
    accuracies = _accuracies(outcome)
    tenth = max(1, len(accuracies) // 10)
    return float(accuracies[:tenth].mean()), float(accuracies[-tenth:].mean())


def result_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a learner: accuracy at the start and at the end, and what became of its weights and units."""
    table = Table(
        title=f"Online accuracy, start and end of {len(outcomes[0].tasks)} tasks",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("learner", no_wrap=True)
    for heading in ("at start", "at end", "change", "mean |w|, layer 1", "dormant", "replaced"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        first, last = ends(outcome)
        sample = outcome.samples[-1]
        table.add_row(
            outcome.contestant.label,
            f"{first:.1%}",
            f"{last:.1%}",
            f"{100 * (last - first):+.1f}",
            f"{_first_layer_weight(outcome.samples[0]):.3f} → {_first_layer_weight(sample):.3f}",
            f"{_dormant(sample):.0%}",
            str(sum(outcome.replacements.values())),
        )
    return table


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Online accuracy by task, weight magnitude of the first layer, dormant units of the hidden layers."""
    matplotlib.use("agg")
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    accuracy, weight, dormant = figure.subplots(1, 3)
    for outcome in outcomes:
        colour = _COLOURS[outcome.contestant.layers]
        accuracies = 100 * _accuracies(outcome)
        numbers = np.arange(1, len(accuracies) + 1)
        accuracy.plot(numbers, accuracies, color=colour, alpha=0.25, linewidth=1)
        accuracy.plot(numbers, _smooth(accuracies), color=colour, linewidth=2.2, label=outcome.contestant.label)
        _draw(weight, outcome, _first_layer_weight, colour)
        _draw(dormant, outcome, lambda sample: 100 * _dormant(sample), colour)
    _finish(accuracy, "Online accuracy", "% predicted right before being learnt")
    _finish(weight, "Weight magnitude, first layer", "mean |w|")
    _finish(dormant, "Dormant units, hidden layers", "% of units")
    weight.set_ylim(bottom=0)
    dormant.set_ylim(bottom=0)
    accuracy.legend(loc="lower left", frameon=False, fontsize=10)
    figure.suptitle(
        f"Digits under {len(outcomes[0].tasks)} pixel permutations, each example seen once, one example a step",
        fontsize=12,
        color=_INK,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130, facecolor="white")


def _draw(axes: Axes, outcome: Outcome, measure: Callable[[PlasticitySample], float], colour: str) -> None:
    samples = outcome.samples
    axes.plot(range(1, len(samples) + 1), [measure(sample) for sample in samples], color=colour, linewidth=2.2)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=_INK, fontweight="bold")
    axes.set_xlabel("task", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def _accuracies(outcome: Outcome) -> NDArray[np.float64]:
    return np.array([task.accuracy for task in outcome.tasks], dtype=np.float64)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over up to _WINDOW tasks around each; fewer at the ends."""
    ones = np.ones(min(_WINDOW, len(values)))
    smooth: NDArray[np.float64] = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return smooth


def _hidden(sample: PlasticitySample) -> list[LayerPlasticity]:
    return [layer for layer in sample.layers if layer.dormant_fraction is not None]


def _first_layer_weight(sample: PlasticitySample) -> float:
    return sample.layers[0].mean_abs_weight or 0.0


def _dormant(sample: PlasticitySample) -> float:
    hidden = _hidden(sample)
    units = sum(layer.units for layer in hidden)
    return sum((layer.dormant_fraction or 0.0) * layer.units for layer in hidden) / units
