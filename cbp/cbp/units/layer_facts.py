"""What each layer of `torch.nn` does to the units it is given, and which ones it makes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cbp.activations import NONLINEARITIES
from cbp.spec.learner_spec import Activation
from cbp.units import features as at
from cbp.units.features import Features, Part, UnknownPlacesError
from cbp.units.unit_facts import DATA, Atoms, Computed, Kept, Read, Tap, UnitFacts

Heir = tuple[nn.Module, str, float]

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({name: name for name in NONLINEARITIES} | {"relu6": "relu"})
_NO_ACTIVATIONS = frozenset({"identity", "contiguous", "clone", "detach", "float", "to", "type", "type_as"})


@dataclass(frozen=True)
class Call:
    """One use of a layer in a module's code."""

    facts: UnitFacts
    layer: Any
    value: Features | None
    """Its input; None if no layer's units are in it."""
    follower: nn.Module | None = None
    """The layer that alone reads its output, and nothing else; None if there is no such layer."""
    source: object = None
    """Stands for its input tensor."""


_forward = attrgetter("forward")
_feed_forward = attrgetter("_ff_block")


def known_layer(layer: nn.Module) -> type[nn.Module] | None:
    """The class by whose rules a layer goes: its own or, if it computes the same, the one that it is derived from."""
    for kind in type(layer).__mro__:
        if kind in LAYERS or kind in PACKAGES:
            return kind if _forward(type(layer)) is _forward(kind) else None
    return None


def decide_activation(value: Features, name: str) -> Features:
    """The features behind an operation on single elements; for the layers right before it, their activation."""
    if name in _NO_ACTIVATIONS or "dropout" in name:
        return value
    for part in value.undecided:
        part.activation = _ACTIVATIONS.get(name, "identity")
    return replace(value, undecided=())


def spatial_axes(name: str) -> int:
    """2 for a name such as MaxPool2d."""
    found = re.search(r"([123])d$", name)
    return int(found.group(1)) if found else 0


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise UnknownPlacesError(problem)


def _at_channels(value: Features) -> bool:
    """Whether the units lie along axis 1, where convolutions and most normalisations have the channels."""
    return value.axis == (-1 if value.rank is None else 1 - value.rank)


def _columns(value: Features | None, inputs: int) -> Atoms:
    return np.full(inputs, DATA) if value is None else value.resolved(inputs)


def _made(
    facts: UnitFacts, layer: nn.Module, rows: Atoms, value: Features | None, axis: int, rank: int | None
) -> Features:
    computed = facts.compute(Computed(layer=layer, weight="weight", bias="bias", rows=rows))
    given = () if value is None else value.undecided
    return Features((Part(computed.rows),), axis, rank, (*given, computed))


def _new_rows(call: Call, count: int) -> Atoms:
    known = call.facts.computed_by(call.layer, "weight")
    return call.facts.new_atoms(count) if known is None else known.rows


def heir_of(layer: Any, follower: nn.Module | None) -> Heir | None:
    """What may take over the mean that a layer no longer reads: its bias, or the running mean of a batch normalisation
    behind it, which is subtracted."""
    if layer.bias is not None:
        return (layer, "bias", 1.0)
    mean = follower.running_mean if isinstance(follower, _BatchNorm) else None
    fits = mean is not None and len(mean) == len(layer.weight)
    return (follower, "running_mean", -1.0) if follower is not None and fits else None


def read_by(layer: Any, axis: int, columns: Atoms, groups: int, source: object, follower: nn.Module | None) -> Read:
    """A linear layer or convolution as a reader."""
    padding = getattr(layer, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else padding == "same"
    return Read(
        layer=layer,
        weight="weight",
        groups=groups,
        columns=columns,
        tap=Tap(layer=layer, side="input", axis=axis, atoms=columns, value=source),
        heir=heir_of(layer, follower),
        inexact="but at borders padded with zeros" if padded and layer.padding_mode == "zeros" else None,
    )


def _linear(call: Call) -> Features:
    layer, value = call.layer, call.value
    if value is not None:
        _require(value.axis == -1, "it does not lie along the axis that a linear layer reads")
    columns = _columns(value, layer.in_features)
    call.facts.reads(read_by(layer, -1, columns, 1, call.source, call.follower))
    rank = None if value is None else value.rank
    return _made(call.facts, layer, _new_rows(call, layer.out_features), None, -1, rank)


def _convolution(call: Call) -> Features:
    layer, value = call.layer, call.value
    rank = layer.weight.dim()
    if value is not None:
        _require(value.axis == 1 - rank, "its units are not the channels that a convolution reads")
    columns = _columns(value, layer.in_channels)
    if value is not None and layer.groups == layer.in_channels > 1 and not (columns == DATA).any():
        return _depthwise(call, replace(value, parts=(Part(columns),)), columns)
    call.facts.reads(read_by(layer, 1 - rank, columns, layer.groups, call.source, call.follower))
    return _made(call.facts, layer, _new_rows(call, layer.out_channels), None, 1 - rank, rank)


def _depthwise(call: Call, value: Features, columns: Atoms) -> Features:
    """Each output sees one channel, and so is that unit still; its filter is another of its incoming weights."""
    rows = np.repeat(columns, call.layer.out_channels // call.layer.in_channels)
    known = call.facts.computed_by(call.layer, "weight")
    if known is not None:
        call.facts.tie(known.rows, rows, "shares a depthwise convolution")
    return _made(call.facts, call.layer, rows, None, value.axis, value.rank)


def _per_channel(size: str, *values: tuple[str, float], mixes: bool = False) -> Callable[[Call], Features | None]:
    def normalise(call: Call) -> Features | None:
        if call.value is None:
            return None
        _require(_at_channels(call.value), "its units are not the channels that it normalises")
        return _keep(call, call.value, getattr(call.layer, size), values, mixes)

    return normalise


def _keep(call: Call, value: Features, size: int, values: Sequence[tuple[str, float]], mixes: bool) -> Features:
    channels = value.resolved(size)
    present = tuple((name, newborn) for name, newborn in values if getattr(call.layer, name, None) is not None)
    call.facts.keep(Kept(layer=call.layer, values=present, channels=channels, mixes=mixes))
    return value.located(size)


def _over_last(call: Call) -> Features | None:
    """LayerNorm and RMSNorm."""
    if call.value is None:
        return None
    shape = call.layer.normalized_shape
    _require(len(shape) == 1 and call.value.axis == -1, "it normalises over other axes than that of the units")
    return _keep(call, call.value, shape[0], (("weight", 1.0), ("bias", 0.0)), mixes=True)


def _prelu(call: Call) -> Features | None:
    if call.value is None:
        return None
    value = decide_activation(call.value, "leaky_relu")
    if call.layer.num_parameters == 1:
        return value
    _require(_at_channels(value), "its units are not the channels that it has slopes for")
    return _keep(call, value, call.layer.num_parameters, (("weight", 0.25),), mixes=False)


def _elementwise(name: str) -> Callable[[Call], Features | None]:
    return lambda call: None if call.value is None else decide_activation(call.value, name)


def _over_positions(axes: int) -> Callable[[Call], Features | None]:
    """Pooling and padding."""

    def apply(call: Call) -> Features | None:
        _require(not getattr(call.layer, "return_indices", False), "it returns indices")
        if call.value is not None:
            _require(call.value.axis == -1 - axes, "its units do not lie before the positions")
        return call.value

    return apply


def _upsample(call: Call) -> Features | None:
    _require(call.value is None or call.value.axis != -1, "it interpolates between the units")
    return call.value


def _flatten(call: Call) -> Features | None:
    return None if call.value is None else at.flatten(call.value, call.layer.start_dim, call.layer.end_dim)


def _recurrent(gates: int) -> Callable[[Call], list[Any]]:
    def apply(call: Call) -> list[Any]:
        return _recurrent_layer(call, gates)

    return apply


def _recurrent_layer(call: Call, gates: int) -> list[Any]:
    """A hidden unit is a row of every gate; the layer itself reads it at the next moment."""
    layer, facts = call.layer, call.facts
    size, depth = layer.hidden_size, layer.num_layers
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    _require(not layer.proj_size, "its outputs are projections of its units")
    if call.value is not None:
        _require(call.value.axis == -1, "its units do not lie along the axis that it reads")
    columns = _columns(call.value, layer.input_size)
    for direction in directions:
        heir = (layer, f"bias_ih_l0{direction}", 1.0) if layer.bias else None
        tap = Tap(layer=layer, side="input", axis=-1, atoms=columns, value=call.source)
        weight = f"weight_ih_l0{direction}"
        facts.reads(Read(layer=layer, weight=weight, groups=1, columns=columns, tap=tap, heir=heir, inexact=None))
    states: list[Atoms] = []
    for suffix in [f"_l{level}{direction}" for level in range(depth) for direction in directions]:
        known = facts.computed_by(layer, f"weight_hh{suffix}")
        atoms = facts.new_atoms(size) if known is None else known.rows[:size]
        for kind in ("ih", "hh"):
            computed = Computed(
                layer=layer,
                weight=f"weight_{kind}{suffix}",
                bias=f"bias_{kind}{suffix}",
                rows=np.tile(atoms, gates),
                activation="tanh",
                bound=1 / sqrt(size),
            )
            facts.compute(computed)
        states.append(atoms)
    last = np.concatenate(states[-len(directions) :])
    for inner in states[: -len(directions)]:
        facts.pin(inner, f"are seen only inside a {type(layer).__name__} of several layers; use one module per layer")
    for direction, atoms in zip(directions, states[-len(directions) :], strict=True):
        suffix = f"_l{depth - 1}{direction}"
        facts.reads(
            Read(
                layer=layer,
                weight=f"weight_hh{suffix}",
                groups=1,
                columns=atoms,
                tap=Tap(layer=layer, side="output", axis=-1, atoms=last, value=None),
                heir=(layer, f"bias_hh{suffix}", 1.0) if layer.bias else None,
                inexact="but at the first moment of a sequence",
            )
        )
    state = [Features((Part(atoms),)) for atoms in states]
    outputs = Features((Part(last),))
    return [outputs, [state, state] if isinstance(layer, nn.LSTM) else state]


def _no_units_inside(_facts: UnitFacts, _layer: Any) -> None:
    """Attention: its projections are pieces of one matrix, and what it adds to a residual stream nobody can reset."""


def _feed_forward_blocks(facts: UnitFacts, package: Any) -> None:
    """The two linear layers in every block of a transformer, whose code `torch.fx` cannot follow."""
    for layer in package.modules():
        kind = known_layer(layer)
        if kind not in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
            continue
        if _feed_forward(type(layer)) is not _feed_forward(kind):
            continue  # a derived class with a block of its own
        if facts.computed_by(layer.linear1, "weight") is not None:
            continue  # the package is used again
        value = _linear(Call(facts, layer.linear1, None))
        activation = layer.activation
        own = type(activation) if isinstance(activation, nn.Module) else activation
        name = getattr(own, "__name__", "identity")
        output = _linear(Call(facts, layer.linear2, decide_activation(value, name.lower())))
        facts.pin(output.known(), "join what attention gives, and a layer normalisation mixes them")


_AFFINE = (("weight", 1.0), ("bias", 0.0))
_STATISTICS = (("running_mean", 0.0), ("running_var", 1.0))

_ELEMENTWISE_LAYERS: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.LeakyReLU: "leaky_relu",
        nn.ELU: "elu",
        nn.SELU: "selu",
        nn.CELU: "celu",
        nn.GELU: "gelu",
        nn.SiLU: "silu",
        nn.Mish: "mish",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.Hardtanh: "hardtanh",
        nn.Hardswish: "hardswish",
        nn.Hardsigmoid: "hardsigmoid",
        nn.Softplus: "softplus",
        nn.Softsign: "softsign",
        nn.RReLU: "rrelu",
        nn.Hardshrink: "hardshrink",
        nn.Softshrink: "softshrink",
        nn.Tanhshrink: "tanhshrink",
        nn.LogSigmoid: "logsigmoid",
        nn.Threshold: "threshold",
        nn.Identity: "identity",
        nn.Dropout: "dropout",
        nn.Dropout1d: "dropout1d",
        nn.Dropout2d: "dropout2d",
        nn.Dropout3d: "dropout3d",
        nn.AlphaDropout: "alpha_dropout",
        nn.FeatureAlphaDropout: "feature_alpha_dropout",
    }
)


def _in_dimensions(template: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, template.format(n)) for n in (1, 2, 3) if hasattr(nn, template.format(n)))


LAYERS: Mapping[type[nn.Module], Callable[[Call], Any]] = MappingProxyType(
    {
        nn.Linear: _linear,
        nn.Flatten: _flatten,
        nn.LayerNorm: _over_last,
        nn.RMSNorm: _over_last,
        nn.GroupNorm: _per_channel("num_channels", *_AFFINE, mixes=True),
        nn.SyncBatchNorm: _per_channel("num_features", *_AFFINE, *_STATISTICS),
        nn.PReLU: _prelu,
        nn.LSTM: _recurrent(4),
        nn.GRU: _recurrent(3),
        nn.RNN: _recurrent(1),
        nn.Upsample: _upsample,
        nn.UpsamplingNearest2d: _upsample,
        nn.UpsamplingBilinear2d: _upsample,
        **dict.fromkeys(_in_dimensions("Conv{}d"), _convolution),
        **{
            kind: _per_channel("num_features", *_AFFINE, *_STATISTICS)
            for name in ("BatchNorm{}d", "InstanceNorm{}d")
            for kind in _in_dimensions(name)
        },
        **{
            kind: _over_positions(spatial_axes(kind.__name__))
            for name in (
                *(f"{kind}Pool{{}}d" for kind in ("Max", "Avg", "LP", "AdaptiveAvg", "AdaptiveMax")),
                *(f"{kind}Pad{{}}d" for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")),
            )
            for kind in _in_dimensions(name)
        },
        **{kind: _elementwise(name) for kind, name in _ELEMENTWISE_LAYERS.items()},
    }
)
"""What a layer gives for what it is given: features, a list of them, or None."""

UNIT_LAYERS = frozenset({nn.Linear, *_in_dimensions("Conv{}d"), nn.LSTM, nn.GRU, nn.RNN})
"""Layers that make units."""

PACKAGES: Mapping[type[nn.Module], Callable[[UnitFacts, Any], None]] = MappingProxyType(
    {
        nn.MultiheadAttention: _no_units_inside,
        nn.TransformerEncoderLayer: _feed_forward_blocks,
        nn.TransformerDecoderLayer: _feed_forward_blocks,
        nn.TransformerEncoder: _feed_forward_blocks,
        nn.TransformerDecoder: _feed_forward_blocks,
        nn.Transformer: _feed_forward_blocks,
    }
)
"""Modules that mix whatever they are given, with what is found inside."""
