"""What executes a learner's steps."""

from typing import get_args

import torch

from cbp.engines.eager_engine import EagerEngine, EngineName, LearnerEngine
from cbp.engines.torch_engine import StackState
from cbp.errors import CbpError, shown
from cbp.replacement import DrawSource
from cbp.spec import LearnerSpec


def checked_engine(name: EngineName, device: torch.device) -> EngineName:
    """The name, if there is such an engine for the device. Raises `CbpError`."""
    if name not in get_args(EngineName):
        raise CbpError(f"engine: Expected one of {', '.join(get_args(EngineName))}; got {shown(name)}")
    if name == "compiled" and device.type != "cpu":
        raise CbpError(f"engine: 'compiled' runs on the CPU only; use 'torch' on {device}")
    return name


def choose_engine(spec: LearnerSpec, device: torch.device | str) -> EngineName:
    """The fastest engine on the device for learners of this specification."""
    del spec  # the compiled engine takes all of them
    return "compiled" if torch.device(device).type == "cpu" else "torch"


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
    if name == "torch":
        return EagerEngine(spec, state, device, draws, published_order=published_order)
    # Imported when it is needed: numba takes half a second.
    from cbp.engines.compiled_engine import CompiledEngine

    return CompiledEngine(spec, state, draws, published_order=published_order)


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
