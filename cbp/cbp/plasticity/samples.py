"""What is known of a learner's plasticity at one moment: plain records, without tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, with_config

from cbp.errors import FieldViolation, SnapshotError
from cbp.saved.parts import Count, Label, Measure, naming_misfits

QUANTILES = (0.1, 0.5, 0.9)
_LEAST_LEARNT = 0.05

Quantiles = Annotated[tuple[Measure, ...], Field(min_length=len(QUANTILES), max_length=len(QUANTILES))]


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class LayerPlasticity:
    """One linear layer. What concerns hidden units is None for the output layer; what cannot be known is None."""

    layer: Label
    units: Count
    mean_abs_weight: Measure | None
    """Mean |w| of its weights."""
    weight_norm: Measure | None
    """‖W‖ (Frobenius)."""
    distance_from_init: Measure | None
    """‖W − W₀‖, with W₀ the very first draw."""
    gradient_norm: Measure | None
    """Norm of the probe loss's gradient in its weights and biases."""
    dormant_fraction: Measure | None
    """Share of units whose mean |h| is at most τ times the layer's mean (Sokar et al. 2023, definition 3.1)."""
    dead_fraction: Measure | None
    """Share of units that are 0 on every probe example."""
    saturated_fraction: Measure | None
    """Share of the activations beyond the bounds of a saturating nonlinearity: abs(tanh) > 0.9, or sigmoid outside of
    0.05 to 0.95. None for others. Of activations, not of units: a unit may saturate on some examples only."""
    feature_norm: Measure | None
    """Mean ‖h‖ over the probe examples, h [units] the activations on one."""
    effective_rank: Measure | None
    """exp(−Σ p log p), p = σ/Σσ of the activations (Roy & Vetterli 2007)."""
    stable_rank: Measure | None
    """‖H‖_F² / ‖H‖₂² of the activations."""
    srank: Count | None
    """Fewest singular values of the activations that hold 99 % of the sum of all (Kumar et al. 2020)."""
    gradient_rank: Measure | None
    """Effective rank of the gradients of single examples in the layer's weights and biases, see `gradient_rank`."""
    replacements: Count | None
    """Units replaced so far."""
    age_quantiles: Quantiles | None
    """Units' ages in steps at the quantiles 0.1, 0.5 and 0.9."""
    utility_quantiles: Quantiles | None
    """Units' bias-corrected utilities at the quantiles 0.1, 0.5 and 0.9; None before the first step."""


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Trainability:
    """What a copy of a learner made of a fresh task, and what the network that it began as made of it; see
    `cbp.measure_trainability`. Losses are means over the last pass through the task; None if the network diverged."""

    step: Count
    """The learner's when it was copied."""
    loss: Measure | None
    """The copy's."""
    fresh_loss: Measure | None
    """The fresh network's."""
    chance_loss: Measure
    """That of the best constant prediction."""

    @property
    def score(self) -> float | None:
        """(chance − loss) / (chance − fresh loss): 1 is as trainable as at the beginning, 0 no better than chance; less
        and more are possible. None if a network diverged, or if the fresh one stayed within 5 % of chance: the task was
        too hard for so few steps, and says nothing."""
        if self.loss is None or self.fresh_loss is None:
            return None
        learnable = self.chance_loss - self.fresh_loss
        return (self.chance_loss - self.loss) / learnable if learnable > _LEAST_LEARNT * self.chance_loss else None


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class PlasticitySample:
    """All layers at one moment."""

    step: Count
    examples: Count
    """Examples learned from when the sample was taken."""
    layers: tuple[LayerPlasticity, ...]
    """Input side first; the output layer is last."""
    trainability: Trainability | None = None
    """The newest test of the learner's trainability, of this step or an earlier one; None without any."""

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
        """The sample that `to_plain` wrote, also an earlier version's: what that did not measure is None.

        Raises `SnapshotError` if it is another object.
        """
        layers = plain.get("layers")
        if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
            raise SnapshotError.of([FieldViolation("layers", "Expected a list of objects")])
        with naming_misfits():
            return _adapter().validate_python(dict(plain) | {"layers": [_UNMEASURED | layer for layer in layers]})


_UNMEASURED = {measure.name: None for measure in fields(LayerPlasticity) if measure.name not in ("layer", "units")}


@cache
def _adapter() -> TypeAdapter[PlasticitySample]:
    """Made when the first sample is read: it takes milliseconds."""
    return TypeAdapter(PlasticitySample)
