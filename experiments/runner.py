"""Takes runs to their last task: many learners in one engine call, and from where an earlier invocation stopped."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cbp import Batch, DivergenceError, Learner, LearnerSnapshot, PlasticitySample, TrainResult, train_together
from cbp.activations import NONLINEARITIES
from experiments.archive import Archive, Run, TaskRow
from experiments.cells import Cell
from experiments.streams import Examples, Stream

STACK_SIZE = {"cpu": 16, "cuda": 256}
"""Learners that are trained together."""
_SAVE_SECONDS = 60.0
_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
_OUTER_SHARE = 0.05
"""Of a bounded activation's range, at either end."""


@dataclass
class Progress:
    """How far the runs are, and how fast they go."""

    total: float
    """Cost of everything, in multiply-adds or their like."""
    done_before: float
    """Cost of what earlier invocations did."""
    runs: int
    runs_done: int = 0
    done: float = 0.0
    """Cost of what this invocation has done."""
    steps: int = 0
    """Steps that it has taken."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def remaining_seconds(self) -> float | None:
        """Expected at the speed so far; None before the first task."""
        if not self.done:
            return None
        return (self.total - self.done_before - self.done) / self.done * self.seconds

    def __str__(self) -> str:
        share = (self.done_before + self.done) / self.total if self.total else 1.0
        rate = self.steps / self.seconds
        remaining = self.remaining_seconds
        rest = "" if remaining is None else f", about {remaining / 60:.1f} min left"
        return f"{self.runs_done}/{self.runs} runs, {share:.1%} of the work, {rate:,.0f} steps/s{rest}"


def runs_of(cells: Sequence[Cell]) -> list[Run]:
    """The runs of these cells, seed by seed; of cells that differ in length alone, the longest run."""
    longest: dict[tuple[str, int], Run] = {}
    for cell in cells:
        for seed in range(cell.seeds):
            known = longest.get((cell.key, seed))
            if known is None or known.cell.tasks < cell.tasks:
                longest[cell.key, seed] = Run(cell, seed)
    return sorted(longest.values(), key=lambda run: run.seed)


def step_cost(cell: Cell) -> float:
    """Rough cost of a step, for shares of the work: parameters, and what a step costs whatever its size."""
    return cell.parameter_count * (1.0 if cell.activation in ("relu", "leaky_relu") else 1.6) + 1_500


def execute(
    runs: Sequence[Run],
    archive: Archive,
    *,
    device: str = "cpu",
    stack_size: int | None = None,
    deadline: float | None = None,
    mnist: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> bool:
    """Takes the runs to their ends; True if all are there, False if `deadline` (of time.monotonic) came first.

    Raises `DataError` if there are no images for a stream.
    """
    done = {run: _tasks_done(run, archive) for run in runs}
    progress = Progress(
        total=sum(run.cell.steps * step_cost(run.cell) for run in runs),
        done_before=sum(done[run] * run.cell.stream.examples * step_cost(run.cell) for run in runs),
        runs=len(runs),
        runs_done=sum(done[run] == run.cell.tasks for run in runs),
    )
    for group in _groups(runs, done, stack_size or STACK_SIZE[torch.device(device).type]):
        if not _Group(group, archive, device, mnist).advance(deadline, progress, on_progress):
            return False
    on_progress(progress)
    return True


def _tasks_done(run: Run, archive: Archive) -> int:
    """As many as the run is to have, if it has ended: longer runs and diverged ones are complete."""
    rows = archive.rows(run)
    return run.cell.tasks if rows and rows[-1].loss is None else min(len(rows), run.cell.tasks)


def _groups(runs: Sequence[Run], done: dict[Run, int], size: int) -> Iterator[list[Run]]:
    """Runs that can share engine calls: those of one stream that have come equally far, in the order given."""
    waiting = [run for run in runs if done[run] < run.cell.tasks]
    while waiting:
        first = waiting[0]
        alike = [run for run in waiting if run.cell.stream == first.cell.stream and done[run] == done[first]][:size]
        yield alike
        taken = set(alike)
        waiting = [run for run in waiting if run not in taken]


class _Group:
    """Runs that go from task to task together."""

    def __init__(self, runs: Sequence[Run], archive: Archive, device: str, mnist: Path | None) -> None:
        self._archive = archive
        self._stream: Stream = runs[0].cell.stream
        self._mnist = mnist
        self._rows: dict[Run, list[TaskRow]] = {}
        self._learners: dict[Run, Learner] = {}
        for run in runs:
            snapshot = archive.learner(run)
            self._rows[run] = archive.rows(run)
            self._learners[run] = (
                Learner(run.cell.learner_spec(run.seed), device=device, engine="auto")
                if snapshot is None
                else Learner.restore(snapshot, device=device, engine="auto")
            )
        self._task = len(self._rows[runs[0]])
        self._going = list(runs)

    def advance(self, deadline: float | None, progress: Progress, on_progress: Callable[[Progress], None]) -> bool:
        """Until all are at their ends, or the deadline is past: then False. Saves at least every minute."""
        saved = time.monotonic()
        try:
            while self._going:
                if deadline is not None and time.monotonic() > deadline:
                    return False
                going = self._going
                self._next_task()
                for run in going:
                    progress.steps += self._stream.examples
                    progress.done += self._stream.examples * step_cost(run.cell)
                    progress.runs_done += run not in self._going
                on_progress(progress)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._save()
        return True

    def _next_task(self) -> None:
        going, number = self._going, self._task
        seeds = sorted({run.seed for run in going})
        examples = {seed: self._stream.task(seed, number, self._mnist) for seed in seeds}
        results = train_together([(self._learners[run], self._batch(run, examples[run.seed])) for run in going])
        with _one_torch_thread():
            for run, result in zip(going, results, strict=True):
                self._rows[run].append(self._row(run, result, number))
        self._task += 1
        self._going = [run for run in going if self._rows[run][-1].loss is not None and self._task < run.cell.tasks]

    def _batch(self, run: Run, examples: Examples) -> Batch:
        return Batch.validate(self._learners[run].spec, *examples)

    def _row(self, run: Run, result: TrainResult | DivergenceError, number: int) -> TaskRow:
        if isinstance(result, DivergenceError):
            return TaskRow(task=number, loss=None, accuracy=None)
        measures: dict[str, Any] = {}
        if number == 0 or (number + 1) % run.cell.sample_every == 0:
            measures = _measures(self._learners[run])
        return TaskRow(task=number, loss=result.loss, accuracy=result.accuracy, **measures)

    def _save(self) -> None:
        for run, rows in self._rows.items():
            diverged = bool(rows) and rows[-1].loss is None
            self._archive.save(run, rows, None if diverged else self._learners[run].snapshot())


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The engine's threads are worth having, but torch's own wait for each other longer than a sample takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measures(learner: Learner) -> dict[str, Any]:
    sample: PlasticitySample = learner.sample_plasticity()
    hidden = sample.layers[:-1]
    return {
        "mean_abs_weight": [layer.mean_abs_weight for layer in sample.layers],
        "dormant_fraction": [layer.dormant_fraction for layer in hidden],
        "dead_fraction": [layer.dead_fraction for layer in hidden],
        "effective_rank": [layer.effective_rank for layer in hidden],
        "saturated_fraction": saturated_fractions(learner.snapshot()),
        "replacements": [layer.replacements for layer in hidden],
    }


def hidden_activations(snapshot: LearnerSnapshot) -> list[NDArray[np.float32]]:
    """Activations [n, units] of each hidden layer on the learner's probe, its most recent examples."""
    spec = snapshot.read_spec()
    apply = NONLINEARITIES[spec.mlp.plain_activation].apply
    values = snapshot.tensors["probe.features"]
    activations = []
    for name in spec.layer_names[:-1]:
        weight, bias = (snapshot.tensors[f"parameters.{name}.{part}"] for part in ("weight", "bias"))
        values = apply(values @ weight.T + bias)
        activations.append(values.numpy())
    return activations


def is_saturated(activations: NDArray[np.float32], activation: str) -> NDArray[np.bool_]:
    """Which activations lie within 5 % of either end of their range: beyond ±0.9 for tanh."""
    low, high = _RANGES[activation]
    margin = _OUTER_SHARE * (high - low)
    return (activations < low + margin) | (activations > high - margin)


def saturated_fractions(snapshot: LearnerSnapshot) -> list[float | None] | None:
    """Share of each hidden layer's activations near the ends of their range; None where it has none."""
    activation = snapshot.read_spec().mlp.plain_activation
    if activation not in _RANGES:
        return None
    return [float(is_saturated(values, activation).mean()) for values in hidden_activations(snapshot)]
