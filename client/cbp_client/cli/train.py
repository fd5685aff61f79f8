"""cbp train: stream a file into a learner."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from cbp_client.cli.files import Examples, read_examples
from cbp_client.cli.session import CommandError, messages, number, percent, session
from cbp_client.errors import RejectedBatch
from cbp_client.sync import Learner
from cbp_client.types import BatchResult, StreamSummary


def train(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="npz with features, targets and perhaps weights, tasks; csv with a header; parquet.")
    ],
    learner_id: Annotated[str, typer.Option("--learner", metavar="ID", help="Which learner.")],
    producer: Annotated[
        str, typer.Option(metavar="NAME", help="Names the source of the batches; one stream at a time may use it.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="csv, parquet: the column with the targets; repeat for several outputs."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="csv, parquet: the column with task labels.")
    ] = None,
    message_size: Annotated[int, typer.Option(min=1, help="Examples in one message.")] = 256,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Skip the messages that the server has; for a producer that only ever sent this file, "
            "with the same message size.",
        ),
    ] = False,
) -> None:
    """Train a learner on a file, once through, in the order of its rows."""
    examples = read_examples(file, targets=target or (), task=task)
    targets = examples.targets
    if targets is None:
        raise typer.BadParameter(
            "give --target, the column with the targets"
            if file.suffix != ".npz"
            else f"{file} has no array named targets"
        )
    with session(context).connect() as client:
        summary = _train(client.get_learner(learner_id), producer, examples, targets, message_size, resume)
    messages().print(
        f"{summary.batches} messages applied, {summary.examples} examples learnt: "
        f"loss {number(summary.loss)}, accuracy {percent(summary.accuracy)}"
    )


def _train(
    learner: Learner,
    producer: str,
    examples: Examples,
    targets: NDArray[np.generic],
    message_size: int,
    resume: bool,
) -> StreamSummary:
    parts = list(examples.messages(message_size))
    skipped = 0

    def describe(batch: RejectedBatch) -> None:
        # Raised in the stream, this ends it before later messages move up: what is applied is a prefix of the file.
        rows = parts[skipped + batch.number - 1][0]
        raise CommandError(
            f"rows {rows.start + 1} to {rows.stop} were rejected, and nothing after them was applied: {batch.message}"
        )

    with _progress() as progress:
        bar = progress.add_task("training", total=len(examples), loss="–", accuracy="–")

        def advance(result: BatchResult) -> None:
            rows = parts[skipped + result.number - 1][0]
            summary = stream.summary
            progress.update(
                bar,
                advance=rows.stop - rows.start,
                loss=number(summary.loss),
                accuracy=percent(summary.accuracy),
            )

        with learner.stream(producer, on_result=advance, on_rejection=describe) as stream:
            if resume:
                skipped = _received(stream.position.next_sequence - 1, len(parts))
                progress.update(bar, completed=parts[skipped][0].start if skipped < len(parts) else len(examples))
            for rows, task in parts[skipped:]:
                weights = None if examples.weights is None else examples.weights[rows]
                stream.send(examples.features[rows], targets[rows], weights=weights, task=task)
    return stream.summary


def _received(sequence: int, parts: int) -> int:
    if sequence > parts:
        raise CommandError(
            f"the producer has sent {sequence} messages but the file makes {parts}: it was used for another file "
            "or message size, so there is nothing to resume; use another producer or leave --resume out"
        )
    return sequence


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("– /s" if speed is None else f"{speed:.0f}/s")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} examples"),
        _Speed(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
        console=messages(),
    )
