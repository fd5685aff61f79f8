"""Generate and test: how much each hidden unit is worth, which ones go, and what takes their place.

Dohare et al. 2024, algorithm 1 (Continual Backprop), as functions over `UnitState`.

Shapes: L learners, B examples in a step, U hidden units of all hidden layers side by side, R units replaced at
once. `layout` says which columns of U belong to which layer, so that most operations run once for all layers.

Nothing here reads from the device. How many units go at a step follows from counters that the host keeps
(`ReplacementSchedule`); which ones go is decided, and acted on, by tensors alone.
"""

from array import array
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbp.networks import LinearLayers, to_device
from cbp.optimizers import log_decay
from cbp.spec.learner_spec import ResetSpec, Utility
from cbp.units.draws import UniformGenerator, draw_uniform

# Below this mean |w_in| a unit counts as having it: dividing by less would overflow float32 and turn into NaN.
SMALLEST_INCOMING = 1e-12


class UnitLayout:
    """Where each hidden layer's units lie among all of them."""

    def __init__(
        self, fan_in: Sequence[int], widths: Sequence[int], fan_out: Sequence[int], device: torch.device
    ) -> None:
        """Per hidden layer: inputs of a unit, units, and units that read it."""
        self.widths = tuple(widths)
        self.fan_in = tuple(fan_in)
        self.fan_out = tuple(fan_out)
        starts = accumulate(widths, initial=0)
        self.slices = tuple(slice(start, end) for start, end in pairwise(starts))
        self.total = sum(widths)
        self.incoming_counts = self._per_unit(fan_in, device)
        """[U] weights into each unit."""
        self.outgoing_counts = self._per_unit(fan_out, device)
        """[U] weights out of each unit."""

    def _per_unit(self, per_layer: Sequence[int], device: torch.device) -> Tensor:
        repeated = np.repeat(np.asarray(per_layer), np.asarray(self.widths))
        return torch.tensor(repeated, dtype=torch.float32, device=device)


@dataclass(frozen=True, kw_only=True)
class UnitState:
    """What Continual Backprop remembers of every hidden unit."""

    utility: Tensor
    """[L, U] float32 running utility, not bias-corrected."""
    age: Tensor
    """[L, U] int64 updates since the unit was last drawn; float32 would stop counting at 2²⁴."""
    mean_activation: Tensor
    """[L, U] float32 running mean, not bias-corrected."""

    @classmethod
    def fresh(cls, learners: int, units: int, device: torch.device) -> "UnitState":
        return cls(
            utility=torch.zeros(learners, units, device=device),
            age=torch.zeros(learners, units, dtype=torch.int64, device=device),
            mean_activation=torch.zeros(learners, units, device=device),
        )

    def to(self, device: torch.device) -> "UnitState":
        return UnitState(
            utility=self.utility.to(device), age=self.age.to(device), mean_activation=self.mean_activation.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class ResetSettings:
    """Settings of L learners; tensors are [L, 1], so that each learner may have its own."""

    utility: Utility
    one_minus_decay: Tensor
    log_decay: Tensor
    maturity_threshold: Tensor
    bias_compensation: Tensor
    """The share of a unit's mean that is handed on: the strength where compensation is on, 0 where it is off."""
    strength: Tensor
    kept: Tensor
    """1 − strength"""
    partial: bool
    """Whether any strength is below 1."""

    @classmethod
    def of(cls, specs: Sequence[ResetSpec], device: torch.device) -> "ResetSettings":
        """Settings of learners that rank their units by one and the same utility."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        return cls(
            utility=specs[0].utility,
            one_minus_decay=column([1 - spec.decay_rate for spec in specs]),
            log_decay=log_decay([spec.decay_rate for spec in specs], device),
            maturity_threshold=torch.tensor([[spec.maturity_threshold] for spec in specs], device=device),
            bias_compensation=column([spec.strength * spec.bias_compensation for spec in specs]),
            strength=column([spec.strength for spec in specs]),
            kept=column([1 - spec.strength for spec in specs]),
            partial=any(spec.strength < 1 for spec in specs),
        )


class DrawSource(Protocol):
    """Where the algorithm's random numbers come from: tensors on the CPU, or on the device where they are needed."""

    def incoming_weights(self, learner: int, layer: int, count: int) -> Tensor:
        """[count, in] new incoming weights for `count` units of a hidden layer."""

    def utilities(self) -> Tensor:
        """[L, U] from U(0, 1), for the `random` utility."""


class GeneratorDraws:
    """Draws from one generator per learner.

    A learner's draws depend on its own generator alone: neither the device nor the learners it shares a step with
    can change them.
    """

    def __init__(
        self,
        generators: Sequence[UniformGenerator],
        layout: UnitLayout,
        bounds: Sequence[float],
    ) -> None:
        self._generators = generators
        self._layout = layout
        self._bounds = bounds

    def incoming_weights(self, learner: int, layer: int, count: int) -> Tensor:
        shape = (count, self._layout.fan_in[layer])
        return draw_uniform(self._bounds[layer], shape, self._generators[learner])

    def numbers(self, learner: int, layer: int, count: int) -> NDArray[np.float32]:
        """[count · in] from U[0, 1), which `incoming_weights` makes weights of."""
        return self._generators[learner].take(count * self._layout.fan_in[layer])

    def utilities(self) -> Tensor:
        rows = [generator.take(self._layout.total) for generator in self._generators]
        return torch.from_numpy(np.stack(rows))


def bias_correction(age: Tensor, log_decay: Tensor) -> Tensor:
    """1 − ηᵃ, Adam's correction of an average that started at zero; exact to float32 at every age above 0."""
    return torch.mul(age, log_decay).expm1_().neg_()


def evaluate_units(
    units: UnitState,
    settings: ResetSettings,
    layout: UnitLayout,
    layers: LinearLayers,
    activations: Sequence[Tensor],
    draws: DrawSource,
) -> None:
    """Ages every unit by one update and brings its mean activation and utility up to date, in place.

    activations: per hidden layer [L, B, units], of the forward pass *before* the optimizer's update; `layers` holds
    the weights *after* it. Runs for layers that are not reset too, so that ages and utilities are there to look at,
    and to go on from, when a layer's resets are switched on.
    """
    activation = activations[0] if len(activations) == 1 else torch.cat(tuple(activations), dim=-1)
    units.age.add_(1)
    units.mean_activation.lerp_(_mean_over_examples(activation), settings.one_minus_decay)
    instantaneous = _instantaneous_utility(units, settings, layout, layers, activation, draws)
    units.utility.lerp_(instantaneous, settings.one_minus_decay)


def _mean_over_examples(values: Tensor) -> Tensor:
    return values.squeeze(1) if values.shape[1] == 1 else values.mean(dim=1)


@dataclass(frozen=True)
class UtilityFactors:
    """What the instantaneous utility of a unit is the product of; `random` is none of these."""

    activity: Literal["mean", "mean_corrected"] | None
    """mean |h|, mean |h − f̂|, or neither."""
    outgoing: bool
    """Times the mean |w| of the weights that read the unit."""
    incoming: bool
    """Over the mean |w| of the unit's own weights."""


UTILITY_FACTORS: Mapping[Utility, UtilityFactors] = MappingProxyType(
    {
        "contribution": UtilityFactors("mean", outgoing=True, incoming=False),
        "zero_contribution": UtilityFactors("mean_corrected", outgoing=True, incoming=False),
        "adaptable_contribution": UtilityFactors("mean_corrected", outgoing=True, incoming=True),
        "weight": UtilityFactors(None, outgoing=True, incoming=False),
        "adaptation": UtilityFactors(None, outgoing=False, incoming=True),
        "feature_by_input": UtilityFactors("mean_corrected", outgoing=False, incoming=True),
    }
)
"""Dohare et al. 2024, methods, "Continual backpropagation"; the variants are those of their code."""


def _instantaneous_utility(
    units: UnitState,
    settings: ResetSettings,
    layout: UnitLayout,
    layers: LinearLayers,
    activation: Tensor,
    draws: DrawSource,
) -> Tensor:
    """[L, U]: y, as `UTILITY_FACTORS` has it."""
    if settings.utility == "random":
        return to_device(draws.utilities(), activation.device)
    factors = UTILITY_FACTORS[settings.utility]
    utility = None
    if factors.activity == "mean":
        utility = _mean_over_examples(activation.abs())
    elif factors.activity == "mean_corrected":
        utility = _mean_corrected_activity(units, settings, activation)
    magnitudes = _magnitudes(layers)
    if factors.incoming:
        incoming = _incoming_magnitude(magnitudes, layout)
        utility = incoming.reciprocal_() if utility is None else utility.div_(incoming)
    if factors.outgoing:
        outgoing = _outgoing_magnitude(magnitudes, layout)
        utility = outgoing if utility is None else outgoing.mul_(utility)
    assert utility is not None
    return utility


def _mean_corrected_activity(units: UnitState, settings: ResetSettings, activation: Tensor) -> Tensor:
    """[L, U] mean |h − f̂| over the examples."""
    negative_correction = torch.mul(units.age, settings.log_decay).expm1_()
    negative_mean = torch.div(units.mean_activation, negative_correction)
    return _mean_over_examples(torch.add(activation, negative_mean.unsqueeze(1)).abs_())


def _magnitudes(layers: LinearLayers) -> list[Tensor]:
    return [weight.abs() for weight in layers.weights]


def _outgoing_magnitude(magnitudes: Sequence[Tensor], layout: UnitLayout) -> Tensor:
    """[L, U] mean |w| over the weights that read each unit."""
    return torch.cat([magnitude.sum(dim=1) for magnitude in magnitudes[1:]], dim=-1).div_(layout.outgoing_counts)


def _incoming_magnitude(magnitudes: Sequence[Tensor], layout: UnitLayout) -> Tensor:
    """[L, U] mean |w| over each unit's own weights."""
    sums = torch.cat([magnitude.sum(dim=2) for magnitude in magnitudes[:-1]], dim=-1)
    return sums.div_(layout.incoming_counts).clamp_min_(SMALLEST_INCOMING)


@dataclass(frozen=True)
class SelectedUnits:
    """R units of one hidden layer, over all learners."""

    learners: Tensor
    """[R] int64"""
    units: Tensor
    """[R] int64, within the layer."""
    counts: tuple[tuple[int, int], ...]
    """(learner, units of it), for the G learners that lose any; the R rows are in this order."""
    losers: Tensor
    """[G] int64, these learners."""


def select_units(
    units: UnitState,
    settings: ResetSettings,
    layout: UnitLayout,
    layer: int,
    counts: Sequence[int],
) -> SelectedUnits | None:
    """The counts[learner] mature units of lowest bias-corrected utility in a layer; among equals, the highest index.

    The counts come from each learner's `ReplacementSchedule`, which never asks for more units than are mature.
    """
    wanted = tuple((learner, count) for learner, count in enumerate(counts) if count)
    if not wanted:
        return None
    indices = [(learner, rank) for learner, count in wanted for rank in range(count)]
    device = units.age.device
    learners, ranks = to_device(torch.tensor(indices), device).unbind(1)
    losers = to_device(torch.tensor([learner for learner, _ in wanted]), device)

    # All learners are ranked, not only those that lose units: operations of one shape, however many do, round alike.
    columns = layout.slices[layer]
    age = units.age[:, columns]
    utility = units.utility[:, columns] / bias_correction(age, settings.log_decay)
    utility.masked_fill_(age <= settings.maturity_threshold, torch.inf)
    # Dead units tie at zero, and the recorded trajectories of the published code take the last of them. Its topk leaves
    # the order open; a stable sort of the flipped row does not, on any device.
    order = torch.sort(utility.flip(1), dim=1, stable=True).indices
    chosen = (utility.shape[1] - 1) - order[learners, ranks]
    return SelectedUnits(learners, chosen, wanted, losers)


def replace_units(
    selected: Sequence[SelectedUnits | None],
    units: UnitState,
    settings: ResetSettings,
    layout: UnitLayout,
    layers: LinearLayers,
    optimizer_slots: Sequence[LinearLayers],
    draws: DrawSource,
    *,
    published_order: bool = False,
) -> None:
    """Puts a newborn in the place of every selected unit, in place; `selected` has one entry per hidden layer.

    A newborn has redrawn incoming weights, bias 0, outgoing weights 0, and no past: utility, mean activation, age and
    the optimizer's state of exactly these weights are zero. With a strength below 1 the newborn's weights and bias are
    the goal, and the unit's go so far towards it; its past is forgotten all the same.

    Outgoing weights are zeroed after every layer's incoming weights are drawn: a unit drawn in the next layer at the
    same step must not read a newborn either. Here we depart from the published code, which zeroes first and then draws
    over it; `published_order` does the same, to follow trajectories recorded from it and where whole layers go.
    """
    for layer, chosen in enumerate(selected):
        if chosen is None:
            continue
        at = (chosen.learners, chosen.units)
        _compensate(chosen, units, settings, layout, layer, layers)
        drawn = [draws.incoming_weights(learner, layer, count) for learner, count in chosen.counts]
        incoming = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        incoming = to_device(incoming, chosen.units.device)
        weight, bias = layers.weights[layer], layers.biases[layer]
        if settings.partial:
            incoming = torch.lerp(weight[at], incoming, settings.strength[chosen.learners])
        weight[at] = incoming
        if bias is not None:
            bias[at] = bias[at] * settings.kept[chosen.learners, 0] if settings.partial else 0.0
        for slot in optimizer_slots:
            slot.weights[layer][at] = 0.0
            slot_bias = slot.biases[layer]
            if slot_bias is not None:
                slot_bias[at] = 0.0
        columns = layout.slices[layer]
        units.utility[:, columns][at] = 0.0
        units.age[:, columns][at] = 0
        units.mean_activation[:, columns][at] = 0.0
        if published_order:
            _silence(chosen, layer, settings, layers, optimizer_slots)

    if not published_order:
        for layer, chosen in enumerate(selected):
            if chosen is not None:
                _silence(chosen, layer, settings, layers, optimizer_slots)


def _silence(
    chosen: SelectedUnits,
    layer: int,
    settings: ResetSettings,
    layers: LinearLayers,
    optimizer_slots: Sequence[LinearLayers],
) -> None:
    """Zeroes the outgoing weights, or scales them down, and forgets what the optimizer knows of them."""
    at = (chosen.learners, slice(None), chosen.units)
    outgoing = layers.weights[layer + 1]
    outgoing[at] = outgoing[at] * settings.kept[chosen.learners] if settings.partial else 0.0
    for slot in optimizer_slots:
        slot.weights[layer + 1][at] = 0.0


def _compensate(
    chosen: SelectedUnits,
    units: UnitState,
    settings: ResetSettings,
    layout: UnitLayout,
    layer: int,
    layers: LinearLayers,
) -> None:
    """Hands the removed units' mean contribution, W_next[:, j] · f̂_j, to the next layer's bias; of units that are reset
    in part, that part of it.

    Departs from the published code, where f is zeroed before it is used and nothing is handed on.
    """
    readers_bias = layers.biases[layer + 1]
    if readers_bias is None:
        return
    columns = layout.slices[layer]
    at = (chosen.learners, chosen.units)
    mean = units.mean_activation[:, columns] / bias_correction(units.age[:, columns], settings.log_decay)
    removed = torch.zeros_like(mean)
    removed[at] = mean[at]
    removed *= settings.bias_compensation
    # A product, not an accumulating index_put: that one adds in whatever order threads come, and replays would differ.
    handed_on = torch.bmm(layers.weights[layer + 1], removed.unsqueeze(2)).squeeze(2)
    readers_bias[chosen.losers] += handed_on[chosen.losers]


class ReplacementSchedule:
    """How many units of each hidden layer one learner replaces at each step.

    A unit may go once it is older than the maturity threshold, so the number of candidates rises only
    `maturity_threshold` steps after units were replaced, and falls only when units go. Both are known here, and the
    device is never asked. So is how many have gone in the present window of steps, where their number is limited.
    """

    def __init__(
        self,
        rates: Sequence[float],
        maturity_threshold: int,
        accumulated: Sequence[float],
        *,
        max_replacements: int | None = None,
        window: int = 1,
    ) -> None:
        self._rates = tuple(rates)
        self._max_replacements = max_replacements
        self._window = window
        self._present = 0  # the window, counted from 0, that these went in:
        self._replaced = [0] * len(self._rates)
        self._maturity_threshold = maturity_threshold
        self._young: list[deque[tuple[int, int]]] = [deque() for _ in rates]  # (step of birth, units), oldest first
        self._mature = [0] * len(self._rates)
        self.accumulated = array("d", accumulated)
        """Per hidden layer, the fraction of a unit still owed, from 0 up to but not including 1. A compiled engine adds
        to them by their address."""

    @classmethod
    def from_ages(
        cls,
        rates: Sequence[float],
        maturity_threshold: int,
        accumulated: Sequence[float],
        step: int,
        ages: Sequence[NDArray[np.int64]],
        *,
        max_replacements: int | None = None,
        window: int = 1,
        replaced: Sequence[int] | None = None,
    ) -> "ReplacementSchedule":
        """The schedule of a learner that is `step` steps old and whose units have these ages, per hidden layer.

        `max_replacements` units of a layer may go in one window of so many steps; `replaced`, none if it is left out,
        have gone in the present one.
        """
        schedule = cls(rates, maturity_threshold, accumulated, max_replacements=max_replacements, window=window)
        if replaced is not None:
            schedule._present = schedule._window_of(step)
            schedule._replaced = list(replaced)
        for layer, layer_ages in enumerate(ages):
            births, counts = np.unique(step - layer_ages, return_counts=True)
            schedule._young[layer].extend(zip(births.tolist(), counts.tolist(), strict=True))
        return schedule

    def advance(self, step: int, spared: Collection[int] = ()) -> tuple[int, ...] | None:
        """Units to replace per hidden layer at this step, counted from 1; None if there are none.

        In layers that are `spared`, none goes, and none is owed for this step.
        """
        any_due = False
        due = [0] * len(self._rates)
        self._ripen(step)
        for layer, rate in enumerate(self._rates):
            if rate == 0.0 or layer in spared:
                continue
            owed = self.accumulated[layer] + rate * self._mature[layer]
            whole = min(int(owed), self._mature[layer])  # a rate of 1 could round up past what is there
            self.accumulated[layer] = owed - whole
            if whole and self._max_replacements is not None:
                whole = self._within_limit(layer, whole, step)
            if whole:
                any_due = True
                due[layer] = whole
                self._rejuvenate(layer, whole, step)
        return tuple(due) if any_due else None

    def rest(self, layers: Collection[int]) -> None:
        """The units of these layers do not age in the step that comes next."""
        for layer in layers:
            young = self._young[layer]
            for place, (birth, count) in enumerate(young):
                young[place] = (birth + 1, count)

    def replaced(self, step: int) -> list[int]:
        """Per hidden layer, units that have gone by the rates in the window of this step; 0 if there is no limit."""
        return list(self._replaced) if self._window_of(step) == self._present else [0] * len(self._rates)

    def _window_of(self, step: int) -> int:
        return max(step - 1, 0) // self._window

    def _within_limit(self, layer: int, due: int, step: int) -> int:
        """How many of the units that are due may go; the others are not owed any longer."""
        assert self._max_replacements is not None
        self._replaced, self._present = self.replaced(step), self._window_of(step)
        allowed = max(min(due, self._max_replacements - self._replaced[layer]), 0)
        self._replaced[layer] += allowed
        return allowed

    @property
    def rates(self) -> tuple[float, ...]:
        return self._rates

    @property
    def mature(self) -> tuple[int, ...]:
        """Per hidden layer, units that may be replaced, as of the last step asked about."""
        return tuple(self._mature)

    def quiet_steps(self, step: int) -> int | None:
        """How many steps from this one on bring no other unit to maturity than those that are mature by then; None if
        none ever ripens. At these steps, `advance` replaces in a layer once rate · mature adds up to a unit."""
        self._ripen(step)
        births = [young[0][0] for young in self._young if young]
        return min(births) + self._maturity_threshold + 1 - step if births else None

    def replace(self, wanted: Sequence[int], step: int) -> tuple[int, ...]:
        """Units to replace per hidden layer by hand, after this step: as many as wanted, or as are mature.

        What the rates owe stays owed, and a limit on replacements is one on theirs alone.
        """
        self._ripen(step)
        counts = tuple(min(count, mature) for count, mature in zip(wanted, self._mature, strict=True))
        for layer, count in enumerate(counts):
            if count:
                self._rejuvenate(layer, count, step)
        return counts

    def _ripen(self, step: int) -> None:
        oldest_immature = step - self._maturity_threshold
        for layer, young in enumerate(self._young):
            while young and young[0][0] < oldest_immature:
                self._mature[layer] += young.popleft()[1]

    def _rejuvenate(self, layer: int, count: int, step: int) -> None:
        self._mature[layer] -= count
        self._young[layer].append((step, count))
