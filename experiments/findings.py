"""What is asked, and the cells that answer it, at three sizes.

`full` is the thesis's protocol; `reported` is what docs/paper.md shows, cut down to some hours of two cores;
`quick` shows in minutes that every finding can be had.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from cbp.spec.learner_spec import Utility
from experiments.cells import Cell, masks
from experiments.images import ImageSet
from experiments.streams import Stream, StreamKind

Protocol = Literal["quick", "reported", "full"]

UTILITIES: tuple[str, ...] = get_args(Utility)
SMOOTH_ACTIVATIONS = ("tanh", "sigmoid", "selu", "gelu", "silu", "elu")
FEW_MASKS = ("none", "all", "only first", "all but first")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of a finding is run."""

    seeds: int
    tasks: int
    examples: int = 10_000
    """Of each task."""
    images: ImageSet = "digits_28x28"
    """Where the finding does not say itself."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    question: str
    sizes: Mapping[Protocol, Size]
    """A protocol that is not among them leaves the finding out."""
    build: Callable[[Size], Iterable[Cell]]

    def cells(self, protocol: Protocol, images: ImageSet | None = None) -> list[Cell]:
        """Every cell once. `images` takes the place of the enlarged digits."""
        size = self.sizes.get(protocol)
        if size is None:
            return []
        if images is not None and size.images == "digits_28x28":
            size = replace(size, images=images)
        return list(dict.fromkeys(self.build(size)))


def permuted(size: Size) -> Stream:
    return Stream(kind="permuted_inputs", images=size.images, examples=size.examples)


def of_masks(cell: Cell, names: Sequence[str] | None = None) -> Iterator[Cell]:
    """The cell with each of these masks; with all that its depth has, if none are named."""
    known = masks(len(cell.hidden))
    for name in known if names is None else names:
        yield replace(cell, mask=known[name])


def thesis_cell(size: Size) -> Cell:
    """The thesis's setting, without resets."""
    return Cell(stream=permuted(size), mask=(), seeds=size.seeds, tasks=size.tasks)


def small_cell(size: Size) -> Cell:
    """Three layers of 100 on the digits as they are, each seen once in a task: a run takes seconds."""
    stream = Stream(kind="permuted_inputs", images="digits_8x8", examples=size.examples)
    return Cell(stream=stream, hidden=(100,) * 3, lr=0.01, mask=(), seeds=size.seeds, tasks=size.tasks)


def regression_cell(size: Size, kind: StreamKind = "regression_one_flip") -> Cell:
    """The paper's regression: five hidden units, SGD at 0.01."""
    stream = Stream(kind=kind, images=None, examples=size.examples)
    return Cell(stream=stream, hidden=(5,), lr=0.01, mask=(), seeds=size.seeds, tasks=size.tasks)


# -- which layers --


def _layers(size: Size) -> Iterator[Cell]:
    yield from of_masks(thesis_cell(size))


def _long(size: Size) -> Iterator[Cell]:
    yield from of_masks(thesis_cell(size), ("none", "all", "only first"))


def _widths(size: Size) -> Iterator[Cell]:
    cell = thesis_cell(size)
    narrow = replace(cell, hidden=(20,) * 5, lr=0.001, replacement_rate=1e-3)
    for one in (narrow, replace(cell, hidden=(50,) * 5), cell, replace(cell, hidden=(200,) * 5)):
        yield from of_masks(one, FEW_MASKS)


def _depths(size: Size) -> Iterator[Cell]:
    cell = thesis_cell(size)
    for one in (replace(cell, hidden=(100,) * 2), cell, replace(cell, hidden=(100,) * 8, lr=0.001)):
        yield from of_masks(one, FEW_MASKS)


def _matched(size: Size) -> Iterator[Cell]:
    """As many parameters as five layers of 100 have, in two layers and in eight."""
    cell = thesis_cell(size)
    shallow = replace(cell, hidden=(129,) * 2, replacement_rate=1e-5)
    for one in (shallow, cell, replace(cell, hidden=(86,) * 8, lr=0.001)):
        yield from of_masks(one, FEW_MASKS)


# -- other remedies, other problems --


def _weight_decay(size: Size) -> Iterator[Cell]:
    cell = thesis_cell(size)
    for decay in (0.0, 1e-5, 1e-4, 1e-3):
        yield replace(cell, weight_decay=decay)
    for rate in (1e-4, 1e-3):
        yield from of_masks(replace(cell, weight_decay=1e-4, replacement_rate=rate), ("all", "only first"))
    yield from of_masks(cell, ("all", "only first"))


def _regression(size: Size) -> Iterator[Cell]:
    kinds: tuple[StreamKind, ...] = ("regression_one_flip", "regression_all_redrawn")
    for kind, activation in product(kinds, ("relu", "leaky_relu", "tanh", "sigmoid")):
        cell = replace(regression_cell(size, kind), activation=activation)
        yield cell
        for rate, utility in product((1e-4, 1e-3), ("contribution", "adaptable_contribution")):
            yield from of_masks(replace(cell, replacement_rate=rate, utility=utility), ("all",))


# -- what decides between the first layer and all --


def _decides(size: Size) -> Iterator[Cell]:
    """Input size × examples of a task × learning rate × depth, each run over as many examples.

    Of the 16 combinations the half with an even number of the smaller setting's values: both settings are among them,
    and no two factors together can be mistaken for a third.
    """
    examples = size.tasks * size.examples
    image_sets: tuple[ImageSet, ...] = ("digits_8x8", "digits_28x28")
    combinations = product(
        enumerate(image_sets), enumerate((1797, size.examples)), enumerate((0.01, 0.005)), enumerate((3, 5))
    )
    for (a, images), (b, of_task), (c, lr), (d, depth) in combinations:
        if (a + b + c + d) % 2:
            continue
        stream = Stream(kind="permuted_inputs", images=images, examples=of_task)
        cell = Cell(
            stream=stream, hidden=(100,) * depth, lr=lr, mask=(), seeds=size.seeds, tasks=round(examples / of_task)
        )
        yield from of_masks(cell, ("none", "all", "only first"))


def _decides_more(size: Size) -> Iterator[Cell]:
    """Other changes to the small setting, where the first layer alone falls behind."""
    cell = small_cell(replace(size, examples=1797))
    cell = replace(cell, tasks=round(size.tasks * size.examples / 1797))
    yield from of_masks(cell, ("none", "all", "only first", "first two"))
    for rate in (1e-5, 1e-3):
        yield from of_masks(replace(cell, replacement_rate=rate), ("all", "only first"))
    for width in (50, 200):
        yield from of_masks(replace(cell, hidden=(width,) * 3), ("none", "all", "only first"))
    yield from of_masks(replace(cell, bias_compensation=True), ("all", "only first"))
    for compensation in (False, True):
        adaptable = replace(cell, utility="adaptable_contribution", bias_compensation=compensation)
        yield from of_masks(adaptable, ("all", "only first"))


def _shifts(size: Size) -> Iterator[Cell]:
    kinds: tuple[StreamKind, ...] = ("permuted_inputs", "permuted_labels", "swapped_labels")
    for kind in kinds:
        stream = Stream(kind=kind, images=size.images, examples=size.examples)
        cell = replace(thesis_cell(size), stream=stream, hidden=(100,) * 3)
        yield from of_masks(cell, (*FEW_MASKS, "only third"))


# -- activations --


def _activations(size: Size) -> Iterator[Cell]:
    """As in the thesis: with `contribution`, SELU and tanh also at its learning and replacement rates; then with
    `adaptable_contribution`."""
    cell = thesis_cell(size)
    for activation in ("relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "selu", "tanh"):
        yield from of_masks(replace(cell, activation=activation), ("none", "all", "only first"))
    for activation, rate in (("selu", 1e-4), ("tanh", 1e-6)):
        gentle = replace(cell, activation=activation, lr=0.0005, replacement_rate=rate)
        yield from of_masks(gentle, ("none", "all", "only first"))
    for activation in ("relu", "leaky_relu", "elu", "gelu", "silu", "selu", "tanh"):
        yield from of_masks(replace(cell, activation=activation, utility="adaptable_contribution"), ("all",))


def _tanh(size: Size) -> Iterator[Cell]:
    """The thesis's network and images with tanh, at its lr for ReLU."""
    cell = replace(thesis_cell(size), activation="tanh")
    yield cell
    for utility in ("contribution", "adaptable_contribution"):
        yield from of_masks(replace(cell, utility=utility), ("all", "only first", "all but first", "only fifth"))
    yield from of_masks(thesis_cell(size), ("all",))


def _with_every_utility(cell: Cell) -> Iterator[Cell]:
    yield cell
    for utility, compensation in product(UTILITIES, (False, True)):
        yield from of_masks(replace(cell, utility=utility, bias_compensation=compensation), ("all",))


def small_cell_of(activation: str, size: Size) -> Cell:
    """The small setting, but for two activations that want another: SELU's self-normalising layers half the learning
    rate; sigmoid, which learns nothing there, two layers and twenty times the rate."""
    cell = replace(small_cell(size), activation=activation)
    match activation:
        case "selu":
            return replace(cell, lr=0.005)
        case "sigmoid":
            return replace(cell, hidden=(100,) * 2, lr=0.2)
        case _:
            return cell


def _utilities_tanh(size: Size) -> Iterator[Cell]:
    """Every utility on tanh, the layers with the one that works, and CBP on ReLU to compare with."""
    tanh = small_cell_of("tanh", size)
    yield from _with_every_utility(tanh)
    adaptable = replace(tanh, utility="adaptable_contribution")
    yield from of_masks(adaptable, ("only first", "only second", "only third", "all but first"))
    relu = small_cell(size)
    yield relu
    for utility, compensation in product(("contribution", "adaptable_contribution"), (False, True)):
        yield from of_masks(replace(relu, utility=utility, bias_compensation=compensation), ("all",))


def _utilities(size: Size) -> Iterator[Cell]:
    for activation in ("relu", *SMOOTH_ACTIVATIONS):
        yield from _with_every_utility(small_cell_of(activation, size))


def _activations_long(size: Size) -> Iterator[Cell]:
    """Activations that lose plasticity slowly."""
    for activation in ("gelu", "silu", "elu", "selu"):
        cell = small_cell_of(activation, size)
        yield cell
        for utility in ("contribution", "adaptable_contribution"):
            yield from of_masks(replace(cell, utility=utility), ("all",))


def _utilities_regression(size: Size) -> Iterator[Cell]:
    for activation in (*SMOOTH_ACTIVATIONS, "relu"):
        cell = replace(regression_cell(size), activation=activation, replacement_rate=1e-3)
        yield from _with_every_utility(cell)


def _utilities_labels(size: Size) -> Iterator[Cell]:
    for activation in ("tanh", "relu"):
        cell = small_cell_of(activation, size)
        labels = replace(cell.stream, kind="permuted_labels")
        for utility in ("contribution", "adaptable_contribution"):
            yield from of_masks(replace(cell, stream=labels, utility=utility), FEW_MASKS)


def _layers_by_activation(size: Size) -> Iterator[Cell]:
    for activation in ("relu", *SMOOTH_ACTIVATIONS):
        cell = small_cell_of(activation, size)
        yield cell
        names = ("all", "only first", "only second", "only third", "all but first")
        known = masks(len(cell.hidden))
        yield from of_masks(replace(cell, utility="adaptable_contribution"), [name for name in names if name in known])


def _sigmoid(size: Size) -> Iterator[Cell]:
    """How often, and from what age on, units are reset in one layer of two or in both."""
    cell = small_cell_of("sigmoid", size)
    yield cell
    adaptable = replace(cell, utility="adaptable_contribution")
    for rate, threshold in ((1e-5, 100), (3e-5, 100), (1e-4, 100), (3e-4, 100), (1e-4, 1000)):
        changed = replace(adaptable, replacement_rate=rate, maturity_threshold=threshold)
        yield from of_masks(changed, ("all", "only first", "only second"))


def tanh_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Of the cells of `utilities_tanh`, those whose single units are looked at: three seeds of each."""
    return [
        replace(cell, seeds=min(3, cell.seeds))
        for cell in cells
        if cell.activation == "tanh"
        and not cell.bias_compensation
        and (not cell.mask or cell.utility in ("contribution", "adaptable_contribution"))
    ]


def _sizes(quick: Size, reported: Size, full: Size) -> Mapping[Protocol, Size]:
    return {"quick": quick, "reported": reported, "full": full}


_FULL = Size(seeds=10, tasks=1100)
_FULL_SMALL = Size(seeds=10, tasks=1100, examples=1797)
_QUICK = Size(seeds=2, tasks=10, examples=5000)
_QUICK_SMALL = Size(seeds=2, tasks=30, examples=1797)

FINDINGS: Mapping[str, Finding] = {
    finding.name: finding
    for finding in (
        Finding(
            name="layers",
            question="Does backprop lose plasticity, does CBP keep it, and in which layers must it reset?",
            sizes=_sizes(Size(seeds=2, tasks=20), Size(seeds=5, tasks=50), _FULL),
            build=_layers,
        ),
        Finding(
            name="utilities_tanh",
            question="Does tanh fail by CBP or by its utility? Which ingredient matters?",
            sizes=_sizes(_QUICK_SMALL, Size(seeds=10, tasks=100, examples=1797), _FULL_SMALL),
            build=_utilities_tanh,
        ),
        Finding(
            name="regression",
            question="Does CBP help in slowly changing regression?",
            sizes=_sizes(Size(seeds=3, tasks=20), Size(seeds=10, tasks=100), Size(seeds=100, tasks=500)),
            build=_regression,
        ),
        Finding(
            name="decides",
            question="What decides whether resets in the first layer are enough?",
            sizes=_sizes(Size(seeds=1, tasks=4), Size(seeds=5, tasks=50), Size(seeds=10, tasks=300)),
            build=_decides,
        ),
        Finding(
            name="utilities",
            question="Which utility suits which activation?",
            sizes=_sizes(Size(seeds=1, tasks=20, examples=1797), Size(seeds=10, tasks=60, examples=1797), _FULL_SMALL),
            build=_utilities,
        ),
        Finding(
            name="tanh",
            question="Does what holds for tanh on small images hold in the thesis's setting?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=40), _FULL),
            build=_tanh,
        ),
        Finding(
            name="utilities_regression",
            question="Do the utilities compare alike in regression?",
            sizes=_sizes(Size(seeds=2, tasks=15), Size(seeds=10, tasks=50), Size(seeds=100, tasks=500)),
            build=_utilities_regression,
        ),
        Finding(
            name="decides_more",
            question="What do replacement rate, width and utility change where the first layer is not enough?",
            sizes=_sizes(Size(seeds=1, tasks=4), Size(seeds=3, tasks=30), Size(seeds=10, tasks=300)),
            build=_decides_more,
        ),
        Finding(
            name="utilities_labels",
            question="Do utilities compare alike when labels shift rather than inputs?",
            sizes=_sizes(_QUICK_SMALL, Size(seeds=10, tasks=60, examples=1797), _FULL_SMALL),
            build=_utilities_labels,
        ),
        Finding(
            name="activations_long",
            question="Do activations that lose plasticity slowly lose it in the end?",
            sizes=_sizes(_QUICK_SMALL, Size(seeds=10, tasks=200, examples=1797), _FULL_SMALL),
            build=_activations_long,
        ),
        Finding(
            name="layers_by_activation",
            question="Which layers should be reset with other activations?",
            sizes=_sizes(_QUICK_SMALL, Size(seeds=10, tasks=60, examples=1797), _FULL_SMALL),
            build=_layers_by_activation,
        ),
        Finding(
            name="sigmoid",
            question="Why do resets in both layers of a sigmoid network do less well than in one?",
            sizes=_sizes(_QUICK_SMALL, Size(seeds=10, tasks=60, examples=1797), _FULL_SMALL),
            build=_sigmoid,
        ),
        Finding(
            name="long",
            question="Is the first layer still enough after many more tasks?",
            sizes=_sizes(Size(seeds=1, tasks=40), Size(seeds=3, tasks=150), _FULL),
            build=_long,
        ),
        Finding(
            name="shifts",
            question="Does the kind of shift decide which layers must be reset?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=25), _FULL),
            build=_shifts,
        ),
        Finding(
            name="weight_decay",
            question="Does L2 do as well as resets, and do they combine?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=20), _FULL),
            build=_weight_decay,
        ),
        Finding(
            name="depths",
            question="Does it hold across depths?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=20), _FULL),
            build=_depths,
        ),
        Finding(
            name="widths",
            question="Does the ordering of masks hold across widths?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=20), _FULL),
            build=_widths,
        ),
        Finding(
            name="matched",
            question="Does it hold across depths with as many parameters?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=20), _FULL),
            build=_matched,
        ),
        Finding(
            name="activations",
            question="What happens with each activation in the thesis's setting?",
            sizes=_sizes(_QUICK, Size(seeds=3, tasks=20), _FULL),
            build=_activations,
        ),
    )
}
