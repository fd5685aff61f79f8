"""Continual Backprop for a training loop of your own.

    resets = ContinualBackprop(module, optimizer)
    loss.backward()
    optimizer.step()
    resets.step()

The resets are those of `Learner`; what is here is when they take place, and what is saved. What is shared by methods
that reset units is in `cbp.units`: `discovery` finds which units a module has, `activation_taps` gathers what they
computed, `unit_groups` evaluates and replaces them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from cbp.errors import SpecError
from cbp.saved.methods import SavedResets
from cbp.saved.parts import read_part, refuse
from cbp.serialization import counts, take_tensor
from cbp.spec.learner_spec import Initializer, ResetSpec, Utility
from cbp.units.discovery import TableRow
from cbp.units.module_units import ModuleUnits
from cbp.units.named_units import HiddenUnits
from cbp.units.replacement import DrawSource, ReplacementSchedule, ResetSettings, UnitState, select_units
from cbp.units.unit_groups import evaluate_groups, replace_in_groups


class ContinualBackprop:
    """Resets low-utility units of any module that `torch.fx` can trace, or whose units are named.

    Units are outputs of linear layers, channels of convolutions and hidden units of recurrent layers. What is found,
    and what is left alone for which reason, says `explain()`. Groups of units that are reset alike take the place of
    the hidden layers of a `LearnerSpec`, in the order of the code: "hidden_0", "hidden_1", and so on.

    A step looks at the hidden activations of the forward passes, in training mode, that the last `optimizer.step()`
    learned from. A pass counts from its backward pass on, so one whose loss is never differentiated leaves no trace
    and takes no memory. Several passes before one optimizer step, as in gradient accumulation, count as one larger
    batch. Where `optimizer.step()` is called several times for one `step`, the passes of the last one count.
    The activations that count are kept until `step`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        layers: Literal["all", "first", "none"] | Sequence[int | str] = "all",
        replacement_rate: float = 1e-4,
        layer_replacement_rates: Mapping[int | str, float] | None = None,
        maturity_threshold: int = 100,
        decay_rate: float = 0.99,
        utility: Utility = "adaptable_contribution",
        initializer: Initializer = "default",
        bias_compensation: bool = True,
        strength: float = 1.0,
        max_replacements: int | None = None,
        replacement_window: int = 1000,
        units: Sequence[HiddenUnits] | None = None,
        seed: int = 0,
        draws: DrawSource | None = None,
    ) -> None:
        """The settings mean what they mean in `ResetSpec`; a layer may also be called by its name in the module.

        `initializer` is the distribution of redrawn weights; "default" is the one that PyTorch's layers start with.
        `bias_compensation` works where something can take over a mean; `explain()` says where. `units` names the units
        by hand, and the module is not traced. `draws` replaces the random numbers seeded by `seed`.

        Raises `SpecError` if the module cannot be traced or has no unit that can be reset, or if the optimizer or a
        setting is not supported.
        """
        self._module_units = ModuleUnits(
            module, optimizer, initializer=initializer, units=units, seed=seed, draws=draws
        )
        hidden, names = self._module_units.hidden, self._module_units.names
        resets = {
            "layers": layers if isinstance(layers, str) else [hidden(layer) for layer in layers],
            "replacement_rate": replacement_rate,
            "layer_replacement_rates": {hidden(layer): rate for layer, rate in (layer_replacement_rates or {}).items()},
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
            "utility": utility,
            "bias_compensation": bias_compensation,
            "strength": strength,
            "max_replacements": max_replacements,
            "replacement_window": replacement_window,
        }
        try:
            self._resets = ResetSpec(**resets)  # type: ignore[arg-type]
            self._rates = self._resets.rates(names)
        except SpecError:
            self._module_units.remove()
            raise
        self._step = 0
        self._settings = ResetSettings.of([self._resets], self._module_units.grouping.device)
        self._units = self._module_units.grouping.fresh_units()
        nothing = [0] * len(names)
        self._schedule: ReplacementSchedule = self._schedule_from_ages([0.0] * len(names), nothing)

    @property
    def replacements(self) -> dict[str, int]:
        """Units replaced so far, per group of units."""
        return self._module_units.replacements

    def explain(self) -> str:
        """A table of all groups of units: layers that compute them, how many there are, who reads them, and whether
        they are reset or why not."""

        def verdict(index: int, row: TableRow) -> str:
            means = row.means if self._resets.bias_compensation else ()
            return "; ".join(["" if self._rates[index] else "rate 0", row.verdict, *means]).removeprefix("; ")

        return self._module_units.explain(verdict)

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Goes on with another optimizer of the same parameters: newborns' weights start afresh in that one.

        Raises `SpecError` if it does not move them all or is not supported; then nothing has changed.
        """
        self._module_units.use_optimizer(optimizer)

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer; the object is of no more use."""
        self._module_units.remove()

    @torch.no_grad()
    def step(self) -> None:
        """One generate-and-test step; call it after `optimizer.step()`.

        It does nothing if the optimizer has not taken its step, as where a gradient scaler skips one.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last one, or if
        another optimizer moves the parameters.
        """
        taps = self._module_units.activations.take()
        if taps is None:
            return
        if self._module_units.settle():
            device = self._module_units.grouping.device
            self._settings, self._units = ResetSettings.of([self._resets], device), self._units.to(device)
        grouping, draws = self._module_units.grouping, self._module_units.draws
        step = self._module_units.seen(taps)
        evaluate_groups(self._units, self._settings, grouping, step, draws)
        self._step += 1
        if step.resting:
            self._schedule.rest(step.resting)
        due = self._schedule.advance(self._step, step.resting + self._module_units.frozen)
        if due is not None:
            self._replace(due)

    @torch.no_grad()
    def reset_units(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Resets so many units of each group now, those of least utility, or as many as are mature; returns how many.

        What the rates still owe stays owed. Groups in which something is frozen are left alone.
        """
        frozen = self._module_units.frozen
        wanted = [0 if group in frozen else count for group, count in enumerate(wanted)]
        counts = self._schedule.replace(wanted, self._step)
        self._replace(counts)
        return counts

    def _replace(self, due: Sequence[int]) -> None:
        grouping, draws = self._module_units.grouping, self._module_units.draws
        for group, count in enumerate(due):
            self._module_units.replaced[group] += count
        selected = [
            select_units(self._units, self._settings, grouping.layout, group, [count])
            for group, count in enumerate(due)
        ]
        replace_in_groups(selected, self._units, self._settings, grouping, self._module_units.slots, draws)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return self._module_units.state_dict() | {
            "step": self._step,
            "accumulated_replacements": list(self._schedule.accumulated),
            "replacements_in_window": self._schedule.replaced(self._step),
            "utility": self._units.utility.clone(),
            "age": self._units.age.clone(),
            "mean_activation": self._units.mean_activation.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        device = self._module_units.grouping.device
        saved = read_part(SavedResets, state)
        refuse(saved.misfits(self._module_units.grouping.layout.widths))
        # Utilities and means may have overflowed where all that the network computes with is finite.
        shape, seen = self._units.utility.shape, self._units.mean_activation.shape
        units = UnitState(
            utility=take_tensor(state, "utility", shape, torch.float32).to(device, copy=True),
            age=take_tensor(state, "age", shape, torch.int64, counts(saved.step)).to(device, copy=True),
            mean_activation=take_tensor(state, "mean_activation", seen, torch.float32).to(device, copy=True),
        )
        history = self._module_units.read_state(state)
        self._step, self._units = saved.step, units
        self._module_units.resume(history)
        # Not in states that were saved before replacements could be limited.
        in_window = saved.replacements_in_window or [0] * len(history.replacements)
        self._schedule = self._schedule_from_ages(saved.accumulated_replacements, in_window)

    def _schedule_from_ages(self, accumulated: Sequence[float], in_window: Sequence[int]) -> ReplacementSchedule:
        ages = self._units.age[0].cpu().numpy()
        return ReplacementSchedule.from_ages(
            self._rates,
            self._resets.maturity_threshold,
            accumulated,
            self._step,
            [ages[columns] for columns in self._module_units.grouping.layout.slices],
            max_replacements=self._resets.max_replacements,
            window=self._resets.replacement_window,
            replaced=in_window,
        )
