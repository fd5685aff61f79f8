"""cbp watch: learners and their plasticity, live."""

from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

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
            console.print(_show({watched.info.id: watched for watched in next(updates).learners}))
            return
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            for update in updates:
                present |= {watched.info.id: watched for watched in update.learners}
                for learner_id in update.deleted:
                    present.pop(learner_id, None)
                live.update(_show(present), refresh=True)


def _show(present: dict[str, WatchedLearner]) -> Group:
    """A line for each learner, and below it one for each layer; fits a terminal of 80 columns."""
    if not present:
        return Group("no learners")
    return Group(*(part for _, watched in sorted(present.items()) for part in (_headline(watched), _layers(watched))))


def _headline(watched: WatchedLearner) -> Text:
    info, progress = watched.info, watched.info.progress
    line = Text(info.id, style="bold", no_wrap=True, overflow="ellipsis")
    if info.state != "active":
        line.append(f" ({info.state})", style="red")
    facts = [f"step {progress.step}", f"loss {number(progress.loss)}"]
    if progress.accuracy is not None:
        facts.append(f"accuracy {percent(progress.accuracy)}")
    if progress.tasks:
        facts.append(f"task {progress.tasks[-1].task}")
    return line.append("   " + "   ".join(facts), style="not bold")


def _layers(watched: WatchedLearner) -> Table | Text:
    if watched.plasticity is None:
        return Text("  no plasticity sample yet\n", style="dim")
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("layer", no_wrap=True)
    for heading in ("dormant", "mean |w|", "effective rank", "replaced"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in watched.plasticity.layers:
        table.add_row(
            layer.layer,
            percent(layer.dormant_fraction),
            number(layer.mean_abs_weight),
            number(layer.effective_rank),
            "–" if layer.replacements is None else str(layer.replacements),
        )
    table.add_row()
    return table
