"""Prometheus metrics: state is read at scrape time by a collector, events are counted as they happen. Those of single
learners are in learner_metrics.py.

Every name is explained in docs/metrics.md; a test holds the two together.
"""

from collections import Counter as Counts
from collections.abc import Iterable, Iterator
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

from cbp import CbpError
from cbp_server.errors import CATALOG, describe
from cbp_server.records.learners import LearnerState
from cbp_server.records.read_model import ReadModel

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


def register_server_metrics(registry: CollectorRegistry, source: ReadModel) -> None:
    """Puts what is read at scrape time into `registry`: server, process, Python; not the series of learners."""
    # Times of creation would double the series of every counter.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry.register(ServerCollector(source))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)


class ServerCollector(Collector):
    """Reads the server when Prometheus asks; the series of its learners are `LearnerMetrics`."""

    def __init__(self, source: ReadModel) -> None:
        self._source = source
        self._versions = [version("cbp-server"), version("torch")]  # asking for them takes milliseconds

    def describe(self) -> Iterable[Metric]:
        """No names up front: registering must not read a server that is still starting."""
        return []

    def collect(self) -> Iterator[Metric]:
        learners = self._source.learners(deleted=True)
        by_state = GaugeMetricFamily("cbp_learners", "Learners, by state.", labels=["state"])
        states = Counts(learner.state for learner in learners)
        for state in LearnerState:
            by_state.add_metric([state.value], states[state])
        yield by_state
        yield _gauge(
            "cbp_unreadable_learners", "Learners that could not be restored, or shown.", len(self._source.unreadable())
        )
        yield _gauge("cbp_train_streams", "Train streams open.", self._source.open_streams)
        yield _gauge(
            "cbp_queued_batches",
            "Batches accepted and not yet applied, over all learners.",
            sum(learner.queued_batches for learner in learners if learner.state is not LearnerState.DELETED),
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


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
