"""Checkpoints as files: one directory a learner, one file a checkpoint, the newest readable one counts.

    <data_dir>/learners/<learner_id>/checkpoint-<generation>.safetensors

A file appears under its name only when it is whole and on disk: written to a temporary name, fsynced, renamed, and the
directory fsynced.
"""

import os
import re
import shutil
from pathlib import Path

_FILE = re.compile(r"checkpoint-(\d{12})\.safetensors")
_TEMPORARY = ".writing"
_DELETED = ".deleted-"


#: Of each learner; older ones are removed after a newer one is on disk.
CHECKPOINTS_KEPT = 2


class CheckpointDirectory:
    """The learners' checkpoints under one data directory.

    Args:
        data_dir: made if it is missing.
        keep: checkpoints kept of each learner; older ones are removed after a newer one is on disk.
    """

    def __init__(self, data_dir: Path, *, keep: int = CHECKPOINTS_KEPT) -> None:
        self._learners = data_dir / "learners"
        self._keep = keep
        self._learners.mkdir(parents=True, exist_ok=True)
        for leftover in [*self._learners.glob(f"{_DELETED}*"), *self._learners.glob(f"*/*{_TEMPORARY}")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def learner_ids(self) -> list[str]:
        """Learners that have at least one checkpoint, sorted."""
        return sorted(path.name for path in self._learners.iterdir() if path.is_dir() and self._generations(path.name))

    def write(self, learner_id: str, data: bytes) -> None:
        """Makes `data` the learner's newest checkpoint; it is on disk when this returns.

        Raises:
            OSError: it could not be written; the checkpoints before it are untouched.
        """
        directory = self._learners / learner_id
        if not directory.exists():
            directory.mkdir()
            _sync_directory(self._learners)
        generations = self._generations(learner_id)
        generation = generations[0] + 1 if generations else 1
        path = self._path(learner_id, generation)
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
        for old in generations[self._keep - 1 :]:
            self._path(learner_id, old).unlink(missing_ok=True)

    def paths(self, learner_id: str) -> list[Path]:
        """The learner's checkpoints, newest first, so that a reader can fall back from one that is corrupt."""
        return [self._path(learner_id, generation) for generation in self._generations(learner_id)]

    def delete(self, learner_id: str, uid: str) -> None:
        """Removes the learner's checkpoints; after a crash in between they are gone as well."""
        directory = self._learners / learner_id
        if not directory.exists():
            return
        deleted = self._learners / f"{_DELETED}{uid}"
        directory.replace(deleted)
        _sync_directory(self._learners)
        shutil.rmtree(deleted)

    def _generations(self, learner_id: str) -> list[int]:
        directory = self._learners / learner_id
        if not directory.exists():
            return []
        matches = (_FILE.fullmatch(path.name) for path in directory.iterdir())
        return sorted((int(match.group(1)) for match in matches if match), reverse=True)

    def _path(self, learner_id: str, generation: int) -> Path:
        return self._learners / learner_id / f"checkpoint-{generation:012d}.safetensors"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
