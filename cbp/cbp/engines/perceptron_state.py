"""The state of one learner that is a plain multilayer perceptron: a stack of one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cbp import optimizers
from cbp.engines.torch_engine import StackState, initial_stack, schedules
from cbp.errors import SnapshotError
from cbp.networks import FlatLayers
from cbp.optimizers import STEPS_COUNTED
from cbp.saved.learner import SavedLearner, SavedPerceptron
from cbp.serialization import FINITE, NOT_NEGATIVE, check_numbers, counts, take_tensor
from cbp.spec.learner_spec import LearnerSpec
from cbp.units.draws import take_generator_state


class PerceptronState(StackState):
    """A stack's state, as a learner sees it."""

    spec: LearnerSpec

    @classmethod
    def newborn(cls, spec: LearnerSpec, device: torch.device) -> "PerceptronState":
        state = cls(**vars(initial_stack([spec], device)))
        state.spec = spec
        return state

    @property
    def _device(self) -> torch.device:
        return self.parameters.flat.device

    def adopt(self, spec: LearnerSpec) -> None:
        schedule = self.schedules[0]
        replaced = schedule.replaced(self.steps[0])
        self.spec = spec
        self.schedules = schedules([spec], self, [schedule.accumulated], [replaced])
        self.optimizer = optimizers.adjusted_state(self.optimizer, [spec.optimizer], spec.mlp, self._device)

    def changing_tensors(self) -> dict[str, Tensor]:
        tensors = {
            "units.utility": self.units.utility,
            "units.age": self.units.age,
            "units.mean_activation": self.units.mean_activation,
            "generator": self.generators[0].get_state(),
        }
        for part, layers in self._changing_parts().items():
            tensors |= self._named(part, layers)
        return tensors

    def first_tensors(self) -> dict[str, Tensor]:
        return self._named("initial_parameters", self.initial_parameters)

    def _changing_parts(self) -> dict[str, FlatLayers]:
        slots = {f"optimizer.{name}": slot for name, slot in self.optimizer.slots().items()}
        return {"parameters": self.parameters} | slots

    def _named(self, part: str, layers: FlatLayers) -> dict[str, Tensor]:
        named = {}
        for layer, name in enumerate(self.spec.layer_names):
            named[f"{part}.{name}.weight"] = layers.weights[layer][0]
            named[f"{part}.{name}.bias"] = layers.biases[layer][0]
        return named

    def to_plain(self) -> dict[str, Any]:
        return {
            "step": self.steps[0],
            "replacements": list(self.replacements[0]),
            "accumulated_replacements": list(self.schedules[0].accumulated),
            "replacements_in_window": self.schedules[0].replaced(self.steps[0]),
        }

    @property
    def saved_as(self) -> type[SavedLearner]:
        return SavedPerceptron

    def load(self, tensors: Mapping[str, Tensor], saved: SavedLearner) -> None:
        assert isinstance(saved, SavedPerceptron)
        targets = self.changing_tensors() | self.first_tensors()
        del targets["generator"]
        for name, target in targets.items():
            target.copy_(take_tensor(tensors, name, target.shape, target.dtype))
        self._check_numbers(targets, saved.step)
        self.generators[0].set_state(take_generator_state(tensors, "generator"))
        self.steps = [saved.step]
        self.replacements = [list(saved.replacements)]
        replaced = saved.replacements_in_window or [0] * len(saved.replacements)
        self.schedules = schedules([self.spec], self, [saved.accumulated_replacements], [replaced])

    def _check_numbers(self, named: Mapping[str, Tensor], step: int) -> None:
        """Raises `SnapshotError` if there are numbers that a learner of so many steps cannot have, in tensors of these
        names. A utility or mean may overflow where all that the network computes with is finite."""
        check_numbers("units.age", self.units.age, counts(step))
        parts = self._changing_parts() | {"initial_parameters": self.initial_parameters}
        for part, layers in parts.items():
            numbers = _NUMBERS.get(part) or (counts(min(step, STEPS_COUNTED)) if part == "optimizer.steps" else FINITE)
            try:
                check_numbers(part, layers.flat, numbers)  # all at once, the quickest way
            except SnapshotError:
                for name, tensor in named.items():
                    if name.startswith(f"{part}."):
                        check_numbers(name, tensor, numbers)
                raise


_NUMBERS = {"optimizer.second_moment": NOT_NEGATIVE, "optimizer.square_average": NOT_NEGATIVE}
