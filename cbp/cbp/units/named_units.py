"""Units that are named by hand, for modules whose code cannot be traced."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn

from cbp.errors import FieldViolation, SpecError
from cbp.spec.learner_spec import Activation
from cbp.units.features import Features, Part, UnknownPlacesError
from cbp.units.layer_facts import LAYERS, Call, known_layer, read_by
from cbp.units.unit_facts import Computed, UnitFacts


@dataclass(frozen=True, kw_only=True)
class HiddenUnits:
    """Who computes units, and who reads them.

    The outputs of a producer number the units; of several producers, output j of each belongs to unit j, as where their
    outputs are added. A consumer reads these units and nothing else, all of them and in this order: feature by feature,
    or flattened channel by channel. That nothing else reads them is the caller's word, and not checked.
    """

    producers: str | Sequence[str]
    """Linear layers or convolutions, by name within the module, such as "blocks.0.fc1"."""
    consumers: str | Sequence[str]
    """Linear layers or convolutions that read the units, by name."""
    activation: Activation = "identity"
    """Of the units. It decides the range of redrawn weights, unless the initializer is "default"."""
    norms: str | Sequence[str] = ()
    """Normalisation layers between, which keep values for every unit."""


def named_units(module: nn.Module, units: Sequence[HiddenUnits]) -> UnitFacts:
    """The facts as they are told. Raises `SpecError` if a name or a size is wrong."""
    facts = UnitFacts()
    for index, told in enumerate(units):
        _tell(module, facts, told, f"units[{index}]")
    return facts


def _tell(module: nn.Module, facts: UnitFacts, told: HiddenUnits, field: str) -> None:
    if told.activation not in get_args(Activation):
        raise _wrong(f"{field}.activation", f"Expected one of {', '.join(get_args(Activation))}")
    producers = _weighing(module, told.producers, f"{field}.producers")
    consumers = _weighing(module, told.consumers, f"{field}.consumers")
    value = Features((), -1)
    for layer in producers:
        if facts.computed_by(layer, "weight") is not None:
            raise _wrong(f"{field}.producers", "A layer produces units twice; name it once")
        atoms = facts.new_atoms(len(layer.weight))
        facts.compute(Computed(layer=layer, weight="weight", bias="bias", rows=atoms, activation=told.activation))
        if value.parts:
            first = value.known()
            if len(first) != len(atoms):
                raise _wrong(f"{field}.producers", f"They have {len(first)} and {len(atoms)} outputs; expected as many")
            facts.tie(first, atoms, "is added")
        else:
            rank = layer.weight.dim()
            value = Features((Part(atoms),), 1 - rank, rank)
    for name in _names(told.norms):
        norm = _layer(module, name, f"{field}.norms")
        kind = known_layer(norm)
        if kind is None or "Norm" not in kind.__name__:
            raise _wrong(f"{field}.norms", f"{name} is a {type(norm).__name__}, not a normalisation layer")
        try:
            LAYERS[kind](Call(facts, norm, value))
        except UnknownPlacesError as error:
            raise _wrong(f"{field}.norms", f"{name}: {error}") from error
    for reader in consumers:
        axis = 1 - reader.weight.dim()
        groups = getattr(reader, "groups", 1)
        seen = Features((Part(value.known(), "inner" if axis == -1 else None),), axis)
        try:
            columns = seen.resolved(reader.weight.shape[1] * groups)
        except UnknownPlacesError as error:
            raise _wrong(f"{field}.consumers", str(error)) from error
        facts.reads(read_by(reader, axis, columns, groups, reader, None))


def _names(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _layer(module: nn.Module, name: str, field: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise _wrong(field, f"The module has no layer {name!r}") from error


def _weighing(module: nn.Module, names: str | Sequence[str], field: str) -> list[nn.Linear | nn.Conv2d]:
    layers = [_layer(module, name, field) for name in _names(names)]
    if not layers:
        raise _wrong(field, "Name at least one layer")
    weighing: list[nn.Linear | nn.Conv2d] = []
    for name, layer in zip(_names(names), layers, strict=True):
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise _wrong(field, f"{name!r} is a {type(layer).__name__}; expected a linear layer or convolution")
        weighing.append(layer)  # type: ignore[arg-type]  # what is asked of them, they have in common
    return weighing


def _wrong(field: str, description: str) -> SpecError:
    return SpecError([FieldViolation(field, description)])
