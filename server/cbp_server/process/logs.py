"""Structured logs on standard error: readable on a terminal, JSON lines elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable

import structlog

#: Seconds in which a library's line comes once.
_QUIET_SECONDS = 10.0
#: Different lines that are remembered.
_MOST_LINES = 256


class RepeatFilter(logging.Filter):
    """Keeps libraries that say the same again and again from filling the log: a line that came less than ten seconds
    ago is left out, and the next one says how many were (`left_out`).

    What this server says itself is about one learner or one call each time, and passes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[tuple[str, int, str, str], tuple[float, int]] = {}  # when it came last, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, str):  # structlog's events are mappings
            return True
        error = record.exc_info[1] if record.exc_info else None
        line = (record.name, record.levelno, record.getMessage().partition("\n")[0], repr(error))
        with self._lock:
            return self._is_due(line, record)

    def _is_due(self, line: tuple[str, int, str, str], record: logging.LogRecord) -> bool:
        now = self._clock()
        came, left_out = self._lines.pop(line, (now - _QUIET_SECONDS, 0))
        if now - came < _QUIET_SECONDS:
            self._lines[line] = came, left_out + 1
            return False
        if left_out:
            record.left_out = left_out
        self._lines[line] = now, 0
        if len(self._lines) > _MOST_LINES:
            del self._lines[next(iter(self._lines))]
        return True


def configure_logging(level: str, log_format: str) -> None:
    """Sends structlog and the standard library's loggers through one formatter.

    Args:
        level: debug, info, warning or error.
        log_format: console, json, or auto (console if standard error is a terminal).
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    rendering: list[structlog.typing.Processor]
    if console:
        rendering = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    else:
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and end are part of ours
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)  # at each start, mostly of nothing
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
