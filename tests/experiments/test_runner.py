"""Runs: test-then-train accuracy, resumption, and company that changes nothing."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cbp import Batch, Learner
from experiments.archive import Archive, Run, TaskRow
from experiments.cells import Cell
from experiments.runner import Progress, execute, is_saturated, runs_of
from experiments.streams import Stream

STREAM = Stream(kind="permuted_inputs", images="digits_8x8", examples=150)
CELL = Cell(stream=STREAM, hidden=(16, 16), lr=0.02, mask=(0, 1), replacement_rate=1e-2, seeds=2, tasks=5)
TANH = replace(CELL, activation="tanh", mask=())


def rows_of(archive: Archive, cells: list[Cell]) -> list[list[TaskRow]]:
    return [archive.rows(run) for run in runs_of(cells)]


def test_accuracy_is_of_predictions_made_before_the_update(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    cell = replace(CELL, seeds=1, tasks=2)
    assert execute(runs_of([cell]), archive)
    learner = Learner(cell.learner_spec(0), engine="compiled")
    for row in archive.rows(Run(cell, 0)):
        features, labels = STREAM.task(0, row.task)
        hits = []
        for feature, label in zip(features, labels, strict=True):
            hits.append(learner.predict(feature[np.newaxis]).argmax() == label)
            learner.train(Batch.validate(learner.spec, feature[np.newaxis], np.array([label])))
        assert row.accuracy == pytest.approx(np.mean(hits))


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, cut = Archive(tmp_path / "whole"), Archive(tmp_path / "cut")
    cells = [CELL, TANH]
    assert execute(runs_of(cells), whole)
    interruptions = 0
    while True:
        try:
            execute(runs_of(cells), cut, on_progress=interrupt, stack_size=3)
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions == 2 * CELL.tasks  # groups of three runs and of one
    assert rows_of(cut, cells) == rows_of(whole, cells)


def interrupt(progress: Progress) -> None:
    """After every task, as Ctrl-C does."""
    if progress.steps:
        raise KeyboardInterrupt


def test_a_deadline_ends_a_piece(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    assert not execute(runs_of([CELL]), archive, deadline=time.monotonic())
    assert rows_of(archive, [CELL]) == [[], []]
    assert execute(runs_of([CELL]), archive, deadline=time.monotonic() + 60)


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path: Path) -> None:
    archive, whole = Archive(tmp_path / "a"), Archive(tmp_path / "b")
    longer = replace(CELL, tasks=7)
    execute(runs_of([CELL]), archive)
    short = rows_of(archive, [CELL])
    execute(runs_of([longer]), archive)
    execute(runs_of([longer]), whole)
    assert [rows[:5] for rows in rows_of(archive, [longer])] == short
    assert rows_of(archive, [longer]) == rows_of(whole, [longer])


def test_company_changes_nothing(tmp_path: Path) -> None:
    alone, together = Archive(tmp_path / "alone"), Archive(tmp_path / "together")
    cells = [CELL, TANH, replace(CELL, mask=(0,))]
    execute(runs_of(cells), alone, stack_size=1)
    execute(runs_of(cells), together)
    assert rows_of(alone, cells) == rows_of(together, cells)


def test_another_protocol_is_another_run(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    execute(runs_of([CELL]), archive)
    other = replace(CELL, lr=0.03)
    assert archive.rows(Run(other, 0)) == []
    execute(runs_of([other]), archive)
    assert rows_of(archive, [other]) != rows_of(archive, [CELL])


def test_what_is_measured(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    cells = [
        replace(CELL, stream=replace(STREAM, examples=10_000), seeds=1, tasks=2, activation=a) for a in ("relu", "tanh")
    ]
    execute(runs_of(cells), archive)
    (relu, tanh) = (archive.rows(Run(cell, 0)) for cell in cells)
    assert len(relu[-1].mean_abs_weight or []) == 3
    assert len(relu[-1].dormant_fraction or []) == len(relu[-1].effective_rank or []) == 2
    assert relu[-1].replacements is not None
    assert all(count > 1000 for count in relu[-1].replacements)
    assert relu[-1].saturated_fraction is None
    assert tanh[-1].saturated_fraction is not None
    assert all(0 < (share or 0) < 1 for share in tanh[-1].saturated_fraction)


def test_saturation_is_within_five_per_cent_of_either_end() -> None:
    assert is_saturated(np.array([-0.91, -0.89, 0.0, 0.89, 0.91], np.float32), "tanh").tolist() == [1, 0, 0, 0, 1]
    assert is_saturated(np.array([0.04, 0.06, 0.94, 0.96], np.float32), "sigmoid").tolist() == [1, 0, 0, 1]


def test_a_run_that_diverges_ends_there(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    cells = [replace(CELL, lr=1e30, seeds=1), replace(CELL, seeds=1)]
    assert execute(runs_of(cells), archive)
    diverged, sound = (archive.rows(Run(cell, 0)) for cell in cells)
    assert len(diverged) < 5
    assert diverged[-1].loss is None
    assert len(sound) == 5
    assert execute(runs_of(cells), archive)  # it is not tried again
    assert archive.rows(Run(cells[0], 0)) == diverged


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_to_rounding(tmp_path: Path) -> None:
    here, there = Archive(tmp_path / "cpu"), Archive(tmp_path / "cuda")
    cells = [replace(CELL, tasks=1), replace(TANH, tasks=1)]
    execute(runs_of(cells), here)
    execute(runs_of(cells), there, device="cuda")
    for [one], [other] in zip(rows_of(here, cells), rows_of(there, cells), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
        assert other.mean_abs_weight == pytest.approx(one.mean_abs_weight, rel=1e-3)


def test_progress_tells_how_much_is_left(tmp_path: Path) -> None:
    told: list[tuple[str, float | None]] = []
    execute(runs_of([CELL]), Archive(tmp_path), on_progress=lambda one: told.append((str(one), one.remaining_seconds)))
    assert told[0][0].startswith("0/2 runs, 20.0% of the work")
    assert told[-1][0].startswith("2/2 runs, 100.0% of the work")
    assert told[-1][1] == 0
