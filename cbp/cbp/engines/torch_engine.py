"""Steps of Continual Backprop in eager PyTorch, for a stack of learners of one architecture, on any device.

The learners share their network, loss, kind of optimizer and utility; everything else is each one's own. A step makes
no autograd graph and reads nothing back from the device.

Shapes: L learners, B examples in a step, I inputs, C outputs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cbp import optimizers
from cbp.errors import Diverged
from cbp.losses import output_gradient
from cbp.networks import FlatLayers, Mlp, flat_layers, initial_bounds, laid_out, layer_shapes
from cbp.optimizers import OptimizerState
from cbp.spec.learner_spec import LearnerSpec, MlpSpec
from cbp.units.draws import UniformGenerator, draw_uniform
from cbp.units.replacement import (
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


@dataclass(kw_only=True)
class StackState:
    """Everything that a step reads and changes."""

    parameters: FlatLayers
    initial_parameters: FlatLayers
    """The first draw, for the distance from it."""
    optimizer: OptimizerState
    units: UnitState
    schedules: list[ReplacementSchedule]
    """Per learner."""
    generators: list[UniformGenerator]
    """Per learner."""
    steps: list[int]
    """Per learner, steps taken."""
    replacements: list[list[int]]
    """Per learner and hidden layer, units replaced so far."""

    def checked_numbers(self) -> list[tuple[Diverged, Tensor]]:
        """Where a step whose predictions are finite may yet have left something that is not."""
        unseen = self.optimizer.overflowing_unseen()
        return [("parameters", self.parameters.flat), *(("optimizer state", slot.flat) for slot in unseen)]


def unit_layout(network: MlpSpec, device: torch.device) -> UnitLayout:
    shapes = layer_shapes(network)
    fan_out = [out for out, _ in shapes[1:]]
    return UnitLayout([into for _, into in shapes[:-1]], network.hidden, fan_out, device)


def initial_stack(specs: Sequence[LearnerSpec], device: torch.device) -> StackState:
    """Newborn learners, each drawn from its own seed: incoming weights from the initialiser's range, biases 0."""
    network = specs[0].mlp
    generators = [UniformGenerator(spec.seed) for spec in specs]
    parameters = flat_layers(network, len(specs), device)
    for learner, generator in enumerate(generators):
        for weight, bound in zip(parameters.weights, initial_bounds(network), strict=True):
            weight[learner] = draw_uniform(bound, weight.shape[1:], generator).to(device)
        generator.rest()
    initial_parameters = flat_layers(network, len(specs), device)
    initial_parameters.flat.copy_(parameters.flat)
    units = UnitState.fresh(len(specs), sum(network.hidden), device)
    hidden = len(network.hidden)
    state = StackState(
        parameters=parameters,
        initial_parameters=initial_parameters,
        optimizer=optimizers.initial_state([spec.optimizer for spec in specs], network, device),
        units=units,
        schedules=[],
        generators=generators,
        steps=[0] * len(specs),
        replacements=[[0] * hidden for _ in specs],
    )
    state.schedules = schedules(specs, state, [[0.0] * hidden for _ in specs], [[0] * hidden for _ in specs])
    return state


def schedules(
    specs: Sequence[LearnerSpec],
    state: StackState,
    accumulated: Sequence[Sequence[float]],
    replaced: Sequence[Sequence[int]],
) -> list[ReplacementSchedule]:
    """The schedules that follow from the units' ages; reads them from the device, so never within a step.

    Per learner and hidden layer, `accumulated` is owed, and `replaced` units have gone in the present window.
    """
    ages = state.units.age.cpu().numpy()
    slices = unit_layout(specs[0].mlp, torch.device("cpu")).slices
    return [
        ReplacementSchedule.from_ages(
            spec.replacement_rates,
            spec.resets.maturity_threshold,
            accumulated[learner],
            state.steps[learner],
            [ages[learner, columns] for columns in slices],
            max_replacements=spec.resets.max_replacements,
            window=spec.resets.replacement_window,
            replaced=replaced[learner],
        )
        for learner, spec in enumerate(specs)
    ]


class TorchEngine:
    """Takes steps on a stack's state."""

    def __init__(
        self,
        specs: Sequence[LearnerSpec],
        state: StackState,
        device: torch.device,
        draws: DrawSource | None = None,
        *,
        published_order: bool = False,
    ) -> None:
        """To follow a recorded trajectory, `draws` takes the place of the learners' own generators, and
        `published_order` is handed to `replace_units`."""
        network = specs[0].mlp
        self._network_spec = network
        state.parameters = laid_out(state.parameters, [False] * len(state.parameters.weights))
        self.state = state
        self.device = device
        self._loss = specs[0].loss
        self._network = Mlp(network.plain_activation)
        self._layout = unit_layout(network, device)
        self._draws = draws or GeneratorDraws(state.generators, self._layout, initial_bounds(network))
        self._published_order = published_order
        self.configure(specs)

    @functools.cached_property
    def _gradient(self) -> FlatLayers:
        return flat_layers(self._network_spec, len(self.state.parameters.flat), self.device)

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        """Takes over the learners' settings; the state is left as it is."""
        self._optimizer_settings = optimizers.settings([spec.optimizer for spec in specs], self.device)
        self._reset_settings = ResetSettings.of([spec.resets for spec in specs], self.device)
        self._settings = (self._optimizer_settings, self._reset_settings)

    @property
    def settings(self) -> tuple[optimizers.Settings, ResetSettings]:
        """What every step reads of the specifications; other objects once they were configured anew."""
        return self._settings

    def setting_tensors(self) -> list[Tensor]:
        """Those of the settings, in one order, that each learner has of its own: [L, 1]."""
        return [value for record in self._settings for value in vars(record).values() if isinstance(value, Tensor)]

    @torch.inference_mode()
    def predict(self, inputs: Tensor) -> Tensor:
        """[L, B, C] outputs for inputs [L, B, I]; changes nothing."""
        return self._network.forward(self.state.parameters, inputs).outputs

    @torch.inference_mode()
    def step(self, inputs: Tensor, targets: Tensor, scale: Tensor, outputs: Tensor) -> None:
        """One step of every learner; what it predicted before the update is written to `outputs` [L, B, C].

        inputs [L, B, I]; targets [L, B, C] as encoded by the loss; scale [L, B, 1], each example's share in the
        gradient.
        """
        self.learn(inputs, targets, scale, outputs)
        self._replace_due_units()

    @torch.inference_mode()
    def learn(self, inputs: Tensor, targets: Tensor, scale: Tensor, outputs: Tensor) -> None:
        """A step but for the units to be replaced: always the same operations on the same memory."""
        state = self.state
        passed = self._network.forward(state.parameters, inputs, outputs)
        residual = output_gradient(self._loss, outputs, targets, scale)
        self._network.backward(state.parameters, inputs, passed, residual, self._gradient)
        optimizers.update(state.parameters.flat, self._gradient.flat, state.optimizer, self._optimizer_settings)
        evaluate_units(
            state.units, self._reset_settings, self._layout, state.parameters, passed.activations, self._draws
        )

    @torch.inference_mode()
    def reset_units(self, wanted: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Replaces units between two steps: [learner][hidden layer] so many, or as many as are mature.

        Returns how many it replaced. Newborns do read newborns here: where all units of two layers go at once, the
        second would otherwise have no inputs and nothing behind it, and never learn.
        """
        state = self.state
        counts = [
            schedule.replace(wanted_of_one, step)
            for schedule, wanted_of_one, step in zip(state.schedules, wanted, state.steps, strict=True)
        ]
        self._replace(counts, published_order=True)
        return counts

    def _replace_due_units(self) -> None:
        state = self.state
        due: list[tuple[int, ...] | None] = []
        for learner, schedule in enumerate(state.schedules):
            state.steps[learner] += 1
            due.append(schedule.advance(state.steps[learner]))
        if not any(due):
            return
        hidden = len(self._layout.widths)
        counts = [counts_of_one or (0,) * hidden for counts_of_one in due]
        self._replace(counts, published_order=self._published_order)

    def _replace(self, counts: Sequence[tuple[int, ...]], *, published_order: bool) -> None:
        """Replaces counts[learner][hidden layer] units; so many must be mature."""
        state = self.state
        hidden = len(self._layout.widths)
        for learner, counts_of_one in enumerate(counts):
            for layer, count in enumerate(counts_of_one):
                state.replacements[learner][layer] += count
        selected = [
            select_units(state.units, self._reset_settings, self._layout, layer, [of_one[layer] for of_one in counts])
            for layer in range(hidden)
        ]
        replace_units(
            selected,
            state.units,
            self._reset_settings,
            self._layout,
            state.parameters,
            list(state.optimizer.slots().values()),
            self._draws,
            published_order=published_order,
        )
