"""Single units of learners at the end of their runs: how saturated they are, and what each utility thinks of them.

Shapes: n probe examples, `units` of one hidden layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cbp import LearnerSnapshot
from experiments.archive import Archive, Run
from experiments.cells import Cell
from experiments.results import rows_of
from experiments.runner import hidden_activations, is_saturated

SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("seed", pa.int32()),
        ("layer", pa.int32()),
        ("unit", pa.int32()),
        ("age", pa.int64()),
        ("saturated", pa.float32()),
        ("w_in", pa.float32()),
        ("w_out", pa.float32()),
        ("contribution", pa.float32()),
        ("zero_contribution", pa.float32()),
        ("adaptable_contribution", pa.float32()),
    ]
)


def describe(cells: Sequence[Cell], archive: Archive, earlier: pa.Table | None = None) -> pa.Table:
    """A row for each hidden unit of each run that has reached the cell's last task; `saturated` is the share of the
    probe on which the unit is, utilities are means over the probe. Runs whose learner is gone are taken from `earlier`,
    such a table."""
    rows: list[dict[str, Any]] = []
    gone: list[Run] = []
    for run in (Run(cell, seed) for cell in cells for seed in range(cell.seeds)):
        snapshot = archive.learner(run)
        if snapshot is not None and archive.tasks_done(run) >= run.cell.tasks:
            rows += _units(run, snapshot)
        else:
            gone.append(run)
    described = pa.Table.from_pylist(rows, schema=SCHEMA)
    return described if earlier is None else pa.concat_tables([rows_of(earlier, gone), described])


def _units(run: Run, snapshot: LearnerSnapshot) -> list[dict[str, Any]]:
    spec = snapshot.read_spec()
    weights = [snapshot.tensors[f"parameters.{name}.weight"].abs().numpy() for name in spec.layer_names]
    ages = np.split(snapshot.tensors["units.age"].numpy().reshape(-1), np.cumsum(spec.mlp.hidden)[:-1])
    rows = []
    for layer, activations in enumerate(hidden_activations(snapshot)):
        into, out = weights[layer].mean(axis=1), weights[layer + 1].mean(axis=0)
        values = _utilities(activations, into, out) | {
            "age": ages[layer],
            "saturated": is_saturated(activations, spec.mlp.plain_activation).mean(axis=0),
            "w_in": into,
            "w_out": out,
        }
        for unit in range(len(into)):
            row = {name: column[unit].item() for name, column in values.items()}
            rows.append({"cell": run.cell.key, "seed": run.seed, "layer": layer, "unit": unit} | row)
    return rows


def _utilities(
    activations: NDArray[np.float32], into: NDArray[np.float32], out: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Of each unit [units], from activations [n, units] and its mean weights; the mean activation is the probe's."""
    varying = np.abs(activations - activations.mean(axis=0)).mean(axis=0)
    return {
        "contribution": out * np.abs(activations).mean(axis=0),
        "zero_contribution": out * varying,
        "adaptable_contribution": out * varying / into,
    }
