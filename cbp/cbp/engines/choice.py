"""What executes learners' steps."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from cbp.engines.eager_engine import EagerEngine, EngineName, LearnerEngine, Work
from cbp.engines.stacked_engine import StackedEngine
from cbp.engines.torch_engine import StackState
from cbp.errors import CbpError, FieldViolation, SpecError, shown
from cbp.replacement import DrawSource
from cbp.spec import LearnerSpec

EngineChoice = EngineName | Literal["auto"]
"""An engine, or whichever suits the specification and the device."""


def choose_engine(spec: LearnerSpec, device: torch.device) -> EngineName:
    """The fastest engine for the learner: "compiled" on the CPU, "stacked" on a GPU, else "torch".

    Raises `SpecError` if no engine runs it.
    """
    _refuse_methods(spec)
    match device.type:
        case "cpu":
            return "compiled"
        case "cuda":
            return "stacked"
        case _:
            return "torch"


def check_engine(choice: EngineChoice, device: torch.device) -> None:
    """Raises `CbpError` if there is no such engine for the device."""
    choices = (*get_args(EngineName), "auto")
    if choice not in choices:
        raise CbpError(f"engine: Expected one of {', '.join(choices)}; got {shown(choice)}")
    if choice == "compiled" and device.type != "cpu":
        raise CbpError(f"engine: 'compiled' runs on the CPU only; use 'auto' on {device}")


def resolve_engine(choice: EngineChoice, spec: LearnerSpec, device: torch.device) -> EngineName:
    """The engine that is meant. Raises `CbpError` if there is no such engine for the device or the learner."""
    check_engine(choice, device)
    best = choose_engine(spec, device)
    return best if choice == "auto" else choice


def _refuse_methods(spec: LearnerSpec) -> None:
    if spec.methods:
        text = (
            "No engine of a learner runs methods beside its resets; leave it empty, or attach them to a module of your "
            "own with cbp.make_methods"
        )
        raise SpecError([FieldViolation("methods", text)])


def make_engine(
    name: EngineName,
    spec: LearnerSpec,
    state: StackState,
    device: torch.device,
    draws: DrawSource | None = None,
    *,
    published_order: bool = False,
) -> LearnerEngine:
    """The engine of one learner; for `draws` and `published_order` see `TorchEngine`."""
    match name:
        case "torch":
            return EagerEngine(spec, state, device, draws, published_order=published_order)
        case "stacked":
            return StackedEngine(spec, state, device, draws, published_order=published_order)
        case "compiled":
            # Imported when it is needed: numba takes half a second.
            from cbp.engines.compiled_engine import CompiledEngine

            return CompiledEngine(spec, state, draws, published_order=published_order)


def run_together(turns: Sequence[tuple[Work, int]]) -> None:
    """Takes the next steps, so many, of works of distinct learners: in as few engine calls as possible."""
    by_kind: dict[type[Work], list[tuple[Work, int]]] = {}
    for turn in turns:
        by_kind.setdefault(type(turn[0]), []).append(turn)
    for kind, its_turns in by_kind.items():
        kind.run_together(its_turns)


def compile_ahead() -> None:
    """Readies the compiled engine for learners of any specification; from then on none of them waits for a compiler.

    Takes about half a minute the first time. The code is kept on disk, beside the package or where `NUMBA_CACHE_DIR`
    says; with it there, the next process takes about a second. Other threads run meanwhile, but not on the same core.
    """
    from cbp.engines.compiled_engine import compile_kernels

    compile_kernels()


def compiled_before() -> bool:
    """Whether `compile_ahead` finds the code on disk, for this processor, and so takes about a second."""
    from cbp.engines.compiled_engine import kernels_on_disk

    return kernels_on_disk()
