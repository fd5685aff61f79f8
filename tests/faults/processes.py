"""Processes as /proc shows them."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that have not ended."""
    return [child for child, (state, parent) in _processes().items() if parent == pid and state != "Z"]


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended; one that has, and that nobody has waited for, still exists."""
    return _processes().get(pid, ("Z", 0))[0] != "Z"


def command(pid: int) -> list[str]:
    """The process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _processes() -> dict[int, tuple[str, int]]:
    """State and parent, by process id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # ended meanwhile
        found[int(stat.parent.name)] = (state, int(parent))
    return found
