"""Groups of units that are reset alike, in any module: what the units are worth, and how one is replaced.

A unit is one feature of what a layer computes: an output of a linear layer, a channel of a convolution, a hidden unit
of a recurrent layer. Several layers share their units where their outputs are added; several layers may read them. The
formulas are those of `cbp.units.replacement`, where the network is a plain stack of linear layers.

Shapes: U units of one group, k places that one unit has in one tensor (a channel that was flattened has many), R units
replaced at once, M readings: the units of every group, once for each different value in which they are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import isfinite, prod
from typing import Literal

import torch
from torch import Tensor, nn

from cbp.networks import to_device
from cbp.units.draws import UniformGenerator, draw_uniform
from cbp.units.optimizer_slots import OptimizerSlots
from cbp.units.replacement import (
    SMALLEST_INCOMING,
    UTILITY_FACTORS,
    DrawSource,
    ResetSettings,
    SelectedUnits,
    UnitLayout,
    UnitState,
    bias_correction,
)

_Write = Callable[[Tensor], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where units are along an axis of a tensor."""

    index: Tensor
    """[U, k] int64; k is the same for all units."""
    start: int
    contiguous: bool
    """Whether the units' places follow each other from `start` on, unit by unit."""

    @classmethod
    def of(cls, index: Tensor) -> "Places":
        """index [U, k] on the host."""
        flat = index.flatten()
        start = int(flat[0])
        return cls(index=index, start=start, contiguous=torch.equal(flat, torch.arange(start, start + len(flat))))

    @property
    def each(self) -> int:
        """k"""
        return self.index.shape[1]

    def __getitem__(self, units: Tensor) -> Tensor:
        """[R, k] places of some units."""
        return self.index[units]

    def to(self, device: torch.device) -> "Places":
        return replace(self, index=self.index.to(device))

    def taken_from(self, values: Tensor, axis: int) -> Tensor:
        """The values at all places, in place of the axis (counted from the left): [.., U, ..], or [.., U, k, ..]."""
        if not self.contiguous:
            values = values.index_select(axis, self.index.flatten())
        elif values.shape[axis] != self.index.numel():
            values = values.narrow(axis, self.start, self.index.numel())
        if self.each > 1:
            values = values.view(*values.shape[:axis], *self.index.shape, *values.shape[axis + 1 :])
        return values

    def summed(self, values: Tensor) -> Tensor:
        """[U] sums over each unit's places in a vector."""
        taken = self.taken_from(values, 0)
        return taken.sum(dim=1) if self.each > 1 else taken


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """Weights of a layer that compute the units."""

    layer: nn.Module
    name: str
    """Where the layer is in the module."""
    weight: str
    """Its attribute of shape [rows, …]."""
    bias: str | None
    places: Places
    """The rows that belong to each unit."""
    bound: float
    """Redrawn from U(−bound, bound)."""

    @property
    def count(self) -> int:
        """Weights into one unit."""
        weight: Tensor = getattr(self.layer, self.weight)
        return self.places.each * prod(weight.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Attached:
    """What a normalisation layer, or another between a unit and its readers, keeps for the unit alone."""

    layer: nn.Module
    name: str
    values: tuple[tuple[str, float], ...]
    """Attributes of shape [channels], with what a newborn has there."""
    places: Places
    """Among the channels."""


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """Weights of a layer that read the units."""

    layer: nn.Module
    name: str
    weight: str
    """Its attribute of shape [out, in / groups, …]."""
    groups: int
    """Of a grouped convolution."""
    places: Places
    """The inputs, of all groups side by side, that show each unit."""
    reading: int
    """Which of the group's readings the layer sees."""
    heir: tuple[nn.Module, str, float] | None
    """The attribute [out] that takes over the mean of a unit that goes, with its sign: a bias, or the running mean of
    the batch normalisation that follows. None if there is none."""
    inexact: str | None
    """Where handing the mean on is not exact even for a constant unit, in words."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One value in which the units of a group are seen."""

    tap: int
    """The activation tensors to look at, among all that are gathered."""
    axis: int
    """Of the tensor, from the right."""
    places: Places
    """Along the axis."""


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units with the same producers and readers."""

    units: int
    incoming: tuple[Incoming, ...]
    attached: tuple[Attached, ...]
    outgoing: tuple[Outgoing, ...]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()
    """What a reset does not leave as it was."""

    @property
    def fan_in(self) -> int:
        return sum(part.count for part in self.incoming)

    @property
    def fan_out(self) -> int:
        return sum(
            part.places.each * getattr(part.layer, part.weight).numel() // _inputs(part) for part in self.outgoing
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that a reset touches and an optimizer may move, by name within the module."""
        named: dict[tuple[str, str], nn.Module] = {}
        for part in self.incoming:
            named |= {(part.name, attribute): part.layer for attribute in (part.weight, part.bias) if attribute}
        for reader in self.outgoing:
            named[reader.name, reader.weight] = reader.layer
        for beside in self.attached:
            named |= {(beside.name, attribute): beside.layer for attribute, _ in beside.values}
        found = {
            f"{name}.{attribute}".lstrip("."): getattr(layer, attribute) for (name, attribute), layer in named.items()
        }
        return {name: value for name, value in found.items() if isinstance(value, nn.Parameter)}

    def to(self, device: torch.device) -> "UnitGroup":
        """The same group with its index tensors there."""
        return replace(
            self,
            incoming=tuple(replace(part, places=part.places.to(device)) for part in self.incoming),
            attached=tuple(replace(part, places=part.places.to(device)) for part in self.attached),
            outgoing=tuple(replace(part, places=part.places.to(device)) for part in self.outgoing),
            readings=tuple(replace(part, places=part.places.to(device)) for part in self.readings),
        )


class Grouping:
    """All groups of a module, with their units side by side, ready for one device."""

    def __init__(self, groups: Sequence[UnitGroup], device: torch.device) -> None:
        self.device = device
        self.groups = tuple(group.to(device) for group in groups)
        self.layout = UnitLayout(
            [group.fan_in for group in groups],
            [group.units for group in groups],
            [group.fan_out for group in groups],
            device,
        )
        starts = accumulate((group.units for group in groups for _ in group.readings), initial=0)
        slices = iter([slice(start, end) for start, end in pairwise(starts)])
        self.reading_slices = tuple(tuple(next(slices) for _ in group.readings) for group in groups)
        """Per group and reading, its units' place among the M."""
        self.readings = sum(group.units * len(group.readings) for group in groups)
        """M"""
        owner = [
            torch.arange(columns.start, columns.stop)
            for columns, group in zip(self.layout.slices, groups, strict=True)
            for _ in group.readings
        ]
        self.owner = torch.cat(owner).to(device)
        """[M] the unit that each reading is of."""

    def fresh_units(self) -> UnitState:
        """That of newborn units; mean activations [1, M], all else [1, U of all groups]."""
        seen = UnitState.fresh(1, self.readings, self.device)
        return replace(UnitState.fresh(1, self.layout.total, self.device), mean_activation=seen.mean_activation)


@dataclass(frozen=True)
class _Look:
    """One tensor of activations, with the units and their k places as axes of their own."""

    values: Tensor
    """[…, U, …], each unit's places among the axes behind"""
    axis: int
    """Of U, counted from the left."""

    def mean(self, values: Tensor) -> Tensor:
        """[U] mean over all else."""
        return values.mean(dim=[axis for axis in range(values.dim()) if axis != self.axis])

    @property
    def examples(self) -> int:
        return self.values.numel() // self.values.shape[self.axis]


def _look(activations: Tensor, part: Reading) -> _Look:
    axis = activations.dim() + part.axis
    taken = part.places.taken_from(activations, axis)
    return _Look(taken.float() if taken.dtype != torch.float32 else taken, axis)  # other types come from autocast


def activity_rows(activations: Tensor, part: Reading) -> Tensor:
    """[rows, U] of activations: a row for each example, position, and place of the units."""
    look = _look(activations, part)
    return look.values.movedim(look.axis, -1).flatten(0, -2)


class Replicas:
    """The processes that hold replicas of a module, each with examples of its own. Here there is one."""

    def resting(self, here: Sequence[int], _grouping: "Grouping") -> tuple[int, ...]:
        """Groups that rest in all processes, of those that rest in this one."""
        return tuple(here)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of what each has, the same on all of them."""
        return values


class Step:
    """The activations of one step, as groups of units see them.

    taps: per tap the activations of all passes of the step, each with examples and positions on any axes but one; none
    where the layer took no part in it.
    """

    def __init__(self, grouping: Grouping, taps: Sequence[Sequence[Tensor]], replicas: Replicas | None = None) -> None:
        self._grouping = grouping
        self._replicas = replicas or Replicas()
        # Per group, reading and pass.
        self._looks = [
            [[_look(activations, part) for activations in taps[part.tap]] for part in group.readings]
            for group in grouping.groups
        ]
        self._missing = [index for index, of_group in enumerate(self._looks) if not any(of_group)]
        self.resting = self._replicas.resting(self._missing, grouping)
        """Groups whose units nobody saw in this step."""

    def means(self, of: Callable[[_Look, slice], Tensor], otherwise: Tensor) -> Tensor:
        """[M] mean of a function of looks, and of where their reading is among the M, over all examples and positions.

        A reader that took no part would have seen what the others see: it has the mean over those. `otherwise` [M] is
        taken where none took part.
        """
        found: list[Tensor] = []
        for index, of_group in enumerate(self._looks):
            columns = self._grouping.reading_slices[index]
            if index in self._missing:
                found += [otherwise[places] for places in columns]
                continue
            seen = [_mean(passes, of, places) for passes, places in zip(of_group, columns, strict=True) if passes]
            others = _sum(seen) / len(seen) if len(seen) < len(of_group) else None
            left = iter(seen)
            found += [next(left) if passes or others is None else others for passes in of_group]
        return self._replicas.mean(torch.cat(found))


def evaluate_groups(
    units: UnitState, settings: ResetSettings, grouping: Grouping, step: Step, draws: DrawSource
) -> None:
    """Ages every unit by one update and brings its mean activations and utility up to date, in place.

    Where a unit is seen in several values, its utility is the sum over its readers of activity times weights; the
    activity in `feature_by_input`, which no weight follows, is the mean over the values. Units of groups that rest
    stay as they are. What is not finite changes no average.
    """
    units.age.add_(1)
    for index in step.resting:
        units.age[0, grouping.layout.slices[index]].sub_(1)
    means = step.means(lambda look, _places: look.values, units.mean_activation[0])
    _approach_average(units.mean_activation, means.unsqueeze(0), settings)
    utility = _instantaneous_utility(units, settings, grouping, step, draws)
    for index in step.resting:
        columns = grouping.layout.slices[index]
        utility[0, columns] = units.utility[0, columns]
    _approach_average(units.utility, utility, settings)


def _approach_average(average: Tensor, values: Tensor, settings: ResetSettings) -> None:
    # On the host a sum is looked at for much less than it takes to look at every value.
    if not (values.device.type == "cpu" and isfinite(values.numpy().sum())):
        values = torch.where(torch.isfinite(values), values, average)
    average.lerp_(values, settings.one_minus_decay)


def mean_over_units(grouping: Grouping, step: Step, of: Callable[[Tensor], Tensor]) -> Tensor:
    """[U of all groups] mean of a function of activations over the examples and positions of a step; NaN in groups that
    rest. Where a unit is seen in several values, the mean over them."""
    nothing = torch.full((grouping.readings,), torch.nan, device=grouping.device)
    means = step.means(lambda look, _places: of(look.values), nothing)
    return torch.cat([_sum([means[places] for places in slices]) / len(slices) for slices in grouping.reading_slices])


def _mean(passes: Sequence[_Look], of: Callable[[_Look, slice], Tensor], places: slice) -> Tensor:
    """[U] mean over the examples and positions of all passes."""
    if len(passes) == 1:
        return passes[0].mean(of(passes[0], places))
    total = sum(look.examples for look in passes)
    return torch.stack([look.mean(of(look, places)) * (look.examples / total) for look in passes]).sum(dim=0)


def _instantaneous_utility(
    units: UnitState,
    settings: ResetSettings,
    grouping: Grouping,
    step: Step,
    draws: DrawSource,
) -> Tensor:
    """[1, U of all groups]"""
    if settings.utility == "random":
        return to_device(draws.utilities(), grouping.device)
    factors = UTILITY_FACTORS[settings.utility]
    means = mean_activations(units, settings, grouping)
    active = _activity(step, factors.activity, means)
    utilities = []
    layout = grouping.layout
    parts = zip(grouping.groups, grouping.reading_slices, layout.fan_in, layout.fan_out, strict=True)
    for group, slices, fan_in, fan_out in parts:
        activity = [active[places] for places in slices]
        if factors.outgoing:
            utility = _sum([_read_magnitude(part) * activity[part.reading] for part in group.outgoing])
            utility = utility / fan_out
        else:
            utility = _sum(activity) / len(activity)
        if factors.incoming:
            utility = utility / _own_magnitude(group, fan_in)
        utilities.append(utility)
    return torch.cat(utilities).unsqueeze(0)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    first, *others = tensors
    return torch.stack([first, *others]).sum(dim=0) if others else first


def _activity(step: Step, kind: Literal["mean", "mean_corrected"] | None, means: Tensor) -> Tensor:
    """[M]"""
    if kind is None:
        return torch.ones_like(means)
    if kind == "mean":
        return step.means(lambda look, _places: look.values.abs(), means)  # what rests is worth what it was
    return step.means(lambda look, places: (look.values - _along(means[places], look)).abs_(), means)


def _along(values: Tensor, look: _Look) -> Tensor:
    return values.reshape(-1, *(1 for _ in range(look.values.dim() - look.axis - 1)))


def mean_activations(units: UnitState, settings: ResetSettings, grouping: Grouping) -> Tensor:
    """[M] f̂"""
    corrections = bias_correction(units.age, settings.log_decay)
    return units.mean_activation[0] / corrections[0, grouping.owner]


def _inputs(part: Outgoing) -> int:
    weight: Tensor = getattr(part.layer, part.weight)
    return weight.shape[1] * part.groups


def _by_group(part: Outgoing, tensor: Tensor) -> Tensor:
    """[groups, out / groups, in / groups, …] view."""
    return tensor.view(part.groups, tensor.shape[0] // part.groups, *tensor.shape[1:])


def _read_magnitude(part: Outgoing) -> Tensor:
    """[U] Σ |w| over the weights that read each unit."""
    magnitude = _by_group(part, getattr(part.layer, part.weight)).abs()
    per_input = magnitude.sum(dim=[1, *range(3, magnitude.dim())]).flatten()
    return part.places.summed(per_input)


def _own_magnitude(group: UnitGroup, fan_in: int) -> Tensor:
    """[U] mean |w| over the weights that compute each unit."""
    sums = [part.places.summed(getattr(part.layer, part.weight).abs().flatten(1).sum(dim=1)) for part in group.incoming]
    return (_sum(sums) / fan_in).clamp_min_(SMALLEST_INCOMING)


class GroupDraws:
    """Draws from one generator, whatever device the weights are on."""

    def __init__(self, generator: UniformGenerator, grouping: Grouping) -> None:
        self._generator = generator
        self._parts = [[(part.bound, part.count) for part in group.incoming] for group in grouping.groups]
        self._units = grouping.layout.total

    def incoming_weights(self, learner: int, layer: int, count: int) -> Tensor:  # noqa: ARG002 -- there is one learner
        """[count, fan_in] for units of a group, producer by producer."""
        drawn = [draw_uniform(bound, (count, size), self._generator) for bound, size in self._parts[layer]]
        return torch.cat(drawn, dim=1)

    def utilities(self) -> Tensor:
        """[1, U of all groups] from U(0, 1)."""
        return torch.tensor(self._generator.take(self._units)).unsqueeze(0)


def replace_in_groups(
    selected: Sequence[SelectedUnits | None],
    units: UnitState,
    settings: ResetSettings,
    grouping: Grouping,
    slots: OptimizerSlots,
    draws: DrawSource,
    *,
    published_order: bool = False,
) -> None:
    """Puts a newborn in the place of every selected unit, in place; `selected` has one entry per group.

    A newborn has no past: its utility, mean activations and age are 0, also of one that goes only part of the way. For
    the rest see `renew_units`.
    """
    means = mean_activations(units, settings, grouping) * settings.bias_compensation[0]
    chosen = [(index, of_group.units) for index, of_group in enumerate(selected) if of_group is not None]
    renew_units(chosen, means, grouping, slots, draws, settings, published_order=published_order)
    for index, at in chosen:
        columns = grouping.layout.slices[index]
        units.utility[0, columns][at] = 0.0
        units.age[0, columns][at] = 0
        for of_reading in grouping.reading_slices[index]:
            units.mean_activation[0, of_reading][at] = 0.0


def renew_units(
    chosen: Sequence[tuple[int, Tensor]],
    handed_on: Tensor | None,
    grouping: Grouping,
    slots: OptimizerSlots,
    draws: DrawSource,
    settings: ResetSettings | None = None,
    *,
    published_order: bool = False,
) -> None:
    """Puts a newborn in the place of each unit chosen, given as groups' numbers with units [R] of them, in place.

    A newborn has redrawn incoming weights in every producer, bias 0, the affine parameters and statistics of a fresh
    normalisation layer, and outgoing weights 0 in every reader; the optimizer's state of exactly these elements is 0.
    With settings of a strength below 1 the newborn is the goal, and weights, biases and what a normalisation keeps go
    so far towards it; the optimizer forgets all the same.

    handed_on: [M] the mean activation of every reading, of which what goes is handed on; None if nothing is. Means are
    handed on first, so that a newborn's bias is 0 whatever goes on below it; outgoing weights are zeroed last, so that
    no newborn reads another. `published_order` is that of `cbp.units.replacement.replace_units`.
    """
    for index, at in chosen:
        for reader in grouping.groups[index].outgoing:
            if handed_on is not None and reader.heir is not None:
                _hand_on(reader, at, handed_on[grouping.reading_slices[index][reader.reading]][at])
    for index, at in chosen:
        group = grouping.groups[index]
        _renew(group, at, to_device(draws.incoming_weights(0, index, len(at)), grouping.device), settings, slots)
        if published_order:
            _silence(group, at, settings, slots)
    if not published_order:
        for index, at in chosen:
            _silence(grouping.groups[index], at, settings, slots)


def _hand_on(reader: Outgoing, at: Tensor, mean: Tensor) -> None:
    """Gives the removed units' mean contribution, Σ W[:, j] · f̂_j, to the reader's heir.

    Exact for units that were constant, but for the borders that a convolution pads with zeros.
    """
    assert reader.heir is not None
    layer, attribute, sign = reader.heir
    weight = _by_group(reader, getattr(reader.layer, reader.weight).detach())
    weight = weight.sum(dim=list(range(3, weight.dim()))) if weight.dim() > 3 else weight
    removed = torch.zeros(_inputs(reader), device=mean.device)
    removed[reader.places[at]] = mean.unsqueeze(1)
    # A product, not an accumulating index_put: that one adds in whatever order threads come, and replays would differ.
    handed_on = torch.bmm(weight, removed.view(reader.groups, -1, 1)).flatten()
    getattr(layer, attribute).detach().add_(handed_on, alpha=sign)


def _renew(group: UnitGroup, at: Tensor, drawn: Tensor, settings: ResetSettings | None, slots: OptimizerSlots) -> None:
    """Incoming weights, biases and what is attached; drawn [R, fan_in]."""
    parts = torch.split(drawn, [part.count for part in group.incoming], dim=1)
    for part, values in zip(group.incoming, parts, strict=True):
        rows = part.places[at]
        weight = getattr(part.layer, part.weight)
        _approach(weight.detach(), rows, values.view(*rows.shape, *weight.shape[1:]), settings)
        slots.forget(weight, _zero_at(rows))
        if part.bias is not None:
            bias = getattr(part.layer, part.bias)
            _approach(bias.detach(), rows, 0.0, settings)
            slots.forget(bias, _zero_at(rows))
    for beside in group.attached:
        channels = beside.places[at]
        for attribute, newborn in beside.values:
            tensor = getattr(beside.layer, attribute)
            _approach(tensor.detach(), channels, newborn, settings)
            slots.forget(tensor, _zero_at(channels))


def _approach(tensor: Tensor, rows: Tensor, newborn: Tensor | float, settings: ResetSettings | None) -> None:
    """The rows go towards those of a newborn, as far as the strength says."""
    if settings is not None and settings.partial:
        now = tensor[rows]
        goal = newborn.to(now.dtype) if isinstance(newborn, Tensor) else torch.full_like(now, newborn)
        newborn = torch.lerp(now, goal, settings.strength[0, 0].to(now.dtype))
    tensor[rows] = newborn


def _zero_at(rows: Tensor) -> _Write:
    def zero(tensor: Tensor) -> None:
        tensor[rows] = 0.0

    return zero


def _silence(group: UnitGroup, at: Tensor, settings: ResetSettings | None, slots: OptimizerSlots) -> None:
    """Zeroes the outgoing weights in every reader, or scales them down."""
    for reader in group.outgoing:
        weight = getattr(reader.layer, reader.weight)
        inputs = reader.places[at]
        width = weight.shape[1]
        slots.forget(weight, _zero_inputs(reader, inputs // width, inputs % width))
        read = _by_group(reader, weight.detach())
        at_inputs = (inputs // width, slice(None), inputs % width)
        read[at_inputs] = read[at_inputs] * settings.kept[0, 0] if settings is not None and settings.partial else 0.0


def _zero_inputs(reader: Outgoing, group: Tensor, column: Tensor) -> _Write:
    def zero(tensor: Tensor) -> None:
        _by_group(reader, tensor)[group, :, column] = 0.0

    return zero
