"""What the documents report is what the results say, and the results are what the code computes."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.archive import Archive, Run
from experiments.findings import FINDINGS
from experiments.report import Report
from experiments.results import Results
from experiments.runner import execute, runs_of
from experiments.statistics import interval
from experiments.tables import fill

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
DOCUMENTS = [ROOT / "docs" / name for name in ("paper.md", "choosing-resets.md")]


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.read(RESULTS / "reported.parquet")


@pytest.fixture(scope="module")
def report(results: Results) -> Report:
    return Report(results, "reported", units=pq.read_table(RESULTS / "reported-units.parquet"))


def test_every_finding_has_results(results: Results) -> None:
    missing = [name for name, finding in FINDINGS.items() for cell in finding.cells("reported") if cell not in results]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_in_documents_are_those_of_the_results(document: Path, report: Report) -> None:
    text = document.read_text()
    assert text.count("<!-- table: ") > 1
    assert fill(text, report.tables()) == text


def test_every_picture_shown_can_be_drawn(report: Report) -> None:
    drawn = {name for name, _ in report.figures()}
    pictures = {path.stem for path in (ROOT / "docs" / "images" / "paper").glob("*.png")}
    of_service = {"service", "service_panels", "service_status", "service_learner"}
    assert drawn == pictures - of_service
    for picture in pictures:
        assert any(f"images/paper/{picture}.png" in document.read_text() for document in DOCUMENTS), picture


def test_results_are_small_enough_to_keep() -> None:
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 3_000_000


def test_a_cell_of_the_table_comes_out_again(results: Results, tmp_path: Path) -> None:
    """CBP in regression with one bit flipped; all of its runs, which take seconds."""
    [cell] = [
        cell
        for cell in FINDINGS["regression"].cells("reported")
        if cell.activation == "relu"
        and cell.mask
        and cell.utility == "contribution"
        and cell.replacement_rate == 1e-4
        and cell.stream.kind == "regression_one_flip"
    ]
    reported = results.of(cell)
    archive = Archive(tmp_path)
    assert execute(runs_of([cell]), archive)
    late = []
    for seed in range(cell.seeds):
        losses = [row.loss for row in archive.rows(Run(cell, seed))]
        # Other machines round otherwise, and after so many steps that tells; in the first task it does not.
        assert losses[0] == pytest.approx(reported.loss[seed, 0], rel=1e-3)
        late.append(sum(losses[-len(losses) // 5 :]) / (len(losses) // 5))
    assert interval(late).mean in interval(reported.late)
