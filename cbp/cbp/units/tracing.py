"""Follows a module's features from layer to layer, without running it: `torch.fx` gives the graph, and a reading of the
graph, operation by operation, gives the facts of `cbp.units.unit_facts`.

What an operation does to the features it is given must be known; features that go anywhere else are pinned.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from cbp.errors import FieldViolation, SpecError
from cbp.units import features as at
from cbp.units.features import Features, Part, UnknownPlacesError
from cbp.units.layer_facts import LAYERS, PACKAGES, Call, decide_activation, known_layer
from cbp.units.unit_facts import UnitFacts

_ELEMENTWISE = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "sigmoid",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "softplus",
        "softsign",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "abs",
        "absolute",
        "neg",
        "square",
        "sqrt",
        "exp",
        "log",
        "sin",
        "cos",
        "sign",
        "erf",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "contiguous",
        "clone",
        "detach",
        "float",
        "half",
        "bfloat16",
        "double",
        "to",
        "type",
        "type_as",
        "pow",
        "logsigmoid",
        "rrelu",
        "threshold",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "nan_to_num",
        "masked_fill",
    ]
)
_POOLING = frozenset(
    f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
)
_PRODUCTS = frozenset({"mul", "imul", "multiply", "div", "truediv", "itruediv", "divide"})
_SUMS = frozenset({"add", "iadd", "sub", "isub", "subtract", "rsub", "maximum", "minimum"})
_HARMLESS = frozenset({"size", "dim", "numel", "ndimension", "stride", "is_floating_point", "_assert", "eq", "ne"})
_HARMLESS |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like"}
_HARMLESS |= {"full_like", "rand_like", "randn_like"}
_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv"})
_ATTRIBUTES = frozenset({"shape", "device", "dtype", "ndim", "is_cuda", "requires_grad"})


class _Tracer(fx.Tracer):
    """Stops at the layers of `torch.nn`, and remembers in whose code it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[tuple[str, nn.Module]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return known_layer(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.inside.append((self.path_of_module(m), m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not where an error passes: it tells where it came from
        return result


class _Around(nn.Module):
    """A module within another, so that one that is a layer itself is traced from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Any:
        return self.module(inputs)


def trace(module: nn.Module) -> UnitFacts:
    """The facts of a module. Raises `SpecError` if its code cannot be traced."""
    facts = UnitFacts()
    if known_layer(module) is not None:
        module = _Around(module)
    graph = _graph(module)
    _GraphReader(module, graph, facts).read()
    return facts


def _graph(module: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(module, concrete_args=_defaults(module))
    except Exception as error:
        path, inner = tracer.inside[-1] if tracer.inside else ("", module)
        where = f"{path} ({type(inner).__name__})" if path else f"the forward method of {type(module).__name__}"
        text = (
            f"torch.fx cannot trace {where}: {str(error).rstrip('.')}. Name the units instead, as in "
            "units=[HiddenUnits(producers='fc1', activation='relu', consumers='fc2')], by the layers' names there"
        )
        raise SpecError([FieldViolation("module", text)]) from error


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Optional arguments take their defaults: a mask that is None leads the code another way than a traced one."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is None or isinstance(parameter.default, bool | int | float | str)
    }


class _GraphReader:
    """Goes through a graph once, in its order."""

    def __init__(self, module: nn.Module, graph: fx.Graph, facts: UnitFacts) -> None:
        self._module = module
        self._graph = graph
        self._facts = facts
        self._seen: dict[fx.Node, Any] = {}
        """Features, lists of them, or None for all else."""

    def read(self) -> None:
        for node in self._graph.nodes:
            match node.op:
                case "call_module":
                    self._seen[node] = self._call_layer(node)
                case "call_function" | "call_method":
                    self._seen[node] = self._call_operation(node)
                case "get_attr":
                    self._seen[node] = None
                    if not all(_asks_for_attribute(user) for user in node.users):
                        self._facts.used_directly.add(id(operator.attrgetter(str(node.target))(self._module)))
                case "output":
                    self._pin(node, "its values are outputs of the module")
                case _:
                    self._seen[node] = None

    def _of(self, argument: Any) -> Any:
        """What is known of an argument."""
        if isinstance(argument, fx.Node):
            return self._seen[argument]
        if isinstance(argument, Mapping):
            argument = list(argument.values())
        if isinstance(argument, list | tuple):
            return [self._of(entry) for entry in argument]
        return None

    def _pin(self, node: fx.Node, reason: str) -> None:
        for value in _all_features([self._of(argument) for argument in (*node.args, *node.kwargs.values())]):
            self._facts.pin(value.known(), reason)

    def _call_layer(self, node: fx.Node) -> Any:
        layer = self._module.get_submodule(str(node.target))
        kind = known_layer(layer)
        name = f"{type(layer).__name__} {str(node.target).removeprefix('module.')}"
        if kind is None or (kind not in LAYERS and kind not in PACKAGES):
            self._pin(node, f"feeds {name}, which is not known to keep units apart")
            return None
        inputs = [self._of(argument) for argument in (*node.args, *node.kwargs.values())]
        if kind in PACKAGES:
            self._pin(node, f"feeds {name}, which mixes all units")
            PACKAGES[kind](self._facts, layer)
            return None
        value = _only(inputs[0])
        for mixed in _all_features(inputs[0]) if value is None else ():
            self._facts.pin(mixed.known(), f"feeds {name} with several values")
        extras = [extra for other in inputs[1:] for extra in _all_features(other)]
        for extra in extras:
            self._facts.pin(extra.known(), f"is more than the first input of {name}")
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        call = Call(self._facts, layer, value, self._follower(node), source)
        try:
            made = LAYERS[kind](call)
            for value_made in _all_features(made) if extras else ():
                self._facts.pin(value_made.known(), f"{name} starts from what another layer gives")
            return made
        except UnknownPlacesError as error:
            if value is None:
                return None
            self._facts.pin(value.known(), f"feeds {name}: {error}")
        try:
            return LAYERS[kind](replace(call, value=None))  # its own outputs are units for all that
        except UnknownPlacesError:
            return None

    def _follower(self, node: fx.Node) -> nn.Module | None:
        """The layer that alone reads what a node gives, if it reads nothing else."""
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module":
            return None
        calls = [other for other in self._graph.nodes if (other.op, other.target) == ("call_module", users[0].target)]
        return self._module.get_submodule(str(users[0].target)) if len(calls) == 1 else None

    def _call_operation(self, node: fx.Node) -> Any:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        ours = node.op == "call_method" or _is_torchs(node.target)
        arguments = [self._of(argument) for argument in node.args]
        found = list(_all_features([arguments, *(self._of(argument) for argument in node.kwargs.values())]))
        if not found:
            return None
        try:
            if not ours:
                raise UnknownPlacesError("not an operation of torch")
            made = self._operate(str(name).removesuffix("_"), node, arguments)
            changed = node.args[0] if node.args and (str(name).endswith("_") or name in _IN_PLACE) else None
            if isinstance(changed, fx.Node):
                self._seen[changed] = made  # code that goes on with the old name sees the new values
            return made
        except UnknownPlacesError as error:
            for value in found:
                self._facts.pin(value.known(), f"feeds {name}: {error}")
            return None

    def _operate(self, name: str, node: fx.Node, arguments: list[Any]) -> Any:
        if name == "getattr":
            if _asks_for_attribute(node):
                return None
            raise UnknownPlacesError(f"its attribute {node.args[1]}")
        if name in _HARMLESS:
            return None
        if name == "getitem" and isinstance(arguments[0], list):
            picked = node.args[1]
            if isinstance(picked, int) and -len(arguments[0]) <= picked < len(arguments[0]):
                return arguments[0][picked]
            raise UnknownPlacesError("what is taken out of several values is not known")
        if name in ("cat", "concat", "concatenate"):
            return self._concatenate(node, arguments)
        if name in _SUMS or name in _PRODUCTS:
            return self._combine(name, node, arguments)
        value = _only(arguments[0]) if arguments else None
        others = list(_all_features([arguments[1:], *(self._of(argument) for argument in node.kwargs.values())]))
        if value is None or others:
            raise UnknownPlacesError("what it does with several values is not known")
        if name in _ELEMENTWISE:
            return decide_activation(value, name)
        if name in _POOLING:
            if value.axis != -1 - int(name[-2]):
                raise UnknownPlacesError("it pools over the units")
            return value
        shaped = _SHAPES.get(name)
        if shaped is None:
            raise UnknownPlacesError("it is not known to keep units apart")
        try:
            return shaped(value, *node.args[1:], **node.kwargs)
        except TypeError as error:  # an argument that is not foreseen here
            raise UnknownPlacesError(str(error)) from error

    def _concatenate(self, node: fx.Node, arguments: list[Any]) -> Features:
        axis = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
        if not isinstance(axis, int) or not arguments or not isinstance(arguments[0], list):
            raise UnknownPlacesError("the axis of a concatenation is not known")
        return at.concatenate([_single(value) or at.data() for value in arguments[0]], axis)

    def _combine(self, name: str, node: fx.Node, arguments: list[Any]) -> Features:
        """Element by element: two values' units are tied, a unit stays one beside a number."""
        if len(arguments) < 2:
            raise UnknownPlacesError("its arguments go by name")
        given = [_single(value) for value in arguments[:2]]
        values = [value for value in given if value is not None]
        if len(values) == 2:
            return self._tie(values[0], values[1])
        [value] = values
        other = node.args[0 if given[0] is None else 1]
        if isinstance(other, fx.Node):
            parameter = other.op == "get_attr"
            if parameter or name in _SUMS:
                what = "a parameter of no layer" if parameter else "values that are not a layer's outputs"
                raise UnknownPlacesError(f"it is combined with {what}")
        return value

    def _tie(self, one: Features, other: Features) -> Features:
        if one.axis != other.axis:
            raise UnknownPlacesError("it is combined with values whose units lie along another axis")
        if [part.spread for part in one.parts] == [part.spread for part in other.parts] == [one.parts[0].spread]:
            first, second = one.known(), other.known()
            spread = one.parts[0].spread
        else:
            first, second, spread = one.fixed_atoms(), other.fixed_atoms(), None
        if len(first) != len(second):
            raise UnknownPlacesError("it is combined with values of another size")
        tied = self._facts.tie(first, second, "is added")
        ranks = [value.rank for value in (one, other) if value.rank is not None]
        return replace(
            one, parts=(Part(tied, spread),), rank=max(ranks, default=None), undecided=one.undecided + other.undecided
        )


def _asks_for_attribute(node: fx.Node) -> bool:
    """Whether a node takes no more from a tensor than its shape, type or device."""
    return node.target is getattr and node.args[1] in _ATTRIBUTES


def _only(value: Any) -> Features | None:
    """The value itself, or the only one of a list."""
    while isinstance(value, list) and len(value) == 1:
        [value] = value
    return value if isinstance(value, Features) else None


def _single(value: Any) -> Features | None:
    """The value; None if it has no units."""
    if _only(value) is None and _all_features(value):
        raise UnknownPlacesError("what it does with several values is not known")
    return _only(value)


def _all_features(value: Any) -> list[Features]:
    if isinstance(value, Features):
        return [value]
    return [found for entry in value for found in _all_features(entry)] if isinstance(value, list) else []


def _is_torchs(target: Any) -> bool:
    """Whether a function is torch's or Python's own, and its name tells what it does."""
    module = getattr(target, "__module__", None)
    if module is None:  # compiled ones
        return hasattr(torch, target.__name__)
    return str(module).partition(".")[0] == "torch" or module in ("_operator", "builtins")


def _numbers(values: tuple[Any, ...]) -> list[int]:
    flat = list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else list(values)
    if not all(isinstance(value, int) for value in flat):
        raise UnknownPlacesError("its axes are not known")
    return flat


def _flatten(value: Features, start_dim: Any = 0, end_dim: Any = -1) -> Features:
    return at.flatten(value, *_numbers((start_dim, end_dim)))


def _reshape(value: Features, *shape: Any, **named: Any) -> Features:
    if named:
        shape = (*shape, *named.values())
    return at.reshape(value, shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape)


def _permute(value: Features, *dims: Any, **named: Any) -> Features:
    return at.permute(value, _numbers((*dims, *named.values())))


def _transpose(value: Features, dim0: Any, dim1: Any) -> Features:
    return at.transpose(value, *_numbers((dim0, dim1)))


def _reduce(value: Features, dim: Any = None, keepdim: bool = False, **_named: Any) -> Features:
    if dim is None:
        raise UnknownPlacesError("it is averaged over the units")
    return at.reduce(value, _numbers((dim,)), keep=keepdim)


def _squeeze(value: Features, dim: Any = None) -> Features:
    if dim is None:
        raise UnknownPlacesError("which axes are squeezed depends on sizes; name them")
    return at.squeeze(value, *_numbers((dim,)))


def _unsqueeze(value: Features, dim: Any) -> Features:
    return at.unsqueeze(value, *_numbers((dim,)))


def _chunk(value: Features, chunks: Any, dim: Any = 0) -> list[Features]:
    return at.chunk(value, *_numbers((chunks, dim)))


def _split(value: Features, split_size: Any, dim: Any = 0) -> list[Features]:
    [axis] = _numbers((dim,))
    if not isinstance(split_size, int) or value.position(axis) != value.axis:
        raise UnknownPlacesError("it is split into parts of several sizes, or an unknown number of them")
    return at.chunk(value, -(-len(value.fixed_atoms()) // split_size), axis)


def _pad(value: Features, pad: Any, *_mode: Any, **_named: Any) -> Features:
    if value.axis >= -(len(_numbers((pad,))) // 2):
        raise UnknownPlacesError("the axis of the units is padded")
    return value


def _interpolate(value: Features, *_how: Any, **_named: Any) -> Features:
    if value.axis == -1:
        raise UnknownPlacesError("it interpolates between the units")
    return value


def _index(value: Features, place: Any) -> Features:
    return at.index(value, place)


_SHAPES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "flatten": _flatten,
        "view": _reshape,
        "reshape": _reshape,
        "permute": _permute,
        "transpose": _transpose,
        "swapaxes": _transpose,
        "mean": _reduce,
        "sum": _reduce,
        "amax": _reduce,
        "amin": _reduce,
        "squeeze": _squeeze,
        "unsqueeze": _unsqueeze,
        "chunk": _chunk,
        "split": _split,
        "pad": _pad,
        "interpolate": _interpolate,
        operator.getitem.__name__: _index,
    }
)
