"""Which engine takes a learner's steps: chosen by spec and device, the same for as long as the journal says so."""

import torch

from cbp import EngineName, LearnerSpec, choose_engine
from cbp_server.settings import EngineSetting


class EngineChoice:
    """The engine that learners should have now.

    Args:
        setting: "auto", or the engine of all of them.
    """

    def __init__(self, setting: EngineSetting) -> None:
        self._setting = setting
        self.device = "cpu"
        self.compiled = False
        """Whether the engine process has compiled code at hand."""

    def of(self, spec: LearnerSpec) -> EngineName:
        """Raises `SpecError` if no engine runs it."""
        best = choose_engine(spec, torch.device(self.device))
        wanted = best if self._setting == "auto" else self._setting
        return "torch" if wanted == "compiled" and not self.compiled else wanted
