"""Compiles the kernels ahead of a learner's first step, and knows whether that was done before."""

from typing import Any

import numpy as np
import torch

from cbp.engines.compiled import measuring
from cbp.engines.compiled.averages import fill_corrections
from cbp.engines.compiled.engine import CompiledEngine, CompiledWork, run_each
from cbp.engines.compiled.large_layers import is_turned
from cbp.engines.compiled.replacing import replace
from cbp.engines.compiled.steps import point_to, run
from cbp.engines.compiled.steps import run_each as run_each_table
from cbp.engines.torch_engine import initial_stack
from cbp.examples.pending import Examples, Probe
from cbp.spec.learner_spec import LearnerSpec

ENTRY_POINTS = (run, run_each_table, point_to, replace, fill_corrections, is_turned, *measuring.ENTRY_POINTS)
"""All compiled code that Python calls."""


def compile_kernels() -> None:
    """Compiles what every specification needs, or loads it from disk."""
    spec = LearnerSpec.parse(
        {
            "network": {"kind": "mlp", "in_features": 1, "hidden": [1], "out_features": 1},
            "loss": "mse",
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "resets": {"replacement_rate": 1.0, "maturity_threshold": 0},
        }
    )
    engine = CompiledEngine(spec, initial_stack([spec], torch.device("cpu")))
    rows = np.ones((2, 1), np.float32)
    examples = Examples(rows, rows, None, (("", 2),))
    work = CompiledWork(engine, examples, 1)
    probe = Probe(1, rows, rows)
    engine.begin(examples, 1, probe).run(1)
    engine.measure(probe, None)
    run_each([(work, 1)])


def kernels_on_disk() -> bool:
    """Whether numba finds on disk what `compile_kernels` compiles, made from this source for this processor."""
    return all(map(_is_on_disk, ENTRY_POINTS + measuring.ENTRY_POINTS))


def _is_on_disk(kernel: Any) -> bool:
    """Numba has no public way to ask."""
    file = getattr(kernel._cache, "_cache_file", None)  # none if there is no place on disk
    if file is None:
        return False
    processor = kernel.targetctx.codegen().magic_tuple()
    return any(key[1] == processor for key in file._load_index())
