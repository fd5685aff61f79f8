"""Files that a command cannot use: one line on standard error, which names the file and what to do."""

import gzip
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from tests.client.command import Run, command

_TRAIN = ("train", "--learner", "any", "--producer", "any")
_TABLE = (*_TRAIN, "--target", "y")
Make: TypeAlias = Callable[[Path], Any]


@pytest.fixture
def cbp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `cbp`; there is no server, since no command comes that far."""
    return command("127.0.0.1:1", monkeypatch, capfd)


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def npz(cut: slice = slice(None), **arrays: Any) -> Make:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return content(buffer.getvalue()[cut])


def damaged_npz(path: Path) -> None:
    npz(features=np.random.default_rng(0).normal(size=(64, 4)))(path)
    data = bytearray(path.read_bytes())
    data[200:600] = bytes(400)
    path.write_bytes(data)


def npy(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 2)))
    path.write_bytes(buffer.getvalue())


def parquet(cut: slice = slice(None), **columns: Any) -> Make:
    def make(path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        path.write_bytes(path.read_bytes()[cut])

    return make


def zipped(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features", b"no array")


FEATURES = np.zeros((3, 4))
_FILES: dict[str, tuple[str, tuple[str, ...], Make, str]] = {
    "missing": ("x.npz", _TRAIN, lambda _: None, "No such file"),
    "a folder": ("x.npz", _TRAIN, Path.mkdir, "Is a directory"),
    "without a suffix": ("examples", _TRAIN, content(b""), "the name must end in"),
    "jsonl": ("x.jsonl", _TRAIN, content(b'{"a": 1}'), r"the name must end in .*, not \.jsonl"),
    "compressed": ("x.csv.gz", _TRAIN, content(gzip.compress(b"a,y\n1,2\n", mtime=0)), r"must end in .*, not \.gz"),
    "npz, empty": ("x.npz", _TRAIN, content(b""), r"numpy\.savez"),
    "npz, something else": ("x.npz", _TRAIN, content(b"\x93NUMPX" * 99), r"numpy\.savez"),
    "npz, cut off": ("x.npz", _TRAIN, npz(slice(150), features=FEATURES), r"numpy\.savez"),
    "npz, damaged": ("x.npz", _TRAIN, damaged_npz, r"numpy\.savez"),
    "npz, a single array": ("x.npz", _TRAIN, npy, r"numpy\.savez"),
    "npz, objects": ("x.npz", _TRAIN, npz(features=np.array([[None]], dtype=object)), r"numpy\.savez"),
    "npz, no array": ("x.npz", _TRAIN, zipped, "features must hold numbers, not bytes"),
    "npz, other names": ("x.npz", _TRAIN, npz(x=FEATURES), "no array named features, only x; rename"),
    "npz, nothing": ("x.npz", _TRAIN, npz(), "no array named features, only nothing"),
    "npz, texts": ("x.npz", _TRAIN, npz(features=np.array([["a"]])), "features must hold numbers, not <U1"),
    "npz, no rows": ("x.npz", _TRAIN, npz(features=FEATURES[:0]), "has no rows"),
    "npz, one dimension": ("x.npz", _TRAIN, npz(features=np.zeros(3)), r"features must be \[N, …\].* not \[3\]"),
    "npz, a single target": ("x.npz", _TRAIN, npz(features=FEATURES, targets=1), r"targets must be .* not \[\]"),
    "npz, few weights": ("x.npz", _TRAIN, npz(features=FEATURES, weights=[1.0]), "1 weights for 3 rows"),
    "npz, dates": (
        "x.npz", _TRAIN, npz(features=FEATURES, tasks=np.zeros(3, "M8[D]")), "tasks must hold numbers or texts",
    ),
    "npz, no targets": ("x.npz", _TRAIN, npz(features=FEATURES), "no array named targets"),
    "npz, columns": ("x.npz", _TABLE, npz(features=FEATURES), "has no columns to name"),
    "csv, missing": ("x.csv", _TABLE, lambda _: None, "No such file"),
    "csv, a folder": ("x.csv", _TABLE, Path.mkdir, "directory"),
    "csv, empty": ("x.csv", _TABLE, content(b""), "Empty CSV file; it must be UTF-8"),
    "csv, header alone": ("x.csv", _TABLE, content(b"a,y\n"), "has no rows"),
    "csv, one name twice": ("x.csv", _TABLE, content(b"a,a,y\n1,2,0\n"), "several columns named a; rename"),
    "csv, latin-1 header": ("x.csv", _TABLE, content(b"gr\xf6sse,y\n1,0\n"), "header is not UTF-8; convert it"),
    "csv, latin-1 cell": ("x.csv", _TABLE, content(b"a,y\n1,0\nm\xfcn,1\n"), r"column a .* in row 2; leave"),
    "csv, latin-1 task": (
        "x.csv", (*_TABLE, "--task", "t"), content(b"a,y,t\n1,0,a\n1,1,m\xfcn\n"), "column t, row 2: .* is not UTF-8",
    ),
    "csv, utf-16": ("x.csv", _TABLE, content("a,y\n1,0\n".encode("utf-16")), "must be UTF-8 text"),
    "csv, compressed": ("x.csv", _TABLE, content(gzip.compress(bytes(range(256)), mtime=0)), "x.csv"),
    "csv, ragged": ("x.csv", _TABLE, content(b"a,y\n1,2\n1,2,3\n"), "as many cells in each row"),
    "csv, no number": ("x.csv", _TABLE, content(b"a,y\n1,0\n2.5,0\nn/e,1\n"), "not numbers: 'n/e' in row 3"),
    "csv, dates": ("x.csv", _TABLE, content(b"a,y\n2026-01-02,0\n"), r"holds date32\[day\], not numbers"),
    "csv, a gap": ("x.csv", _TABLE, content(b"a,y\n1,0\n,1\n"), "1 empty values, the first in row 2; fill"),
    "csv, no such column": ("x.csv", _TABLE, content(b"a,b\n1,0\n"), "has no column y; there are a, b"),
    "csv, target alone": ("x.csv", _TABLE, content(b"y\n0\n"), "no columns left for features"),
    "csv, no target named": ("x.csv", _TRAIN, content(b"a,y\n1,0\n"), "give --target"),
    "parquet, empty": ("x.parquet", _TABLE, content(b""), "write it anew"),
    "parquet, something else": ("x.parquet", _TABLE, content(b"a,y\n1,0\n" * 9), "write it anew"),
    "parquet, cut off": ("x.parquet", _TABLE, parquet(slice(-20), a=[1.0], y=[0]), "write it anew"),
    "parquet, no rows": ("x.parquet", _TABLE, parquet(a=np.zeros(0), y=np.zeros(0)), "has no rows"),
    "parquet, lists": ("x.parquet", _TABLE, parquet(a=[[1], [2, 3]], y=[0, 1]), r"column a holds list.*, not numbers"),
    "parquet, a gap": ("x.parquet", _TABLE, parquet(a=[1.0, None], y=[0, 1]), "the first in row 2"),
    "parquet, complex task": ("x.parquet", (*_TABLE, "--task", "t"), parquet(a=[1.0], y=[0], t=[b"\xff"]), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", _FILES)
def test_what_is_wrong_with_a_file_is_one_line(cbp: Run, tmp_path: Path, name: str) -> None:
    file, arguments, make, problem = _FILES[name]
    if "--target" in arguments:
        pytest.importorskip("pyarrow")
    path = tmp_path / file
    make(path)

    failed = cbp(arguments[0], str(path), *arguments[1:])

    usage = "give --target" in problem or problem == "no array named targets"
    assert failed.status == (2 if usage else 1), failed
    assert re.search(problem, " ".join(failed.err.split())), failed.err
    if not usage:
        assert failed.err.count("\n") == 1
        assert failed.err.startswith(f"cbp: {path}")
        assert failed.err.strip().isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", ["x.npz", "x.csv", "x.parquet"])
def test_a_file_that_may_not_be_read_is_one_line(cbp: Run, tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.write_bytes(b"a,y\n1,0\n")
    path.chmod(0)
    failed = cbp(*_TRAIN[:1], str(path), *_TRAIN[1:])

    assert failed.status == 1
    assert "Permission denied" in failed.err
    assert failed.err.count("\n") == 1
