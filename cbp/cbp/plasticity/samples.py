"""What is known of a learner's plasticity at one moment: plain records, without tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

QUANTILES = (0.1, 0.5, 0.9)
_LEAST_LEARNT = 0.05


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
    saturated_fraction: float | None
    """Share of the activations beyond the bounds of a saturating nonlinearity: abs(tanh) > 0.9, or sigmoid outside of
    0.05 to 0.95. None for others. Of activations, not of units: a unit may saturate on some examples only."""
    feature_norm: float | None
    """Mean ‖h‖ over the probe examples, h [units] the activations on one."""
    effective_rank: float | None
    """exp(−Σ p log p), p = σ/Σσ of the activations (Roy & Vetterli 2007)."""
    stable_rank: float | None
    """‖H‖_F² / ‖H‖₂² of the activations."""
    srank: int | None
    """Fewest singular values of the activations that hold 99 % of the sum of all (Kumar et al. 2020)."""
    gradient_rank: float | None
    """Effective rank of the gradients of single examples in the layer's weights and biases, see `gradient_rank`."""
    replacements: int | None
    """Units replaced so far."""
    age_quantiles: tuple[float, ...] | None
    """Units' ages in steps at the quantiles 0.1, 0.5 and 0.9."""
    utility_quantiles: tuple[float, ...] | None
    """Units' bias-corrected utilities at the quantiles 0.1, 0.5 and 0.9; None before the first step."""


@dataclass(frozen=True, kw_only=True)
class Trainability:
    """What a copy of a learner made of a fresh task, and what the network that it began as made of it; see
    `cbp.measure_trainability`. Losses are means over the last pass through the task; None if the network diverged."""

    step: int
    """The learner's when it was copied."""
    loss: float | None
    """The copy's."""
    fresh_loss: float | None
    """The fresh network's."""
    chance_loss: float
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


@dataclass(frozen=True, kw_only=True)
class PlasticitySample:
    """All layers at one moment."""

    step: int
    examples: int
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

        Raises `KeyError` or `TypeError` if it is another object.
        """
        tested = plain.get("trainability")
        return cls(
            step=plain["step"],
            examples=plain["examples"],
            layers=tuple(_layer_from_plain(layer) for layer in plain["layers"]),
            trainability=None if tested is None else Trainability(**tested),
        )


def _layer_from_plain(plain: Mapping[str, Any]) -> LayerPlasticity:
    measures: dict[str, Any] = {
        measure.name: None for measure in fields(LayerPlasticity) if measure.name not in ("layer", "units")
    }
    measures |= {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    return LayerPlasticity(**measures)
