"""Results as Markdown tables, and their places in documents."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from experiments.cells import Cell
from experiments.results import CellResults, MissingResultsError, Results
from experiments.statistics import Interval, interval, paired_difference

Row = Sequence[str]


def show(value: Interval, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and half width, "0.694 ± 0.005"; the mean alone of a single run."""
    if not value.count:
        return "diverged"
    mean = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    return mean if math.isnan(value.half_width) else f"{mean} ± {value.half_width:.{digits}f}"


def markdown(headings: Row, rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def of_masks(cells: Sequence[Cell], results: Results) -> str:
    """One setting under different masks: score, paired differences to none and to all, and what became of the network.

    `cells` differ in their masks alone.
    """
    by_name = {cell.mask_name: results.of(cell) for cell in cells}
    rows = []
    for name, found in by_name.items():
        rows.append(
            [
                name,
                show(interval(found.early)),
                show(interval(found.late)),
                show(paired_difference(found.late, by_name["none"].late), signed=True) if name != "none" else "–",
                show(paired_difference(found.late, by_name["all"].late), signed=True) if name != "all" else "–",
                *(show(interval(weight_growth(found, layer)), 2) for layer in (0, 1, len(found.cell.hidden) - 1)),
                show(interval(late_mean(found, "dormant_fraction")), 2),
                show(interval(late_mean(found, "effective_rank")), 1),
            ]
        )
    headings: tuple[str, ...] = ("resets in", "early", "late", "late − none", "late − all")
    depth = len(cells[0].hidden)
    headings += ("w₁ grew", "w₂ grew", f"w{chr(ord('₀') + depth)} grew", "dormant", "effective rank")
    return markdown(headings, rows)


def by_layer(cells: Sequence[Cell], results: Results, measure: str) -> str:
    """A measure of each hidden layer at the end, by mask; `cells` differ in their masks alone."""
    layers = range(len(cells[0].hidden))
    rows = [
        [cell.mask_name, *(show(interval(results.of(cell).measures[measure][:, -1, layer]), 2) for layer in layers)]
        for cell in cells
    ]
    return markdown(["resets in", *(f"layer {layer + 1}" for layer in layers)], rows)


def weight_growth(found: CellResults, layer: int) -> list[float]:
    """[S] the layer's mean |w| at the end, as a multiple of what it was after the first task."""
    weights = found.measures["mean_abs_weight"][:, :, layer]
    return list(weights[:, -1] / weights[:, 0])


def late_mean(found: CellResults, measure: str) -> list[float]:
    """[S] mean of a measure over the hidden layers, at the last sample."""
    return list(found.measures[measure][:, -1, : len(found.cell.hidden)].mean(axis=1))


def pivot(
    cells: Sequence[Cell],
    results: Results,
    row: Callable[[Cell], str],
    column: Callable[[Cell], str],
    heading: str,
    value: Callable[[CellResults], str] = lambda found: show(interval(found.late)),
) -> str:
    """The late scores of cells, by two of their properties; "–" where there is no such cell."""
    entries: dict[str, dict[str, str]] = {}
    for cell in cells:
        found = results.of(cell)
        entries.setdefault(row(cell), {}).setdefault(column(cell), value(found))
    columns = list(dict.fromkeys(column(cell) for cell in cells))
    rows = [[name, *(entry.get(key, "–") for key in columns)] for name, entry in entries.items()]
    return markdown([heading, *columns], rows)


def extent(cells: Sequence[Cell], results: Results) -> str:
    """How many runs of how many tasks there were, in words: "5 seeds × 50 tasks of 10,000 examples"."""
    extents = []
    for cell in cells:
        seeds, tasks = results.of(cell).metric.shape
        extents.append(f"{seeds} seed{'s' * (seeds != 1)} × {tasks} tasks of {cell.stream.examples:,} examples")
    return "; ".join(key for key, _ in groupby(sorted(extents)))


def fill(document: str, tables: Mapping[str, str]) -> str:
    """The document with each table written between its marks, `<!-- table: name -->` and `<!-- end -->`.

    Raises `MissingResultsError` if it wants a table that is not there.
    """

    def written(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise MissingResultsError(f"There is no table {name!r}; there are {', '.join(tables)}")
        return f"<!-- table: {name} -->\n{tables[name]}<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end -->", written, document, flags=re.DOTALL)
