"""Online permuted digits: a stream of classification tasks made of the digits that scikit-learn ships.

Each task shuffles the pixels of all its images in a new way, so the inputs of the tasks have nothing in common while
the difficulty stays the same. A learner that keeps its plasticity does as well on the hundredth task as on the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

SIDE = 16
PIXELS = SIDE * SIDE
CLASSES = 10
#: Images there are; a task uses each at most once.
IMAGES = 1797
_DIGIT_SIDE = 14  # leaves room to shift the digit by up to two pixels


@dataclass(frozen=True)
class DigitTask:
    """One task: every image is new to the learner, for its pixels were never in this order or place before."""

    name: str
    features: NDArray[np.float32]  # [examples, PIXELS], from 0 to 1
    labels: NDArray[np.int64]  # [examples]


def digit_tasks(tasks: int, examples: int, seed: int) -> Iterator[DigitTask]:
    """The stream, task by task; equal for equal arguments.

    Args:
        tasks: how many.
        examples: of each task, at most IMAGES.
        seed: of the permutations, the choice and order of images, and their shifts.
    """
    digits = load_digits()
    enlarged = np.stack([zoom(image / 16.0, _DIGIT_SIDE / 8, order=1) for image in digits.images])
    images = np.clip(enlarged, 0.0, 1.0).astype(np.float32)
    generator = np.random.default_rng(seed)
    room = SIDE - _DIGIT_SIDE + 1
    for task in range(tasks):
        permutation = generator.permutation(PIXELS)
        chosen = generator.permutation(len(images))[:examples]
        canvas = np.zeros((examples, SIDE, SIDE), dtype=np.float32)
        for row, image in enumerate(chosen):
            down, right = generator.integers(0, room, size=2)
            canvas[row, down : down + _DIGIT_SIDE, right : right + _DIGIT_SIDE] = images[image]
        features = canvas.reshape(examples, PIXELS)[:, permutation]
        yield DigitTask(f"permutation-{task + 1:03d}", features, digits.target[chosen].astype(np.int64))
