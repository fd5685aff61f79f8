"""Continual Backprop: neural networks that never stop learning."""

from cbp.batches import Batch
from cbp.continual_backprop import ContinualBackprop
from cbp.engines.choice import choose_engine, compile_ahead, compiled_before
from cbp.engines.eager_engine import EngineName
from cbp.errors import BatchError, CbpError, DivergenceError, FieldViolation, SnapshotError, SpecError
from cbp.learner import Learner, TrainResult
from cbp.named_units import HiddenUnits
from cbp.network_spec import (
    CategoricalColumn,
    ConvnetSpec,
    InputSpec,
    LinearSpec,
    MlpSpec,
    RegisteredSpec,
    ResnetSpec,
    TransformerSpec,
)
from cbp.plasticity import LayerPlasticity, PlasticitySample
from cbp.progress import LearnerProgress, TaskRecord
from cbp.serialization import LearnerSnapshot
from cbp.spec import (
    AdamSpec,
    AdamWSpec,
    LearnerSpec,
    LossSpec,
    MonitoringSpec,
    ResetSpec,
    SgdSpec,
)
from cbp.stack import train_together

__all__ = [
    "AdamSpec",
    "AdamWSpec",
    "Batch",
    "BatchError",
    "CategoricalColumn",
    "CbpError",
    "ContinualBackprop",
    "ConvnetSpec",
    "DivergenceError",
    "EngineName",
    "FieldViolation",
    "HiddenUnits",
    "InputSpec",
    "LayerPlasticity",
    "Learner",
    "LearnerProgress",
    "LearnerSnapshot",
    "LearnerSpec",
    "LinearSpec",
    "LossSpec",
    "MlpSpec",
    "MonitoringSpec",
    "PlasticitySample",
    "RegisteredSpec",
    "ResetSpec",
    "ResnetSpec",
    "SgdSpec",
    "SnapshotError",
    "SpecError",
    "TaskRecord",
    "TrainResult",
    "TransformerSpec",
    "choose_engine",
    "compile_ahead",
    "compiled_before",
    "train_together",
]
