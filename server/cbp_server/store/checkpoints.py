"""Checkpoints as files: `<root>/<uid>/<number>.safetensors`, in a local directory or in any storage that fsspec knows.

The catalog says which of them count; nothing here lists files. A storage other than a directory is set up through
fsspec's own configuration: environment variables such as `FSSPEC_S3_ENDPOINT_URL`, or files in `~/.config/fsspec`.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from cbp_server.store.directories import make_directory, sync_directory

_UID = re.compile(r"[0-9A-Za-z_-]+")  # a name within the root: never empty, no way out
_WRITING = ".writing"


class CheckpointFiles:
    """The learners' checkpoint files; several threads may use it, each file by one at a time.

    Constructing it reaches for nothing, so storage that is away shows at the first use. Methods raise `OSError` for
    every failure of the storage.

    Args:
        root: a directory, made when it is needed, or an fsspec URL such as `s3://bucket/prefix`, whose bucket exists.

    Raises:
        ValueError: no storage known by this URL's scheme, its package is not installed, or its options are wrong.
    """

    def __init__(self, root: str) -> None:
        if "://" not in root and "::" not in root:
            self._files: _Files = _Directory(Path(root))
        elif root.startswith("file://"):
            self._files = _Directory(Path(root.removeprefix("file://")))
        else:
            self._files = _Storage(root)

    @property
    def remote(self) -> bool:
        """Whether a file that cannot be read may be whole, and its storage out of reach."""
        return isinstance(self._files, _Storage)

    def write(self, uid: str, number: int, data: bytes) -> None:
        """Stores a checkpoint, or replaces it; the file is whole and durable when this returns.

        After a failure there may be part of it under its name, depending on the storage; not so in a directory.
        """
        self._files.write(_name(uid), _file(number), data)

    def read(self, uid: str, number: int) -> bytes:
        """What was written.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._files.read(_name(uid), _file(number))

    def delete(self, uid: str, number: int) -> None:
        """Removes a checkpoint; fine if there is none."""
        self._files.delete(_name(uid), _file(number))

    def delete_all(self, uid: str) -> None:
        """Removes all of a learner's files, also those of writes that were cut short; fine if there are none."""
        self._files.delete_all(_name(uid))


class _Files(Protocol):
    def write(self, uid: str, file: str, data: bytes) -> None: ...
    def read(self, uid: str, file: str) -> bytes: ...
    def delete(self, uid: str, file: str) -> None: ...
    def delete_all(self, uid: str) -> None: ...


class _Directory:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable: set[str] = set()  # uids whose directories are known to be on disk
        self._making = threading.Lock()

    def write(self, uid: str, file: str, data: bytes) -> None:
        directory = self._root / uid
        with self._making:
            if uid not in self._durable:
                make_directory(self._root)
                make_directory(directory)
                self._durable.add(uid)
        path = directory / file
        temporary = path.with_name(file + _WRITING)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(directory)

    def read(self, uid: str, file: str) -> bytes:
        return (self._root / uid / file).read_bytes()

    def delete(self, uid: str, file: str) -> None:
        (self._root / uid / file).unlink(missing_ok=True)

    def delete_all(self, uid: str) -> None:
        with self._making:
            self._durable.discard(uid)
            with suppress(FileNotFoundError):
                shutil.rmtree(self._root / uid)


class _Storage:
    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._filesystem, root = url_to_fs(url)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoints cannot be kept at {url}: {error}") from error
        self._root = root.rstrip("/")

    def write(self, uid: str, file: str, data: bytes) -> None:
        directory = f"{self._root}/{uid}"
        with self._use() as filesystem:
            try:
                filesystem.pipe_file(f"{directory}/{file}", data)
            except (
                FileNotFoundError
            ):  # storage that has directories; buckets are never made, which hides a misspelt one
                filesystem.mkdir(directory, create_parents=False)
                filesystem.pipe_file(f"{directory}/{file}", data)

    def read(self, uid: str, file: str) -> bytes:
        with self._use() as filesystem:
            return bytes(filesystem.cat_file(f"{self._root}/{uid}/{file}"))

    def delete(self, uid: str, file: str) -> None:
        with self._use() as filesystem, suppress(FileNotFoundError):
            filesystem.rm_file(f"{self._root}/{uid}/{file}")

    def delete_all(self, uid: str) -> None:
        with self._use() as filesystem, suppress(FileNotFoundError):
            filesystem.invalidate_cache()  # a listing from earlier may lack files
            for path in filesystem.find(f"{self._root}/{uid}"):  # `rm` would take a root with * or [ for a pattern
                filesystem.rm_file(path)
            with suppress(Exception):  # where there are directories; an empty one harms nobody
                filesystem.rmdir(f"{self._root}/{uid}")

    @contextmanager
    def _use(self) -> Iterator[Any]:
        try:
            # Asynchronous ones run all calls on one thread of their own; others belong to the thread that made them.
            yield self._filesystem if self._filesystem.async_impl else url_to_fs(self._url)[0]
        except OSError:
            raise
        except Exception as error:  # each storage's client has errors of its own
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _name(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise ValueError(f"{uid!r} is no uid")
    return uid


def _file(number: int) -> str:
    return f"{number}.safetensors"
