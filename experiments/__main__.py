"""The experiments' command line: `python -m experiments run|plan|report|service`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from cbp import compile_ahead
from experiments.archive import Archive
from experiments.cells import Cell
from experiments.findings import FINDINGS, Protocol
from experiments.images import DataError
from experiments.runner import Progress, execute, runs_of, step_cost

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Reproduce the paper's findings, and answer what it left open.")

ProtocolOption = Annotated[str, typer.Option(help="quick, reported or full.")]
FindingsOption = Annotated[str, typer.Option(help="Findings, separated by commas; all of them by default.")]
DirectoryOption = Annotated[Path, typer.Option(help="Where runs are kept.")]
MnistOption = Annotated[
    Path | None,
    typer.Option(envvar="CBP_MNIST", help="Directory of MNIST's IDX files, to use in place of the enlarged digits."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]

_SECONDS_BETWEEN_LINES = 10.0


def chosen_cells(protocol: str, findings: str, mnist: Path | None) -> dict[str, list[Cell]]:
    """The cells of each finding named. Raises `typer.BadParameter`."""
    protocols: dict[str, Protocol] = {"quick": "quick", "reported": "reported", "full": "full"}
    if protocol not in protocols:
        raise typer.BadParameter(f"{protocol!r}: expected one of {', '.join(protocols)}", param_hint="--protocol")
    names = [name.strip() for name in findings.split(",")] if findings else list(FINDINGS)
    for name in names:
        if name not in FINDINGS:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(FINDINGS)}", param_hint="--findings")
    return {name: FINDINGS[name].cells(protocols[protocol], "mnist" if mnist else None) for name in names}


class _Lines:
    """Writes a line every few seconds, and one at the end of each finding."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next or progress.runs_done == progress.runs:
            print(f"{self._name:<22} {progress}", file=sys.stderr, flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES


@app.command()
def run(
    protocol: ProtocolOption = "quick",
    findings: FindingsOption = "",
    output: DirectoryOption = Path("experiments-output"),
    mnist: MnistOption = None,
    device: DeviceOption = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of the compiled engine; learners are shared out.")] = 2,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after about so long; the same command then goes on. Exit status 3.")
    ] = None,
) -> None:
    """Run what is missing. It can be interrupted at any time, and goes on from there."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    cells = chosen_cells(protocol, findings, mnist)
    torch.set_num_threads(threads)
    compile_ahead()
    archive = Archive(output / "runs")
    try:
        for name, chosen in cells.items():
            runs = runs_of(chosen)
            if not execute(
                runs, archive, device=device, deadline=deadline, mnist=mnist, on_progress=_Lines(name)
            ):
                raise typer.Exit(3)
    except DataError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def plan(
    protocol: ProtocolOption = "full",
    findings: FindingsOption = "",
    mnist: MnistOption = None,
) -> None:
    """Say what would be run."""
    for name, cells in chosen_cells(protocol, findings, mnist).items():
        runs = runs_of(cells)
        steps = sum(run.cell.steps for run in runs)
        cost = sum(run.cell.steps * step_cost(run.cell) for run in runs)
        print(f"{name:<22} {len(cells):4} cells {len(runs):5} runs {steps:14,} steps {cost:.3g}")


if __name__ == "__main__":
    app()
