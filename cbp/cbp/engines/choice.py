"""What executes learners' steps."""

from collections.abc import Sequence
from typing import get_args

import torch

from cbp.engines.eager_engine import EagerEngine, LearnerEngine, Work
from cbp.engines.learner_state import LearnerState
from cbp.engines.names import EngineChoice, EngineName, choose_engine, needs_module
from cbp.engines.perceptron_state import PerceptronState
from cbp.engines.stacked_engine import StackedEngine
from cbp.errors import CbpError, shown
from cbp.spec.learner_spec import LearnerSpec
from cbp.units.replacement import DrawSource


def check_engine(choice: EngineChoice, device: torch.device) -> None:
    """Raises `CbpError` if there is no such engine for the device."""
    choices = (*get_args(EngineName), "auto")
    if choice not in choices:
        raise CbpError(f"engine: Expected one of {', '.join(choices)}; got {shown(choice)}")
    if choice == "compiled" and device.type != "cpu":
        raise CbpError(f"engine: 'compiled' runs on the CPU only; use 'auto' on {device}")


def resolve_engine(choice: EngineChoice, spec: LearnerSpec, device: torch.device) -> EngineName:
    """The engine that is meant. Raises `CbpError` if there is no such engine for the device, or if it does not run the
    network."""
    check_engine(choice, device)
    if choice == "auto":
        return choose_engine(spec, device)
    if needs_module(spec) and choice != "module":
        text = (
            f"{choice!r} runs plain multilayer perceptrons in float32 only, without normalization, crelu, inputs or "
            "methods"
        )
        raise CbpError(f"engine: {text}; use 'module' or 'auto'")
    if choice == "module" and not needs_module(spec):
        raise CbpError(
            "engine: 'module' is for what the others do not run; use 'auto' for a plain multilayer perceptron"
        )
    return choice


def initial_state(spec: LearnerSpec, device: torch.device) -> LearnerState:
    """A newborn's, of the kind that the engines for its network work on."""
    if needs_module(spec):
        # Imported when it is needed, as below: what finds the units of modules takes a third of a second.
        from cbp.engines.module_engine import ModuleState

        return ModuleState(spec, device)
    return PerceptronState.newborn(spec, device)


def make_engine(
    name: EngineName,
    spec: LearnerSpec,
    state: LearnerState,
    device: torch.device,
    draws: DrawSource | None = None,
    *,
    published_order: bool = False,
) -> LearnerEngine:
    """The engine of one learner; for `draws` and `published_order` see `TorchEngine`."""
    if name == "module":
        from cbp.engines.module_engine import ModuleEngine, ModuleState

        assert isinstance(state, ModuleState)
        return ModuleEngine(spec, state)
    assert isinstance(state, PerceptronState)
    match name:
        case "torch":
            return EagerEngine(spec, state, device, draws, published_order=published_order)
        case "stacked":
            return StackedEngine(spec, state, device, draws, published_order=published_order)
        case "compiled":
            # Imported when it is needed: numba takes half a second.
            from cbp.engines.compiled.engine import CompiledEngine

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
    from cbp.engines.compiled.on_disk import compile_kernels

    compile_kernels()


def compiled_before() -> bool:
    """Whether `compile_ahead` finds the code on disk, for this processor, and so takes about a second."""
    from cbp.engines.compiled.on_disk import kernels_on_disk

    return kernels_on_disk()
