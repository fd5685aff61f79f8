"""Which engines there are, and which of them runs what."""

from typing import TYPE_CHECKING, Literal

from cbp.spec.learner_spec import LearnerSpec

if TYPE_CHECKING:
    import torch

PerceptronEngineName = Literal["torch", "compiled", "stacked"]
"""What executes the steps of plain multilayer perceptrons."""
EngineName = Literal[PerceptronEngineName, "module"]
"""What executes learners' steps."""
EngineChoice = EngineName | Literal["auto"]
"""An engine, or whichever suits the specification and the device."""


def choose_engine(spec: LearnerSpec, device: "torch.device | str") -> EngineName:
    """The fastest engine for the learner: "compiled" on the CPU, "stacked" on a GPU, else "torch"; "module" for what is
    no plain multilayer perceptron, for methods beside resets, and for bfloat16."""
    if needs_module(spec):
        return "module"
    match str(device).partition(":")[0]:
        case "cpu":
            return "compiled"
        case "cuda":
            return "stacked"
        case _:
            return "torch"


def needs_module(spec: LearnerSpec) -> bool:
    """Whether only the engine "module" runs the learner; it runs no other."""
    return not spec.network.is_plain or bool(spec.methods) or spec.precision != "float32"
