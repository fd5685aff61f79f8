"""The service as any gRPC client sees it: generated stubs on a real channel, no SDK."""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cbp_proto import encode_tensor, from_plain
from cbp_proto.v1 import (
    learner_pb2,
    learner_service_pb2,
    learner_service_pb2_grpc,
    spec_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)

_TIMEOUT = 60.0

SMALL_SPEC: dict[str, Any] = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8, 6], "out_features": 3},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.05},
    "batch_size": 1,
    "resets": {"layers": "all", "replacement_rate": 0.01, "maturity_threshold": 5},
}


def batch_message(sequence: int, features: Any, targets: Any, **fields: Any) -> training_service_pb2.TrainBatch:
    tensors = {name: encode_tensor(np.asarray(value)) for name, value in fields.items() if name == "weights"}
    others = {name: value for name, value in fields.items() if name != "weights"}
    return training_service_pb2.TrainBatch(
        sequence=sequence,
        features=encode_tensor(np.asarray(features)),
        targets=encode_tensor(np.asarray(targets)),
        **tensors,
        **others,
    )


class Stream:
    """One open Train stream, its first response read."""

    def __init__(
        self, stub: training_service_pb2_grpc.TrainingServiceStub, learner: str, producer: str, **opening: Any
    ) -> None:
        self._requests: SimpleQueue[training_service_pb2.TrainRequest | None] = SimpleQueue()
        self._call = stub.Train(iter(self._requests.get, None), timeout=_TIMEOUT)
        opened = training_service_pb2.OpenStream(learner=learner, producer=producer, **opening)
        self.send(training_service_pb2.TrainRequest(open=opened))
        first = self.receive()
        self.opened = first.opened
        self.credits = first.credits

    def send(self, request: training_service_pb2.TrainRequest) -> None:
        self._requests.put(request)

    def send_batch(self, sequence: int, features: Any, targets: Any, **fields: Any) -> None:
        self.send(training_service_pb2.TrainRequest(batch=batch_message(sequence, features, targets, **fields)))

    def send_together(self, batches: Sequence[training_service_pb2.TrainBatch]) -> None:
        self.send(training_service_pb2.TrainRequest(batches=training_service_pb2.TrainBatches(batches=batches)))

    def receive(self) -> training_service_pb2.TrainResponse:
        return next(self._call)

    def results(self, count: int) -> list[training_service_pb2.BatchResult]:
        """The next `count` results, however many responses they come in."""
        results: list[training_service_pb2.BatchResult] = []
        while len(results) < count:
            response = self.receive()
            assert response.HasField("acknowledgement"), response
            results += response.acknowledgement.results
        return results

    def rejection(self) -> training_service_pb2.Rejection:
        response = self.receive()
        assert response.HasField("rejection"), response
        return response.rejection

    def finish(self) -> list[training_service_pb2.TrainResponse]:
        """Half-closes; what still comes, up to the end of the stream."""
        self._requests.put(None)
        return list(self._call)

    def failure(self) -> grpc.RpcError:
        """The error that ends the stream; responses before it are skipped."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self._call:
                pass
        return caught.value

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class Wire:
    """Stubs on one channel, and short forms of what tests say often."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.learners = learner_service_pb2_grpc.LearnerServiceStub(self.channel)
        self.training = training_service_pb2_grpc.TrainingServiceStub(self.channel)
        self._streams: list[Stream] = []

    def create(
        self, learner_id: str, request_id: str = "", *, timeout: float = _TIMEOUT, **changes: Any
    ) -> learner_pb2.Learner:
        spec = from_plain(SMALL_SPEC | changes, spec_pb2.LearnerSpec)
        request = learner_service_pb2.CreateLearnerRequest(
            learner_id=learner_id, learner=learner_pb2.Learner(spec=spec), request_id=request_id
        )
        return self.learners.CreateLearner(request, timeout=timeout)

    def get(self, learner_id: str) -> learner_pb2.Learner:
        return self.learners.GetLearner(learner_service_pb2.GetLearnerRequest(name=f"learners/{learner_id}"))

    def delete(self, learner_id: str, etag: str = "", *, timeout: float = _TIMEOUT) -> None:
        request = learner_service_pb2.DeleteLearnerRequest(name=f"learners/{learner_id}", etag=etag)
        self.learners.DeleteLearner(request, timeout=timeout)

    def stream(self, learner_id: str, producer: str = "tests", **opening: Any) -> Stream:
        """Further arguments are fields of `OpenStream`."""
        stream = Stream(self.training, f"learners/{learner_id}", producer, **opening)
        self._streams.append(stream)
        return stream

    def predict(self, learner_id: str, features: Any) -> training_service_pb2.PredictResponse:
        request = training_service_pb2.PredictRequest(
            learner=f"learners/{learner_id}", features=encode_tensor(np.asarray(features))
        )
        return self.training.Predict(request, timeout=_TIMEOUT)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self.channel.close()


class RichError:
    """A failed call's status with its google.rpc details unpacked."""

    def __init__(self, error: grpc.RpcError) -> None:
        status = rpc_status.from_call(error)
        assert status is not None, error
        self.code = error.code()
        self.message = status.message
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.fields: dict[str, str] = {}
        self.retryable = False
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                assert info.domain == "cbp.v1"
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                detail.Unpack(bad)
                self.fields = {violation.field: violation.description for violation in bad.field_violations}
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                self.retryable = True


@pytest.fixture
def connect() -> Iterator[Callable[[str], Wire]]:
    wires: list[Wire] = []

    def connect_to(target: str) -> Wire:
        wires.append(Wire(target))
        return wires[-1]

    yield connect_to
    for wire in wires:
        wire.close()


@pytest.fixture
def wire(server: Any, connect: Callable[[str], Wire]) -> Wire:
    """The shared server."""
    return connect(server.grpc_target)


@pytest.fixture
def refused() -> Callable[[Callable[[], object]], RichError]:
    """Calls, expects an RPC error, and unpacks it."""

    def call(action: Callable[[], object]) -> RichError:
        with pytest.raises(grpc.RpcError) as caught:
            action()
        return RichError(caught.value)

    return call


@pytest.fixture
def explain() -> type[RichError]:
    return RichError


@pytest.fixture
def small_spec() -> dict[str, Any]:
    return SMALL_SPEC


@pytest.fixture
def examples() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Random examples that fit the small spec."""

    def make(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        features = generator.normal(size=(count, 4)).astype(np.float32)
        return features, (features @ generator.normal(size=(4, 3))).argmax(axis=1)

    return make
