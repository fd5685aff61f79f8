"""Settings of memory that suit a process which lives long, and messages and tensors of megabytes.

By default glibc gives blocks of that size back to the kernel when they are freed, and each new one is then mapped and
zeroed page by page at its first use, which takes longer than filling it.
"""

import ctypes
import gc
import os
import time
from collections.abc import Mapping

#: Of glibc's malloc.h, with the environment variables that set the same.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
)

#: Blocks up to here are cut from the heap; larger ones go back to the kernel when they are freed. In bytes.
_LARGEST_KEPT = 32 * 2**20
#: Free memory that the heap's end keeps, and by which it grows. In bytes.
_FREE_KEPT = 256 * 2**20
_GROWTH = 16 * 2**20
#: Heaps: messages are made by one thread and freed by another, and would not serve the first one again.
_HEAPS = 1

#: The generation that a full round of the collector goes through.
_FULL = 2
#: Between two rounds that go through what has survived earlier ones, too.
_WHOLE_ROUND_SECONDS = 3600.0


def keep_freed_memory() -> bool:
    """Makes this process keep what it frees for its next messages; True if it does.

    Up to 256 MiB more stay resident than are in use. Without effect on other C libraries than glibc, and where the
    environment has settings of its own (`MALLOC_TRIM_THRESHOLD_` and the like).
    """
    if any(name in os.environ for name in _VARIABLES) or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_MMAP_THRESHOLD, _LARGEST_KEPT),
        (_TRIM_THRESHOLD, _FREE_KEPT),
        (_TOP_PAD, _GROWTH),
        (_ARENA_MAX, _HEAPS),
    )
    return all(mallopt(name, value) for name, value in settings)


def shorten_collections() -> None:
    """Leaves what has survived a full round of garbage collection out of those that follow.

    A full round goes through all that lives, while messages wait: the code of imported modules, and the records of
    every learner, some 50 ms for a thousand of them. Hardly any of it ever becomes garbage that only the collector can
    find, and the little that does waits for a whole round, of which there is one in an hour at most.
    """
    gc.collect()
    gc.freeze()
    gc.callbacks.append(_Rounds())


class _Rounds:
    """A callback of the collector's, see `gc.callbacks`."""

    def __init__(self) -> None:
        self._whole_at = time.monotonic()

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        if info["generation"] < _FULL:
            return
        if phase == "stop":
            gc.freeze()
        elif time.monotonic() - self._whole_at >= _WHOLE_ROUND_SECONDS:
            self._whole_at = time.monotonic()
            gc.unfreeze()


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):  # not POSIX, or another C library
        return False
