"""Continual Backprop: neural networks that never stop learning."""

from cbp.batches import Batch
from cbp.continual_backprop import ContinualBackprop
from cbp.engines.choice import choose_engine, compile_ahead, compiled_before
from cbp.engines.eager_engine import EngineName
from cbp.errors import BatchError, CbpError, DivergenceError, FieldViolation, SnapshotError, SpecError
from cbp.learner import Learner, TrainResult
from cbp.methods import (
    L2Init,
    PlasticityMethod,
    ReDo,
    SelectiveWeightReinitialization,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    UnitResettingMethod,
    Upgd,
    make_methods,
)
from cbp.named_units import HiddenUnits
from cbp.plasticity import LayerPlasticity, PlasticitySample
from cbp.progress import LearnerProgress, TaskRecord
from cbp.serialization import LearnerSnapshot
from cbp.spec import (
    AdamSpec,
    AdamWSpec,
    L2InitSpec,
    LearnerSpec,
    LossSpec,
    MethodSpec,
    MlpSpec,
    MonitoringSpec,
    ReDoSpec,
    ResetSpec,
    SelectiveWeightReinitializationSpec,
    SelfNormalizedResetsSpec,
    SgdSpec,
    ShrinkAndPerturbSpec,
    UpgdSpec,
)
from cbp.stack import train_together

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
    "L2Init",
    "L2InitSpec",
    "LayerPlasticity",
    "Learner",
    "LearnerProgress",
    "LearnerSnapshot",
    "LearnerSpec",
    "LossSpec",
    "MethodSpec",
    "MlpSpec",
    "MonitoringSpec",
    "PlasticityMethod",
    "PlasticitySample",
    "ReDo",
    "ReDoSpec",
    "ResetSpec",
    "SelectiveWeightReinitialization",
    "SelectiveWeightReinitializationSpec",
    "SelfNormalizedResets",
    "SelfNormalizedResetsSpec",
    "SgdSpec",
    "ShrinkAndPerturb",
    "ShrinkAndPerturbSpec",
    "SnapshotError",
    "SpecError",
    "TaskRecord",
    "TrainResult",
    "UnitResettingMethod",
    "Upgd",
    "UpgdSpec",
    "choose_engine",
    "compile_ahead",
    "compiled_before",
    "make_methods",
    "train_together",
]
