"""Writes dashboards/plasticity.json and dashboards/service.json.

`python deploy/grafana/generate_dashboards.py` after a change here; a test compares the files with what this makes.
"""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

DASHBOARDS = Path(__file__).parent / "dashboards"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

_LEARNER = 'instance=~"$instance", learner=~"$learner"'
_LAYER = f'{_LEARNER}, layer=~"$layer"'
_INSTANCE = 'instance=~"$instance"'

_BY_LEARNER = "{{learner}}"
_BY_LAYER = "{{learner}} {{layer}}"


@dataclass(frozen=True)
class Panel:
    """One graph: its queries by legend, and how their values read."""

    title: str
    description: str
    queries: dict[str, str]
    unit: str = "short"
    lowest: float | None = 0
    highest: float | None = None


LEARNING = (
    Panel(
        "Accuracy",
        "Exponential average of predictions made before each update. Regression has none.",
        {_BY_LEARNER: f"cbp_learner_accuracy{{{_LEARNER}}}"},
        "percentunit",
        None,
    ),
    Panel(
        "Accuracy on the current task",
        "Mean since the task began. Peaks that fall from task to task are loss of plasticity.",
        {_BY_LEARNER: f"cbp_learner_task_accuracy{{{_LEARNER}}}"},
        "percentunit",
        None,
    ),
    Panel(
        "Loss",
        "Exponential average of predictions made before each update.",
        {_BY_LEARNER: f"cbp_learner_loss{{{_LEARNER}}}"},
    ),
    Panel(
        "Examples learnt",
        "Per second.",
        {_BY_LEARNER: f"rate(cbp_learner_examples_total{{{_LEARNER}}}[$__rate_interval])"},
        "cps",
    ),
)

SIGNS = (
    Panel(
        "Dormant units",
        "Share of a layer's units that hardly respond to anything. Rising: the layer loses capacity.",
        {_BY_LAYER: f"cbp_layer_dormant_ratio{{{_LAYER}}}"},
        "percentunit",
    ),
    Panel(
        "Effective rank per unit",
        "Directions that the activations span, of those they could. Falling: the representation collapses.",
        {_BY_LAYER: f"cbp_layer_effective_rank{{{_LAYER}}} / cbp_layer_units{{{_LAYER}}}"},
        "percentunit",
    ),
    Panel(
        "Mean weight magnitude",
        "Mean of abs(w) over a layer's incoming weights. Steady growth goes with loss of plasticity.",
        {_BY_LAYER: f"cbp_layer_mean_abs_weight{{{_LAYER}}}"},
    ),
    Panel(
        "Gradient norm",
        "Of the loss on the probe examples. Near zero while the loss is high: the layer cannot learn.",
        {_BY_LAYER: f"cbp_layer_gradient_norm{{{_LAYER}}}"},
    ),
)

REPRESENTATION = (
    Panel(
        "Trainability",
        "What a copy makes of a fresh random task, against the learner's first network. Falling: plasticity is lost. "
        "Tested are learners with a monitoring.trainability_interval.",
        {_BY_LEARNER: f"cbp_learner_trainability{{{_LEARNER}}}"},
        "percentunit",
        None,
    ),
    Panel(
        "Saturated activations",
        "Share of a layer's activations near the bounds of tanh or sigmoid, where gradients vanish.",
        {_BY_LAYER: f"cbp_layer_saturated_ratio{{{_LAYER}}}"},
        "percentunit",
    ),
    Panel(
        "Singular values that count (srank)",
        "How many singular values of a layer's activations hold 99 % of their sum.",
        {_BY_LAYER: f"cbp_layer_srank{{{_LAYER}}}"},
    ),
    Panel(
        "Gradient rank",
        "Directions in which the newest 32 probe examples pull at a layer's weights, at most 32.",
        {_BY_LAYER: f"cbp_layer_gradient_rank{{{_LAYER}}}"},
    ),
    Panel(
        "Feature norm",
        "Mean Euclidean norm of a layer's activations on one probe example.",
        {_BY_LAYER: f"cbp_layer_feature_norm{{{_LAYER}}}"},
    ),
)

WEIGHTS_AND_UNITS = (
    Panel(
        "Dead units",
        "Share of a layer's units that are zero on every probe example.",
        {_BY_LAYER: f"cbp_layer_dead_ratio{{{_LAYER}}}"},
        "percentunit",
    ),
    Panel(
        "Stable rank",
        "Of the activations: squared Frobenius norm over squared spectral norm.",
        {_BY_LAYER: f"cbp_layer_stable_rank{{{_LAYER}}}"},
    ),
    Panel(
        "Weight norm",
        "Frobenius norm of a layer's incoming weights.",
        {_BY_LAYER: f"cbp_layer_weight_norm{{{_LAYER}}}"},
    ),
    Panel(
        "Distance from the start",
        "Euclidean distance of a layer's weights from their first values.",
        {_BY_LAYER: f"cbp_layer_distance_from_init{{{_LAYER}}}"},
    ),
    Panel(
        "Units replaced",
        "Per second. Continual Backprop replaces units of low utility once they are mature.",
        {_BY_LAYER: f"rate(cbp_layer_replacements_total{{{_LAYER}}}[$__rate_interval])"},
        "cps",
    ),
    Panel(
        "Age of units",
        "In steps since they were made or replaced: the lowest tenth, the median and the highest tenth.",
        {"{{learner}} {{layer}} q{{quantile}}": f"cbp_layer_unit_age_steps{{{_LAYER}}}"},
    ),
    Panel(
        "Utility of units",
        "Bias-corrected: the lowest tenth, the median and the highest tenth.",
        {"{{learner}} {{layer}} q{{quantile}}": f"cbp_layer_unit_utility{{{_LAYER}}}"},
    ),
    Panel(
        "Tasks seen",
        "The current one included.",
        {_BY_LEARNER: f"cbp_learner_tasks_total{{{_LEARNER}}}"},
    ),
)

CALLS = (
    Panel(
        "Calls",
        "gRPC calls that ended, per second.",
        {
            "{{method}} {{code}}": "sum by (method, code) "
            f"(rate(cbp_rpc_requests_total{{{_INSTANCE}}}[$__rate_interval]))"
        },
        "reqps",
    ),
    Panel(
        "Call duration, 95th percentile",
        "From the start of a gRPC call to its end. Train streams are left out: they stay open.",
        {
            "{{method}}": "histogram_quantile(0.95, sum by (method, le) "
            f'(rate(cbp_rpc_duration_seconds_bucket{{{_INSTANCE}, method!~".*/Train"}}[$__rate_interval])))'
        },
        "s",
    ),
    Panel(
        "Batches turned away",
        "Per second, by reason.",
        {"{{reason}}": f"sum by (reason) (rate(cbp_batches_rejected_total{{{_INSTANCE}}}[$__rate_interval]))"},
        "cps",
    ),
    Panel(
        "Streams and queue",
        "Train streams open, and batches accepted but not yet applied. A full queue holds clients back.",
        {
            "streams": f"sum(cbp_train_streams{{{_INSTANCE}}})",
            "queued batches": f"sum(cbp_queued_batches{{{_INSTANCE}}})",
        },
    ),
)

ENGINE = (
    Panel(
        "Steps",
        "Training steps per second.",
        {"{{instance}}": f"rate(cbp_engine_step_seconds_count{{{_INSTANCE}}}[$__rate_interval])"},
        "cps",
    ),
    Panel(
        "Engine busy",
        "Share of the time that the engine spends in training steps. Near 100 %: it is the limit.",
        {"{{instance}}": f"rate(cbp_engine_step_seconds_sum{{{_INSTANCE}}}[$__rate_interval])"},
        "percentunit",
        0,
        1,
    ),
    Panel(
        "Time of a step",
        "Mean over the engine's steps.",
        {
            "{{instance}}": f"rate(cbp_engine_step_seconds_sum{{{_INSTANCE}}}[$__rate_interval]) "
            f"/ rate(cbp_engine_step_seconds_count{{{_INSTANCE}}}[$__rate_interval])"
        },
        "s",
    ),
    Panel(
        "Memory",
        "Resident memory of the two processes.",
        {
            "{{instance}} engine": f"cbp_engine_resident_memory_bytes{{{_INSTANCE}}}",
            "{{instance}} front": f'process_resident_memory_bytes{{{_INSTANCE}, job="cbp"}}',
        },
        "bytes",
    ),
    Panel(
        "Processor time of the front",
        "Cores in use by gRPC, HTTP and validation; the front has one event loop, so 100 % is its limit.",
        {"{{instance}}": f'rate(process_cpu_seconds_total{{{_INSTANCE}, job="cbp"}}[$__rate_interval])'},
        "percentunit",
    ),
)

CHECKPOINTS = (
    Panel(
        "Checkpoints",
        "Per second.",
        {
            "written": f"sum(rate(cbp_checkpoints_total{{{_INSTANCE}}}[$__rate_interval]))",
            "failed": f"sum(rate(cbp_checkpoint_failures_total{{{_INSTANCE}}}[$__rate_interval]))",
        },
        "cps",
    ),
    Panel(
        "Checkpoint duration",
        "Median and 95th percentile, until a checkpoint is safe on disk.",
        {
            f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) "
            f"(rate(cbp_checkpoint_duration_seconds_bucket{{{_INSTANCE}}}[$__rate_interval])))"
            for percent in (50, 95)
        },
        "s",
    ),
    Panel(
        "Checkpoint data",
        "Written to disk per second.",
        {"written": f"sum(rate(cbp_checkpoint_written_bytes_total{{{_INSTANCE}}}[$__rate_interval]))"},
        "Bps",
    ),
    Panel(
        "Behind the newest checkpoint",
        "Entries of the journal that a restart would apply once more: of all learners, and the most of any one.",
        {
            "all": f"sum(cbp_learner_unsaved_entries{{{_INSTANCE}}})",
            "most": f"max(cbp_learner_unsaved_entries{{{_INSTANCE}}})",
        },
    ),
)

JOURNAL = (
    Panel(
        "Journal commits",
        "Transactions per second. While they fail, nothing is accepted.",
        {
            "written": f"sum(rate(cbp_journal_commit_duration_seconds_count{{{_INSTANCE}}}[$__rate_interval]))",
            "failed": f"sum(rate(cbp_journal_commit_failures_total{{{_INSTANCE}}}[$__rate_interval]))",
        },
        "cps",
    ),
    Panel(
        "Journal commit duration",
        "Median and 95th percentile. A batch is not learnt before it is in the journal.",
        {
            f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) "
            f"(rate(cbp_journal_commit_duration_seconds_bucket{{{_INSTANCE}}}[$__rate_interval])))"
            for percent in (50, 95)
        },
        "s",
    ),
    Panel(
        "Entries per commit",
        "Entries that wait share a transaction: the more there are, the less each one costs.",
        {
            "entries": f"sum(rate(cbp_journal_entries_total{{{_INSTANCE}}}[$__rate_interval])) "
            f"/ sum(rate(cbp_journal_commit_duration_seconds_count{{{_INSTANCE}}}[$__rate_interval]))"
        },
    ),
    Panel(
        "Journal data",
        "Payloads written per second.",
        {"written": f"sum(rate(cbp_journal_written_bytes_total{{{_INSTANCE}}}[$__rate_interval]))"},
        "Bps",
    ),
)

LEARNERS = (
    Panel(
        "Learners by state",
        "Evicted ones are idle and come back when they are used; quarantined ones wait for somebody to resume them.",
        {"{{state}}": f"sum by (state) (cbp_learners{{{_INSTANCE}}})"},
    ),
    Panel(
        "Quarantined",
        "Which learners wait to be resumed.",
        {_BY_LEARNER: f"cbp_learner_quarantined{{{_INSTANCE}}}"},
    ),
    Panel(
        "Recoveries and evictions",
        "Learners brought back, taken out of memory, and quarantined, per second.",
        {
            "brought back": f"sum(rate(cbp_recovery_duration_seconds_count{{{_INSTANCE}}}[$__rate_interval]))",
            "evicted": f"sum(rate(cbp_evictions_total{{{_INSTANCE}}}[$__rate_interval]))",
            "quarantined": f"sum(rate(cbp_quarantines_total{{{_INSTANCE}}}[$__rate_interval]))",
        },
        "cps",
    ),
    Panel(
        "Entries applied once more",
        "To bring learners back, per second. Many at each restart: let checkpoints come more often.",
        {"entries": f"sum(rate(cbp_replayed_entries_total{{{_INSTANCE}}}[$__rate_interval]))"},
        "cps",
    ),
)


@dataclass(frozen=True)
class Figure:
    """One number at the top of a dashboard; from `bad` on (or below it, if `bad_below`) it is red."""

    title: str
    description: str
    query: str
    unit: str = "short"
    bad: float | None = None
    bad_below: bool = False


FIGURES = (
    Figure("Engine", "Engine processes that answer.", f"sum(cbp_engine_up{{{_INSTANCE}}})", bad=1, bad_below=True),
    Figure(
        "Journal",
        "Servers whose journal can be written.",
        f"sum(cbp_journal_up{{{_INSTANCE}}})",
        bad=1,
        bad_below=True,
    ),
    Figure("Learners", "Without deleted ones.", f'sum(cbp_learners{{{_INSTANCE}, state!="deleted"}})'),
    Figure(
        "Quarantined",
        "Learners that could not learn a batch, and wait to be resumed.",
        f"sum(cbp_learner_quarantined{{{_INSTANCE}}})",
        bad=1,
    ),
    Figure(
        "Unavailable",
        "Learners that cannot be used now, or could not be restored.",
        f'sum(cbp_learners{{{_INSTANCE}, state="unavailable"}}) + sum(cbp_unreadable_learners{{{_INSTANCE}}})',
        bad=1,
    ),
    Figure(
        "Examples",
        "Learnt per second, by all learners.",
        f"sum(rate(cbp_learner_examples_total{{{_INSTANCE}}}[$__rate_interval]))",
        "cps",
    ),
    Figure(
        "Engine restarts",
        "In the time shown.",
        f"sum(increase(cbp_engine_restarts_total{{{_INSTANCE}}}[$__range]))",
        bad=1,
    ),
    Figure("Version", "Of the server.", f"cbp_build_info{{{_INSTANCE}}}"),
)


def plasticity() -> dashboard.Dashboard:
    board = _dashboard(
        "cbp: plasticity", "cbp-plasticity", "Do the learners still learn? Signs by layer and by learner."
    )
    board.with_variable(
        _variable("learner", "Learner", f"label_values(cbp_learner_steps_total{{{_INSTANCE}}}, learner)")
    )
    board.with_variable(_variable("layer", "Layer", f"label_values(cbp_layer_units{{{_LEARNER}}}, layer)"))
    _add_row(board, "How well it learns", LEARNING)
    _add_row(board, "Signs of plasticity loss", SIGNS)
    _add_row(board, "Trainability and representation", REPRESENTATION)
    _add_row(board, "Weights and units", WEIGHTS_AND_UNITS)
    return board


def service() -> dashboard.Dashboard:
    board = _dashboard(
        "cbp: service", "cbp-service", "Is the server well? Calls, queue, engine, learners, journal and checkpoints."
    )
    for figure in FIGURES:
        board.with_panel(_figure(figure))
    _add_row(board, "Calls and streams", CALLS)
    _add_row(board, "Engine", ENGINE)
    _add_row(board, "Learners", LEARNERS)
    _add_row(board, "Journal", JOURNAL)
    _add_row(board, "Checkpoints", CHECKPOINTS)
    return board


def _dashboard(title: str, uid: str, description: str) -> dashboard.Dashboard:
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["cbp"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .link(dashboard.DashboardLink("cbp").type(DashboardLinkType.DASHBOARDS).tags(["cbp"]).keep_time(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("instance", "Server", "label_values(cbp_build_info, instance)"))
    )


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _add_row(board: dashboard.Dashboard, title: str, panels: tuple[Panel, ...]) -> None:
    board.with_row(dashboard.Row(title))
    for panel in panels:
        board.with_panel(_graph(panel))


def _query(legend: str, expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(_SOURCE).expr(expression).legend_format(legend)


def _graph(panel: Panel) -> timeseries.Panel:
    graph = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .span(12)
        .height(8)
        .line_width(1.5)
        .fill_opacity(0)
        .show_points(VisibilityMode.NEVER)
        .span_nulls(60_000)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.RIGHT)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if panel.lowest is not None:
        graph.min(panel.lowest)
    if panel.highest is not None:
        graph.max(panel.highest)
    for name, (legend, expression) in zip("ABCD", panel.queries.items(), strict=False):
        graph.with_target(_query(legend, expression).ref_id(name))
    return graph


def _figure(figure: Figure) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(figure.title)
        .description(figure.description)
        .datasource(_SOURCE)
        .unit(figure.unit)
        .decimals(0)
        .span(3)
        .height(4)
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if figure.title == "Version":
        return panel.with_target(_query("{{version}} on {{device}}", figure.query).ref_id("A")).text_mode(
            BigValueTextMode.NAME
        )
    if figure.bad is None:
        panel.color_mode(BigValueColorMode.NONE)
    else:
        colors = ("red", "green") if figure.bad_below else ("green", "red")
        steps = [Threshold(value=None, color=colors[0]), Threshold(value=figure.bad, color=colors[1])]
        panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    return panel.with_target(_query("", figure.query).ref_id("A"))


def _numbered(board: dashboard.Dashboard) -> models.Dashboard:
    """Built, with the ids that Grafana's links to single panels need."""
    built = board.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def rendered() -> dict[str, str]:
    """The dashboards as JSON, by file name."""
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(_numbered(board)) + "\n"
        for name, board in (("plasticity", plasticity()), ("service", service()))
    }


if __name__ == "__main__":
    for name, text in rendered().items():
        (DASHBOARDS / name).write_text(text)
