"""What goes over the wire for what users write."""

from typing import Any

import grpc
import numpy as np
import pytest

from cbp_client import AlreadyExists, AsyncClient, InvalidArgument, Prediction
from cbp_client.examples import examples_of, features_tensor
from cbp_proto import decode_tensor, encode_tensor, from_plain, to_plain
from cbp_proto.v1 import spec_pb2
from cbp_proto.v1.training_service_pb2 import PredictResponse
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


async def test_a_network_without_a_kind_is_a_perceptron(scripted: ScriptedServer) -> None:
    async with AsyncClient(scripted.target) as client:
        await client.create_learner("clicks", network={"in_features": 4, "out_features": 3})
        await client.create_learner("clicks", network={"kind": None, "in_features": 4, "out_features": 3})

    for request in scripted.requests:
        assert to_plain(request.learner.spec.network) == {"kind": "mlp", "in_features": 4, "out_features": 3}


@pytest.mark.parametrize("part", ["network", "loss", "batch_size", "seed", "precision", "methods"])
async def test_an_update_says_what_can_be_changed(scripted: ScriptedServer, part: str) -> None:
    async with AsyncClient(scripted.target) as client:
        learner = await client.get_learner("clicks")
        with pytest.raises(InvalidArgument) as caught:
            await learner.update(**{part: 8})  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="colour: is no part of a learner; there are resets, optimizer"):
            await learner.update(colour="red")  # type: ignore[arg-type]

    assert str(caught.value) == (
        f"{part}: can't be changed on a live learner, as can resets, optimizer, monitoring, durability; "
        "create another one"
    )
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(("task", "label"), [("day", "day"), (3, "3"), (-1, "-1"), (np.int64(7), "7")])
async def test_a_task_may_be_a_number(scripted: ScriptedServer, task: Any, label: str) -> None:
    async with AsyncClient(scripted.target) as client:
        learner = await client.get_learner("clicks")
        async with learner.stream("web") as stream:
            result = await (await stream.send([[1.0]], [0], task=task))

    assert result.task == label


async def test_an_answer_is_taken_whatever_its_size(scripted: ScriptedServer) -> None:
    scripted.prediction = PredictResponse(outputs=encode_tensor(np.zeros((17, 1024, 1024), np.float32)))
    async with AsyncClient(scripted.target) as client:
        learner = await client.get_learner("clicks")
        assert (await learner.predict([[1.0]])).outputs.nbytes > 64 * 1024 * 1024


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


def test_numpy_takes_a_prediction_for_its_outputs() -> None:
    prediction = Prediction(outputs=np.array([[0, 2], [3, 1]], np.float32), step=3)

    assert np.asarray(prediction) is prediction.outputs
    assert np.array(prediction).tolist() == prediction.outputs.tolist()
    assert not np.shares_memory(np.array(prediction), prediction.outputs)
    assert np.asarray(prediction, dtype=np.float64).dtype == np.float64
    assert np.argmax(prediction, axis=1).tolist() == [1, 0]
    assert (np.asarray(prediction) == [[0, 2], [3, 1]]).all()
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert np.array(prediction, copy=False) is prediction.outputs
        with pytest.raises(ValueError, match="without a copy"):
            np.array(prediction, dtype=np.float64, copy=False)


async def test_existing_learners_are_taken_only_if_they_are_the_same(scripted: ScriptedServer) -> None:
    exists = error(grpc.StatusCode.ALREADY_EXISTS, "LEARNER_EXISTS")
    async with AsyncClient(scripted.target) as client:
        scripted.unary_errors = [exists]
        with pytest.raises(AlreadyExists):
            await client.create_learner("clicks", network=NETWORK)
        scripted.unary_errors = [exists]
        with pytest.raises(AlreadyExists, match="exists with network None, not"):
            await client.create_learner("clicks", network=NETWORK, exist_ok=True)
        scripted.learner.spec.CopyFrom(from_plain({"network": NETWORK, "optimizer": "sgd"}, spec_pb2.LearnerSpec))
        scripted.unary_errors = [exists]
        with pytest.raises(AlreadyExists, match="exists with optimizer sgd, not adam"):
            await client.create_learner("clicks", network=NETWORK, optimizer="adam", exist_ok=True)
