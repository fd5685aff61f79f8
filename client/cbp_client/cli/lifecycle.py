"""cbp learners: what saves, copies, restores and removes a learner."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from cbp_client.cli.learners import AsJson, DurabilityOption, LearnerId, level
from cbp_client.cli.session import CommandError, as_json, messages, moment, output, session
from cbp_client.errors import InvalidArgument
from cbp_client.transfer import export_format
from cbp_client.types import ExportFormat

_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Uid = Annotated[
    str | None, typer.Option("--uid", help="Which of several deleted under that id; `list --deleted` shows them.")
]


def fork(
    context: typer.Context,
    learner_id: LearnerId,
    new_id: Annotated[str, typer.Argument(metavar="NEW_ID", help="The id of the copy.")],
    durability: DurabilityOption = None,
    json_output: AsJson = False,
) -> None:
    """Copy a live learner, with all its state, under a new id."""
    wanted = level(durability)
    with session(context).connect() as client:
        info = client.get_learner(learner_id).fork(new_id, durability=wanted).info
    _tell(json_output, info, f"copied learner {learner_id} to {info.id}, at step {info.progress.step}")


def checkpoint(context: typer.Context, learner_id: LearnerId, json_output: AsJson = False) -> None:
    """Save a learner's whole state, and keep it until it is deleted."""
    with session(context).connect() as client:
        made = client.get_learner(learner_id).checkpoint()
    place = f"journal position {made.journal_position}, step {made.step}, {made.size_bytes} bytes"
    _tell(json_output, made, f"checkpoint {made.number} of learner {learner_id}: {place}")


def checkpoints(context: typer.Context, learner_id: LearnerId, json_output: AsJson = False) -> None:
    """List a learner's checkpoints, newest first, and the journal positions that it can be restored to."""
    with session(context).connect() as client:
        listed = client.get_learner(learner_id).checkpoints()
    if json_output:
        typer.echo(as_json(listed))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("checkpoint", "position", "step", "examples", "bytes"):
        table.add_column(heading, justify="right")
    for heading in ("created", "kept"):
        table.add_column(heading)
    for item in listed:
        table.add_row(
            *(str(value) for value in (item.number, item.journal_position, item.step, item.examples, item.size_bytes)),
            moment(item.create_time),
            "until deleted" if item.pinned else "until newer ones replace it",
        )
    console = output()
    console.print(table)
    console.print(
        f"Restorable besides: journal positions {listed.first_restorable_position} to {listed.last_restorable_position}"
    )


def delete_checkpoint(
    context: typer.Context,
    learner_id: LearnerId,
    number: Annotated[int, typer.Argument(min=1, help="Which checkpoint; `checkpoints` lists them.")],
    yes: Yes = False,
) -> None:
    """Delete a checkpoint."""
    _confirm(yes, f"Delete checkpoint {number} of learner {learner_id} for good?")
    with session(context).connect() as client:
        client.get_learner(learner_id).delete_checkpoint(number)
    messages().print(f"deleted checkpoint {number} of learner {learner_id}")


def forget_producer(
    context: typer.Context,
    learner_id: LearnerId,
    producer: Annotated[str, typer.Argument(help="Its name; `show` lists those that the learner has.")],
    yes: Yes = False,
) -> None:
    """Give a producer's name free: its next stream begins at sequence 1."""
    _confirm(yes, f"Forget how far producer {producer} of learner {learner_id} has come? Its open stream ends.")
    with session(context).connect() as client:
        client.get_learner(learner_id).forget_producer(producer)
    messages().print(f"forgot producer {producer} of learner {learner_id}")


def restore(
    context: typer.Context,
    learner_id: LearnerId,
    number: Annotated[
        int | None, typer.Option("--checkpoint", metavar="NUMBER", min=1, help="Go back to this checkpoint.")
    ] = None,
    position: Annotated[
        int | None, typer.Option("--position", min=0, help="Go back to this position of the journal.")
    ] = None,
    yes: Yes = False,
    json_output: AsJson = False,
) -> None:
    """Take a learner back to an earlier state; what it was sent since is not learnt again."""
    if (number is None) == (position is None):
        raise typer.BadParameter("give either --checkpoint or --position; `cbp learners checkpoints` lists them")
    place = f"journal position {position}" if number is None else f"checkpoint {number}"
    _confirm(yes, f"Take learner {learner_id} back to {place}? It forgets what it has learnt since.")
    with session(context).connect() as client:
        info = client.get_learner(learner_id).restore(checkpoint=number, position=position)
    _tell(json_output, info, f"restored learner {info.id} to {place}: step {info.progress.step}")


def resume(
    context: typer.Context,
    learner_id: LearnerId,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate from the failed batch on.")] = None,
    skip_batch: Annotated[
        bool, typer.Option("--skip-batch", help="Leave the failed batch out rather than learn it again.")
    ] = False,
    json_output: AsJson = False,
) -> None:
    """Let a quarantined learner go on with the batch that it could not learn, and those behind it."""
    with session(context).connect() as client:
        info = client.get_learner(learner_id).resume(lr=lr, skip_batch=skip_batch)
    _tell(json_output, info, f"resumed learner {info.id}")


def reset(
    context: typer.Context,
    learner_id: LearnerId,
    fraction: Annotated[
        float, typer.Option("--fraction", help="Share of each layer's units, more than 0, at most 1; only mature ones.")
    ],
    layers: Annotated[str, typer.Option("--layers", help="Hidden layers: all, first, or such as 0,2.")] = "all",
    json_output: AsJson = False,
) -> None:
    """Reset the units of least utility by hand, between two steps."""
    with session(context).connect() as client:
        replacements = client.get_learner(learner_id).reset_units(layers.split(","), fraction)
    units = ", ".join(f"{layer} {count}" for layer, count in replacements.items())
    _tell(json_output, replacements, f"reset units of learner {learner_id}: {units or 'none'}")


def export(
    context: typer.Context,
    learner_id: LearnerId,
    file: Annotated[Path, typer.Argument(help="Where to; replaced once all is there.")],
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors (the whole state, for `import`), onnx or torch_export (the network alone). By default "
            "what the file's name says: .safetensors, .onnx or .pt2.",
        ),
    ] = None,
) -> None:
    """Write a learner to a file."""
    format = _format(file, format_name)
    with session(context).connect() as client:
        learner = client.get_learner(learner_id)
        try:
            size = learner.export(file, format=format)
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror or error}") from None
    messages().print(f"wrote learner {learner_id} to {file}: {format}, {size} bytes")


def import_learner(
    context: typer.Context,
    learner_id: LearnerId,
    file: Annotated[Path, typer.Argument(help="What `export` wrote as safetensors.")],
    durability: DurabilityOption = None,
    json_output: AsJson = False,
) -> None:
    """Create a learner from an exported file, with all its state."""
    wanted = level(durability)
    with session(context).connect() as client:
        try:
            info = client.import_learner(learner_id, file, durability=wanted).info
        except OSError as error:
            raise CommandError(f"{file}: {error.strerror or error}") from None
    _tell(json_output, info, f"created learner {info.id} from {file}, at step {info.progress.step}")


def delete(context: typer.Context, learner_id: LearnerId, yes: Yes = False, json_output: AsJson = False) -> None:
    """Delete a learner; for a while it can be undeleted."""
    _confirm(yes, f"Delete learner {learner_id}?")
    with session(context).connect() as client:
        info = client.delete_learner(learner_id)
    undo = (
        f"until {moment(info.purge_time)} cbp learners undelete {learner_id} brings it back" if info.purge_time else ""
    )
    _tell(json_output, info, f"deleted learner {learner_id}{'; ' if undo else ''}{undo}")


def undelete(context: typer.Context, learner_id: LearnerId, uid: Uid = None, json_output: AsJson = False) -> None:
    """Bring a deleted learner back as it was."""
    with session(context).connect() as client:
        info = client.undelete_learner(learner_id, uid=uid).info
    _tell(json_output, info, f"learner {info.id} is back, at step {info.progress.step}")


def purge(context: typer.Context, learner_id: LearnerId, uid: Uid = None, yes: Yes = False) -> None:
    """Remove a deleted learner, its checkpoints and its journal for good."""
    which = f"the deleted learner {learner_id} with uid {uid}" if uid else f"every deleted learner {learner_id}"
    _confirm(yes, f"Remove {which} for good?")
    with session(context).connect() as client:
        client.purge_learner(learner_id, uid=uid)
    messages().print(f"purged {which}")


COMMANDS: dict[str, Callable[..., None]] = {
    "fork": fork,
    "checkpoint": checkpoint,
    "checkpoints": checkpoints,
    "delete-checkpoint": delete_checkpoint,
    "forget-producer": forget_producer,
    "restore": restore,
    "resume": resume,
    "reset": reset,
    "export": export,
    "import": import_learner,
    "delete": delete,
    "undelete": undelete,
    "purge": purge,
}


def _confirm(yes: bool, question: str) -> None:
    """Ask on standard error: results on standard output can be piped."""
    if yes:
        return
    typer.echo(f"{question} [y/N] ", nl=False, err=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody is there to answer
        typer.echo(err=True)
    if answer.strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was done; answer y, or give --yes")


def _tell(json_output: bool, record: Any, sentence: str) -> None:
    if json_output:
        typer.echo(as_json(record))
    else:
        messages().print(sentence, soft_wrap=True)


def _format(file: Path, name: str | None) -> ExportFormat:
    given = next((word for word in _FORMATS if word == name), None)
    if name is not None and given is None:
        raise typer.BadParameter(f"--format must be one of {', '.join(_FORMATS)}, not {name}")
    try:
        return export_format(file, given)
    except InvalidArgument as error:
        raise typer.BadParameter(f"--{error}") from None
