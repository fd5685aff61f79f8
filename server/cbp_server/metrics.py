"""Prometheus metrics: state is read at scrape time by a collector, events are counted as they happen.

Every name is explained in docs/metrics.md; a test holds the two together.
"""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from cbp import CbpError, LayerPlasticity, LearnerProgress
from cbp.plasticity import QUANTILES
from cbp_server.errors import CATALOG, describe
from cbp_server.read_model import ReadModel
from cbp_server.records import LearnerRecord, LearnerState

#: Value of the label `learner` that stands for all learners without series of their own. No learner can have this
#: name: ids start with a letter.
OTHERS = "_others"

_RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_DISK_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_RECOVERY_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class RpcMetrics:
    """Counts gRPC calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "cbp_rpc_requests", "Finished gRPC calls, by method and status code.", ["method", "code"], registry=registry
        )
        self._duration = Histogram(
            "cbp_rpc_duration_seconds",
            "Time from the start of a gRPC call to its end; for a stream, how long it was open.",
            ["method"],
            registry=registry,
            buckets=_RPC_BUCKETS,
        )

    def observe(self, method: str, code: str, seconds: float) -> None:
        """Counts one finished call of `method` (`cbp.v1.TrainingService/Predict`) that ended with `code` (`OK`)."""
        self._requests.labels(method, code).inc()
        self._duration.labels(method).observe(seconds)


class HostMetrics:
    """Counts what happens to batches, checkpoints and learners."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rejected = Counter(
            "cbp_batches_rejected",
            "Batches that changed nothing because they were turned away, by reason.",
            ["reason"],
            registry=registry,
        )
        for entry in CATALOG.values():
            self._rejected.labels(entry.reason)  # a series that starts at 0 shows its first increase
        self._written = Counter("cbp_checkpoints", "Checkpoints written.", registry=registry)
        self._bytes = Counter("cbp_checkpoint_written_bytes", "Size of all checkpoints written.", registry=registry)
        self._failures = Counter("cbp_checkpoint_failures", "Checkpoints that could not be written.", registry=registry)
        self._duration = Histogram(
            "cbp_checkpoint_duration_seconds",
            "Time to write one checkpoint, until it is safe on disk.",
            registry=registry,
            buckets=_DISK_BUCKETS,
        )
        self._recoveries = Histogram(
            "cbp_recovery_duration_seconds",
            "Time to bring one learner back: its checkpoint, and what the journal has behind it.",
            registry=registry,
            buckets=_RECOVERY_BUCKETS,
        )
        self._replayed = Counter(
            "cbp_replayed_entries",
            "Entries of the journal applied once more, to bring learners back.",
            registry=registry,
        )
        self._evictions = Counter("cbp_evictions", "Idle learners taken out of memory.", registry=registry)
        self._quarantines = Counter("cbp_quarantines", "Batches that a learner was quarantined for.", registry=registry)

    def batch_rejected(self, error: CbpError) -> None:
        self._rejected.labels(describe(error).reason).inc()

    def checkpoint_written(self, seconds: float, size_bytes: int) -> None:
        self._written.inc()
        self._bytes.inc(size_bytes)
        self._duration.observe(seconds)

    def checkpoint_failed(self) -> None:
        self._failures.inc()

    def learner_recovered(self, seconds: float) -> None:
        self._recoveries.observe(seconds)

    def entries_replayed(self, count: int) -> None:
        self._replayed.inc(count)

    def learner_evicted(self) -> None:
        self._evictions.inc()

    def learner_quarantined(self) -> None:
        self._quarantines.inc()


class JournalMetrics:
    """Counts the journal's transactions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._duration = Histogram(
            "cbp_journal_commit_duration_seconds",
            "Time of one transaction of the journal, until it is as durable as its learners want it.",
            registry=registry,
            buckets=_DISK_BUCKETS,
        )
        self._entries = Counter("cbp_journal_entries", "Entries written to the journal.", registry=registry)
        self._bytes = Counter("cbp_journal_written_bytes", "Size of all entries written.", registry=registry)
        self._failures = Counter(
            "cbp_journal_commit_failures", "Transactions of the journal that failed.", registry=registry
        )

    def journal_written(self, seconds: float, entries: int, size_bytes: int) -> None:
        self._duration.observe(seconds)
        self._entries.inc(entries)
        self._bytes.inc(size_bytes)

    def journal_failed(self) -> None:
        self._failures.inc()


def register_server_metrics(registry: CollectorRegistry, source: ReadModel, *, max_learners: int) -> None:
    """Puts everything that is read at scrape time into `registry`: server, learners, process, Python."""
    # Times of creation would double the series of every counter.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry.register(ServerCollector(source, max_learners=max_learners))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)


@dataclass
class _Seen:
    """What the collector remembers of a learner between two scrapes."""

    uid: str
    progress: LearnerProgress | None = None  # at the scrape before; None at the first sight
    active_at: int = 0  # number of the scrape that last saw it step
    named: bool = False  # has series of its own


class ServerCollector(Collector):
    """Reads the server when Prometheus asks.

    At most `max_learners` learners have series of their own: those that are quarantined, so that alerts name them, then
    those that stepped most recently, and among equals those that had them before, so that series come and go rarely.
    The rest appear as one learner `_others`. Its counters hold the increases seen while a learner was among the others:
    they never fall when a learner joins or leaves, which rate() would take for a restart.

    A learner that has yet to be brought back after the server's start has no series: its checkpoint says less than the
    server before reported, which rate() would take for a restart as well.
    """

    def __init__(self, source: ReadModel, *, max_learners: int) -> None:
        self._source = source
        self._max_learners = max_learners
        self._versions = [version("cbp-server"), version("torch")]  # asking for them takes milliseconds
        self._scrape = 0
        self._seen: dict[str, _Seen] = {}
        self._others_counts: dict[tuple[str, str], float] = {}

    def describe(self) -> Iterable[Metric]:
        """No names up front: registering must not read a server that is still starting."""
        return []

    def collect(self) -> Iterator[Metric]:
        everything = self._source.learners(deleted=True)
        learners = [learner for learner in everything if learner.state is not LearnerState.DELETED]
        own, others = self._divide(learners)
        yield from self._service_metrics(learners, deleted=len(everything) - len(learners))
        yield from _learner_metrics(own, others, self._others_counts)
        yield from _layer_metrics(own, others, self._others_counts)

    def _divide(self, learners: Sequence[LearnerRecord]) -> tuple[list[LearnerRecord], list[LearnerRecord]]:
        """The learners with series of their own, and the others, whose increases since the last scrape are added up."""
        self._scrape += 1
        before, self._seen = self._seen, {}
        for learner in learners:
            seen = before.get(learner.learner_id)
            if seen is None or seen.uid != learner.uid:
                if learner.state is LearnerState.UNAVAILABLE:
                    continue
                seen = _Seen(learner.uid)
            if learner.progress is not seen.progress:  # records are replaced, not changed
                seen.active_at = self._scrape
            self._seen[learner.learner_id] = seen
        known = [learner for learner in learners if learner.learner_id in self._seen]
        ranked = sorted(known, key=self._rank)
        own, others = ranked[: self._max_learners], ranked[self._max_learners :]
        for learner in others:
            self._add_increase(learner.progress, self._seen[learner.learner_id].progress)
        for position, learner in enumerate(ranked):
            seen = self._seen[learner.learner_id]
            seen.progress, seen.named = learner.progress, position < self._max_learners
        return own, others

    def _rank(self, learner: LearnerRecord) -> tuple[bool, int, bool, str]:
        seen = self._seen[learner.learner_id]
        return learner.quarantine is None, -seen.active_at, not seen.named, learner.learner_id

    def _add_increase(self, now: LearnerProgress, before: LearnerProgress | None) -> None:
        if now is before:
            return
        counts = _counts(now)
        base = counts if before is None else _counts(before)  # the first sight is where counting starts
        for key, value in counts.items():
            increase = max(0.0, value - base.get(key, 0.0))
            self._others_counts[key] = self._others_counts.get(key, 0.0) + increase

    def _service_metrics(self, learners: Sequence[LearnerRecord], *, deleted: int) -> Iterator[Metric]:
        by_state = GaugeMetricFamily("cbp_learners", "Learners, by state.", labels=["state"])
        states = Counts(learner.state for learner in learners)
        states[LearnerState.DELETED] = deleted
        for state in LearnerState:
            by_state.add_metric([state.value], states[state])
        yield by_state
        yield _gauge("cbp_unreadable_learners", "Learners that could not be restored.", len(self._source.unreadable()))
        yield _gauge("cbp_train_streams", "Train streams open.", self._source.open_streams)
        yield _gauge(
            "cbp_queued_batches",
            "Batches accepted and not yet applied, over all learners.",
            sum(learner.queued_batches for learner in learners),
        )
        journal = self._source.journal_status()
        yield _gauge("cbp_journal_up", "1 if the last write to the journal succeeded, otherwise 0.", journal.up)
        yield _gauge(
            "cbp_journal_change_timestamp_seconds",
            "When cbp_journal_up changed last, in seconds since 1970; at first, when the server started.",
            journal.since.timestamp(),
        )
        engine = self._source.engine_status()
        yield _gauge("cbp_engine_up", "1 while the engine process answers, otherwise 0.", engine.up)
        restarts = CounterMetricFamily(
            "cbp_engine_restarts", "Restarts of the engine process since the server started."
        )
        restarts.add_metric([], engine.restarts)
        yield restarts
        yield SummaryMetricFamily(
            "cbp_engine_step_seconds",
            "Time the engine spent in training steps (sum) and how many it made (count), since the server started.",
            count_value=engine.steps,
            sum_value=engine.train_seconds,
        )
        yield _gauge(
            "cbp_engine_resident_memory_bytes",
            "Resident memory of the engine process, 0 if not known.",
            engine.resident_bytes,
        )
        info = GaugeMetricFamily(
            "cbp_build_info",
            "Always 1; versions of server and torch, and the device learners train on.",
            labels=["version", "torch_version", "device"],
        )
        info.add_metric([*self._versions, engine.device], 1)
        yield info


# --- of learners ---------------------------------------------------------------------------------------------------

_STEPS = "cbp_learner_steps"
_EXAMPLES = "cbp_learner_examples"
_TASKS = "cbp_learner_tasks"
_REPLACEMENTS = "cbp_layer_replacements"


def _counts(progress: LearnerProgress) -> dict[tuple[str, str], float]:
    """Everything of a learner that only grows, by metric and layer."""
    counts: dict[tuple[str, str], float] = {
        (_STEPS, ""): progress.step,
        (_EXAMPLES, ""): progress.examples,
        (_TASKS, ""): progress.task_count,
    }
    counts.update({(_REPLACEMENTS, layer): number for layer, number in progress.replacements.items()})
    return counts


_Aggregate = Callable[[Sequence[float]], float]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class _LearnerGauge:
    """One number of a learner, and how those of the others become one; None has no sample."""

    name: str
    help: str
    read: Callable[[LearnerRecord], float | None]
    aggregate: _Aggregate


_LEARNER_GAUGES = (
    _LearnerGauge(
        "cbp_learner_pending_examples",
        "Examples that wait for enough others to make a step.",
        lambda learner: learner.progress.pending,
        sum,
    ),
    _LearnerGauge(
        "cbp_learner_loss",
        "Exponential average of the loss of predictions made before each update.",
        lambda learner: learner.progress.loss,
        _mean,
    ),
    _LearnerGauge(
        "cbp_learner_accuracy",
        "Exponential average of the accuracy of predictions made before each update, from 0 to 1.",
        lambda learner: learner.progress.accuracy,
        _mean,
    ),
    _LearnerGauge(
        "cbp_learner_task_loss",
        "Mean loss over the current task, each example predicted before it was learnt.",
        lambda learner: learner.progress.tasks[-1].loss if learner.progress.tasks else None,
        _mean,
    ),
    _LearnerGauge(
        "cbp_learner_task_accuracy",
        "Mean accuracy over the current task, each example predicted before it was learnt, from 0 to 1.",
        lambda learner: learner.progress.tasks[-1].accuracy if learner.progress.tasks else None,
        _mean,
    ),
    _LearnerGauge(
        "cbp_learner_queued_batches",
        "Batches accepted and not yet applied.",
        lambda learner: learner.queued_batches,
        sum,
    ),
    _LearnerGauge(
        "cbp_learner_checkpoint_timestamp_seconds",
        "When the newest checkpoint was written, in seconds since 1970.",
        lambda learner: learner.checkpoint.time.timestamp() if learner.checkpoint else None,
        min,
    ),
    _LearnerGauge(
        "cbp_learner_checkpoint_step",
        "Step of the newest checkpoint.",
        lambda learner: learner.checkpoint.step if learner.checkpoint else None,
        min,
    ),
    _LearnerGauge(
        "cbp_learner_unsaved_entries",
        "Entries of the journal behind the newest checkpoint.",
        lambda learner: learner.unsaved_entries,
        sum,
    ),
    _LearnerGauge(
        "cbp_learner_quarantined",
        "1 while the learner is quarantined, otherwise 0; of the others, how many are.",
        lambda learner: learner.quarantine is not None,
        sum,
    ),
)


def _learner_metrics(
    own: Sequence[LearnerRecord], others: Sequence[LearnerRecord], others_counts: dict[tuple[str, str], float]
) -> Iterator[Metric]:
    for name, text in (
        (_STEPS, "Optimizer updates made."),
        (_EXAMPLES, "Examples learnt from."),
        (_TASKS, "Tasks seen, the current one included."),
    ):
        counter = CounterMetricFamily(name, text, labels=["learner"])
        for learner in own:
            counter.add_metric([learner.learner_id], _counts(learner.progress)[name, ""])
        if others:
            counter.add_metric([OTHERS], others_counts[name, ""])
        yield counter
    for gauge in _LEARNER_GAUGES:
        family = GaugeMetricFamily(gauge.name, gauge.help, labels=["learner"])
        for learner in own:
            value = gauge.read(learner)
            if value is not None:
                family.add_metric([learner.learner_id], value)
        values = [value for learner in others if (value := gauge.read(learner)) is not None]
        if values:
            family.add_metric([OTHERS], gauge.aggregate(values))
        yield family


# --- of layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerGauge:
    name: str
    help: str
    read: Callable[[LayerPlasticity], float | None]
    aggregate: _Aggregate = _mean


_LAYER_GAUGES = (
    _LayerGauge("cbp_layer_units", "Units of the layer.", lambda layer: layer.units, sum),
    _LayerGauge(
        "cbp_layer_mean_abs_weight", "Mean of abs(w) over the incoming weights.", lambda layer: layer.mean_abs_weight
    ),
    _LayerGauge("cbp_layer_weight_norm", "Frobenius norm of the incoming weights.", lambda layer: layer.weight_norm),
    _LayerGauge(
        "cbp_layer_distance_from_init",
        "Euclidean distance of weights and biases from their initial values.",
        lambda layer: layer.distance_from_init,
    ),
    _LayerGauge(
        "cbp_layer_gradient_norm",
        "Euclidean norm of the loss gradient on the probe examples.",
        lambda layer: layer.gradient_norm,
    ),
    _LayerGauge(
        "cbp_layer_dormant_ratio",
        "Share of units whose normalised mean activation is at most the dormant threshold, from 0 to 1.",
        lambda layer: layer.dormant_fraction,
    ),
    _LayerGauge(
        "cbp_layer_dead_ratio",
        "Share of units that are zero on every probe example, from 0 to 1.",
        lambda layer: layer.dead_fraction,
    ),
    _LayerGauge(
        "cbp_layer_effective_rank",
        "Effective rank of the layer's activations on the probe examples (Roy and Vetterli 2007).",
        lambda layer: layer.effective_rank,
    ),
    _LayerGauge(
        "cbp_layer_stable_rank",
        "Stable rank of the layer's activations on the probe examples.",
        lambda layer: layer.stable_rank,
    ),
)


def _layer_metrics(
    own: Sequence[LearnerRecord], others: Sequence[LearnerRecord], others_counts: dict[tuple[str, str], float]
) -> Iterator[Metric]:
    own_layers = [(learner.learner_id, layer) for learner in own for layer in _layers(learner)]
    other_layers: dict[str, list[LayerPlasticity]] = {}
    for learner in others:
        for layer in _layers(learner):
            other_layers.setdefault(layer.layer, []).append(layer)

    for gauge in _LAYER_GAUGES:
        family = GaugeMetricFamily(gauge.name, gauge.help, labels=["learner", "layer"])
        for learner_id, layer in own_layers:
            value = gauge.read(layer)
            if value is not None:
                family.add_metric([learner_id, layer.layer], value)
        for name, layers in other_layers.items():
            values = [value for layer in layers if (value := gauge.read(layer)) is not None]
            if values:
                family.add_metric([OTHERS, name], gauge.aggregate(values))
        yield family

    replacements = CounterMetricFamily(_REPLACEMENTS, "Units replaced.", labels=["learner", "layer"])
    for learner in own:
        for layer_name, replaced in learner.progress.replacements.items():
            replacements.add_metric([learner.learner_id, layer_name], replaced)
    if others:
        for (name, layer_name), increase in others_counts.items():
            if name == _REPLACEMENTS:
                replacements.add_metric([OTHERS, layer_name], increase)
    yield replacements

    # Quantiles of different learners cannot be combined, so `_others` has none.
    ages = Metric("cbp_layer_unit_age_steps", "Age of the units, in steps since they were made or reset.", "summary")
    utilities = Metric("cbp_layer_unit_utility", "Bias-corrected utility of the units.", "summary")
    for learner_id, layer in own_layers:
        for summary, quantiles in ((ages, layer.age_quantiles), (utilities, layer.utility_quantiles)):
            for quantile, number in zip(QUANTILES, quantiles or (), strict=False):
                labels = {"learner": learner_id, "layer": layer.layer, "quantile": str(quantile)}
                summary.add_sample(summary.name, labels, number)
    yield ages
    yield utilities


def _layers(learner: LearnerRecord) -> Sequence[LayerPlasticity]:
    return learner.samples[-1].sample.layers if learner.samples else ()


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
