"""Images: the bundled digits, and MNIST from the user's files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from experiments.images import DataError, Images, ImageSet, load_images


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_mnist(directory: Path, images: bytes, labels: bytes, suffix: str = "") -> None:
    for name, content in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        (directory / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix == ".gz" else content)


PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
LABELS = np.array([5, 0, 9])


@pytest.mark.parametrize(("name", "side"), [("digits_8x8", 8), ("digits_16x16", 16), ("digits_28x28", 28)])
def test_bundled_digits_fill_their_range(name: ImageSet, side: int) -> None:
    images = load_images(name)
    features, labels = images.draw(500, np.random.default_rng(0))
    assert features.shape == (500, side * side) == (500, images.features)
    assert features.dtype == np.float32
    assert (features.min(), features.max()) == (0.0, 1.0)
    assert set(labels.tolist()) == set(range(10))


def test_every_image_comes_before_one_comes_again() -> None:
    images = Images(np.arange(5, dtype=np.float32).reshape(5, 1, 1), np.arange(5), canvas=1)
    features, labels = images.draw(12, np.random.default_rng(1))
    assert sorted(labels[:5]) == sorted(labels[5:10]) == [0, 1, 2, 3, 4]
    assert (features[:, 0] == labels).all()


def test_images_are_placed_whole_and_anywhere_on_a_larger_canvas() -> None:
    images = Images(np.ones((1, 2, 2), np.float32), np.zeros(1, np.int64), canvas=4)
    features, _ = images.draw(400, np.random.default_rng(2))
    canvases = features.reshape(-1, 4, 4)
    assert (features.sum(axis=1) == 4).all()
    assert {tuple(np.argwhere(canvas)[0]) for canvas in canvases} == {
        (row, column) for row in range(3) for column in range(3)
    }
    assert all(
        canvas[row : row + 2, column : column + 2].all()
        for canvas in canvases
        for row, column in [np.argwhere(canvas)[0]]
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    write_mnist(tmp_path, idx(PIXELS), idx(LABELS), suffix)
    images = load_images("mnist", tmp_path)
    np.testing.assert_allclose(images.pixels, PIXELS / 255.0, rtol=1e-6)
    assert images.labels.tolist() == [5, 0, 9]
    assert images.features == 784


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (b"nonsense", idx(LABELS), "should begin with 00 00 08"),
        (idx(PIXELS)[:-1], idx(LABELS), "not what its header announces"),
        (b"\0\0\x08\x03\0\0", idx(LABELS), "not what its header announces"),
        (idx(PIXELS), idx(LABELS[:2]), "use the files of one set"),
        (idx(PIXELS[:, :8]), idx(LABELS), "use the files of one set"),
        (idx(PIXELS), idx(np.array([1, 2, 10])), "labels from 0 to 9"),
    ],
)
def test_mnist_files_that_are_not_mnist_are_refused(
    tmp_path: Path, images: bytes, labels: bytes, complaint: str
) -> None:
    write_mnist(tmp_path, images, labels)
    with pytest.raises(DataError, match=complaint):
        load_images("mnist", tmp_path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, idx(PIXELS), idx(LABELS), ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load_images("mnist", tmp_path)


def test_missing_mnist_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="put MNIST's training files there"):
        load_images("mnist", tmp_path)
    with pytest.raises(DataError, match="--mnist or CBP_MNIST"):
        load_images("mnist")
