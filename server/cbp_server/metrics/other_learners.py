"""Learners without series of their own: what they have in common is one learner to Prometheus."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cbp import LearnerProgress
from cbp_server.metrics.exposition import label_set, lines
from cbp_server.metrics.learner_families import (
    LAYER_GAUGES,
    LEARNER_COUNTERS,
    LEARNER_GAUGES,
    REPLACEMENTS,
    SAMPLE_FAMILIES,
    STATE_FAMILIES,
    Summary,
    layer_gauges,
    layer_name,
    state_of,
)
from cbp_server.records.learners import LearnerRecord
from cbp_server.records.samples import LayerValues

#: Value of the label `learner` that stands for all learners without series of their own. No learner can have this
#: name: ids start with a letter.
OTHERS = "_others"

_FIRST_ROWS = 64


@dataclass
class _Member:
    state: tuple[object, ...] = ()
    layers: tuple[LayerValues, ...] = ()


class OtherLearners:
    """Sums, means and lowest values over its members; of their counters, by how much they have grown while members."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}  # by learner id
        self._increases = [0.0] * len(LEARNER_COUNTERS)
        self._replacements: dict[str, float] = {}  # by layer
        self._gauges = _Numbers([gauge.summary for gauge in LEARNER_GAUGES])
        self._layer_gauges: dict[str, _Numbers] = {}

    def take(self, learner: LearnerRecord, counted: LearnerProgress) -> None:
        """Makes the learner a member, or sees what is new of it; its counters go on from `counted`."""
        member = self._members.setdefault(learner.learner_id, _Member())
        state, layers = state_of(learner), learner.samples.newest_layers
        if state != member.state:
            member.state = state
            self._count(learner.progress, counted)
            self._gauges.put(learner.learner_id, [gauge.read(learner) for gauge in LEARNER_GAUGES])
        if layers is not member.layers:
            self._forget_layers(learner.learner_id, member)
            member.layers = layers
            for layer in layers:
                name = layer_name(layer)
                if name not in self._layer_gauges:
                    self._layer_gauges[name] = _Numbers([gauge.summary for gauge in LAYER_GAUGES])
                self._layer_gauges[name].put(learner.learner_id, layer_gauges(layer))

    def leave(self, learner_id: str) -> None:
        """The learner is no member, whether or not it was."""
        member = self._members.pop(learner_id, None)
        if member is not None:
            self._gauges.remove(learner_id)
            self._forget_layers(learner_id, member)

    def lines(self) -> tuple[bytes, ...]:
        """The text of each of `STATE_FAMILIES` and `SAMPLE_FAMILIES`, empty while there is no member."""
        if not self._members:
            return (b"",) * len(STATE_FAMILIES + SAMPLE_FAMILIES)
        own = (label_set(learner=OTHERS),)
        of_layers = [numbers.summaries() for numbers in self._layer_gauges.values()]
        counters = [
            lines(counter.family.sample_name, own, [increase])
            for counter, increase in zip(LEARNER_COUNTERS, self._increases, strict=True)
        ]
        gauges = [
            lines(gauge.family.sample_name, own, [value])
            for gauge, value in zip(LEARNER_GAUGES, self._gauges.summaries(), strict=True)
        ]
        replacements = lines(
            REPLACEMENTS.sample_name, map(_labels_of, self._replacements), list(self._replacements.values())
        )
        layers = [
            lines(gauge.family.sample_name, map(_labels_of, self._layer_gauges), [each[position] for each in of_layers])
            for position, gauge in enumerate(LAYER_GAUGES)
        ]
        no_quantiles = [b""] * (len(SAMPLE_FAMILIES) - len(LAYER_GAUGES))
        return (*counters, *gauges, replacements, *layers, *no_quantiles)

    def _count(self, now: LearnerProgress, counted: LearnerProgress) -> None:
        for position, counter in enumerate(LEARNER_COUNTERS):
            self._increases[position] += max(0.0, counter.read(now) - counter.read(counted))
        for layer, replaced in now.replacements.items():
            increase = max(0.0, replaced - counted.replacements.get(layer, 0))
            self._replacements[layer] = self._replacements.get(layer, 0.0) + increase

    def _forget_layers(self, learner_id: str, member: _Member) -> None:
        for layer in member.layers:
            if (numbers := self._layer_gauges.get(layer_name(layer))) is not None:
                numbers.remove(learner_id)


def _labels_of(layer: str) -> str:
    return label_set(learner=OTHERS, layer=layer)


class _Numbers:
    """Some numbers of each of many learners, any of which may be missing, kept so that all are summed up in no time."""

    def __init__(self, summaries: Sequence[Summary]) -> None:
        self._summaries = summaries
        self._values = np.zeros((_FIRST_ROWS, len(summaries)))  # 0 where there is none
        self._present = np.zeros((_FIRST_ROWS, len(summaries)), dtype=bool)
        self._rows: dict[str, int] = {}  # by learner id
        self._free = list(range(_FIRST_ROWS))

    def put(self, learner_id: str, values: Sequence[float | None]) -> None:
        """The learner's numbers from now on."""
        if learner_id not in self._rows:
            if not self._free:
                self._grow()
            self._rows[learner_id] = self._free.pop()
        row = self._rows[learner_id]
        self._values[row] = [0.0 if value is None else value for value in values]
        self._present[row] = [value is not None for value in values]

    def remove(self, learner_id: str) -> None:
        row = self._rows.pop(learner_id, None)
        if row is None:
            return
        self._values[row], self._present[row] = 0.0, False
        self._free.append(row)

    def summaries(self) -> list[float | None]:
        """One number of each kind for all learners, None where all miss it."""
        counts = self._present.sum(axis=0)
        with np.errstate(invalid="ignore", over="ignore"):  # learners that diverged
            sums = self._values.sum(axis=0)
        lowest = np.where(self._present, self._values, np.inf).min(axis=0)
        found: list[float | None] = []
        for summary, count, total, least in zip(self._summaries, counts, sums, lowest, strict=True):
            if not count:
                found.append(None)
            elif summary is Summary.LOWEST:
                found.append(float(least))
            else:
                found.append(float(total if summary is Summary.SUM else total / count))
        return found

    def _grow(self) -> None:
        rows = len(self._values)
        self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._present = np.concatenate([self._present, np.zeros_like(self._present)])
        self._free = list(range(rows, 2 * rows))
