"""`cbp demo`: the whole path in one command, from real data to the picture of what it shows."""

import asyncio
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cbp_client.demo.contest import CONTESTANTS, MOST_TASKS, Contestant, run_contest
from cbp_client.demo.digits import IMAGES, digit_tasks
from cbp_client.demo.local_server import ServerStartError, local_server
from cbp_client.demo.report import ends, plot, result_table
from cbp_client.types import BatchResult

#: Share of the newest message in the accuracy shown while the demo runs.
_LIVE_SHARE = 0.05


def demo(
    output: Annotated[Path, typer.Option(help="Directory for the picture and the server's state.")] = Path(
        "demo-output"
    ),
    tasks: Annotated[int, typer.Option(min=2, max=MOST_TASKS, help="Pixel permutations to go through.")] = 80,
    examples: Annotated[int, typer.Option(min=10, max=IMAGES, help="Images of each task.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the data and the initial weights.")] = 0,
    server: Annotated[
        str | None, typer.Option(help="host:port of a running server; without it the demo starts one.")
    ] = None,
) -> None:
    """Stream digits to three learners and see which of them keeps learning."""
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with ExitStack() as stack:
        if server is None:
            try:
                local = stack.enter_context(local_server(output / "data", output / "server.log"))
            except ServerStartError as error:
                console.print(f"[red]{error}[/red]")
                raise typer.Exit(1) from None
            target = local.grpc_target
            console.print(f"server      gRPC {local.grpc_target}, log in {output / 'server.log'}")
            console.print(f"status page {local.http_url}/ (live, while the demo runs)", highlight=False)
        else:
            target = server
        console.print(
            f"streaming   {tasks} tasks of {examples} digits to {len(CONTESTANTS)} learners, one example a step\n"
        )
        stream = list(digit_tasks(tasks, examples, seed))
        with _LiveProgress(console, tasks * examples) as progress:
            outcomes = asyncio.run(run_contest(target, stream, seed=seed, on_progress=progress.show))
        picture = output / "demo.png"
        plot(outcomes, picture)
        console.print(result_table(outcomes))
        changes = {outcome.contestant.layers: 100 * (ends(outcome)[1] - ends(outcome)[0]) for outcome in outcomes}
        console.print(
            f"\nOnline accuracy changed by {changes['none']:+.1f} points with plain backprop, "
            f"{changes['first']:+.1f} with resets in the first layer alone, {changes['all']:+.1f} with resets in all."
        )
        console.print(f"\npicture     {picture}", highlight=False)
        if server is None:
            console.print(f"learners    kept in {output / 'data'}; open them again with", highlight=False)
            console.print(f"            cbp-server --data-dir {output / 'data'}", highlight=False)
        console.print(f"took        {time.monotonic() - started:.0f} s", highlight=False)
        if server is None and sys.stdin.isatty() and sys.stdout.isatty():
            console.input(f"\nThe status page is still at {local.http_url}/ — press Enter to stop the server. ")


class _LiveProgress:
    """A bar for each learner, with the accuracy of its recent predictions."""

    def __init__(self, console: Console, examples: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._accuracies: dict[Contestant, float] = {}
        self._bars: dict[Contestant, TaskID] = {
            contestant: self._progress.add_task(contestant.label, total=examples, accuracy="–")
            for contestant in CONTESTANTS
        }

    def __enter__(self) -> "_LiveProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, contestant: Contestant, result: BatchResult) -> None:
        """Takes in the result of one message."""
        bar = self._bars[contestant]
        if result.accuracy is not None:
            before = self._accuracies.get(contestant, result.accuracy)
            self._accuracies[contestant] = before + _LIVE_SHARE * (result.accuracy - before)
            self._progress.update(bar, accuracy=f"{self._accuracies[contestant]:.1%}")
        self._progress.update(bar, advance=result.examples)
