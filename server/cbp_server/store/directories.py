"""Directories whose names outlast power loss: a new name is on disk only once the directory that has it is."""

import os
from contextlib import suppress
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Returns when the names in `directory` are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Makes `directory` and the parents it lacks; all of them are on disk when this returns.

    One that is there already is taken to disk as well: a process that was killed may have made it a moment ago.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(made):
        sync_directory(path.parent)
    if not made:
        with suppress(PermissionError):  # a parent that may not be read: somebody else made this directory, long ago
            sync_directory(directory.parent)
