"""What injected code does when it cannot do its part: it ends the process, since nothing after that is evidence."""

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

#: Exit status of such a process.
BROKEN_HARNESS = 86


def break_off(text: str) -> NoReturn:
    """Says why on standard error."""
    print(f"fault injection: {text}", file=sys.stderr, flush=True)
    os._exit(BROKEN_HARNESS)


def guarded(action: Callable[..., Any]) -> Callable[..., Any]:
    """For callbacks from C, whose exceptions would be printed and forgotten."""

    @wraps(action)
    def call(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except BaseException:
            traceback.print_exc()
            break_off(f"{action.__qualname__} failed")

    return call
