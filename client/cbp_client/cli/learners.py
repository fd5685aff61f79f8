"""cbp learners: list, create, show and change. What saves, copies and removes them is in lifecycle.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from cbp_client.cli.session import (
    CommandError,
    WholeHelp,
    as_json,
    messages,
    moment,
    number,
    output,
    percent,
    session,
)
from cbp_client.types import Durability, LearnerInfo, PlasticitySample, Quarantine, Trainability

app = typer.Typer(
    cls=WholeHelp,
    rich_markup_mode=None,
    help="List, create, change, save, copy and delete learners.",
    no_args_is_help=True,
)

LearnerId = Annotated[str, typer.Argument(metavar="ID", help="The learner's id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DurabilityOption = Annotated[
    str | None,
    typer.Option(
        "--durability",
        metavar="LEVEL",
        help="What an acknowledged batch survives: fsync power loss, os a crash of the server, none nothing before the "
        "next checkpoint.",
    ),
]
Learning = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", help="Weight decay.")]
Momentum = Annotated[float | None, typer.Option("--momentum", help="Momentum, for sgd.")]
Layers = Annotated[
    str | None,
    typer.Option(
        "--resets", metavar="LAYERS", help="Hidden layers whose units are reset: all, first, none, or such as 0,2."
    ),
]
Rate = Annotated[
    float | None, typer.Option("--replacement-rate", help="Share of a layer's mature units replaced at each step.")
]
Maturity = Annotated[
    int | None, typer.Option("--maturity-threshold", help="Steps during which a new unit is protected.")
]
DecayRate = Annotated[float | None, typer.Option("--decay-rate", help="Decay of the running utility.")]
Utility = Annotated[
    str | None, typer.Option("--utility", help="What a unit's utility is, such as adaptable_contribution.")
]
Compensation = Annotated[
    bool | None,
    typer.Option(
        "--bias-compensation/--no-bias-compensation",
        help="Whether the next layer's bias takes over a removed unit's mean contribution.",
    ),
]
Interval = Annotated[
    int | None,
    typer.Option("--monitoring-interval", help="Steps between two plasticity samples; 0 turns them off."),
]
TestInterval = Annotated[
    int | None,
    typer.Option("--trainability-interval", help="Steps between two tests of trainability on a copy; 0: none."),
]


@app.command("list")
def list_learners(
    context: typer.Context,
    deleted: Annotated[bool, typer.Option("--deleted", help="Also list those that can be undeleted.")] = False,
    json_output: AsJson = False,
) -> None:
    """List all learners."""
    with session(context).connect() as client:
        infos = [learner.info for learner in client.list_learners(show_deleted=deleted)]
    if json_output:
        typer.echo(as_json(infos))
        return
    table = Table("learner", "state", "network", "resets", box=None, pad_edge=False)
    for heading in ("step", "examples", "loss", "accuracy", "tasks"):
        table.add_column(heading, justify="right")
    for heading in ("purged", "uid") if deleted else ():
        table.add_column(heading)
    for info in infos:
        progress = info.progress
        table.add_row(
            info.id,
            info.state,
            _network(info),
            ",".join(info.spec["resets"]["layers"]),
            str(progress.step),
            str(progress.examples),
            number(progress.loss),
            percent(progress.accuracy),
            str(progress.task_count),
            *(("–" if info.purge_time is None else moment(info.purge_time), info.uid) if deleted else ()),
        )
    output().print(table)


@app.command("create")
def create(
    context: typer.Context,
    learner_id: LearnerId,
    network: Annotated[
        str | None,
        typer.Option(metavar="UNITS", help="Units of every layer from the features to the outputs: 64-100-100-10."),
    ] = None,
    activation: Annotated[str | None, typer.Option(help="Such as relu, leaky_relu, tanh.")] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, mse, huber or binary_cross_entropy.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, rmsprop, adam or adamw.")] = None,
    lr: Learning = None,
    weight_decay: WeightDecay = None,
    momentum: Momentum = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in one step; 0 makes every message one step.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial weights and every later draw.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 for mixed precision.")] = None,
    resets: Layers = None,
    replacement_rate: Rate = None,
    maturity_threshold: Maturity = None,
    decay_rate: DecayRate = None,
    utility: Utility = None,
    bias_compensation: Compensation = None,
    monitoring_interval: Interval = None,
    trainability_interval: TestInterval = None,
    durability: DurabilityOption = None,
    spec: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A JSON file with the whole spec, as `show --json` prints it; options override it."
        ),
    ] = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Succeed if the same learner exists.")] = False,
    json_output: AsJson = False,
) -> None:
    """Create a learner; what is left out takes the server's default."""
    flags = {
        "network": _without_none(_layers_of(network) | {"activation": activation}),
        "loss": _without_none({"kind": loss}),
        "optimizer": _without_none({"kind": optimizer, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}),
        "resets": _resets(resets, replacement_rate, maturity_threshold, decay_rate, utility, bias_compensation),
        "monitoring": _without_none({"interval": monitoring_interval, "trainability_interval": trainability_interval}),
        **_without_none({"batch_size": batch_size, "seed": seed, "precision": precision}),
    }
    whole = _merged(_read_spec(spec) if spec is not None else {}, flags)
    if "network" not in whole:
        raise typer.BadParameter("give --network, such as 64-100-100-10, or --spec")
    wanted = level(durability)
    with session(context).connect() as client:
        learner = client.create_learner(learner_id, **whole, durability=wanted, exist_ok=exist_ok)
    if json_output:
        typer.echo(as_json(learner.info))
    else:
        messages().print(f"created learner {learner.id}: {_network(learner.info)}")


@app.command("show")
def show(context: typer.Context, learner_id: LearnerId, json_output: AsJson = False) -> None:
    """Show a learner: its spec, its progress, its plasticity."""
    with session(context).connect() as client:
        learner = client.get_learner(learner_id)
        samples = learner.plasticity()
    if json_output:
        typer.echo(as_json({"learner": learner.info, "plasticity": samples[-1] if samples else None}))
        return
    console = output()
    console.print(_facts(learner.info))
    if learner.info.tasks:
        console.print(_tasks(learner.info))
    if samples:
        console.print(_layers(samples[-1]))
        if samples[-1].trainability is not None:
            console.print(_trainability(samples[-1].trainability))


@app.command("update")
def update(
    context: typer.Context,
    learner_id: LearnerId,
    lr: Learning = None,
    weight_decay: WeightDecay = None,
    momentum: Momentum = None,
    resets: Layers = None,
    replacement_rate: Rate = None,
    maturity_threshold: Maturity = None,
    decay_rate: DecayRate = None,
    utility: Utility = None,
    bias_compensation: Compensation = None,
    monitoring_interval: Interval = None,
    trainability_interval: TestInterval = None,
    durability: DurabilityOption = None,
    json_output: AsJson = False,
) -> None:
    """Change a live learner, between two of its steps."""
    changes = {
        "optimizer": _without_none({"lr": lr, "weight_decay": weight_decay, "momentum": momentum}),
        "resets": _resets(resets, replacement_rate, maturity_threshold, decay_rate, utility, bias_compensation),
        "monitoring": _without_none({"interval": monitoring_interval, "trainability_interval": trainability_interval}),
    }
    if not any(changes.values()) and durability is None:
        raise typer.BadParameter("name at least one setting to change")
    wanted = level(durability)
    with session(context).connect() as client:
        info = client.get_learner(learner_id).update(
            optimizer=changes["optimizer"],
            resets=changes["resets"],
            monitoring=changes["monitoring"],
            durability=wanted,
        )
    if json_output:
        typer.echo(as_json(info))
    else:
        messages().print(f"updated learner {info.id}")


def level(durability: str | None) -> Durability | None:
    """What --durability says."""
    known: tuple[Durability, ...] = get_args(Durability)
    for word in known:
        if durability == word:
            return word
    if durability is not None:
        raise typer.BadParameter(f"--durability must be one of {', '.join(known)}, not {durability}")
    return None


def _layers_of(network: str | None) -> dict[str, Any]:
    if network is None:
        return {}
    try:
        in_features, *hidden, out_features = (int(units) for units in network.split("-"))
    except ValueError:
        raise typer.BadParameter(
            f"--network must be units of at least two layers, such as 64-100-100-10, not {network}"
        ) from None
    return {"kind": "mlp", "in_features": in_features, "hidden": hidden, "out_features": out_features}


def _resets(
    layers: str | None,
    replacement_rate: float | None,
    maturity_threshold: int | None,
    decay_rate: float | None,
    utility: str | None,
    bias_compensation: bool | None,
) -> dict[str, Any]:
    return _without_none(
        {
            "layers": layers.split(",") if layers is not None else None,
            "replacement_rate": replacement_rate,
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
            "utility": utility,
            "bias_compensation": bias_compensation,
        }
    )


_SPEC_PARTS = frozenset(
    ("network", "loss", "optimizer", "batch_size", "seed", "precision", "resets", "methods", "monitoring")
)


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    for key in ("learner", "spec"):  # as `show --json` nests them
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict):
        raise CommandError(f"{path} must hold an object with network, loss, optimizer and so on")
    unknown = set(content) - _SPEC_PARTS
    if unknown:
        raise CommandError(f"{path}: {', '.join(sorted(unknown))} is not part of a spec")
    return content


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for part, entries in over.items():
        if isinstance(entries, Mapping):
            present = merged.get(part, {})
            entries = {**({"kind": present} if isinstance(present, str) else present), **entries}
            if not entries:
                continue
        merged[part] = entries
    return merged


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _network(info: LearnerInfo) -> str:
    network = info.spec["network"]
    activation = network.get("activation", "")
    if network["kind"] == "mlp":
        units = [network["in_features"], *network.get("hidden", []), network["out_features"]]
        return f"{'-'.join(map(str, units))} {activation}"
    name = network.get("name", network["kind"])  # an operator's architecture has one of its own
    return " ".join(filter(None, [name, _shape(network), "to", str(network["out_features"]), activation]))


def _shape(network: Mapping[str, Any]) -> str:
    """Of one example."""
    fields = ("in_channels", "height", "width") if "in_channels" in network else ("length", "in_features")
    return "x".join(map(str, network.get("shape") or [network[field] for field in fields if network.get(field)]))


def _facts(info: LearnerInfo) -> Table:
    progress, optimizer, resets = info.progress, dict(info.spec["optimizer"]), dict(info.spec["resets"])
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("learner", f"{info.id} ({info.state})")
    table.add_row("network", _network(info))
    table.add_row("loss", info.spec["loss"]["kind"])
    table.add_row("optimizer", f"{optimizer.pop('kind')} {_settings(optimizer)}")
    table.add_row("batch size", str(info.spec["batch_size"]))
    if info.spec.get("precision", "float32") != "float32":
        table.add_row("precision", info.spec["precision"])
    table.add_row("resets", f"{','.join(resets.pop('layers'))} {_settings(resets)}")
    for method in map(dict, info.spec.get("methods", ())):
        table.add_row("method", f"{method.pop('kind')} {_settings(method)}")
    table.add_row("durability", info.durability)
    table.add_row("created", moment(info.create_time))
    table.add_row("step", f"{progress.step}, after {progress.examples} examples, {progress.pending_examples} pending")
    table.add_row("online", f"loss {number(progress.loss)}, accuracy {percent(progress.accuracy)}")
    table.add_row("journal", f"position {info.journal_position}")
    table.add_row("engine", info.engine)
    if info.quarantine is not None:
        table.add_row("quarantine", _reason(info.id, info.quarantine))
    for producer in info.producers:
        position = f"applied {producer.applied_sequence}, durable {producer.durable_sequence}"
        table.add_row("producer", f"{producer.producer}: {position}")
    return table


def _reason(learner_id: str, quarantine: Quarantine) -> str:
    batch = f"batch {quarantine.sequence} of {quarantine.producer}, journal position {quarantine.journal_position}"
    return f"since {moment(quarantine.time)}: {batch}: {quarantine.reason}; go on with cbp learners resume {learner_id}"


def _settings(entries: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in entries.items())


def _tasks(info: LearnerInfo) -> Table:
    table = Table("task", title=f"Last tasks of {info.progress.task_count}", title_justify="left")
    for heading in ("first step", "examples", "loss", "accuracy"):
        table.add_column(heading, justify="right")
    for task in info.tasks[-10:]:
        table.add_row(
            task.task or "–", str(task.first_step), str(task.examples), number(task.loss), percent(task.accuracy)
        )
    return table


def _trainability(tested: Trainability) -> str:
    losses = f"loss {number(tested.loss)}, fresh {number(tested.fresh_loss)}, chance {number(tested.chance_loss)}"
    return f"Trainability at step {tested.step}: {percent(tested.score)} of a fresh network's ({losses})"


def _layers(sample: PlasticitySample) -> Table:
    table = Table("layer", title=f"Plasticity at step {sample.step}", title_justify="left")
    for heading in ("units", "dormant", "dead", "mean |w|", "effective rank", "replaced"):
        table.add_column(heading, justify="right")
    for layer in sample.layers:
        table.add_row(
            layer.layer,
            str(layer.units),
            percent(layer.dormant_fraction),
            percent(layer.dead_fraction),
            number(layer.mean_abs_weight),
            number(layer.effective_rank),
            "–" if layer.replacements is None else str(layer.replacements),
        )
    return table
