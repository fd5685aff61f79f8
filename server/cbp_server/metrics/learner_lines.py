"""Series of a few learners as lines of text, written together, and anew only when one of them has changed."""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain

from cbp.plasticity.samples import QUANTILES
from cbp_server.metrics.exposition import SeriesText, label_set
from cbp_server.metrics.learner_families import (
    LAYER_GAUGES,
    LEARNER_COUNTERS,
    LEARNER_GAUGES,
    REPLACEMENTS,
    UNIT_AGE,
    UNIT_UTILITY,
    layer_gauges,
    layer_name,
    state_of,
)
from cbp_server.records.learners import LearnerRecord
from cbp_server.records.samples import LayerValues, reader

_OWN_NAMES = tuple(each.family.sample_name for each in (*LEARNER_COUNTERS, *LEARNER_GAUGES))
_GAUGE_NAMES = tuple(gauge.family.sample_name for gauge in LAYER_GAUGES)
_age_quantiles, _utility_quantiles = reader("age_quantiles"), reader("utility_quantiles")
_age_quantiles, _utility_quantiles = reader("age_quantiles"), reader("utility_quantiles")
_NO_QUANTILES: tuple[None, ...] = (None,) * len(QUANTILES)

#: Learners that are written together. Reading and writing numbers costs little, beginning to do so costs more; but one
#: that has changed makes work for all of them, and nothing else happens on the event loop meanwhile.
_MOST_MEMBERS = 16

#: Names with their labels, for each of a few families. Tuples of text are no work for the garbage collector.
_Series = tuple[tuple[str, ...], ...]


class LearnerLines:
    """The lines of its members, in the order in which they became members."""

    def __init__(self) -> None:
        self._members: dict[str, _SeriesOfLearner] = {}  # by learner id
        self._states: list[tuple[object, ...]] | None = None
        self._state_text = _Text()
        self._state_lines: tuple[bytes, ...] = ()
        self._samples: list[tuple[LayerValues, ...]] | None = None
        self._sample_text = _Text()
        self._sample_lines: tuple[bytes, ...] = ()

    @property
    def members(self) -> Collection[str]:
        """Ids of the learners that it has the lines of."""
        return self._members

    @property
    def is_full(self) -> bool:
        return len(self._members) >= _MOST_MEMBERS

    def join(self, learner_id: str) -> None:
        self._members[learner_id] = _SeriesOfLearner(learner_id)
        self._states = self._samples = None

    def leave(self, learner_id: str) -> None:
        del self._members[learner_id]
        self._states = self._samples = None

    def of(self, learners: Sequence[LearnerRecord]) -> tuple[bytes, ...]:
        """The text of each of `STATE_FAMILIES` and `SAMPLE_FAMILIES`, of any number of lines.

        Args:
            learners: the members, in their order.
        """
        states = [state_of(learner) for learner in learners]
        if states != self._states:
            self._states, self._state_lines = states, self._write_state(learners)
        samples = [learner.samples.newest_layers for learner in learners]
        if samples != self._samples:
            self._samples, self._sample_lines = samples, self._write_samples(samples)
        return self._state_lines + self._sample_lines

    def _write_state(self, learners: Sequence[LearnerRecord]) -> tuple[bytes, ...]:
        replacements = [learner.progress.replacements for learner in learners]
        series = [
            member.of_state(tuple(layers)) for member, layers in zip(self._members.values(), replacements, strict=True)
        ]
        values: list[float | None] = [
            counter.read(learner.progress) for counter in LEARNER_COUNTERS for learner in learners
        ]
        values += [gauge.read(learner) for gauge in LEARNER_GAUGES for learner in learners]
        values += chain.from_iterable(layers.values() for layers in replacements)
        return self._state_text.of(series, values)

    def _write_samples(self, samples: Sequence[Sequence[LayerValues]]) -> tuple[bytes, ...]:
        series = [
            member.of_sample(tuple(map(layer_name, sample)))
            for member, sample in zip(self._members.values(), samples, strict=True)
        ]
        layers = list(chain.from_iterable(samples))
        by_gauge = zip(*map(layer_gauges, layers), strict=True)
        ages = [quantiles or _NO_QUANTILES for quantiles in map(_age_quantiles, layers)]
        utilities = [quantiles or _NO_QUANTILES for quantiles in map(_utility_quantiles, layers)]
        return self._sample_text.of(series, list(chain(*by_gauge, *ages, *utilities)))


class _Text:
    """The text of families that several learners have series in."""

    def __init__(self) -> None:
        self._series: list[_Series] = []
        self._text = SeriesText(())

    def of(self, series: list[_Series], values: Sequence[float | None]) -> tuple[bytes, ...]:
        """The text of each family.

        Args:
            series: of each learner.
            values: of all series, those of a family together.
        """
        if series != self._series:
            self._series = series
            self._text = SeriesText([list(chain.from_iterable(family)) for family in zip(*series, strict=True)])
        return self._text.of(values)


class _SeriesOfLearner:
    """Names and labels of a learner's series, the very same until it has other layers."""

    def __init__(self, learner_id: str) -> None:
        self._learner_id = learner_id
        self._state_layers: tuple[str, ...] | None = None
        self._state: _Series = ()
        self._sample_layers: tuple[str, ...] | None = None
        self._sample: _Series = ()

    def of_state(self, layers: tuple[str, ...]) -> _Series:
        """Those in `STATE_FAMILIES`, with these layers in the last one."""
        if layers != self._state_layers:
            own = label_set(learner=self._learner_id)
            replacements = tuple([REPLACEMENTS.sample_name + labels for labels in self._of_layers(layers)])
            self._state_layers, self._state = layers, (*((name + own,) for name in _OWN_NAMES), replacements)
        return self._state

    def of_sample(self, layers: tuple[str, ...]) -> _Series:
        """Those of these layers in `SAMPLE_FAMILIES`."""
        if layers != self._sample_layers:
            of_layers = self._of_layers(layers)
            of_quantiles = [
                label_set(learner=self._learner_id, layer=layer, quantile=str(quantile))
                for layer in layers
                for quantile in QUANTILES
            ]
            self._sample_layers = layers
            self._sample = (
                *(tuple([name + labels for labels in of_layers]) for name in _GAUGE_NAMES),
                *(tuple([family.name + labels for labels in of_quantiles]) for family in (UNIT_AGE, UNIT_UTILITY)),
            )
        return self._sample

    def _of_layers(self, layers: Iterable[str]) -> list[str]:
        return [label_set(learner=self._learner_id, layer=layer) for layer in layers]
