"""A learner's network for use elsewhere, without the learner: as a PyTorch module, an ONNX model, an exported program.

    python -m cbp.export onnx < snapshot.safetensors > network.onnx

The network takes `features` [N, …] float32 and gives raw `outputs` [N, C], as `Learner.predict` does: logits, or
predicted values. ONNX needs `pip install 'cbp[export]'`.
"""

import argparse
import io
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cbp.activations import NONLINEARITIES
from cbp.architectures.building import build
from cbp.engines.names import needs_module
from cbp.errors import CbpError, FormatError
from cbp.networks import layer_shapes
from cbp.serialization import LearnerSnapshot, take_tensor
from cbp.spec.learner_spec import Activation, LearnerSpec

if TYPE_CHECKING:
    import onnx

ONNX_OPSET = 20
"""The first that has Gelu; runtimes read it since 2023."""
_OTHER_FORMATS = "torch.export holds the network, and safetensors the whole learner"
_LARGEST_PROTOBUF_BYTES = 2**31 - 2**20  # less some room for names

_ONNX_OPERATORS: Mapping[Activation, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "relu": ("Relu", {}),
        "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
        "elu": ("Elu", {"alpha": 1.0}),
        "selu": ("Selu", {}),
        "gelu": ("Gelu", {}),
        "tanh": ("Tanh", {}),
        "sigmoid": ("Sigmoid", {}),
    }
)
"""The operators that are activations of their own; silu is x · Sigmoid(x), and identity is none."""


def to_module(snapshot: LearnerSnapshot) -> nn.Module:
    """The network in memory of its own. Of a plain multilayer perceptron, an `nn.Sequential` of the layers `hidden_0`,
    `hidden_0_activation`, …, `output`; of any other network, a module with its `inputs` and its `body`, in evaluation
    mode. It computes in float32, whatever the learner's precision.

    Raises `SnapshotError` if the snapshot lacks parameters or buffers.
    """
    spec = snapshot.read_spec()
    return _plain_module(snapshot, spec) if spec.network.is_plain else _built_module(snapshot, spec)


def _built_module(snapshot: LearnerSnapshot, spec: LearnerSpec) -> nn.Module:
    module = build(spec.network, spec.seed)
    parameters = {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, value in module.state_dict().items():
            part = "parameters" if name in parameters else "buffers"
            value.copy_(take_tensor(snapshot.tensors, f"{part}.{name}", value.shape, value.dtype))
    return module.eval()


def _plain_module(snapshot: LearnerSnapshot, spec: LearnerSpec) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    prefix = "parameters.body" if needs_module(spec) else "parameters"
    for name, (out, into) in zip(spec.layer_names, layer_shapes(spec.mlp), strict=True):
        # The usual first values would draw random numbers.
        linear: nn.Linear = nn.utils.skip_init(nn.Linear, into, out)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            linear.weight.copy_(take_tensor(snapshot.tensors, f"{prefix}.{name}.weight", (out, into), torch.float32))
            linear.bias.copy_(take_tensor(snapshot.tensors, f"{prefix}.{name}.bias", (out,), torch.float32))
        layers[name] = linear
        if name != spec.layer_names[-1]:
            layers[f"{name}_activation"] = NONLINEARITIES[spec.mlp.plain_activation].module()
    return nn.Sequential(layers)


def to_torch_export(snapshot: LearnerSnapshot) -> bytes:
    """A program for `torch.export.load`, for any number of examples. Raises `SnapshotError`."""
    module = to_module(snapshot).eval()
    example = torch.zeros(2, *snapshot.read_spec().network.input_shape)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("examples")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def to_onnx(snapshot: LearnerSnapshot) -> bytes:
    """An ONNX model with input `features` and output `outputs`, for any number of examples.

    Raises `FormatError` if the network is no plain multilayer perceptron, or too large; `SnapshotError`; `ImportError`
    without the package onnx.
    """
    spec = snapshot.read_spec()
    if not spec.network.is_plain:
        kind = "mlp with its options" if spec.network.kind == "mlp" else spec.network.kind
        raise FormatError(
            f"ONNX is written for plain multilayer perceptrons only, not for this {kind}; {_OTHER_FORMATS}"
        )
    if 4 * spec.parameter_count > _LARGEST_PROTOBUF_BYTES:
        raise FormatError(f"The network is too large for an ONNX file, which holds 2 GiB at most; {_OTHER_FORMATS}")
    import onnx  # optional, and not needed for the other formats

    module = to_module(snapshot)
    nodes: list[onnx.NodeProto] = []
    value = "features"
    for name in spec.layer_names[:-1]:
        nodes.append(_gemm(value, name, name))
        nodes.extend(_activation_nodes(spec.mlp.plain_activation, name))
        value = nodes[-1].output[0]
    nodes.append(_gemm(value, spec.layer_names[-1], "outputs"))
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        inputs=[onnx.helper.make_tensor_value_info("features", float32, ["examples", spec.mlp.in_features])],
        outputs=[onnx.helper.make_tensor_value_info("outputs", float32, ["examples", spec.network.out_features])],
        initializer=[
            onnx.numpy_helper.from_array(parameter.detach().numpy(), name)
            for name, parameter in module.named_parameters()
        ],
    )
    opset = onnx.helper.make_opsetid("", ONNX_OPSET)
    # The oldest version of the file format that will do, so that runtimes older than the package onnx read it.
    version = onnx.helper.find_min_ir_version_for([opset])
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="cbp")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _gemm(value: str, layer: str, result: str) -> "onnx.NodeProto":
    import onnx

    return onnx.helper.make_node("Gemm", [value, f"{layer}.weight", f"{layer}.bias"], [result], name=layer, transB=1)


def _activation_nodes(activation: Activation, value: str) -> "list[onnx.NodeProto]":
    import onnx

    name = f"{value}_activation"
    if activation == "identity":
        return []
    if activation == "silu":
        return [
            onnx.helper.make_node("Sigmoid", [value], [f"{name}_gate"], name=f"{name}_gate"),
            onnx.helper.make_node("Mul", [value, f"{name}_gate"], [name], name=name),
        ]
    operator, attributes = _ONNX_OPERATORS[activation]
    return [onnx.helper.make_node(operator, [value], [name], name=name, **attributes)]


FORMATS: Mapping[str, Callable[[LearnerSnapshot], bytes]] = MappingProxyType(
    {"onnx": to_onnx, "torch-export": to_torch_export}
)
"""What the command line makes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a snapshot's bytes on standard input, writes the network on standard output.

    Returns 69 (`os.EX_UNAVAILABLE`) if the format is not to be had for this network or in this installation, 1 if it
    failed otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cbp.export", description="Turns a learner's snapshot on standard input into a network."
    )
    parser.add_argument("format", choices=FORMATS, help="what to write on standard output")
    export = FORMATS[parser.parse_args(arguments).format]
    try:
        with redirect_stdout(sys.stderr):  # a library that has something to say would damage the file
            data = export(LearnerSnapshot.from_bytes(sys.stdin.buffer.read()))
    except (CbpError, ImportError) as error:
        hint = f"; pip install 'cbp[export]', or: {_OTHER_FORMATS}" if isinstance(error, ImportError) else ""
        print(f"{error}{hint}", file=sys.stderr)
        return os.EX_UNAVAILABLE if isinstance(error, FormatError | ImportError) else 1
    sys.stdout.buffer.write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
