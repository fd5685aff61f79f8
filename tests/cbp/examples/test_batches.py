from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbp import Batch, BatchError, LearnerSpec

CLASSES = 3
INPUTS = 4


def spec_of(loss: str, outputs: int = CLASSES) -> LearnerSpec:
    network = {"kind": "mlp", "in_features": INPUTS, "hidden": [5], "out_features": outputs}
    return LearnerSpec.parse({"network": network, "loss": loss, "optimizer": {"kind": "sgd", "lr": 0.1}})


CLASSIFIER = spec_of("cross_entropy")
real_dtypes = st.one_of(
    hnp.floating_dtypes(sizes=(16, 32, 64)), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.boolean_dtypes()
)


@given(st.data(), real_dtypes, st.integers(1, 6))
def test_any_real_features_become_float32_or_are_refused(data: st.DataObject, dtype: Any, count: int) -> None:
    features = data.draw(hnp.arrays(dtype, (count, INPUTS)))
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(features.astype(np.float32)).all())
    labels = np.zeros(count, dtype=np.int64)
    if fits:
        batch = Batch.validate(CLASSIFIER, features, labels)
        assert batch.features.dtype == np.float32
        np.testing.assert_array_equal(batch.features, features.astype(np.float32))
    else:
        with pytest.raises(BatchError, match="features: Expected values that are finite"):
            Batch.validate(CLASSIFIER, features, labels)


@given(st.lists(st.integers(-3, CLASSES + 3), min_size=1, max_size=8))
def test_labels_lie_within_the_classes(labels: list[int]) -> None:
    features = np.zeros((len(labels), INPUTS))
    outside = [position for position, label in enumerate(labels) if not 0 <= label < CLASSES]
    if outside:
        with pytest.raises(BatchError) as caught:
            Batch.validate(CLASSIFIER, features, labels)
        description = caught.value.violations[0].description
        assert description == f"Expected labels from 0 to 2, got {labels[outside[0]]} at [{outside[0]}]"
    else:
        assert Batch.validate(CLASSIFIER, features, labels).targets.tolist() == labels


@given(hnp.array_shapes(min_dims=0, max_dims=3, max_side=5))
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    features = np.zeros(shape)
    if len(shape) == 2 and shape[1] == INPUTS:
        Batch.validate(CLASSIFIER, features, np.zeros(shape[0], int))
    else:
        with pytest.raises(BatchError, match=r"features: Expected shape \[N, 4\]"):
            Batch.validate(CLASSIFIER, features, np.zeros(max(shape, default=1), int))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("features", np.zeros((0, INPUTS)), "N of at least 1"),
        ("features", np.full((2, INPUTS), "1"), "real numbers"),
        ("features", np.zeros((2, INPUTS), complex), "real numbers"),
        ("features", np.zeros((2, INPUTS), object), "real numbers"),
        ("features", [[1, 2], [1]], "rectangular"),
        ("features", [[0, 0, 0, 0], [0, 0, np.nan, 0]], "got nan at [1, 2]"),
        ("features", [[0, 0, 0, 0], [0, 0, 0, 1e300]], "got 1e+300 at [1, 3]"),
        ("targets", [0.0, 1.0], "integer labels"),
        ("targets", [0, 1, 2], "Expected shape [2], got [3]"),
        ("targets", [[0], [1]], "Expected shape [2], got [2, 1]"),
        ("targets", np.array([2**64 - 1, 0], np.uint64), "got 18446744073709551615 at [0]"),
        ("weights", [1.0], "Expected shape [2], got [1]"),
        ("weights", [1.0, -0.5], "got -0.5 at [1]"),
        ("weights", [np.inf, 1.0], "finite"),
        ("task", "x" * 129, "at most 128 characters, got 129"),
        ("task", 7, "got int"),
        ("task", "a\0b", r"printable characters only, got 'a\x00b'"),
        ("task", "two\nlines", r"got 'two\nlines'"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any, says: str) -> None:
    arguments: dict[str, Any] = {"features": np.zeros((2, INPUTS)), "targets": [0, 1], "weights": None, "task": ""}
    with pytest.raises(BatchError) as caught:
        Batch.validate(CLASSIFIER, **(arguments | {name: value}))
    assert [violation.field for violation in caught.value.violations] == [name]
    assert says in caught.value.violations[0].description


def test_every_violation_is_reported_at_once() -> None:
    with pytest.raises(BatchError) as caught:
        Batch.validate(CLASSIFIER, [[0.0]], [0.5], [-1.0], "x" * 200)
    assert [violation.field for violation in caught.value.violations] == ["features", "targets", "weights", "task"]


def test_single_regression_targets_may_be_flat() -> None:
    batch = Batch.validate(spec_of("mse", 1), np.zeros((2, INPUTS)), [1, 2])
    assert batch.targets.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("loss", ["mse", "huber", "binary_cross_entropy"])
def test_regression_targets_have_a_value_per_output(loss: str) -> None:
    with pytest.raises(BatchError, match=r"targets: Expected shape \[2, 3\], got \[2\]"):
        Batch.validate(spec_of(loss), np.zeros((2, INPUTS)), [1, 0])


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_binary_targets_are_probabilities(value: float) -> None:
    with pytest.raises(BatchError, match=rf"got {value} at \[0, 1\]"):
        Batch.validate(spec_of("binary_cross_entropy"), np.zeros((1, INPUTS)), [[0.5, value, 0.5]])


def test_read_only_memory_is_accepted() -> None:
    features = np.frombuffer(np.zeros((2, INPUTS), np.float32).tobytes(), np.float32).reshape(2, INPUTS)
    assert len(Batch.validate(CLASSIFIER, features, np.frombuffer(b"\x00\x01", np.uint8))) == 2
