"""Bad input over the wire: the precise status, the field and the fix; and nothing changes."""

import grpc
import numpy as np
import pytest
from server_process import ServerProcess
from wire import Wire

from cbp_proto import encode_tensor, from_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2, tensor_pb2, training_service_pb2
from tests.wire import batch_message

FEATURES = np.zeros((2, 4), dtype=np.float32)
LABELS = np.array([0, 2])


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    return encode_tensor(array)


BAD_BATCHES = {
    "too few features": ({"features": tensor(np.zeros((2, 3), np.float32))}, {"features": "4"}),
    "no examples": ({"features": tensor(np.zeros((0, 4), np.float32))}, {"features": "at least 1"}),
    "flat features": ({"features": tensor(np.zeros(8, np.float32))}, {"features": "[N, 4]"}),
    "not a number": ({"features": tensor(np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]))}, {"features": "[1, 1]"}),
    "infinite": ({"features": tensor(np.array([[0, 0, np.inf, 0], [0, 0, 0, 0]]))}, {"features": "[0, 2]"}),
    "too large for float32": ({"features": tensor(np.full((2, 4), 1e300))}, {"features": "[0, 0]"}),
    "label out of range": ({"targets": tensor(np.array([0, 3]))}, {"targets": "0 to 2"}),
    "negative label": ({"targets": tensor(np.array([-1, 0]))}, {"targets": "0 to 2"}),
    "fractional labels": ({"targets": tensor(np.array([0.0, 1.0]))}, {"targets": "integer"}),
    "too many labels": ({"targets": tensor(np.array([0, 1, 2]))}, {"targets": "[2]"}),
    "negative weight": ({"weights": tensor(np.array([1.0, -1.0]))}, {"weights": "at least 0"}),
    "weights of another length": ({"weights": tensor(np.ones(3))}, {"weights": "[2]"}),
    "long task": ({"task": "x" * 129}, {"task": "128"}),
    "unprintable task": ({"task": "a\0b"}, {"task": "printable"}),
    "very many dimensions": (
        {"features": tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2**62] * 200_000)},
        {"features": "more than 8 dimensions"},
    ),
    "no features": ({"features": None}, {"features": "dtype"}),
    "data too short": (
        {"features": tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 4], data=b"123")},
        {"features": "32 bytes"},
    ),
    "two mistakes": (
        {"features": tensor(np.zeros((2, 5))), "targets": tensor(np.array([9, 9]))},
        {"features": "4", "targets": "0 to 2"},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_batch_is_rejected_and_its_stream_goes_on(wire, learner_id, fields, expected):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    good = {"features": tensor(FEATURES), "targets": tensor(LABELS)}
    bad = training_service_pb2.TrainBatch(sequence=1, **(good | fields))

    stream.send(training_service_pb2.TrainRequest(batch=bad))
    rejection = stream.rejection()

    assert rejection.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (rejection.reason, rejection.sequence, rejection.expected_sequence) == ("INVALID_BATCH", 1, 1)
    violations = {violation.field: violation.description for violation in rejection.field_violations}
    assert violations.keys() == expected.keys()
    for field, text in expected.items():
        assert text in violations[field]
    before = wire.get(learner_id)
    assert (before.progress.step, before.progress.pending_examples) == (0, 0)
    stream.send_batch(1, FEATURES, LABELS)
    assert stream.results(1)[0].step == 2


def test_an_oversize_message_is_rejected_by_name(start_server, connect, learner_id):
    wire = connect(start_server("--max-message-bytes", "4096").grpc_target)
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    assert stream.opened.max_message_bytes == 4096

    stream.send_batch(1, np.zeros((300, 4), np.float32), np.zeros(300, np.int64))

    rejection = stream.rejection()
    assert rejection.reason == "MESSAGE_TOO_LARGE"
    assert rejection.field_violations[0].field == "batch"
    assert "4096" in rejection.field_violations[0].description
    stream.send_batch(1, FEATURES, LABELS)
    assert stream.results(1)[0].step == 2


def test_an_oversize_prediction_is_refused_by_name(start_server, connect, learner_id, refused):
    wire = connect(start_server("--max-message-bytes", "4096").grpc_target)
    wire.create(learner_id)
    error = refused(lambda: wire.predict(learner_id, np.zeros((300, 4), np.float32)))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE")
    assert "4096" in error.fields["features"]


@pytest.fixture(scope="module")
def strict_wire(tmp_path_factory):
    """A server with narrow limits."""
    flags = {"parameters": 5000, "layers": 3, "pending-bytes": 4096, "activation-bytes": 40_000}
    arguments = [part for name, value in flags.items() for part in (f"--max-{name}", str(value))]
    process = ServerProcess(tmp_path_factory.mktemp("strict") / "data", *arguments)
    process.start()
    wire = Wire(process.grpc_target)
    yield wire
    wire.close()
    process.close()


NETWORK = {"kind": "mlp", "in_features": 4, "hidden": [8, 6], "out_features": 3}
EXCESSIVE_SPECS = {
    "layers": ({"network": NETWORK | {"hidden": [1] * 4}}, "network.hidden", "--max-layers"),
    "width": ({"network": NETWORK | {"hidden": [2**31 - 1] * 2}}, "network.hidden", "--max-parameters"),
    "outputs": ({"network": NETWORK | {"out_features": 10**9}}, "network.out_features", "--max-parameters"),
    "batch": ({"batch_size": 147}, "batch_size", "--max-pending-bytes"),
    "probe": ({"monitoring": {"probe_size": 60_000}}, "monitoring.probe_size", "--max-activation-bytes"),
}


@pytest.mark.parametrize(("changes", "field", "setting"), EXCESSIVE_SPECS.values(), ids=EXCESSIVE_SPECS)
def test_a_learner_that_would_exhaust_memory_is_refused(strict_wire, refused, changes, field, setting):
    error = refused(lambda: strict_wire.create("large", **{"monitoring": {"probe_size": 100}} | changes))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC")
    assert setting in error.fields[field]


def test_an_update_may_not_exhaust_memory_either(strict_wire, refused):
    strict_wire.create("growing", monitoring={"probe_size": 100})
    learner = learner_pb2.Learner(name="learners/growing")
    learner.spec.monitoring.probe_size = 60_000
    request = learner_service_pb2.UpdateLearnerRequest(learner=learner)
    error = refused(lambda: strict_wire.learners.UpdateLearner(request))
    assert "--max-activation-bytes" in error.fields["monitoring.probe_size"]
    assert strict_wire.get("growing").spec.monitoring.probe_size == 100


def test_a_message_that_would_exhaust_memory_says_how_many_examples_fit(strict_wire, refused):
    """One byte each on the wire; in the learner every feature, activation and output takes four."""
    strict_wire.create("expanding", batch_size=0, monitoring={"probe_size": 100})
    stream = strict_wire.stream("expanding")
    stream.send_batch(1, np.zeros((477, 4), np.uint8), np.zeros(477, np.uint8))
    rejection = stream.rejection()
    assert rejection.reason == "INVALID_BATCH"
    assert rejection.field_violations[0].field == "features"
    assert "at most 476 at once" in rejection.field_violations[0].description
    stream.send_batch(1, np.zeros((476, 4), np.uint8), np.zeros(476, np.uint8))
    assert stream.results(1)[0].step == 1

    error = refused(lambda: strict_wire.predict("expanding", np.zeros((1429, 4), np.uint8)))
    assert "at most 1428 at once" in error.fields["features"]
    assert list(strict_wire.predict("expanding", np.zeros((1428, 4), np.uint8)).outputs.shape) == [1428, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden": [1] * 200_000},
        {"layers": ["hidden_0"] * 20_000},
        {"layers": ["9" * 5000]},
        {"layers": ["\0" * 60_000]},
    ],
    ids=["layers", "resets", "digits", "control characters"],
)
def test_an_endless_spec_is_refused_at_once_and_briefly(wire, refused, learner_id, small_spec, fields):
    spec = from_plain(small_spec, spec_pb2.LearnerSpec)
    spec.network.mlp.hidden.extend(fields.get("hidden", []))
    if "layers" in fields:
        spec.resets.layers[:] = fields["layers"]
    request = learner_service_pb2.CreateLearnerRequest(learner_id=learner_id, learner=learner_pb2.Learner(spec=spec))
    error = refused(lambda: wire.learners.CreateLearner(request, timeout=10))
    assert error.reason == "INVALID_SPEC"
    assert len(error.message) < 700
    assert error.message.isprintable()


def test_an_error_with_very_many_violations_arrives(wire, refused, learner_id):
    error = refused(lambda: wire.create(learner_id, network=NETWORK | {"hidden": [0] * 2000}))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC")
    assert "network.hidden[0]" in error.fields
    assert "more" in error.fields["…"]


@pytest.mark.parametrize("name", ["x" * 10**6, "learners/" + "é" * 10**6, "learners/\0\n", "\r\n" * 1000])
def test_a_name_is_repeated_briefly_and_printably(wire, refused, name):
    error = refused(lambda: wire.learners.GetLearner(learner_service_pb2.GetLearnerRequest(name=name)))
    assert error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert error.reason
    assert len(error.message) < 300
    assert error.message.isprintable()


def test_a_rejection_is_brief(wire, learner_id):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    stream.send_batch(1, FEATURES, LABELS, task="\0" * 100)
    rejection = stream.rejection()
    assert len(rejection.field_violations[0].description) < 300
    assert rejection.message.isprintable()


JUNK = b"\xff\xff\xff"


def test_a_malformed_request_is_named(wire, refused):
    call = wire.channel.unary_unary("/cbp.v1.LearnerService/GetLearner")
    error = refused(lambda: call(JUNK))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "not a cbp.v1.GetLearnerRequest message" in error.message


def test_a_malformed_watch_is_named(wire, refused):
    call = wire.channel.unary_stream("/cbp.v1.LearnerService/WatchLearners")
    error = refused(lambda: list(call(JUNK)))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "cbp.v1.WatchLearnersRequest" in error.message


@pytest.mark.parametrize("messages_before", [0, 1])
def test_a_malformed_stream_message_is_named(wire, learner_id, refused, messages_before):
    wire.create(learner_id)
    opening = training_service_pb2.OpenStream(learner=f"learners/{learner_id}", producer="tests")
    open_stream = training_service_pb2.TrainRequest(open=opening).SerializeToString()
    call = wire.channel.stream_stream("/cbp.v1.TrainingService/Train")
    error = refused(lambda: list(call(iter([*[open_stream] * messages_before, JUNK]))))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "cbp.v1.TrainRequest" in error.message


def test_a_gap_names_the_expected_sequence(wire, learner_id):
    wire.create(learner_id)
    stream = wire.stream(learner_id)

    stream.send_batch(5, FEATURES, LABELS)

    rejection = stream.rejection()
    assert rejection.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert (rejection.reason, rejection.expected_sequence) == ("SEQUENCE_GAP", 1)
    stream.send_batch(1, FEATURES, LABELS)
    assert stream.results(1)[0].sequence == 1


def test_a_sequence_below_one_is_a_gap(wire, learner_id):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    stream.send_batch(0, FEATURES, LABELS)
    assert stream.rejection().reason == "SEQUENCE_GAP"


def test_a_sequence_with_another_payload_already_exists(wire, learner_id):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    stream.send_batch(1, FEATURES, LABELS)
    assert stream.results(1)[0].step == 2

    stream.send_batch(1, FEATURES + 1, LABELS)

    rejection = stream.rejection()
    assert rejection.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert rejection.reason == "SEQUENCE_REUSED"
    assert wire.get(learner_id).progress.step == 2


def test_the_first_message_must_open_the_stream(wire, refused):
    batch = training_service_pb2.TrainRequest(batch=training_service_pb2.TrainBatch(sequence=1))
    error = refused(lambda: list(wire.training.Train(iter([batch]))))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "STREAM_PROTOCOL")
    assert "open" in error.message


def test_a_stream_opens_once(wire, learner_id, explain):
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    opening = training_service_pb2.OpenStream(learner=f"learners/{learner_id}", producer="tests")
    stream.send(training_service_pb2.TrainRequest(open=opening))
    assert explain(stream.failure()).reason == "STREAM_PROTOCOL"


def test_a_message_holds_a_batch_and_not_too_many(wire, learner_id, explain):
    wire.create(learner_id)
    batch = batch_message(1, FEATURES, LABELS)

    empty = wire.stream(learner_id)
    empty.send_together([])
    error = explain(empty.failure())
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "STREAM_PROTOCOL")
    assert "`batch` or `batches`" in error.message

    full = wire.stream(learner_id)
    most = full.opened.max_batches_per_message
    full.send_together([batch] * (most + 1))
    error = explain(full.failure())
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "STREAM_PROTOCOL")
    assert f"more than {most} batches" in error.message
    assert wire.get(learner_id).progress.step == 0


@pytest.mark.parametrize("producer", ["", "x" * 129, "a\nb"])
def test_a_producer_needs_a_printable_name(wire, learner_id, refused, producer):
    wire.create(learner_id)
    error = refused(lambda: wire.stream(learner_id, producer))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "open.producer" in error.fields


def test_unknown_learners_are_not_found_everywhere(wire, refused):
    name = "learners/nobody"
    calls = [
        lambda: wire.get("nobody"),
        lambda: wire.delete("nobody"),
        lambda: wire.predict("nobody", FEATURES),
        lambda: wire.stream("nobody"),
        lambda: wire.learners.UpdateLearner(
            learner_service_pb2.UpdateLearnerRequest(learner=learner_pb2.Learner(name=name))
        ),
        lambda: wire.learners.GetPlasticity(learner_service_pb2.GetPlasticityRequest(name=name)),
        lambda: next(wire.learners.WatchLearners(learner_service_pb2.WatchLearnersRequest(names=[name]))),
    ]
    for call in calls:
        error = refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "LEARNER_NOT_FOUND")
        assert error.metadata == {"learner": "nobody"}


@pytest.mark.parametrize("name", ["", "clicks", "learners/", "models/clicks"])
def test_a_name_of_another_form_is_invalid(wire, refused, name):
    error = refused(lambda: wire.learners.GetLearner(learner_service_pb2.GetLearnerRequest(name=name)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "learners/{learner_id}" in error.fields["name"]


@pytest.mark.parametrize("learner_id", ["", "Clicks", "9lives", "a_b", "ends-", "x" * 64, "../etc"])
def test_a_learner_id_of_another_form_is_invalid(wire, refused, learner_id):
    error = refused(lambda: wire.create(learner_id))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "a-z" in error.fields["learner_id"]


def test_a_name_is_given_once(wire, refused, learner_id):
    first = wire.create(learner_id)
    error = refused(lambda: wire.create(learner_id, batch_size=2))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "LEARNER_EXISTS")
    assert wire.get(learner_id) == first


BAD_SPECS = {
    "no network": ({"network": None}, "network"),
    "no width": (
        {"network": {"kind": "mlp", "in_features": 4, "hidden": [8, 0], "out_features": 3}},
        "network.hidden[1]",
    ),
    "negative rate": ({"optimizer": {"kind": "sgd", "lr": -1.0}}, "optimizer.lr"),
    "rate beyond float32": ({"optimizer": {"kind": "sgd", "lr": 1e300}}, "optimizer.lr"),
    "momentum for adam": ({"optimizer": {"kind": "adam", "lr": 0.1, "momentum": 0.9}}, "optimizer.momentum"),
    "no such layer": ({"resets": {"layers": [7]}}, "resets.layers"),
    "rate above one": ({"resets": {"replacement_rate": 1.5}}, "resets.replacement_rate"),
    "methods that clash": ({"methods": [{"kind": "redo"}]}, "methods[0].kind"),
    "a method of a wrong setting": ({"methods": [{"kind": "l2_init", "strength": 0}]}, "methods[0].strength"),
    "negative batch": ({"batch_size": -1}, "batch_size"),
}


@pytest.mark.parametrize(("changes", "field"), BAD_SPECS.values(), ids=BAD_SPECS)
def test_a_wrong_spec_names_its_field(wire, refused, learner_id, changes, field):
    error = refused(lambda: wire.create(learner_id, **changes))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SPEC")
    assert any(name.startswith(field) for name in error.fields), error.fields
    assert refused(lambda: wire.get(learner_id)).code is grpc.StatusCode.NOT_FOUND


def test_an_enum_value_from_the_future_is_named(wire, refused, learner_id):
    spec = spec_pb2.LearnerSpec()
    spec.network.mlp.in_features, spec.network.mlp.out_features = 4, 3
    spec.network.mlp.hidden.append(8)
    spec.network.mlp.activation = 99
    spec.loss.kind = spec_pb2.LOSS_KIND_CROSS_ENTROPY
    spec.optimizer.kind = spec_pb2.OPTIMIZER_KIND_SGD
    spec.optimizer.lr = 0.1
    request = learner_service_pb2.CreateLearnerRequest(learner_id=learner_id, learner=learner_pb2.Learner(spec=spec))
    assert "network.activation" in refused(lambda: wire.learners.CreateLearner(request)).fields


@pytest.mark.parametrize(
    ("features", "text"),
    [(np.zeros((1, 5)), "[N, 4]"), (np.full((1, 4), np.nan), "[0, 0]"), (np.zeros(4), "[N, 4]")],
    ids=["shape", "value", "rank"],
)
def test_predict_names_what_is_wrong(wire, refused, learner_id, features, text):
    wire.create(learner_id)
    error = refused(lambda: wire.predict(learner_id, features))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_BATCH")
    assert text in error.fields["features"]


def test_sending_without_credit_ends_the_stream(start_server, connect, learner_id, explain):
    wire = connect(start_server("--stream-credits", "2").grpc_target)
    wire.create(learner_id)
    stream = wire.stream(learner_id)
    assert stream.credits == 2

    many = np.zeros((2000, 4), np.float32), np.zeros(2000, np.int64)  # long enough for the others to pile up
    for sequence in range(1, 9):
        stream.send_batch(sequence, *many)

    error = explain(stream.failure())
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CREDITS_EXCEEDED")


def test_a_full_server_says_so(start_server, connect, refused):
    wire = connect(start_server("--max-learners", "1").grpc_target)
    wire.create("one")
    error = refused(lambda: wire.create("two"))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert "--max-learners" in error.message
