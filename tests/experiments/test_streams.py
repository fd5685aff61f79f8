"""Streams do what ALGORITHM and paper say their tasks are."""

import itertools

import numpy as np
import pytest

from experiments.streams import Stream, StreamKind, target_network

DIGITS = Stream(kind="permuted_inputs", images="digits_8x8", examples=300)


def digits(kind: StreamKind) -> Stream:
    return Stream(kind=kind, images="digits_8x8", examples=300)


def regression(kind: StreamKind) -> Stream:
    return Stream(kind=kind, images=None, examples=50)


def test_a_task_depends_on_seed_and_number_alone() -> None:
    for kind in ("permuted_inputs", "permuted_labels", "swapped_labels"):
        for one, two in zip(digits(kind).task(3, 7), digits(kind).task(3, 7), strict=True):
            assert (one == two).all()
        assert (digits(kind).task(3, 7)[0] != digits(kind).task(4, 7)[0]).any()
        assert (digits(kind).task(3, 7)[0] != digits(kind).task(3, 8)[0]).any()


def test_permuted_inputs_keep_every_image_and_move_its_pixels_alike() -> None:
    shown, labels = DIGITS.task(0, 4)
    plain, plain_labels = digits("swapped_labels").task(0, 4)
    assert (np.sort(shown, axis=1) == np.sort(plain, axis=1)).all()
    order = [int(np.flatnonzero((shown == plain[:, [pixel]]).all(axis=0))[0]) for pixel in range(64)]
    assert (shown[:, order] == plain).all()
    assert len(labels) == len(plain_labels) == 300


def test_permuted_labels_rename_classes() -> None:
    _, labels = digits("permuted_labels").task(0, 2)
    _, swapped = digits("swapped_labels").task(0, 0)
    assert set(labels.tolist()) == set(range(10))
    names = {
        (int(before), int(after)) for before, after in zip(digits("swapped_labels").task(0, 2)[1], labels, strict=True)
    }
    assert len(names) == 10
    assert swapped.shape == labels.shape


def test_two_labels_change_places_at_each_task() -> None:
    """The classes of one drawn image are compared through the inputs, which `permuted_labels` shares."""
    stream = digits("swapped_labels")
    for number in range(1, 5):
        features, labels = stream.task(0, number)
        before = relabelled(features, 0, number - 1)
        changed = {(int(old), int(new)) for old, new in zip(before, labels, strict=True) if old != new}
        assert len(changed) == 2
        assert {old for old, _ in changed} == {new for _, new in changed}


def relabelled(features: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The labels that another task's naming gives to these images."""
    names = {
        image.tobytes(): int(label)
        for image, label in zip(
            *Stream(kind="swapped_labels", images="digits_8x8", examples=1797).task(seed, number), strict=True
        )
    }
    return np.array([names[image.tobytes()] for image in features])


def test_one_bit_of_fifteen_flips_between_tasks_and_five_vary() -> None:
    stream = regression("regression_one_flip")
    tasks = [stream.task(1, number)[0] for number in range(20)]
    for features in tasks:
        assert features.shape == (50, 20)
        assert (features[:, :15] == features[0, :15]).all()
        assert (features[:, 15:].std(axis=0) > 0).all()
        assert set(np.unique(features).tolist()) == {0.0, 1.0}
    flips = [int(np.count_nonzero(one[0, :15] != two[0, :15])) for one, two in itertools.pairwise(tasks)]
    assert flips == [1] * 19


def test_all_bits_are_redrawn() -> None:
    tasks = [regression("regression_all_redrawn").task(1, number)[0][0, :15] for number in range(40)]
    flips = [np.count_nonzero(one != two) for one, two in itertools.pairwise(tasks)]
    assert 6 < np.mean(flips) < 9


def test_the_regression_target_is_the_papers() -> None:
    features, targets = regression("regression_one_flip").task(2, 3)
    network = target_network(2)
    assert set(np.unique(network.weights).tolist()) == {-1.0, 1.0}
    expected = network.output_bias
    for weights, bias, output in zip(network.weights, network.biases, network.output_weights[:, 0], strict=True):
        opposed = (20 - weights.sum() + bias) / 2
        if weights @ features[5] + bias > 0.7 * 21 - opposed:
            expected += output
    assert targets.shape == (50, 1)
    assert targets[5, 0] == pytest.approx(expected)
