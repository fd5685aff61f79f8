"""Directories whose entries outlast power loss: a new name is on disk only once its directory is."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Returns when the names in `directory` are on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Makes `directory` and the parents that are missing; all of them are on disk when this returns."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_directory(path.parent)
