"""One learner's steps in code compiled by numba, on the CPU: many steps a call, other threads running meanwhile.

The kernels work on the very memory of the state's tensors, so that everything beside the steps (snapshots, plasticity,
predictions) is the code it is for the torch engine.

Shapes: N examples of a message, I inputs, C outputs, U hidden units.
"""

import functools
import importlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar, get_args

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray

from cbp import losses
from cbp.activations import NONLINEARITIES
from cbp.engines.compiled import measuring, steps
from cbp.engines.compiled.averages import fill_corrections
from cbp.engines.compiled.large_layers import LARGE, is_turned
from cbp.engines.compiled.replacing import replace
from cbp.engines.compiled.table import (
    ADAM,
    ADAMW,
    MOMENTUM_RMSPROP,
    MOMENTUM_SGD,
    NESTEROV_SGD,
    RELU,
    RMSPROP,
    SGD,
    Real,
    Sum,
    Table,
)
from cbp.engines.eager_engine import EagerEngine, Work
from cbp.engines.names import EngineName
from cbp.engines.torch_engine import StackState
from cbp.examples.pending import Examples, Probe
from cbp.networks import FlatLayers, initial_bounds, laid_out
from cbp.optimizers import NORM_MARGIN, AdamState, RmspropState, SgdState
from cbp.plasticity.samples import LayerPlasticity
from cbp.progress import Tally
from cbp.spec.learner_spec import Activation, AdamSpec, AdamWSpec, LearnerSpec, LossKind, RmspropSpec, SgdSpec, Utility
from cbp.units.replacement import DrawSource, GeneratorDraws, ReplacementSchedule

P = ParamSpec("P")
R = TypeVar("R")

_RANDOM_VALUES = 2**20
"""Draws of the `random` utility that are made ahead at most."""
_NANOSECONDS_BETWEEN_CALLS = 1e6
_WORTH_THREADS = 5e5
"""Nanoseconds of steps that are divided among threads, at least."""
_WORTH_A_CALL = 10_000
"""Nanoseconds of a learner's steps that are a call of their own, at least, where learners go one after another."""

_CORRECTED = 18.0
"""1 − e⁻¹⁸ is 1 in float32."""
_KNOWN_CORRECTIONS = 4096
_SMALL_MESSAGE = 1024
"""Examples; room for so many is kept whatever comes."""
_NEVER = 2**62
_NO_LABELS = np.empty(0, np.int64)
_NO_VALUES = np.empty((0, 0), np.float32)
_MOST_ONES = 1024
_ONES = np.ones(_MOST_ONES, np.float32)


class CompiledEngine(EagerEngine):
    name: EngineName = "compiled"

    def __init__(
        self,
        spec: LearnerSpec,
        state: StackState,
        draws: DrawSource | None = None,
        *,
        published_order: bool = False,
    ) -> None:
        _keep_to_one_thread()
        super().__init__(spec, state, torch.device("cpu"), draws, published_order=published_order)

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        super().configure(specs)
        widths = (self.spec.mlp.in_features, *self.spec.mlp.hidden, self.spec.mlp.out_features)
        self.run_kernel, self.point_kernel = _direct(steps.run), _direct(steps.point_to)
        self._replace_kernel = _direct(replace)
        self._step_nanoseconds: dict[int, float] = {}  # by step size
        self.table = np.zeros(Table.WIDTHS + len(widths), np.int64)
        self.table_address = self.table.ctypes.data
        self.table[Table.WIDTHS :] = widths
        self.reals = _reals(self.spec)
        self._schedule = np.zeros((2, len(widths) - 2))
        self._counts = np.zeros(len(widths) - 2, np.int64)
        self._ranges = self._ranges_of_draws()
        self._room = np.empty(0, np.float32)
        self._make_room(0)
        self.tally = np.zeros(Sum.COUNT)
        self.tally[Sum.DECAY] = self.spec.monitoring.average_decay
        self._probe_rows: NDArray[np.float32] | None = None
        self._probe_is_full_grown = False
        log_decay = float(self.reals[Real.LOG_DECAY])
        corrections = min(int(_CORRECTED / -log_decay) + 2, _KNOWN_CORRECTIONS)
        self._corrections = np.zeros(corrections, np.float32)
        fill_corrections(self.reals[Real.LOG_DECAY], self._corrections)
        self._weights: NDArray[np.float32] | None = None
        self._versions: list[int] = []
        self._schedule_of: ReplacementSchedule | None = None
        self._ripens_at = 0
        self._follows_ages = True
        self._step_size = -1
        self._remember_large_layers(widths)
        self._draws_utilities = self.spec.resets.utility == "random"
        self._drawn: NDArray[np.float32] | None = None
        self.labelled = self.spec.loss.kind == "cross_entropy"
        self.scores_accuracy = self.spec.loss.kind in ("cross_entropy", "binary_cross_entropy")
        self._fill_table()

    def _fill_table(self) -> None:
        spec, table, state = self.spec, self.table, self.state
        optimizer = spec.optimizer
        table[Table.DEPTH] = len(spec.mlp.hidden) + 1
        table[Table.ACTIVATION] = get_args(Activation).index(spec.mlp.plain_activation)
        table[Table.LOSS] = get_args(LossKind).index(spec.loss.kind)
        table[Table.UTILITY] = get_args(Utility).index(spec.resets.utility)
        table[Table.DECAYS_WEIGHTS] = optimizer.weight_decay > 0
        table[Table.EVALUATES] = 1
        table[Table.MATURITY] = spec.resets.maturity_threshold
        table[Table.REALS] = self.reals.ctypes.data
        table[Table.TALLY] = self.tally.ctypes.data
        table[Table.PARAMETERS] = _address(state.parameters)
        match state.optimizer:
            case SgdState(momentum=None):
                table[Table.OPTIMIZER] = SGD
            case SgdState(momentum=FlatLayers() as momentum):
                nesterov = isinstance(optimizer, SgdSpec) and optimizer.nesterov
                table[Table.OPTIMIZER] = NESTEROV_SGD if nesterov else MOMENTUM_SGD
                table[Table.MOMENTUM] = _address(momentum)
            case RmspropState():
                running = state.optimizer.momentum
                table[Table.OPTIMIZER] = RMSPROP if running is None else MOMENTUM_RMSPROP
                table[Table.MOMENTUM] = 0 if running is None else _address(running)
                table[Table.SECOND_MOMENT] = _address(state.optimizer.square_average)
            case AdamState():
                table[Table.OPTIMIZER] = ADAMW if optimizer.kind == "adamw" else ADAM
                table[Table.MOMENTUM] = _address(state.optimizer.first_moment)
                table[Table.SECOND_MOMENT] = _address(state.optimizer.second_moment)
                table[Table.COUNTS] = _address(state.optimizer.steps)
        table[Table.UTILITIES] = state.units.utility.data_ptr()
        table[Table.AGES] = state.units.age.data_ptr()
        table[Table.MEANS] = state.units.mean_activation.data_ptr()
        table[Table.SCHEDULE] = self._schedule.ctypes.data
        table[Table.CORRECTIONS] = self._corrections.ctypes.data
        table[Table.CORRECTION_COUNT] = len(self._corrections)
        slots = state.optimizer.slots().values()
        self._tensors = [state.parameters.flat, state.units.age, *(slot.flat for slot in slots)]

    def _ranges_of_draws(self) -> NDArray[np.float32]:
        """Per hidden layer, how drawn numbers become weights: width and bound of the range; as they are, if they are
        weights already."""
        if not isinstance(self._draws, GeneratorDraws):
            return np.stack([np.ones(len(self._counts)), np.zeros(len(self._counts))]).astype(np.float32)
        bounds = np.array(initial_bounds(self.spec.mlp)[:-1])
        return np.stack([2.0 * bounds, bounds]).astype(np.float32)

    def _remember_large_layers(self, widths: tuple[int, ...]) -> None:
        """Lays out the weights as the kernels want them for this specification."""
        spec, depth = self.spec, len(widths) - 1
        optimizer = spec.optimizer
        remembers = (
            spec.batch_size == 1
            and spec.mlp.plain_activation == "relu"
            and isinstance(optimizer, SgdSpec)
            and not optimizer.momentum
            and not optimizer.weight_decay
        )
        self.table[Table.REMEMBERS] = remembers
        remembered = remembers and max(widths[:-2]) >= LARGE
        self._assumes = remembered or isinstance(optimizer, AdamSpec | AdamWSpec)
        turned = [
            bool(is_turned(int(remembers), depth, layer, before, after))
            for layer, (before, after) in enumerate(itertools.pairwise(widths))
        ]
        self.state.parameters = laid_out(self.state.parameters, turned)
        self._magnitudes = np.zeros(depth + 2 * sum(widths[1:-1]), np.int64)
        bounds = np.array(initial_bounds(spec.mlp))  # a weight may grow 64-fold before it becomes too large
        self._fineness = (2.0 ** (24 - np.ceil(np.log2(bounds)))).astype(np.float32)
        self.table[Table.MAGNITUDES] = self._magnitudes.ctypes.data
        self.table[Table.FINENESS] = self._fineness.ctypes.data

    def begin(self, examples: Examples, step_size: int, probe: Probe) -> Work:
        if step_size != self._step_size:
            self._prepare_for(step_size)
        if self._assumes:
            self._notice_changes()
            if not self._follows_ages:
                return super().begin(examples, step_size, probe)
        count = len(examples.features)
        if count > self._rows or (self._rows > _SMALL_MESSAGE and self._rows > 2 * count):
            self._make_room(count)
        if probe.feature_rows is not self._probe_rows or not self._probe_is_full_grown:
            probe.make_room(count)
            self._look_at(probe)
        return CompiledWork(self, examples, step_size)

    def steps_between_calls(self, step_size: int, learners: int) -> int:
        return max(int(_NANOSECONDS_BETWEEN_CALLS / (self.step_nanoseconds(step_size) * learners)), 1)

    def step_nanoseconds(self, step_size: int) -> float:
        """What a step takes, about."""
        if (known := self._step_nanoseconds.get(step_size)) is not None:
            return known
        parameters = self.spec.parameter_count
        nanoseconds = 500.0 + (0.25 + 0.05 * step_size) * parameters
        if self.spec.optimizer.clip_norm is not None:
            nanoseconds += (0.1 + 0.05 * step_size) * parameters
        if self.table[Table.OPTIMIZER] >= RMSPROP:
            nanoseconds += 2.0 * parameters
        self._step_nanoseconds[step_size] = nanoseconds
        return nanoseconds

    def weigh(self, weights: NDArray[np.float32]) -> None:
        """Lets the kernels find the weights of a message."""
        if weights is not self._weights:
            self._weights = weights
            self.table[Table.WEIGHTS] = weights.ctypes.data

    def measure(self, probe: Probe, between_layers: Callable[[], None] | None) -> tuple[LayerPlasticity, ...]:
        spec, table = self.spec, self.table
        network, features = spec.mlp, probe.features
        targets: NDArray[Any] = probe.targets
        count, units = len(features), sum(network.hidden)
        post = np.empty(count * units, np.float32)
        delta = np.empty(count * (units + network.out_features), np.float32)
        if count:
            scale = losses.gradient_scale(spec.loss, network.out_features) / count
            labels, values = (targets, _NO_VALUES) if self.labelled else (_NO_LABELS, targets)
            measuring.look(table, features, labels, values, scale, post, delta)
        first = self.state.initial_parameters.flat[0].numpy()
        bounds = NONLINEARITIES[network.plain_activation].saturated_outside
        low, high = (-math.inf, math.inf) if bounds is None else bounds
        threshold, replacements = spec.monitoring.dormant_threshold, [*self.state.replacements[0], None]
        found = np.empty(measuring.Measure.COUNT)
        layers = []
        for layer, (name, width) in enumerate(
            zip(spec.layer_names, (*network.hidden, network.out_features), strict=True)
        ):
            if layer and between_layers is not None:
                between_layers()
            measuring.measure(table, layer, first, features, post, delta, threshold, low, high, found)
            layers.append(
                measuring.layer_plasticity(name, width, replacements[layer], found, saturates=bounds is not None)
            )
        return tuple(layers)

    def _make_room(self, count: int) -> None:
        """For what is to be known of so many examples."""
        self._rows = count
        self.outputs = np.empty((count, self.spec.mlp.out_features), np.float32)
        self.scores = np.empty((2, count))
        self.table[Table.OUTPUTS] = self.outputs.ctypes.data
        self.table[Table.SCORES] = self.scores.ctypes.data
        self.table[Table.SCORE_ROWS] = count

    def _look_at(self, probe: Probe) -> None:
        self._probe_rows = probe.feature_rows
        self._probe_is_full_grown = len(probe.feature_rows) == probe.size
        self.table[Table.PROBE_FEATURES] = probe.feature_rows.ctypes.data
        self.table[Table.PROBE_TARGETS] = probe.target_rows.ctypes.data
        self.table[Table.PROBE_POSITION] = probe.position.ctypes.data
        self.table[Table.PROBE_ROWS] = len(probe.feature_rows)

    def _prepare_for(self, step_size: int) -> None:
        self._step_size = step_size
        self.reals[Real.SCALE] = losses.gradient_scale(self.spec.loss, self.spec.mlp.out_features) / step_size
        widths = self.table[Table.WIDTHS :]
        units, widest = int(widths.sum()), int(widths.max())
        matrix = int((widths[1:] * widths[:-1]).max()) if step_size > 1 else widest
        floats = step_size * (2 * units + 2 * widest) + 6 * units + 6 * widest + matrix
        if floats > len(self._room):
            self._room = np.zeros(floats, np.float32)
        table = self.table
        if self.spec.optimizer.clip_norm is not None:
            self._clipping_room = np.zeros(step_size * widest, np.float32)
            table[Table.CLIPPING] = self._clipping_room.ctypes.data
        table[Table.FLOATS] = self._room.ctypes.data
        table[Table.SKIPS] = (
            step_size == 1
            and table[Table.ACTIVATION] == RELU
            and table[Table.OPTIMIZER] == SGD
            and not table[Table.DECAYS_WEIGHTS]
        )
        table[Table.BATCH] = step_size

    def _notice_changes(self) -> None:
        """What the kernels assume of the state may no longer hold if somebody else has changed its tensors."""
        versions = [tensor._version for tensor in self._tensors]
        if versions != self._versions:
            self._versions = versions
            self._follows_ages = self._counts_follow_ages()
            self._magnitudes[: len(self._fineness)] = 0

    def _counts_follow_ages(self) -> bool:
        """Whether Adam's count of every weight is the age of the younger of its two units, which the kernels assume.

        It is unless somebody tampers with the state; then the eager code takes the steps.
        """
        optimizer = self.state.optimizer
        if not isinstance(optimizer, AdamState):
            return True
        oldest = torch.tensor([self.state.steps[0]])
        ages = [self.state.units.age[0, columns] for columns in self._layout.slices]
        last = self.spec.mlp.out_features
        before = oldest.expand(self.spec.mlp.in_features)
        for layer, after in enumerate([*ages, oldest.expand(last)]):
            counted = torch.minimum(after.unsqueeze(1), before.unsqueeze(0)).clamp_max_(2**24)
            weights, biases = optimizer.steps.weights[layer][0], optimizer.steps.biases[layer][0]
            if not torch.equal(weights, counted.to(torch.float32)):
                return False
            if not torch.equal(biases, after.clamp_max(2**24).to(torch.float32)):
                return False
            before = after
        return True

    def _look_ahead(self, schedule: ReplacementSchedule, step: int) -> None:
        """Finds when another unit ripens; the kernels know all that happens before."""
        self._schedule_of = schedule
        quiet = schedule.quiet_steps(step + 1)
        self._ripens_at = _NEVER if quiet is None else step + 1 + quiet
        self._schedule[:] = schedule.rates, schedule.mature
        self.table[Table.OWED], _ = schedule.accumulated.buffer_info()
        self.table[Table.STEPS] = step

    def steps_ahead(self, step: int, limit: int) -> int:
        """How many of the next `limit` steps a kernel can take without asking."""
        schedule = self.state.schedules[0]
        if schedule is not self._schedule_of or step + 1 >= self._ripens_at:
            self._look_ahead(schedule, step)
        quiet = self._ripens_at - 1 - step
        at_once = limit if limit < quiet else quiet  # quicker than min
        if not self._draws_utilities:
            return at_once
        at_once = self._until_due(schedule, min(at_once, max(_RANDOM_VALUES // self._layout.total, 1)))
        drawn = torch.cat([self._draws.utilities() for _ in range(at_once)]).numpy()
        self._drawn = drawn
        self.table[Table.RANDOM] = drawn.ctypes.data
        return at_once

    def _until_due(self, schedule: ReplacementSchedule, limit: int) -> int:
        """Steps up to and including the next that replaces units, at most `limit`: no draw is made too early."""
        owed, (rates, mature) = schedule.accumulated.tolist(), self._schedule.tolist()
        for step in range(limit):
            for layer, rate in enumerate(rates):
                owed[layer] += rate * mature[layer]
                if min(int(owed[layer]), mature[layer]) >= 1:
                    return step + 1
        return limit

    def replace_due_units(self) -> None:
        state = self.state
        counts = state.schedules[0].advance(state.steps[0])
        if counts is None:  # what is due may be beyond a limit
            return
        self._replace([counts], published_order=self._published_order)

    def _replace(self, counts: Sequence[tuple[int, ...]], *, published_order: bool) -> None:
        [counts_of_one] = counts
        if not any(counts_of_one):
            return
        draws, drawn = self._draws, []
        for layer, count in enumerate(counts_of_one):
            self.state.replacements[0][layer] += count
            if not count:
                continue
            if isinstance(draws, GeneratorDraws):
                drawn.append(draws.numbers(0, layer, count))
            else:
                drawn.append(draws.incoming_weights(0, layer, count).reshape(-1).numpy())
        self._schedule_of = None
        self._counts[:] = counts_of_one
        numbers = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
        self._replace_kernel(self.table, self._counts, numbers, self._ranges, published_order)


class CompiledWork:
    """A message on its way through a `CompiledEngine`."""

    __slots__ = ("_engine", "_features", "_labels", "_next", "_step_size", "_values")

    def __init__(self, engine: CompiledEngine, examples: Examples, step_size: int) -> None:
        self._engine = engine
        features, weights = examples.features, examples.weights
        targets: NDArray[Any] = examples.targets
        self._features = features if features.flags.carray else _plain(features)
        if weights is not None:
            engine.weigh(_plain(weights))
        else:
            engine.weigh(_ONES if len(features) <= _MOST_ONES else np.ones(len(features), np.float32))
        if not targets.flags.carray:
            targets = _plain(targets)
        self._labels: NDArray[np.int64] = targets if engine.labelled else _NO_LABELS
        self._values: NDArray[np.float32] = _NO_VALUES if engine.labelled else targets
        self._step_size = step_size
        self._next = 0

    def run(self, steps: int) -> None:
        engine, step_size = self._engine, self._step_size
        steps_taken = engine.state.steps
        step = steps_taken[0]
        end = step + steps
        while step < end:
            at_once = engine.steps_ahead(step, end - step)
            taken = engine.run_kernel(engine.table, self._features, self._labels, self._values, self._next, at_once)
            due = taken < 0
            if due:
                taken = -taken
            steps_taken[0] = step = step + taken
            self._next += taken * step_size
            if due:
                engine.replace_due_units()

    @staticmethod
    def run_together(turns: Sequence[tuple["CompiledWork", int]]) -> None:
        """On as many threads as torch may use; the learners share nothing, so it does not show in what they do."""
        threads = torch.get_num_threads()
        nanoseconds = sum(work.nanoseconds(steps) for work, steps in turns)
        if min(threads, len(turns)) == 1 or nanoseconds < _WORTH_THREADS:
            if nanoseconds < _WORTH_A_CALL * len(turns):
                run_each(turns)
            else:
                for work, steps in turns:
                    work.run(steps)
            return
        pool = _threads(os.getpid(), threads)
        shares = [pool.submit(run_each, turns[thread::threads]) for thread in range(min(threads, len(turns)))]
        try:
            for share in shares:
                share.result()
        finally:  # a learner that still steps must not be accounted for
            wait(shares)

    @property
    def table_address(self) -> int:
        return self._engine.table_address

    def nanoseconds(self, steps: int) -> float:
        """What so many steps take, about."""
        return steps * self._engine.step_nanoseconds(self._step_size)

    def lay_open(self) -> None:
        """Writes the addresses of the examples into the engine's table, for the kernel of many learners."""
        self._engine.point_kernel(self._engine.table, self._features, self._labels, self._values)

    def steps_ahead(self, limit: int) -> tuple[int, int]:
        """The example to go on with, and how many steps from there, at most `limit`, a kernel can take on its own."""
        engine = self._engine
        return self._next, engine.steps_ahead(engine.state.steps[0], limit)

    def account_for(self, taken: int) -> int:
        """Follows up on what a kernel returned; returns the number of steps it took."""
        steps = abs(taken)
        self._engine.state.steps[0] += steps
        self._next += steps * self._step_size
        if taken < 0:
            self._engine.replace_due_units()
        return steps

    def outputs(self) -> NDArray[np.float32]:
        outputs = self._engine.outputs[: len(self._features)].copy()
        outputs[self._next :] = 0.0
        return outputs

    def tally(self) -> tuple[Tally, bool]:
        engine = self._engine
        _, loss, accuracy, faded_loss, faded_accuracy, parameters, moments = engine.tally.tolist()
        tally = Tally(loss, accuracy if engine.scores_accuracy else None, faded_loss, faded_accuracy)
        return tally, math.isfinite(loss + parameters + moments)

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        losses, accuracies = self._engine.scores[:, : self._next]
        return losses, accuracies if self._engine.scores_accuracy else None


def run_each(turns: Sequence[tuple[CompiledWork, int]]) -> None:
    """All steps up to the next replacement of units are one call of compiled code; other threads run meanwhile."""
    for work, _ in turns:
        work.lay_open()
    left = list(turns)
    while left := [(work, count) for work, count in left if count]:
        ahead = np.array([work.steps_ahead(count) for work, count in left])
        steps.run_each(np.array([work.table_address for work, _ in left]), ahead)
        taken = ahead[:, 1].tolist()
        left = [(work, count - work.account_for(took)) for (work, count), took in zip(left, taken, strict=True)]


@functools.cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """A process that was forked has none of its parent's threads, and makes its own."""
    del process
    return ThreadPoolExecutor(count, thread_name_prefix="learners")


def _direct(kernel: Callable[P, R]) -> Callable[P, R]:
    """The kernel without numba's choice of code by its arguments' types, which takes as long as a small network's step;
    once it is compiled. There is one code only: what it is called with must be of those very types."""
    compiled = list(getattr(kernel, "overloads", {}).values())
    direct: Callable[P, R] = compiled[0].entry_point if compiled else kernel
    return direct


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied if it is not of the kind that the kernels are compiled for: read-only, strided or unaligned."""
    return array if array.flags.carray else np.array(array, order="C")


def _address(layers: FlatLayers) -> int:
    return layers.flat.data_ptr()


def _reals(spec: LearnerSpec) -> NDArray[np.float32]:
    """In float64 until they are stored, as the torch engine has them."""
    optimizer, resets = spec.optimizer, spec.resets
    reals = np.zeros(Real.COUNT)
    reals[Real.NEGATIVE_LR] = -optimizer.lr
    reals[Real.WEIGHT_DECAY] = optimizer.weight_decay
    match optimizer:
        case SgdSpec():
            reals[Real.MOMENTUM] = optimizer.momentum
        case RmspropSpec():
            reals[Real.MOMENTUM] = optimizer.momentum
            reals[Real.BETA2] = optimizer.alpha
            reals[Real.ONE_MINUS_BETA2] = 1 - optimizer.alpha
            reals[Real.EPSILON] = optimizer.epsilon
        case AdamSpec() | AdamWSpec():
            reals[Real.ONE_MINUS_BETA1] = 1 - optimizer.beta1
            reals[Real.BETA2] = optimizer.beta2
            reals[Real.ONE_MINUS_BETA2] = 1 - optimizer.beta2
            with np.errstate(divide="ignore"):
                reals[Real.LOG_BETA1] = np.log(optimizer.beta1)
                reals[Real.LOG_BETA2] = np.log(optimizer.beta2)
            reals[Real.EPSILON] = optimizer.epsilon
            reals[Real.SHRINKAGE] = 1 - optimizer.lr * optimizer.weight_decay
    if optimizer.clip_norm is not None:
        reals[Real.CLIP_NORM] = optimizer.clip_norm
        reals[Real.NORM_MARGIN] = NORM_MARGIN
    reals[Real.ONE_MINUS_DECAY] = 1 - resets.decay_rate
    with np.errstate(divide="ignore"):
        reals[Real.LOG_DECAY] = np.log(resets.decay_rate)
    reals[Real.BIAS_COMPENSATION] = resets.strength * resets.bias_compensation
    reals[Real.STRENGTH], reals[Real.KEPT] = resets.strength, 1 - resets.strength
    reals[Real.DELTA] = spec.loss.delta
    return reals.astype(np.float32)


@functools.cache
def _keep_to_one_thread() -> None:
    """The library behind numba's products would start threads of its own, beside those of torch; and how many it used
    could show in the last bits."""
    importlib.import_module("scipy.linalg.cython_blas")
    products = [lib for lib in threadpoolctl.ThreadpoolController().lib_controllers if lib.user_api == "blas"]
    of_scipy = [library for library in products if "scipy.libs" in library.filepath]
    for library in of_scipy or products:
        library.set_num_threads(1)
