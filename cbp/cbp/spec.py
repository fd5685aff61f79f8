"""What a learner is: its network, loss, optimizer, resets and monitoring.

Frozen, keyword-only records. Construction validates; what is wrong is raised as `SpecError`, each violation
with the dotted path of its field.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from cbp.errors import FieldViolation, SpecError, shown

Activation = Literal["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh", "sigmoid", "identity"]
Initializer = Literal["kaiming", "xavier", "lecun", "default"]
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

OUTPUT_LAYER = "output"
_HIDDEN_PREFIX = "hidden_"
_LARGEST_SEED = 2**63 - 1
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_LEAST_FLOAT32 = 2.0**-149


def hidden_layer_name(index: int) -> str:
    return f"{_HIDDEN_PREFIX}{index}"


def _refuse_text_and_bool(value: object) -> object:
    """Numbers arrive as numbers: "1e-4" or true where a rate belongs is a mistake upstream, not a notation."""
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _refuse_float32_overflow(value: object) -> object:
    """Settings are float32 in a step; one that becomes infinite there would make every parameter NaN."""
    if isinstance(value, int | float) and _LARGEST_FLOAT32 < abs(value) < math.inf:
        raise PydanticCustomError("float32_overflow", "Input should be finite in float32")
    return value


def _refuse_float32_underflow(value: float) -> float:
    """What must not be 0 must not become 0 in a step, either."""
    if value < _LEAST_FLOAT32:
        raise PydanticCustomError("float32_underflow", "Input should be greater than 0 in float32")
    return value


Whole = Annotated[int, BeforeValidator(_refuse_text_and_bool)]
Real = Annotated[
    float,
    BeforeValidator(_refuse_float32_overflow),
    BeforeValidator(_refuse_text_and_bool),
    Field(allow_inf_nan=False),
]
Positive = Annotated[Real, Field(gt=0), AfterValidator(_refuse_float32_underflow)]
Width = Annotated[Whole, Field(ge=1)]
Rate = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]


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


def _violations(error: ValidationError) -> list[FieldViolation]:
    found = []
    for details in error.errors(include_url=False):
        if details["type"] == _FIELD_VIOLATION:
            context = details["ctx"]
            found.append(FieldViolation(context["field"], context["description"]))
        else:
            found.append(FieldViolation(_dotted_path(details), _description(details)))
    return found


def _dotted_path(details: ErrorDetails) -> str:
    path, below_union = "", False
    for part in details["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part == "[key]":
            continue
        elif not below_union and part in _UNION_TAGS.get(re.sub(r"\[\d+\]", "", path), ()):
            below_union = True  # pydantic puts the tag of a union into the path; the user never wrote it there
        else:
            path += f".{part}" if path else part
    if details["type"] in _TAG_ERRORS:
        path += ".kind"
    return path or "spec"


def _description(details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return "Field required"
    if details["type"] == "extra_forbidden":
        return "Unknown field; remove it or correct its spelling"
    if details["type"] in _TAG_ERRORS:
        return f"Expected one of {', '.join(_UNION_TAGS[str(details['loc'][0])])}"
    return f"{details['msg']}; got {shown(details['input'])}"


_FIELD_VIOLATION = "field_violation"
_TAG_ERRORS = frozenset({"union_tag_invalid", "union_tag_not_found"})
_UNION_TAGS: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam", "adamw"),
    "methods": (
        "l2_init",
        "shrink_and_perturb",
        "redo",
        "self_normalized_resets",
        "upgd",
        "selective_weight_reinitialization",
    ),
}
"""By the union's field, without places in lists."""


def _contradiction(field: str, description: str) -> PydanticCustomError:
    """An error found only by looking at several fields together; it names the one to change."""
    context = {"field": field, "description": description}
    return PydanticCustomError(_FIELD_VIOLATION, "{field}: {description}", context)


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(_violations(error)) from None

    # Without this mark pydantic would build nested records through the __init__ above, and their errors would
    # leave the outer validation without the path that leads to them.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class MlpSpec(_Spec):
    """A multilayer perceptron: linear layers with one activation between them, and a linear output layer."""

    kind: Literal["mlp"] = "mlp"
    """The sort of network; today there is one."""
    in_features: Width
    """Values in one example, at least 1."""
    hidden: Annotated[tuple[Width, ...], Field(min_length=1)]
    """Units in each hidden layer, first layer first; at least one layer, since resets need hidden units."""
    out_features: Width
    """Outputs: classes for cross_entropy, predicted values otherwise; at least 1."""
    activation: Activation = "relu"
    """The hidden units' nonlinearity. ReLU by default, for which the paper's evidence was gathered."""
    initializer: Initializer = "kaiming"
    """Distribution of the first weights, and of every redraw: a reset unit starts like a new one. Kaiming by
    default, as published."""


class LossSpec(_Spec):
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


class SgdSpec(_Spec):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive
    """Learning rate, above 0. No default: it depends on the data."""
    momentum: Decay = 0.0
    """Share of the last update that carries over, from 0 up to but not including 1. 0 by default, as published."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """L2 coefficient, added to the gradient as weight_decay times the parameter."""


class _AdamSpec(_Spec):
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


OptimizerSpec = Annotated[SgdSpec | AdamSpec | AdamWSpec, Field(discriminator="kind")]


class ResetSpec(_Spec):
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
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:3])}, …, {names[-1]}"


class L2InitSpec(_Spec):
    """L2 Init, also called regenerative regularisation: pulls every parameter towards its first value."""

    kind: Literal["l2_init"] = "l2_init"
    strength: Positive
    """Coefficient, above 0, of (parameter − first value) in the gradient: as weight_decay, which pulls towards 0. Twice
    the λ of Kumar et al., who add λ‖θ − θ₀‖² to the loss. No default: it depends on the data."""


class ShrinkAndPerturbSpec(_Spec):
    """Shrink and perturb: θ ← shrink · θ + perturb · ε, with ε a fresh draw of first values."""

    kind: Literal["shrink_and_perturb"] = "shrink_and_perturb"
    shrink: Rate
    """λ, from 0 to 1: what is left of every parameter. No default: it depends on the data and on the interval."""
    perturb: Rate
    """σ, from 0 to 1: share of a fresh draw that is added."""
    interval: Annotated[Whole, Field(ge=1)] = 1
    """Steps between two times; 1 by default, as Dohare et al. run it. Ash and Adams do it once for each new task."""


class ReDoSpec(_Spec):
    """ReDo: every so many steps, resets all units that are dormant."""

    kind: Literal["redo"] = "redo"
    interval: Annotated[Whole, Field(ge=1)] = 1000
    """Steps between two looks, over which activity is averaged; the paper's value."""
    dormant_threshold: Annotated[Real, Field(ge=0)] = 0.025
    """τ: a unit is dormant if its share of its group's mean activity is at most this; the paper's value."""


class SelfNormalizedResetsSpec(_Spec):
    """Self-normalised resets: resets a unit that is silent for longer than it used to be."""

    kind: Literal["self_normalized_resets"] = "self_normalized_resets"
    rejection_level: Annotated[Positive, Field(lt=1)] = 1e-4
    """η, between 0 and 1: a unit is reset once silences as long as its present one were at most this share of its own
    so far. About that share of a healthy unit's silences ends in a reset, too, so batches of one example need less than
    the 0.01 to 0.1 for large batches."""
    longest_silence: Annotated[Whole, Field(ge=2)] = 10_000
    """Steps of silence after which any unit is reset, however little is known of it."""


class UpgdSpec(_Spec):
    """Utility-based perturbed gradient descent, first order, global: w ← w − lr · (g + ξ)(1 − scaled utility)."""

    kind: Literal["upgd"] = "upgd"
    noise: Annotated[Real, Field(ge=0)] = 1e-3
    """σ, the standard deviation of ξ, in units of the gradient; the default of the published code."""
    decay_rate: Decay = 0.999
    """Decay per step of the running utility; the default of the published code."""


class SelectiveWeightReinitializationSpec(_Spec):
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


class MonitoringSpec(_Spec):
    """How a learner watches itself. Changes nothing about how it learns."""

    interval: Annotated[Whole, Field(ge=0)] = 1000
    """Steps between two plasticity samples; 0 takes none. A sample costs about as much as 35 steps, so that at 1000
    watching takes 2 to 5 % of the time."""
    probe_size: Annotated[Whole, Field(ge=1, le=65536)] = 512
    """Recent examples on which activations and gradients are measured, 1 to 65536. Rank metrics need twice as
    many examples as a layer is wide, so the default serves widths up to 256."""
    dormant_threshold: Annotated[Real, Field(ge=0)] = 0.025
    """A unit is dormant if its share of the layer's mean activity is at most this; the value of Sokar et al."""
    average_decay: Decay = 0.999
    """Decay per example of the averages of loss and accuracy: they look back over about 1000 examples, which
    puts the standard error of an accuracy near 0.01."""


class LearnerSpec(_Spec):
    """Everything that defines a learner before it has seen data."""

    network: MlpSpec
    """The network's shape."""
    loss: LossSpec
    """What the learner minimises; a bare kind such as 'mse' is accepted."""
    optimizer: OptimizerSpec
    """How a gradient changes the parameters."""
    batch_size: Annotated[Whole, Field(ge=0)] = 1
    """Examples in one step; 0 makes each message one step. 1 by default: online learning."""
    seed: Annotated[Whole, Field(ge=0, le=_LARGEST_SEED)] = 0
    """Seed of the first weights and of every redraw."""
    resets: ResetSpec = ResetSpec()
    """Which units are reset, and when."""
    methods: tuple[MethodSpec, ...] = ()
    """Other methods against loss of plasticity, to be used beside the resets or in their place. None by default."""
    monitoring: MonitoringSpec = MonitoringSpec()
    """How the learner watches itself."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.loss.kind == "cross_entropy" and self.network.out_features == 1:
            raise _contradiction(
                "network.out_features",
                "cross_entropy needs at least 2 classes; use binary_cross_entropy for a single output",
            )
        misnamed = self.resets.misnamed_layer(self.layer_names[:-1])
        if misnamed is not None:
            raise _contradiction(f"resets.{misnamed.field}", misnamed.description)
        clash = method_contradiction(self.methods, self.resets, self.optimizer)
        if clash is not None:
            raise _contradiction(clash.field, clash.description)
        return self

    @property
    def layer_names(self) -> tuple[str, ...]:
        """`hidden_0`, `hidden_1`, … and `output`."""
        return (*(hidden_layer_name(i) for i in range(len(self.network.hidden))), OUTPUT_LAYER)

    @property
    def parameter_count(self) -> int:
        """Weights and biases of the network."""
        widths = (self.network.in_features, *self.network.hidden, self.network.out_features)
        return sum((into + 1) * out for into, out in pairwise(widths))

    @property
    def replacement_rates(self) -> tuple[float, ...]:
        """The rate in force in each hidden layer; 0 where units are not reset."""
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
        fixed = ("network", "loss", "batch_size", "seed", "methods")
        violations = [
            FieldViolation(name, "Cannot change on a live learner; create another learner for it")
            for name in fixed
            if getattr(self, name) != getattr(new, name)
        ]
        if self.optimizer.kind != new.optimizer.kind:
            violations.append(
                FieldViolation(
                    "optimizer.kind",
                    f"Cannot change from {self.optimizer.kind!r} to {new.optimizer.kind!r} on a live learner, "
                    "only its other settings can; create another learner for it",
                )
            )
        if violations:
            raise SpecError(violations)
