"""ReDo (Sokar, Agarwal, Castro, Evci 2023, *The dormant neuron phenomenon in deep reinforcement learning*)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cbp.methods.unit_resets import UnitResets
from cbp.saved.methods import SavedSteps
from cbp.saved.parts import read_part
from cbp.serialization import take_tensor
from cbp.spec.learner_spec import Initializer, ReDoSpec
from cbp.units.named_units import HiddenUnits
from cbp.units.unit_groups import mean_over_units

_SMALLEST_MEAN = 1e-12


class ReDo(UnitResets):
    """Every `interval` steps, resets all units whose score is at most τ.

    The score (equation 1) is mean abs(h_i) / mean_k mean abs(h_k), over the units k of a group. The means are taken
    over all steps since the last look; the paper takes them over one batch of 64, and a batch may have one example
    here. A dead group's units all score 0. Newborns have redrawn incoming weights, bias 0 and outgoing weights 0, and
    the optimizer forgets these elements.

    Costs one mean over the activations a step, and one read-back from the device every `interval` steps.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        interval: int = 1000,
        dormant_threshold: float = 0.025,
        initializer: Initializer = "default",
        units: Sequence[HiddenUnits] | None = None,
        seed: int = 0,
    ) -> None:
        """For `interval` and `dormant_threshold` see `ReDoSpec`, for the other settings `ContinualBackprop`.

        Raises `SpecError` if the module cannot be traced or has no unit that can be reset, or if the optimizer or a
        setting is not supported.
        """
        self._spec = ReDoSpec(interval=interval, dormant_threshold=dormant_threshold)
        super().__init__(module, optimizer, initializer, units, seed)
        self._step = 0
        self._activity = torch.zeros(self._grouping.layout.total, device=self._grouping.device)

    @torch.no_grad()
    def step(self) -> None:
        """Looks at the last batch's activity, and resets dormant units if it is time; call it after `optimizer.step()`.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last one.
        """
        taps = self._units.activations.take()
        if taps is None:
            return
        if self._units.settle():
            self._activity = self._activity.to(self._grouping.device)
        activity = mean_over_units(self._grouping, self._units.seen(taps), torch.Tensor.abs)
        self._activity += torch.where(torch.isfinite(activity), activity, 0.0)
        self._step += 1
        if self._step % self._spec.interval:
            return
        scores = self._activity.clone()
        for columns in self._grouping.layout.slices:
            scores[columns] /= scores[columns].mean().clamp_min(_SMALLEST_MEAN)
        self._activity.zero_()
        dormant = (scores <= self._spec.dormant_threshold).nonzero()[:, 0].cpu()
        self._units.renew(dormant)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return self._units.state_dict() | {"step": self._step, "activity": self._activity.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        saved = read_part(SavedSteps, state)
        activity = take_tensor(state, "activity", self._activity.shape, torch.float32)
        history = self._units.read_state(state)
        self._step, self._activity = saved.step, activity.to(self._grouping.device, copy=True)
        self._units.resume(history)
