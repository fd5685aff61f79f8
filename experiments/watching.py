"""A Prometheus watches the experiment over gRPC, and is asked what the panels of the dashboard ask. What they show is
held against the learners of this process, point by point.

Shapes: K points of a curve.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cbp import LayerPlasticity, LearnerProgress, PlasticitySample
from experiments import figures
from experiments.prometheus import DASHBOARDS, Prometheus, filled_in, panels
from experiments.service import Followed, learner_id
from experiments.tables import markdown

SCRAPE_SECONDS = 0.2
_RATE_SECONDS = 1
_PATIENCE_SECONDS = 30.0
_LEARNERS = "experiment-.*"
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
"""Of layers."""
[_DASHBOARD] = [path for path in DASHBOARDS if path.stem == "plasticity"]

_OF_PROGRESS: Mapping[str, Callable[[LearnerProgress], float | None]] = {
    "Accuracy": lambda progress: progress.accuracy,
    "Accuracy on the current task": lambda progress: progress.tasks[-1].accuracy if progress.tasks else None,
    "Loss": lambda progress: progress.loss,
    "Tasks seen": lambda progress: progress.task_count,
}
_OF_LAYER: Mapping[str, Callable[[LayerPlasticity], float | None]] = {
    "Dormant units": lambda layer: layer.dormant_fraction,
    "Effective rank per unit": lambda layer: (
        None if layer.effective_rank is None else layer.effective_rank / layer.units
    ),
    "Mean weight magnitude": lambda layer: layer.mean_abs_weight,
    "Gradient norm": lambda layer: layer.gradient_norm,
    "Dead units": lambda layer: layer.dead_fraction,
    "Stable rank": lambda layer: layer.stable_rank,
    "Weight norm": lambda layer: layer.weight_norm,
    "Distance from the start": lambda layer: layer.distance_from_init,
    "Singular values that count (srank)": lambda layer: layer.srank,
    "Gradient rank": lambda layer: layer.gradient_rank,
    "Feature norm": lambda layer: layer.feature_norm,
}
_OF_UNITS: Mapping[str, Callable[[LayerPlasticity], tuple[float, ...] | None]] = {
    "Age of units": lambda layer: layer.age_quantiles,
    "Utility of units": lambda layer: layer.utility_quantiles,
}
_TELLING_PANEL = "Mean weight magnitude"
_QUANTILES = ("0.1", "0.5", "0.9")
RATES = ("Examples learnt", "Units replaced")
"""Panels whose numbers are of the clock, which learners in this process have no part in: drawn, not compared."""
WITHOUT_NUMBERS = ("Trainability", "Saturated activations")
"""Panels of what these learners do not have: tests on copies, and activations with bounds."""


@dataclass(frozen=True, eq=False)
class PanelCurve:
    """One line of a panel."""

    panel: str
    labels: Mapping[str, str]
    seconds: NDArray[np.float64]
    """[K] since the experiment began."""
    values: NDArray[np.float64]
    """[K]"""
    examples: NDArray[np.int64]
    """[K] that the learner had learnt from at the same scrape."""


class Watch:
    """A Prometheus that scrapes a server a few times a second."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self._began = time.time()

    def curves(self, examples: int) -> list[PanelCurve]:
        """Every line that the dashboard's panels show from the beginning until each learner has learnt from so many.

        Raises `TimeoutError` if Prometheus does not get to see that.
        """
        asked = f'min(cbp_learner_examples_total{{learner=~"{_LEARNERS}"}}) >= {examples}'
        _wait_until(lambda: bool(self._prometheus.values(asked)), f"no scrape shows {examples:,} examples")
        time.sleep(2 * _RATE_SECONDS)  # rates are of several scrapes
        end = time.time()
        learnt = {
            series["metric"]["learner"]: {moment: int(value) for moment, value in series["values"]}
            for series in self._ask(f'cbp_learner_examples_total{{learner=~"{_LEARNERS}"}}', end)
        }
        found = []
        for panel in panels(_DASHBOARD):
            for target in panel["targets"]:
                query = filled_in(target["expr"], learner=_LEARNERS, window=f"{_RATE_SECONDS}s")
                for series in self._ask(query, end):
                    examples_at = learnt[series["metric"]["learner"]]
                    points = [(moment, value) for moment, value in series["values"] if moment in examples_at]
                    found.append(
                        PanelCurve(
                            panel["title"],
                            series["metric"],
                            np.array([moment for moment, _ in points], np.float64) - self._began,
                            np.array([float(value) for _, value in points], np.float64),
                            np.array([examples_at[moment] for moment, _ in points], np.int64),
                        )
                    )
        return found

    def _ask(self, query: str, end: float) -> list[dict[str, Any]]:
        window = {"start": f"{self._began:.3f}", "end": f"{end:.3f}", "step": f"{SCRAPE_SECONDS}"}
        found: list[dict[str, Any]] = self._prometheus.get("/query_range", query=query, **window)["result"]
        return found


@contextmanager
def watched_by_prometheus(binary: str, http_url: str) -> Iterator[Watch]:
    """Of a server that answers HTTP there. Raises `TimeoutError` if Prometheus does not start."""
    with tempfile.TemporaryDirectory() as directory:
        target = http_url.removeprefix("http://")
        prometheus = Prometheus(binary, Path(directory), target, f"{round(1000 * SCRAPE_SECONDS)}ms")
        try:
            _wait_until(prometheus.answers, "Prometheus does not answer")
            yield Watch(prometheus)
        finally:
            prometheus.close()


def _wait_until(holds: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(SCRAPE_SECONDS / 2)


def _samples_shown(curves: Sequence[PanelCurve], learner: Followed) -> dict[float, PlasticitySample]:
    """Of each moment the sample whose first layer has the nearest weights.

    A scrape does not say which sample it shows, and samples come before the examples that they were taken among are
    counted, which are when their messages are done.
    """
    own = {sample.layers[0].mean_abs_weight or 0.0: sample for sample in learner.samples}
    return {
        second: own[min(own, key=lambda weight: abs(weight - value))]
        for curve in curves
        if (curve.panel, curve.labels.get("layer")) == (_TELLING_PANEL, learner.samples[0].layers[0].layer)
        for second, value in zip(curve.seconds, curve.values, strict=True)
    }


def _difference(curve: PanelCurve, learner: Followed, shown: Mapping[float, PlasticitySample]) -> float:
    """The largest of any point to the learner's own number, relative to numbers of at least 1; infinite if one of them
    is missing."""
    furthest = 0.0 if len(curve.values) else float("inf")
    for second, examples, value in zip(curve.seconds, curve.examples, curve.values, strict=True):
        if curve.panel in _OF_PROGRESS:
            own = _OF_PROGRESS[curve.panel](learner.standings[int(examples)])
        else:
            own = _of_layer(curve, shown[second])
        off = float("inf") if own is None else abs(value - own) / max(1.0, abs(own))
        furthest = max(furthest, float(off))
    return furthest


def _of_layer(curve: PanelCurve, sample: PlasticitySample) -> float | None:
    [layer] = [layer for layer in sample.layers if layer.layer == curve.labels["layer"]]
    if curve.panel in _OF_LAYER:
        return _OF_LAYER[curve.panel](layer)
    quantiles = _OF_UNITS[curve.panel](layer)
    return None if quantiles is None else quantiles[_QUANTILES.index(curve.labels["quantile"])]


@dataclass(frozen=True)
class PanelComparison:
    """What a panel has shown of all learners, and how far it was from their own numbers."""

    panel: str
    curves: int
    points: int
    difference: float | None
    """None of a panel in `RATES`; infinite if a number is missing on one side."""


def compare_panels(curves: Sequence[PanelCurve], followed: Sequence[Followed]) -> list[PanelComparison]:
    """Every panel of the dashboard but those in `WITHOUT_NUMBERS`, in its order."""
    by_id = {learner_id(one.cell): one for one in followed}
    shown = {
        name: _samples_shown([curve for curve in curves if curve.labels["learner"] == name], one)
        for name, one in by_id.items()
    }
    compared = []
    for title in _titles():
        of_panel = [curve for curve in curves if curve.panel == title]
        worst = None
        if title not in RATES:
            names = [curve.labels["learner"] for curve in of_panel]
            differences = [
                _difference(curve, by_id[name], shown[name]) for curve, name in zip(of_panel, names, strict=True)
            ]
            worst = max(differences, default=float("inf"))
        compared.append(PanelComparison(title, len(of_panel), sum(len(curve.values) for curve in of_panel), worst))
    return compared


def _titles() -> list[str]:
    return [title for title in (panel["title"] for panel in panels(_DASHBOARD)) if title not in WITHOUT_NUMBERS]


def panel_table(compared: Sequence[PanelComparison]) -> str:
    rows = [
        [one.panel, str(one.curves), str(one.points), "–" if one.difference is None else f"{one.difference:.1e}"]
        for one in compared
    ]
    return markdown(("panel", "lines", "points", "largest difference"), rows)


def panel_picture(curves: Sequence[PanelCurve], followed: Sequence[Followed]) -> Figure:
    """The dashboard's panels as Grafana draws them: a line for each series, by time. Layers differ in their dashes."""
    titles = _titles()
    names = [learner_id(one.cell) for one in followed]
    figure = figures.new_figure(15, 12)
    grid = figure.subplots(4, -(-len(titles) // 4)).flat
    for axes, title in zip(grid, titles, strict=False):
        of_panel = [curve for curve in curves if curve.panel == title]
        layers = list(dict.fromkeys(curve.labels.get("layer", "") for curve in of_panel))
        for curve in of_panel:
            place = names.index(curve.labels["learner"])
            style = _DASHES[layers.index(curve.labels.get("layer", ""))]
            colour = figures.colour_of(followed[place].cell.mask_name, place)
            axes.plot(curve.seconds, curve.values, style, color=colour, linewidth=1.1)
        figures.finish(axes, title, "seconds", "")
    handles = [
        *(_key(figures.colour_of(one.cell.mask_name, place), "-") for place, one in enumerate(followed)),
        *(_key("#222222", style) for style in _DASHES),
    ]
    keys = [*(one.cell.mask_name for one in followed), "layer 1", "layer 2", "layer 3", "output"]
    figure.legend(handles, keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figures.headline(figure, "What the panels of the dashboard ask Prometheus, during the experiment")
    return figure


def _key(colour: str, style: Literal["-", "--", ":", "-."]) -> Line2D:
    return Line2D([], [], color=colour, linestyle=style)
