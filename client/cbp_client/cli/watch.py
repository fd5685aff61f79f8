"""cbp watch: learners and their plasticity, live."""

from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from cbp_client.cli.session import as_json, number, output, percent, session
from cbp_client.types import WatchedLearner


def watch(
    context: typer.Context,
    learner_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="Which learners; none means all.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.05, help="Least seconds between two updates.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the present state and exit.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print each update as a line of JSON.")] = False,
) -> None:
    """Watch learners: progress, and for each layer how plastic it still is. Ends with Ctrl-C."""
    with session(context).connect() as client:
        updates = client.watch(learner_ids or None, interval=interval)
        if json_output:
            for update in updates:
                typer.echo(as_json(update))
                if once:
                    return
        present: dict[str, WatchedLearner] = {}
        console = output()
        if once:
            console.print(_table({watched.info.id: watched for watched in next(updates).learners}))
            return
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            for update in updates:
                present |= {watched.info.id: watched for watched in update.learners}
                for learner_id in update.deleted:
                    present.pop(learner_id, None)
                live.update(Group(_table(present)), refresh=True)


def _table(present: dict[str, WatchedLearner]) -> Table:
    table = Table("learner", "task")
    for heading in ("step", "examples", "loss", "accuracy"):
        table.add_column(heading, justify="right")
    table.add_column("layer")
    for heading in ("dormant", "mean |w|", "effective rank", "replaced"):
        table.add_column(heading, justify="right")
    for _, watched in sorted(present.items()):
        _add_rows(table, watched)
    return table


def _add_rows(table: Table, watched: WatchedLearner) -> None:
    info, progress = watched.info, watched.info.progress
    own = [
        info.id if info.state == "active" else f"{info.id} ({info.state})",
        progress.tasks[-1].task if progress.tasks else "–",
        str(progress.step),
        str(progress.examples),
        number(progress.loss),
        percent(progress.accuracy),
    ]
    layers = watched.plasticity.layers if watched.plasticity is not None else ()
    if not layers:
        table.add_row(*own, end_section=True)
    for index, layer in enumerate(layers):
        table.add_row(
            *(own if index == 0 else [""] * len(own)),
            layer.layer,
            percent(layer.dormant_fraction),
            number(layer.mean_abs_weight),
            number(layer.effective_rank),
            "–" if layer.replacements is None else str(layer.replacements),
            end_section=index == len(layers) - 1,
        )
