"""What all methods that reset units of a module share: which units it has, what they computed, how one is replaced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbp.errors import FieldViolation, SpecError
from cbp.saved.methods import SavedUnits
from cbp.saved.parts import read_part, refuse
from cbp.spec.learner_spec import Initializer, hidden_layer_name
from cbp.units.activation_taps import ActivationTaps
from cbp.units.discovery import Discovery, TableRow, discover_units, group_units
from cbp.units.draws import UniformGenerator, take_generator_state
from cbp.units.named_units import HiddenUnits, named_units
from cbp.units.optimizer_slots import OptimizerSlots
from cbp.units.replacement import DrawSource
from cbp.units.replicas import ProcessReplicas, draw_alike
from cbp.units.unit_groups import GroupDraws, Grouping, Step, renew_units


@dataclass(frozen=True, kw_only=True)
class ResetHistory:
    """What `ModuleUnits` saves, checked and ready to go on from."""

    replacements: list[int]
    generator: Tensor
    adam_steps: dict[Tensor, Tensor]


class ModuleUnits:
    """The groups of units of a module, called "hidden_0", "hidden_1" and so on in the order of the code."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        initializer: Initializer,
        units: Sequence[HiddenUnits] | None,
        seed: int,
        draws: DrawSource | None = None,
    ) -> None:
        """For the settings see `ContinualBackprop`.

        Raises `SpecError` if the module cannot be traced or has no unit that can be reset, or if the optimizer or the
        initializer is not supported.
        """
        if initializer not in get_args(Initializer):
            choices = ", ".join(get_args(Initializer))
            raise _unsupported("initializer", f"Expected one of {choices}; got {initializer!r}")
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if units is None:
            self.found = discover_units(module, optimized.__contains__, initializer)
        else:
            self.found = group_units(module, named_units(module, units), optimized.__contains__, initializer)
        if not self.found.groups:
            raise _nothing_to_reset(self.found)
        self.names = tuple(hidden_layer_name(index) for index in range(len(self.found.groups)))
        self._parameters: dict[str, nn.Parameter] = {}
        for group in self.found.groups:
            self._parameters |= group.parameters()
        self._of_groups = [tuple(group.parameters().values()) for group in self.found.groups]
        device = self._device()
        self.slots = OptimizerSlots(optimizer, self._parameters)
        self.replaced = [0] * len(self.names)
        """Per group, units replaced so far."""
        self._generator = UniformGenerator(seed)
        self._given_draws = draws
        self._settle_on(device)
        self._may_rest = units is not None
        self._draws_alike = False
        self.activations = ActivationTaps(self.found.taps, optimizer)

    @property
    def replacements(self) -> dict[str, int]:
        return dict(zip(self.names, self.replaced, strict=True))

    def hidden(self, layer: int | str) -> int | str:
        """A group's own name, where a layer's name in the module is given."""
        for name, row in zip(self.names, self.found.rows, strict=True):
            if layer in row.layers and isinstance(layer, str) and not layer.isdecimal():
                return name
        return layer

    def explain(self, verdict: Callable[[int, TableRow], str]) -> str:
        """A table of all groups and of what is left alone; `verdict` says what becomes of a group by its number."""
        named = [
            (name, row, verdict(index, row))
            for index, (name, row) in enumerate(zip(self.names, self.found.rows, strict=True))
        ]
        named += [("-", row, row.verdict) for row in self.found.left_alone]
        return _table(named)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Groups in which something does not train now, by number."""
        if all(parameter.requires_grad for parameter in self._parameters.values()):
            return ()
        return tuple(
            index
            for index, parameters in enumerate(self._of_groups)
            if not all(parameter.requires_grad for parameter in parameters)
        )

    def seen(self, taps: Sequence[Sequence[Tensor]]) -> Step:
        """The step of whose activations these are, in all processes that hold replicas of the module."""
        group = self.activations.parallel
        if group is None:
            return Step(self.grouping, taps)
        if not self._draws_alike:
            draw_alike(self._generator, group, self.grouping.device)
            self._draws_alike = True
        return Step(self.grouping, taps, ProcessReplicas(group, may_rest=self._may_rest))

    def use_optimizer(self, optimizer: Optimizer) -> None:
        """Goes on with another optimizer of the same parameters. Raises `SpecError` if it is none of the same; then
        nothing has changed."""
        moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, parameter in self._parameters.items() if parameter not in moved]
        if missing:
            raise _unsupported("optimizer", f"It does not move {', '.join(missing[:5])}, whose units are reset")
        self.slots.use(optimizer)
        self.activations.use(optimizer)

    def settle(self) -> bool:
        """Brings what lives beside the weights to their device; says whether the module has been moved since."""
        device = self._device()
        moved = device != self.grouping.device
        if moved:
            self._settle_on(device)
        return moved

    def renew(self, lost: Tensor) -> Tensor:
        """Puts newborns in the place of units, given by their numbers [R] among those of all groups, ascending, on the
        host; hands no means on. Those of frozen groups stay; returns the others."""
        layout = self.grouping.layout
        for index in self.frozen:
            columns = layout.slices[index]
            lost = lost[(lost < columns.start) | (lost >= columns.stop)]
        chosen = []
        for index, columns in enumerate(layout.slices):
            of_group = lost[(lost >= columns.start) & (lost < columns.stop)] - columns.start
            if len(of_group):
                chosen.append((index, of_group.to(self.grouping.device)))
                self.replaced[index] += len(of_group)
        renew_units(chosen, None, self.grouping, self.slots, self.draws)
        return lost

    def remove(self) -> None:
        """Takes the hooks off the module and the optimizer."""
        self.slots.remove()
        self.activations.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "replacements": list(self.replaced),
            "generator": self._generator.get_state(),
            "adam_steps": self.slots.state_dict(),
        }

    def read_state(self, state: Mapping[str, Any]) -> ResetHistory:
        """Raises `SnapshotError` if it does not fit; changes nothing."""
        saved = read_part(SavedUnits, state)
        refuse(saved.misfits(self.grouping.layout.widths))
        return ResetHistory(
            replacements=list(saved.replacements),
            generator=take_generator_state(state, "generator"),
            adam_steps=self.slots.read_state(state, "adam_steps"),
        )

    def resume(self, history: ResetHistory) -> None:
        self.replaced = history.replacements
        self._generator.set_state(history.generator)
        self.slots.resume(history.adam_steps)

    def _device(self) -> torch.device:
        devices = {parameter.device for parameter in self._parameters.values()}
        if len(devices) > 1:
            raise _unsupported("module", f"Its layers are on several devices: {', '.join(map(str, devices))}")
        return devices.pop()

    def _settle_on(self, device: torch.device) -> None:
        self.grouping = Grouping(self.found.groups, device)
        self.draws: DrawSource = self._given_draws or GroupDraws(self._generator, self.grouping)


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
