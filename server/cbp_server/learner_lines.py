"""Series of one learner as lines of text, written anew only when the learner has changed."""

from collections.abc import Iterable, Sequence
from itertools import chain

from cbp import LayerPlasticity
from cbp.samples import QUANTILES
from cbp_server.exposition import SeriesText, label_set
from cbp_server.learner_families import (
    LAYER_GAUGES,
    LEARNER_COUNTERS,
    LEARNER_GAUGES,
    REPLACEMENTS,
    SAMPLE_FAMILIES,
    UNIT_AGE,
    UNIT_UTILITY,
    gauges_of_layer,
    newest_layers,
    state_of,
)
from cbp_server.records import LearnerRecord

_OWN_NAMES = tuple(each.family.sample_name for each in (*LEARNER_COUNTERS, *LEARNER_GAUGES))
_GAUGE_NAMES = tuple(gauge.family.sample_name for gauge in LAYER_GAUGES)
_NO_SAMPLE: tuple[str, ...] = ("",) * len(SAMPLE_FAMILIES)
_NO_QUANTILES: tuple[None, ...] = (None,) * len(QUANTILES)


class LearnerLines:
    """The lines of one learner."""

    def __init__(self, learner_id: str) -> None:
        self._learner_id = learner_id
        self._state: tuple[object, ...] = ()
        self._state_layers: tuple[str, ...] | None = None
        self._state_text = SeriesText(())
        self._state_lines: tuple[str, ...] = ()
        self._layers: tuple[LayerPlasticity, ...] = ()
        self._sample_layers: tuple[str, ...] | None = None
        self._sample_text = SeriesText(())
        self._sample_lines = _NO_SAMPLE

    def of(self, learner: LearnerRecord) -> tuple[str, ...]:
        """The text of each of `STATE_FAMILIES` and `SAMPLE_FAMILIES`, of any number of lines."""
        state, layers = state_of(learner), newest_layers(learner)
        if state != self._state:
            self._state, self._state_lines = state, self._write_state(learner)
        if layers is not self._layers:
            self._layers, self._sample_lines = layers, self._write_sample(layers) if layers else _NO_SAMPLE
        return self._state_lines + self._sample_lines

    def _write_state(self, learner: LearnerRecord) -> tuple[str, ...]:
        progress = learner.progress
        layers = tuple(progress.replacements)
        if layers != self._state_layers:
            own = label_set(learner=self._learner_id)
            self._state_layers = layers
            self._state_text = SeriesText(
                [*([name + own] for name in _OWN_NAMES), self._of_layers(REPLACEMENTS.sample_name, layers)]
            )
        values: list[float | None] = [counter.read(progress) for counter in LEARNER_COUNTERS]
        values += [gauge.read(learner) for gauge in LEARNER_GAUGES]
        values += progress.replacements.values()
        return self._state_text.of(values)

    def _write_sample(self, sample: Sequence[LayerPlasticity]) -> tuple[str, ...]:
        layers = tuple([layer.layer for layer in sample])
        if layers != self._sample_layers:
            self._sample_layers = layers
            self._sample_text = SeriesText(
                [
                    *(self._of_layers(name, layers) for name in _GAUGE_NAMES),
                    *(self._of_quantiles(family.name, layers) for family in (UNIT_AGE, UNIT_UTILITY)),
                ]
            )
        ages = [layer.age_quantiles or _NO_QUANTILES for layer in sample]
        utilities = [layer.utility_quantiles or _NO_QUANTILES for layer in sample]
        by_gauge = zip(*map(gauges_of_layer, sample), strict=True)
        return self._sample_text.of(list(chain(*by_gauge, *ages, *utilities)))

    def _of_layers(self, name: str, layers: Iterable[str]) -> list[str]:
        return [name + label_set(learner=self._learner_id, layer=layer) for layer in layers]

    def _of_quantiles(self, name: str, layers: Iterable[str]) -> list[str]:
        return [
            name + label_set(learner=self._learner_id, layer=layer, quantile=str(quantile))
            for layer in layers
            for quantile in QUANTILES
        ]
