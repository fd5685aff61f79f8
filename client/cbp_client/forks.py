"""A client and a fork. gRPC runs threads of its own, and a forked process has none of them, only the locks that they
held: calls in it hang past their timeout or crash, also on new channels, with gRPC's own fork support and without it.
So the process in which gRPC was first used is noted, and every call says at once if it is made in a fork of that one.
"""

import os
from typing import NoReturn

from cbp_client.errors import ClientUnusable

_used_in: int | None = None


class InOneProcess:
    """Mixed into what belongs to the process in which it was made."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} can't be copied or sent to another process; make a client there, of the same target"
        )


def forked() -> bool:
    """Whether a client was used before this process was forked from another one."""
    return _used_in is not None and _used_in != os.getpid()


def check() -> None:
    """Raise ClientUnusable in such a process."""
    if forked():
        raise ClientUnusable(
            f"process {os.getpid()} was forked after a client had been used in process {_used_in}, and gRPC does not "
            "survive a fork; start processes with multiprocessing.get_context('spawn') or 'forkserver', or use no "
            "client before the fork",
            reason="CLIENT_FORKED",
        )


def note_use() -> None:
    """Called before anything is done that a fork breaks.

    Raises:
        ClientUnusable: as `check`.
    """
    global _used_in
    check()
    _used_in = os.getpid()
