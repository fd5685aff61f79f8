"""Samples come out of a history as they went in, and the oldest ones go."""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from cbp import LayerPlasticity, PlasticitySample, Trainability
from cbp_server.records.samples import SampleHistory, SampleRecord, pack, reader, unpack

numbers = st.floats(allow_nan=False)
MEASURES = [name for name in LayerPlasticity.__annotations__ if name not in ("layer", "units")]
measures = st.none() | numbers | st.integers(0, 10**6) | st.tuples(numbers, numbers, numbers)
layers = st.builds(
    LayerPlasticity,
    layer=st.text(),
    units=st.integers(1),
    **dict.fromkeys(MEASURES, measures),
)
LAYER = LayerPlasticity(layer="hidden_0", units=5, **dict.fromkeys(MEASURES))
tests = st.builds(Trainability, step=st.integers(0), loss=numbers, fresh_loss=st.none(), chance_loss=numbers)
records = st.builds(
    SampleRecord,
    st.builds(
        PlasticitySample,
        step=st.integers(0),
        examples=st.integers(0),
        layers=st.lists(layers, max_size=4).map(tuple),
        trainability=st.none() | tests,
    ),
    st.datetimes(timezones=st.just(UTC)),
)


@given(records)
def test_packed_and_unpacked(record: SampleRecord) -> None:
    assert unpack(pack(record)) == record


@given(st.lists(records, max_size=6), st.integers(1, 4), st.integers(-1, 6))
def test_history(taken: list[SampleRecord], most: int, count: int) -> None:
    history = SampleHistory(most)
    assert history.newest is None
    for record in taken:
        history.extend([pack(record)])
        assert history.newest == record
    kept = taken[-most:]
    assert [unpack(packed) for packed in history.packed] == kept
    assert history.last(count) == (kept[-count:] if count > 0 else [])


@given(records)
def test_layers_are_the_same_until_there_is_another_sample(record: SampleRecord) -> None:
    history = SampleHistory(2)
    assert (history.newest_layers, history.newest_trainability) == ((), None)
    history.extend([pack(record)])
    layers = history.newest_layers
    assert history.newest_trainability == record.sample.trainability
    read = reader("layer", "units", "age_quantiles")
    assert list(map(read, layers)) == [(each.layer, each.units, each.age_quantiles) for each in record.sample.layers]
    history.extend([])
    assert history.newest_layers is layers
    history.extend([pack(replace(record, sample=replace(record.sample, layers=(LAYER,))))])
    assert list(map(reader("layer"), history.newest_layers)) == [LAYER.layer]


def test_replaced() -> None:
    sample = PlasticitySample(step=7, examples=7, layers=())
    old, new = (SampleRecord(sample, datetime(2026, 11, day, tzinfo=UTC)) for day in (29, 30))
    history = SampleHistory(3)
    history.extend([pack(old), pack(old)])
    history.replace([pack(new)])
    assert history.last(3) == [new]
    history.replace([])
    assert (history.newest, history.packed) == (None, ())
