"""Examples from files: npz, csv and parquet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cbp_client.cli.session import CommandError


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


@dataclass(frozen=True)
class _Columns:
    """What the columns of a csv or parquet file are, other than features."""

    targets: Sequence[str]
    task: str | None
    ignore: Sequence[str]

    @property
    def named(self) -> list[str]:
        return [*self.targets, *self.ignore, *([self.task] if self.task else [])]


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
        CommandError: the file can't be read, or holds something else.
    """
    readers = {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CommandError(f"{path}: the name must end in {', '.join(readers)}")
    try:
        examples = reader(path, _Columns(targets, task, ignore))
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    for name in ("targets", "weights", "tasks"):
        array = getattr(examples, name)
        if array is not None and len(array) != len(examples):
            raise CommandError(f"{path}: {len(array)} {name} for {len(examples)} rows of features")
    return examples


def _read_npz(path: Path, columns: _Columns) -> Examples:
    if columns.named:
        raise CommandError(f"{path}: an npz file has no columns to name, its arrays have fixed names")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "features" not in arrays:
                raise CommandError(f"{path} has no array named features, only {', '.join(arrays.files)}")
            found = {name: arrays[name] for name in ("features", "targets", "weights", "tasks") if name in arrays}
    except (ValueError, BadZipFile) as error:
        raise CommandError(f"{path} is not an npz file of numbers and texts: {error}") from None
    tasks = found.get("tasks")
    return Examples(
        features=found["features"],
        targets=found.get("targets"),
        weights=found.get("weights"),
        tasks=None if tasks is None else tasks.astype(np.str_),
    )


def _read_csv(path: Path, columns: _Columns) -> Examples:
    _require_pyarrow(path)
    import pyarrow
    from pyarrow import csv

    try:
        return _from_table(path, csv.read_csv(path), columns)
    except pyarrow.ArrowInvalid as error:
        raise CommandError(f"{path}: {error}") from None


def _read_parquet(path: Path, columns: _Columns) -> Examples:
    _require_pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        return _from_table(path, parquet.read_table(path), columns)
    except pyarrow.ArrowInvalid as error:
        raise CommandError(f"{path}: {error}") from None


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise CommandError(
            f"reading {path.suffix} files needs pyarrow: pip install 'cbp-client[files]', or convert the file to .npz"
        ) from None


def _from_table(path: Path, table: Any, columns: _Columns) -> Examples:
    for name in columns.named:
        if name not in table.column_names:
            raise CommandError(f"{path} has no column {name}; there are {', '.join(table.column_names)}")
    features = [_column(path, table, name) for name in table.column_names if name not in columns.named]
    if not features:
        raise CommandError(f"{path} has no columns left for features")
    targets = [_column(path, table, name) for name in columns.targets]
    tasks = None if columns.task is None else [str(label) for label in table[columns.task].to_pylist()]
    return Examples(
        features=np.stack(features, axis=1),
        targets=None if not targets else targets[0] if len(targets) == 1 else np.stack(targets, axis=1),
        weights=None,
        tasks=None if tasks is None else np.array(tasks, dtype=np.str_),
    )


def _column(path: Path, table: Any, name: str) -> NDArray[np.generic]:
    column = table[name]
    if column.null_count:
        raise CommandError(f"{path}: column {name} has {column.null_count} empty values")
    array: NDArray[np.generic] = column.to_numpy()
    if array.dtype.kind not in "biuf":
        raise CommandError(f"{path}: column {name} holds {column.type}, not numbers; leave it out or encode it")
    return array
