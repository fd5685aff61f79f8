"""Running averages, and the correction of their bias towards 0 at the beginning."""

import math

import numpy as np

from cbp.engines.compiled.compiling import exactly
from cbp.engines.compiled.table import HALF, ONE, Floats, Number


@exactly
def bias_correction(age: int, log_decay: Number) -> Number:
    return np.float32(-math.expm1(np.float32(age) * log_decay))


@exactly
def fill_corrections(log_decay: Number, corrections: Floats) -> None:
    """corrections[a] ← 1 − ηᵃ."""
    for age in range(len(corrections)):
        corrections[age] = bias_correction(age, log_decay)


@exactly
def lerp(start: Number, end: Number, share: Number) -> Number:
    """As torch.lerp rounds it."""
    if share < HALF:
        return start + share * (end - start)
    return end - (end - start) * (ONE - share)
