"""Labelled images to make streams of: the digits that scikit-learn ships, and MNIST from the user's own files.

Shapes: n images, `side` pixels along an image's edge, `canvas` along that of an example.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

ImageSet = Literal["digits_8x8", "digits_16x16", "digits_28x28", "mnist"]
CLASSES = 10

_DIGIT_SIDE = 8
_LARGEST_DIGIT_VALUE = 16.0
_ENLARGED: dict[ImageSet, tuple[int, int]] = {"digits_16x16": (14, 16), "digits_28x28": (20, 28)}
"""Side of the enlarged digit, and of the canvas on which it is placed at random."""
_MNIST_SIDE = 28
_IDX_UBYTE = 0x08
_MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


class DataError(Exception):
    """Images that are not where they should be, or are not what they should be; the text says how to mend it."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their classes, of which examples are drawn."""

    pixels: NDArray[np.float32]
    """[n, side, side], from 0 to 1."""
    labels: NDArray[np.int64]
    """[n]"""
    canvas: int
    """Side of an example; where it exceeds the images' own, they are placed at random."""

    @property
    def features(self) -> int:
        """Values in one example."""
        return self.canvas**2

    def draw(self, count: int, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """So many examples, features [count, canvas²] and labels [count], in random order.

        Every image comes once before one comes again; if there is room, each time in a place of its own.
        """
        rounds = -(-count // len(self.pixels))
        chosen = np.concatenate([generator.permutation(len(self.pixels)) for _ in range(rounds)])[:count]
        side = self.pixels.shape[1]
        room = self.canvas - side
        if not room:
            return self.pixels[chosen].reshape(count, -1), self.labels[chosen]
        places = generator.integers(0, room + 1, size=(2, count, 1)) + np.arange(side)
        canvas = np.zeros((count, self.canvas, self.canvas), np.float32)
        canvas[np.arange(count)[:, None, None], places[0][:, :, None], places[1][:, None, :]] = self.pixels[chosen]
        return canvas.reshape(count, -1), self.labels[chosen]


def canvas_side(name: ImageSet) -> int:
    """Side of this set's examples, in pixels."""
    match name:
        case "digits_8x8":
            return _DIGIT_SIDE
        case "mnist":
            return _MNIST_SIDE
        case _:
            return _ENLARGED[name][1]


@cache
def load_images(name: ImageSet, mnist: Path | None = None) -> Images:
    """The images of a set; `mnist` is the directory of MNIST's IDX files, which only that set needs.

    Raises `DataError`.
    """
    if name == "mnist":
        return _load_mnist(mnist)
    digits = load_digits()
    pixels = (digits.images / _LARGEST_DIGIT_VALUE).astype(np.float32)
    if name in _ENLARGED:
        factor = _ENLARGED[name][0] / _DIGIT_SIDE
        pixels = np.stack([np.clip(zoom(image, factor, order=1), 0.0, 1.0) for image in pixels])
    return Images(pixels, digits.target.astype(np.int64), canvas_side(name))


def _load_mnist(directory: Path | None) -> Images:
    if directory is None:
        raise DataError("MNIST is not bundled: name the directory of its IDX files with --mnist or CBP_MNIST")
    images, labels = (_read_idx(_find(directory, name)) for name in _MNIST_FILES)
    if images.shape[1:] != (_MNIST_SIDE, _MNIST_SIDE) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{directory}: expected images [n, 28, 28] and labels [n], got {list(images.shape)} and "
            f"{list(labels.shape)}; use the files of one set, as they were published"
        )
    if not len(labels) or labels.max() >= CLASSES:
        raise DataError(f"{directory}: expected labels from 0 to 9; use the files as they were published")
    return Images((images / np.float32(255.0)).astype(np.float32), labels.astype(np.int64), _MNIST_SIDE)


def _find(directory: Path, name: str) -> Path:
    """The file of that name, plain or compressed, with a hyphen or a dot before its type as mirrors have it."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = directory / f"{spelling}{suffix}"
            if path.is_file():
                return path
    raise DataError(f"{directory}: no file {name} or {name}.gz; put MNIST's training files there")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in MNIST's IDX format: two zeros, type, dimensions, sizes (big-endian), values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _IDX_UBYTE)):
        raise DataError(f"{path}: is no IDX file of bytes; it should begin with 00 00 08")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4")) if len(content) >= start else ()
    if len(shape) != dimensions or len(content) - start != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path}: {len(content)} bytes are not what its header announces; copy the file again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
