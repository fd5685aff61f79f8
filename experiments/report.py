"""Every finding's tables and pictures, from the tidy table of results."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from experiments import figures, tables
from experiments.cells import Cell
from experiments.findings import FEW_MASKS, FINDINGS, SMOOTH_ACTIVATIONS, UTILITIES, Protocol
from experiments.images import ImageSet
from experiments.results import CellResults, Results
from experiments.statistics import Interval, interval, paired_difference

_IMAGES_SHOWN = {"digits_8x8": "8×8", "digits_16x16": "16×16", "digits_28x28": "28×28", "mnist": "MNIST"}
_EARLY = "none, early"
_SHIFTS_SHOWN = {
    "permuted_inputs": "inputs permuted",
    "permuted_labels": "labels permuted",
    "swapped_labels": "two labels swapped",
    "regression_one_flip": "one bit flipped",
    "regression_all_redrawn": "all bits redrawn",
}


class Report:
    """What can be said from results of one protocol. Findings that were not run are left out."""

    def __init__(
        self, results: Results, protocol: Protocol, images: ImageSet | None = None, units: pa.Table | None = None
    ) -> None:
        """`units` is the table of `experiments.units`, for the picture of single units."""
        self._results = results
        self._units = units
        self._cells: dict[str, list[Cell]] = {}
        for name, finding in FINDINGS.items():
            known = [cell for cell in finding.cells(protocol, images) if cell in results]
            if known:
                self._cells[name] = known

    def tables(self) -> dict[str, str]:
        """Markdown tables by name; also one of what was run."""
        makers: dict[str, Callable[[Sequence[Cell]], Mapping[str, str]]] = {
            "layers": self._layer_tables,
            "long": lambda cells: {"long": tables.of_masks(cells, self._results)},
            "widths": lambda cells: {"widths": self._by_mask(cells, _network, "network")},
            "depths": lambda cells: {"depths": self._by_mask(cells, _network, "network")},
            "matched": lambda cells: {"matched": self._by_mask(cells, _network, "network")},
            "decides": lambda cells: {
                "decides": self._gaps(cells, _corner, "images, examples a task, lr, depth"),
                "effects": self._effects(cells),
            },
            "decides_more": lambda cells: {"decides_more": self._by_mask(cells, _variation, "changed")},
            "shifts": lambda cells: {
                "shifts": self._by_mask(cells, lambda cell: _SHIFTS_SHOWN[cell.stream.kind], "shift")
            },
            "weight_decay": lambda cells: {"weight_decay": self._by_mask(cells, _decay, "weight decay, ρ")},
            "activations": lambda cells: {
                "activations": self._by_mask(cells, _activation_and_rates, "activation, utility, lr, ρ", early=True)
            },
            "tanh": lambda cells: {"tanh": self._by_mask(cells, _activation_and_utility, "activation, utility")},
            "utilities_labels": lambda cells: {
                "utilities_labels": self._by_mask(cells, _activation_and_utility, "activation, utility")
            },
            "activations_long": lambda cells: {
                "activations_long": tables.pivot(
                    cells, self._results, _utility, lambda cell: cell.activation, "utility"
                )
            },
            "layers_by_activation": lambda cells: {
                "layers_by_activation": self._by_mask(cells, lambda cell: cell.activation, "activation")
            },
            "sigmoid": lambda cells: {"sigmoid": self._by_mask(cells, _rate_and_threshold, "ρ, m")},
            "utilities_tanh": self._tanh_tables,
            "utilities": lambda cells: {"utilities": self._utility_table(cells)},
            "utilities_regression": lambda cells: {"utilities_regression": self._relative_utility_table(cells)},
            "regression": lambda cells: {
                "regression": tables.pivot(
                    cells, self._results, lambda cell: _method(cell), _regression_column, "resets, ρ, utility"
                )
            },
        }
        made = {"extent": self._extent()}
        for name, cells in self._cells.items():
            made |= makers[name](cells)
        return made

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Pictures by name."""
        makers: dict[str, Callable[[Sequence[Cell]], Mapping[str, Figure]]] = {
            "layers": self._layer_figures,
            "long": lambda cells: {"long": self._long_figure(cells)},
            "widths": lambda _: {"sizes": self._size_figure()},
            "decides": lambda cells: {"decides": self._gap_figure(cells)},
            "shifts": lambda cells: {"shifts": self._shift_figure(cells)},
            "regression": lambda cells: {"regression": self._regression_figure(cells)},
            "utilities_tanh": self._tanh_figures,
            "utilities": lambda cells: {
                "utilities": self._utility_figure(cells, "accuracy, %", lambda found: _percent(found.late))
            },
            "utilities_regression": lambda cells: {
                "utilities_regression": self._utility_figure(
                    cells, "error, times that of no resets", self._relative_error
                )
            },
            "layers_by_activation": lambda cells: {"layers_by_activation": self._activation_layers_figure(cells)},
        }
        for name, cells in self._cells.items():
            if name in makers:
                yield from makers[name](cells).items()

    # -- tables --

    def _extent(self) -> str:
        rows = [
            [name, FINDINGS[name].question, str(len(cells)), tables.extent(cells, self._results)]
            for name, cells in self._cells.items()
        ]
        return tables.markdown(("finding", "question", "cells", "each cell"), rows)

    def _by_mask(self, cells: Sequence[Cell], row: Callable[[Cell], str], heading: str, *, early: bool = False) -> str:
        """Scores by setting and mask; the score without resets stands in every row of its setting, if wanted also that
        of the first fifth of its tasks."""
        complete: list[Cell] = []
        for cell in cells:
            if cell.mask or row(cell) not in {row(other) for other in cells if other.mask}:
                complete.append(cell)
        baselines = {_setting(cell): cell for cell in cells if not cell.mask}
        entries: dict[str, dict[str, str]] = {}
        names = [cell.mask_name for cell in cells]
        columns = [name for name in ("none", *dict.fromkeys(names)) if name in names]
        for cell in complete:
            found = self._results.of(cell)
            entry = entries.setdefault(row(cell), {})
            entry[cell.mask_name] = tables.show(interval(found.late))
            baseline = baselines.get(_setting(cell))
            if baseline is not None:
                entry["none"] = tables.show(interval(self._results.of(baseline).late))
                entry[_EARLY] = tables.show(interval(self._results.of(baseline).early))
        columns = [*([_EARLY] if early else []), *dict.fromkeys(columns)]
        rows = [[name, *(entry.get(column, "–") for column in columns)] for name, entry in entries.items()]
        return tables.markdown([heading, *columns], rows)

    def _layer_tables(self, cells: Sequence[Cell]) -> dict[str, str]:
        return {
            "layers": tables.of_masks(cells, self._results),
            "dormant": tables.by_layer(cells, self._results, "dormant_fraction"),
        }

    def _gaps(self, cells: Sequence[Cell], row: Callable[[Cell], str], heading: str) -> str:
        rows = [
            [
                name,
                *(tables.show(interval(by_mask[mask].late)) for mask in ("none", "only first", "all")),
                tables.show(paired_difference(by_mask["only first"].late, by_mask["all"].late), signed=True),
                tables.show(paired_difference(by_mask["only first"].late, by_mask["none"].late), signed=True),
                f"{round(100 * _recovered(by_mask))} %",
                tables.show(interval(tables.weight_growth(by_mask["only first"], 1)), 2),
                tables.show(interval(by_mask["only first"].measures["dormant_fraction"][:, -1, 1]), 2),
            ]
            for name, by_mask in self._settings(cells, row).items()
        ]
        headings = (
            heading, "none", "only first", "all", "first − all", "first − none", "recovered",
            "w₂ grew", "dormant, layer 2",
        )  # fmt: skip
        return tables.markdown(headings, rows)

    def _effects(self, cells: Sequence[Cell]) -> str:
        """What each factor alone does to the gap between the first layer and all, averaged over the other factors."""
        settings = list(self._settings(cells, _corner).values())
        seeds = min(len(found.late) for by_mask in settings for found in by_mask.values())
        factors: dict[str, Callable[[Cell], object]] = {
            "images": lambda cell: _IMAGES_SHOWN[str(cell.stream.images)],
            "examples a task": lambda cell: f"{cell.stream.examples:,}",
            "lr": lambda cell: f"{cell.lr:g}",
            "depth": lambda cell: len(cell.hidden),
        }
        rows = []
        for name, level in factors.items():
            levels = list(dict.fromkeys(level(by_mask["all"].cell) for by_mask in settings))
            gaps = {
                one: [
                    by_mask["only first"].late[:seeds] - by_mask["all"].late[:seeds]
                    for by_mask in settings
                    if level(by_mask["all"].cell) == one
                ]
                for one in levels
            }
            if len(levels) < 2:
                continue
            low, high = (np.mean(gaps[one], axis=0) for one in levels[:2])
            rows.append(
                [
                    f"{name}: {levels[0]} → {levels[1]}",
                    *(tables.show(interval(values), signed=True) for values in (low, high)),
                    tables.show(paired_difference(high, low), signed=True),
                ]
            )
        return tables.markdown(("factor", "first − all at the former", "at the latter", "change"), rows)

    def _settings(self, cells: Sequence[Cell], row: Callable[[Cell], str]) -> dict[str, dict[str, CellResults]]:
        """Results by setting and mask, of settings that have the three masks that are compared."""
        settings: dict[str, dict[str, CellResults]] = {}
        for cell in cells:
            settings.setdefault(row(cell), {})[cell.mask_name] = self._results.of(cell)
        return {name: found for name, found in settings.items() if {"none", "only first", "all"} <= set(found)}

    def _utility_table(self, cells: Sequence[Cell]) -> str:
        return tables.pivot(cells, self._results, _utility, lambda cell: cell.activation, "utility, bias compensation")

    def _relative_utility_table(self, cells: Sequence[Cell]) -> str:
        return tables.pivot(
            [cell for cell in cells if cell.mask],
            self._results,
            _utility,
            lambda cell: cell.activation,
            "utility, bias compensation",
            lambda found: tables.show(self._relative_error(found), 2),
        )

    def _relative_error(self, found: CellResults) -> Interval:
        """As a multiple of that without resets on the same stream, since seeds differ in how hard theirs is."""
        baseline = replace(found.cell, mask=(), utility="contribution", bias_compensation=False)
        without = self._results.of(baseline).late
        seeds = min(len(without), len(found.late))
        return interval(found.late[:seeds] / without[:seeds])

    def _tanh_tables(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Of tanh each utility with its paired differences to backprop, and to CBP on ReLU as published."""
        tanh = [cell for cell in cells if cell.activation == "tanh"]
        by_name = {_utility(cell): self._results.of(cell) for cell in tanh}
        relu = {_utility(cell): self._results.of(cell) for cell in cells if cell.activation == "relu"}
        rows = []
        for name, found in by_name.items():
            reference = relu.get("contribution, off")
            rows.append(
                [
                    name,
                    tables.show(interval(found.early)),
                    tables.show(interval(found.late)),
                    tables.show(paired_difference(found.late, by_name["none"].late), signed=True),
                    "–"
                    if reference is None
                    else tables.show(paired_difference(found.late, reference.late), signed=True),
                    tables.show(interval(tables.late_mean(found, "saturated_fraction")), 2),
                    tables.show(interval(tables.weight_growth(found, 0)), 2),
                    tables.show(interval(tables.late_mean(found, "effective_rank")), 1),
                ]
            )
        headings = (
            "utility, bias compensation", "early", "late", "late − none", "late − CBP on ReLU", "saturated",
            "w₁ grew", "effective rank",
        )  # fmt: skip
        return {"utilities_tanh": tables.markdown(headings, rows)}

    # -- pictures --

    def _layer_figures(self, cells: Sequence[Cell]) -> dict[str, Figure]:
        found = {cell.mask_name: self._results.of(cell) for cell in cells}
        return {
            "layers": self._accuracy_figure(found),
            "layers_score": self._layer_score_figure(found),
            "weights": self._measure_figure(found, "mean_abs_weight", "mean |w|", "Weight magnitude of each layer"),
            "units": self._units_figure(found),
        }

    def _accuracy_figure(self, found: Mapping[str, CellResults]) -> Figure:
        figure = figures.new_figure(12, 4.6)
        single, several = figure.subplots(1, 2, sharey=True)
        curves = figures.metric_curves(found, window=3)
        names = [name for name in found if name.startswith("only")]
        others = [name for name in found if name not in names]
        figures.draw_curves(single, {name: curves[name] for name in ("none", *names, "all")})
        figures.draw_curves(several, {name: curves[name] for name in others})
        figures.finish(single, "Resets in one layer, all or none", "task", "% predicted right before being learnt")
        figures.finish(several, "Resets in several layers", "task", "")
        figures.headline(figure, f"Online accuracy by task; {_described(found['none'])}; means over 3 tasks")
        return figure

    def _layer_score_figure(self, found: Mapping[str, CellResults]) -> Figure:
        figure = figures.new_figure(8, 4.8)
        axes = figure.subplots()
        scores = {name: _percent(one.late) for name, one in found.items()}
        names = sorted(scores, key=lambda name: -scores[name].mean)
        figures.draw_dots(axes, names, {"late": [scores[name] for name in names]})
        for name in ("none", "all"):
            axes.axvline(scores[name].mean, color=figures.colour_of(name, 0), linewidth=1, linestyle="--")
        figures.finish_dots(axes, "Online accuracy of the last fifth of tasks, by layers reset", "%")
        figures.headline(figure, _described(found["none"]))
        return figure

    def _measure_figure(self, found: Mapping[str, CellResults], measure: str, unit: str, title: str) -> Figure:
        figure = figures.new_figure(13, 3.8)
        grid = figure.subplots(1, len(FEW_MASKS), sharey=True)
        for axes, name in zip(grid, FEW_MASKS, strict=True):
            one = found[name]
            layers = range(len(one.cell.hidden) + (measure == "mean_abs_weight"))
            figures.draw_curves(axes, figures.measure_curves(one, measure, layers), bottom=0)
            figures.finish(axes, f"resets: {name}", "task", unit if axes is grid[0] else "")
        figures.headline(figure, f"{title}; {_described(found['none'])}")
        return figure

    def _units_figure(self, found: Mapping[str, CellResults]) -> Figure:
        figure = figures.new_figure(13, 7)
        grid = figure.subplots(2, len(FEW_MASKS), sharey="row", sharex=True)
        rows = (("dormant_fraction", 100.0, "% dormant units", 100), ("effective_rank", 1.0, "effective rank", 70))
        for row, (measure, scale, unit, top) in zip(grid, rows, strict=True):
            for axes, name in zip(row, FEW_MASKS, strict=True):
                layers = range(len(found[name].cell.hidden))
                figures.draw_curves(axes, figures.measure_curves(found[name], measure, layers, scale))
                axes.set_ylim(0, top)
                figures.finish(axes, f"resets: {name}", "task", unit if axes is row[0] else "")
        figures.headline(figure, f"Dormant units and effective rank of each layer; {_described(found['none'])}")
        return figure

    def _long_figure(self, cells: Sequence[Cell]) -> Figure:
        found = {cell.mask_name: self._results.of(cell) for cell in cells}
        figure = figures.new_figure(12, 4.2)
        accuracy, dormant = figure.subplots(1, 2)
        figures.draw_curves(accuracy, figures.metric_curves(found, window=9))
        second = {name: (one.sampled, 100 * one.measures["dormant_fraction"][:, :, 1]) for name, one in found.items()}
        figures.draw_curves(dormant, second)
        dormant.set_ylim(0, 100)
        figures.finish(accuracy, "Online accuracy", "task", "%")
        figures.finish(dormant, "Dormant units of the second layer", "task", "% of units")
        figures.headline(figure, f"{_described(found['none'])}; accuracies are means over 9 tasks")
        return figure

    def _size_figure(self) -> Figure:
        figure = figures.new_figure(13, 3.9)
        grid = figure.subplots(1, 3)
        titles = {"widths": "Five layers of …", "depths": "… layers of 100", "matched": "As many parameters"}
        for axes, (name, title) in zip(grid, titles.items(), strict=True):
            settings = self._settings(self._cells.get(name, []), _network)
            series = {
                mask: [_percent(by_mask[mask].late) if mask in by_mask else None for by_mask in settings.values()]
                for mask in FEW_MASKS
            }
            figures.draw_dots(axes, list(settings), series)
            figures.finish_dots(axes, title, "online accuracy of the last fifth, %")
        grid[-1].legend(frameon=False, fontsize=9, title="resets", loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def _gap_figure(self, cells: Sequence[Cell]) -> Figure:
        settings = self._settings(cells, _corner)
        gaps = {
            name: (
                _percent_difference(found["none"], found["all"]),
                _percent_difference(found["only first"], found["all"]),
            )
            for name, found in settings.items()
        }
        names = sorted(gaps, key=lambda name: gaps[name][1].mean)
        figure = figures.new_figure(13, 5.2)
        axes, alive = figure.subplots(1, 2, width_ratios=(3, 2))
        series = {"none": [gaps[name][0] for name in names], "only first": [gaps[name][1] for name in names]}
        figures.draw_dots(axes, names, series)
        axes.axvline(0, color=figures.colour_of("all", 0), linewidth=1, linestyle="--")
        axes.legend(frameon=False, fontsize=9, title="resets")
        figures.finish_dots(
            axes, "Behind resets in all layers", "online accuracy of the last fifth, minus that of all, points"
        )
        axes.set_ylabel("images, examples a task, learning rate, depth")
        self._draw_second_layer(alive, settings.values())
        return figure

    def _draw_second_layer(self, axes: Axes, settings: Iterable[Mapping[str, CellResults]]) -> None:
        """A dot for each run with resets in the first layer: units left in the second, and what it is behind by."""
        units: list[float] = []
        behind: list[float] = []
        for by_mask in settings:
            first, every = by_mask["only first"], by_mask["all"]
            seeds = min(len(first.late), len(every.late))
            units += list(first.cell.hidden[1] * (1 - first.measures["dormant_fraction"][:seeds, -1, 1]))
            behind += list(100 * (first.late[:seeds] - every.late[:seeds]))
        correlation = spearmanr(units, behind).statistic if len(units) > 2 else float("nan")
        axes.axhline(0, color=figures.colour_of("all", 0), linewidth=1, linestyle="--")
        axes.scatter(units, behind, s=22, alpha=0.7, color=figures.colour_of("only first", 0), linewidths=0)
        title = f"Single runs: rank correlation {correlation:.2f} over {len(units)}"
        figures.finish(axes, title, "units of the second layer that are not dormant", "first − all, points")

    def _shift_figure(self, cells: Sequence[Cell]) -> Figure:
        kinds = list(dict.fromkeys(cell.stream.kind for cell in cells))
        figure = figures.new_figure(13, 4)
        grid = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(grid, kinds, strict=True):
            found = {cell.mask_name: self._results.of(cell) for cell in cells if cell.stream.kind == kind}
            figures.draw_curves(axes, figures.metric_curves(found, window=3))
            figures.finish(axes, _SHIFTS_SHOWN[kind], "task", "online accuracy, %" if axes is grid[0] else "")
        return figure

    def _regression_figure(self, cells: Sequence[Cell]) -> Figure:
        kinds = list(dict.fromkeys(cell.stream.kind for cell in cells))
        figure = figures.new_figure(13, 7.5)
        grid = figure.subplots(2, len(kinds), squeeze=False)
        for column, kind in enumerate(kinds):
            for row, activation in enumerate(("relu", "tanh")):
                found = {
                    _method(cell): self._results.of(cell)
                    for cell in cells
                    if (cell.stream.kind, cell.activation) == (kind, activation)
                }
                figures.draw_curves(grid[row][column], figures.metric_curves(found, window=5))
                figures.finish(grid[row][column], f"{activation}, {_SHIFTS_SHOWN[kind]}", "task", "squared error")
        return figure

    def _utility_figure(self, cells: Sequence[Cell], unit: str, score: Callable[[CellResults], Interval]) -> Figure:
        names = [name for name in ("relu", *SMOOTH_ACTIVATIONS) if name in {cell.activation for cell in cells}]
        figure = figures.new_figure(13, 7)
        grid = figure.subplots(2, 4, sharey=True).flat
        rows = [*UTILITIES]
        for axes, activation in zip(grid, names, strict=False):
            chosen = [cell for cell in cells if cell.activation == activation]
            found = {
                (cell.utility, cell.bias_compensation): score(self._results.of(cell)) for cell in chosen if cell.mask
            }
            series = {
                label: [found.get((utility, on)) for utility in rows]
                for label, on in (("compensation off", False), ("compensation on", True))
            }
            figures.draw_dots(axes, rows, series)
            for cell in chosen:
                if not cell.mask:
                    baseline = score(self._results.of(cell))
                    axes.axvline(baseline.mean, color="#555555", linewidth=1, linestyle="--")
            figures.finish_dots(axes, activation, unit)
            axes.tick_params(labelsize=8)
        for axes in list(figure.axes)[len(names) :]:
            axes.set_axis_off()
            if axes is figure.axes[-1]:
                handles, labels = figure.axes[0].get_legend_handles_labels()
                axes.legend(handles, labels, frameon=False, loc="center", title="dashed: no resets")
        figures.headline(
            figure, f"Resets in all layers by each utility; {_described(self._results.of(cells[0]), network=True)}"
        )
        return figure

    def _tanh_figures(self, cells: Sequence[Cell]) -> dict[str, Figure]:
        tanh = {_utility(cell): cell for cell in cells if cell.activation == "tanh"}
        shown = ("none", "contribution, off", "zero_contribution, off", "adaptable_contribution, off", "random, off")
        found = {name.removesuffix(", off"): self._results.of(tanh[name]) for name in shown if name in tanh}
        relu = [cell for cell in cells if cell.activation == "relu" and _utility(cell) == "contribution, off"]
        figure = figures.new_figure(13, 4.2)
        accuracy, saturated, weights = figure.subplots(1, 3)
        curves = figures.metric_curves(found, window=3)
        colours = {name: figures.colour_of("", place) for place, name in enumerate(curves)}
        if relu:
            curves |= figures.metric_curves({"ReLU, contribution": self._results.of(relu[0])}, window=3)
            colours["ReLU, contribution"] = "#000000"
        figures.draw_curves(accuracy, curves, colours=colours)
        for axes, measure, scale in ((saturated, "saturated_fraction", 100.0), (weights, "mean_abs_weight", 1.0)):
            hidden = slice(0, len(cells[0].hidden))
            means = {
                name: (one.sampled, scale * one.measures[measure][:, :, hidden].mean(axis=2))
                for name, one in found.items()
            }
            figures.draw_curves(axes, means, colours=colours, bottom=0)
        figures.finish(accuracy, "Online accuracy", "task", "%")
        figures.finish(saturated, "Saturated, beyond ±0.9", "task", "% of hidden activations")
        figures.finish(weights, "Weight magnitude, hidden layers", "task", "mean |w|")
        figures.headline(figure, f"tanh, resets in all layers by utility; {_described(next(iter(found.values())))}")
        made = {"tanh_over_time": figure}
        if self._units is not None:
            made["tanh_units"] = self._tanh_units_figure(tanh)
        return made

    def _tanh_units_figure(self, tanh: Mapping[str, Cell]) -> Figure:
        """Where the units that hardly ever leave saturation stand in the ranking of each utility."""
        assert self._units is not None
        measures = ("contribution", "zero_contribution", "adaptable_contribution")
        names = ("none", "contribution, off", "adaptable_contribution, off")
        figure = figures.new_figure(13, 7.5)
        grid = figure.subplots(len(names), len(measures), sharex=True, sharey="row")
        keys = np.array(self._units["cell"].to_pylist())
        for row, name in zip(grid, names, strict=True):
            chosen = self._units.filter(pa.array(keys == tanh[name].key))
            saturated = chosen["saturated"].to_numpy()
            for axes, measure in zip(row, measures, strict=True):
                ranks = _ranks_within_layers(chosen, measure)
                axes.scatter(100 * saturated, 100 * ranks, s=4, alpha=0.3, color="#0072B2", linewidths=0)
                figures.finish(
                    axes,
                    f"by {measure}" if name == names[0] else "",
                    "% of examples on which the unit is saturated" if name == names[-1] else "",
                    f"learner: {name.removesuffix(', off')}\nrank in its layer, %" if axes is row[0] else "",
                )
        figures.headline(figure, "Units of tanh networks after the last task; the lowest ranks are replaced")
        return figure

    def _activation_layers_figure(self, cells: Sequence[Cell]) -> Figure:
        settings: dict[str, dict[str, Interval]] = {}
        for cell in cells:
            settings.setdefault(cell.activation, {})[cell.mask_name] = _percent(self._results.of(cell).late)
        names = list(dict.fromkeys(name for found in settings.values() for name in found))
        figure = figures.new_figure(9, 6)
        axes = figure.subplots()
        series = {name: [found.get(name) for found in settings.values()] for name in names}
        figures.draw_dots(axes, list(settings), series)
        axes.legend(frameon=False, fontsize=9, title="resets", loc="center left", bbox_to_anchor=(1, 0.5))
        figures.finish_dots(axes, "Which layers, by adaptable_contribution", "online accuracy of the last fifth, %")
        figures.headline(figure, _described(self._results.of(cells[0]), network=True))
        return figure


# -- how cells are called --


def _setting(cell: Cell) -> tuple[object, ...]:
    """What remains of a cell when nothing is reset."""
    return (cell.stream, cell.hidden, cell.activation, cell.optimizer, cell.lr, cell.weight_decay)


def _network(cell: Cell) -> str:
    return f"{len(cell.hidden)} × {cell.hidden[0]}, lr {cell.lr:g}"


def _corner(cell: Cell) -> str:
    images = _IMAGES_SHOWN[str(cell.stream.images)]
    return f"{images}, {cell.stream.examples:,}, {cell.lr:g}, {len(cell.hidden)}"


def _variation(cell: Cell) -> str:
    if cell.hidden[0] != 100:
        return f"width {cell.hidden[0]}"
    if cell.replacement_rate != 1e-4:
        return f"ρ {cell.replacement_rate:g}"
    return f"{cell.utility}, compensation {'on' if cell.bias_compensation else 'off'}"


def _decay(cell: Cell) -> str:
    return f"{cell.weight_decay:g}" + (f", {cell.replacement_rate:g}" if cell.mask else "")


def _activation_and_rates(cell: Cell) -> str:
    return f"{_activation_and_utility(cell)}, {cell.lr:g}, {cell.replacement_rate:g}"


def _rate_and_threshold(cell: Cell) -> str:
    return f"{cell.replacement_rate:g}, {cell.maturity_threshold:,}"


def _activation_and_utility(cell: Cell) -> str:
    return f"{cell.activation}, {cell.utility}"


def _utility(cell: Cell) -> str:
    if not cell.mask:
        return "none"
    layers = "" if cell.mask_name == "all" else f", {cell.mask_name}"
    return f"{cell.utility}, {'on' if cell.bias_compensation else 'off'}{layers}"


def _method(cell: Cell) -> str:
    return f"{cell.mask_name}, {cell.replacement_rate:g}, {cell.utility}" if cell.mask else "none"


def _regression_column(cell: Cell) -> str:
    return f"{cell.activation}, {_SHIFTS_SHOWN[cell.stream.kind]}"


def _described(found: CellResults, *, network: bool = False) -> str:
    """The setting of a picture: images, tasks, seeds and network."""
    cell = found.cell
    seeds, tasks = found.metric.shape
    parts = [
        "regression" if cell.stream.images is None else f"{_IMAGES_SHOWN[cell.stream.images]} images",
        f"{cell.stream.examples:,} examples a task",
        f"{len(cell.hidden)} × {cell.hidden[0]}" + ("" if network else f" {cell.activation}"),
    ]
    return ", ".join([*parts, f"{tasks} tasks", f"{seeds} seeds"])


def _percent(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Interval:
    return interval(100 * values)


def _recovered(by_mask: Mapping[str, CellResults]) -> float:
    """Of what resets in all layers gain over none, the share that those in the first layer gain."""
    none, first, every = (float(np.nanmean(by_mask[name].late)) for name in ("none", "only first", "all"))
    return (first - none) / (every - none)


def _percent_difference(found: CellResults, other: CellResults) -> Interval:
    return paired_difference(100 * found.late, 100 * other.late)


def _ranks_within_layers(units: pa.Table, measure: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Each unit's rank among those of its layer, from 0 for the least to 1."""
    layers = np.stack([units[name].to_numpy() for name in ("seed", "layer")], axis=1)
    values = units[measure].to_numpy()
    ranks = np.empty(len(values))
    for layer in np.unique(layers, axis=0):
        members = np.flatnonzero((layers == layer).all(axis=1))
        ranks[members] = values[members].argsort().argsort() / max(1, len(members) - 1)
    return ranks


def write_figures(report: Report, directory: Path) -> list[Path]:
    """Writes every picture; where they are."""
    paths = []
    for name, figure in report.figures():
        path = directory / f"{name}.png"
        figures.save(figure, path)
        paths.append(path)
    return paths
