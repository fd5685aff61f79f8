"""Self-normalised resets (Farias & Jozefiak 2024, *Self-normalized resets for plasticity in continual learning*).

Shapes: U units of all groups, K bins of a histogram.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.methods.unit_resets import UnitResets
from cbp.saved.parts import LARGEST_COUNT
from cbp.serialization import counts, take_tensor
from cbp.spec.learner_spec import Initializer, SelfNormalizedResetsSpec
from cbp.units.named_units import HiddenUnits
from cbp.units.unit_groups import mean_over_units

_BINS_PER_OCTAVE = 8


class SelfNormalizedResets(UnitResets):
    """Resets a unit once it has been silent for longer than it used to be.

    A unit fires at a step if h > 0 for any example and position. With A the time between two firings, in steps, and a
    the number of steps that it has been silent for, a unit is reset when P(A ≥ a) ≤ η (algorithm 1). P is what the
    unit's own history says, from its birth on, and it needs at least 1/η times to say anything that rare; whoever has
    been silent for `longest_silence` steps goes in any case. Times are counted in eight bins for each doubling, single
    ones up to 15; within a bin all count as at least a, so a reset may come up to an eighth late, but never early.
    Newborns are those of `ReDo`.

    Units that always are above 0, as with sigmoid, never go. Costs one pass over the activations, a histogram of about
    100 counts for each unit, and one read-back from the device a step, since any step may reset a unit.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        rejection_level: float = 1e-4,
        longest_silence: int = 10_000,
        initializer: Initializer = "default",
        units: Sequence[HiddenUnits] | None = None,
        seed: int = 0,
    ) -> None:
        """For `rejection_level` and `longest_silence` see `SelfNormalizedResetsSpec`, for the other settings
        `ContinualBackprop`.

        Raises `SpecError` if the module cannot be traced or has no unit that can be reset, or if the optimizer or a
        setting is not supported.
        """
        self._spec = SelfNormalizedResetsSpec(rejection_level=rejection_level, longest_silence=longest_silence)
        super().__init__(module, optimizer, initializer, units, seed)
        device, total = self._grouping.device, self._grouping.layout.total
        self._bins = first_times(longest_silence).to(device)
        self._silence = torch.zeros(total, dtype=torch.int64, device=device)
        self._times = torch.zeros(total, len(self._bins), dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(self) -> None:
        """Counts silences, and resets units that are silent for too long; call it after `optimizer.step()`.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last one.
        """
        taps = self._units.activations.take()
        if taps is None:
            return
        if self._units.settle():
            device = self._grouping.device
            self._bins = self._bins.to(device)
            self._silence, self._times = self._silence.to(device), self._times.to(device)
        firing = mean_over_units(self._grouping, self._units.seen(taps), lambda h: (h > 0).to(h.dtype))
        fires = firing > 0
        self._silence += ~firing.isnan()  # a unit that nobody saw was not silent
        self._times.scatter_add_(1, self._bin_of(self._silence.clamp_min(1)), fires.to(torch.int64).unsqueeze(1))
        self._silence.masked_fill_(fires, 0)
        silent_for_too_long = self._has_evidence() | (self._silence >= self._spec.longest_silence)
        lost = silent_for_too_long.nonzero()[:, 0].cpu()
        if len(lost):
            at = self._units.renew(lost).to(self._grouping.device)
            self._silence[at] = 0
            self._times[at] = 0

    def _has_evidence(self) -> Tensor:
        """[U] whether P(A ≥ a) ≤ η, by at least 1/η times."""
        count = self._times.sum(dim=1)
        as_long = self._times.flip(1).cumsum(1).flip(1).gather(1, self._bin_of(self._silence.clamp_min(1))).squeeze(1)
        bearable = count.to(torch.float64) * self._spec.rejection_level
        return (self._silence > 0) & (bearable >= 1) & (as_long.to(torch.float64) <= bearable)

    def _bin_of(self, times: Tensor) -> Tensor:
        """[U, 1] of times [U], at least 1."""
        return (torch.bucketize(times, self._bins, right=True) - 1).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return self._units.state_dict() | {"silence": self._silence.clone(), "times": self._times.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        bearable = counts(self._spec.longest_silence - 1)
        silence = take_tensor(state, "silence", self._silence.shape, torch.int64, bearable)
        times = take_tensor(state, "times", self._times.shape, torch.int64, counts(LARGEST_COUNT))
        history = self._units.read_state(state)
        device = self._grouping.device
        self._silence, self._times = silence.to(device, copy=True), times.to(device, copy=True)
        self._units.resume(history)


def first_times(longest: int) -> Tensor:
    """[K] int64 the least time of each bin, ascending from 1; the last bin holds `longest`."""
    octaves = longest.bit_length()
    steps = torch.arange(octaves * _BINS_PER_OCTAVE, dtype=torch.float64) / _BINS_PER_OCTAVE
    bins = sorted(set(torch.exp2(steps).ceil().to(torch.int64).tolist()))
    return torch.tensor([time for time in bins if time <= longest])
