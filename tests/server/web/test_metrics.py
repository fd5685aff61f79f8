import asyncio
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from system_tools import system_tool

from cbp_server.errors import LearnerNotFound, SequenceGap
from cbp_server.metrics.exposition import Exposition, TextFormat
from cbp_server.metrics.learners import LearnerMetrics
from cbp_server.metrics.service import HostMetrics, JournalMetrics, RpcMetrics, ServerCollector, register_server_metrics
from cbp_server.records.learners import JournalStatus, LearnerRecord, LearnerState
from cbp_server.records.read_model import ReadModel

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"

MakeLearner = Callable[..., LearnerRecord]


class Scraper:
    """Reads a server's metrics as Prometheus does, anew for each question."""

    def __init__(self, registry: CollectorRegistry, source: ReadModel, max_learners: int) -> None:
        self._exposition = Exposition(registry, LearnerMetrics(source, max_learners=max_learners))

    def text(self) -> str:
        return asyncio.run(self._exposition.text(TextFormat.accepted(""))).decode()

    def families(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.text()))

    def value(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        found = [
            sample.value
            for family in self.families()
            for sample in family.samples
            if sample.name == name and sample.labels == (labels or {})
        ]
        assert len(found) <= 1, (name, labels)
        return found[0] if found else None


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def everything(registry: CollectorRegistry, host: Any, make_learner: MakeLearner) -> Scraper:
    """Metrics as the server has them."""
    rpc, events = RpcMetrics(registry), HostMetrics(registry)
    rpc.observe("cbp.v1.TrainingService/Predict", "OK", 0.002)
    events.checkpoint_written(0.01, 1000)
    JournalMetrics(registry).journal_written(0.004, 3, 900)
    register_server_metrics(registry, host)
    host.add(*(make_learner(name) for name in ("a", "b", "c")))
    return Scraper(registry, host, max_learners=2)


def scraper_of(source: ReadModel, max_learners: int = 10) -> Scraper:
    registry = CollectorRegistry()
    registry.register(ServerCollector(source))
    return Scraper(registry, source, max_learners)


def test_a_learners_numbers_are_those_of_its_record(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    scraper = scraper_of(host)
    for name, value in {
        "cbp_learner_steps_total": 2000,
        "cbp_learner_examples_total": 2000,
        "cbp_learner_pending_examples": 0,
        "cbp_learner_loss": 0.41,
        "cbp_learner_accuracy": 0.874,
        "cbp_learner_task_loss": 0.3,
        "cbp_learner_task_accuracy": 0.9,
        "cbp_learner_tasks_total": 2,
        "cbp_learner_queued_batches": 4,
        "cbp_learner_checkpoint_step": 1600,
        "cbp_learner_unsaved_entries": 15,
        "cbp_learner_quarantined": 0,
    }.items():
        assert scraper.value(name, {"learner": "clicks"}) == value, name


def test_layers_show_the_newest_sample(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks", samples=3))
    scraper = scraper_of(host)
    first = {"learner": "clicks", "layer": "hidden_0"}
    assert scraper.value("cbp_layer_mean_abs_weight", first) == 0.05 + 3000 / 1e6
    assert scraper.value("cbp_layer_dormant_ratio", first) == 0.04
    assert scraper.value("cbp_layer_replacements_total", first) == 12
    assert scraper.value("cbp_layer_unit_age_steps", {**first, "quantile": "0.5"}) == 400
    assert scraper.value("cbp_layer_unit_utility", {**first, "quantile": "0.9"}) == 0.7
    assert scraper.value("cbp_layer_srank", first) == 88
    assert scraper.value("cbp_layer_gradient_rank", first) == 51.5
    assert scraper.value("cbp_layer_feature_norm", first) == 9.5
    assert scraper.value("cbp_layer_saturated_ratio", first) is None
    assert scraper.value("cbp_learner_trainability", {"learner": "clicks"}) is None


def test_a_tested_learner_shows_its_trainability(host: Any, make_learner: MakeLearner, tested: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    scraper = scraper_of(host)
    assert scraper.value("cbp_learner_trainability", {"learner": "clicks"}) is None
    host.add(tested("clicks"))
    assert scraper_of(host).value("cbp_learner_trainability", {"learner": "clicks"}) == pytest.approx(0.8)


def test_what_is_not_known_has_no_sample(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("new", samples=0, loss=None, accuracy=None, tasks=(), checkpoint=None))
    scraper = scraper_of(host)
    for name in ("cbp_learner_loss", "cbp_learner_accuracy", "cbp_learner_task_loss", "cbp_learner_checkpoint_step"):
        assert scraper.value(name, {"learner": "new"}) is None, name
    assert scraper.value("cbp_learner_steps_total", {"learner": "new"}) is not None
    assert scraper.value("cbp_layer_units", {"learner": "new", "layer": "hidden_0"}) is None


def test_without_a_sample_layers_are_gone(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a"), make_learner("b"), make_learner("c"))
    scraper = scraper_of(host, max_learners=2)
    assert scraper.value("cbp_layer_units", {"learner": "a", "layer": "output"}) == 10
    assert scraper.value("cbp_layer_units", {"learner": "_others", "layer": "output"}) == 10
    host.add(make_learner("a", samples=0), make_learner("c", samples=0))
    assert scraper.value("cbp_layer_units", {"learner": "a", "layer": "output"}) is None
    assert scraper.value("cbp_layer_units", {"learner": "_others", "layer": "output"}) == 10  # of b
    assert scraper.value("cbp_layer_replacements_total", {"learner": "a", "layer": "hidden_0"}) == 12


def test_the_output_layer_has_weights_but_no_dormancy(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("clicks"))
    scraper = scraper_of(host)
    output = {"learner": "clicks", "layer": "output"}
    assert scraper.value("cbp_layer_mean_abs_weight", output) is not None
    assert scraper.value("cbp_layer_dormant_ratio", output) is None


def test_service_and_engine(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a"), make_learner("b"), make_learner("c", state=LearnerState.UNAVAILABLE))
    host.add(make_learner("deleted", state=LearnerState.DELETED, delete_time=host.journal.since))
    host.broken["d"] = "its checkpoint is damaged"
    scraper = scraper_of(host)
    for name, labels, value in (
        ("cbp_learners", {"state": "active"}, 2),
        ("cbp_learners", {"state": "unavailable"}, 1),
        ("cbp_learners", {"state": "evicted"}, 0),
        ("cbp_learners", {"state": "quarantined"}, 0),
        ("cbp_learners", {"state": "deleted"}, 1),
        ("cbp_learner_steps_total", {"learner": "deleted"}, None),
        ("cbp_unreadable_learners", {}, 1),
        ("cbp_train_streams", {}, 2),
        ("cbp_queued_batches", {}, 12),
        ("cbp_journal_up", {}, 1),
        ("cbp_journal_change_timestamp_seconds", {}, host.journal.since.timestamp()),
        ("cbp_engine_up", {}, 1),
        ("cbp_engine_restarts_total", {}, 1),
        ("cbp_engine_step_seconds_sum", {}, 12.5),
        ("cbp_engine_step_seconds_count", {}, 50_000),
        ("cbp_engine_resident_memory_bytes", {}, 300 * 2**20),
    ):
        assert scraper.value(name, labels) == value, name
    host.engine = replace(host.engine, up=False)
    assert scraper.value("cbp_engine_up") == 0
    host.journal = JournalStatus(up=False, since=host.journal.since, reason="disk full")
    assert scraper.value("cbp_journal_up") == 0


def test_a_quarantined_learner_has_a_series_of_its_own(
    host: Any, make_learner: MakeLearner, quarantined: MakeLearner
) -> None:
    host.add(make_learner("a"), make_learner("b"), quarantined("y"), quarantined("z", state=LearnerState.EVICTED))
    scraper = scraper_of(host, max_learners=2)
    step(host, "a", 10)
    assert names_with_series(scraper) == {"y", "z", "_others"}
    assert scraper.value("cbp_learner_quarantined", {"learner": "y"}) == 1
    assert scraper.value("cbp_learner_quarantined", {"learner": "_others"}) == 0


def test_a_learner_that_was_never_brought_back_has_no_series(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a", state=LearnerState.UNAVAILABLE), make_learner("b", state=LearnerState.EVICTED))
    scraper = scraper_of(host)
    assert names_with_series(scraper) == {"b"}
    host.add(make_learner("a", step=2500))
    assert names_with_series(scraper) == {"a", "b"}
    host.add(make_learner("a", step=2500, state=LearnerState.UNAVAILABLE))  # the engine restarts
    assert names_with_series(scraper) == {"a", "b"}


def names_with_series(scraper: Scraper) -> set[str]:
    return {
        sample.labels["learner"]
        for family in scraper.families()
        for sample in family.samples
        if sample.name == "cbp_learner_steps_total"
    }


def step(host: Any, learner_id: str, steps: int) -> None:
    record = host.records[learner_id]
    host.add(replace(record, progress=replace(record.progress, step=record.progress.step + steps)))


def test_the_most_recently_active_learners_have_series_of_their_own(host: Any, make_learner: MakeLearner) -> None:
    host.add(*(make_learner(name) for name in "abcd"))
    scraper = scraper_of(host, max_learners=2)
    assert names_with_series(scraper) == {"a", "b", "_others"}
    step(host, "d", 10)
    assert names_with_series(scraper) == {"d", "a", "_others"}
    for name in "abcd":  # equally active now: those who have series keep them
        step(host, name, 10)
    assert names_with_series(scraper) == {"d", "a", "_others"}


def test_series_are_those_of_their_learners_however_many_come_and_go(host: Any, make_learner: MakeLearner) -> None:
    names = [f"learner-{number}" for number in range(60)]
    host.add(*(make_learner(name) for name in names))
    scraper = scraper_of(host, max_learners=40)
    scraper.text()
    for round_number in range(1, 6):
        active = names[7 * round_number : 7 * round_number + 30]
        for steps, name in enumerate(active, start=1):
            step(host, name, steps)
        del host.records[names[round_number]]
        host.add(make_learner(f"new-{round_number}", step=round_number, samples=round_number % 2))
        shown = {
            sample.labels["learner"]: sample.value
            for family in scraper.families()
            for sample in family.samples
            if sample.name == "cbp_learner_steps_total"
        }
        assert len(shown) == 41  # with the others
        assert shown.keys() >= set(active)
        del shown["_others"]
        assert shown == {name: host.records[name].progress.step for name in shown}


def test_nobody_is_among_the_others_while_there_is_room(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a"), make_learner("b"))
    assert names_with_series(scraper_of(host, max_learners=2)) == {"a", "b"}


def test_the_others_counter_counts_increases_and_never_falls(host: Any, make_learner: MakeLearner) -> None:
    host.add(*(make_learner(name) for name in "abc"))
    scraper = scraper_of(host, max_learners=1)

    def others() -> float | None:
        return scraper.value("cbp_learner_steps_total", {"learner": "_others"})

    assert others() == 0
    for name in "abc":
        step(host, name, 100)
    assert others() == 200  # of b and c
    step(host, "c", 50)  # c takes the series from a
    assert others() == 200
    assert scraper.value("cbp_learner_steps_total", {"learner": "c"}) == 2150
    del host.records["b"]
    assert others() == 200


def test_gauges_of_the_others_are_sums_or_means(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a"), make_learner("b", loss=0.2), make_learner("c", loss=0.4, queued_batches=1))
    scraper = scraper_of(host, max_learners=1)
    others = {"learner": "_others"}
    assert scraper.value("cbp_learner_loss", others) == pytest.approx(0.3)
    assert scraper.value("cbp_learner_queued_batches", others) == 5
    assert scraper.value("cbp_layer_units", {**others, "layer": "hidden_0"}) == 200
    assert scraper.value("cbp_layer_dormant_ratio", {**others, "layer": "hidden_1"}) == 0.08


def test_a_learner_made_anew_under_an_old_name_starts_over(host: Any, make_learner: MakeLearner) -> None:
    host.add(make_learner("a"), make_learner("b"))
    scraper = scraper_of(host, max_learners=1)
    scraper.text()
    host.add(make_learner("b", uid="another", step=5, examples=5))
    assert scraper.value("cbp_learner_steps_total", {"learner": "b"}) == 5


@pytest.mark.parametrize("room", [100, 1])
@pytest.mark.parametrize("wrong", [{"step": "1"}, {"examples": True, "loss": []}, {"replacements": 3}])
def test_a_record_that_cannot_be_written_hides_no_other(
    host: Any, make_learner: MakeLearner, wrong: dict[str, Any], room: int
) -> None:
    """Whether it has series of its own, or is one of the others."""
    host.add(*[make_learner(name) for name in ("a", "b", "c")])
    scraper = scraper_of(host, max_learners=room)
    scraper.text()
    for name, changes in {"a": {}, "b": wrong}.items():
        host.records[name].progress = replace(host.records[name].progress, **changes)
    named = _with_steps(scraper)
    assert list(host.broken) == ["b"]
    assert named == ({"a", "c"} if room > 1 else {"a", "_others"})
    assert _with_steps(scraper) == named


def _with_steps(scraper: Scraper) -> set[str]:
    samples = [sample for family in scraper.families() for sample in family.samples]
    return {sample.labels["learner"] for sample in samples if sample.name == "cbp_learner_steps_total"}


def test_events_are_counted(registry: CollectorRegistry) -> None:
    rpc, events = RpcMetrics(registry), HostMetrics(registry)
    rpc.observe("cbp.v1.TrainingService/Predict", "OK", 0.002)
    rpc.observe("cbp.v1.TrainingService/Predict", "UNAVAILABLE", 0.2)
    events.batch_rejected(SequenceGap(received=5, expected=3))
    events.checkpoint_written(0.02, 4096)
    events.checkpoint_failed()
    events.learner_recovered(0.7)
    events.entries_replayed(120)
    events.learner_quarantined()
    events.learner_evicted()
    journal = JournalMetrics(registry)
    journal.journal_written(0.004, 3, 900)
    journal.journal_failed()
    predict = {"method": "cbp.v1.TrainingService/Predict"}
    for name, labels, value in (
        ("cbp_rpc_requests_total", {**predict, "code": "OK"}, 1),
        ("cbp_rpc_requests_total", {**predict, "code": "UNAVAILABLE"}, 1),
        ("cbp_rpc_duration_seconds_count", predict, 2),
        ("cbp_batches_rejected_total", {"reason": "SEQUENCE_GAP"}, 1),
        ("cbp_batches_rejected_total", {"reason": "INVALID_BATCH"}, 0),
        ("cbp_checkpoints_total", {}, 1),
        ("cbp_checkpoint_written_bytes_total", {}, 4096),
        ("cbp_checkpoint_failures_total", {}, 1),
        ("cbp_checkpoint_duration_seconds_sum", {}, 0.02),
        ("cbp_recovery_duration_seconds_sum", {}, 0.7),
        ("cbp_replayed_entries_total", {}, 120),
        ("cbp_quarantines_total", {}, 1),
        ("cbp_evictions_total", {}, 1),
        ("cbp_journal_commit_duration_seconds_sum", {}, 0.004),
        ("cbp_journal_entries_total", {}, 3),
        ("cbp_journal_written_bytes_total", {}, 900),
        ("cbp_journal_commit_failures_total", {}, 1),
    ):
        assert registry.get_sample_value(name, labels) == value, (name, labels)


def test_registering_reads_nothing(registry: CollectorRegistry) -> None:
    class Starting:
        def learners(self) -> Any:
            raise LearnerNotFound("the server is not up yet")

    registry.register(ServerCollector(Starting()))  # type: ignore[arg-type]


def test_every_metric_is_documented_and_every_documented_metric_exists(everything: Scraper) -> None:
    exported = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in everything.families()
        if family.name.startswith("cbp_")
    }
    documented = set(re.findall(r"^\| `(cbp_\w+)", DOCS.read_text(), flags=re.MULTILINE))
    assert exported == documented


def test_the_text_reads_back(everything: Scraper) -> None:
    families = everything.families()
    assert {"cbp_learner_steps", "process_resident_memory_bytes", "python_info"} <= {family.name for family in families}
    assert not [family.name for family in families if family.name.endswith("_created")]


def test_promtool_has_nothing_to_say(everything: Scraper) -> None:
    checked = subprocess.run(
        [system_tool("promtool"), "check", "metrics"],
        input=everything.text().encode(),
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
