"""What is counted from the record of a network is what the module has that is built from it."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cbp.architectures.building import assemble, found_units
from cbp.spec.network_spec import AnyNetwork, NetworkSpec

_ADAPTER: TypeAdapter[AnyNetwork] = TypeAdapter(NetworkSpec)
_few = st.integers(1, 6)
_units = st.lists(_few, min_size=1, max_size=3)
_activations = st.sampled_from(["relu", "tanh", "gelu", "identity"])


@st.composite
def _columns(draw: st.DrawFn, in_features: int, *, embedded: bool) -> list[dict[str, int]]:
    places = draw(st.sets(st.integers(0, in_features - 1), max_size=in_features))
    columns = []
    for place in sorted(places):
        dimension = draw(st.integers(0, 4)) if embedded else 0
        size = draw(st.sampled_from(["cardinality", "hash_buckets"]))
        columns.append({"column": place, size: draw(_few), "dimension": dimension})
    return columns


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["mlp", "linear", "convnet", "resnet", "transformer"]))
    normalize = draw(st.booleans())
    network: dict[str, Any] = {"kind": kind, "out_features": draw(_few), "inputs": {"normalize": normalize}}
    if kind in ("mlp", "linear"):
        network["in_features"] = draw(_few)
        network["inputs"]["columns"] = draw(_columns(network["in_features"], embedded=True))
    if kind == "mlp":
        network |= {
            "hidden": draw(_units),
            "activation": draw(st.one_of(_activations, st.just("crelu"))),
            "normalization": draw(st.sampled_from(["none", "layer"])),
        }
    if kind in ("convnet", "resnet"):
        network |= {
            "in_channels": draw(_few), "height": draw(st.integers(4, 9)), "width": draw(st.integers(4, 9)),
            "channels": draw(st.lists(_few, min_size=1, max_size=2)), "activation": draw(_activations),
            "normalization": draw(st.sampled_from(["none", "batch", "group"])),
        }  # fmt: skip
    if kind == "convnet":
        network |= {
            "kernel_size": draw(st.sampled_from([1, 3])),
            "pooling": draw(st.integers(1, 2)),
            "hidden": draw(st.lists(_few, max_size=2)),
        }
    if kind == "resnet":
        network["blocks"] = draw(st.integers(1, 2))
    if kind == "transformer":
        heads = draw(st.integers(1, 2))
        network |= {
            "input": draw(st.sampled_from(["tokens", "sequence", "tabular"])), "heads": heads,
            "width": heads * draw(_few), "depth": draw(st.integers(1, 2)), "feed_forward": draw(_few),
            "activation": draw(_activations),
        }  # fmt: skip
        if network["input"] == "tokens":
            network |= {"length": draw(_few), "vocabulary": draw(_few), "inputs": {}}
        else:
            network["in_features"] = draw(_few)
        if network["input"] == "sequence":
            network["length"] = draw(_few)
        if network["input"] == "tabular":
            network["inputs"]["columns"] = draw(_columns(network["in_features"], embedded=False))
    return network


def _passed(network: AnyNetwork, module: nn.Module, examples: int) -> tuple[int, int]:
    """Values that layers give, those that only hand on left out, and multiplications, for one example."""
    values = 0

    def count(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal values
        values += 0 if isinstance(layer, nn.Identity | nn.Flatten) else output.numel()

    for layer in module.modules():
        if not any(True for _ in layer.children()):
            layer.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(examples, *network.input_shape, device="meta"))
    return values // examples - network.out_features, counter.get_total_flops() // 2 // examples


@settings(max_examples=150, deadline=None)
@given(networks())
def test_counts_are_those_of_the_module(plain: dict[str, Any]) -> None:
    network = _ADAPTER.validate_python(plain)
    with torch.device("meta"):
        module = assemble(network)
    profile = network.profile
    assert profile.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert profile.hidden_units == tuple(group.units for group in found_units(network, module).groups)
    values, multiplications = _passed(network, module, 2)
    assert profile.multiplications == max(multiplications, profile.parameters)
    if not network.is_plain:  # compiled code keeps an activation in the place of what it is of
        # Sums, products and encoded columns are no layers of their own.
        assert values <= profile.activation_values <= 2.5 * values + 40
