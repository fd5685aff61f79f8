"""A disk that keeps only what was synced: what a machine finds when the power comes back.

Beside the tree that the server works on, a shadow keeps what is durable:

    content/<inode>   a file as it was when it was last synced
    names/<inode>     a directory's entries when it was last synced: JSON, name to inode and whether it is a directory
    dropped/<inode>   pages that a failed sync has lost: JSON, their numbers; they become durable only when written anew
    links/<inode>     a hard link to the file, so that its inode number is not given to another one

A file whose name is durable and whose content is not is empty after a power loss.
"""

import json
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from faults.plan import SyncedDisk
from faults.sqlite_vfs import SqliteWatcher

#: Granularity in which unsynced writes may or may not have reached the disk, in bytes.
_PAGE = 4096

# As they are before anything patches them.
_fsync, _fdatasync, _mkdir, _replace = os.fsync, os.fdatasync, os.mkdir, os.replace

EntryT = TypeVar("EntryT")

_Entry = tuple[int, bool]  # inode, whether it is a directory


class DurableDisk(SqliteWatcher):
    """In the server's processes: notes what is synced."""

    wants_content = True

    def __init__(self, disk: SyncedDisk) -> None:
        self._disk = disk
        self._root = str(disk.root)
        self._noting = threading.Lock()
        self._dropped: dict[int | None, set[int]] = {}  # by inode
        self._rewritten: set[str] = set()  # opened for writing by others than SQLite

    def synced(self, path: str, content: bytes) -> None:
        if "sqlite" not in self._disk.lies:
            self.file_synced(path, content)

    def sync_failed(self, path: str, content: bytes) -> None:
        """The kernel reports the failure once, and then holds the lost pages for clean."""
        if self.holds(path):
            durable = self._durable(path)
            pages = {page for page in range(_pages(content)) if _page(durable, page) != _page(content, page)}
            self._note_dropped(path, self._dropped_pages(path) | pages)

    def written(self, path: str, offset: int, length: int) -> None:
        lost = self._dropped_pages(path)
        if lost:
            self._note_dropped(path, lost.difference(range(offset // _PAGE, _pages_of(offset + length))))

    def file_opened(self, path: str, flags: int) -> None:
        """By others than SQLite; whoever opens a file in order to write is taken to write all of it."""
        if flags & (os.O_WRONLY | os.O_RDWR) and self.holds(path):
            self._rewritten.add(path)

    def file_synced(self, path: str, content: bytes) -> None:
        """The file held `content` when a sync of it began that has ended now."""
        if not self.holds(path):
            return
        if lost := self._dropped_pages(path):
            if path in self._rewritten:
                self._note_dropped(path, set())
            else:
                content = _mixed(self._durable(path), content, lost)
        with self._noting:
            inode = _keep(self._disk.shadow, Path(path))
            if inode is not None:
                _write(self._disk.shadow / "content" / str(inode), content)

    def directory_synced(self, path: str) -> None:
        if not self.holds(path):
            return
        with self._noting:
            note_names(self._disk.shadow, Path(path))

    def directory_made(self, path: str) -> None:
        """Its inode may have been another directory's before."""
        if self.holds(path):
            (self._disk.shadow / "names" / str(Path(path).stat().st_ino)).unlink(missing_ok=True)

    def holds(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root + os.sep)

    def _durable(self, path: str) -> bytes:
        content = self._disk.shadow / "content" / str(_inode(path))
        return content.read_bytes() if content.exists() else b""

    def _dropped_pages(self, path: str) -> set[int]:
        inode = _inode(path)
        if inode not in self._dropped:
            noted = self._disk.shadow / "dropped" / str(inode)
            self._dropped[inode] = set(json.loads(noted.read_text())) if noted.exists() else set()
        return self._dropped[inode]

    def _note_dropped(self, path: str, pages: set[int]) -> None:
        inode = _inode(path)
        self._dropped[inode] = pages
        _write(self._disk.shadow / "dropped" / str(inode), json.dumps(sorted(pages)).encode())

    @property
    def lies_about_files(self) -> bool:
        return "files" in self._disk.lies

    @property
    def lies_about_directories(self) -> bool:
        return "directories" in self._disk.lies


class SyncFailures(Protocol):
    def check_sync(self, path: str) -> None:
        """Raises OSError if syncing this file shall fail."""


def watch_syncs(disk: DurableDisk | None, failures: SyncFailures | None) -> None:
    """From now on os.fsync, os.fdatasync and os.mkdir of this process tell `disk`, and fail as `failures` says."""

    def watched(sync: Callable[[int], None]) -> Callable[[object], None]:
        def watched_sync(file: object) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()  # type: ignore[attr-defined]
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if failures is not None:
                failures.check_sync(path)
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            content = b"" if is_directory or disk is None or not disk.holds(path) else _read(descriptor)
            sync(descriptor)
            if disk is None:
                return
            if is_directory and not disk.lies_about_directories:
                disk.directory_synced(path)
            elif not is_directory and not disk.lies_about_files:
                disk.file_synced(path, content)

        return watched_sync

    def mkdir(path: str, *arguments: object, **named: object) -> None:
        _mkdir(path, *arguments, **named)  # type: ignore[arg-type]
        if disk is not None:
            disk.directory_made(os.path.abspath(path))  # noqa: PTH100 - a symbolic link is no other directory

    patches = {"fsync": watched(_fsync), "fdatasync": watched(_fdatasync), "mkdir": mkdir}
    for name, patch in patches.items():
        setattr(os, name, patch)


def _read(descriptor: int) -> bytes:
    with Path(f"/proc/self/fd/{descriptor}").open("rb") as file:  # it may be open for writing only
        return file.read()


def _mixed(durable: bytes, content: bytes, lost: set[int]) -> bytes:
    """`content`, but for the lost pages, which are as they were."""
    pages = (_page(durable if page in lost else content, page) for page in range(_pages(content)))
    return b"".join(pages)[: len(content)]


def _page(content: bytes, page: int) -> bytes:
    return content[page * _PAGE : (page + 1) * _PAGE].ljust(_PAGE, b"\0")


def _pages(content: bytes) -> int:
    return _pages_of(len(content))


def _pages_of(length: int) -> int:
    return -(-length // _PAGE)


# -- the shadow --


def note_names(shadow: Path, directory: Path) -> None:
    """The directory's entries as they are now are durable."""
    names = {}
    for entry in os.scandir(directory):
        is_directory = entry.is_dir(follow_symlinks=False)
        if not is_directory and _keep(shadow, Path(entry.path)) is None:
            continue
        names[entry.name] = (entry.inode(), is_directory)
    _write(shadow / "names" / str(directory.stat().st_ino), json.dumps(names).encode())


def _keep(shadow: Path, path: Path) -> int | None:
    """Links the file, if it is not linked yet; its inode number, or None if it has been removed meanwhile."""
    inode = _inode(path)
    link = shadow / "links" / str(inode)
    if inode is not None and not link.exists():
        try:
            os.link(path, link)
        except FileExistsError:
            pass  # the other process was quicker
        except FileNotFoundError:
            return None
    return inode


def _inode(path: Path | str) -> int | None:
    """None if the file has been removed."""
    try:
        return os.stat(path).st_ino  # noqa: PTH116 - called for every write
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, since the process may be killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
    temporary.write_bytes(content)
    _replace(temporary, path)


# -- in the harness --


def begin_shadow(disk: SyncedDisk) -> None:
    """All that the tree holds now is durable. No server may run."""
    shutil.rmtree(disk.shadow, ignore_errors=True)
    for part in ("content", "names", "dropped", "links"):
        (disk.shadow / part).mkdir(parents=True)
    for directory, _, names in os.walk(disk.root):
        note_names(disk.shadow, Path(directory))
        for name in names:
            path = Path(directory, name)
            _write(disk.shadow / "content" / str(path.stat().st_ino), path.read_bytes())


def lose_power(disk: SyncedDisk, chance: random.Random | None = None) -> None:
    """Replaces the tree by what is durable of it. No server may run.

    Args:
        chance: decides which of the pages and names that were written and not synced are there all the same. None of
            them if it is None.
    """
    rebuilt = disk.root.with_name(f"{disk.root.name}.rebuilt")
    shutil.rmtree(rebuilt, ignore_errors=True)
    _Rebuilding(disk.shadow, chance).directory(disk.root, disk.root.stat().st_ino, rebuilt)
    shutil.rmtree(disk.root)
    rebuilt.rename(disk.root)
    begin_shadow(disk)


class _Rebuilding:
    def __init__(self, shadow: Path, chance: random.Random | None) -> None:
        self._shadow = shadow
        self._chance = chance

    def directory(self, present: Path | None, inode: int, target: Path) -> None:
        """Makes `target` what is left of the directory; `present` is where it was, if it was there at the end."""
        target.mkdir()
        noted = self._shadow / "names" / str(inode)
        durable: dict[str, _Entry] = {}
        if noted.exists():
            durable = {
                name: (inode, is_directory) for name, (inode, is_directory) in json.loads(noted.read_text()).items()
            }
        current: dict[str, _Entry] = {}
        if present is not None:
            current = {
                entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in os.scandir(present)
            }
        for name in sorted(durable.keys() | current.keys()):
            entry = self._either(durable.get(name), current.get(name))
            if entry is None:
                continue
            there = present / name if present is not None and current.get(name) == entry else None
            child, is_directory = entry
            if is_directory:
                self.directory(there, child, target / name)
            else:
                (target / name).write_bytes(self._content(there, child))

    def _content(self, present: Path | None, inode: int) -> bytes:
        noted, link = self._shadow / "content" / str(inode), self._shadow / "links" / str(inode)
        durable = noted.read_bytes() if noted.exists() else b""
        written = link if link.exists() else present
        if self._chance is None or written is None:
            return durable
        unsynced = written.read_bytes()
        length = self._chance.choice((len(durable), len(unsynced)))
        pages = (_page(self._chance.choice((durable, unsynced)), page) for page in range(_pages_of(length)))
        return b"".join(pages)[:length]

    def _either(self, durable: EntryT, current: EntryT) -> EntryT:
        if self._chance is None or durable == current:
            return durable
        return self._chance.choice((durable, current))
