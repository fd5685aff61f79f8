"""What networks a learner may have: their shapes and options, one record for each kind.

A plain multilayer perceptron runs on the engines for stacks of linear layers. Every other network is built as a
`torch.nn.Module` by `cbp.architectures`, and trained by the engine "module".
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from cbp.spec.spec_record import Real, Record, Whole, Width, contradiction

if TYPE_CHECKING:
    from cbp.architectures.profile import NetworkProfile

Activation = Literal["relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh", "sigmoid", "identity"]
Initializer = Literal["kaiming", "xavier", "lecun", "default"]
Normalization = Literal["none", "batch", "group"]

LARGEST_WHOLE = 2**24
"""Tokens and categories are whole numbers below this, which float32 holds exactly: examples are float32 throughout."""
_MOST_LAYERS = 256
_MOST_INPUTS = 2**22  # values in one example, and outputs

# Bounds of what is built as a module, whatever a server allows: its layers are listed unit by unit.
Size = Annotated[Whole, Field(ge=1, le=2**16)]
Sizes = Annotated[tuple[Size, ...], Field(max_length=_MOST_LAYERS)]


class CategoricalColumn(Record):
    """A feature column whose values are categories: whole numbers that mean nothing as quantities."""

    column: Annotated[Whole, Field(ge=0)]
    """Which of the features it is, counted from 0."""
    cardinality: Annotated[Whole, Field(ge=0, le=2**20)] = 0
    """Categories, if they are known and numbered from 0; give either this or hash_buckets."""
    hash_buckets: Annotated[Whole, Field(ge=0, le=2**20)] = 0
    """Buckets to which any whole number from −2²⁴ to 2²⁴ is hashed, if the categories are not known; those in one
    bucket cannot be told apart."""
    dimension: Annotated[Whole, Field(ge=0, le=2**12)] = 0
    """Values of a learnt embedding; 0 is one-hot. In a transformer each column is embedded in its width, and this
    stays 0."""

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if (self.cardinality == 0) == (self.hash_buckets == 0):
            raise PydanticCustomError("categories", "Give either cardinality or hash_buckets, above 0")
        return self

    @property
    def categories(self) -> int:
        """Rows of its embedding."""
        return self.cardinality or self.hash_buckets

    @property
    def width(self) -> int:
        """Values that it becomes."""
        return self.dimension or self.categories


class InputSpec(Record):
    """What becomes of features before the network sees them."""

    normalize: bool = False
    """Whether each feature, or channel of an image, is brought to mean 0 and variance 1 by running statistics. Every
    step's examples count in them before it looks; predictions use them as they are. They are part of the learner."""
    window: Annotated[Whole, Field(ge=2, le=LARGEST_WHOLE)] = 100_000
    """Examples over which the statistics look back: all alike up to so many, then older ones fade. 2 to 2²⁴."""
    columns: Annotated[tuple[CategoricalColumn, ...], Field(max_length=1024)] = ()
    """Features that are categories, for `mlp`, `linear` and tabular `transformer`; the others are quantities."""

    @property
    def changes_nothing(self) -> bool:
        return not self.normalize and not self.columns

    def width(self, in_features: int) -> int:
        """Values in place of the features, with categories encoded."""
        return in_features - len(self.columns) + sum(column.width for column in self.columns)

    def misplaced(self, in_features: int) -> PydanticCustomError | None:
        """What is wrong about the columns of so many features."""
        seen: set[int] = set()
        for place, column in enumerate(self.columns):
            field = f"network.inputs.columns[{place}].column"
            if column.column >= in_features:
                return contradiction(field, f"There are {in_features} features, 0 to {in_features - 1}")
            if column.column in seen:
                return contradiction(field, f"Column {column.column} is named twice; remove one entry")
            seen.add(column.column)
        if self.columns and self.width(in_features) > _MOST_INPUTS:
            return contradiction(
                "network.inputs.columns",
                f"Encoded, they make {self.width(in_features)} inputs, at most {_MOST_INPUTS} are possible; "
                "give columns of many categories a dimension, or hash them to fewer buckets",
            )
        return None


class _Network(Record):
    """What all networks have in common."""

    out_features: Width
    """Outputs: classes for cross_entropy, predicted values otherwise; at least 1."""
    inputs: InputSpec = InputSpec()
    """Normalisation, and which features are categories."""

    @model_validator(mode="after")
    def _has_countable_outputs(self) -> Self:
        if self.out_features > _MOST_INPUTS and not self.is_plain:
            raise contradiction("network.out_features", f"At most {_MOST_INPUTS} are possible in such a network")
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        raise NotImplementedError

    @property
    def input_size(self) -> int:
        """Values in one example."""
        return prod(self.input_shape)

    @property
    def vocabulary_size(self) -> int | None:
        """Features are whole numbers below this; None if they are any numbers."""
        return None

    @property
    def is_plain(self) -> bool:
        """Whether it is a stack of linear layers with one activation between them, and nothing else."""
        return False

    @property
    def normalizes_batches(self) -> bool:
        """Whether a step of a single example cannot be normalised."""
        return False

    @cached_property
    def profile(self) -> "NetworkProfile":
        """What it takes, found on a module without memory. Raises `SpecError` if it cannot be built."""
        # Imported when it is needed: what builds modules needs the records of this one.
        from cbp.architectures.profile import profile_of

        return profile_of(type(self), self.model_dump_json())

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """Units of each hidden layer, or group of units that are reset alike: `hidden_0`, `hidden_1`, …"""
        return self.profile.hidden_units

    @property
    def parameter_count(self) -> int:
        return self.profile.parameters

    @property
    def multiplications(self) -> int:
        """For one example, forwards; about."""
        return self.profile.multiplications

    @property
    def activation_values(self) -> int:
        """Values of all layers but the last, for one example; about."""
        return self.profile.activation_values


class _Tabular(_Network):
    in_features: Width
    """Values in one example, at least 1."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_features,)

    @model_validator(mode="after")
    def _has_its_columns(self) -> Self:
        if self.in_features > _MOST_INPUTS and not self.is_plain:
            raise contradiction("network.in_features", f"At most {_MOST_INPUTS} are possible with these options")
        if (problem := self.inputs.misplaced(self.in_features)) is not None:
            raise problem
        return self


class MlpSpec(_Tabular):
    """A multilayer perceptron: linear layers with one activation between them, and a linear output layer."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[tuple[Width, ...], Field(min_length=1)]
    """Units in each hidden layer, first layer first; at least one layer, since resets need hidden units."""
    activation: Literal[Activation, "crelu"] = "relu"
    """The hidden units' nonlinearity. ReLU by default, for which the paper's evidence was gathered. crelu shows the
    next layer both relu(z) and relu(−z) (Shang et al. 2016), which has then twice as many inputs."""
    initializer: Initializer = "kaiming"
    """Distribution of the first weights, and of every redraw: a reset unit starts like a new one. Kaiming by
    default, as published."""
    normalization: Literal["none", "layer"] = "none"
    """layer: layer normalisation of each hidden layer, before its activation."""

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
        if not self.is_plain and (len(self.hidden) > _MOST_LAYERS or max(self.hidden) > 2**16):
            text = f"With these options at most {_MOST_LAYERS} layers of at most {2**16} units are possible"
            raise contradiction("network.hidden", text)
        return self

    @property
    def is_plain(self) -> bool:
        return self.normalization == "none" and self.activation != "crelu" and self.inputs.changes_nothing

    @property
    def plain_activation(self) -> Activation:
        """That of a plain one."""
        assert self.activation != "crelu"
        return self.activation

    @property
    def hidden_units(self) -> tuple[int, ...]:
        return self.hidden

    @property
    def parameter_count(self) -> int:
        return sum((into + 1) * out for into, out in self._layers) if self.is_plain else self.profile.parameters

    @property
    def multiplications(self) -> int:
        return sum(into * out for into, out in self._layers) if self.is_plain else self.profile.multiplications

    @property
    def activation_values(self) -> int:
        return sum(self.hidden) if self.is_plain else self.profile.activation_values

    @property
    def _layers(self) -> list[tuple[int, int]]:
        return list(pairwise((self.in_features, *self.hidden, self.out_features)))


class LinearSpec(_Tabular):
    """One linear layer, without hidden units: the simplest learner, and one that has nothing to reset."""

    kind: Literal["linear"] = "linear"
    initializer: Initializer = "kaiming"
    """Distribution of the first weights."""


class _Image(_Network):
    in_channels: Size
    """Channels of an image; an example is [channels, height, width]."""
    height: Size
    width: Size
    """In pixels."""
    activation: Activation = "relu"
    """The nonlinearity of all layers but the last."""
    initializer: Initializer = "kaiming"
    """Distribution of the first weights, and of every redraw."""

    normalization: Normalization = "none"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.height, self.width)

    @property
    def normalizes_batches(self) -> bool:
        return self.normalization == "batch"

    @model_validator(mode="after")
    def _is_an_image(self) -> Self:
        if self.inputs.columns:
            raise contradiction("network.inputs.columns", "An image has no columns; remove them")
        if self.input_size > _MOST_INPUTS:
            text = f"Makes images of {self.input_size} values, at most {_MOST_INPUTS} are possible"
            raise contradiction("network.height", text)
        return self


class ConvnetSpec(_Image):
    """Convolutions, each with an activation and a pooling behind it; then linear layers."""

    kind: Literal["convnet"] = "convnet"
    channels: Annotated[Sizes, Field(min_length=1)]
    """Channels of each convolution, first one first."""
    kernel_size: Annotated[Whole, Field(ge=1, le=31)] = 3
    """Of every convolution, in pixels; odd. Borders are padded with zeros, so that images keep their size."""
    pooling: Annotated[Whole, Field(ge=1, le=16)] = 2
    """Pixels on a side that each maximum is of, behind every convolution; 1 pools nothing."""
    hidden: Sizes = ()
    """Units of linear layers between the convolutions and the output; none by default."""
    normalization: Normalization = "none"
    """Between convolution and activation. batch needs steps of several examples; group is of up to 8 channels each, and
    works with any."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise contradiction("network.kernel_size", f"Expected an odd number; got {self.kernel_size}")
        smallest = min(self.height, self.width)
        if self.pooling ** len(self.channels) > smallest:
            text = (
                f"{len(self.channels)} poolings by {self.pooling} leave nothing of {self.height} x {self.width} "
                "pixels; use fewer channels entries, or pooling 1"
            )
            raise contradiction("network.pooling", text)
        return self


class ResnetSpec(_Image):
    """A residual network for small images (He et al. 2016): a convolution, stages of blocks of two convolutions each,
    each stage but the first with half the height and width of the one before; the mean over positions, and a linear
    layer."""

    kind: Literal["resnet"] = "resnet"
    channels: Annotated[Sizes, Field(min_length=1, max_length=8)] = (64, 128, 256, 512)
    """Channels of each stage; those of ResNet-18 by default."""
    blocks: Annotated[Whole, Field(ge=1, le=32)] = 2
    """Blocks in each stage."""
    normalization: Normalization = "group"
    """Behind every convolution. group by default, since online learning has steps of few examples; batch, as published,
    needs steps of several."""


class TransformerSpec(_Network):
    """A transformer encoder; the mean over tokens goes through a linear layer. What a token is, `input` says."""

    kind: Literal["transformer"] = "transformer"
    input: Literal["tokens", "sequence", "tabular"]
    """tokens: integers [length], embedded. sequence: vectors [length, in_features]. tabular: in_features values, of
    which each is a token (Gorishniy et al. 2021)."""
    length: Annotated[Whole, Field(ge=0, le=2**16)] = 0
    """Tokens in one example, for tokens and sequence; all examples have as many."""
    in_features: Annotated[Whole, Field(ge=0, le=2**16)] = 0
    """For sequence, values in each vector; for tabular, columns."""
    vocabulary: Annotated[Whole, Field(ge=0, le=2**20)] = 0
    """For tokens: they are whole numbers from 0 up to but not including this."""
    width: Size = 64
    """Values of a token within the network; a multiple of heads."""
    depth: Annotated[Whole, Field(ge=1, le=64)] = 2
    """Blocks of attention and feed-forward layers."""
    heads: Annotated[Whole, Field(ge=1, le=64)] = 4
    """Of attention."""
    feed_forward: Size = 256
    """Hidden units of each block's feed-forward layers; these are what is reset."""
    activation: Activation = "gelu"
    """Theirs."""
    initializer: Initializer = "kaiming"
    """Distribution of the first weights, and of every redraw."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        match self.input:
            case "tokens":
                return (self.length,)
            case "sequence":
                return (self.length, self.in_features)
            case "tabular":
                return (self.in_features,)

    @property
    def vocabulary_size(self) -> int | None:
        return self.vocabulary if self.input == "tokens" else None

    @model_validator(mode="after")
    def _has_what_its_input_needs(self) -> Self:
        needed = {
            "tokens": ("length", "vocabulary"),
            "sequence": ("length", "in_features"),
            "tabular": ("in_features",),
        }
        for field in ("length", "in_features", "vocabulary"):
            if (getattr(self, field) > 0) != (field in needed[self.input]):
                text = f"Input {self.input!r} needs {' and '.join(needed[self.input])} above 0, and no more of the kind"
                raise contradiction(f"network.{field}", text)
        if self.width % self.heads:
            text = f"Expected a multiple of heads, which are {self.heads}; got {self.width}"
            raise contradiction("network.width", text)
        if self.input_size > _MOST_INPUTS:
            text = f"Makes examples of {self.input_size} values, at most {_MOST_INPUTS} are possible"
            raise contradiction("network.length", text)
        return self

    @model_validator(mode="after")
    def _prepares_what_it_can(self) -> Self:
        if self.input == "tokens" and self.inputs.normalize:
            raise contradiction("network.inputs.normalize", "Tokens are no quantities; leave it out")
        if self.input != "tabular" and self.inputs.columns:
            raise contradiction("network.inputs.columns", "Only tabular input has columns; remove them")
        if (problem := self.inputs.misplaced(self.in_features)) is not None:
            raise problem
        for place, column in enumerate(self.inputs.columns):
            if column.dimension:
                text = f"A transformer embeds every column in its width, {self.width}; leave it out"
                raise contradiction(f"network.inputs.columns[{place}].dimension", text)
        return self


class RegisteredSpec(_Network):
    """An architecture that the operator has installed, by an entry point in the group `cbp.networks`."""

    kind: Literal["registered"] = "registered"
    name: Annotated[str, Field(min_length=1, max_length=128)]
    """The entry point's."""
    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=7)]
    """Of one example."""
    vocabulary: Annotated[Whole, Field(ge=0, le=LARGEST_WHOLE)] = 0
    """If features are tokens: they are whole numbers from 0 up to but not including this. 0 for any numbers."""
    settings: tuple[tuple[str, Real], ...] = ()
    """Numbers by name, as the architecture takes them; a mapping is accepted."""

    @model_validator(mode="before")
    @classmethod
    def _accept_mapping(cls, value: object) -> object:
        if isinstance(value, Mapping) and isinstance(value.get("settings"), Mapping):
            return {**value, "settings": tuple(sorted(value["settings"].items()))}
        return value

    @field_serializer("settings")
    def _as_mapping(self, settings: tuple[tuple[str, float], ...]) -> dict[str, float]:
        return dict(settings)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def vocabulary_size(self) -> int | None:
        return self.vocabulary or None

    @model_validator(mode="after")
    def _takes_its_inputs_as_they_are(self) -> Self:
        if not self.inputs.changes_nothing:
            raise contradiction("network.inputs", "A registered architecture prepares its inputs itself; leave it out")
        if self.input_size > _MOST_INPUTS:
            text = f"Makes examples of {self.input_size} values, at most {_MOST_INPUTS} are possible"
            raise contradiction("network.shape", text)
        return self


def _known_kind(value: object) -> object:
    """A network without a kind is a multilayer perceptron."""
    return {"kind": "mlp", **value} if isinstance(value, Mapping) else value


AnyNetwork = MlpSpec | LinearSpec | ConvnetSpec | ResnetSpec | TransformerSpec | RegisteredSpec
NetworkSpec = Annotated[Annotated[AnyNetwork, Field(discriminator="kind")], BeforeValidator(_known_kind)]
