"""The `cbp` command, run as a user runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from cbp_client.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Result]


def command(target: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `cbp` with these arguments against the server at `target`."""
    monkeypatch.setenv("CBP_SERVER", target)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["cbp", *arguments])
        status = _exit_status()
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def _exit_status() -> int:
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
