from .batches import Batch
from .continual_backprop import ContinualBackprop
from .engines.choice import choose_engine, compile_ahead, compiled_before
from .engines.eager_engine import EngineName
from .errors import BatchError, CbpError, DivergenceError, FieldViolation, SnapshotError, SpecError
from .learner import Learner, TrainResult
from .named_units import HiddenUnits
from .network_spec import (
    CategoricalColumn,
    ConvnetSpec,
    InputSpec,
    LinearSpec,
    MlpSpec,
    RegisteredSpec,
    ResnetSpec,
    TransformerSpec,
)
from .plasticity import LayerPlasticity, PlasticitySample, Trainability
from .progress import LearnerProgress, TaskRecord
from .serialization import LearnerSnapshot
from .spec import (
    AdamSpec,
    AdamWSpec,
    LearnerSpec,
    LossSpec,
    MonitoringSpec,
    ResetSpec,
    RmspropSpec,
    SgdSpec,
)
from .stack import train_together
from .trainability import measure_trainability

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
    "RmspropSpec",
    "SgdSpec",
    "SnapshotError",
    "SpecError",
    "TaskRecord",
    "TrainResult",
    "Trainability",
    "TransformerSpec",
    "choose_engine",
    "compile_ahead",
    "compiled_before",
    "measure_trainability",
    "train_together",
]
