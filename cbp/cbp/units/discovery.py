"""Which units of a module can be reset: from single facts to groups of units, and a table of what was found.

Units are the connected components of tied atoms. Those with the same producers, readers and normalisation layers form a
group; a unit of which something is not known, or which something else reads too, is left alone, with the reason.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.nn.parameter import UninitializedParameter

from cbp.errors import FieldViolation, SpecError
from cbp.networks import initial_bound
from cbp.spec.learner_spec import Initializer
from cbp.units.layer_facts import PACKAGES, UNIT_LAYERS, known_layer
from cbp.units.tracing import trace
from cbp.units.unit_facts import Computed, Tap, UnitFacts
from cbp.units.unit_groups import Attached, Incoming, Outgoing, Places, Reading, UnitGroup

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of what was found."""

    layers: tuple[str, ...]
    """Where the layers are that compute the units."""
    units: int
    """0 where it is not known which they are."""
    readers: tuple[str, ...]
    verdict: str
    means: tuple[str, ...] = ()
    """What becomes of the mean of a unit that goes, reader by reader."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """What can be reset in a module, and what is left alone."""

    groups: tuple[UnitGroup, ...]
    taps: tuple[Tap, ...]
    """Where the groups' activations are seen."""
    rows: tuple[TableRow, ...]
    """One per group, in their order."""
    left_alone: tuple[TableRow, ...]


def discover_units(module: nn.Module, optimized: Callable[[nn.Parameter], bool], initializer: Initializer) -> Discovery:
    """Finds the units of any module that `torch.fx` can trace. Raises `SpecError` if it cannot."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        text = "It has lazy layers that do not know their sizes yet; run it on an example first"
        raise SpecError([FieldViolation("module", text)])
    return group_units(module, trace(module), optimized, initializer)


def group_units(
    module: nn.Module, facts: UnitFacts, optimized: Callable[[nn.Parameter], bool], initializer: Initializer
) -> Discovery:
    """Sorts the atoms of the facts into groups."""
    names = {layer: name for name, layer in module.named_modules()}
    _pin_what_cannot_move(names, facts, optimized)
    return _Grouper(names, facts, initializer).discovery()


def _pin_what_cannot_move(
    names: Mapping[nn.Module, str], facts: UnitFacts, optimized: Callable[[nn.Parameter], bool]
) -> None:
    """Pins units of parameters that no optimizer moves, that other layers use too, or that are of another dtype."""
    users: dict[int, list[str]] = {}
    for layer, name in names.items():
        for own in layer.parameters(recurse=False):
            users.setdefault(id(own), []).append(name)
    touched: list[tuple[nn.Module, tuple[str | None, ...], Labels]]
    touched = [(part.layer, (part.weight, part.bias), part.rows) for part in facts.computed]
    touched += [(part.layer, (part.weight, None), part.columns) for part in facts.read]
    touched += [(part.layer, tuple(name for name, _ in part.values), part.channels) for part in facts.kept]
    for layer, attributes, atoms in touched:
        for attribute in filter(None, attributes):
            parameter = layer._parameters.get(attribute)
            name = f"{names[layer]}.{attribute}"
            if parameter is None:
                if attribute not in layer._buffers:
                    facts.pin(atoms, f"{name} is computed from other parameters")
            elif id(parameter) in facts.used_directly:
                facts.pin(atoms, f"{name} is used by other code than its layer's")
            elif parameter.dtype != torch.float32:
                facts.pin(atoms, f"{name} is {parameter.dtype}; only float32 parameters are reset")
            elif len(users[id(parameter)]) > 1:
                facts.pin(atoms, f"{name} is shared by the layers {', '.join(users[id(parameter)])}")
            elif not optimized(parameter):
                facts.pin(atoms, f"{name} is not among the optimizer's parameters")
            elif not parameter.requires_grad:
                facts.pin(atoms, f"{name} is frozen")


_NOT_PINNED = -1


class _Grouper:
    def __init__(self, names: Mapping[nn.Module, str], facts: UnitFacts, initializer: Initializer) -> None:
        self._names = names
        self._facts = facts
        self._initializer: Initializer = initializer
        self._labels = _components(facts)
        self._reasons = self._first_reasons()

    def discovery(self) -> Discovery:
        groups, taps, rows, left_alone = [], _Taps(), [], []
        for units in self._alike():
            computed = [part for part in self._facts.computed if self._count(part.rows, units)]
            read = [part for part in self._facts.read if self._count(part.columns, units)]
            layers = _distinct(self._names[part.layer] for part in computed)
            readers = _distinct(self._names[part.layer] for part in read)
            reason = self._reasons[units[0]]
            if reason == _NOT_PINNED and not read:
                verdict = "left alone: nothing reads them"
            elif reason != _NOT_PINNED:
                verdict = f"left alone: {self._facts.pins[reason].reason}"
            else:
                group = self._group(units, taps)
                groups.append(group)
                rows.append(
                    TableRow(
                        layers=layers,
                        units=len(units),
                        readers=readers,
                        verdict="; ".join(["reset", *group.notes]),
                        means=self._means(group),
                    )
                )
                continue
            left_alone.append(TableRow(layers=layers, units=len(units), readers=readers, verdict=verdict))
        return Discovery(
            groups=tuple(groups), taps=tuple(taps.taps), rows=tuple(rows), left_alone=(*left_alone, *self._unmet())
        )

    def _first_reasons(self) -> Labels:
        """[components] index of the first pin, or _NOT_PINNED."""
        reasons = np.full(self._labels.max(initial=-1) + 1, _NOT_PINNED)
        for index, pin in reversed(list(enumerate(self._facts.pins))):
            reasons[self._labels[pin.atoms]] = index
        return reasons

    def _alike(self) -> Iterator[Labels]:
        """Components, parted by which layers have how many places for each; in the order of their first atoms."""
        kind = self._reasons.copy()
        rows = [part.rows for part in self._facts.computed]
        columns = [part.columns for part in self._facts.read]
        for atoms in (*rows, *columns, *(part.channels for part in self._facts.kept)):
            counts = np.bincount(self._labels[atoms[atoms >= 0]], minlength=len(kind))
            kind = np.unique(np.stack([kind, counts]), axis=1, return_inverse=True)[1].reshape(-1)
        first = np.unique(kind, return_index=True)[1]
        for component in np.sort(first):
            yield np.flatnonzero(kind == kind[component])

    def _count(self, atoms: Labels, units: Labels) -> bool:
        return bool(np.isin(self._labels[atoms[atoms >= 0]], units[:1]).any())

    def _places(self, atoms: Labels, units: Labels) -> Places:
        """Where each unit is among the atoms."""
        labels = np.where(atoms >= 0, self._labels[atoms], -1)
        order = np.argsort(labels, kind="stable")
        start = np.searchsorted(labels[order], units)
        count = int((labels == units[0]).sum())
        return Places.of(torch.from_numpy(order[start[:, None] + np.arange(count)].astype(np.int64)))

    def _group(self, units: Labels, taps: "_Taps") -> UnitGroup:
        readings: list[Reading] = []
        seen: dict[int, int] = {}
        outgoing = []
        for part in self._facts.read:
            if not self._count(part.columns, units):
                continue
            tap = taps.index(part.tap)
            if tap not in seen:
                seen[tap] = len(readings)
                atoms = taps.taps[tap].atoms
                readings.append(Reading(tap=tap, axis=part.tap.axis, places=self._places(atoms, units)))
            outgoing.append(
                Outgoing(
                    layer=part.layer,
                    name=self._names[part.layer],
                    weight=part.weight,
                    groups=part.groups,
                    places=self._places(part.columns, units),
                    reading=seen[tap],
                    heir=part.heir,
                    inexact=part.inexact,
                )
            )
        kept = [part for part in self._facts.kept if self._count(part.channels, units)]
        return UnitGroup(
            units=len(units),
            incoming=tuple(
                Incoming(
                    layer=part.layer,
                    name=self._names[part.layer],
                    weight=part.weight,
                    bias=part.bias,
                    places=self._places(part.rows, units),
                    bound=self._bound(part),
                )
                for part in self._facts.computed
                if self._count(part.rows, units)
            ),
            attached=tuple(
                Attached(
                    layer=part.layer,
                    name=self._names[part.layer],
                    values=part.values,
                    places=self._places(part.channels, units),
                )
                for part in kept
            ),
            outgoing=tuple(outgoing),
            readings=tuple(readings),
            notes=tuple(
                f"{self._names[part.layer]} mixes units, so outputs change a little" for part in kept if part.mixes
            ),
        )

    def _bound(self, part: Computed) -> float:
        if part.bound is not None:
            return part.bound
        shape = getattr(part.layer, part.weight).shape
        positions = prod(shape[2:])
        return initial_bound(self._initializer, part.activation, shape[1] * positions, shape[0] * positions)

    def _means(self, group: UnitGroup) -> tuple[str, ...]:
        means = []
        for part in group.outgoing:
            if part.heir is None:
                means.append(f"{part.name} has nothing that takes over a mean")
            else:
                layer, attribute, _ = part.heir
                exact = f", exact {part.inexact}" if part.inexact else ""
                means.append(f"mean to {self._names[layer]}.{attribute}{exact}")
        return _distinct(means)

    def _unmet(self) -> Iterator[TableRow]:
        """Layers that have parameters, but of whose units nothing is known."""
        facts = self._facts
        met = {part.layer for part in facts.computed} | {part.layer for part in facts.kept}
        met |= {part.layer for part in facts.read}
        for layer, name in self._names.items():
            kind = known_layer(layer)
            if layer in met or not any(True for _ in layer.parameters(recurse=False)):
                continue
            if kind is None or kind in PACKAGES:
                verdict = f"left alone: what the units of {type(layer).__name__} are is not known"
            elif kind in UNIT_LAYERS:
                verdict = "left alone: not used, or only within a layer whose code is not followed"
            else:
                continue  # a normalisation has no units of its own
            yield TableRow(layers=(name or "the module itself",), units=0, readers=(), verdict=verdict)


class _Taps:
    """Values in which units are seen; each once, where the graph tells that they are the same."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []

    def index(self, tap: Tap) -> int:
        for place, known in enumerate(self.taps):
            same_layer = tap.value is None and known.layer is tap.layer
            if (known.side, known.axis) == (tap.side, tap.axis) and (
                same_layer or known.value is tap.value is not None
            ):
                return place
        self.taps.append(tap)
        return len(self.taps) - 1


def _components(facts: UnitFacts) -> Labels:
    """[atoms] the tied atoms' common number, in the order of their first atoms."""
    if not facts.atoms:
        return np.empty(0, np.int64)
    empty = np.empty(0, np.int64)
    one = np.concatenate([empty, *(tie[0] for tie in facts.ties)])
    other = np.concatenate([empty, *(tie[1] for tie in facts.ties)])
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(facts.atoms, facts.atoms))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
