"""The comparison of methods: what the document reports is what was run."""

from pathlib import Path

import numpy as np
import pytest

from experiments import methods
from experiments.methods import CONTENDERS, RESULTS, SEEDS, Outcome, Run, accuracies, append, execute, live, read
from experiments.tables import fill


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return list(read(RESULTS / "methods.jsonl").values())


def test_tables_in_the_document_are_those_of_the_results(outcomes: list[Outcome]) -> None:
    text = methods.DOCUMENT.read_text(encoding="utf-8")
    searched = list(read(RESULTS / "methods-search.jsonl").values())
    tables = {"methods": methods.table(outcomes), "methods_search": methods.search_table(searched)}
    assert fill(text, tables) == text
    assert "](images/methods.png)" in text
    assert (methods.DOCUMENT.parent / "images" / "methods.png").is_file()


def test_every_run_has_a_result(outcomes: list[Outcome]) -> None:
    assert {run.key for run in methods.compared()} == {outcome.run.key for outcome in outcomes}
    searched = read(RESULTS / "methods-search.jsonl")
    assert {run.key for run in methods.searched()} == searched.keys()


def test_every_method_is_drawn(outcomes: list[Outcome]) -> None:
    [axes] = methods.picture(outcomes).axes
    assert {label.get_text() for label in axes.get_yticklabels()} == set(CONTENDERS)


def test_chosen_settings_are_the_best_that_the_search_found() -> None:
    for name, contender in CONTENDERS.items():
        scores = {}
        for outcome in read(RESULTS / "methods-search.jsonl").values():
            if outcome.run.contender == name:
                scores.setdefault(str(dict(outcome.run.settings)), []).append(
                    np.nan_to_num(outcome.accuracy[-methods.QUARTER :]).mean()
                )
        if scores:
            best = max(scores, key=lambda settings: np.mean(scores[settings]))
            assert best == str(dict(contender.grid[0])), name


@pytest.mark.parametrize("name", ["backprop", "CBP + L2 Init", "UPGD", "CReLU at 0.03"])
def test_a_life_begins_as_it_is_reported(name: str, outcomes: list[Outcome]) -> None:
    """Rounding differs between machines, so not for long, and not to the last digit."""
    again = live(Run(contender=name, settings=CONTENDERS[name].grid[0], seed=SEEDS[0], tasks=1))
    assert again.accuracy[0] == pytest.approx(accuracies(outcomes, name)[0, 0], abs=0.03)


def test_what_is_missing_is_run_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "methods.jsonl"
    known, missing = (Run(contender="backprop", settings={}, seed=seed, tasks=1) for seed in (0, 1))
    append(path, Outcome(run=known, accuracy=(float("nan"),), step_seconds=0.5))
    assert not execute([known, missing], path, processes=1, minutes=0)
    assert execute([known, missing], path, processes=1, minutes=None)
    found = read(path)
    assert list(found) == [known.key, missing.key]
    assert np.isnan(found[known.key].accuracy[0])
    assert found[missing.key].accuracy[0] > 0.1
