"""What goes over the wire for what users write."""

from typing import Any

import grpc
import numpy as np
import pytest

from cbp_client import AlreadyExists, AsyncClient, InvalidArgument, Prediction
from cbp_client.examples import examples_of, features_tensor
from cbp_proto import decode_tensor, to_plain
from tests.client.scripted_server import ScriptedServer, error

NETWORK = {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3}


async def test_a_spec_is_sent_as_written(scripted: ScriptedServer) -> None:
    spec: dict[str, Any] = {
        "network": NETWORK,
        "loss": "cross_entropy",
        "optimizer": {"kind": "sgd", "lr": 0.01},
        "batch_size": 1,
        "seed": 3,
        "resets": {"layers": "first", "replacement_rate": 1e-4, "maturity_threshold": 100},
        "monitoring": {"interval": 10},
    }
    async with AsyncClient(scripted.target) as client:
        learner = await client.create_learner("clicks", **spec)

    request = scripted.requests[0]
    assert request.learner_id == "clicks"
    assert to_plain(request.learner.spec) == spec | {
        "loss": {"kind": "cross_entropy"},
        "resets": spec["resets"] | {"layers": ["first"]},
    }
    assert learner.id == "clicks"
    assert learner.info.spec["optimizer"] == {"kind": "sgd", "lr": 0.01}


async def test_a_spec_that_no_message_holds_is_refused_with_its_field(scripted: ScriptedServer) -> None:
    async with AsyncClient(scripted.target) as client:
        with pytest.raises(InvalidArgument) as caught:
            await client.create_learner("clicks", network=NETWORK, optimizer={"learning_rate": 0.1})

    assert caught.value.reason == "INVALID_SPEC"
    assert caught.value.violations[0].field == "optimizer.learning_rate"
    assert str(caught.value).startswith("optimizer.learning_rate: is not a field here; there are kind, lr")
    assert scripted.requests == []


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({"optimizer": {"lr": 0.01}}, ["spec.optimizer.lr"]),
        ({"resets": {"layers": "first"}}, ["spec.resets.layers"]),
        (
            {"resets": {"layers": [0], "replacement_rate": None}, "monitoring": {"interval": 0}},
            ["spec.resets.layers", "spec.resets.replacement_rate", "spec.monitoring.interval"],
        ),
    ],
)
async def test_an_update_masks_exactly_what_is_given(
    scripted: ScriptedServer, changes: dict[str, Any], paths: list[str]
) -> None:
    async with AsyncClient(scripted.target) as client:
        learner = await client.get_learner("clicks")
        await learner.update(**changes)

    request = scripted.requests[-1]
    assert list(request.update_mask.paths) == paths
    assert request.learner.name == "learners/clicks"
    assert request.learner.etag == ""


async def test_pages_are_followed(scripted: ScriptedServer) -> None:
    async with AsyncClient(scripted.target) as client:
        ids = [learner.id async for learner in client.list_learners()]

    assert ids == ["l0", "l1", "l2", "l3", "l4", "l5"]
    assert [request.page_token for request in scripted.requests] == ["", "2", "4"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (np.float64, np.float32),
        (np.float32, np.float32),
        (np.float16, np.float16),
        (np.uint8, np.uint8),
        (np.uint16, np.int32),
        (np.uint32, np.int64),
        (np.uint64, np.float32),
        (np.int64, np.int64),
        (np.bool_, np.bool_),
        (np.longdouble, np.float32),
    ],
)
def test_features_go_in_a_type_that_keeps_their_values(given: type[np.generic], sent: type[np.generic]) -> None:
    array = np.array([[1, 0], [0, 1]], dtype=given)
    decoded = decode_tensor(features_tensor(array))

    assert decoded.dtype == sent
    np.testing.assert_array_equal(decoded, array)


def test_what_float32_cannot_hold_is_left_to_the_server_to_name() -> None:
    assert np.isinf(decode_tensor(features_tensor([[1e300]]))).all()


@pytest.mark.parametrize(
    ("targets", "sent"),
    [([1, 2], np.int64), (np.array([1, 2], np.uint8), np.int64), ([True, False], np.int64), ([1.5], np.float32)],
)
def test_labels_go_as_integers_and_numbers_as_floats(targets: Any, sent: type[np.generic]) -> None:
    assert examples_of([[0.0]] * len(targets), targets, None).targets.dtype == sent


def test_a_prediction_knows_labels_and_probabilities() -> None:
    prediction = Prediction(outputs=np.array([[0, 1000, 0], [2, 1, 0]], np.float32), step=3)

    assert prediction.labels.tolist() == [1, 0]
    assert prediction.probabilities.dtype == np.float32
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert prediction.probabilities[0].tolist() == [0, 1, 0]


async def test_existing_learners_are_taken_only_if_they_are_the_same(scripted: ScriptedServer) -> None:
    exists = error(grpc.StatusCode.ALREADY_EXISTS, "LEARNER_EXISTS")
    async with AsyncClient(scripted.target) as client:
        scripted.unary_errors = [exists]
        with pytest.raises(AlreadyExists):
            await client.create_learner("clicks", network=NETWORK)
        scripted.unary_errors = [exists]
        with pytest.raises(AlreadyExists, match="exists with network None, not"):
            await client.create_learner("clicks", network=NETWORK, exist_ok=True)
