"""What is known of a module's units before they are sorted into groups: who computes, keeps and reads which of them.

A layer's outputs are *atoms*, numbered as they are found. Atoms that are added, or multiplied, element by element are
tied: they can only be reset together. `DATA` marks what is no layer's output.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cbp.spec.learner_spec import Activation

Atoms = NDArray[np.int64]
DATA = -1


@dataclass(kw_only=True)
class Computed:
    """A parameter whose rows compute atoms."""

    layer: nn.Module
    weight: str
    bias: str | None
    rows: Atoms
    """[rows] the atom that each row computes, or helps to."""
    activation: Activation = "identity"
    """That of the unit, as far as it is one of those with a known gain."""
    bound: float | None = None
    """Of the layer's own uniform distribution, where it is not that of a linear layer or convolution."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Values that a layer keeps for each atom that passes through it."""

    layer: nn.Module
    values: tuple[tuple[str, float], ...]
    """Attribute, and what a new layer has there."""
    channels: Atoms
    mixes: bool
    """Whether every channel's output depends on all channels, as in layer normalisation."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A tensor that a layer sees or makes."""

    layer: nn.Module
    side: str
    """"input" or "output"."""
    axis: int
    """That of the units, from the right."""
    atoms: Atoms
    """What lies along it."""
    value: object
    """Identifies the tensor where it has one place in the graph; taps of one value are one."""


@dataclass(kw_only=True)
class Read:
    """A parameter whose columns read atoms."""

    layer: nn.Module
    weight: str
    groups: int
    columns: Atoms
    """[inputs] of all groups side by side."""
    tap: Tap
    heir: tuple[nn.Module, str, float] | None
    """What takes over the mean of a unit that goes: layer, attribute [out] and sign; None if there is nothing."""
    inexact: str | None
    """Where that is not exact even for a constant unit, in words."""


@dataclass(frozen=True)
class Pin:
    """Atoms that are not reset, and why."""

    atoms: Atoms
    reason: str


@dataclass
class UnitFacts:
    """All of these, of one module."""

    computed: list[Computed] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    read: list[Read] = field(default_factory=list)
    ties: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    atoms: int = 0
    used_directly: set[int] = field(default_factory=set)
    """`id`s of parameters that the module's code uses itself, past their layers."""

    def new_atoms(self, count: int) -> Atoms:
        self.atoms += count
        return np.arange(self.atoms - count, self.atoms)

    def pin(self, atoms: Atoms, reason: str) -> None:
        atoms = atoms[atoms != DATA]
        if len(atoms):
            self.pins.append(Pin(atoms, reason))

    def tie(self, one: Atoms, other: Atoms, what: str) -> Atoms:
        """Ties two equally long rows of atoms; returns one that stands for both."""
        mixed = (one == DATA) != (other == DATA)
        for atoms in (one, other):
            self.pin(atoms[mixed], f"{what} to values that are not a layer's outputs")
        both = (one != DATA) & (other != DATA)
        self.ties.append((one[both], other[both]))
        return np.where(one == DATA, other, one)

    def computed_by(self, layer: nn.Module, weight: str) -> Computed | None:
        """What a layer was found to compute before, if it was."""
        return next((part for part in self.computed if part.layer is layer and part.weight == weight), None)

    def compute(self, computed: Computed) -> Computed:
        """Notes a parameter once, however often its layer is used."""
        known = self.computed_by(computed.layer, computed.weight)
        if known is not None:
            return known
        if computed.bias is not None and getattr(computed.layer, computed.bias, None) is None:
            computed.bias = None
        self.computed.append(computed)
        return computed

    def keep(self, kept: Kept) -> None:
        for part in self.kept:
            if part.layer is kept.layer:
                self.tie(part.channels, kept.channels, "shares a normalisation layer and so is tied")
                return
        self.kept.append(kept)

    def reads(self, read: Read) -> None:
        for part in self.read:
            if part.layer is read.layer and part.weight == read.weight:
                self.tie(part.columns, read.columns, "shares a reader and so is tied")
                part.tap = replace(part.tap, value=part.layer)
                part.inexact = "if the unit is the same at every use of the layer"
                part.heir = part.heir if part.heir == read.heir else None
                return
        self.read.append(read)
