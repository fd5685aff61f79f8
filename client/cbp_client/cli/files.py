"""Examples from files: npz, csv and parquet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cbp_client.cli.session import CommandError
from cbp_client.cli.tables import Columns, read_table


@dataclass(frozen=True)
class Examples:
    """Features [N, …]; the others, if the file has them, with N rows as well."""

    features: NDArray[np.generic]
    targets: NDArray[np.generic] | None
    weights: NDArray[np.generic] | None
    tasks: NDArray[np.str_] | None

    def __len__(self) -> int:
        return len(self.features)

    def messages(self, size: int) -> Iterator[tuple[slice, str]]:
        """Rows and task label of each message: at most `size` rows of one task."""
        starts = [0]
        if self.tasks is not None:
            starts += (np.flatnonzero(self.tasks[1:] != self.tasks[:-1]) + 1).tolist()
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            task = "" if self.tasks is None else str(self.tasks[start])
            for first in range(start, end, size):
                yield slice(first, min(first + size, end)), task


def read_examples(
    path: Path, *, targets: Sequence[str] = (), task: str | None = None, ignore: Sequence[str] = ()
) -> Examples:
    """The examples of a file, all of them in memory.

    Args:
        path: .npz with the arrays features and perhaps targets, weights, tasks; .csv with a header; or .parquet.
        targets: csv and parquet: the columns with the targets. All other columns are features.
        task: csv and parquet: the column with the task labels.
        ignore: csv and parquet: columns to leave out.

    Raises:
        CommandError: the file can't be read, or holds something else; names the file and what to do.
    """
    columns = Columns(targets, task, ignore)
    match path.suffix.lower():
        case ".npz":
            arrays = _read_npz(path, columns)
        case ".csv" | ".parquet":
            arrays = read_table(path, columns)
        case suffix:
            raise CommandError(f"{path}: the name must end in .npz, .csv or .parquet, not {suffix or 'nothing'}")
    return _checked(path, arrays)


def _read_npz(path: Path, columns: Columns) -> dict[str, NDArray[np.generic]]:
    if columns.named:
        raise CommandError(f"{path}: an npz file has no columns to name, its arrays have fixed names")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "features" not in arrays:
                there = ", ".join(arrays.files) or "nothing"
                raise CommandError(f"{path} has no array named features, only {there}; rename or add it")
            return {name: arrays[name] for name in ("features", "targets", "weights", "tasks") if name in arrays}
    except CommandError:
        raise
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # numpy, zipfile and zlib have many for what is damaged or something else
        raise CommandError(
            f"{path} is not an npz file of numbers and texts: {error}; write it with "
            "numpy.savez(path, features=features, targets=targets)"
        ) from None


def _checked(path: Path, arrays: dict[str, NDArray[np.generic]]) -> Examples:
    for name, array in arrays.items():
        kinds = "biufUS" if name == "tasks" else "biuf"
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
            holds = getattr(array, "dtype", type(array).__name__)
            raise CommandError(f"{path}: {name} must hold numbers{' or texts' * (name == 'tasks')}, not {holds}")
        least, most = {"features": (2, None), "targets": (1, 2)}.get(name, (1, 1))
        if array.ndim < least or (most is not None and array.ndim > most):
            shape = {"features": "[N, …]", "targets": "[N] or [N, outputs]"}.get(name, "[N]")
            raise CommandError(f"{path}: {name} must be {shape}, with a row for each example, not {list(array.shape)}")
        if len(array) != len(arrays["features"]):
            raise CommandError(f"{path}: {len(array)} {name} for {len(arrays['features'])} rows of features")
    if not len(arrays["features"]):
        raise CommandError(f"{path} has no rows; give a file with examples")
    tasks = arrays.get("tasks")
    return Examples(
        features=arrays["features"],
        targets=arrays.get("targets"),
        weights=arrays.get("weights"),
        tasks=None if tasks is None else _labels(path, tasks),
    )


def _labels(path: Path, tasks: NDArray[np.generic]) -> NDArray[np.str_]:
    try:
        return tasks.astype(np.str_)
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: tasks are not ASCII bytes; store them as texts: {error}") from None
