"""Continual Backprop: neural networks that never stop learning."""

from cbp.batches import Batch
from cbp.continual_backprop import ContinualBackprop
from cbp.engines.choice import choose_engine, compile_ahead, compiled_before
from cbp.engines.eager_engine import EngineName
from cbp.errors import BatchError, CbpError, DivergenceError, FieldViolation, SnapshotError, SpecError
from cbp.learner import Learner, TrainResult
from cbp.named_units import HiddenUnits
from cbp.plasticity import LayerPlasticity, PlasticitySample, Trainability
from cbp.progress import LearnerProgress, TaskRecord
from cbp.serialization import LearnerSnapshot
from cbp.spec import (
    AdamSpec,
    AdamWSpec,
    LearnerSpec,
    LossSpec,
    MlpSpec,
    MonitoringSpec,
    ResetSpec,
    SgdSpec,
)
from cbp.stack import train_together
from cbp.trainability import measure_trainability

__all__ = [
    "AdamSpec",
    "AdamWSpec",
    "Batch",
    "BatchError",
    "CbpError",
    "ContinualBackprop",
    "DivergenceError",
    "EngineName",
    "FieldViolation",
    "HiddenUnits",
    "LayerPlasticity",
    "Learner",
    "LearnerProgress",
    "LearnerSnapshot",
    "LearnerSpec",
    "LossSpec",
    "MlpSpec",
    "MonitoringSpec",
    "PlasticitySample",
    "ResetSpec",
    "SgdSpec",
    "SnapshotError",
    "SpecError",
    "TaskRecord",
    "TrainResult",
    "Trainability",
    "choose_engine",
    "compile_ahead",
    "compiled_before",
    "measure_trainability",
    "train_together",
]
