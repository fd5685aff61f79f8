"""Networks of every kind on a real server: the shapes of their examples on the wire, and what a kill leaves of them."""

import os

import httpx
import numpy as np
import pytest
from network_kinds import METHODS, MIXED_PRECISION, NETWORKS, OPTIMIZERS, examples, install_architectures, plain_spec
from one_thread import one_thread

from cbp import Batch, Learner, LearnerSnapshot, LearnerSpec
from cbp_client import CbpClientError, Client, InvalidArgument
from cbp_proto import decode_tensor, from_plain, to_plain
from cbp_proto.v1 import learner_pb2, learner_service_pb2, spec_pb2

__all__ = ["one_thread"]


def identifier(name):
    return name.lower().replace(" ", "-")


def outputs_of(wire, spec, name):
    return decode_tensor(wire.predict(identifier(name), examples(spec, 5, seed=9)[0]).outputs)


@pytest.mark.timeout(300)
def test_learners_of_every_kind_and_method_survive_a_kill(start_server, connect):
    server = start_server("--checkpoint-interval", "1000000")
    wire = connect(server.grpc_target)
    plain = {name: plain_spec(name, optimizer=OPTIMIZERS["adam"]) for name in NETWORKS}
    plain |= {name: plain_spec("convnet", **changes) for name, changes in (METHODS | MIXED_PRECISION).items()}
    specs = {name: LearnerSpec.parse(spec) for name, spec in plain.items()}
    locals_ = {name: Learner(spec, engine="auto") for name, spec in specs.items()}
    for name, spec in specs.items():
        message = learner_pb2.Learner(spec=from_plain(spec.to_plain(), spec_pb2.LearnerSpec))
        created = wire.learners.CreateLearner(
            learner_service_pb2.CreateLearnerRequest(learner_id=identifier(name), learner=message)
        )
        assert created.engine == "module"
        described = spec.to_plain() | {"network": to_plain(created.spec)["network"]}
        assert LearnerSpec.parse(described) == spec

    def teach(seed):
        for name, spec in specs.items():
            stream = wire.stream(identifier(name))
            for offset, sequence in enumerate(range(stream.opened.next_sequence, stream.opened.next_sequence + 2)):
                batch = examples(spec, 10, seed=seed + offset)
                stream.send_batch(sequence, *batch)
                locals_[name].train(Batch.validate(spec, *batch))
            stream.results(2)
            stream.close()

    def check():
        found = {name: outputs_of(wire, spec, name) for name, spec in specs.items()}
        for name, spec in specs.items():
            expected = locals_[name].predict(examples(spec, 5, seed=9)[0])
            np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)
            assert dict(wire.get(identifier(name)).progress.replacements) == locals_[name].progress.replacements
        return found

    teach(1)
    wire.learners.CreateCheckpoint(learner_service_pb2.CreateCheckpointRequest(parent="learners/resnet"))
    teach(3)
    before = check()
    server.kill()
    server.start()
    wire = connect(server.grpc_target)
    after = check()  # learnt again from the journal, some from a checkpoint on
    for name, outputs in before.items():
        np.testing.assert_array_equal(after[name], outputs, err_msg=name)
    teach(5)
    check()
    assert server.stop() == 0
    server.start()
    wire = connect(server.grpc_target)
    check()


def test_images_and_tokens_from_the_client(server, learner_id, tmp_path):
    with Client(server.grpc_target) as client:
        for number, name in enumerate(["convnet", "transformer of tokens", "mlp with columns"]):
            plain = plain_spec(name)
            spec = LearnerSpec.parse(plain)
            learner = client.create_learner(f"{learner_id[:50]}-{number}", **plain)
            features, labels = examples(spec, 12)
            with learner.stream(producer="tests") as stream:
                stream.send(features, labels)
            assert learner.predict(features).outputs.shape == (12, 3)
            with pytest.raises(InvalidArgument, match="shape"):
                learner.predict(features.reshape(1, -1))
            [sample] = learner.plasticity(fresh=True)
            assert [layer.layer for layer in sample.layers] == list(spec.layer_names)
            assert learner.reset_units(0, 0.5)["hidden_0"] > 0
            learner.export(tmp_path / "learner.safetensors")
            data = (tmp_path / "learner.safetensors").read_bytes()
            assert Learner.restore(LearnerSnapshot.from_bytes(data), engine="auto").progress.step == 4
            copy = learner.fork(f"{learner_id[:50]}-{number}-copy")
            np.testing.assert_array_equal(copy.predict(features).outputs, learner.predict(features).outputs)


def test_an_operators_architecture_is_served(start_server, tmp_path, monkeypatch):
    install_architectures(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    server = start_server("--max-parameters", "400")
    network = {"kind": "registered", "name": "small", "shape": [3, 4], "out_features": 2, "settings": {"units": 10}}
    plain = {"loss": "mse", "optimizer": {"kind": "sgd", "lr": 0.01}, "batch_size": 2}
    random = np.random.default_rng(0)
    features, targets = random.normal(size=(10, 3, 4)), random.normal(size=(10, 2))
    with Client(server.grpc_target) as client:
        learner = client.create_learner("pictures", network=network, **plain)
        with learner.stream(producer="tests") as stream:
            stream.send(features, targets)
        before = learner.predict(features).outputs
        for name, settings, field in (("small", {"units": 100}, "settings"), ("other", {}, "name")):
            wrong = network | {"name": name, "settings": settings}
            with pytest.raises(InvalidArgument) as refused:
                client.create_learner("wrong", network=wrong, **plain)
            assert [violation.field for violation in refused.value.violations] == [f"network.{field}"]
    server.kill()
    server.start()
    with Client(server.grpc_target) as client:
        np.testing.assert_array_equal(client.get_learner("pictures").predict(features).outputs, before)


def test_learners_whose_architecture_is_gone_wait_for_it(start_server, tmp_path, monkeypatch, small_spec):
    """The server starts, the other learners learn, and with the architecture back nothing is missing."""
    install_architectures(tmp_path)
    network = {"kind": "registered", "name": "small", "shape": [3, 4], "out_features": 2, "settings": {"units": 10}}
    random = np.random.default_rng(0)
    features, targets = random.normal(size=(10, 3, 4)), random.normal(size=(10, 2))
    names = ("journaled", "saved")
    with monkeypatch.context() as changed:
        changed.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        server = start_server()
        with Client(server.grpc_target) as client:
            for name in names:
                learner = client.create_learner(
                    name, network=network, loss="mse", optimizer={"kind": "sgd", "lr": 0.01}, batch_size=2
                )
                with learner.stream(producer="tests") as stream:
                    stream.send(features, targets)
            learner.checkpoint()
            before = [client.get_learner(name).predict(features).outputs for name in names]
        server.kill()
    server.start()
    with Client(server.grpc_target) as client:
        for name in names:
            with pytest.raises(CbpClientError, match="No architecture 'small' is installed here"):
                client.get_learner(name).predict(features)
        assert client.create_learner("clicks", **small_spec).predict(np.zeros((1, 4))).step == 0
    unreadable = httpx.get(f"{server.http_url}/v1/server").json()["unreadable"]
    assert unreadable.keys() == set(names)
    assert all("No architecture 'small' is installed here" in reason for reason in unreadable.values())
    assert server.stop() == 0
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    server.start()
    with Client(server.grpc_target) as client:
        for name, outputs in zip(names, before, strict=True):
            np.testing.assert_array_equal(client.get_learner(name).predict(features).outputs, outputs)
