"""Cells: masks, keys, and the learners that they stand for."""

from dataclasses import replace

import pytest

from experiments.cells import Cell, mask_name, masks
from experiments.findings import FINDINGS
from experiments.streams import Stream

CELL = Cell(stream=Stream(), mask=(0, 2), seeds=3, tasks=10)


def test_masks_are_those_of_the_thesis() -> None:
    assert masks(5) == {
        "all": (0, 1, 2, 3, 4),
        "none": (),
        "only first": (0,),
        "only second": (1,),
        "only third": (2,),
        "only fourth": (3,),
        "only fifth": (4,),
        "first two": (0, 1),
        "first three": (0, 1, 2),
        "all but first": (1, 2, 3, 4),
        "all but first two": (2, 3, 4),
        "all but first three": (3, 4),
        "alternating": (0, 2, 4),
    }


@pytest.mark.parametrize(
    ("mask", "depth", "name"),
    [((), 2, "none"), ((0, 1), 2, "all"), ((1,), 2, "only second"), ((0,), 1, "all"), ((1, 3), 5, "layers 2, 4")],
)
def test_a_mask_has_one_name(mask: tuple[int, ...], depth: int, name: str) -> None:
    assert mask_name(mask, depth) == name


def test_the_key_is_of_what_is_computed_not_of_how_much() -> None:
    assert replace(CELL, seeds=9, tasks=99).key == CELL.key
    others = [
        replace(CELL, stream=replace(CELL.stream, examples=5)),
        replace(CELL, stream=replace(CELL.stream, kind="permuted_labels")),
        replace(CELL, hidden=(100,) * 4),
        replace(CELL, activation="tanh"),
        replace(CELL, optimizer="adam"),
        replace(CELL, lr=0.1),
        replace(CELL, weight_decay=0.1),
        replace(CELL, mask=()),
        replace(CELL, utility="random"),
        replace(CELL, replacement_rate=0.1),
        replace(CELL, maturity_threshold=1),
        replace(CELL, bias_compensation=True),
    ]
    assert len({CELL.key, *(other.key for other in others)}) == len(others) + 1


def test_a_cell_is_its_plain_record() -> None:
    assert Cell.from_plain(CELL.to_plain()) == CELL


def test_the_learner_is_the_cells() -> None:
    spec = replace(CELL, activation="tanh", optimizer="adam", lr=0.02, weight_decay=0.5).learner_spec(seed=4)
    assert spec.network.hidden == (100,) * 5
    assert (spec.network.in_features, spec.network.out_features, spec.network.activation) == (784, 10, "tanh")
    assert (spec.optimizer.kind, spec.optimizer.lr, spec.optimizer.weight_decay) == ("adam", 0.02, 0.5)
    assert spec.replacement_rates == (1e-4, 0, 1e-4, 0, 0)
    assert (spec.batch_size, spec.seed, spec.resets.utility) == (1, 4, "contribution")
    assert not spec.resets.bias_compensation
    assert replace(CELL, mask=()).learner_spec(0).replacement_rates == (0,) * 5


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=lambda finding: finding.name)
def test_every_cell_of_every_finding_is_a_learner(finding) -> None:
    for protocol in ("quick", "reported", "full"):
        cells = finding.cells(protocol)
        assert len({cell.key for cell in cells}) == len(cells)
        for cell in cells:
            cell.learner_spec(0)
            assert cell.tasks >= 2
    assert (
        all(cell.stream.images != "digits_28x28" for cell in finding.cells("full", "mnist"))
        or finding.name == "decides"
    )
