"""The state of one learner that is a plain multilayer perceptron: a stack of one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cbp import optimizers
from cbp.engines.torch_engine import StackState, initial_stack, schedules
from cbp.errors import SnapshotError
from cbp.networks import FlatLayers
from cbp.serialization import take_tensor
from cbp.spec.learner_spec import LearnerSpec


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

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        hidden = len(self.spec.mlp.hidden)
        self.steps = [int(plain["step"])]
        self.replacements = [[int(count) for count in plain["replacements"]]]
        # A snapshot of before there was a limit on replacements does not say how many have gone in the present window.
        replaced = [int(count) for count in plain.get("replacements_in_window", [0] * hidden)]
        if {len(self.replacements[0]), len(plain["accumulated_replacements"]), len(replaced)} != {hidden}:
            raise SnapshotError(f"The snapshot should count replacements in {hidden} hidden layers")
        generator = self.generators[0]
        generator.set_state(take_tensor(tensors, "generator", generator.get_state().shape, torch.uint8).clone())
        targets = self.changing_tensors() | self.first_tensors()
        del targets["generator"]
        for name, target in targets.items():
            target.copy_(take_tensor(tensors, name, target.shape, target.dtype))
        accumulated = [[float(share) for share in plain["accumulated_replacements"]]]
        self.schedules = schedules([self.spec], self, accumulated, [replaced])
