"""What the optimizers of `torch.optim` remember of single weights, and how a fresh weight starts afresh in them."""

import math
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.hooks import RemovableHandle

from cbp.errors import FieldViolation, SnapshotError, SpecError
from cbp.networks import to_device
from cbp.optimizers import STEPS_COUNTED, adam_direction
from cbp.serialization import Numbers, counts, take_tensor

_SLOTS: Mapping[type[Optimizer], tuple[str, ...]] = MappingProxyType(
    {
        SGD: ("momentum_buffer",),
        Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        RMSprop: ("square_avg", "momentum_buffer", "grad_avg"),
    }
)


def take_tensors(
    state: Mapping[str, Any], part: str, parameters: Mapping[str, nn.Parameter], numbers: Numbers | None
) -> dict[str, Tensor]:
    """Copies of the tensors that a part of a state has for some of these parameters, each like its parameter and beside
    it.

    Raises `SnapshotError` if they hold other numbers, or do not fit.
    """
    saved = state.get(part)
    if not isinstance(saved, Mapping):
        raise SnapshotError.of([FieldViolation(part, f"Expected a mapping, got {type(saved).__name__}")])
    strangers = [name for name in saved if name not in parameters]
    if strangers:
        text = "The state is of another network: this one has no such parameter"
        raise SnapshotError.of([FieldViolation(f"{part}.{strangers[0]}", text)])
    named = {f"{part}.{name}": tensor for name, tensor in saved.items()}

    def taken(name: str, like: Tensor) -> Tensor:
        return take_tensor(named, f"{part}.{name}", like.shape, like.dtype, numbers).to(like.device, copy=True)

    return {name: taken(name, parameters[name]) for name in saved}


class OptimizerSlots:
    """The tensors that an optimizer keeps beside some parameters, and for Adam a step count for every weight of them.

    Adam keeps one step count for a whole tensor, which would give fresh weights a step up to √((1 − β₂)⁻¹)·(1 − β₁)
    times too large. This object keeps a count for every weight and, inside `optimizer.step()`, puts the difference
    right. It needs an optimizer step to be a step: a fused Adam that skips one on its own, as under a gradient
    scaler, is not supported.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """The parameters by name. Raises `SpecError` if the optimizer is none of SGD, Adam, AdamW and RMSprop."""
        _kind(optimizer)
        self._parameters = dict(parameters)
        self._known = frozenset(self._parameters.values())
        self._has_fresh_weights = False
        self.adam_steps: dict[Tensor, Tensor] = {}
        """Per parameter, float32 of its shape: updates of each weight since it was last drawn. Empty but for Adam."""
        self._common: dict[Tensor, Tensor | float] = {}
        """Per parameter, Adam's own count of its updates when it was last seen."""
        self._attach(optimizer)

    def use(self, optimizer: Optimizer) -> None:
        """Goes on with another optimizer. Raises `SpecError` as the constructor does; then nothing has changed."""
        _kind(optimizer)
        self.remove()
        self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._names = _SLOTS[_kind(optimizer)]
        self._hook: RemovableHandle | None = None
        if isinstance(optimizer, Adam | AdamW):
            # The hook does not keep this object.
            me = weakref.ref(self)

            def stepped(stepping: Optimizer, _args: Any, _kwargs: Any) -> None:
                if (slots := me()) is not None:
                    slots.correct_fresh_weights(stepping)

            self._hook = optimizer.register_step_post_hook(stepped)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach(self._optimizer)

    def remove(self) -> None:
        """Takes the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    def forget(self, parameter: Tensor, zero: Callable[[Tensor], None]) -> None:
        """Hands all that is kept for a parameter to `zero`, tensor by tensor, each of the parameter's shape.

        A parameter that has not been updated yet has no state, and there is nothing to zero.
        """
        self._has_fresh_weights = True
        kept = self._optimizer.state.get(parameter, {})
        for name in self._names:
            slot = kept.get(name)
            if isinstance(slot, Tensor):
                zero(slot)
        if parameter in self.adam_steps:
            zero(self.adam_steps[parameter])

    def state_dict(self) -> dict[str, Tensor]:
        """What this object keeps itself: copies of Adam's step counts, by parameter."""
        return {
            name: self.adam_steps[parameter].clone()
            for name, parameter in self._parameters.items()
            if parameter in self.adam_steps
        }

    def read_state(self, state: Mapping[str, Any], part: str) -> dict[Tensor, Tensor]:
        """The counts that `state_dict` returned and are this part of a state, for `resume`. Raises `SnapshotError` if
        they do not fit."""
        read = take_tensors(state, part, self._parameters, counts(STEPS_COUNTED))
        return {self._parameters[name]: steps for name, steps in read.items()}

    def resume(self, adam_steps: dict[Tensor, Tensor]) -> None:
        """Goes on from counts that were saved."""
        self.adam_steps = adam_steps
        self._common = {}
        self._has_fresh_weights = True

    @torch.no_grad()
    def correct_fresh_weights(self, optimizer: Optimizer) -> None:
        """Turns Adam's update by its one step count t into that by every weight's own count.

        Both updates follow from the moments, which do not depend on the count: θ gains lr · (d(t) − d(own)), with
        d = m̂ / (√v̂ + ε). Where the counts agree the difference is exactly 0.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._known and parameter.grad is not None:
                    self._correct(parameter, optimizer.state[parameter], group)

    def _correct(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        step = state["step"]
        # On the host it is a number; a tensor of the device must not be waited for.
        counted = step.clone() if isinstance(step, Tensor) and step.device.type != "cpu" else float(step)
        common = to_device(torch.as_tensor(step, dtype=torch.float32), parameter.device)
        own, before = self.adam_steps.get(parameter), self._common.get(parameter)
        self._common[parameter] = counted
        if own is None:
            self.adam_steps[parameter] = torch.empty_like(parameter).copy_(common)
            return
        if own.device != parameter.device:
            own = self.adam_steps[parameter] = own.to(parameter.device)
        own.add_(1)
        # The optimizer's state may have been cleared, or loaded, since.
        if isinstance(before, Tensor):
            own.copy_(torch.where(common == before.to(common.device) + 1, own, common))
        elif before is not None and counted != before + 1:
            own.copy_(common)
        if not self._has_fresh_weights:
            return
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        # Host numbers: a tensor of them would have to be brought to the device, and the host would wait.
        log_beta1, log_beta2 = (math.log(float(beta)) if beta else -math.inf for beta in group["betas"])

        def direction(steps: Tensor) -> Tensor:
            return adam_direction(state["exp_avg"], second, steps, log_beta1, log_beta2, group["eps"])

        parameter.add_((direction(common.expand_as(own)) - direction(own)) * group["lr"])


def _kind(optimizer: Optimizer) -> type[Optimizer]:
    for kind in _SLOTS:
        if isinstance(optimizer, kind):
            return kind
    text = f"{type(optimizer).__name__} is not supported; use SGD, Adam, AdamW or RMSprop"
    raise SpecError([FieldViolation("optimizer", text)])
