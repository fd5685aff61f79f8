"""The experiments' command line: `python -m experiments run|plan|report|forgetting|service`."""

import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple, get_args

import pyarrow.parquet as pq
import torch
import typer

from cbp import compile_ahead
from cbp_client.demo.local_server import local_server
from experiments import forgetting as limits_on_forgetting
from experiments import units
from experiments.archive import Archive
from experiments.cells import Cell
from experiments.figures import save
from experiments.findings import FINDINGS, Protocol, tanh_cells
from experiments.images import DataError
from experiments.planning import planned
from experiments.report import Report, write_figures
from experiments.results import MissingResultsError, Results, write
from experiments.results import collect as collected
from experiments.runner import Progress, execute, runs_of
from experiments.service import MOST_TASKS, ROUNDING, comparison, experiment, in_process, over_grpc, picture
from experiments.status_page import PIXELS, Chart, chart_table, photograph
from experiments.tables import fill, markdown
from experiments.watching import PanelCurve, compare_panels, panel_picture, panel_table, watched_by_prometheus

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reproduce the paper's findings, and answer what it left open.",
)

ProtocolOption = Annotated[str, typer.Option(help="quick, reported or full.")]
FindingsOption = Annotated[str, typer.Option(help="Findings, separated by commas; all of them by default.")]
DirectoryOption = Annotated[Path, typer.Option(help="Where runs are kept.")]
MnistOption = Annotated[
    Path | None,
    typer.Option(envvar="CBP_MNIST", help="Directory of MNIST's IDX files, to use in place of the enlarged digits."),
]
EarlierOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A tidy table of runs made before: what it has is not run again, and goes into the new one.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]

PROTOCOLS: dict[str, Protocol] = {name: name for name in get_args(Protocol)}
_SECONDS_BETWEEN_LINES = 10.0


class ResultsPaths(NamedTuple):
    """Where `collect` writes to."""

    results: Path
    units: Path


def results_paths(directory: Path, protocol: str) -> ResultsPaths:
    return ResultsPaths(directory / f"{protocol}.parquet", directory / f"{protocol}-units.parquet")


def chosen_cells(protocol: str, findings: str, mnist: Path | None) -> dict[str, list[Cell]]:
    """The cells of each finding named. Raises `typer.BadParameter`."""
    if protocol not in PROTOCOLS:
        raise typer.BadParameter(f"{protocol!r}: expected one of {', '.join(PROTOCOLS)}", param_hint="--protocol")
    names = [name.strip() for name in findings.split(",")] if findings else list(FINDINGS)
    for name in names:
        if name not in FINDINGS:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(FINDINGS)}", param_hint="--findings")
    return {name: FINDINGS[name].cells(PROTOCOLS[protocol], "mnist" if mnist else None) for name in names}


class _Lines:
    """Writes a line every few seconds, and one at the end of each finding."""

    def __init__(self, name: str) -> None:
        """`name` begins each line."""
        self._name = name
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next or progress.runs_done == progress.runs:
            print(f"{self._name:<26} {progress}", file=sys.stderr, flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES


@app.command()
def run(
    protocol: ProtocolOption = "quick",
    findings: FindingsOption = "",
    output: DirectoryOption = Path("experiments-output"),
    earlier: EarlierOption = None,
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
    known = Results.read(earlier) if earlier else None
    try:
        for place, (name, chosen) in enumerate(cells.items(), start=1):
            runs = [run for run in runs_of(chosen) if known is None or not known.has_run(run)]
            lines = _Lines(f"{place}/{len(cells)} {name}")
            if not execute(runs, archive, device=device, deadline=deadline, mnist=mnist, on_progress=lines):
                raise typer.Exit(3)
    except DataError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def collect(
    protocol: ProtocolOption = "quick",
    output: DirectoryOption = Path("experiments-output"),
    results: Annotated[Path | None, typer.Option(help="Directory to write to; by default that of the runs.")] = None,
    earlier: EarlierOption = None,
    mnist: MnistOption = None,
) -> None:
    """Gather what runs there are in a tidy table, PROTOCOL.parquet, and single tanh units in PROTOCOL-units.parquet."""
    archive = Archive(output / "runs")
    by_finding = chosen_cells(protocol, "", mnist)
    known = ResultsPaths(earlier, earlier.with_name(f"{earlier.stem}-units.parquet")) if earlier else None
    try:
        table = collected(
            [cell for cells in by_finding.values() for cell in cells],
            archive,
            pq.read_table(known.results) if known else None,
        )
    except MissingResultsError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    known_units = pq.read_table(known.units) if known and known.units.is_file() else None
    paths = results_paths(results or output, protocol)
    write(table, paths.results)
    write(units.describe(tanh_cells(by_finding["utilities_tanh"]), archive, known_units), paths.units)
    for path in paths:
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


@app.command()
def report(
    protocol: ProtocolOption = "quick",
    results: DirectoryOption = Path("experiments-output"),
    figures: Annotated[
        Path | None, typer.Option(help="Directory for pictures; by default that of the results.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option(help="Write the tables between their marks in this document; repeatable.")
    ] = None,
    mnist: MnistOption = None,
) -> None:
    """Draw the pictures and write the tables, from the tidy table that `collect` wrote."""
    paths = results_paths(results, protocol)
    if not paths.results.is_file():
        print(f"{paths.results} is not there; run and collect first", file=sys.stderr)
        raise typer.Exit(2)
    made = Report(
        Results.read(paths.results),
        PROTOCOLS[protocol],
        "mnist" if mnist else None,
        pq.read_table(paths.units) if paths.units.is_file() else None,
    )
    tables = made.tables()
    for path in document or []:
        path.write_text(fill(path.read_text(), tables))
    if not document:
        for name, table in tables.items():
            print(f"## {name}\n\n{table}")
    for path in write_figures(made, figures or results):
        print(path)


@app.command()
def forgetting(
    seeds: Annotated[int, typer.Option(min=2)] = 8,
    tasks: Annotated[int, typer.Option(min=10)] = 50,
    scored: Annotated[int, typer.Option(min=1, help="The last so many tasks count.")] = 20,
    document: Annotated[Path | None, typer.Option(help="Write the table between its marks in this document.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure what limits on resets do to what is remembered of earlier tasks, and to how new ones are learnt."""
    if scored + max(limits_on_forgetting.LAGS) > tasks:
        raise typer.BadParameter(f"{scored}: too many of {tasks} tasks", param_hint="--scored")
    torch.set_num_threads(threads)
    compile_ahead()

    def show_progress(done: int) -> None:
        if done % 10 == 0:
            print(f"task {done}/{tasks}", file=sys.stderr, flush=True)

    table = limits_on_forgetting.table(limits_on_forgetting.measured(seeds, tasks, scored, show_progress))
    if document:
        document.write_text(fill(document.read_text(), {"forgetting": table}))
    else:
        print(table)


@app.command()
def service(
    server: Annotated[
        str | None, typer.Option(help="host:port of a running server; without it one is started.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=2, max=MOST_TASKS)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output: DirectoryOption = Path("experiments-output"),
) -> None:
    """Run one experiment over gRPC, and the same in this process: both must give the same numbers.

    A server that is started here is watched as well: by a Prometheus, if one is installed, which is asked what the
    dashboard's panels ask, and on its status page, if there is a chromium. Exit status 1 if any numbers differ.
    """
    output.mkdir(parents=True, exist_ok=True)
    cells = experiment(tasks)
    torch.set_num_threads(1)  # as in the server, so that sums are made in the same order
    here = in_process(cells, seed)
    curves: list[PanelCurve] = []
    charts: list[Chart] = []
    with ExitStack() as stack:
        target = server
        if target is None:
            data = stack.enter_context(TemporaryDirectory())
            local = stack.enter_context(local_server(Path(data), output / "service.log"))
            target = local.grpc_target
            print(f"server {local.grpc_target}, status page {local.http_url}/", file=sys.stderr)
        prometheus, browser = (None if server else _installed(name) for name in ("prometheus", "chromium"))
        watch = stack.enter_context(watched_by_prometheus(prometheus, local.http_url)) if prometheus else None
        served = over_grpc(
            target, cells, seed, lambda name, sent: print(f"{name:<24} task {sent}/{tasks}", file=sys.stderr)
        )
        if watch:
            curves = watch.curves(cells[0].steps)
        if browser:
            charts = photograph(browser, local.http_url, here, output)
    print(comparison(served, here))
    same = all(one.difference(other) <= ROUNDING for one, other in zip(served, here, strict=True))
    save(picture(served, here), output / "service.png")
    if curves:
        compared = compare_panels(curves, here)
        print(panel_table(compared))
        same = same and all(one.difference is None or one.difference <= ROUNDING for one in compared)
        save(panel_picture(curves, here), output / "service_panels.png")
    if charts:
        print(chart_table(charts))
        same = same and all(chart.off <= PIXELS for chart in charts)
    for path in sorted(output.glob("service*.png")):
        print(path)
    if not same:
        print("The server's numbers differ; does it run another engine, or on another machine?", file=sys.stderr)
        raise typer.Exit(1)


def _installed(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        print(f"{program} is not installed; what it would show is left out", file=sys.stderr)
    return path


@app.command()
def plan(
    protocol: ProtocolOption = "full",
    findings: FindingsOption = "",
    mnist: MnistOption = None,
    device: DeviceOption = "cpu",
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Say what a protocol runs, and how long it is expected to take here.

    Every network runs on its stream for a moment; the expectation is from these rates, so other work on the machine
    disturbs it.
    """
    torch.set_num_threads(threads)
    compile_ahead()
    try:
        rows, total = planned(chosen_cells(protocol, findings, mnist), device, mnist)
    except DataError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    where = f"{threads} threads" if device == "cpu" else device
    print(markdown(("finding", "cells", "runs", "steps", f"expected hours, {where}"), rows))
    print(f"{total / 3600:.1f} hours in all, of which what findings have in common is run once.")


if __name__ == "__main__":
    app()
