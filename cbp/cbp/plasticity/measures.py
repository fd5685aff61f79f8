"""How much of its ability to learn a network still has, layer by layer.

The measures themselves are functions of one layer's tensors, whatever network they come from.

Shapes: n probe examples, `in` and `out` the widths around one linear layer, L learners (the one measured is picked
by index).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbp.networks import FlatLayers
from cbp.plasticity.samples import QUANTILES, LayerPlasticity
from cbp.units.replacement import UnitLayout, UnitState, bias_correction
from cbp.units.unit_groups import UnitGroup

SAMPLES_PER_UNIT = 2
"""A rank is reported from this many probe examples per unit on. A matrix with fewer rows than columns has at most as
many singular values as rows, so its rank would tell of the probe and not of the network; at twice as many, independent
units reach about 0.9 of the full effective rank."""
GRADIENT_EXAMPLES = 32
"""Newest probe examples that a gradient rank is of; it is at most as many. Always the same number, for with fewer it
would be lower."""
SRANK_DELTA = 0.01
"""Share of the singular values' sum that srank may leave out; the value of Kumar et al."""
DECIDED_BY_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the probe examples bring about in one network; n may be 0."""

    inputs: Sequence[Tensor]
    """Per layer [n, in]."""
    activations: Sequence[Tensor]
    """Per hidden layer [n, units]."""
    deltas: Sequence[Tensor] | None
    """Per layer [n, out]: gradient of the mean probe loss in the pre-activations; None without examples."""
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
    saturated_outside: tuple[float, float] | None,
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
            "gradient_rank": None
            if probed.deltas is None
            else gradient_rank(probed.inputs[layer], probed.deltas[layer]),
        }
        if layer < len(layout.slices):
            columns = layout.slices[layer]
            age = units.age[learner, columns]
            utility = units.utility[learner, columns] / bias_correction(age, log_decay[learner])
            hidden_units: dict[str, Any] = measure_activations(
                probed.activations[layer], dormant_threshold, saturated_outside
            ) | {
                "replacements": replacements[layer],
                "age_quantiles": _quantiles(age),
                # A unit born at this very step has no utility yet; it must not hide the others'.
                "utility_quantiles": _quantiles(utility[age > 0]),
            }
        else:
            hidden_units = dict.fromkeys((*_OF_ACTIVATIONS, "replacements", "age_quantiles", "utility_quantiles"))
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
                measures |= measure_activations(rows[:: -(-len(rows) // _MOST_ROWS)], dormant_threshold, None)
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


_OF_ACTIVATIONS = (
    "dormant_fraction",
    "dead_fraction",
    "saturated_fraction",
    "feature_norm",
    "effective_rank",
    "stable_rank",
    "srank",
)


def _gradient_norm(gradient: FlatLayers | None, layer: int) -> float | None:
    if gradient is None:
        return None
    return _finite(torch.hypot(gradient.weights[layer].norm(), gradient.biases[layer].norm()))


def measure_activations(
    activations: Tensor, dormant_threshold: float, saturated_outside: tuple[float, float] | None
) -> dict[str, float | None]:
    """The measures of `LayerPlasticity` that activations [n, units] decide; None where n is too small, or where a value
    is not finite. Activations outside of the bounds are saturated; None where the nonlinearity has none."""
    examples, width = activations.shape
    on_host = activations.cpu().numpy()  # small decompositions are faster there, and not every device has float64
    if not examples or not np.isfinite(on_host).all():
        return dict.fromkeys(_OF_ACTIVATIONS)
    values = on_host.astype(np.float64)
    activity = np.abs(values).mean(axis=0)
    enough = examples >= SAMPLES_PER_UNIT * width
    spectrum = singular_values(values) if enough else None
    return {
        # Compared without dividing: a layer that is silent altogether is dormant, not undefined.
        "dormant_fraction": float((activity <= dormant_threshold * activity.mean()).mean()),
        "dead_fraction": float((values == 0).all(axis=0).mean()),
        "saturated_fraction": None if saturated_outside is None else saturated_fraction(values, saturated_outside),
        "feature_norm": float(np.sqrt(np.einsum("nu,nu->n", values, values)).mean()),
        "effective_rank": None if spectrum is None else effective_rank(spectrum),
        "stable_rank": None if spectrum is None else stable_rank(spectrum),
        "srank": None if spectrum is None else srank(spectrum),
    }


def saturated_fraction(activations: NDArray[np.float64], saturated_outside: tuple[float, float]) -> float:
    """Share of [n, units] activations that are strictly outside of the two bounds."""
    low, high = saturated_outside
    return float(((activations < low) | (activations > high)).mean())


def singular_values(activations: NDArray[np.float64]) -> NDArray[np.float64]:
    """[units] ascending, of activations [n, units].

    They are the roots of the eigenvalues of HᵀH, which for many more examples than units takes half the time of a
    decomposition of H. One that is lost in the rounding of the largest, below 1e-7 of it, is 0: the float32 of the
    activations says no more of it.
    """
    values = torch.from_numpy(activations)
    return _roots_of_eigenvalues(values.T @ values)


def _roots_of_eigenvalues(gram: Tensor) -> NDArray[np.float64]:
    """[m] ascending, of a positive semidefinite [m, m]; 0 where an eigenvalue is lost in the largest one's rounding."""
    squares: NDArray[np.float64] = torch.linalg.eigvalsh(gram).numpy()
    known = squares > len(squares) * np.finfo(np.float64).eps * squares[-1]
    return np.sqrt(np.where(known, squares, 0.0))


def effective_rank(spectrum: NDArray[np.float64]) -> float:
    """exp(−Σ p log p), p = σ/Σσ, of singular values σ in any order (Roy & Vetterli 2007); 0 where all are 0."""
    present = spectrum[spectrum > 0]
    if not len(present):
        return 0.0
    share = present / present.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def stable_rank(spectrum: NDArray[np.float64]) -> float:
    """‖H‖_F² / ‖H‖₂² = Σσ² / max σ² of singular values σ in any order; 0 where all are 0."""
    largest = spectrum.max(initial=0.0)
    return float(np.square(spectrum / largest).sum()) if largest > 0 else 0.0


def srank(spectrum: NDArray[np.float64], delta: float = SRANK_DELTA) -> int:
    """Fewest of the singular values, in any order, that hold 1 − δ of the sum of all (Kumar et al. 2020, "Implicit
    under-parameterization inhibits data-efficient deep reinforcement learning"); 0 where all are 0.

    Often called stable rank, which is another measure.
    """
    held = np.cumsum(np.sort(spectrum)[::-1])
    if not len(held) or held[-1] <= 0:
        return 0
    return int(np.argmax(held >= (1.0 - delta - DECIDED_BY_ROUNDING) * held[-1])) + 1


def gradient_rank(inputs: Tensor, deltas: Tensor) -> float | None:
    """Effective rank of the gradients of single examples in one linear layer, from 0 to `GRADIENT_EXAMPLES`.

    Inputs [n, in] of the layer and deltas [n, out], the gradients in its pre-activations up to a common factor; the
    newest `GRADIENT_EXAMPLES` count, and None is returned of fewer, or if a value is not finite.

    The gradient of example i is the outer product δᵢ (hᵢ, 1)ᵀ, so the Gram matrix of all is (HHᵀ + 1) ∘ ΔΔᵀ and no
    gradient is ever formed. Over n, its eigenvalues are those of the layer's empirical Fisher matrix, the stand-in for
    the Hessian whose rank falls where plasticity is lost (Lewandowski et al. 2023, "Directions of curvature as an
    explanation for loss of plasticity"): one Hessian's rank would take as long as hundreds of steps. Low means that
    examples pull at the weights in the same few directions (Lyle et al. 2023, "Understanding plasticity in neural
    networks", look at the angles between these gradients).
    """
    if len(inputs) < GRADIENT_EXAMPLES:
        return None
    features = inputs[-GRADIENT_EXAMPLES:].cpu().to(torch.float64)  # not every device has float64
    pulls = deltas[-GRADIENT_EXAMPLES:].cpu().to(torch.float64)
    gram = (features @ features.T + 1.0) * (pulls @ pulls.T)
    return effective_rank(_roots_of_eigenvalues(gram)) if bool(gram.isfinite().all()) else None


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
