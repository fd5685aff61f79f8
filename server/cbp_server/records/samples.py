"""Plasticity samples of hosted learners, which are kept packed.

As objects they would take five times the memory, and every full round of garbage collection would go through all of
them while messages wait. So the engine packs each sample at once, and only those that somebody reads are unpacked.
"""

import pickle
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any, NewType, TypeAlias

from cbp.plasticity.samples import LayerPlasticity, PlasticitySample, Trainability

#: A `SampleRecord`, for processes that run the same code.
PackedSample = NewType("PackedSample", bytes)


@dataclass(frozen=True)
class SampleRecord:
    """One plasticity sample and when it was taken (UTC)."""

    sample: PlasticitySample
    time: datetime


_MEASURES = tuple(field.name for field in fields(LayerPlasticity))
_measured = attrgetter(*_MEASURES)

#: The values of a `LayerPlasticity`, for whoever reads those of many learners at a time; see `reader`.
LayerValues: TypeAlias = tuple[Any, ...]


def reader(*attributes: str) -> "itemgetter[Any]":
    """Reads these attributes of a `LayerPlasticity` off its `LayerValues`: one is a value, several are a tuple."""
    return itemgetter(*map(_MEASURES.index, attributes))


def pack(record: SampleRecord) -> PackedSample:
    """What `unpack` makes an equal record of."""
    sample = record.sample
    layers = tuple(map(_measured, sample.layers))
    plain = (record.time, sample.step, sample.examples, sample.trainability, layers)
    return PackedSample(pickle.dumps(plain, protocol=pickle.HIGHEST_PROTOCOL))


def unpack(packed: PackedSample) -> SampleRecord:
    """The record that `pack` was given."""
    return _record(pickle.loads(packed))


def _record(plain: tuple[Any, ...]) -> SampleRecord:
    time, step, examples, trainability, layers = plain
    measured = tuple([LayerPlasticity(**dict(zip(_MEASURES, layer, strict=True))) for layer in layers])
    return SampleRecord(
        PlasticitySample(step=step, examples=examples, layers=measured, trainability=trainability), time
    )


class SampleHistory:
    """A learner's newest samples; older ones go when there are more than so many."""

    def __init__(self, most: int) -> None:
        self._packed: deque[PackedSample] = deque(maxlen=most)
        self._newest: tuple[Any, ...] | None = None  # as `pack` has it, if it has been asked for

    def extend(self, samples: Iterable[PackedSample]) -> None:
        """Takes further samples, oldest first."""
        for sample in samples:
            self._packed.append(sample)
            self._newest = None

    def replace(self, samples: Iterable[PackedSample]) -> None:
        """Keeps these instead of all others."""
        self._packed.clear()
        self._newest = None
        self.extend(samples)

    @property
    def newest(self) -> SampleRecord | None:
        """None if there is none."""
        plain = self._plain()
        return _record(plain) if plain else None

    @property
    def newest_layers(self) -> tuple[LayerValues, ...]:
        """Of the newest sample, the very same until there is a newer one; none if there is none."""
        plain = self._plain()
        return plain[-1] if plain else ()

    @property
    def newest_trainability(self) -> Trainability | None:
        """Of the newest sample."""
        plain = self._plain()
        return plain[-2] if plain else None

    @property
    def packed(self) -> tuple[PackedSample, ...]:
        """All, oldest first."""
        return tuple(self._packed)

    def last(self, count: int) -> list[SampleRecord]:
        """The newest ones, at most so many, oldest first."""
        skipped = max(len(self._packed) - count, 0)
        return [unpack(packed) for packed in islice(self._packed, skipped, None)]

    def _plain(self) -> tuple[Any, ...] | None:
        if self._newest is None and self._packed:
            self._newest = pickle.loads(self._packed[-1])
        return self._newest
