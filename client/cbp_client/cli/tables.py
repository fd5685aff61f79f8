"""Arrays from tables, csv and parquet, whose columns are features unless they are named as something else."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbp_client.cli.session import CommandError
from cbp_proto.plain import shown

_FIXES = {
    ".csv": "it must be UTF-8 text, not compressed, with a header and as many cells in each row",
    ".parquet": "write it anew, such as with pyarrow.parquet.write_table",
}


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are, other than features."""

    targets: Sequence[str]
    task: str | None
    ignore: Sequence[str]

    @property
    def named(self) -> list[str]:
        """All columns that are no features."""
        return [*self.targets, *self.ignore, *([self.task] if self.task else [])]


def read_table(path: Path, columns: Columns) -> dict[str, NDArray[np.generic]]:
    """Features [N, columns] and, if columns are named for them, targets [N] or [N, outputs] and tasks [N].

    Raises:
        CommandError: the file can't be read, or holds something else.
    """
    table, names = _load(path)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CommandError(f"{path} has several columns named {', '.join(twice)}; rename all but one of each")
    for name in columns.named:
        if name not in names:
            raise CommandError(f"{path} has no column {name}; there are {', '.join(names)}")
    features = [name for name in names if name not in columns.named]
    if not features:
        raise CommandError(f"{path} has no columns left for features; name fewer of {', '.join(names)}")
    if not table.num_rows:
        raise CommandError(f"{path} has no rows; give a file with examples")
    arrays = {"features": np.stack([_numbers(path, name, table[name]) for name in features], axis=1)}
    if columns.targets:
        targets = [_numbers(path, name, table[name]) for name in columns.targets]
        arrays["targets"] = targets[0] if len(targets) == 1 else np.stack(targets, axis=1)
    if columns.task is not None:
        arrays["tasks"] = np.array(_labels(path, columns.task, table[columns.task]), dtype=np.str_)
    return arrays


def _load(path: Path) -> tuple[Any, list[str]]:
    try:
        from pyarrow import csv, parquet
    except ImportError:
        raise CommandError(
            f"reading {path.suffix} files needs pyarrow: pip install 'cbp-client[files]', or convert {path} to .npz"
        ) from None
    read = csv.read_csv if path.suffix.lower() == ".csv" else parquet.read_table
    try:
        table = read(path)
        return table, list(table.column_names)
    except UnicodeDecodeError:
        raise CommandError(
            f"{path}: its header is not UTF-8; convert it, such as with iconv -f LATIN1 -t UTF-8"
        ) from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}; {_FIXES[path.suffix.lower()]}") from None
    except Exception as error:  # pyarrow has many for what is damaged or something else
        raise CommandError(f"{path} can't be read: {error}; {_FIXES[path.suffix.lower()]}") from None


def _numbers(path: Path, name: str, column: Any) -> NDArray[np.generic]:
    _check_complete(path, name, column)
    array: NDArray[np.generic] = column.to_numpy()
    if array.dtype.kind in "biuf":
        return array
    row, value = next(((row, value) for row, value in enumerate(array, 1) if not _is_number(value)), (1, array[0]))
    raise CommandError(
        f"{path}: column {name} holds {column.type}, not numbers: {_text(value)} in row {row}; leave the column out or "
        "make numbers of it"
    )


def _labels(path: Path, name: str, column: Any) -> list[str]:
    _check_complete(path, name, column)
    labels = []
    for row, value in enumerate(column.to_pylist(), 1):
        try:
            labels.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError:
            raise CommandError(f"{path}: column {name}, row {row}: {_text(value)} is not UTF-8; convert it") from None
    return labels


def _check_complete(path: Path, name: str, column: Any) -> None:
    if column.null_count:
        row = column.is_null().index(True).as_py() + 1
        raise CommandError(
            f"{path}: column {name} has {column.null_count} empty values, the first in row {row}; fill them, or leave "
            "the column or those rows out"
        )


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]  # whatever the column holds
    except (TypeError, ValueError):
        return False
    return True


def _text(value: object) -> str:
    return shown(value if isinstance(value, str | bytes) else str(value))
