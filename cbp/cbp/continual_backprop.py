"""Continual Backprop for a training loop of your own.

    resets = ContinualBackprop(module, optimizer)
    loss.backward()
    optimizer.step()
    resets.step()

The resets are those of `Learner`; what is here is when a module's activations are gathered, and what is saved. Which
units a module has is found by `cbp.discovery`, and `cbp.unit_groups` evaluates and replaces them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from cbp.discovery import Discovery, TableRow, discover_units, group_units
from cbp.errors import CbpError, FieldViolation, SnapshotError, SpecError
from cbp.named_units import HiddenUnits, named_units
from cbp.optimizer_slots import OptimizerSlots
from cbp.replacement import DrawSource, ReplacementSchedule, ResetSettings, UnitState, select_units
from cbp.serialization import take_tensor
from cbp.spec import Initializer, ResetSpec, Utility, hidden_layer_name
from cbp.unit_facts import Tap
from cbp.unit_groups import GroupDraws, Grouping, evaluate_groups, replace_in_groups


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
        if initializer not in get_args(Initializer):
            choices = ", ".join(get_args(Initializer))
            raise _unsupported("initializer", f"Expected one of {choices}; got {initializer!r}")
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if units is None:
            self._found = discover_units(module, optimized.__contains__, initializer)
        else:
            self._found = group_units(module, named_units(module, units), optimized.__contains__, initializer)
        groups = self._found.groups
        if not groups:
            raise _nothing_to_reset(self._found)
        self._names = tuple(hidden_layer_name(index) for index in range(len(groups)))
        resets = {
            "layers": layers if isinstance(layers, str) else [self._hidden(layer) for layer in layers],
            "replacement_rate": replacement_rate,
            "layer_replacement_rates": {
                self._hidden(layer): rate for layer, rate in (layer_replacement_rates or {}).items()
            },
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
            "utility": utility,
            "bias_compensation": bias_compensation,
            "strength": strength,
            "max_replacements": max_replacements,
            "replacement_window": replacement_window,
        }
        self._resets = ResetSpec(**resets)  # type: ignore[arg-type]
        self._rates = self._resets.rates(self._names)
        self._parameters: dict[str, nn.Parameter] = {}
        for group in groups:
            self._parameters |= group.parameters()
        self._slots = OptimizerSlots(optimizer, self._parameters.values())
        self._generator = torch.Generator().manual_seed(seed)
        self._given_draws = draws
        self._step = 0
        self._replacements = [0] * len(groups)
        self._gathered: list[list[Tensor]] = [[] for _ in self._found.taps]
        self._learned = False  # whether the optimizer has taken its step on what is gathered
        self._settle_on(self._device())
        self._units = self._grouping.fresh_units()
        self._schedule: ReplacementSchedule = self._schedule_from_ages([0.0] * len(groups), [0] * len(groups))
        self._hooks = [
            tap.layer.register_forward_hook(self._gatherer(place, tap), with_kwargs=True)
            for place, tap in enumerate(self._found.taps)
        ]
        self._hooks.append(optimizer.register_step_post_hook(self._finish_gathering))

    @property
    def replacements(self) -> dict[str, int]:
        """Units replaced so far, per group of units."""
        return dict(zip(self._names, self._replacements, strict=True))

    def explain(self) -> str:
        """A table of all groups of units: layers that compute them, how many there are, who reads them, and whether
        they are reset or why not."""
        named = []
        for name, row, rate in zip(self._names, self._found.rows, self._rates, strict=True):
            means = row.means if self._resets.bias_compensation else ()
            named.append((name, row, "; ".join(["" if rate else "rate 0", row.verdict, *means]).removeprefix("; ")))
        named += [("-", row, row.verdict) for row in self._found.left_alone]
        return _table(named)

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer; the object is of no more use."""
        self._slots.remove()
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def step(self) -> None:
        """One generate-and-test step; call it after `optimizer.step()`.

        Raises `CbpError` if no forward and backward pass in training mode has happened since the last one.
        """
        if not all(self._gathered):
            raise CbpError("step() needs a forward pass in training mode, and its backward pass, since the last step")
        taps = [list(passes) for passes in self._gathered]
        self._forget_gathered()
        if self._device() != self._grouping.device:
            self._settle_on(self._device())
            self._units = self._units.to(self._grouping.device)
        evaluate_groups(self._units, self._settings, self._grouping, taps, self._draws)
        self._step += 1
        due = self._schedule.advance(self._step)
        if due is not None:
            self._replace(due)

    @torch.no_grad()
    def reset_units(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Resets so many units of each group now, those of least utility, or as many as are mature; returns how many.

        What the rates still owe stays owed.
        """
        counts = self._schedule.replace(wanted, self._step)
        self._replace(counts)
        return counts

    def _replace(self, due: Sequence[int]) -> None:
        self._replacements = [before + count for before, count in zip(self._replacements, due, strict=True)]
        selected = [
            select_units(self._units, self._settings, self._grouping.layout, group, [count])
            for group, count in enumerate(due)
        ]
        replace_in_groups(selected, self._units, self._settings, self._grouping, self._slots, self._draws)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the module's or the optimizer's own; save it together with theirs."""
        return {
            "step": self._step,
            "replacements": list(self._replacements),
            "accumulated_replacements": list(self._schedule.accumulated),
            "replacements_in_window": self._schedule.replaced(self._step),
            "utility": self._units.utility.clone(),
            "age": self._units.age.clone(),
            "mean_activation": self._units.mean_activation.clone(),
            "generator": self._generator.get_state(),
            "adam_steps": {
                name: self._slots.adam_steps[parameter].clone()
                for name, parameter in self._parameters.items()
                if parameter in self._slots.adam_steps
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned. Raises `SnapshotError` if it does not fit."""
        hidden = len(self._names)
        device = self._grouping.device
        try:
            accumulated = [float(share) for share in state["accumulated_replacements"]]
            replacements = [int(count) for count in state["replacements"]]
            # Not in states that were saved before replacements could be limited.
            in_window = [int(count) for count in state.get("replacements_in_window", [0] * hidden)]
            step = int(state["step"])
            shape, seen = self._units.utility.shape, self._units.mean_activation.shape
            units = UnitState(
                utility=take_tensor(state, "utility", shape, torch.float32).to(device, copy=True),
                age=take_tensor(state, "age", shape, torch.int64).to(device, copy=True),
                mean_activation=take_tensor(state, "mean_activation", seen, torch.float32).to(device, copy=True),
            )
            generator_state = take_tensor(state, "generator", self._generator.get_state().shape, torch.uint8)
            saved = state["adam_steps"]
            strangers = sorted(set(saved) - set(self._parameters))
            adam_steps: dict[Tensor, Tensor] = {
                self._parameters[name]: take_tensor(saved, name, self._parameters[name].shape, torch.float32).to(
                    self._parameters[name].device, copy=True
                )
                for name in set(saved) - set(strangers)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(f"The state cannot be loaded: {type(error).__name__}: {error}") from error
        if strangers:
            raise SnapshotError(f"The state is of another network: this one resets no parameter {strangers[0]!r}")
        if {len(accumulated), len(replacements), len(in_window)} != {hidden}:
            raise SnapshotError(f"The state is of another network: this one has {hidden} groups of units")
        self._step, self._replacements = step, replacements
        self._slots.resume(adam_steps)
        self._generator.set_state(generator_state.cpu().clone())
        self._units = units
        self._schedule = self._schedule_from_ages(accumulated, in_window)

    def _hidden(self, layer: int | str) -> int | str:
        """A group's own name, where a layer's name in the module is given."""
        for name, row in zip(self._names, self._found.rows, strict=True):
            if layer in row.layers and isinstance(layer, str) and not layer.isdecimal():
                return name
        return layer

    def _device(self) -> torch.device:
        devices = {parameter.device for parameter in self._parameters.values()}
        if len(devices) > 1:
            raise _unsupported("module", f"Its layers are on several devices: {', '.join(map(str, devices))}")
        return devices.pop()

    def _settle_on(self, device: torch.device) -> None:
        """Brings what lives beside the weights to their device; the module may have been moved."""
        self._grouping = Grouping(self._found.groups, device)
        self._settings = ResetSettings.of([self._resets], device)
        self._draws = self._given_draws or GroupDraws(self._generator, self._grouping)

    def _schedule_from_ages(self, accumulated: Sequence[float], in_window: Sequence[int]) -> ReplacementSchedule:
        ages = self._units.age[0].cpu().numpy()
        return ReplacementSchedule.from_ages(
            self._rates,
            self._resets.maturity_threshold,
            accumulated,
            self._step,
            [ages[columns] for columns in self._grouping.layout.slices],
            max_replacements=self._resets.max_replacements,
            window=self._resets.replacement_window,
            replaced=in_window,
        )

    def _gatherer(self, place: int, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        """A hook for the layer that reads units, whose input is their activations, or that makes them.

        Not a hook on the activation module, since one module may serve several layers. Until the backward pass
        comes, the activations hang on the graph that holds them anyway, and go with it.
        """

        def gather(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            made = _tensors(output)
            learned_from = [tensor for tensor in made if tensor.requires_grad]
            if not (layer.training and learned_from):
                return
            seen = made if tap.side == "output" else _tensors((*inputs, *named.values()))
            waiting = [seen[0].detach()]

            def differentiated(_gradient: Tensor) -> None:
                if waiting:  # a graph may be walked more than once, and reach a layer by several of its outputs
                    self._gather(place, waiting.pop())

            for tensor in learned_from:
                tensor.register_hook(differentiated)  # type: ignore[no-untyped-call]

        return gather

    def _gather(self, place: int, activations: Tensor) -> None:
        if self._learned:
            self._forget_gathered()
        self._gathered[place].append(activations)

    def _finish_gathering(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._learned = True

    def _forget_gathered(self) -> None:
        self._learned = False
        for passes in self._gathered:
            passes.clear()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of what a layer takes or gives, in its order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [found for entry in value for found in _tensors(entry)] if isinstance(value, tuple | list) else []


def _table(named: Sequence[tuple[str, TableRow, str]]) -> str:
    lines = [("group", "computed by", "units", "read by", "verdict")]
    lines += [
        (name, ", ".join(row.layers), str(row.units or "-"), ", ".join(row.readers) or "-", verdict)
        for name, row, verdict in named
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]) for line in lines
    )


def _nothing_to_reset(found: Discovery) -> SpecError:
    reasons = [f"{', '.join(row.layers)}: {row.verdict}" for row in found.left_alone[:8]]
    return _unsupported("module", f"No unit can be reset. {'; '.join(reasons) or 'It has no layers that make units'}")


def _unsupported(field: str, description: str) -> SpecError:
    return SpecError([FieldViolation(field, description)])
