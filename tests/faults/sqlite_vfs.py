"""Watches what SQLite does to its files, and lets it fail: a VFS around the default one, in this process only.

The structures are those of sqlite3.h. Only files' xWrite and xSync, and the VFS's xOpen and xDelete, are ours; all else
is passed on to the VFS that was the default.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from faults.broken import break_off, guarded

SQLITE_OK = 0
SQLITE_READONLY = 8
SQLITE_FULL = 13
SQLITE_IOERR_WRITE = 10 | 3 << 8
SQLITE_IOERR_FSYNC = 10 | 4 << 8
_SQLITE_IOERR_SHORT_READ = 10 | 2 << 8


class SqliteWatcher:
    """Told of operations on files that have a name; a status other than `SQLITE_OK` makes the operation fail.

    Attributes:
        wants_content: whether `synced` and `sync_failed` are to say what the file holds.
    """

    wants_content = False

    def writing(self, _path: str) -> int:
        return SQLITE_OK

    def syncing(self, _path: str) -> int:
        return SQLITE_OK

    def synced(self, path: str, content: bytes) -> None:
        """What the file held when the sync began is on disk now."""

    def sync_failed(self, path: str, content: bytes) -> None:
        """A watcher has let a sync fail: what is not on disk yet never will be, unless it is written again."""

    def written(self, path: str, offset: int, length: int) -> None:
        """Bytes of the file have been written."""

    def directory_synced(self, path: str) -> None:
        """The directory's entries are on disk now."""


_ReadWrite = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)
_FileSize = CFUNCTYPE(c_int, c_void_p, POINTER(c_int64))
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int)
_OpenDirectory = CFUNCTYPE(c_int, c_char_p, POINTER(c_int))
_SetSystemCall = CFUNCTYPE(c_int, c_void_p, c_char_p, c_void_p)
_GetSystemCall = CFUNCTYPE(c_void_p, c_void_p, c_char_p)


class _Methods(ctypes.Structure):
    """sqlite3_io_methods, version 3."""

    _fields_ = (
        ("version", c_int),
        ("close", c_void_p),
        ("read", _ReadWrite),
        ("write", _ReadWrite),
        ("truncate", c_void_p),
        ("sync", _Sync),
        ("file_size", _FileSize),
        *((name, c_void_p) for name in ("lock", "unlock", "check_reserved_lock", "file_control")),
        *((name, c_void_p) for name in ("sector_size", "device_characteristics")),
        *((name, c_void_p) for name in ("shm_map", "shm_lock", "shm_barrier", "shm_unmap", "fetch", "unfetch")),
    )


class _File(ctypes.Structure):
    """sqlite3_file, without what a VFS keeps behind it."""

    _fields_ = (("methods", POINTER(_Methods)),)


class _Vfs(ctypes.Structure):
    """sqlite3_vfs, version 3."""

    _fields_ = (
        ("version", c_int),
        ("file_bytes", c_int),
        ("longest_path", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("app_data", c_void_p),
        ("open", _Open),
        ("delete", _Delete),
        *((name, c_void_p) for name in ("access", "full_pathname", "dl_open", "dl_error", "dl_sym", "dl_close")),
        *((name, c_void_p) for name in ("randomness", "sleep", "current_time", "get_last_error", "current_time_int64")),
        ("set_system_call", _SetSystemCall),
        ("get_system_call", _GetSystemCall),
        ("next_system_call", c_void_p),
    )


def library_path() -> str | None:
    """The shared library that this interpreter's `sqlite3` uses; None if SQLite is linked statically."""
    import _sqlite3  # noqa: F401 - it is mapped now

    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return next((path for path in sorted(mapped) if Path(path).name.startswith("libsqlite3.so")), None)


def install_vfs(watchers: Sequence[SqliteWatcher]) -> None:
    """Every database that this process opens from now on is watched."""
    path = library_path()
    if path is None:
        break_off("SQLite is linked statically")
    _installed.append(_WatchedVfs(ctypes.CDLL(path), watchers))


_installed: list["_WatchedVfs"] = []  # SQLite calls into it for as long as the process lives


class _WatchedVfs:
    def __init__(self, library: ctypes.CDLL, watchers: Sequence[SqliteWatcher]) -> None:
        self._watchers = watchers
        self._wants_content = any(watcher.wants_content for watcher in watchers)
        self._methods: dict[int, _Methods] = {}  # by address of the original's
        self._paths: dict[int, str] = {}  # by address of the open file
        self._opened = threading.local()  # directories that the call under way has opened in order to sync them
        find = library.sqlite3_vfs_find
        find.restype, find.argtypes = POINTER(_Vfs), (c_char_p,)
        self._default = find(None).contents
        self._vfs = _Vfs.from_buffer_copy(self._default)
        self._vfs.name = b"watched"
        self._vfs.open = _Open(guarded(self._open))
        self._vfs.delete = _Delete(guarded(self._delete))
        self._watch_directories()
        register = library.sqlite3_vfs_register
        register.argtypes = (POINTER(_Vfs), c_int)
        if register(byref(self._vfs), 1) != SQLITE_OK:
            break_off("SQLite does not take the VFS")

    def _open(self, _: int, name: int | None, file: int, flags: int, out_flags: int | None) -> int:
        status: int = self._default.open(ctypes.addressof(self._default), name, file, flags, out_flags)
        if status == SQLITE_OK and name:
            self._paths[file] = os.fsdecode(ctypes.string_at(name))
            opened = _File.from_address(file)
            opened.methods = ctypes.pointer(self._watched(opened.methods.contents))
        return status

    def _watched(self, original: _Methods) -> _Methods:
        address = ctypes.addressof(original)
        if address not in self._methods:
            methods = _Methods.from_buffer_copy(original)
            methods.write = _ReadWrite(guarded(self._write(original)))
            methods.sync = _Sync(guarded(self._sync(original)))
            self._methods[address] = methods
        return self._methods[address]

    def _write(self, original: _Methods) -> Callable[..., int]:
        def write(file: int, data: int, length: int, offset: int) -> int:
            for watcher in self._watchers:
                if status := watcher.writing(self._paths[file]):
                    return status
            done: int = original.write(file, data, length, offset)
            if done == SQLITE_OK:
                for watcher in self._watchers:
                    watcher.written(self._paths[file], offset, length)
            return done

        return write

    def _sync(self, original: _Methods) -> Callable[..., int]:
        def sync(file: int, flags: int) -> int:
            path = self._paths[file]
            # What is written while the sync is under way need not be on disk when it ends.
            content = _content(original, file) if self._wants_content else b""
            for watcher in self._watchers:
                if status := watcher.syncing(path):
                    for told in self._watchers:
                        told.sync_failed(path, content)
                    return status
            with self._directories_of_call() as directories:
                done: int = original.sync(file, flags)
            if done == SQLITE_OK:
                for watcher in self._watchers:
                    watcher.synced(path, content)
                self._tell_directories(directories)
            return done

        return sync

    def _delete(self, _: int, path: bytes, sync_directory: int) -> int:
        with self._directories_of_call() as directories:
            done: int = self._default.delete(ctypes.addressof(self._default), path, sync_directory)
        if done == SQLITE_OK:
            self._tell_directories(directories)
        return done

    def _watch_directories(self) -> None:
        """SQLite syncs a directory in the same call in which it opens it."""
        default = ctypes.addressof(self._default)
        original = _OpenDirectory(self._default.get_system_call(default, b"openDirectory"))

        def open_directory(path: bytes, descriptor: Any) -> int:
            status: int = original(path, descriptor)
            if status == SQLITE_OK:
                self._opened.directories.append(str(Path(os.fsdecode(path)).parent))
            return status

        self._open_directory = _OpenDirectory(guarded(open_directory))
        address = ctypes.cast(self._open_directory, c_void_p)
        if self._default.set_system_call(default, b"openDirectory", address) != SQLITE_OK:
            break_off("SQLite does not tell which directories it syncs")

    def _directories_of_call(self) -> "_Collecting":
        return _Collecting(self._opened)

    def _tell_directories(self, directories: Sequence[str]) -> None:
        for directory in directories:
            for watcher in self._watchers:
                watcher.directory_synced(directory)


class _Collecting:
    def __init__(self, opened: threading.local) -> None:
        self._opened = opened

    def __enter__(self) -> list[str]:
        self._opened.directories = directories = list[str]()
        return directories

    def __exit__(self, *_: object) -> None:
        self._opened.directories = []


def _content(methods: _Methods, file: int) -> bytes:
    """All that the file holds, read through SQLite: to open and close it here would drop SQLite's locks on it."""
    size = c_int64()
    status = methods.file_size(file, byref(size))
    if status != SQLITE_OK or size.value == 0:
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    status = methods.read(file, ctypes.addressof(buffer), size.value, 0)
    if status not in (SQLITE_OK, _SQLITE_IOERR_SHORT_READ):
        break_off(f"reading back what SQLite syncs failed with {status}")
    return buffer.raw
