"""From runs to a tidy table and back, and to tables in documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from experiments import tables
from experiments.archive import Archive, Run, TaskRow
from experiments.cells import Cell
from experiments.results import MissingResultsError, Results, collect, write
from experiments.statistics import Interval, interval
from experiments.streams import Stream

CELL = Cell(
    stream=Stream(images="digits_8x8", examples=20), hidden=(4, 3), mask=(0, 1), replacement_rate=0.5, seeds=2, tasks=10
)


def row(task: int, accuracy: float | None) -> TaskRow:
    return TaskRow(
        task=task,
        loss=None if accuracy is None else 1.0,
        accuracy=accuracy,
        mean_abs_weight=None if task % 3 else [0.1 + task, 0.2, 0.33339],
        dormant_fraction=None if task % 3 else [0.25, None],
        replacements=None if task % 3 else [task, 2 * task],
    )


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    archive = Archive(tmp_path / "runs")
    none = replace(CELL, mask=())
    for seed in range(3):
        archive.save(Run(CELL, seed), [row(task, 0.1 * task + seed / 100) for task in range(10)], None)
        archive.save(Run(none, seed), [row(task, 0.05 * task) for task in range(10)], None)
    return archive


def test_a_table_gives_back_the_runs(archive: Archive, tmp_path: Path) -> None:
    write(collect([CELL], archive), tmp_path / "results.parquet")
    found = Results.read(tmp_path / "results.parquet").of(CELL)
    expected = 0.1 * np.arange(10) + np.array([[0.0], [0.01]])
    np.testing.assert_allclose(found.accuracy, expected, rtol=1e-6)
    np.testing.assert_allclose(found.late, expected[:, 8:].mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.early, expected[:, :2].mean(axis=1), rtol=1e-6)
    assert found.sampled.tolist() == [1, 4, 7, 10]
    np.testing.assert_allclose(found.measures["mean_abs_weight"][1, 2], [6.1, 0.2, 0.3334], rtol=1e-6)
    assert found.measures["replacements"][0, 3, :2].tolist() == [9, 18]
    assert np.isnan(found.measures["dormant_fraction"][0, 0]).tolist() == [False, True, True]
    assert tables.weight_growth(found, 0) == pytest.approx([91, 91], rel=1e-5)


def test_every_row_tells_its_setting(archive: Archive) -> None:
    table = collect([CELL], archive)
    [first, *_] = table.to_pylist()
    setting = {"stream": "permuted_inputs", "images": "digits_8x8", "hidden": "4-3", "mask": "0-1", "lr": 0.005}
    assert {name: first[name] for name in setting} == setting
    assert table.schema.field("cell").type == pa.dictionary(pa.int32(), pa.string())


def test_fewer_seeds_and_tasks_than_there_are(archive: Archive) -> None:
    longest = Results(collect([CELL, replace(CELL, seeds=3)], archive))
    assert longest.of(replace(CELL, tasks=4)).accuracy.shape == (2, 4)
    assert longest.of(replace(CELL, seeds=3)).accuracy.shape == (3, 10)


def test_runs_that_are_not_complete_are_left_out(archive: Archive) -> None:
    archive.save(Run(CELL, 1), [row(task, 0.5) for task in range(9)], None)
    results = Results(collect([CELL], archive))
    assert results.of(CELL).accuracy.shape == (1, 10)
    assert results.of(replace(CELL, tasks=9)).accuracy.shape == (2, 9)
    longer = replace(CELL, tasks=11)
    assert longer not in results
    with pytest.raises(MissingResultsError, match="run the experiments first"):
        results.of(longer)


def test_a_diverged_run_is_a_result_without_a_score(archive: Archive) -> None:
    archive.save(Run(CELL, 1), [row(0, 0.5), row(1, None)], None)
    found = Results(collect([CELL], archive)).of(CELL)
    assert interval(found.late).count == 1
    assert np.isnan(found.late).tolist() == [False, True]


def test_nothing_to_collect(tmp_path: Path) -> None:
    with pytest.raises(MissingResultsError):
        collect([CELL], Archive(tmp_path))


def test_masks_are_compared_in_pairs(archive: Archive) -> None:
    cells = [CELL, replace(CELL, mask=())]
    text = tables.of_masks(cells, Results(collect(cells, archive)))
    # The last fifth is two tasks: 0.85 with 0 or 0.01 more by seed, against 0.425.
    assert "| all | 0.055 ± 0.064 | 0.855 ± 0.064 | +0.430 ± 0.064 | – |" in text
    assert "| none | 0.025 ± 0.000 | 0.425 ± 0.000 | – | -0.430 ± 0.064 |" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Interval(0.5, 0.25, 3), "0.500 ± 0.250"),
        (Interval(0.5, float("nan"), 1), "0.500"),
        (Interval(float("nan"), float("nan"), 0), "diverged"),
    ],
)
def test_intervals_are_shown(value: Interval, shown: str) -> None:
    assert tables.show(value) == shown


def test_tables_find_their_places_in_a_document() -> None:
    document = "a\n<!-- table: one -->\nold\n\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\n"
    filled = tables.fill(document, {"one": "1\n", "two": "2\n"})
    assert filled == "a\n<!-- table: one -->\n1\n<!-- end -->\nb\n<!-- table: two -->\n2\n<!-- end -->\n"
    assert tables.fill(filled, {"one": "1\n", "two": "2\n"}) == filled
    with pytest.raises(MissingResultsError, match="no table 'two'"):
        tables.fill(document, {"one": "1\n"})
