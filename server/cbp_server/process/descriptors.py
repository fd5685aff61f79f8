"""File descriptors: as many as the system lets this process have, and what the log says when they are used up."""

import asyncio
import errno
import resource
import time
from typing import Any

import structlog

#: More than any server needs; the kernel refuses "any number", which is what some containers allow.
_MOST = 2**20
#: Of a process, of the machine, or the memory that goes with them.
_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_QUIET_SECONDS = 10.0

log = structlog.get_logger("cbp_server.process")


def raise_descriptor_limit() -> None:
    """Raises the soft limit, often 1,024, to the hard one: each stream and each connection takes a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("limit of file descriptors not raised", limit=soft, error=str(error))
        return
    log.info("limit of file descriptors raised", limit=wanted, before=soft)


def tell_of_exhaustion(loop: asyncio.AbstractEventLoop) -> None:
    """Has `loop` say in one line at times that connections wait for descriptors: by itself it writes a traceback for
    every place in the queue of every listener, each second, and does little else."""
    quiet_until = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal quiet_until
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _USED_UP and "socket" in context):
            loop.default_exception_handler(context)
        elif time.monotonic() >= quiet_until:
            quiet_until = time.monotonic() + _QUIET_SECONDS
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.error(
                "new connections wait: no file descriptor is left; raise the limit (ulimit -n), or have fewer clients",
                limit=limit,
                error=error.strerror,
            )

    loop.set_exception_handler(handle)
