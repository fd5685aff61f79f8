"""What networks a learner may have: their shapes and options, one record for each kind.

A plain multilayer perceptron runs on the engines for stacks of linear layers. Every other network is built as a
`torch.nn.Module` by `cbp.architectures`, and trained by the engine "module".
"""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, model_validator
from pydantic_core import PydanticCustomError

from cbp.errors import FieldViolation, SpecError
from cbp.spec.network_profile import NetworkProfile, Tally
from cbp.spec.spec_record import Real, Record, Whole, Width, contradiction

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

    def encode(self, in_features: int, tally: Tally) -> None:
        """Adds up what becomes of so many features in one row."""
        if self.normalize:
            tally.values(in_features - len(self.columns))
        for column in self.columns:
            if column.dimension:
                tally.table(column.categories, column.dimension, 1)
            else:
                tally.values(column.categories)
        if self.columns:
            tally.values(self.width(in_features))  # side by side

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
    def profile(self) -> NetworkProfile:
        """What it takes."""
        raise NotImplementedError

    @property
    def hidden_units(self) -> tuple[int, ...]:
        """Units of each hidden layer, or group of units that are reset alike: `hidden_0`, `hidden_1`, …"""
        return self.profile.hidden_units

    @property
    def parameter_count(self) -> int:
        return self.profile.parameters


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

    @cached_property
    def profile(self) -> NetworkProfile:
        tally = Tally()
        self.inputs.encode(self.in_features, tally)
        into = self.inputs.width(self.in_features)
        for units in self.hidden:
            tally.linear(into, units)
            if self.normalization == "layer":
                tally.normalization(units)
            into = 2 * units if self.activation == "crelu" else units
            if not self.is_plain:  # there an activation takes the place of what it is of
                tally.values(into)
        tally.linear(into, self.out_features)
        return tally.profile(self.hidden, self.out_features)


class LinearSpec(_Tabular):
    """One linear layer, without hidden units: the simplest learner, and one that has nothing to reset."""

    kind: Literal["linear"] = "linear"
    initializer: Initializer = "kaiming"
    """Distribution of the first weights."""

    @cached_property
    def profile(self) -> NetworkProfile:
        tally = Tally()
        self.inputs.encode(self.in_features, tally)
        tally.linear(self.inputs.width(self.in_features), self.out_features)
        return tally.profile((), self.out_features)


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

    def _normalized(self, tally: Tally) -> None:
        if self.inputs.normalize:
            tally.values(self.input_size)


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

    @cached_property
    def profile(self) -> NetworkProfile:
        tally = Tally()
        self._normalized(tally)
        into, height, width = self.input_shape
        for channels in self.channels:
            tally.linear(into * self.kernel_size**2, channels, height * width)
            if self.normalization != "none":
                tally.normalization(channels, height * width)
            tally.values(channels * height * width)
            if self.pooling > 1:
                height, width = height // self.pooling, width // self.pooling
                tally.values(channels * height * width)
            into = channels
        into *= height * width
        for units in self.hidden:
            tally.linear(into, units)
            tally.values(units)
            into = units
        tally.linear(into, self.out_features)
        return tally.profile((*self.channels, *self.hidden), self.out_features)


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

    @cached_property
    def profile(self) -> NetworkProfile:
        tally = Tally()
        self._normalized(tally)
        _, height, width = self.input_shape
        self._convolve(tally, self.in_channels * 9, self.channels[0], height * width)
        tally.values(self.channels[0] * height * width)
        into = self.channels[0]
        for stage, channels in enumerate(self.channels):
            for block in range(self.blocks):
                halved = bool(stage) and not block
                if halved:
                    height, width = (height + 1) // 2, (width + 1) // 2
                self._convolve(tally, into * 9, channels, height * width)
                self._convolve(tally, channels * 9, channels, height * width)
                if halved or into != channels:
                    self._convolve(tally, into, channels, height * width)
                tally.values(3 * channels * height * width)  # two activations and a sum
                into = channels
        tally.values(into)  # the mean over positions
        tally.linear(into, self.out_features)
        # What a stage's shortcuts carry is one group, what is within each block another.
        units = tuple(channels for channels in self.channels for _ in range(self.blocks + 1))
        return tally.profile(units, self.out_features)

    def _convolve(self, tally: Tally, into: int, channels: int, positions: int) -> None:
        tally.linear(into, channels, positions, bias=self.normalization == "none")
        if self.normalization != "none":
            tally.normalization(channels, positions)


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

    @cached_property
    def profile(self) -> NetworkProfile:
        tally = Tally()
        width = self.width
        match self.input:
            case "tokens":
                tokens = self.length
                tally.table(self.vocabulary, width, tokens)
            case "sequence":
                tokens = self.length
                if self.inputs.normalize:
                    tally.values(self.input_size)
                tally.linear(self.in_features, width, tokens)
            case "tabular":
                tokens, quantities = self.in_features, self.in_features - len(self.inputs.columns)
                tally.table(2 * max(quantities, 1), width, quantities)  # a direction and an offset for each
                for column in self.inputs.columns:
                    tally.table(column.categories, width, 1)
                tally.values(tokens * width + (quantities if self.inputs.normalize else 0))
        if self.length:
            tally.parameters(tokens * width)  # of places
            tally.values(tokens * width)
        for _ in range(self.depth):
            tally.normalization(width, tokens)
            for _ in ("queries", "keys", "values", "output"):
                tally.linear(width, width, tokens)
            # Every token with every other, in every head: scores, their shares, and what they attend to.
            tally.product(tokens * tokens * width, tokens * tokens * self.heads)
            tally.product(tokens * tokens * width, tokens * tokens * self.heads + tokens * width)
            tally.normalization(width, tokens)
            tally.linear(width, self.feed_forward, tokens)
            tally.values((self.feed_forward + 2 * width) * tokens)  # an activation and two sums
            tally.linear(self.feed_forward, width, tokens)
        tally.normalization(width, tokens)
        tally.values(width)  # the mean over tokens
        tally.linear(width, self.out_features)
        return tally.profile((self.feed_forward,) * self.depth, self.out_features)


class RegisteredSpec(_Network):
    """An architecture that the operator has installed, by an entry point in the group `cbp.networks`.

    What it takes shows only when it is built: `cbp.architectures.profile.profile_of` tells.
    """

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

    @cached_property
    def profile(self) -> NetworkProfile:
        text = "What it takes shows only when it is built; ask cbp.architectures.profile.profile_of"
        raise SpecError([FieldViolation("network.name", text)])

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
