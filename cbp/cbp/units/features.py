"""Where the atoms of a traced value lie, and how operations on shapes move them.

No example runs through the module, so sizes are known only where layers tell them. What stays open, such as how many
positions of a channel were flattened, is settled by the layer that reads the value: its number of inputs must fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cbp.units.unit_facts import DATA, Atoms, Computed


class UnknownPlacesError(Exception):
    """An operation after which it is not known where the atoms are; the message says why."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of the axis of the atoms."""

    atoms: Atoms | None
    """None for data of unknown size."""
    spread: Literal["inner", "outer"] | None = None
    """Flattened with positions whose number is not known: all positions of an atom side by side, or all atoms of a
    position."""


@dataclass(frozen=True, eq=False)
class Features:
    """A traced value one axis of which holds atoms."""

    parts: tuple[Part, ...]
    axis: int = -1
    """From the right, where sizes of a batch play no role."""
    rank: int | None = None
    undecided: tuple[Computed, ...] = ()
    """Whose activation has not been met yet."""

    def known(self) -> Atoms:
        """All atoms that may be here, in no order that matters."""
        return np.concatenate([part.atoms for part in self.parts if part.atoms is not None] or [np.empty(0, np.int64)])

    def resolved(self, size: int) -> Atoms:
        """[size] the atoms along the axis, if it is that long."""
        fixed = sum(len(part.atoms) for part in self.parts if part.atoms is not None and part.spread is None)
        open_parts = [part for part in self.parts if part.atoms is None or part.spread is not None]
        if not open_parts:
            if fixed != size:
                raise UnknownPlacesError(f"{fixed} features meet a layer of {size} inputs")
            return self.known()
        if len(open_parts) > 1:
            raise UnknownPlacesError("values whose sizes the code does not tell are concatenated")
        return np.concatenate(
            [_filled(part, size - fixed) if part in open_parts else part.atoms for part in self.parts]
        )

    def located(self, size: int) -> "Features":
        return replace(self, parts=(Part(self.resolved(size)),))

    def fixed_atoms(self) -> Atoms:
        """The atoms along the axis, where nothing is open."""
        if any(part.atoms is None or part.spread is not None for part in self.parts):
            raise UnknownPlacesError("it takes apart values whose sizes the code does not tell")
        return self.known()

    def position(self, axis: int) -> int:
        """An axis, from the right."""
        if axis < 0:
            return axis
        if self.rank is None:
            raise UnknownPlacesError("the number of axes of a value is not known")
        return axis - self.rank


def _filled(part: Part, size: int) -> Atoms:
    if part.atoms is None:
        if size < 0:
            raise UnknownPlacesError("the layer that reads it has too few inputs")
        return np.full(size, DATA)
    positions, rest = divmod(size, len(part.atoms))
    if rest or positions < 1:
        raise UnknownPlacesError(f"{len(part.atoms)} channels do not divide {size} inputs")
    return np.repeat(part.atoms, positions) if part.spread == "inner" else np.tile(part.atoms, positions)


def data(axis: int = -1) -> Features:
    """A value of which nothing is known but that no layer computes it."""
    return Features((Part(None),), axis)


def flatten(value: Features, start: int, end: int) -> Features:
    if value.rank is None:
        if value.axis == -1 and end == -1 and start > 0:  # [B, features], or with positions before the features
            return replace(value, parts=(_spread(value, "outer"),), rank=start + 1)
        raise UnknownPlacesError("a value whose number of axes is not known is flattened")
    first, last = value.position(start), value.position(end)
    rank = value.rank - (last - first)
    if value.axis > last or first == last:
        return replace(value, rank=rank)
    if value.axis < first:
        return replace(value, axis=value.axis + last - first, rank=rank)
    if first < value.axis < last:
        raise UnknownPlacesError("it is flattened together with axes on both sides")
    spread: Literal["inner", "outer"] = "inner" if value.axis == first else "outer"
    return replace(value, parts=(_spread(value, spread),), axis=last, rank=rank)


def _spread(value: Features, spread: Literal["inner", "outer"]) -> Part:
    if any(part.spread for part in value.parts):
        raise UnknownPlacesError("it is flattened twice")
    if any(part.atoms is None for part in value.parts):
        raise UnknownPlacesError("it is flattened together with data")
    return Part(value.known(), spread)


def reshape(value: Features, sizes: Sequence[object]) -> Features:
    """`sizes` are numbers where the code has numbers."""
    ones = len(sizes) - 2
    if value.rank in (2, None) and value.axis == -1 and ones > 0 and list(sizes[2:]) == [1] * ones:
        return replace(value, axis=-1 - ones, rank=2 + ones)  # [B, C] as [B, C, 1, 1]
    if len(sizes) == 2:
        if value.axis == -1 and sizes[1] == sum(len(part.atoms) for part in value.parts if part.atoms is not None):
            return replace(value, rank=2)
        return flatten(value, 1, -1)
    raise UnknownPlacesError("it is reshaped")


def permute(value: Features, axes: Sequence[int]) -> Features:
    rank = len(axes)
    if value.rank not in (None, rank):
        raise UnknownPlacesError("its axes are permuted")
    old = value.axis + rank
    return replace(value, axis=[axis % rank for axis in axes].index(old) - rank, rank=rank)


def transpose(value: Features, one: int, other: int) -> Features:
    if value.rank is None and {one, other} == {1, 2}:
        value = replace(value, rank=3)
    first, second = value.position(one), value.position(other)
    swapped = {first: second, second: first}
    return replace(value, axis=swapped.get(value.axis, value.axis))


def reduce(value: Features, axes: Sequence[int], *, keep: bool) -> Features:
    if value.rank is None and value.axis == -1 and all(axis >= 0 for axis in axes):
        if keep and any(axis > 0 for axis in axes):  # where it has two axes, they are the units' and stay beside them
            raise UnknownPlacesError("it may be averaged over the units: count the axis from the right")
        return value  # positions before the features; the layer that reads it tells if that was wrong
    gone = {value.position(axis) for axis in axes}
    if value.axis in gone:
        raise UnknownPlacesError("it is averaged over the units")
    if keep:
        return value
    rank = None if value.rank is None else value.rank - len(gone)
    return replace(value, axis=value.axis + sum(axis > value.axis for axis in gone), rank=rank)


def squeeze(value: Features, axis: int) -> Features:
    return reduce(value, [axis], keep=False)


def unsqueeze(value: Features, axis: int) -> Features:
    rank = None if value.rank is None else value.rank + 1
    if axis >= 0:
        if value.rank is None:
            raise UnknownPlacesError("an axis is put into a value whose number of axes is not known")
        axis -= value.rank + 1
    return replace(value, axis=value.axis - 1 if axis >= value.axis else value.axis, rank=rank)


def index(value: Features, at: object) -> Features:
    """`value[at]`, where whole axes are taken or single positions of axes other than the atoms'."""
    entries = at if isinstance(at, tuple) else (at,)
    if not all(isinstance(entry, int | slice) for entry in entries):
        raise UnknownPlacesError("it is indexed by other than numbers and slices")
    whole = [isinstance(entry, slice) and entry == slice(None) for entry in entries]
    gone = [place for place, entry in enumerate(entries) if isinstance(entry, int)]
    if value.rank is None:
        of_units = any(isinstance(entry, slice) and entry != slice(None) for entry in entries[1:])
        if value.axis != -1 or of_units or (len(entries) > 2 and not whole[-1]):
            raise UnknownPlacesError("a value whose number of axes is not known is indexed")
        return value
    place = value.axis + value.rank
    if place < len(entries) and not whole[place]:
        raise UnknownPlacesError("single units are taken out of it")
    return replace(value, axis=value.axis + sum(axis > place for axis in gone), rank=value.rank - len(gone))


def concatenate(values: Sequence[Features], axis: int) -> Features:
    known = next(value for value in values if any(part.atoms is not None for part in value.parts))
    flat = known.rank is None and known.axis == -1 and axis == 1
    place = -1 if flat else known.position(axis)
    if any(value.axis != known.axis for value in values if value.rank is not None) or place != known.axis:
        raise UnknownPlacesError("it is concatenated along another axis than that of the units")
    return replace(
        known,
        parts=tuple(part for value in values for part in value.parts),
        undecided=tuple(part for value in values for part in value.undecided),
    )


def chunk(value: Features, chunks: int, axis: int) -> list[Features]:
    if value.position(axis) != value.axis:
        return [value] * chunks
    atoms = value.fixed_atoms()
    size = -(-len(atoms) // chunks)
    return [replace(value, parts=(Part(atoms[start : start + size]),)) for start in range(0, len(atoms), size)]
