"""Stochastic gradient descent, RMSprop, Adam and AdamW over flat parameters.

State is a named record of [L, P] tensors laid out like the parameters; a reset zeroes its entries for the replaced
weights. Settings are [L, 1], so that learners with settings of their own share one call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbp.networks import FlatLayers, flat_layers
from cbp.spec.learner_spec import AdamSpec, AdamWSpec, MlpSpec, RmspropSpec, SgdSpec

NORM_MARGIN = 1e-6
"""Added to a gradient's norm before it is divided by, as PyTorch does."""

STEPS_COUNTED = 2**24
"""As far as Adam's float32 counts of steps go."""

AnyOptimizerSpec = SgdSpec | RmspropSpec | AdamSpec | AdamWSpec


@dataclass(frozen=True, kw_only=True)
class _Settings:
    clip_norm: Tensor
    """Infinite where nothing is clipped."""
    clips: bool


@dataclass(frozen=True, kw_only=True)
class SgdSettings(_Settings):
    negative_lr: Tensor
    momentum: Tensor
    weight_decay: Tensor
    uses_weight_decay: bool
    nesterov: bool


@dataclass(frozen=True, kw_only=True)
class RmspropSettings(_Settings):
    negative_lr: Tensor
    alpha: Tensor
    one_minus_alpha: Tensor
    epsilon: Tensor
    momentum: Tensor
    weight_decay: Tensor
    uses_weight_decay: bool


@dataclass(frozen=True, kw_only=True)
class AdamSettings(_Settings):
    negative_lr: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    log_beta1: Tensor
    log_beta2: Tensor
    epsilon: Tensor
    weight_decay: Tensor
    uses_weight_decay: bool
    decoupled: bool
    shrinkage: Tensor
    """1 − lr · weight_decay, AdamW's factor."""


Settings = SgdSettings | RmspropSettings | AdamSettings


def settings(specs: Sequence[AnyOptimizerSpec], device: torch.device) -> Settings:
    """The settings of L learners, all with the same kind of optimizer; of SGD, all or none with Nesterov's momentum."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(device, torch.float32).unsqueeze(1)

    negative_lr = column([-spec.lr for spec in specs])
    weight_decay = column([spec.weight_decay for spec in specs])
    uses_weight_decay = any(spec.weight_decay > 0 for spec in specs)
    clip_norm = column([spec.clip_norm or math.inf for spec in specs])
    clips = any(spec.clip_norm is not None for spec in specs)
    sgd = [spec for spec in specs if isinstance(spec, SgdSpec)]
    if sgd:
        return SgdSettings(
            clip_norm=clip_norm,
            clips=clips,
            negative_lr=negative_lr,
            momentum=column([spec.momentum for spec in sgd]),
            weight_decay=weight_decay,
            uses_weight_decay=uses_weight_decay,
            nesterov=sgd[0].nesterov,
        )
    rmsprop = [spec for spec in specs if isinstance(spec, RmspropSpec)]
    if rmsprop:
        return RmspropSettings(
            clip_norm=clip_norm,
            clips=clips,
            negative_lr=negative_lr,
            alpha=column([spec.alpha for spec in rmsprop]),
            one_minus_alpha=column([1 - spec.alpha for spec in rmsprop]),
            epsilon=column([spec.epsilon for spec in rmsprop]),
            momentum=column([spec.momentum for spec in rmsprop]),
            weight_decay=weight_decay,
            uses_weight_decay=uses_weight_decay,
        )
    adam = [spec for spec in specs if isinstance(spec, AdamSpec | AdamWSpec)]
    return AdamSettings(
        clip_norm=clip_norm,
        clips=clips,
        negative_lr=negative_lr,
        one_minus_beta1=column([1 - spec.beta1 for spec in adam]),
        beta2=column([spec.beta2 for spec in adam]),
        one_minus_beta2=column([1 - spec.beta2 for spec in adam]),
        log_beta1=log_decay([spec.beta1 for spec in adam], device),
        log_beta2=log_decay([spec.beta2 for spec in adam], device),
        epsilon=column([spec.epsilon for spec in adam]),
        weight_decay=weight_decay,
        uses_weight_decay=uses_weight_decay,
        decoupled=adam[0].kind == "adamw",
        shrinkage=column([1 - spec.lr * spec.weight_decay for spec in adam]),
    )


def log_decay(decays: Sequence[float], device: torch.device) -> Tensor:
    """[L, 1] natural logarithms, taken in float64: −expm1(t · log β) is then 1 − βᵗ to float32 at every t ≥ 1."""
    return torch.tensor(decays, dtype=torch.float64).log_().to(device, torch.float32).unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class SgdState:
    momentum: FlatLayers | None
    """The running update; None while no learner uses momentum."""

    def slots(self) -> dict[str, FlatLayers]:
        return {} if self.momentum is None else {"momentum": self.momentum}

    def overflowing_unseen(self) -> tuple[FlatLayers, ...]:
        """What may become infinite while the parameters stay finite; an infinite momentum does not let them."""
        return ()


@dataclass(frozen=True, kw_only=True)
class RmspropState:
    square_average: FlatLayers
    momentum: FlatLayers | None
    """The running update; None while no learner uses momentum."""

    def slots(self) -> dict[str, FlatLayers]:
        momentum = {} if self.momentum is None else {"momentum": self.momentum}
        return {"square_average": self.square_average} | momentum

    def overflowing_unseen(self) -> tuple[FlatLayers, ...]:
        """As `AdamState` has it."""
        return (self.square_average,)


@dataclass(frozen=True, kw_only=True)
class AdamState:
    first_moment: FlatLayers
    second_moment: FlatLayers
    steps: FlatLayers
    """Updates of each parameter since it was last drawn. float32 as in torch.optim: it stops counting at 2²⁴, where
    1 − βᵗ has long been 1 for any β up to 1 − 1e-6."""

    def slots(self) -> dict[str, FlatLayers]:
        return {"first_moment": self.first_moment, "second_moment": self.second_moment, "steps": self.steps}

    def overflowing_unseen(self) -> tuple[FlatLayers, ...]:
        """What may become infinite while the parameters stay finite: divided by it, no step moves them any more."""
        return (self.second_moment,)


OptimizerState = SgdState | RmspropState | AdamState


def initial_state(specs: Sequence[AnyOptimizerSpec], network: MlpSpec, device: torch.device) -> OptimizerState:
    momentum = flat_layers(network, len(specs), device) if uses_momentum(specs) else None
    if isinstance(specs[0], SgdSpec):
        return SgdState(momentum=momentum)
    if isinstance(specs[0], RmspropSpec):
        return RmspropState(square_average=flat_layers(network, len(specs), device), momentum=momentum)
    return AdamState(
        first_moment=flat_layers(network, len(specs), device),
        second_moment=flat_layers(network, len(specs), device),
        steps=flat_layers(network, len(specs), device),
    )


def adjusted_state(
    state: OptimizerState, specs: Sequence[AnyOptimizerSpec], network: MlpSpec, device: torch.device
) -> OptimizerState:
    """The state to go on with after settings, though not the kind of optimizer, have changed."""
    if isinstance(state, AdamState):
        return state
    if not uses_momentum(specs):
        return replace(state, momentum=None)
    # Momentum 0 keeps nothing of the last step, so a buffer that was not needed is as good as one of zeros.
    return replace(state, momentum=state.momentum or flat_layers(network, len(specs), device))


def uses_momentum(specs: Sequence[AnyOptimizerSpec]) -> bool:
    """Whether any of them keeps a running update; Adam's first moment is none."""
    return any(isinstance(spec, SgdSpec | RmspropSpec) and spec.momentum > 0 for spec in specs)


def update(parameters: Tensor, gradient: Tensor, state: OptimizerState, settings: Settings) -> None:
    """One step, in place; parameters and gradient [L, P]. The gradient is used up."""
    if settings.clips:
        _clip(gradient, settings)
    match state, settings:
        case SgdState(), SgdSettings():
            _sgd(parameters, gradient, state, settings)
        case RmspropState(), RmspropSettings():
            _rmsprop(parameters, gradient, state, settings)
        case AdamState(), AdamSettings():
            _adam(parameters, gradient, state, settings)
        case _:
            raise TypeError(f"{type(settings).__name__} do not go with {type(state).__name__}")


def _clip(gradient: Tensor, settings: Settings) -> None:
    """As `torch.nn.utils.clip_grad_norm_` has it."""
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    gradient.mul_(torch.div(settings.clip_norm, norm.add_(NORM_MARGIN)).clamp_max_(1.0))


def _sgd(parameters: Tensor, gradient: Tensor, state: SgdState, settings: SgdSettings) -> None:
    if settings.uses_weight_decay:
        gradient.addcmul_(parameters, settings.weight_decay)
    if state.momentum is not None:
        running = state.momentum.flat.mul_(settings.momentum).add_(gradient)
        gradient = gradient.addcmul_(running, settings.momentum) if settings.nesterov else running
    parameters.addcmul_(gradient, settings.negative_lr)


def _rmsprop(parameters: Tensor, gradient: Tensor, state: RmspropState, settings: RmspropSettings) -> None:
    """As `torch.optim.RMSprop` has it. Nothing counts steps, so a fresh weight starts like those of a fresh network."""
    if settings.uses_weight_decay:
        gradient.addcmul_(parameters, settings.weight_decay)
    average = state.square_average.flat
    average.mul_(settings.alpha).addcmul_(gradient.square(), settings.one_minus_alpha)
    direction = gradient.div_(average.sqrt().add_(settings.epsilon))
    if state.momentum is not None:
        direction = state.momentum.flat.mul_(settings.momentum).add_(direction)
    parameters.addcmul_(direction, settings.negative_lr)


def _adam(parameters: Tensor, gradient: Tensor, state: AdamState, settings: AdamSettings) -> None:
    """Kingma & Ba 2015, algorithm 1, with t counted per parameter: a fresh unit warms up like a fresh network."""
    if settings.uses_weight_decay:
        if settings.decoupled:
            parameters.mul_(settings.shrinkage)
        else:
            gradient.addcmul_(parameters, settings.weight_decay)
    first, second, steps = state.first_moment.flat, state.second_moment.flat, state.steps.flat
    steps.add_(1)
    first.lerp_(gradient, settings.one_minus_beta1)
    second.mul_(settings.beta2).addcmul_(gradient.square_(), settings.one_minus_beta2)
    direction = adam_direction(first, second, steps, settings.log_beta1, settings.log_beta2, settings.epsilon)
    parameters.addcmul_(direction, settings.negative_lr)


def adam_direction(
    first_moment: Tensor,
    second_moment: Tensor,
    steps: Tensor,
    log_beta1: Tensor | float,
    log_beta2: Tensor | float,
    epsilon: Tensor | float,
) -> Tensor:
    """m̂ / (√v̂ + ε), with the moments corrected by each parameter's own step count."""
    correction = torch.mul(steps, log_beta2).expm1_().neg_()
    denominator = torch.div(second_moment, correction, out=correction).sqrt_().add_(epsilon)
    correction = torch.mul(steps, log_beta1).expm1_().neg_()
    return torch.div(first_moment, correction, out=correction).div_(denominator)
