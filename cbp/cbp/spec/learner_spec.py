"""What a learner is: its network, loss, optimizer, resets and monitoring.

Frozen, keyword-only records. Construction validates; what is wrong is raised as `SpecError`, each violation
with the dotted path of its field.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cbp.errors import FieldViolation, SpecError, shown
from cbp.spec.network_spec import Activation as Activation  # part of this module's names, too
from cbp.spec.network_spec import Initializer as Initializer
from cbp.spec.network_spec import MlpSpec as MlpSpec
from cbp.spec.network_spec import NetworkSpec, RegisteredSpec
from cbp.spec.spec_record import Decay, Positive, Rate, Real, Record, Share, Whole, contradiction

LossKind = Literal["cross_entropy", "mse", "huber", "binary_cross_entropy"]
Utility = Literal[
    "contribution",
    "zero_contribution",
    "adaptable_contribution",
    "weight",
    "adaptation",
    "feature_by_input",
    "random",
]

Precision = Literal["float32", "bfloat16"]

OUTPUT_LAYER = "output"
_HIDDEN_PREFIX = "hidden_"
_LARGEST_SEED = 2**63 - 1


def hidden_layer_name(index: int) -> str:
    return f"{_HIDDEN_PREFIX}{index}"


def hidden_layers(count: int) -> tuple[str, ...]:
    """`hidden_0`, `hidden_1`, …"""
    return tuple(hidden_layer_name(index) for index in range(count))


def _layer_name(value: object) -> str:
    """The name of the hidden layer that an index (0), a decimal index ("0") or a name ("hidden_0") means."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return hidden_layer_name(value)
    if isinstance(value, str):
        if re.fullmatch(r"\d{1,9}", value, re.ASCII):
            return hidden_layer_name(int(value))
        if re.fullmatch(rf"{_HIDDEN_PREFIX}(0|[1-9]\d{{0,8}})", value, re.ASCII):
            return value
        if value == OUTPUT_LAYER:
            raise PydanticCustomError("output_layer", "The output layer has no hidden units to reset")
    raise PydanticCustomError("layer", "Expected a hidden layer's index or name, such as 0 or 'hidden_0'")


def _parse_layers(value: object) -> object:
    if isinstance(value, str) and value in ("all", "first", "none"):
        return value
    if not isinstance(value, list | tuple):
        raise PydanticCustomError(
            "layers", "Expected 'all', 'first', 'none', or a list of hidden-layer indices or names"
        )
    names = tuple(_layer_name(entry) for entry in value)
    if not names:
        raise PydanticCustomError("layers_empty", "The list is empty; write 'none' to reset no layer")
    if len(set(names)) < len(names):
        raise PydanticCustomError("layers_duplicate", "Each layer may be named once")
    return names


def _parse_layer_rates(value: object) -> object:
    if not isinstance(value, Mapping):
        raise PydanticCustomError("layer_rates", "Expected a mapping from hidden layer to replacement rate")
    rates = {_layer_name(key): rate for key, rate in value.items()}
    if len(rates) < len(value):
        raise PydanticCustomError("layers_duplicate", "Each layer may be named once")
    return rates


class LossSpec(Record):
    """The loss of one example; that of a step is the mean over its examples, each times its weight."""

    kind: LossKind
    """cross_entropy: logits against one label. mse, huber: mean over the outputs. binary_cross_entropy: mean
    over the outputs, logits against targets from 0 to 1."""
    delta: Positive = 1.0
    """Huber only: error, in units of the target, at which the loss turns from quadratic to linear. 1 by default,
    as in PyTorch."""

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_kind(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _delta_belongs_to_huber(self) -> Self:
        if self.kind != "huber" and self.delta != 1.0:
            raise PydanticCustomError("delta", "delta belongs to the huber loss; remove it or use kind 'huber'")
        return self


class _OptimizerSpec(Record):
    clip_norm: Positive | None = None
    """Most that the Euclidean norm of a step's gradient may be, over all parameters together, above 0; a longer one is
    scaled down to it, as `torch.nn.utils.clip_grad_norm_` does, before weight decay is added. None, by default, clips
    nothing."""


class SgdSpec(_OptimizerSpec):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive
    """Learning rate, above 0. No default: it depends on the data."""
    momentum: Decay = 0.0
    """Share of the last update that carries over, from 0 up to but not including 1. 0 by default, as published."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient as weight_decay times the parameter."""
    nesterov: bool = False
    """Whether a step looks one update ahead (Sutskever et al. 2013, in PyTorch's form): the gradient plus momentum
    times the running update, in place of that update itself. Needs momentum."""

    @field_validator("nesterov")
    @classmethod
    def _nesterov_needs_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("momentum") == 0:
            raise PydanticCustomError("nesterov", "Nesterov needs momentum; set momentum above 0, or nesterov to false")
        return value


class RmspropSpec(_OptimizerSpec):
    """RMSprop (Tieleman & Hinton 2012) by PyTorch's formula, not centred: with the mean square
    v ← alpha · v + (1 − alpha) · g², a step is lr · g / (√v + epsilon)."""

    kind: Literal["rmsprop"] = "rmsprop"
    lr: Positive
    """Learning rate, above 0. No default: it depends on the data."""
    alpha: Decay = 0.99
    """Decay of the mean squared gradient, from 0 up to but not including 1; PyTorch's default. The mean starts from 0,
    and is not corrected for it: first steps of a weight, also after its reset, are up to 1/√(1 − alpha) times lr."""
    epsilon: Positive = 1e-8
    """Added to the denominator, above 0; PyTorch's default."""
    momentum: Decay = 0.0
    """Share of the last update that carries over, from 0 up to but not including 1; PyTorch's default."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient as weight_decay times the parameter."""


class _AdamSpec(_OptimizerSpec):
    lr: Positive
    """Learning rate, above 0. No default: it depends on the data."""
    beta1: Decay = 0.9
    """Decay of the mean gradient, from 0 up to but not including 1; the usual value."""
    beta2: Decay = 0.999
    """Decay of the mean squared gradient, from 0 up to but not including 1; the usual value."""
    epsilon: Positive = 1e-8
    """Added to the denominator, above 0; the usual value."""


class AdamSpec(_AdamSpec):
    """Adam, with a step count of its own for every weight, so that reset weights warm up like new ones."""

    kind: Literal["adam"] = "adam"
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient as weight_decay times the parameter."""


class AdamWSpec(_AdamSpec):
    """AdamW: Adam with weight decay apart from the gradient."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: Annotated[Real, Field(ge=0)] = 0.01
    """Share of each parameter, times the learning rate, subtracted at every step; PyTorch's default."""


OptimizerSpec = Annotated[SgdSpec | RmspropSpec | AdamSpec | AdamWSpec, Field(discriminator="kind")]


class ResetSpec(Record):
    """Which hidden units Continual Backprop resets, and when."""

    layers: Annotated[
        Literal["all", "first", "none"] | tuple[str, ...],
        BeforeValidator(_parse_layers),
    ] = "all"
    """'all' (as published), 'first', 'none', or hidden layers by index or name; kept as names."""
    replacement_rate: Rate = 1e-4
    """Share of a layer's mature units replaced per step, 0 to 1. The paper's value at widths of 50 to 200; the
    remainder of a unit is carried over, so a small share of a narrow layer still counts."""
    layer_replacement_rates: Annotated[Mapping[str, Rate], BeforeValidator(_parse_layer_rates)] = Field(
        default_factory=dict
    )
    """Rates of single layers, by index or name, in place of replacement_rate."""
    maturity_threshold: Annotated[Whole, Field(ge=0)] = 100
    """Steps for which a new unit is protected; it may be replaced when it is older. The paper's value."""
    decay_rate: Decay = 0.99
    """Decay per step of the running utility and mean activation; the paper's value."""
    utility: Utility = "adaptable_contribution"
    """What a unit is worth; the least worth are replaced. The default is the paper's full measure, and the one
    that does not rate saturated units highest."""
    bias_compensation: bool = True
    """Whether the next layer's bias takes over a removed unit's mean output, so that the mean prediction stays.
    The paper intends it, the published code does not do it."""
    strength: Share = 1.0
    """How far a reset goes, above 0 up to 1. Incoming weights and bias go this share of the way to those of a newborn,
    outgoing weights lose this share. 1 by default, as published: a newborn in the unit's place."""
    max_replacements: Annotated[Whole, Field(ge=1)] | None = None
    """Units of each layer that the rates may reset in one window of steps, at least 1; None for no such limit. What
    would go beyond it stays, and is not made up for later."""
    replacement_window: Annotated[Whole, Field(ge=1)] = 1000
    """Steps in one window of max_replacements: the first is from step 1 to step 1000 by default, ten times the maturity
    threshold. Windows do not overlap, so as much may go at the end of one and again at the start of the next."""

    def rates(self, hidden_layers: Sequence[str]) -> tuple[float, ...]:
        """The rate in force in each of a network's hidden layers; 0 where units are not reset.

        Raises `SpecError` if a layer is named that the network does not have.
        """
        violation = self.misnamed_layer(hidden_layers)
        if violation is not None:
            raise SpecError([violation])
        selected = frozenset(self._selected(hidden_layers))
        rates = self.layer_replacement_rates
        return tuple(rates.get(name, self.replacement_rate) if name in selected else 0.0 for name in hidden_layers)

    @property
    def resets_units(self) -> bool:
        """Whether any unit is ever reset."""
        return self.layers != "none" and any((self.replacement_rate, *self.layer_replacement_rates.values()))

    def misnamed_layer(self, hidden_layers: Sequence[str]) -> FieldViolation | None:
        """The first layer named here that the network does not have, or that has a rate but is not reset."""
        known, selected = frozenset(hidden_layers), frozenset(self._selected(hidden_layers))
        for name in self._selected(hidden_layers):
            if name not in known:
                return FieldViolation("layers", f"No hidden layer {name!r}; there are {_enumerated(hidden_layers)}")
        for name in self.layer_replacement_rates:
            field = f"layer_replacement_rates.{name}"
            if name not in known:
                return FieldViolation(field, f"No hidden layer {name!r}; there are {_enumerated(hidden_layers)}")
            if name not in selected:
                return FieldViolation(field, f"{name} is not reset; add it to layers or remove its rate")
        return None

    def _selected(self, hidden_layers: Sequence[str]) -> Sequence[str]:
        match self.layers:
            case "all":
                return hidden_layers
            case "first":
                return hidden_layers[:1]
            case "none":
                return ()
            case names:
                return names


def _enumerated(names: Sequence[str]) -> str:
    if not names:
        return "none; use 'all' or 'none'"
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:3])}, …, {names[-1]}"


class L2InitSpec(Record):
    """L2 Init, also called regenerative regularisation: pulls every parameter towards its first value."""

    kind: Literal["l2_init"] = "l2_init"
    strength: Positive
    """Coefficient, above 0, of (parameter − first value) in the gradient: as weight_decay, which pulls towards 0. Twice
    the λ of Kumar et al., who add λ‖θ − θ₀‖² to the loss. No default: it depends on the data."""


class ShrinkAndPerturbSpec(Record):
    """Shrink and perturb: θ ← shrink · θ + perturb · ε, with ε a fresh draw of first values."""

    kind: Literal["shrink_and_perturb"] = "shrink_and_perturb"
    shrink: Rate
    """λ, from 0 to 1: what is left of every parameter. No default: it depends on the data and on the interval."""
    perturb: Rate
    """σ, from 0 to 1: share of a fresh draw that is added."""
    interval: Annotated[Whole, Field(ge=1)] = 1
    """Steps between two times; 1 by default, as Dohare et al. run it. Ash and Adams do it once for each new task."""


class ReDoSpec(Record):
    """ReDo: every so many steps, resets all units that are dormant."""

    kind: Literal["redo"] = "redo"
    interval: Annotated[Whole, Field(ge=1)] = 1000
    """Steps between two looks, over which activity is averaged; the paper's value."""
    dormant_threshold: Annotated[Real, Field(ge=0)] = 0.025
    """τ: a unit is dormant if its share of its group's mean activity is at most this; the paper's value."""


class SelfNormalizedResetsSpec(Record):
    """Self-normalised resets: resets a unit that is silent for longer than it used to be."""

    kind: Literal["self_normalized_resets"] = "self_normalized_resets"
    rejection_level: Annotated[Positive, Field(lt=1)] = 1e-4
    """η, between 0 and 1: a unit is reset once silences as long as its present one were at most this share of its own
    so far. About that share of a healthy unit's silences ends in a reset, too, so batches of one example need less than
    the 0.01 to 0.1 for large batches."""
    longest_silence: Annotated[Whole, Field(ge=2)] = 10_000
    """Steps of silence after which any unit is reset, however little is known of it."""


class UpgdSpec(Record):
    """Utility-based perturbed gradient descent, first order, global: w ← w − lr · (g + ξ)(1 − scaled utility)."""

    kind: Literal["upgd"] = "upgd"
    noise: Annotated[Real, Field(ge=0)] = 1e-3
    """σ, the standard deviation of ξ, in units of the gradient; the default of the published code."""
    decay_rate: Decay = 0.999
    """Decay per step of the running utility; the default of the published code."""


class SelectiveWeightReinitializationSpec(Record):
    """SWR: every so many steps, redraws the single weights of least utility."""

    kind: Literal["selective_weight_reinitialization"] = "selective_weight_reinitialization"
    replacement_rate: Rate
    """Share of each layer's weights that is redrawn each time, 0 to 1; what is less than a weight is carried over. No
    default: it depends on the interval."""
    interval: Annotated[Whole, Field(ge=1)] = 100
    """Steps between two times."""
    decay_rate: Decay = 0.99
    """Decay per step of the running utility abs(g · w); it starts over each time, as in the published code. 0 looks at
    the last batch only, where with one example most weights into ReLUs have utility 0."""


MethodSpec = Annotated[
    L2InitSpec
    | ShrinkAndPerturbSpec
    | ReDoSpec
    | SelfNormalizedResetsSpec
    | UpgdSpec
    | SelectiveWeightReinitializationSpec,
    Field(discriminator="kind"),
]
_RESETS_UNITS = ("redo", "self_normalized_resets")
_INSTEAD_OF_RESETS = (*_RESETS_UNITS, "upgd", "selective_weight_reinitialization")


def goes_with_resets(methods: Sequence[MethodSpec]) -> bool:
    """Whether none of the methods takes the place of Continual Backprop's resets."""
    return {method.kind for method in methods}.isdisjoint(_INSTEAD_OF_RESETS)


def method_contradiction(
    methods: Sequence[MethodSpec], resets: ResetSpec | None, optimizer: OptimizerSpec | None = None
) -> FieldViolation | None:
    """The first of the methods that does not go with the others, with the resets or with the optimizer."""
    kinds = [method.kind for method in methods]
    resetting = [kind for kind in kinds if kind in _RESETS_UNITS]
    is_resetting = resets is not None and resets.resets_units
    for place, kind in enumerate(kinds):
        field = f"methods[{place}].kind"
        if kind in kinds[:place]:
            return FieldViolation(field, f"{kind} is there already; name each method once")
        if kind == "upgd" and (len(kinds) > 1 or is_resetting):
            text = "upgd is a whole update rule; it goes with no other method, and needs resets.layers 'none'"
            return FieldViolation(field, text)
        if kind in _RESETS_UNITS and is_resetting:
            text = f"{kind} decides itself which units are reset; set resets.layers to 'none', or remove it"
            return FieldViolation(field, text)
        if kind in resetting[1:]:
            return FieldViolation(field, f"{resetting[0]} resets units already; keep one of them")
        if kind == "selective_weight_reinitialization" and (resetting or is_resetting):
            text = (
                f"{kind} would redraw the zero weights behind a newborn unit, since they are of least utility; reset "
                "units or weights, not both"
            )
            return FieldViolation(field, text)
        if kind == "upgd" and optimizer is not None and (optimizer.kind != "sgd" or optimizer.momentum):
            text = "upgd is an update rule for plain gradients; use optimizer.kind 'sgd' without momentum"
            return FieldViolation(field, text)
    return None


class MonitoringSpec(Record):
    """How a learner watches itself. Changes nothing about how it learns."""

    interval: Annotated[Whole, Field(ge=0)] = 1000
    """Steps between two plasticity samples; 0 takes none. On the compiled engine a sample takes as long as about 100
    steps of a network of 3×100 units, and some hundreds of a smaller one: for small networks choose a longer
    interval."""
    probe_size: Annotated[Whole, Field(ge=1, le=65536)] = 512
    """Recent examples on which activations and gradients are measured, 1 to 65536. Rank metrics need twice as
    many examples as a layer is wide, so the default serves widths up to 256."""
    dormant_threshold: Annotated[Real, Field(ge=0)] = 0.025
    """A unit is dormant if its share of the layer's mean activity is at most this; the value of Sokar et al."""
    trainability_interval: Annotated[Whole, Field(ge=0)] = 0
    """Steps between two tests of trainability in the service, about: a copy of the learner and the newborn that it was
    learn a fresh task, in the background; 0 tests never. Off by default, for a test costs thousands of steps."""
    average_decay: Decay = 0.999
    """Decay per example of the averages of loss and accuracy: they look back over about 1000 examples, which
    puts the standard error of an accuracy near 0.01."""


class LearnerSpec(Record):
    """Everything that defines a learner before it has seen data."""

    network: NetworkSpec
    """The network's kind and shape; `mlp` if it names no kind."""
    loss: LossSpec
    """What the learner minimises; a bare kind such as 'mse' is accepted."""
    optimizer: OptimizerSpec
    """How a gradient changes the parameters."""
    batch_size: Annotated[Whole, Field(ge=0)] = 1
    """Examples in one step; 0 makes each message one step. 1 by default: online learning."""
    seed: Annotated[Whole, Field(ge=0, le=_LARGEST_SEED)] = 0
    """Seed of the first weights and of every redraw."""
    precision: Precision = "float32"
    """Of products and convolutions. With bfloat16 they run under `torch.autocast`, forwards and back; parameters and
    all that is kept beside them, losses and outputs stay float32."""
    resets: ResetSpec = ResetSpec()
    """Which units are reset, and when."""
    methods: tuple[MethodSpec, ...] = ()
    """Other methods against loss of plasticity, to be used beside the resets or in their place. None by default."""
    monitoring: MonitoringSpec = MonitoringSpec()
    """How the learner watches itself."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.loss.kind == "cross_entropy" and self.network.out_features == 1:
            raise contradiction(
                "network.out_features",
                "cross_entropy needs at least 2 classes; use binary_cross_entropy for a single output",
            )
        if self.network.normalizes_batches and self.batch_size < 2:
            raise contradiction(
                "network.normalization",
                "batch normalisation needs steps of several examples; set batch_size to 2 or more, or use 'group'",
            )
        plain = self.network.is_plain and not self.methods and self.precision == "float32"
        if self.monitoring.trainability_interval and not plain:
            raise contradiction(
                "monitoring.trainability_interval",
                "Only copies of plain multilayer perceptrons in float32 without methods are tested beside their "
                "learners; set it to 0, and call cbp.measure_trainability on a snapshot",
            )
        registered = isinstance(self.network, RegisteredSpec)  # its layers show when it is built
        problem = None if registered else self.misplaced(self.layer_names[:-1])
        problem = problem or method_contradiction(self.methods, self.resets, self.optimizer)
        if problem is not None:
            raise contradiction(problem.field, problem.description)
        return self

    def misplaced(self, hidden_layers: Sequence[str]) -> FieldViolation | None:
        """The first of the resets and methods for which a network of these hidden layers has no place."""
        misnamed = self.resets.misnamed_layer(hidden_layers)
        if misnamed is not None:
            return FieldViolation(f"resets.{misnamed.field}", misnamed.description)
        for place, method in enumerate(self.methods):
            if method.kind in _RESETS_UNITS and not hidden_layers:
                return FieldViolation(
                    f"methods[{place}].kind", f"The network has no units for {method.kind}; remove it"
                )
        return None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """`hidden_0`, `hidden_1`, … and `output`; of any but a registered architecture."""
        return (*hidden_layers(len(self.network.hidden_units)), OUTPUT_LAYER)

    @property
    def mlp(self) -> MlpSpec:
        """The network of a learner that is a plain multilayer perceptron."""
        assert isinstance(self.network, MlpSpec)
        return self.network

    @property
    def parameter_count(self) -> int:
        """All that the network learns: weights, biases and so on; of any but a registered architecture."""
        return self.network.parameter_count

    @property
    def replacement_rates(self) -> tuple[float, ...]:
        """The rate in force in each hidden layer, 0 where units are not reset; of any but a registered architecture."""
        return self.resets.rates(self.layer_names[:-1])

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> "LearnerSpec":
        """The specification that a JSON object describes. Raises `SpecError`."""
        if not isinstance(plain, Mapping):
            raise SpecError([FieldViolation("spec", f"Expected an object, got {type(plain).__name__}")])
        strangers = [key for key in plain if not isinstance(key, str)]
        if strangers:
            raise SpecError([FieldViolation("spec", f"Field names are strings; got {shown(strangers[0])}")])
        return cls(**plain)

    def to_plain(self) -> dict[str, Any]:
        """A JSON object that `parse` turns back into this specification."""
        return self.model_dump(mode="json")

    def check_update(self, new: "LearnerSpec") -> None:
        """Raises `SpecError` if a learner of this specification cannot be turned into one of the new one."""
        fixed = ("network", "loss", "batch_size", "seed", "precision", "methods")
        violations = [_cannot_change(name) for name in fixed if getattr(self, name) != getattr(new, name)]
        if self.optimizer.kind != new.optimizer.kind:
            violations.append(_cannot_change_optimizer(self.optimizer.kind, new.optimizer.kind))
        if violations:
            raise SpecError(violations)

    def check_kinds(self, plain: Mapping[str, Any]) -> None:
        """Raises `SpecError` if a JSON object that is to become the learner's new specification has another kind of
        network, loss or optimizer.

        To be asked before `parse`, which would blame the settings of the one kind that the other does not have.
        """
        violations = [
            _cannot_change(name)
            for name in ("network", "loss")
            if _kind_in(plain, name) not in (None, getattr(self, name).kind)
        ]
        kind = _kind_in(plain, "optimizer")
        if kind not in (None, self.optimizer.kind):
            violations.append(_cannot_change_optimizer(self.optimizer.kind, kind))
        if violations:
            raise SpecError(violations)


def _kind_in(plain: Mapping[str, Any], field: str) -> object:
    """None if the object names none there."""
    value = plain.get(field)
    return value.get("kind") if isinstance(value, Mapping) else value


def _cannot_change(field: str) -> FieldViolation:
    return FieldViolation(field, "Cannot change on a live learner; create another learner for it")


def _cannot_change_optimizer(present: str, wanted: object) -> FieldViolation:
    description = (
        f"Cannot change from {present!r} to {shown(wanted)} on a live learner, only its other settings can; create "
        "another learner for it"
    )
    return FieldViolation("optimizer.kind", description)
