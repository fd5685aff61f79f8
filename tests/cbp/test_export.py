"""What is exported predicts what the learner predicts."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cbp import Batch, ContinualBackprop, FormatError, Learner, LearnerSnapshot, LearnerSpec, SnapshotError
from cbp.export import FORMATS, ONNX_OPSET, main, to_module, to_onnx, to_torch_export
from cbp.spec.learner_spec import Activation

MakeSpec = Callable[..., LearnerSpec]
MakeBatch = Callable[..., Batch]

ACTIVATIONS = get_args(Activation)
COUNTS = (1, 2, 7)


@pytest.fixture(params=ACTIVATIONS)
def learner(request: pytest.FixtureRequest, make_spec: MakeSpec, make_batch: MakeBatch) -> Learner:
    """One that has learnt enough to have weights and biases of its own."""
    spec = make_spec(network__activation=request.param)
    trained = Learner(spec)
    trained.train(make_batch(spec, 60))
    return trained


@pytest.fixture
def snapshot(make_spec: MakeSpec) -> LearnerSnapshot:
    return Learner(make_spec()).snapshot()


def features(count: int) -> np.ndarray:
    return (3 * np.random.default_rng(count).normal(size=(count, 6))).astype(np.float32)


def assert_predicts_alike(learner: Learner, predict: Callable[[np.ndarray], np.ndarray]) -> None:
    for count in COUNTS:
        np.testing.assert_allclose(predict(features(count)), learner.predict(features(count)), rtol=1e-5, atol=1e-5)


def test_module(learner: Learner) -> None:
    random = torch.get_rng_state()
    snapshot = learner.snapshot()
    module = to_module(snapshot)
    assert torch.equal(torch.get_rng_state(), random), "no random number is drawn"
    assert_predicts_alike(learner, lambda inputs: module(torch.from_numpy(inputs)).detach().numpy())
    for name, parameter in module.named_parameters():
        stored = snapshot.tensors[f"parameters.{name}"]
        assert torch.equal(parameter, stored)
        assert parameter.data_ptr() != stored.data_ptr()


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"methods": [{"kind": "l2_init", "strength": 0.01}]}, 1e-5), ({"precision": "bfloat16"}, 0.1)],
)
def test_a_perceptron_that_the_engine_for_modules_trains_is_exported_like_others(
    changes: dict[str, Any], tolerance: float, make_spec: MakeSpec, make_batch: MakeBatch
) -> None:
    learner = Learner(make_spec(**changes), engine="auto")
    assert learner.engine == "module"
    learner.train(make_batch(learner.spec, 60))
    module = to_module(learner.snapshot())
    inputs = features(9)
    outputs = module(torch.from_numpy(inputs)).detach().numpy()
    np.testing.assert_allclose(outputs, learner.predict(inputs), atol=tolerance * np.abs(outputs).max())
    assert {name.partition(".")[0] for name, _ in module.named_parameters()} == set(learner.spec.layer_names)
    session = onnxruntime.InferenceSession(to_onnx(learner.snapshot()))
    np.testing.assert_allclose(session.run(None, {"features": inputs})[0], outputs, rtol=1e-5, atol=1e-5)


def test_a_module_can_be_trained_on(learner: Learner, make_batch: MakeBatch) -> None:
    module = to_module(learner.snapshot())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    resets = ContinualBackprop(module, optimizer, replacement_rate=0.05, maturity_threshold=5)
    batch = make_batch(learner.spec, 32)
    inputs, labels = torch.from_numpy(batch.features), torch.from_numpy(batch.targets)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
        resets.step()
    assert sum(resets.replacements.values()) > 5


def test_onnx(learner: Learner) -> None:
    data = to_onnx(learner.snapshot())
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("features", ["examples", 6], "tensor(float)")
    assert (given.name, given.shape, given.type) == ("outputs", ["examples", 3], "tensor(float)")
    assert_predicts_alike(learner, lambda inputs: session.run(None, {"features": inputs})[0])
    model = onnx.load_from_string(data)
    assert [entry.version for entry in model.opset_import] == [ONNX_OPSET]
    assert {tensor.name for tensor in model.graph.initializer} == {
        name for name, _ in to_module(learner.snapshot()).named_parameters()
    }
    assert data == to_onnx(learner.snapshot())


def test_torch_export(learner: Learner) -> None:
    module = torch.export.load(io.BytesIO(to_torch_export(learner.snapshot()))).module()
    assert_predicts_alike(learner, lambda inputs: module(torch.from_numpy(inputs)).detach().numpy())


@pytest.mark.parametrize("export", [to_module, *FORMATS.values()])
def test_a_snapshot_that_lacks_parameters_is_refused(export: Callable[..., object], snapshot: LearnerSnapshot) -> None:
    del snapshot.tensors["parameters.output.bias"]
    with pytest.raises(SnapshotError, match=r"parameters\.output\.bias"):
        export(snapshot)


def test_a_network_too_large_for_onnx_is_refused(snapshot: LearnerSnapshot) -> None:
    snapshot.metadata["spec"]["network"]["hidden"] = [30_000, 30_000]
    with pytest.raises(FormatError, match=r"2 GiB.*safetensors"):
        to_onnx(snapshot)


def run(export_format: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-m", "cbp.export", export_format]
    return subprocess.run(command, input=data, capture_output=True, timeout=120, check=False)


def test_the_command_writes_the_network(make_spec: MakeSpec) -> None:
    learner = Learner(make_spec())
    data = learner.snapshot().to_bytes()
    onnx_run = run("onnx", data)
    assert (onnx_run.returncode, onnx_run.stdout) == (0, to_onnx(learner.snapshot())), onnx_run.stderr
    program_run = run("torch-export", data)
    assert program_run.returncode == 0, program_run.stderr
    module = torch.export.load(io.BytesIO(program_run.stdout)).module()
    assert_predicts_alike(learner, lambda inputs: module(torch.from_numpy(inputs)).detach().numpy())


def test_the_command_says_what_is_wrong(snapshot: LearnerSnapshot) -> None:
    damaged = run("onnx", snapshot.to_bytes()[:-1])
    assert (damaged.returncode, damaged.stdout) == (1, b"")
    assert b"The snapshot is damaged" in damaged.stderr
    assert b"Traceback" not in damaged.stderr


def test_the_command_names_the_package_that_it_lacks(
    snapshot: LearnerSnapshot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(snapshot.to_bytes())))
    assert main(["onnx"]) == os.EX_UNAVAILABLE
    assert "pip install 'cbp[export]'" in capsys.readouterr().err


def test_formats_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pickle"])
    assert "torch-export" in capsys.readouterr().err
