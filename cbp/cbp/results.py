"""What a call of `train` did: a plain record, without tensors."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(kw_only=True, eq=False, slots=True)
class TrainResult:
    """What one call of `train` did. Every number is of the predictions made before the examples were learned from.

    Not frozen, which would quadruple the time that one takes to make, a good part of a small network's step.
    """

    steps: int
    """Steps taken; 0 if all examples still wait for theirs to fill up."""
    first_step: int
    """The first of these steps, counted from 1; of no steps, the one that comes next."""
    examples: int
    """Examples applied; they may include some that an earlier call had left waiting."""
    pending: int
    """Examples that wait now."""
    loss: float | None
    """Mean loss of the applied examples, each counted once whatever its weight; None if there were none."""
    accuracy: float | None
    """Mean accuracy of the applied examples; None if there were none, and for regression."""
    outputs: NDArray[np.float32] | None
    """[examples, C] network outputs, if asked for."""
