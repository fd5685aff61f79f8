"""All methods against loss of plasticity on one stream: `python -m experiments.methods`, or `make compare-methods`.

A perceptron of three hidden layers of tanh reads 8×8 digits, four at a time, whose pixels get a new order for each
task; the metric is the accuracy of predictions made before the update. Network and stream are the same for all, and the
learning rate unless a name or a setting says another. What is a method's own was chosen among `Contender.grid` by
`search`, on seeds that the comparison does not use.

Shapes: S seeds, T tasks.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD

from cbp import MethodSpec, ResetSpec, make_methods
from cbp.spec.learner_spec import (
    L2InitSpec,
    ReDoSpec,
    SelectiveWeightReinitializationSpec,
    SelfNormalizedResetsSpec,
    ShrinkAndPerturbSpec,
    UpgdSpec,
)
from experiments.figures import draw_dots, finish_dots, new_figure, save
from experiments.statistics import Interval, interval, paired_difference
from experiments.streams import Stream
from experiments.tables import fill, markdown, show

STREAM = Stream(kind="permuted_inputs", images="digits_8x8", examples=1796)
TASKS, BATCH, LR, WIDTH = 36, 4, 0.15, 100
SEEDS, SEARCH_SEEDS = (0, 1, 2, 3, 4), (100, 101)
QUARTER = TASKS // 4
RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"

Settings = Mapping[str, Any]


class ConcatenatedReLU(nn.Module):
    """CReLU: [relu(x), relu(−x)] (Abbas et al. 2023)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, U] → [B, 2 U]"""
        return torch.relu(torch.cat([x, -x], dim=-1))


def perceptron(between: Callable[[], Sequence[nn.Module]] = lambda: [nn.Tanh()], width: int = WIDTH) -> nn.Module:
    """Three hidden layers; `between` makes what follows each."""
    layers: list[nn.Module] = []
    inputs = STREAM.features
    for _ in range(3):
        following = between()
        layers += [nn.Linear(inputs, width), *following]
        inputs = 2 * width if any(isinstance(layer, ConcatenatedReLU) for layer in following) else width
    return nn.Sequential(*layers, nn.Linear(inputs, STREAM.outputs))


def layer_normalized() -> nn.Module:
    return perceptron(lambda: [nn.LayerNorm(WIDTH), nn.Tanh()])


def concatenated() -> nn.Module:
    """With 72 units a layer, it has about as many parameters as the others."""
    return perceptron(lambda: [ConcatenatedReLU()], width=72)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One method, with the settings to choose from; the first of them is the one chosen."""

    grid: tuple[Settings, ...] = ({},)
    specs: Callable[[Settings], Sequence[MethodSpec]] = lambda _settings: ()
    resets: Callable[[Settings], ResetSpec | None] = lambda _settings: None
    network: Callable[[], nn.Module] = perceptron
    lr: float = LR


def _of(spec: Callable[..., MethodSpec], **fixed: Any) -> Callable[[Settings], Sequence[MethodSpec]]:
    return lambda settings: (spec(**settings, **fixed),)


def _cbp(settings: Settings) -> ResetSpec:
    return ResetSpec(replacement_rate=settings["replacement_rate"])


CONTENDERS: Mapping[str, Contender] = {
    "backprop": Contender(),
    "backprop, its own rate": Contender(grid=tuple({"lr": value} for value in (0.06, 0.03, 0.01))),
    "L2": Contender(grid=tuple({"weight_decay": value} for value in (1e-3, 1e-4, 1e-2))),
    "L2 Init": Contender(grid=tuple({"strength": value} for value in (1e-2, 1e-3, 1e-4, 3e-2)), specs=_of(L2InitSpec)),
    "shrink and perturb": Contender(
        grid=(
            {"shrink": 1 - 1e-3, "perturb": 3e-2},
            {"shrink": 1 - 1e-3, "perturb": 1e-2},
            {"shrink": 1 - 3e-3, "perturb": 3e-2},
            {"shrink": 0.9, "perturb": 0.1, "interval": 1000},
            {"shrink": 1 - 1e-4, "perturb": 1e-3},
            {"shrink": 1 - 1e-4, "perturb": 3e-3},
            {"shrink": 1 - 1e-4, "perturb": 1e-2},
            {"shrink": 1 - 1e-5, "perturb": 3e-3},
            {"shrink": 1 - 1e-5, "perturb": 3e-4},
        ),
        specs=_of(ShrinkAndPerturbSpec),
    ),
    "CBP": Contender(grid=tuple({"replacement_rate": value} for value in (1e-3, 1e-4, 1e-2)), resets=_cbp),
    "ReDo": Contender(
        grid=tuple({"dormant_threshold": value} for value in (0.1, 0.025, 0.25)), specs=_of(ReDoSpec, interval=100)
    ),
    "self-normalised resets": Contender(
        grid=tuple({"rejection_level": value} for value in (1e-3, 1e-4, 1e-2)), specs=_of(SelfNormalizedResetsSpec)
    ),
    "UPGD": Contender(
        grid=tuple({"noise": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)),
        specs=_of(UpgdSpec),
        lr=2 * LR,  # a weight without utility takes half of it
    ),
    "SWR": Contender(
        grid=tuple({"replacement_rate": value} for value in (3e-1, 1e-1, 1e-2, 1e-3)),
        specs=_of(SelectiveWeightReinitializationSpec),
    ),
    "LayerNorm": Contender(network=layer_normalized),
    "CReLU at 0.03": Contender(network=concatenated, lr=0.03),  # it diverges at the others' rate
    "CBP + L2 Init": Contender(
        grid=tuple({"replacement_rate": rate, "strength": 1e-2} for rate in (1e-4, 1e-3)),
        resets=_cbp,
        specs=lambda settings: (L2InitSpec(strength=settings["strength"]),),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One learner's life."""

    contender: str
    settings: Settings
    seed: int
    tasks: int

    @property
    def key(self) -> str:
        return json.dumps([self.contender, dict(self.settings), self.seed, self.tasks], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    run: Run
    accuracy: tuple[float, ...]
    """[T] of the predictions made before the update; NaN from where it diverged."""
    step_seconds: float
    """Processor time of one step."""


def live(run: Run) -> Outcome:
    """Trains one learner from its first task to its last."""
    contender = CONTENDERS[run.contender]
    torch.manual_seed(run.seed)
    module = contender.network()
    lr = run.settings.get("lr", contender.lr)
    optimizer = SGD(module.parameters(), lr=lr, weight_decay=run.settings.get("weight_decay", 0.0))
    resets = contender.resets(run.settings)
    methods = make_methods(contender.specs(run.settings), module, optimizer, resets=resets, seed=run.seed)
    accuracy, steps, began = [], 0, time.process_time()
    for number in range(run.tasks):
        examples, targets = STREAM.task(run.seed, number)
        features, labels = torch.from_numpy(examples), torch.from_numpy(targets)
        right = 0
        for start in range(0, len(labels), BATCH):
            expected = labels[start : start + BATCH]
            outputs = module(features[start : start + BATCH])
            right += int((outputs.argmax(dim=1) == expected).sum())
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, expected).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for method in methods:
                method.step()
            steps += 1
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
        accuracy.append(right / len(labels) if finite else float("nan"))
    return Outcome(run=run, accuracy=tuple(accuracy), step_seconds=(time.process_time() - began) / steps)


def compared() -> list[Run]:
    return [
        Run(contender=name, settings=contender.grid[0], seed=seed, tasks=TASKS)
        for seed in SEEDS
        for name, contender in CONTENDERS.items()
    ]


def searched() -> list[Run]:
    return [
        Run(contender=name, settings=settings, seed=seed, tasks=TASKS)
        for seed in SEARCH_SEEDS
        for name, contender in CONTENDERS.items()
        for settings in contender.grid
        if len(contender.grid) > 1
    ]


def read(path: Path) -> dict[str, Outcome]:
    """Outcomes by their run's key, from a file of one JSON object per line."""
    outcomes = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        plain = json.loads(line)
        run = Run(**plain["run"])
        accuracy = tuple(float("nan") if value is None else value for value in plain["accuracy"])
        outcomes[run.key] = Outcome(run=run, accuracy=accuracy, step_seconds=plain["step_seconds"])
    return outcomes


def append(path: Path, outcome: Outcome) -> None:
    run = outcome.run
    plain = {
        "run": {
            "contender": run.contender,
            "settings": dict(run.settings),
            "seed": run.seed,
            "tasks": run.tasks,
        },
        "accuracy": [None if np.isnan(value) else round(value, 6) for value in outcome.accuracy],
        "step_seconds": round(outcome.step_seconds, 7),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


def execute(runs: Iterable[Run], path: Path, processes: int, minutes: float | None) -> bool:
    """Runs what is missing in the file; False if time ran out before all had begun."""
    known = read(path)
    missing = [run for run in runs if run.key not in known]
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        going: set[Future[Outcome]] = set()
        while missing or going:
            while missing and len(going) < processes and (deadline is None or time.monotonic() < deadline):
                going.add(pool.submit(live, missing.pop(0)))
            if not going:
                return False
            done, going = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                append(path, future.result())
                print(f"{len(missing) + len(going)} runs to go", file=sys.stderr, flush=True)
    return True


def accuracies(outcomes: Iterable[Outcome], name: str) -> NDArray[np.float64]:
    """[S, T] of a contender with its chosen settings, seeds ascending."""
    found = {
        outcome.run.seed: outcome.accuracy
        for outcome in outcomes
        if outcome.run.contender == name and outcome.run.settings == dict(CONTENDERS[name].grid[0])
    }
    return np.array([found[seed] for seed in SEEDS])


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: accuracy in per cent over the first and last quarter of tasks, and what a step costs."""
    plain = accuracies(outcomes, "backprop")
    rows = []
    for name in ranked(outcomes):
        of_name = accuracies(outcomes, name)
        difference = _in_percent(paired_difference(_last(of_name), _last(plain)))
        rows.append(
            [
                name,
                _plain(CONTENDERS[name].grid[0]) or "–",
                show(_in_percent(interval(_first(of_name))), 1),
                show(_in_percent(interval(_last(of_name))), 1),
                "–" if name == "backprop" else show(difference, 1, signed=True),
                f"{_cost(outcomes, name) / _cost(outcomes, 'backprop'):.1f}",
            ]
        )
    return markdown(
        ("method", "settings", "first quarter", "last quarter", "last − backprop's", "cost of a step"), rows
    )


def search_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: the mean accuracy of each setting over the last quarter of tasks, in per cent."""
    rows = []
    for name, contender in CONTENDERS.items():
        for settings in contender.grid if len(contender.grid) > 1 else ():
            found = [
                outcome.accuracy
                for outcome in outcomes
                if outcome.run.contender == name and outcome.run.settings == dict(settings)
            ]
            mean = 100 * float(_last(np.array(found)).mean())
            rows.append([name, _plain(settings), "diverged" if np.isnan(mean) else f"{mean:.1f}"])
    return markdown(("method", "settings", "last quarter"), rows)


def ranked(outcomes: Sequence[Outcome]) -> list[str]:
    """Names, best first by the last quarter."""
    return sorted(CONTENDERS, key=lambda name: -float(np.nan_to_num(_last(accuracies(outcomes, name))).mean()))


def picture(outcomes: Sequence[Outcome]) -> Figure:
    names = ranked(outcomes)
    figure = new_figure(8.5, 5.2)
    axes = figure.subplots()
    quarters = {"last quarter of tasks": _last, "first quarter of tasks": _first}
    draw_dots(
        axes,
        names,
        {
            title: [_in_percent(interval(of(accuracies(outcomes, name)))) for name in names]
            for title, of in quarters.items()
        },
    )
    axes.legend(loc="lower right", frameon=False)
    finish_dots(
        axes, "Methods on permuted 8×8 digits", "online accuracy in per cent, mean and 95 % interval over 5 seeds"
    )
    return figure


def _last(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(accuracy[:, -QUARTER:].mean(axis=1))


def _first(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(accuracy[:, :QUARTER].mean(axis=1))


def _cost(outcomes: Sequence[Outcome], name: str) -> float:
    """Median processor time of a step."""
    return float(
        np.median([one.step_seconds for one in outcomes if one.run.contender == name and one.run.seed in SEEDS])
    )


def _in_percent(value: Interval) -> Interval:
    return Interval(100 * value.mean, 100 * value.half_width, value.count)


def _plain(settings: Settings) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in settings.items())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
OutputOption = Annotated[Path, typer.Option(help="Where runs, table and picture are kept.")]
MinutesOption = Annotated[float | None, typer.Option(help="Begin no run after so long; exit status 3, go on later.")]
ProcessesOption = Annotated[int, typer.Option(min=1)]


@app.command()
def compare(
    output: OutputOption = Path("experiments-output/methods"),
    processes: ProcessesOption = 2,
    minutes: MinutesOption = None,
) -> None:
    """Run every method with its chosen settings, and write the table and the picture."""
    path = output / "methods.jsonl"
    if not execute(compared(), path, processes, minutes):
        raise typer.Exit(3)
    outcomes = list(read(path).values())
    (output / "methods.md").write_text(table(outcomes), encoding="utf-8")
    save(picture(outcomes), output / "methods.png")
    print(table(outcomes))


@app.command()
def search(
    output: OutputOption = Path("experiments-output/methods"),
    processes: ProcessesOption = 2,
    minutes: MinutesOption = None,
) -> None:
    """Run every setting of every grid on the search's own seeds, and print what came of it."""
    path = output / "methods-search.jsonl"
    if not execute(searched(), path, processes, minutes):
        raise typer.Exit(3)
    print(search_table(_searched(output)))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Directory of methods.jsonl and methods-search.jsonl.")] = RESULTS,
) -> None:
    """Write tables and picture into the document."""
    outcomes = list(read(results / "methods.jsonl").values())
    tables = {"methods": table(outcomes), "methods_search": search_table(_searched(results))}
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
    save(picture(outcomes), DOCUMENT.parent / "images" / "methods.png")


def _searched(results: Path) -> list[Outcome]:
    return list(read(results / "methods-search.jsonl").values())


if __name__ == "__main__":
    app()
