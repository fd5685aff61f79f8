"""Runs on disk: the rows of each, and the learner to go on with. Every file appears whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cbp import LearnerSnapshot
from experiments.cells import Cell


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """What one run did in one task. Lists have an entry per layer, the output layer last where it has one; they are
    None for tasks without a plasticity sample. Samples are taken at the end of a task."""

    task: int
    """Counted from 0."""
    loss: float | None
    """Mean over the task's examples, each predicted before it was learnt; None if the learner diverged in this task,
    which is its last then."""
    accuracy: float | None
    """Likewise; None for regression."""
    mean_abs_weight: list[float | None] | None = None
    """Mean |w| of each linear layer."""
    dormant_fraction: list[float | None] | None = None
    """Share of a hidden layer's units with at most 0.025 of its mean activity (Sokar et al. 2023)."""
    dead_fraction: list[float | None] | None = None
    """Share of units that are 0 on the whole probe."""
    effective_rank: list[float | None] | None = None
    """Of a hidden layer's activations (Roy & Vetterli 2007)."""
    saturated_fraction: list[float | None] | None = None
    """Share of activations within 5 % of either end of the range of tanh or sigmoid; None for other activations."""
    replacements: list[int] | None = None
    """Units replaced so far."""


MEASURES = tuple(field.name for field in fields(TaskRow) if field.name not in ("task", "loss", "accuracy"))
ROW_SCHEMA = pa.schema(
    [
        ("task", pa.int32()),
        ("loss", pa.float64()),
        ("accuracy", pa.float64()),
        *((name, pa.list_(pa.int32() if name == "replacements" else pa.float32())) for name in MEASURES),
    ]
)


@dataclass(frozen=True)
class Run:
    """One learner of a cell, from birth to the cell's last task."""

    cell: Cell
    seed: int


class Archive:
    """A directory of runs. A run is found by what it computes, so results of another protocol are never mistaken for
    it, and a longer one goes on where a shorter one ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def rows(self, run: Run) -> list[TaskRow]:
        """Of the tasks done, as many as there are; none if it was never begun."""
        table = self.table(run)
        return [] if table is None else [TaskRow(**row) for row in table.to_pylist()]

    def table(self, run: Run) -> pa.Table | None:
        """The rows as they are stored, with `ROW_SCHEMA`; None if the run was never begun."""
        path = self._path(run, "parquet")
        return pq.read_table(path, schema=ROW_SCHEMA) if path.is_file() else None

    def tasks_done(self, run: Run) -> int:
        path = self._path(run, "parquet")
        return int(pq.read_metadata(path).num_rows) if path.is_file() else 0

    def learner(self, run: Run) -> LearnerSnapshot | None:
        """The run's learner after the tasks done; None if it was never begun, or has diverged."""
        path = self._learner_path(run, self.tasks_done(run))
        return LearnerSnapshot.from_bytes(path.read_bytes()) if path.is_file() else None

    def save(self, run: Run, rows: Sequence[TaskRow], learner: LearnerSnapshot | None) -> None:
        """The rows come last, for they say which of the learners on disk is the run's."""
        before = self.tasks_done(run)
        if learner is not None:
            _write_whole(self._learner_path(run, len(rows)), learner.to_bytes())
        table = pa.Table.from_pylist([vars(row) for row in rows], schema=ROW_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        _write_whole(self._path(run, "parquet"), sink.getvalue())
        if before != len(rows):
            self._learner_path(run, before).unlink(missing_ok=True)

    def _learner_path(self, run: Run, tasks: int) -> Path:
        return self._path(run, f"after-{tasks}.snapshot")

    def _path(self, run: Run, suffix: str) -> Path:
        return self._directory / run.cell.key / f"seed-{run.seed}.{suffix}"


def _write_whole(path: Path, content: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
