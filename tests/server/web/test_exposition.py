"""The text of GET /metrics is what prometheus_client would write, whatever learners there are and how they change."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from cbp import LayerPlasticity, PlasticitySample
from cbp.plasticity.samples import QUANTILES
from cbp_server.loop.turns import Turns
from cbp_server.metrics.exposition import Exposition, Family, SeriesText, TextFormat
from cbp_server.metrics.learner_families import (
    LAYER_GAUGES,
    LEARNER_COUNTERS,
    LEARNER_GAUGES,
    REPLACEMENTS,
    UNIT_AGE,
    UNIT_UTILITY,
)
from cbp_server.metrics.learners import LearnerMetrics
from cbp_server.records.learners import LearnerRecord
from cbp_server.records.samples import SampleHistory, SampleRecord, pack

TEXT = "text/plain;version=0.0.4"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"

numbers = st.one_of(st.floats(), st.integers(0, 2**53), st.sampled_from([999_999.9, 1e6, 1e16, 1e-7, -2e6]))
names = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=8)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


quantiles = maybe(st.tuples(numbers, numbers, numbers))
layers = st.builds(
    LayerPlasticity,
    layer=names,
    units=st.integers(1, 10_000),
    **{gauge.attribute: maybe(numbers) for gauge in LAYER_GAUGES if gauge.attribute != "units"},
    replacements=st.none(),
    age_quantiles=quantiles,
    utility_quantiles=quantiles,
)
samples = st.lists(layers, max_size=3, unique_by=lambda layer: layer.layer)


@dataclass(frozen=True)
class Change:
    """What becomes of one learner."""

    of_progress: dict[str, Any]
    of_record: dict[str, Any]
    layers: list[LayerPlasticity] | None


changes = st.builds(
    Change,
    st.fixed_dictionaries(
        {},
        optional={
            "step": st.integers(0, 2**53),
            "loss": maybe(numbers),
            "accuracy": maybe(numbers),
            "pending": st.integers(0, 9),
            "tasks": st.just(()),
            "replacements": st.dictionaries(names, st.integers(0, 10**7), max_size=2),
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "queued_batches": st.integers(0, 5),
            "journal_position": st.integers(61, 10**7),
            "checkpoint": st.none(),
        },
    ),
    maybe(samples),
)
steps = st.lists(st.dictionaries(names, maybe(changes), min_size=1, max_size=4), min_size=1, max_size=3)


def applied(change: Change, learner: LearnerRecord) -> LearnerRecord:
    changed = replace(learner, progress=replace(learner.progress, **change.of_progress), **change.of_record)
    if change.layers is not None:
        sample = PlasticitySample(step=1, examples=1, layers=tuple(change.layers))
        changed.samples = SampleHistory(1)
        changed.samples.extend([pack(SampleRecord(sample, learner.create_time))])
    return changed


class Written(Collector):
    """The same series, as prometheus_client has them written."""

    def __init__(self, learners: Iterable[LearnerRecord]) -> None:
        self._learners = list(learners)

    def collect(self) -> Iterable[Metric]:
        for counter in LEARNER_COUNTERS:
            values = [([learner.learner_id], counter.read(learner.progress)) for learner in self._learners]
            yield family_of(counter.family, ["learner"], values)
        for gauge in LEARNER_GAUGES:
            yield family_of(
                gauge.family, ["learner"], [([learner.learner_id], gauge.read(learner)) for learner in self._learners]
            )
        replaced = [
            ([learner.learner_id, layer], count)
            for learner in self._learners
            for layer, count in learner.progress.replacements.items()
        ]
        yield family_of(REPLACEMENTS, ["learner", "layer"], replaced)
        layers = [
            (learner.learner_id, layer)
            for learner in self._learners
            if (newest := learner.samples.newest) is not None
            for layer in newest.sample.layers
        ]
        for of_layer in LAYER_GAUGES:
            read = attrgetter(of_layer.attribute)
            yield family_of(
                of_layer.family, ["learner", "layer"], [([who, one.layer], read(one)) for who, one in layers]
            )
        for summary, quantiles_of in ((UNIT_AGE, "age_quantiles"), (UNIT_UTILITY, "utility_quantiles")):
            metric = Metric(summary.name, summary.help, summary.type)
            for who, one in layers:
                for quantile, value in zip(QUANTILES, getattr(one, quantiles_of) or (), strict=False):
                    labels = {"learner": who, "layer": one.layer, "quantile": str(quantile)}
                    metric.add_sample(summary.name, labels, value)
            yield metric


def family_of(family: Family, labels: list[str], values: Iterable[tuple[list[str], float | None]]) -> Metric:
    kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=labels)
    for label_values, value in values:
        if value is not None:
            metric.add_metric(label_values, value)
    return metric


def lines_of(text: str) -> list[tuple[str, ...]]:
    """Its lines; of samples series and value, which two writers may spell differently."""
    split = [(line,) if line.startswith("#") else line.rpartition(" ") for line in text.removesuffix("\n").split("\n")]
    return [(*before, str(float(last))) if before else (last,) for *before, last in split]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(steps=steps)
def test_the_text_is_that_of_the_library(
    host: Any, make_learner: Callable[..., LearnerRecord], steps: list[dict[str, Change | None]]
) -> None:
    host.records = {}
    exposition = Exposition(CollectorRegistry(), LearnerMetrics(host, max_learners=10_000))
    for step in steps:
        for learner_id, change in step.items():
            if change is None:
                host.records.pop(learner_id, None)
            else:
                host.add(applied(change, host.records.get(learner_id) or make_learner(learner_id)))
        for accept in (TEXT, OPENMETRICS):
            text_format = TextFormat.accepted(accept)
            written = asyncio.run(exposition.text(text_format)).decode()
            expected = text_format.encode(Written(host.learners())).decode()
            assert sorted(lines_of(written)) == sorted(lines_of(expected))  # learners come in an order of their own
            if accept is TEXT:  # the other parser refuses some of these values, such as a negative quantile
                families = list(parse_text(written))
                assert samples_of(families) == samples_of(Written(host.learners()).collect())
                assert len(families) == len({family.name for family in families})


def samples_of(families: Iterable[Metric]) -> dict[tuple[str, tuple[tuple[str, str], ...]], str]:
    """By name and labels; as text, since NaN is not equal to itself."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): repr(float(sample.value))
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
def test_every_name_reads_as_it_is_whatever_escaping_is_asked_for(
    host: Any, make_learner: Callable[..., LearnerRecord], accept: str
) -> None:
    host.add(make_learner("clicks"))
    exposition = Exposition(CollectorRegistry(), LearnerMetrics(host, max_learners=1))
    plain = asyncio.run(exposition.text(TextFormat.accepted(accept)))
    for escaping in ("underscores", "allow-utf-8", "dots", "values"):
        text_format = TextFormat.accepted(f"{accept.replace('0.0.4', '1.0.0')};escaping={escaping}")
        assert asyncio.run(exposition.text(text_format)) == plain
        assert not text_format.content_type.endswith(("dots", "values"))


async def test_others_have_their_turn_while_many_learners_are_read(
    host: Any, make_learner: Callable[..., LearnerRecord]
) -> None:
    host.add(*(make_learner(f"learner-{number}") for number in range(300)))
    exposition = Exposition(CollectorRegistry(), LearnerMetrics(host, max_learners=100))
    scraping = asyncio.create_task(exposition.text(TextFormat.accepted(TEXT)))
    turns = 0
    while not scraping.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 3


async def test_scrapes_at_once_agree(host: Any, make_learner: Callable[..., LearnerRecord]) -> None:
    host.add(*(make_learner(f"learner-{number}") for number in range(100)))
    metrics = LearnerMetrics(host, max_learners=50)
    first, second = await asyncio.gather(metrics.collect_lines(Turns()), metrics.collect_lines(Turns()))
    assert first == second


def test_series_without_values_have_no_lines() -> None:
    series = SeriesText([["a{x}", "a{y}"], ["b{x}"], []])

    assert series.of([None, None, None]) == (b"", b"", b"")
    assert series.of([1, None, float("nan")]) == (b"a{x} 1\n", b"b{x} NaN\n", b"")
    assert series.of([None, 2.5, 3]) == (b"a{y} 2.5\n", b"b{x} 3\n", b"")
    assert SeriesText([[]]).of([]) == (b"",)
