"""Has compiled code at hand before a learner's steps need it.

Where none is on disk yet, another process compiles it: that takes half a minute, in which this one would stall.
"""

import subprocess
import sys
import threading
from collections.abc import Callable

import structlog

from cbp import compile_ahead, compiled_before

log = structlog.get_logger("cbp_server.engine")


class Preparation:
    """Of the compiled engine; `begin` once."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._compiled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[bool], None]] = []

    @property
    def compiled(self) -> bool:
        """Whether the code is at hand now."""
        return self._compiled

    def begin(self, *, at_once: bool) -> None:
        """Loads the code if it is on disk; otherwise has it compiled on the side, or, `at_once`, before it returns."""
        if at_once or compiled_before():
            compile_ahead()
            self._finish(compiled=True)
        else:
            threading.Thread(target=self._compile, name="preparation", daemon=True).start()

    def skip(self) -> None:
        """There will be no compiled code."""
        self._finish(compiled=False)

    def when_finished(self, callback: Callable[[bool], None]) -> None:
        """Calls back with whether the code is at hand: now if that is known, otherwise later, from another thread."""
        with self._lock:
            if not self._finished.is_set():
                self._callbacks.append(callback)
                return
        callback(self._compiled)

    def require(self) -> None:
        """Returns when the code is at hand, if need be after compiling it here."""
        self._finished.wait()
        if not self._compiled:
            compile_ahead()
            self._compiled = True

    def _compile(self) -> None:
        log.info("compiling the engine's code on the side; until it is there, learners train with torch")
        process = subprocess.run(
            [sys.executable, "-m", "cbp.engines.ahead"], capture_output=True, text=True, check=False
        )
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or ["no reason given"]
            log.error("the engine's code was not compiled; learners train with torch", error=last[0])
        elif not compiled_before():
            log.error(
                "the engine's code cannot be kept on disk; learners train with torch. Let NUMBA_CACHE_DIR name a "
                "directory that the server may write to"
            )
        else:
            compile_ahead()
            self._finish(compiled=True)
            return
        self._finish(compiled=False)

    def _finish(self, *, compiled: bool) -> None:
        with self._lock:
            self._compiled = compiled
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(compiled)
