"""Random numbers for a learner's weights: those of a torch generator, for less."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbp.errors import FieldViolation, SnapshotError
from cbp.serialization import take_tensor

#: Numbers drawn at a time. Requests of as many or more go to torch.
_AHEAD = 512
_NONE = np.empty(0, np.float32)


_LAYOUT = np.dtype(
    [
        ("seed", "u8"),
        ("left", "i4"),
        ("seeded", "i4"),
        ("next", "u8"),
        ("words", "u8", 624),
        ("normals", "f8", 3),
        ("has_normal", "i4"),
        ("next_normal", "f4"),
        ("has_next_normal", "?"),
    ],
    align=True,
)
"""What torch saves of a generator on the CPU, a Mersenne twister: `CPUGeneratorImplState` in ATen's
CPUGeneratorImpl.cpp. Of its words `next` is read next, and new ones are made when so many are `left`, that one
included."""


def take_generator_state(tensors: Mapping[str, Any], name: str) -> Tensor:
    """The named state of a generator on the CPU, checked, on the CPU, in memory of its own. Raises `SnapshotError`.

    torch itself checks the two places each, but not that they go together, and then reads beyond its words.
    """
    trial = torch.Generator()
    state = take_tensor(tensors, name, trial.get_state().shape, torch.uint8).cpu().clone()
    try:
        trial.set_state(state)
    except RuntimeError as error:
        raise _no_state(name, str(error)) from error
    if state.numel() == _LAYOUT.itemsize:
        [saved] = state.numpy().view(_LAYOUT)
        if not 1 <= saved["left"] <= 624 or saved["next"] > 625 - saved["left"] or saved["words"].max() >= 2**32:
            raise _no_state(name, "its places are beyond its words")
        if not (np.isfinite(saved["normals"]).all() and np.isfinite(saved["next_normal"])):
            raise _no_state(name, "the numbers it has drawn ahead are not finite")
    return state


def _no_state(name: str, why: str) -> SnapshotError:
    problem = f"is no state of a random generator: {why}"
    return SnapshotError(f"The snapshot's tensor {name!r} {problem}", [FieldViolation(name, problem)])


class UniformGenerator:
    """Gives the numbers that `torch.rand` would draw from a CPU generator of the same seed, in the same order, whatever
    number of them is asked for at a time.

    Units are replaced one by one, and to ask torch for the few numbers of a unit takes longer than many steps of a
    small network. So numbers are drawn ahead, but the state is that of a generator which has drawn what was asked for.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._ahead = _NONE
        self._taken = 0  # of those
        self._before: Tensor | None = None  # the generator's state before it drew them

    def __getstate__(self) -> Tensor:
        return self.get_state()

    def __setstate__(self, state: Tensor) -> None:
        self._generator = torch.Generator()
        self.set_state(state)

    def take(self, count: int) -> NDArray[np.float32]:
        """[count] from U[0, 1); not to be changed."""
        end = self._taken + count
        if end > len(self._ahead):
            return self._take_more(count)
        numbers = self._ahead[self._taken : end]
        self._taken = end
        return numbers

    def get_state(self) -> Tensor:
        """As `torch.Generator.get_state`: uint8, on the CPU."""
        if self._before is None:
            return self._generator.get_state()
        follower = torch.Generator()
        follower.set_state(self._before)
        torch.rand(self._taken, generator=follower)
        return follower.get_state()

    def set_state(self, state: Tensor) -> None:
        """As `torch.Generator.set_state`."""
        self._generator.set_state(state)
        self._forget_ahead()

    def rest(self) -> None:
        """Takes less memory, by some kilobytes, until further numbers are asked for."""
        if self._before is not None:
            self.set_state(self.get_state())

    def _take_more(self, count: int) -> NDArray[np.float32]:
        left = self._ahead[self._taken :]
        missing = count - len(left)
        if missing >= _AHEAD:
            drawn = torch.rand(missing, generator=self._generator).numpy()
            self._forget_ahead()
        else:
            self._before = self._generator.get_state()
            self._ahead = torch.rand(_AHEAD, generator=self._generator).numpy()
            self._taken = missing
            drawn = self._ahead[:missing]
        return np.concatenate((left, drawn)) if len(left) else drawn

    def _forget_ahead(self) -> None:
        self._ahead, self._taken, self._before = _NONE, 0, None


def draw_uniform(bound: float, shape: Sequence[int], generator: UniformGenerator) -> Tensor:
    """U(−bound, bound), float32 on the CPU, the same numbers whatever device they go to."""
    numbers = generator.take(math.prod(shape)) * np.float32(2.0 * bound)
    numbers -= np.float32(bound)
    return torch.from_numpy(numbers.reshape(shape))
