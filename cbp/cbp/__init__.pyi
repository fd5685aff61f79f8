from .continual_backprop import ContinualBackprop
from .engines.choice import compile_ahead, compiled_before
from .engines.names import EngineName, choose_engine
from .errors import BatchError, CbpError, DivergenceError, FieldViolation, FormatError, SnapshotError, SpecError
from .examples.batches import Batch
from .learner import Learner
from .methods import (
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
from .plasticity.samples import LayerPlasticity, PlasticitySample, Trainability
from .progress import LearnerProgress, TaskRecord
from .results import TrainResult
from .serialization import LearnerSnapshot
from .spec.learner_spec import (
    AdamSpec,
    AdamWSpec,
    L2InitSpec,
    LearnerSpec,
    LossSpec,
    MethodSpec,
    MonitoringSpec,
    ReDoSpec,
    ResetSpec,
    RmspropSpec,
    SelectiveWeightReinitializationSpec,
    SelfNormalizedResetsSpec,
    SgdSpec,
    ShrinkAndPerturbSpec,
    UpgdSpec,
)
from .spec.network_spec import (
    CategoricalColumn,
    ConvnetSpec,
    InputSpec,
    LinearSpec,
    MlpSpec,
    RegisteredSpec,
    ResnetSpec,
    TransformerSpec,
)
from .stack import train_together
from .trainability import measure_trainability
from .units.named_units import HiddenUnits

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
    "FormatError",
    "HiddenUnits",
    "InputSpec",
    "L2Init",
    "L2InitSpec",
    "LayerPlasticity",
    "Learner",
    "LearnerProgress",
    "LearnerSnapshot",
    "LearnerSpec",
    "LinearSpec",
    "LossSpec",
    "MethodSpec",
    "MlpSpec",
    "MonitoringSpec",
    "PlasticityMethod",
    "PlasticitySample",
    "ReDo",
    "ReDoSpec",
    "RegisteredSpec",
    "ResetSpec",
    "ResnetSpec",
    "RmspropSpec",
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
    "Trainability",
    "TransformerSpec",
    "UnitResettingMethod",
    "Upgd",
    "UpgdSpec",
    "choose_engine",
    "compile_ahead",
    "compiled_before",
    "make_methods",
    "measure_trainability",
    "train_together",
]
