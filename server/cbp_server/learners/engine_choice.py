"""Which engine takes a learner's steps: chosen by spec and device, the same for as long as the journal says so."""

from cbp import EngineName, LearnerSpec, choose_engine
from cbp_server.settings import EngineSetting


class EngineChoice:
    """The engine that learners should have now.

    Args:
        setting: "auto", or the engine of all plain multilayer perceptrons.
    """

    def __init__(self, setting: EngineSetting) -> None:
        self._setting = setting
        self.device = "cpu"
        self.compiled = False
        """Whether the engine process has compiled code at hand."""

    def of(self, spec: LearnerSpec) -> EngineName:
        wanted = choose_engine(spec, self.device)
        if self._setting != "auto" and wanted != "module":  # which alone runs what it runs
            wanted = self._setting
        return "torch" if wanted == "compiled" and not self.compiled else wanted
