"""Results of many cells as one tidy table, a row for each cell, seed and task, and back into arrays.

Shapes: S seeds, T tasks, K tasks with a plasticity sample, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from experiments.archive import MEASURES, ROW_SCHEMA, Archive, Run
from experiments.cells import Cell
from experiments.runner import runs_of

LATE_SHARE = 0.2
"""The last fifth of a run's tasks is what its score is the mean of; the first fifth is called early."""
_DECIMALS = 4


class MissingResultsError(Exception):
    """A cell of which no run has got as far as it should."""


def collect(cells: Sequence[Cell], archive: Archive, earlier: pa.Table | None = None) -> pa.Table:
    """The tidy table of all runs, as far as they have come: the cell's settings, seed, task, and what `TaskRow` has.

    Numbers are rounded to four decimals, and classification goes without its loss, to keep the file small. Of runs that
    `earlier`, such a table, has to their ends, its rows are taken over. Raises `MissingResultsError` if there is none.
    """
    runs = runs_of(cells)
    known = None if earlier is None else Results(earlier)
    kept = [] if known is None else [run for run in runs if known.has_run(run)]
    tables = [] if earlier is None or not kept else [rows_of(earlier, kept)]
    taken = set(kept)
    for run in runs:
        rows = None if run in taken else archive.table(run)
        if rows is None:
            continue
        rows = rows.slice(0, run.cell.tasks)
        settings = {"cell": run.cell.key} | run.cell.to_plain()
        del settings["seeds"], settings["tasks"]
        for name, value in reversed(settings.items()):
            shown = _shown(value)
            column = pa.array([shown] * len(rows)).dictionary_encode() if isinstance(shown, str) else None
            rows = rows.add_column(0, name, column if column is not None else pa.array([shown] * len(rows)))
        rows = rows.add_column(len(settings), "seed", pa.array([run.seed] * len(rows), pa.int32()))
        tables.append(_thinned(rows, run.cell))
    if not tables:
        raise MissingResultsError("There is no run; run the experiments first")
    return pa.concat_tables(tables).unify_dictionaries()


def rows_of(table: pa.Table, runs: Sequence[Run]) -> pa.Table:
    """Of a table with columns `cell` and `seed`, the rows of these runs."""
    wanted = {(run.cell.key, run.seed) for run in runs}
    places = zip(table["cell"].cast(pa.string()).to_pylist(), table["seed"].to_pylist(), strict=True)
    return table.filter(pa.array([place in wanted for place in places], pa.bool_()))


def _shown(value: Any) -> Any:
    """A list as text, and None as empty text, so that every column is of one type and can be grouped by."""
    if isinstance(value, list):
        return "-".join(str(entry) for entry in value)
    return "" if value is None else value


def _thinned(rows: pa.Table, cell: Cell) -> pa.Table:
    for name in ("loss", "accuracy"):
        place = rows.schema.get_field_index(name)
        values = rows[name].cast(pa.float32())
        if name == "loss":
            values = _rounded(values) if cell.stream.is_regression else pa.nulls(len(rows), pa.float32())
        rows = rows.set_column(place, name, values)
    for name in MEASURES:
        if name == "replacements":
            continue
        column = rows[name].combine_chunks()
        values = pa.ListArray.from_arrays(column.offsets, _rounded(column.values), mask=column.is_null())
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    return rows


def _rounded(values: Any) -> Any:
    """Of which compression makes less."""
    return pc.round(values, ndigits=_DECIMALS) if len(values) else values


def write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19)


@dataclass(frozen=True, eq=False)
class CellResults:
    """What the runs of one cell did."""

    cell: Cell
    accuracy: NDArray[np.float64]
    """[S, T]; NaN for regression, and from where a run diverged."""
    loss: NDArray[np.float64]
    """[S, T]; NaN for classification."""
    sampled: NDArray[np.int64]
    """[K] tasks, counted from 1, at whose ends plasticity was measured."""
    measures: Mapping[str, NDArray[np.float64]]
    """By name [S, K, L]; NaN where a measure does not apply."""

    @property
    def metric(self) -> NDArray[np.float64]:
        """[S, T] accuracies, or for regression losses."""
        return self.loss if self.cell.stream.is_regression else self.accuracy

    @property
    def _share(self) -> int:
        return max(1, round(LATE_SHARE * int(self.metric.shape[1])))

    @cached_property
    def late(self) -> NDArray[np.float64]:
        """[S] mean metric of the last fifth of the tasks; NaN if the run diverged."""
        late: NDArray[np.float64] = self.metric[:, -self._share :].mean(axis=1)
        return late

    @cached_property
    def early(self) -> NDArray[np.float64]:
        """[S] mean metric of the first fifth of the tasks."""
        early: NDArray[np.float64] = self.metric[:, : self._share].mean(axis=1)
        return early


class Results:
    """All results of a table, by cell."""

    def __init__(self, table: pa.Table) -> None:
        self._of_cell: dict[str, pa.Table] = {}
        self._found: dict[Cell, CellResults] = {}
        keys = table["cell"].cast(pa.string()).to_numpy(zero_copy_only=False)
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(str(key), []).append(place)
        for key, rows in places.items():
            self._of_cell[key] = table.select(["seed", *ROW_SCHEMA.names]).take(pa.array(rows))

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(pq.read_table(path))

    def __contains__(self, cell: Cell) -> bool:
        return bool(self._complete(cell))

    def has_run(self, run: Run) -> bool:
        """Whether the run is there to the cell's last task, or to where it diverged."""
        return run.seed in self._complete(run.cell)

    def _complete(self, cell: Cell) -> list[int]:
        """Seeds of the cell's runs that went to its last task, or diverged."""
        table = self._of_cell.get(cell.key)
        if table is None:
            return []
        seeds, tasks = table["seed"].to_numpy(), table["task"].to_numpy()
        ended = (tasks == cell.tasks - 1) | (
            pc.is_null(table["loss"]).to_numpy() & pc.is_null(table["accuracy"]).to_numpy()
        )
        return sorted({int(seed) for seed in seeds[ended & (seeds < cell.seeds)]})

    def of(self, cell: Cell) -> CellResults:
        """The cell's runs that are complete. Raises `MissingResultsError` if there are none."""
        if cell not in self._found:
            self._found[cell] = self._read(cell)
        return self._found[cell]

    def _read(self, cell: Cell) -> CellResults:
        seeds = self._complete(cell)
        if not seeds:
            raise MissingResultsError(f"There are no results of {cell}; run the experiments first")
        runs: dict[int, list[dict[str, Any]]] = {seed: [] for seed in seeds}
        for row in self._of_cell[cell.key].to_pylist():
            if row["seed"] in runs and row["task"] < cell.tasks:
                runs[row["seed"]].append(row)
        shape = (len(runs), cell.tasks)
        accuracy, loss = np.full(shape, np.nan), np.full(shape, np.nan)
        sampled = sorted({row["task"] for rows in runs.values() for row in rows if row["mean_abs_weight"] is not None})
        moments = {task: place for place, task in enumerate(sampled)}
        measures = {name: np.full((len(runs), len(sampled), len(cell.hidden) + 1), np.nan) for name in MEASURES}
        for place, rows in enumerate(runs.values()):
            for row in rows:
                accuracy[place, row["task"]] = _number(row["accuracy"])
                loss[place, row["task"]] = _number(row["loss"])
                for name, array in measures.items():
                    if row[name] is not None:
                        values = [_number(value) for value in row[name]]
                        array[place, moments[row["task"]], : len(values)] = values
        return CellResults(cell, accuracy, loss, np.array(sampled, np.int64) + 1, measures)


def _number(value: float | None) -> float:
    return np.nan if value is None else value
