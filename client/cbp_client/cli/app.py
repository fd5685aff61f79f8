"""Puts the commands together; the commands themselves are in the modules beside this one."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cbp_client.cli import learners, lifecycle, predict, train, watch
from cbp_client.cli.session import CommandError, Session, WholeHelp, explained, print_error
from cbp_client.errors import CbpClientError
from cbp_client.target import DEFAULT_TARGET

app = typer.Typer(
    name="cbp",
    cls=WholeHelp,
    rich_markup_mode=None,  # whose tables cut what is wider than their columns
    help="Work with the continual learners of a cbp server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in lifecycle.COMMANDS.items():
    learners.app.command(name)(command)
app.add_typer(learners.app, name="learners")
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("watch")(watch.watch)


@app.command(
    "demo",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def demo(context: typer.Context) -> None:
    """Stream digits to three learners and see which of them keeps learning."""
    try:  # here, because it needs packages that other commands don't, and a second to load them
        from cbp_client.demo.command import demo as run_demo
    except ModuleNotFoundError as error:
        raise CommandError(f"the demo needs {error.name}: pip install 'cbp-client[demo]'") from None
    command = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command.command()(run_demo)
    command(args=context.args, prog_name="cbp demo")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("cbp-client"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    server: Annotated[
        str,
        typer.Option(
            "--server",
            envvar="CBP_SERVER",
            metavar="HOST:PORT",
            help="gRPC address of the server; port 50051 if there is none.",
        ),
    ] = DEFAULT_TARGET,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command; they stand before its name."""
    context.obj = Session(server)


def main() -> None:
    """Run the command line. Errors become one line on stderr and exit status 1; wrong usage is exit status 2."""
    try:
        app()
    except CbpClientError as error:
        print_error(explained(error))
        sys.exit(1)
    except CommandError as error:
        print_error(str(error))
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        sys.exit(1)
