"""What the metrics say of learners: families of series, and how learners without series of their own share one."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from cbp import LearnerProgress
from cbp_server.metrics.exposition import Family
from cbp_server.records.learners import LearnerRecord
from cbp_server.records.samples import reader


class Summary(Enum):
    """How numbers of many learners become one."""

    SUM = "sum"
    MEAN = "mean"
    LOWEST = "lowest"


@dataclass(frozen=True)
class LearnerCounter:
    """A number of a learner that only grows."""

    family: Family
    read: Callable[[LearnerProgress], float]


@dataclass(frozen=True)
class LearnerGauge:
    """A number of a learner; None has no sample. What it reads is part of `state_of`."""

    family: Family
    read: Callable[[LearnerRecord], float | None]
    summary: Summary


@dataclass(frozen=True)
class LayerGauge:
    """A number of a layer, an attribute of its `LayerPlasticity`; None has no sample."""

    family: Family
    attribute: str
    summary: Summary = Summary.MEAN


def state_of(learner: LearnerRecord) -> tuple[object, ...]:
    """All that a learner's series are made from but its plasticity sample's layers: while it is equal, so are they."""
    return (
        learner.progress,
        learner.checkpoint,
        learner.quarantine,
        learner.queued_batches,
        learner.journal_position,
        learner.samples.newest_trainability,
    )


def _trainability(learner: LearnerRecord) -> float | None:
    tested = learner.samples.newest_trainability
    return None if tested is None else tested.score


def _counter(name: str, text: str, attribute: str) -> LearnerCounter:
    return LearnerCounter(Family(name, "counter", text), attrgetter(attribute))


def _gauge(name: str, text: str, read: Callable[[LearnerRecord], float | None], summary: Summary) -> LearnerGauge:
    return LearnerGauge(Family(name, "gauge", text), read, summary)


def _of_layer(name: str, text: str, attribute: str, summary: Summary = Summary.MEAN) -> LayerGauge:
    return LayerGauge(Family(name, "gauge", text), attribute, summary)


LEARNER_COUNTERS = (
    _counter("cbp_learner_steps", "Optimizer updates made.", "step"),
    _counter("cbp_learner_examples", "Examples learnt from.", "examples"),
    _counter("cbp_learner_tasks", "Tasks seen, the current one included.", "task_count"),
)

LEARNER_GAUGES = (
    _gauge(
        "cbp_learner_pending_examples",
        "Examples that wait for enough others to make a step.",
        lambda learner: learner.progress.pending,
        Summary.SUM,
    ),
    _gauge(
        "cbp_learner_loss",
        "Exponential average of the loss of predictions made before each update.",
        lambda learner: learner.progress.loss,
        Summary.MEAN,
    ),
    _gauge(
        "cbp_learner_accuracy",
        "Exponential average of the accuracy of predictions made before each update, from 0 to 1.",
        lambda learner: learner.progress.accuracy,
        Summary.MEAN,
    ),
    _gauge(
        "cbp_learner_task_loss",
        "Mean loss over the current task, each example predicted before it was learnt.",
        lambda learner: learner.progress.tasks[-1].loss if learner.progress.tasks else None,
        Summary.MEAN,
    ),
    _gauge(
        "cbp_learner_task_accuracy",
        "Mean accuracy over the current task, each example predicted before it was learnt, from 0 to 1.",
        lambda learner: learner.progress.tasks[-1].accuracy if learner.progress.tasks else None,
        Summary.MEAN,
    ),
    _gauge(
        "cbp_learner_trainability",
        "What the learner makes of a fresh task: 1 as much as its first network does, 0 no better than chance.",
        _trainability,
        Summary.MEAN,
    ),
    _gauge(
        "cbp_learner_queued_batches",
        "Batches accepted and not yet applied.",
        lambda learner: learner.queued_batches,
        Summary.SUM,
    ),
    _gauge(
        "cbp_learner_checkpoint_timestamp_seconds",
        "When the newest checkpoint was written, in seconds since 1970.",
        lambda learner: learner.checkpoint.time.timestamp() if learner.checkpoint else None,
        Summary.LOWEST,
    ),
    _gauge(
        "cbp_learner_checkpoint_step",
        "Step of the newest checkpoint.",
        lambda learner: learner.checkpoint.step if learner.checkpoint else None,
        Summary.LOWEST,
    ),
    _gauge(
        "cbp_learner_unsaved_entries",
        "Entries of the journal behind the newest checkpoint.",
        lambda learner: learner.unsaved_entries,
        Summary.SUM,
    ),
    _gauge(
        "cbp_learner_quarantined",
        "1 while the learner is quarantined, otherwise 0; of the others, how many are.",
        lambda learner: int(learner.quarantine is not None),
        Summary.SUM,
    ),
)

REPLACEMENTS = Family("cbp_layer_replacements", "counter", "Units replaced.")

LAYER_GAUGES = (
    _of_layer("cbp_layer_units", "Units of the layer.", "units", Summary.SUM),
    _of_layer("cbp_layer_mean_abs_weight", "Mean of abs(w) over the incoming weights.", "mean_abs_weight"),
    _of_layer("cbp_layer_weight_norm", "Frobenius norm of the incoming weights.", "weight_norm"),
    _of_layer(
        "cbp_layer_distance_from_init",
        "Euclidean distance of weights and biases from their initial values.",
        "distance_from_init",
    ),
    _of_layer("cbp_layer_gradient_norm", "Euclidean norm of the loss gradient on the probe examples.", "gradient_norm"),
    _of_layer(
        "cbp_layer_dormant_ratio",
        "Share of units whose normalised mean activation is at most the dormant threshold, from 0 to 1.",
        "dormant_fraction",
    ),
    _of_layer(
        "cbp_layer_dead_ratio",
        "Share of units that are zero on every probe example, from 0 to 1.",
        "dead_fraction",
    ),
    _of_layer(
        "cbp_layer_saturated_ratio",
        "Share of the activations near the bounds of a saturating nonlinearity, from 0 to 1.",
        "saturated_fraction",
    ),
    _of_layer("cbp_layer_feature_norm", "Mean Euclidean norm of the activations on one probe example.", "feature_norm"),
    _of_layer(
        "cbp_layer_effective_rank",
        "Effective rank of the layer's activations on the probe examples (Roy and Vetterli 2007).",
        "effective_rank",
    ),
    _of_layer("cbp_layer_stable_rank", "Stable rank of the layer's activations on the probe examples.", "stable_rank"),
    _of_layer(
        "cbp_layer_srank",
        "Fewest singular values of the layer's activations that hold 99 % of their sum (Kumar et al. 2020).",
        "srank",
    ),
    _of_layer(
        "cbp_layer_gradient_rank",
        "Effective rank of the gradients of the newest 32 probe examples in the layer's parameters.",
        "gradient_rank",
    ),
)

#: Quantiles of different learners cannot be combined, so the others have none.
UNIT_AGE = Family("cbp_layer_unit_age_steps", "summary", "Age of the units, in steps since they were made or reset.")
UNIT_UTILITY = Family("cbp_layer_unit_utility", "summary", "Bias-corrected utility of the units.")

#: All of them, first those that `state_of` decides and then those of a plasticity sample.
STATE_FAMILIES = (
    *(counter.family for counter in LEARNER_COUNTERS),
    *(gauge.family for gauge in LEARNER_GAUGES),
    REPLACEMENTS,
)
#: Of a layer's `LayerValues`: its name, and what `LAYER_GAUGES` say in their order.
layer_name = reader("layer")
layer_gauges = reader(*(gauge.attribute for gauge in LAYER_GAUGES))

SAMPLE_FAMILIES = (*(gauge.family for gauge in LAYER_GAUGES), UNIT_AGE, UNIT_UTILITY)
