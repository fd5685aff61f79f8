"""Series of one learner as lines of text, written anew only when the learner has changed."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from cbp import LayerPlasticity
from cbp.samples import QUANTILES
from cbp_server.exposition import label_set, lines
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

_GAUGE_NAMES = tuple(gauge.family.sample_name for gauge in LAYER_GAUGES)
_NO_SAMPLE: tuple[str, ...] = ("",) * len(SAMPLE_FAMILIES)


class LearnerLines:
    """The lines of one learner."""

    def __init__(self, learner_id: str) -> None:
        self._learner_id = learner_id
        self._own = (label_set(learner=learner_id),)
        self._layer_labels: dict[str, str] = {}
        self._quantile_labels: dict[str, tuple[str, ...]] = {}
        self._state: tuple[object, ...] = ()
        self._state_lines: tuple[str, ...] = ()
        self._layers: tuple[LayerPlasticity, ...] = ()
        self._sample_lines = _NO_SAMPLE

    def of(self, learner: LearnerRecord) -> tuple[str, ...]:
        """The text of each of `STATE_FAMILIES` and `SAMPLE_FAMILIES`, of any number of lines."""
        state, layers = state_of(learner), newest_layers(learner)
        if state != self._state:
            self._state, self._state_lines = state, tuple(self._write_state(learner))
        if layers is not self._layers:
            self._layers, self._sample_lines = layers, tuple(self._write_sample(layers)) if layers else _NO_SAMPLE
        return self._state_lines + self._sample_lines

    def _write_state(self, learner: LearnerRecord) -> Iterable[str]:
        for counter in LEARNER_COUNTERS:
            yield lines(counter.family.sample_name, self._own, [counter.read(learner.progress)])
        for gauge in LEARNER_GAUGES:
            yield lines(gauge.family.sample_name, self._own, [gauge.read(learner)])
        replacements = learner.progress.replacements
        yield lines(REPLACEMENTS.sample_name, map(self._labels_of, replacements), list(replacements.values()))

    def _write_sample(self, layers: Sequence[LayerPlasticity]) -> Iterable[str]:
        labels = [self._labels_of(layer.layer) for layer in layers]
        by_gauge = zip(*map(gauges_of_layer, layers), strict=True)
        for name, values in zip(_GAUGE_NAMES, by_gauge, strict=True):
            yield lines(name, labels, values)
        yield self._write_quantiles(UNIT_AGE.name, {layer.layer: layer.age_quantiles for layer in layers})
        yield self._write_quantiles(UNIT_UTILITY.name, {layer.layer: layer.utility_quantiles for layer in layers})

    def _write_quantiles(self, name: str, by_layer: Mapping[str, tuple[float, ...] | None]) -> str:
        known = {layer: values for layer, values in by_layer.items() if values}
        labels = chain.from_iterable(map(self._labels_of_quantiles, known))
        return lines(name, labels, list(chain.from_iterable(known.values())))

    def _labels_of(self, layer: str) -> str:
        if layer not in self._layer_labels:
            self._layer_labels[layer] = label_set(learner=self._learner_id, layer=layer)
        return self._layer_labels[layer]

    def _labels_of_quantiles(self, layer: str) -> tuple[str, ...]:
        if layer not in self._quantile_labels:
            self._quantile_labels[layer] = tuple(
                label_set(learner=self._learner_id, layer=layer, quantile=str(quantile)) for quantile in QUANTILES
            )
        return self._quantile_labels[layer]
