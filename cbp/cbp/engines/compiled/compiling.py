"""How the functions of the compiled engine are compiled, and kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")

_HERE = Path(__file__).parent
SOURCES = (
    *sorted(_HERE.glob("*.py")),
    *(_HERE.parents[1] / "plasticity" / name for name in ("measures.py", "samples.py")),
)
"""All files with compiled code, or with constants in it: those of this wing, and of the measures that it follows."""


def _compiled(*fastmath: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Never with the flags that assume away infinities and NaN. 'contract' lets a product and a sum be rounded once;
    'reassoc' lets a sum be taken in several lanes."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
        try:
            compiled: Any = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no place on disk to keep it
            compiled = numba.njit(**options)(function)
        else:
            _look_at_all_sources(compiled)
        kernel: Callable[P, R] = compiled
        return kernel

    return decorate


def _look_at_all_sources(compiled: Any) -> None:
    """Numba would use what it has on disk as long as the file of the function is the same, whatever became of those of
    the functions that it calls; it has no public way to say so."""
    file = getattr(compiled._cache, "_cache_file", None)
    if file is not None:
        sources = [source.stat() for source in SOURCES]
        file._source_stamp = tuple((source.st_mtime, source.st_size) for source in sources)


as_written = _compiled()
exactly = _compiled("contract")
in_any_order = _compiled("contract", "reassoc")
