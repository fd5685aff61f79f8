"""How long a protocol takes on this machine, from rates measured on it."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.archive import Archive, Run
from experiments.cells import Cell
from experiments.runner import STACK_SIZE, execute, runs_of

_MEASURED_STEPS = 10_000
"""Of each learner."""
_MEASURED_LEARNERS = {"cpu": 4, "cuda": STACK_SIZE["cuda"]}
"""On a CPU a few tell how fast many are; on a GPU they step together, and only as many as are run together tell."""


def planned(findings: Mapping[str, Sequence[Cell]], device: str, mnist: Path | None) -> tuple[list[list[str]], float]:
    """A row of finding, cells, runs, steps and expected hours for each, and the seconds of all together, where a run
    that several findings have in common counts once. Raises `DataError`."""
    seconds_per_step: dict[Any, float] = {}
    rows = []
    of_run: dict[tuple[str, int], float] = {}
    for name, cells in findings.items():
        runs = runs_of(cells)
        seconds = 0.0
        for run in runs:
            kind = _kind(run.cell)
            if kind not in seconds_per_step:
                alike = [other for other in runs if _kind(other.cell) == kind]
                seconds_per_step[kind] = _measure(alike, device, mnist)
            expected = run.cell.steps * seconds_per_step[kind]
            seconds += expected
            place = (run.cell.key, run.seed)
            of_run[place] = max(expected, of_run.get(place, 0.0))
        steps = sum(run.cell.steps for run in runs)
        rows.append([name, str(len(cells)), str(len(runs)), f"{steps:,}", f"{seconds / 3600:.2f}"])
    return rows, sum(of_run.values())


def _kind(cell: Cell) -> tuple[object, ...]:
    """What a step's time depends on."""
    return (cell.stream, cell.hidden, cell.activation, cell.optimizer, cell.weight_decay > 0)


def _measure(runs: Sequence[Run], device: str, mnist: Path | None) -> float:
    """Seconds that a step of one learner takes among others."""
    tasks = max(1, _MEASURED_STEPS // runs[0].cell.stream.examples)
    group = [
        Run(replace(run.cell, tasks=tasks), run.seed) for run in runs[: _MEASURED_LEARNERS[torch.device(device).type]]
    ]
    run_time = 0.0
    for _ in range(2):  # the first has the images to make, and on a GPU its graphs to capture
        with tempfile.TemporaryDirectory() as directory:
            started = time.monotonic()
            execute(group, Archive(Path(directory)), device=device, mnist=mnist)
            run_time = time.monotonic() - started
    return run_time / sum(run.cell.steps for run in group)
