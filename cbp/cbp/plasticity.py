"""How much of its ability to learn a network still has, layer by layer.

Shapes: n probe examples, `in` and `out` the widths around one linear layer, L learners (the one measured is picked
by index).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbp.networks import FlatLayers
from cbp.replacement import UnitLayout, UnitState, bias_correction
from cbp.unit_groups import UnitGroup

QUANTILES = (0.1, 0.5, 0.9)
SAMPLES_PER_UNIT = 2
"""A rank is reported from this many probe examples per unit on. A matrix with fewer rows than columns has at most as
many singular values as rows, so its rank would tell of the probe and not of the network; at twice as many, independent
units reach about 0.9 of the full effective rank."""


@dataclass(frozen=True, kw_only=True)
class LayerPlasticity:
    """One linear layer. What concerns hidden units is None for the output layer; what cannot be known is None."""

    layer: str
    units: int
    mean_abs_weight: float | None
    """Mean |w| of its weights."""
    weight_norm: float | None
    """‖W‖ (Frobenius)."""
    distance_from_init: float | None
    """‖W − W₀‖, with W₀ the very first draw."""
    gradient_norm: float | None
    """Norm of the probe loss's gradient in its weights and biases."""
    dormant_fraction: float | None
    """Share of units whose mean |h| is at most τ times the layer's mean (Sokar et al. 2023, definition 3.1)."""
    dead_fraction: float | None
    """Share of units that are 0 on every probe example."""
    effective_rank: float | None
    """exp(−Σ p log p), p = σ/Σσ of the activations (Roy & Vetterli 2007)."""
    stable_rank: float | None
    """‖H‖_F² / ‖H‖₂² of the activations."""
    replacements: int | None
    """Units replaced so far."""
    age_quantiles: tuple[float, ...] | None
    """Units' ages in steps at the quantiles 0.1, 0.5 and 0.9."""
    utility_quantiles: tuple[float, ...] | None
    """Units' bias-corrected utilities at the quantiles 0.1, 0.5 and 0.9; None before the first step."""


@dataclass(frozen=True, kw_only=True)
class PlasticitySample:
    """All layers at one moment."""

    step: int
    examples: int
    """Examples learned from when the sample was taken."""
    layers: tuple[LayerPlasticity, ...]
    """Input side first; the output layer is last."""

    def to_plain(self) -> dict[str, Any]:
        """A JSON object."""
        plain = asdict(self)
        plain["layers"] = [
            {key: list(value) if isinstance(value, tuple) else value for key, value in layer.items()}
            for layer in plain["layers"]
        ]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "PlasticitySample":
        """The sample that `to_plain` wrote. Raises `KeyError` or `TypeError` if it is another object."""
        layers = []
        for layer in plain["layers"]:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in layer.items()
            }
            layers.append(LayerPlasticity(**fields))
        return cls(step=plain["step"], examples=plain["examples"], layers=tuple(layers))


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the probe examples bring about in one network."""

    activations: Sequence[Tensor]
    """Per hidden layer [n, units]; n may be 0."""
    gradient: FlatLayers | None
    """Gradient of the mean probe loss; None without examples."""


def measure_layers(
    names: Sequence[str],
    learner: int,
    parameters: FlatLayers,
    initial_parameters: FlatLayers,
    units: UnitState,
    layout: UnitLayout,
    log_decay: Tensor,
    replacements: Sequence[int],
    probed: Probed,
    dormant_threshold: float,
    between_layers: Callable[[], None] | None = None,
) -> tuple[LayerPlasticity, ...]:
    """Every layer of one learner in a stack."""
    measured: list[LayerPlasticity] = []
    for layer, name in enumerate(names):
        if measured and between_layers is not None:
            between_layers()
        weight = parameters.weights[layer][learner]
        whole_layer: dict[str, Any] = {
            "layer": name,
            "units": weight.shape[0],
            "mean_abs_weight": _finite(weight.abs().mean()),
            "weight_norm": _finite(weight.norm()),
            "distance_from_init": _finite((weight - initial_parameters.weights[layer][learner]).norm()),
            "gradient_norm": _gradient_norm(probed.gradient, layer),
        }
        if layer < len(layout.slices):
            columns = layout.slices[layer]
            age = units.age[learner, columns]
            utility = units.utility[learner, columns] / bias_correction(age, log_decay[learner])
            hidden_units = _activity(probed.activations[layer], dormant_threshold) | {
                "replacements": replacements[layer],
                "age_quantiles": _quantiles(age),
                # A unit born at this very step has no utility yet; it must not hide the others'.
                "utility_quantiles": _quantiles(utility[age > 0]),
            }
        else:
            hidden_units = dict.fromkeys(_HIDDEN_ONLY)
        measured.append(LayerPlasticity(**whole_layer, **hidden_units))
    return tuple(measured)


@dataclass(frozen=True, kw_only=True)
class GroupHistory:
    """What is known of units that are reset alike, group by group, side by side: U in all groups."""

    age: Tensor
    """[U]"""
    utility: Tensor
    """[U], not corrected for its start at zero."""
    replacements: Sequence[int]
    """Per group."""

    def measures(self, group: int, units: slice, decay_rate: float) -> dict[str, Any]:
        """Those of `LayerPlasticity` that a group's past decides; its units are at `units`."""
        age = self.age[units]
        log_decay = torch.tensor(decay_rate, dtype=torch.float64).log().to(age.device, torch.float32)
        utility = self.utility[units] / bias_correction(age, log_decay)
        return {
            "replacements": self.replacements[group],
            "age_quantiles": _quantiles(age),
            "utility_quantiles": _quantiles(utility[age > 0]),
        }


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the probe examples bring about in a module."""

    activations: Sequence[Tensor]
    """Per group [rows, units]: a row for each example and position."""
    gradients: Mapping[str, Tensor]
    """Of the mean probe loss, by the parameter's name."""


def measure_groups(
    names: Sequence[str],
    groups: Sequence[UnitGroup],
    output: str,
    module: nn.Module,
    first: Mapping[str, Tensor],
    history: GroupHistory | None,
    decay_rate: float,
    seen: Seen | None,
    dormant_threshold: float,
    between_layers: Callable[[], None] | None = None,
) -> tuple[LayerPlasticity, ...]:
    """Every group of units of a module, with the weights that compute them, and the layer of the name `output`.

    first: the module's parameters as they were drawn, by name. Of the activations of convolutions and sequences, at
    most 4096 rows are looked at, evenly spread.
    """
    layers = [_GroupWeights.of(module, group) for group in groups]
    layers.append(_GroupWeights({f"{output}.weight": None}, {f"{output}.bias": None}))
    ends = np.cumsum([0, *(group.units for group in groups)]).tolist()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    measured: list[LayerPlasticity] = []
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        if measured and between_layers is not None:
            between_layers()
        measures: dict[str, Any] = dict.fromkeys(field.name for field in fields(LayerPlasticity))
        measures |= {"layer": name} | layer.measures(parameters, first, None if seen is None else seen.gradients)
        if index == len(groups):
            measures["units"] = len(parameters[f"{output}.weight"])
        else:
            measures["units"] = groups[index].units
            if history is not None:
                measures |= history.measures(index, slice(ends[index], ends[index + 1]), decay_rate)
            if seen is not None:
                rows = seen.activations[index]
                measures |= _activity(rows[:: -(-len(rows) // _MOST_ROWS)], dormant_threshold)
        measured.append(LayerPlasticity(**measures))
    return tuple(measured)


_MOST_ROWS = 4096


@dataclass(frozen=True)
class _GroupWeights:
    """Parameters that compute units: by name, the rows that do; None for all."""

    weights: Mapping[str, Tensor | None]
    biases: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, module: nn.Module, group: UnitGroup) -> "_GroupWeights":
        names = {parameter: name for name, parameter in module.named_parameters()}
        weights = {names[getattr(part.layer, part.weight)]: part.places.index.flatten() for part in group.incoming}
        biases = {
            names[getattr(part.layer, part.bias)]: part.places.index.flatten() for part in group.incoming if part.bias
        }
        return cls(weights, biases)

    def measures(
        self, now: Mapping[str, Tensor], first: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
    ) -> dict[str, float | None]:
        """Those of `LayerPlasticity` that weights decide."""
        weights = _joined_rows(now, self.weights)
        of_gradients = None if gradients is None else _joined_rows(gradients, {**self.weights, **self.biases})
        return {
            "mean_abs_weight": _finite(weights.abs().mean()),
            "weight_norm": _finite(weights.norm()),
            "distance_from_init": _finite((weights - _joined_rows(first, self.weights)).norm()),
            "gradient_norm": None if of_gradients is None else _finite(of_gradients.norm()),
        }


def _joined_rows(values: Mapping[str, Tensor], places: Mapping[str, Tensor | None]) -> Tensor:
    """All numbers of some rows, in one row."""
    parts = [
        (values[name] if rows is None else values[name][rows.to(values[name].device)]).flatten()
        for name, rows in places.items()
        if name in values
    ]
    return torch.cat(parts)


_HIDDEN_ONLY = (
    "dormant_fraction",
    "dead_fraction",
    "effective_rank",
    "stable_rank",
    "replacements",
    "age_quantiles",
    "utility_quantiles",
)


def _gradient_norm(gradient: FlatLayers | None, layer: int) -> float | None:
    if gradient is None:
        return None
    return _finite(torch.hypot(gradient.weights[layer].norm(), gradient.biases[layer].norm()))


def _activity(activations: Tensor, dormant_threshold: float) -> dict[str, Any]:
    examples, width = activations.shape
    on_host = activations.cpu().numpy()  # small decompositions are faster there, and not every device has float64
    if not examples or not np.isfinite(on_host).all():
        return dict.fromkeys(("dormant_fraction", "dead_fraction", "effective_rank", "stable_rank"))
    values = on_host.astype(np.float64)
    activity = np.abs(values).mean(axis=0)
    enough = examples >= SAMPLES_PER_UNIT * width
    effective, stable = ranks(torch.from_numpy(values)) if enough else (None, None)
    return {
        # Compared without dividing: a layer that is silent altogether is dormant, not undefined.
        "dormant_fraction": float((activity <= dormant_threshold * activity.mean()).mean()),
        "dead_fraction": float((values == 0).all(axis=0).mean()),
        "effective_rank": effective,
        "stable_rank": stable,
    }


def ranks(activations: Tensor) -> tuple[float, float]:
    """Effective and stable rank of [n, units] activations; both 0 where all of them are 0.

    Singular values are the roots of the eigenvalues of HᵀH, which for many more examples than units takes half the time
    of a decomposition of H. One that is lost in the rounding of the largest, below 1e-7 of it, counts as 0: the
    float32 of the activations says no more of it.
    """
    values = activations.to(torch.float64)
    squares = torch.linalg.eigvalsh(values.T @ values)
    largest = squares.max()
    if largest <= 0:
        return 0.0, 0.0
    squares = torch.where(squares > len(squares) * torch.finfo(torch.float64).eps * largest, squares, 0.0)
    singular_values = squares.sqrt()
    share = singular_values / singular_values.sum()
    effective = torch.exp(torch.special.entr(share).sum())
    stable = (squares / largest).sum()
    return float(effective), float(stable)


def _quantiles(values: Tensor) -> tuple[float, ...] | None:
    ordered = np.sort(values.cpu().numpy().astype(np.float64))
    if not len(ordered) or not np.isfinite(ordered).all():
        return None
    places = np.multiply(QUANTILES, len(ordered) - 1)
    quantiles: list[float] = np.interp(places, np.arange(len(ordered)), ordered).tolist()
    return tuple(quantiles)


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
