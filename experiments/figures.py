"""Pictures of the findings, legible in print and on screen.

Lines are means over seeds, with a band or a bar for the 95 % confidence interval. Colours are distinct for all common
kinds of colour vision (Okabe & Ito), and lines are named where they end.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from numpy.typing import NDArray

from experiments.results import CellResults
from experiments.statistics import Interval, interval

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
_MASK_COLOURS = {
    "none": "#D55E00",
    "all": "#009E73",
    "only first": "#0072B2",
    "only second": "#E69F00",
    "only third": "#56B4E9",
    "only fourth": "#8C6D31",
    "only fifth": "#000000",
    "first two": "#56B4E9",
    "first three": "#0072B2",
    "all but first": "#CC79A7",
    "all but first two": "#E69F00",
    "all but first three": "#8C6D31",
    "alternating": "#000000",
}
"""Those of one picture differ, as far as they are shown together."""
_INK, _FAINT = "#222222", "#BBBBBB"
_DPI = 110
_CURVE_NAME = "curve name"

Curves = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
"""By name: places [K] and values [S, K]."""


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    matplotlib.use("agg")
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in figure.axes:
        _spread_names(figure, axes)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def colour_of(name: str, place: int) -> str:
    return _MASK_COLOURS.get(name, _COLOURS[place % len(_COLOURS)])


def draw_curves(
    axes: Axes, curves: Curves, *, colours: Mapping[str, str] | None = None, bottom: float | None = None
) -> None:
    """A line and its confidence band for each, named at its end; the axis begins at `bottom`, if given."""
    for place, (name, (places, values)) in enumerate(curves.items()):
        colour = colours[name] if colours else colour_of(name, place)
        with np.errstate(invalid="ignore"):
            bounds = [interval(values[:, column]) for column in range(values.shape[1])]
        means = np.array([one.mean for one in bounds])
        widths = np.nan_to_num(np.array([one.half_width for one in bounds]))
        axes.plot(places, means, color=colour, linewidth=1.8)
        axes.fill_between(places, means - widths, means + widths, color=colour, alpha=0.13, linewidth=0)
        last, value = float(places[-1]), float(means[-1])
        axes.annotate(
            name, (last, value), xytext=(last * 1.03, value), color=colour, fontsize=9, va="center",
            annotation_clip=False, gid=_CURVE_NAME,
        )  # fmt: skip
    if bottom is not None:
        axes.set_ylim(bottom=bottom)


def _spread_names(figure: Figure, axes: Axes) -> None:
    """Moves the names of curves apart where they would overlap, and not beyond the axis; once its limits are final."""
    names = [text for text in axes.texts if isinstance(text, Annotation) and text.get_gid() == _CURVE_NAME]
    names.sort(key=lambda text: (text.xyann[1], text.get_text()))
    low, high = axes.get_ylim()
    gap = (high - low) * 0.5 / (axes.get_position().height * figure.get_figheight() * 3.2)
    heights: list[float] = []
    for text in names:
        value = float(text.xyann[1])
        heights.append(max(value, heights[-1] + gap) if heights else value)
    ceiling = high
    for place in reversed(range(len(names))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - gap
    for text, height in zip(names, heights, strict=True):
        text.xyann = (text.xyann[0], height)


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """[S, T] means over up to `window` tasks around each; fewer at the ends."""
    ones = np.ones(min(window, values.shape[1]))
    counts = np.convolve(np.ones(values.shape[1]), ones, "same")
    return np.stack([np.convolve(row, ones, "same") / counts for row in values])


def draw_dots(axes: Axes, rows: Sequence[str], series: Mapping[str, Sequence[Interval | None]]) -> None:
    """For each row a dot per series with its confidence interval, rows from top to bottom."""
    spread = 0.5 / max(1, len(series))
    for place, (name, values) in enumerate(series.items()):
        colour = colour_of(name, place)
        offset = (place - (len(series) - 1) / 2) * spread
        heights = [row + offset for row, value in enumerate(values) if value is not None and value.count]
        known = [value for value in values if value is not None and value.count]
        axes.errorbar(
            [value.mean for value in known],
            heights,
            xerr=np.nan_to_num(np.array([value.half_width for value in known])),
            fmt="o", color=colour, markersize=5, capsize=2, linewidth=1.2, label=name,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row in range(len(rows) - 1):
        axes.axhline(row + 0.5, color=_FAINT, linewidth=0.4, alpha=0.6)


def finish_dots(axes: Axes, title: str, x: str) -> None:
    finish(axes, title, x, "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=_FAINT, linewidth=0.5, alpha=0.6)


def headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11, color=_INK, x=0.01, ha="left")


def metric_curves(
    found: Mapping[str, CellResults], window: int = 1
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Online accuracy in per cent (of regression: error) by task."""
    curves = {}
    for name, one in found.items():
        scale = 1.0 if one.cell.stream.is_regression else 100.0
        values = scale * smooth(one.metric, window)
        curves[name] = (np.arange(1, values.shape[1] + 1), values)
    return curves


def measure_curves(
    found: CellResults, measure: str, layers: Sequence[int], scale: float = 1.0
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """A plasticity measure of single layers by task."""
    hidden = len(found.cell.hidden)
    return {
        f"layer {layer + 1}" if layer < hidden else "output": (
            found.sampled,
            scale * found.measures[measure][:, :, layer],
        )
        for layer in layers
    }
