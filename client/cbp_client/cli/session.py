"""What every command needs: the server it talks to, and how it prints."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cbp_client.errors import CbpClientError
from cbp_client.sync import Client


class WholeHelp(TyperGroup):
    """Lists commands with all that they say of themselves, at any width of the terminal; others cut it to one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """As click does, but for the cut."""
        rows = [(name, " ".join((self.commands[name].help or "").split())) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class CommandError(Exception):
    """Something that the user has to put right, in one sentence."""


@dataclass(frozen=True)
class Session:
    """The options that stand before a command's name."""

    server: str

    def connect(self) -> Client:
        """A client of the chosen server."""
        return Client(self.server)


def session(context: typer.Context) -> Session:
    """The session of the command that is running."""
    found = context.find_object(Session)
    if found is None:
        raise RuntimeError("commands run under the application's callback, which makes the session")
    return found


def output() -> Console:
    """Where results go."""
    return Console(highlight=False)


def messages() -> Console:
    """Where everything else goes, so that results can be piped."""
    return Console(stderr=True, highlight=False)


#: The command that puts an error right, by the server's reason.
_FIXES = {
    "CHECKPOINT_NOT_FOUND": "see cbp learners checkpoints {learner}",
    "PRODUCER_NOT_FOUND": "see cbp learners show {learner}",
    "LEARNER_NOT_DELETED": "first: cbp learners delete {learner}",
    "LEARNER_QUARANTINED": "go on with cbp learners resume {learner}, perhaps with --lr or --skip-batch",
    "POSITION_NOT_HELD": "see cbp learners checkpoints {learner}",
}


def explained(error: CbpClientError) -> str:
    """What went wrong, and the command that puts it right, if there is one."""
    fix = _FIXES.get(error.reason)
    return str(error) if fix is None else f"{error}; {fix.format(learner=error.metadata.get('learner', 'ID'))}"


def print_error(text: str) -> None:
    """One line on stderr, of characters that a terminal prints."""
    line = " ".join(text.split())
    typer.echo(f"cbp: {''.join(c if c.isprintable() else repr(c)[1:-1] for c in line)}", err=True)


def as_json(value: Any) -> str:
    """A record of this package, or a list or dictionary of them, as one line of JSON."""
    return json.dumps(_plain(value), allow_nan=False)


def number(value: float | None) -> str:
    """A metric for people: four significant digits; a dash if there is none."""
    return "–" if value is None else f"{value:.4g}"


def moment(time: datetime) -> str:
    """A time for people, in their own time zone."""
    return time.astimezone().isoformat(sep=" ", timespec="seconds")


def percent(value: float | None) -> str:
    """A share for people; a dash if there is none."""
    return "–" if value is None else f"{100 * value:.1f}%"


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None  # JSON has no other numbers
        case datetime():
            return value.isoformat()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
