"""Selective weight reinitialisation (Hernandez-Garcia, Dohare, Luo, Sutton 2025, *Reinitializing weights vs units for
maintaining plasticity in neural networks*)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.errors import CbpError, FieldViolation, SpecError
from cbp.methods.parameters import Beside, optimized_parameters, redrawn
from cbp.saved.methods import SavedRedraws
from cbp.saved.parts import read_part, refuse
from cbp.spec.learner_spec import SelectiveWeightReinitializationSpec
from cbp.units.draws import take_generator_state
from cbp.units.optimizer_slots import OptimizerSlots


class SelectiveWeightReinitialization:
    """Every `interval` steps, redraws the weights of least utility in each layer.

    The utility is a running average of abs(g · w), with the gradient of a step and the weights after it; it starts over
    at each redraw, for all weights. A layer of n weights loses ⌊n · replacement_rate + what is left over⌋ of them;
    among equals those with the lowest index. New values are drawn as first values were, and the optimizer forgets
    exactly these elements. Departs from the published code in that the remainder is carried over, not drawn by chance,
    and that only tensors of two or more axes count as weights: redrawing a bias would shift what all behind it get.

    Costs two copies of the weights, two operations on each of them a step, and a sort every `interval` steps.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        replacement_rate: float,
        interval: int = 100,
        decay_rate: float = 0.99,
        seed: int = 0,
    ) -> None:
        """For the settings see `SelectiveWeightReinitializationSpec`. Construct it before training: new values are
        drawn from those at construction.

        Raises `SpecError` if a setting is wrong, or the optimizer is not supported or has no weights of the module.
        """
        self._spec = SelectiveWeightReinitializationSpec(
            replacement_rate=replacement_rate, interval=interval, decay_rate=decay_rate
        )
        parameters = optimized_parameters(module, optimizer)
        self._weights = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        if not self._weights:
            raise SpecError([FieldViolation("module", "It has no weights: no parameter of two or more axes")])
        self._slots = OptimizerSlots(optimizer, self._weights)
        self._first = Beside(self._weights, Tensor.clone)
        self._utility = Beside(self._weights, torch.zeros_like)
        self._owed = dict.fromkeys(self._weights, 0.0)
        self._redrawn = dict.fromkeys(self._weights, 0)
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0

    @property
    def redrawn_weights(self) -> dict[str, int]:
        """Weights redrawn so far, by parameter."""
        return dict(self._redrawn)

    @torch.no_grad()
    def step(self) -> None:
        """Brings utilities up to date, and redraws weights if it is time; call it after `optimizer.step()`, before the
        gradients are zeroed.

        Raises `CbpError` if no weight has a gradient.
        """
        learned = [(name, weight, weight.grad) for name, weight in self._weights.items() if weight.grad is not None]
        if not learned:
            raise CbpError("step() needs the gradients of the optimizer's step; call it before they are zeroed")
        for name, weight, gradient in learned:
            self._utility[name].lerp_((gradient * weight).abs_(), 1 - self._spec.decay_rate)
        self._step += 1
        if self._step % self._spec.interval == 0:
            for name, _, _ in learned:
                self._redraw(name)

    def _redraw(self, name: str) -> None:
        weight = self._weights[name]
        owed = self._owed[name] + self._spec.replacement_rate * weight.numel()
        count = min(int(owed), weight.numel())
        self._owed[name] = owed - count
        if count:
            least = torch.sort(self._utility[name].flatten(), stable=True).indices[:count]
            at = torch.unravel_index(least, weight.shape)

            def zero(tensor: Tensor) -> None:
                tensor[at] = 0.0

            weight[at] = redrawn(self._first[name], count, self._generator)
            self._slots.forget(weight, zero)
            self._redrawn[name] += count
        self._utility[name].zero_()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return {
            "step": self._step,
            "owed": dict(self._owed),
            "redrawn": dict(self._redrawn),
            "first": self._first.state_dict(),
            "utility": self._utility.state_dict(),
            "generator": self._generator.get_state(),
            "adam_steps": self._slots.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        saved = read_part(SavedRedraws, state)
        refuse(saved.misfits({name: weight.numel() for name, weight in self._weights.items()}))
        first = self._first.read_state(state, "first")
        utility = self._utility.read_state(state, "utility", None)  # it may overflow where the weights do not
        generator = take_generator_state(state, "generator")
        adam_steps = self._slots.read_state(state, "adam_steps")
        self._step, self._owed, self._redrawn = saved.step, dict(saved.owed), dict(saved.redrawn)
        self._first.resume(first)
        self._utility.resume(utility)
        self._generator.set_state(generator)
        self._slots.resume(adam_steps)

    def remove(self) -> None:
        """Takes the hook off the optimizer; the object is of no more use."""
        self._slots.remove()
