"""Continual Backprop for a training loop of your own.

    cbp = ContinualBackprop(module, optimizer)
    loss.backward()
    optimizer.step()
    cbp.step()

The resets are those of `Learner`, by the same functions of `cbp.replacement`; what is here is how they reach the
parameters, activations and optimizer state of a PyTorch module.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cbp.activations import NONLINEARITIES
from cbp.errors import CbpError, FieldViolation, SnapshotError, SpecError
from cbp.networks import LinearLayers, initial_bound
from cbp.optimizers import adam_direction, log_decay
from cbp.replacement import (
    DrawSource,
    GeneratorDraws,
    ReplacementSchedule,
    ResetSettings,
    UnitLayout,
    UnitState,
    evaluate_units,
    replace_units,
    select_units,
)
from cbp.serialization import take_tensor
from cbp.spec import Activation, Initializer, ResetSpec, Utility, hidden_layer_name

_OPTIMIZER_SLOTS: Mapping[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


class ContinualBackprop:
    """Resets low-utility units of an `nn.Sequential` of linear and activation layers.

    A step looks at the hidden activations of the forward passes, in training mode, that the last `optimizer.step()`
    learned from. A pass counts from its backward pass on, so one whose loss is never differentiated leaves no trace
    and takes no memory. Several passes before one optimizer step, as in gradient accumulation, count as one larger
    batch. Where `optimizer.step()` is called several times for one `step`, the passes of the last one count.

    Adam keeps one step count for a whole tensor, which would give fresh weights a step up to √((1 − β₂)⁻¹)·(1 − β₁)
    times too large. This object keeps a count for every weight and, inside `optimizer.step()`, puts the difference
    right. It needs an optimizer step to be a step: a fused Adam that skips one on its own, as under a gradient
    scaler, is not supported.
    """

    def __init__(
        self,
        module: nn.Sequential,
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
        seed: int = 0,
        draws: DrawSource | None = None,
    ) -> None:
        """The settings mean what they mean in `ResetSpec`.

        `initializer` is the distribution of redrawn weights; "default" is the one that `nn.Linear` starts with. `draws`
        replaces the random numbers seeded by `seed`. Raises `SpecError` if a module, optimizer or setting is not
        supported.
        """
        resets = {
            "layers": layers,
            "replacement_rate": replacement_rate,
            "layer_replacement_rates": layer_replacement_rates or {},
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
            "utility": utility,
            "bias_compensation": bias_compensation,
        }
        self._resets = ResetSpec(**resets)  # type: ignore[arg-type]
        if initializer not in get_args(Initializer):
            choices = ", ".join(get_args(Initializer))
            raise _unsupported("initializer", f"Expected one of {choices}; got {initializer!r}")
        self._linears, activations = _linear_layers(module)
        self._slot_names = _slot_names(optimizer)
        _check_parameters(self._linears, optimizer, bias_compensation)
        self._optimizer = optimizer
        hidden = self._linears[:-1]
        self._names = tuple(hidden_layer_name(index) for index in range(len(hidden)))
        self._rates = self._resets.rates(self._names)
        self._bounds = [
            initial_bound(initializer, activation, linear.in_features, linear.out_features)
            for linear, activation in zip(hidden, activations, strict=True)
        ]
        self._generator = torch.Generator().manual_seed(seed)
        self._given_draws = draws
        self._step = 0
        self._replacements = [0] * len(hidden)
        self._gathered: list[list[Tensor]] = [[] for _ in hidden]
        self._learned = False  # whether the optimizer has taken its step on what is gathered
        self._adam_steps: dict[Tensor, Tensor] = {}
        self._settle_on(self._linears[0].weight.device)
        self._units: UnitState = UnitState.fresh(1, self._layout.total, self._device)
        self._schedule: ReplacementSchedule = self._schedule_from_ages([0.0] * len(hidden))
        self._hooks = [
            reader.register_forward_hook(self._gatherer(layer)) for layer, reader in enumerate(self._linears[1:])
        ]
        self._hooks.append(optimizer.register_step_post_hook(self._finish_gathering))
        if isinstance(optimizer, Adam | AdamW):
            self._hooks.append(optimizer.register_step_post_hook(self._correct_fresh_weights))

    @property
    def replacements(self) -> dict[str, int]:
        """Units replaced so far, per hidden layer."""
        return dict(zip(self._names, self._replacements, strict=True))

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer; the object is of no more use."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def step(self) -> None:
        """One generate-and-test step; call it after `optimizer.step()`.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last one.
        """
        if not all(self._gathered):
            raise CbpError("step() needs a forward pass in training mode, and its backward pass, since the last step")
        activations = [passes[0] if len(passes) == 1 else torch.cat(passes, dim=1) for passes in self._gathered]
        self._forget_gathered()
        if self._linears[0].weight.device != self._device:
            self._settle_on(self._linears[0].weight.device)
            self._units = self._units.to(self._device)
        parameters = self._layers_of(lambda parameter: parameter)
        evaluate_units(self._units, self._settings, self._layout, parameters, activations, self._draws)
        self._step += 1
        due = self._schedule.advance(self._step)
        if due is None:
            return
        self._replacements = [before + count for before, count in zip(self._replacements, due, strict=True)]
        selected = [
            select_units(self._units, self._settings, self._layout, layer, [count]) for layer, count in enumerate(due)
        ]
        slots = [self._layers_of(slot) for slot in self._optimizer_slots()]
        replace_units(selected, self._units, self._settings, self._layout, parameters, slots, self._draws)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return {
            "step": self._step,
            "replacements": list(self._replacements),
            "accumulated_replacements": list(self._schedule.accumulated),
            "utility": self._units.utility.clone(),
            "age": self._units.age.clone(),
            "mean_activation": self._units.mean_activation.clone(),
            "generator": self._generator.get_state(),
            "adam_steps": {
                name: self._adam_steps[parameter].clone()
                for name, parameter in self._named_parameters().items()
                if parameter in self._adam_steps
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        hidden = len(self._names)
        try:
            accumulated = [float(share) for share in state["accumulated_replacements"]]
            replacements = [int(count) for count in state["replacements"]]
            step = int(state["step"])
            shape = self._units.utility.shape
            units = UnitState(
                utility=take_tensor(state, "utility", shape, torch.float32).to(self._device, copy=True),
                age=take_tensor(state, "age", shape, torch.int64).to(self._device, copy=True),
                mean_activation=take_tensor(state, "mean_activation", shape, torch.float32).to(self._device, copy=True),
            )
            generator_state = take_tensor(state, "generator", self._generator.get_state().shape, torch.uint8)
            adam_steps: dict[Tensor, Tensor] = {
                parameter: take_tensor(state["adam_steps"], name, parameter.shape, torch.float32).to(
                    parameter.device, copy=True
                )
                for name, parameter in self._named_parameters().items()
                if name in state["adam_steps"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"The state cannot be loaded: {type(error).__name__}: {error}") from error
        if len(accumulated) != hidden or len(replacements) != hidden:
            raise SnapshotError(f"The state is of another network: this one has {hidden} hidden layers")
        self._step, self._replacements, self._adam_steps = step, replacements, adam_steps
        self._generator.set_state(generator_state.cpu().clone())
        self._units = units
        self._schedule = self._schedule_from_ages(accumulated)

    def _settle_on(self, device: torch.device) -> None:
        """Brings what lives beside the weights to their device; the module may have been moved."""
        *hidden, _ = self._linears
        self._device = device
        self._layout = UnitLayout(
            [linear.in_features for linear in hidden],
            [linear.out_features for linear in hidden],
            [reader.out_features for reader in self._linears[1:]],
            device,
        )
        self._settings = ResetSettings.of([self._resets], device)
        self._draws = self._given_draws or GeneratorDraws([self._generator], self._layout, self._bounds)

    def _schedule_from_ages(self, accumulated: Sequence[float]) -> ReplacementSchedule:
        ages = self._units.age[0].cpu().numpy()
        return ReplacementSchedule.from_ages(
            self._rates,
            self._resets.maturity_threshold,
            accumulated,
            self._step,
            [ages[columns] for columns in self._layout.slices],
        )

    def _gatherer(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """A hook for the linear layer that reads a hidden layer: its input is that layer's activations.

        Not a hook on the activation module, since one module may serve several layers. Until the backward pass
        comes, the activations hang on the graph that holds them anyway, and go with it.
        """

        def gather(reader: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not (reader.training and output.requires_grad):
                return
            waiting = [inputs[0].detach()]

            def differentiated(_gradient: Tensor) -> None:
                if waiting:  # a graph may be walked more than once
                    activations = waiting.pop()
                    self._gather(layer, activations.reshape(1, -1, activations.shape[-1]))

            output.register_hook(differentiated)  # type: ignore[no-untyped-call]

        return gather

    def _gather(self, layer: int, activations: Tensor) -> None:
        if self._learned:
            self._forget_gathered()
        self._gathered[layer].append(activations)

    def _finish_gathering(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._learned = True

    def _forget_gathered(self) -> None:
        self._learned = False
        for passes in self._gathered:
            passes.clear()

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{layer}.{name}": parameter
            for layer, linear in enumerate(self._linears)
            for name, parameter in linear.named_parameters(recurse=False)
        }

    def _layers_of(self, value_of: Callable[[Tensor], Tensor]) -> LinearLayers:
        """What belongs to every parameter, as a stack of one learner; views, so that writing reaches the original."""
        return LinearLayers(
            weights=tuple(value_of(linear.weight).detach().unsqueeze(0) for linear in self._linears),
            biases=tuple(
                None if linear.bias is None else value_of(linear.bias).detach().unsqueeze(0) for linear in self._linears
            ),
        )

    def _optimizer_slots(self) -> list[Callable[[Tensor], Tensor]]:
        """How to find each of the tensors that the optimizer keeps for a parameter."""

        def kept_by_optimizer(name: str) -> Callable[[Tensor], Tensor]:
            def find(parameter: Tensor) -> Tensor:
                kept = self._optimizer.state.get(parameter, {}).get(name)
                # A parameter that has not been updated yet has no state, and there is nothing to zero.
                return kept if isinstance(kept, Tensor) else torch.zeros_like(parameter)

            return find

        def steps_of(parameter: Tensor) -> Tensor:
            steps = self._adam_steps.get(parameter)
            return torch.zeros_like(parameter) if steps is None else steps

        return [*(kept_by_optimizer(name) for name in self._slot_names), steps_of]

    @torch.no_grad()
    def _correct_fresh_weights(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Turns Adam's update by its one step count t into that by every weight's own count.

        Both updates follow from the moments, which do not depend on the count: θ gains lr · (d(t) − d(own)), with
        d = m̂ / (√v̂ + ε). Where the counts agree the difference is exactly 0.
        """
        ours = set(self._named_parameters().values())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in ours and parameter.grad is not None:
                    self._correct(parameter, optimizer.state[parameter], group)

    def _correct(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        common = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device)
        own = self._adam_steps.get(parameter)
        if own is None:
            self._adam_steps[parameter] = common.expand_as(parameter).clone()
            return
        if own.device != parameter.device:
            own = self._adam_steps[parameter] = own.to(parameter.device)
        own.add_(1)
        if not any(self._replacements):
            return
        log_beta1, log_beta2 = (log_decay([float(beta)], parameter.device).squeeze() for beta in group["betas"])
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]

        def direction(steps: Tensor) -> Tensor:
            return adam_direction(state["exp_avg"], second, steps, log_beta1, log_beta2, group["eps"])

        parameter.add_((direction(common.expand_as(own)) - direction(own)) * group["lr"])


def _linear_layers(module: nn.Sequential) -> tuple[list[nn.Linear], list[Activation]]:
    """The linear layers, and the activation that follows each but the last. Raises `SpecError`.

    Modules before the first and after the last linear layer may be anything that has no parameters.
    """
    if not isinstance(module, nn.Sequential):
        raise _unsupported("module", f"Expected an nn.Sequential, got {type(module).__name__}")
    children = list(module)
    places = [place for place, child in enumerate(children) if isinstance(child, nn.Linear)]
    linears = [child for child in children if isinstance(child, nn.Linear)]
    if len(linears) < 2:
        raise _unsupported("module", "Expected at least two linear layers: resets need a hidden layer")
    if len(set(linears)) < len(linears):
        raise _unsupported("module", "A linear layer occurs twice; units that share weights cannot be reset apart")
    activations: list[Activation] = []
    for place, following in pairwise(places):
        between = children[place + 1 : following]
        if len(between) > 1:
            names = ", ".join(type(child).__name__ for child in between)
            raise _unsupported(f"module[{place + 1}]", f"Expected one activation between linear layers, got {names}")
        activations.append(_activation(between[0], place + 1) if between else "identity")
    for place, child in enumerate(children):
        if not places[0] <= place <= places[-1] and any(True for _ in child.parameters()):
            raise _unsupported(f"module[{place}]", f"{type(child).__name__} has parameters but is not a linear layer")
    return linears, activations


def _activation(module: nn.Module, place: int) -> Activation:
    for activation, nonlinearity in NONLINEARITIES.items():
        if isinstance(module, nonlinearity.module):
            return activation
    supported = ", ".join(nonlinearity.module.__name__ for nonlinearity in NONLINEARITIES.values())
    raise _unsupported(f"module[{place}]", f"{type(module).__name__} between linear layers; supported are {supported}")


def _slot_names(optimizer: Optimizer) -> tuple[str, ...]:
    for kind, names in _OPTIMIZER_SLOTS.items():
        if isinstance(optimizer, kind):
            return names
    raise _unsupported("optimizer", f"{type(optimizer).__name__} is not supported; use SGD, Adam or AdamW")


def _check_parameters(linears: Sequence[nn.Linear], optimizer: Optimizer, bias_compensation: bool) -> None:
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for layer, linear in enumerate(linears):
        for name, parameter in linear.named_parameters(recurse=False):
            if parameter not in optimized:
                raise _unsupported("optimizer", f"The {name} of linear layer {layer} is not among its parameters")
            if parameter.dtype != torch.float32:
                raise _unsupported("module", f"Linear layer {layer} is {parameter.dtype}; expected float32 parameters")
        if bias_compensation and layer and linear.bias is None:
            raise _unsupported(
                "bias_compensation", f"Linear layer {layer} has no bias to take over a mean; turn compensation off"
            )


def _unsupported(field: str, description: str) -> SpecError:
    return SpecError([FieldViolation(field, description)])
