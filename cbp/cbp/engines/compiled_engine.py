"""One learner's steps in code compiled by numba, on the CPU: many steps a call, other threads running meanwhile.

The kernels work on the very memory of the state's tensors, so that everything beside the steps (snapshots, plasticity,
predictions) is the code it is for the torch engine.

Shapes: N examples of a message, I inputs, C outputs, U hidden units.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray

from cbp import losses
from cbp.engines import kernels
from cbp.engines.eager_engine import EagerEngine, EngineName, Scores, Work
from cbp.engines.kernels import Real, Table
from cbp.engines.torch_engine import StackState, initial_stack
from cbp.networks import FlatLayers
from cbp.optimizers import AdamState, SgdState
from cbp.pending import Examples
from cbp.replacement import DrawSource, ReplacementSchedule
from cbp.spec import Activation, AdamSpec, AdamWSpec, LearnerSpec, LossKind, SgdSpec, Utility

_RANDOM_VALUES = 2**20
"""Draws of the `random` utility that are made ahead at most."""
_NANOSECONDS_BETWEEN_CALLS = 1e6

_CORRECTED = 18.0
"""1 − e⁻¹⁸ is 1 in float32."""
_KNOWN_CORRECTIONS = 4096
_NEVER = 2**62
_DUE, _PARAMETER_SUM, _MOMENT_SUM = int(Table.DUE), int(Real.PARAMETER_SUM), int(Real.MOMENT_SUM)

_NO_LABELS = np.empty(0, np.int64)
_NO_VALUES = np.empty((0, 0), np.float32)


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
        widths = (self.spec.network.in_features, *self.spec.network.hidden, self.spec.network.out_features)
        self.table = np.zeros(Table.WIDTHS + len(widths), np.int64)
        self.table[Table.WIDTHS :] = widths
        self.reals = _reals(self.spec)
        self._schedule = np.zeros((3, len(widths) - 2))
        self._room = np.empty(0, np.float32)
        log_decay = float(self.reals[Real.LOG_DECAY])
        corrections = min(int(_CORRECTED / -log_decay) + 2, _KNOWN_CORRECTIONS)
        self._corrections = np.zeros(corrections, np.float32)
        kernels.fill_corrections(self.reals[Real.LOG_DECAY], self._corrections)
        self._versions: list[int] = []
        self._schedule_of: ReplacementSchedule | None = None
        self._ripens_at = 0
        self._follows_ages = True
        self._step_size = -1
        self._draws_utilities = self.spec.resets.utility == "random"
        self.labelled = self.spec.loss.kind == "cross_entropy"
        self.scores_accuracy = self.spec.loss.kind in ("cross_entropy", "binary_cross_entropy")
        self._fill_table()

    def _fill_table(self) -> None:
        spec, table, state = self.spec, self.table, self.state
        optimizer = spec.optimizer
        table[Table.DEPTH] = len(spec.network.hidden) + 1
        table[Table.ACTIVATION] = get_args(Activation).index(spec.network.activation)
        table[Table.LOSS] = get_args(LossKind).index(spec.loss.kind)
        table[Table.UTILITY] = get_args(Utility).index(spec.resets.utility)
        table[Table.DECAYS_WEIGHTS] = optimizer.weight_decay > 0
        table[Table.EVALUATES] = 1
        table[Table.MATURITY] = spec.resets.maturity_threshold
        table[Table.PARAMETERS] = _address(state.parameters)
        match state.optimizer:
            case SgdState(momentum=None):
                table[Table.OPTIMIZER] = kernels.SGD
            case SgdState(momentum=FlatLayers() as momentum):
                table[Table.OPTIMIZER] = kernels.MOMENTUM_SGD
                table[Table.MOMENTUM] = _address(momentum)
            case AdamState():
                table[Table.OPTIMIZER] = kernels.ADAMW if optimizer.kind == "adamw" else kernels.ADAM
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

    def begin(self, examples: Examples, step_size: int) -> Work:
        self._make_room(step_size)
        self._notice_changes()
        if not self._follows_ages:
            return super().begin(examples, step_size)
        return _CompiledWork(self, examples, step_size)

    def steps_between_calls(self, step_size: int) -> int:
        parameters = self.spec.parameter_count
        nanoseconds = 500.0 + 0.6 * parameters * step_size
        if self.table[Table.OPTIMIZER] >= kernels.ADAM:
            nanoseconds += 2.0 * parameters
        return max(int(_NANOSECONDS_BETWEEN_CALLS / nanoseconds), 1)

    def _make_room(self, step_size: int) -> None:
        if step_size == self._step_size:
            return
        self._step_size = step_size
        self.reals[Real.SCALE] = losses.gradient_scale(self.spec.loss, self.spec.network.out_features) / step_size
        widths = self.table[Table.WIDTHS :]
        units, widest = int(widths.sum()), int(widths.max())
        matrix = int((widths[1:] * widths[:-1]).max()) if step_size > 1 else widest
        floats = step_size * (2 * units + 2 * widest) + 6 * units + 6 * widest + matrix
        if floats > len(self._room):
            self._room = np.zeros(floats, np.float32)
        table = self.table
        table[Table.FLOATS] = self._room.ctypes.data
        table[Table.SKIPS] = (
            step_size == 1
            and table[Table.ACTIVATION] == kernels.RELU
            and table[Table.OPTIMIZER] == kernels.SGD
            and not table[Table.DECAYS_WEIGHTS]
        )
        table[Table.BATCH] = step_size

    def _notice_changes(self) -> None:
        """What the kernels assume of the state may no longer hold if somebody else has changed its tensors."""
        versions = [tensor._version for tensor in self._tensors]
        if versions != self._versions:
            self._versions = versions
            self._follows_ages = self._counts_follow_ages()

    def _counts_follow_ages(self) -> bool:
        """Whether Adam's count of every weight is the age of the younger of its two units, which the kernels assume.

        It is unless somebody tampers with the state; then the eager code takes the steps.
        """
        optimizer = self.state.optimizer
        if not isinstance(optimizer, AdamState):
            return True
        oldest = torch.tensor([self.state.steps[0]])
        ages = [self.state.units.age[0, columns] for columns in self._layout.slices]
        last = self.spec.network.out_features
        before = oldest.expand(self.spec.network.in_features)
        for layer, after in enumerate([*ages, oldest.expand(last)]):
            counted = torch.minimum(after.unsqueeze(1), before.unsqueeze(0)).clamp_max_(2**24)
            weights, biases = optimizer.steps.weights[layer][0], optimizer.steps.biases[layer][0]
            if not torch.equal(weights, counted.to(torch.float32)):
                return False
            if not torch.equal(biases, after.clamp_max(2**24).to(torch.float32)):
                return False
            before = after
        return True

    def take_steps(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        values: NDArray[np.float32],
        weights: NDArray[np.float32],
        outputs: NDArray[np.float32],
        scores: NDArray[np.float64],
        start: int,
        steps: int,
    ) -> None:
        """Learns from the examples from `start` on; the arrays are as `kernels.run` wants them."""
        state, table = self.state, self.table
        schedule = state.schedules[0]
        batch = self._step_size
        while steps:
            quiet = self._quiet_steps(schedule)
            at_once = min(steps, quiet)
            if self._draws_utilities:
                at_once = self._until_due(min(at_once, max(_RANDOM_VALUES // self._layout.total, 1)))
                drawn = torch.cat([self._draws.utilities() for _ in range(at_once)]).numpy()
                table[Table.RANDOM] = drawn.ctypes.data
            taken = kernels.run(
                table,
                self.reals,
                features,
                labels,
                values,
                weights,
                outputs,
                scores,
                start,
                at_once,
            )
            state.steps[0] += taken
            schedule.accumulated[:] = self._schedule[0].tolist()
            start += taken * batch
            steps -= taken
            if table[_DUE]:
                counts = schedule.advance(state.steps[0])
                assert counts is not None
                self._replace([counts], published_order=self._published_order)

    def _quiet_steps(self, schedule: ReplacementSchedule) -> int:
        """Steps to come until another unit ripens; the kernels know all that happens before."""
        step = self.state.steps[0] + 1
        if schedule is not self._schedule_of or step >= self._ripens_at:
            self._schedule_of = schedule
            quiet = schedule.quiet_steps(step)
            self._ripens_at = _NEVER if quiet is None else step + quiet
            self._schedule[:] = schedule.accumulated, schedule.rates, schedule.mature
            self.table[Table.STEPS] = step - 1
        return self._ripens_at - step

    def _until_due(self, limit: int) -> int:
        """Steps up to and including the next that replaces units, at most `limit`: no draw is made too early."""
        owed, rates, mature = (row.tolist() for row in self._schedule)
        for step in range(limit):
            for layer, rate in enumerate(rates):
                owed[layer] += rate * mature[layer]
                if min(int(owed[layer]), mature[layer]) >= 1:
                    return step + 1
        return limit

    def _replace(self, counts: Sequence[tuple[int, ...]], *, published_order: bool) -> None:
        [counts_of_one] = counts
        if not any(counts_of_one):
            return
        drawn = []
        for layer, count in enumerate(counts_of_one):
            self.state.replacements[0][layer] += count
            if count:
                drawn.append(self._draws.incoming_weights(0, layer, count).reshape(-1))
        self._schedule_of = None
        biases = kernels.replace(
            self.table,
            self.reals,
            np.array(counts_of_one, np.int64),
            torch.cat(drawn).numpy() if len(drawn) > 1 else drawn[0].numpy(),
            published_order,
        )
        self.reals[Real.PARAMETER_SUM] += biases


class _CompiledWork:
    def __init__(self, engine: CompiledEngine, examples: Examples, step_size: int) -> None:
        self._engine = engine
        self._features, self._weights = _plain(examples.features), _plain(examples.weights)
        self._step_size = step_size
        targets: NDArray[Any] = _plain(examples.targets)
        self._labels: NDArray[np.int64] = targets if engine.labelled else _NO_LABELS
        self._values: NDArray[np.float32] = _NO_VALUES if engine.labelled else targets
        self._outputs = np.zeros((len(examples), engine.spec.network.out_features), np.float32)
        self._scores = np.zeros((2, len(examples)))
        self._next = 0

    def run(self, steps: int) -> None:
        self._engine.take_steps(
            self._features,
            self._labels,
            self._values,
            self._weights,
            self._outputs,
            self._scores,
            self._next,
            steps,
        )
        self._next += steps * self._step_size

    def outputs(self) -> NDArray[np.float32]:
        return self._outputs

    def scores(self, count: int) -> Scores:
        measured, accuracies = self._scores[:, :count]
        reals = self._engine.reals
        numbers = float(np.add.reduce(measured)) + float(reals[_PARAMETER_SUM]) + float(reals[_MOMENT_SUM])
        return Scores(measured, accuracies if self._engine.scores_accuracy else None, math.isfinite(numbers))


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied if numba would take it for another type and compile anew: read-only, strided or unaligned."""
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
        case AdamSpec() | AdamWSpec():
            reals[Real.ONE_MINUS_BETA1] = 1 - optimizer.beta1
            reals[Real.BETA2] = optimizer.beta2
            reals[Real.ONE_MINUS_BETA2] = 1 - optimizer.beta2
            with np.errstate(divide="ignore"):
                reals[Real.LOG_BETA1] = np.log(optimizer.beta1)
                reals[Real.LOG_BETA2] = np.log(optimizer.beta2)
            reals[Real.EPSILON] = optimizer.epsilon
            reals[Real.SHRINKAGE] = 1 - optimizer.lr * optimizer.weight_decay
    reals[Real.ONE_MINUS_DECAY] = 1 - resets.decay_rate
    with np.errstate(divide="ignore"):
        reals[Real.LOG_DECAY] = np.log(resets.decay_rate)
    reals[Real.BIAS_COMPENSATION] = resets.bias_compensation
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


def compile_kernels() -> None:
    """Compiles what every specification needs, or loads it from disk."""
    spec = LearnerSpec.parse(
        {
            "network": {"kind": "mlp", "in_features": 1, "hidden": [1], "out_features": 1},
            "loss": "mse",
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "resets": {"replacement_rate": 1.0, "maturity_threshold": 0},
        }
    )
    engine = CompiledEngine(spec, initial_stack([spec], torch.device("cpu")))
    rows = np.ones((2, 1), np.float32)
    engine.begin(Examples(rows, rows, np.ones(2, np.float32), (("", 2),)), 1).run(2)


def kernels_on_disk() -> bool:
    """Whether numba finds the compiled steps on disk, made from this source for this processor.

    It has no public way to ask.
    """
    run: Any = kernels.run
    file = getattr(run._cache, "_cache_file", None)  # none if there is no place on disk
    if file is None:
        return False
    processor = run.targetctx.codegen().magic_tuple()
    return any(key[1] == processor for key in file._load_index())
