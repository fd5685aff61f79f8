"""A learner: a network that trains on a stream, one step after another, for as long as the stream lasts."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cbp.architectures.profile import check_buildable, hidden_layer_names, profile_of
from cbp.engines.choice import check_engine, initial_state, make_engine, resolve_engine
from cbp.engines.eager_engine import Work
from cbp.engines.learner_state import LearnerState
from cbp.engines.names import EngineChoice, EngineName
from cbp.errors import BatchError, CbpError, Diverged, DivergenceError, FieldViolation, SnapshotError, SpecError, shown
from cbp.examples.batches import Batch, validate_features
from cbp.examples.pending import Examples, Probe, TaskRun
from cbp.plasticity.samples import PlasticitySample
from cbp.progress import LearnerProgress, ProgressTracker
from cbp.results import TrainResult
from cbp.saved.learner import read_learner
from cbp.serialization import FORMAT_VERSION, LearnerSnapshot, take_tensor
from cbp.spec.learner_spec import LearnerSpec, hidden_layer_name
from cbp.units.replacement import DrawSource

_FLOAT32 = np.dtype(np.float32)
SAMPLE_LIMIT = 1024
"""Plasticity samples kept for `Learner.take_samples`; the oldest go first."""

_QUICKLY_BUILT = 2**16
"""Parameters."""

PREDICTION_VALUES = 2**23
"""Hidden activations that one forward pass of `Learner.predict` makes at most, so that its memory stays bounded: many
examples are predicted in several passes."""


@dataclass(eq=False, slots=True)
class Training:
    """One call of `train` on its way. Not frozen, as `TrainResult`."""

    due: Examples
    """Whole steps of examples."""
    later: Examples
    """The remainder, which waits for the next call."""
    work: Work
    step_size: int
    steps_before: int
    """Steps that the learner had taken."""
    last_step: int
    examples_before: int
    """Examples that the learner had learned from."""


class Learner:
    """One continual learner.

    Not thread-safe: calls come one after another, except `predict` from within `train`'s `between_steps`.
    """

    def __init__(
        self, spec: LearnerSpec, *, device: torch.device | str = "cpu", engine: EngineChoice = "torch"
    ) -> None:
        """A newborn, its weights drawn from the specification's seed.

        `engine` executes its steps. Plain multilayer perceptrons: "torch" on any device; "compiled" on the CPU, much
        faster for small networks; "stacked" on any device, for many learners on a GPU (see `train_together`). They
        agree to float32 rounding. All other networks: "module". "auto" is the fastest that can run the network there.
        Raises `CbpError` if the engine cannot.
        """
        self._device = torch.device(device)
        self._engine_name = resolve_engine(engine, spec, self._device)
        self._adopt(spec)
        self._progress = ProgressTracker()
        self._examples = 0
        self._none = self._pending = self._no_examples()
        self._feature_row, self._target_row = self._none.features.shape[1:], self._none.targets.shape[1:]
        self._target_dtype = self._none.targets.dtype
        self._probe = Probe(spec.monitoring.probe_size, self._none.features, self._none.targets)
        self._samples: deque[PlasticitySample] = deque(maxlen=SAMPLE_LIMIT)
        self._training = False
        self._install(initial_state(spec, self._device))

    def _adopt(self, spec: LearnerSpec) -> None:
        check_buildable(spec)
        self._spec = spec
        # Every step needs these, and a field of a specification takes as long to read as a small step's arithmetic.
        self._batch_size, self._interval = spec.batch_size, spec.monitoring.interval
        self._average_decay = spec.monitoring.average_decay

    def _install(self, state: LearnerState, draws: DrawSource | None = None, *, published_order: bool = False) -> None:
        self._state = state
        self._initial_parameters: dict[str, Tensor] | None = None  # on the CPU, for snapshots
        self._engine = make_engine(
            self._engine_name, self._spec, state, self._device, draws, published_order=published_order
        )

    def _no_examples(self) -> Examples:
        network = self._spec.network
        outputs = None if self._spec.loss.kind == "cross_entropy" else network.out_features
        return Examples.none_like(network.input_shape, outputs)

    @property
    def spec(self) -> LearnerSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def engine(self) -> EngineName:
        """What executes the steps."""
        return self._engine.name

    @property
    def progress(self) -> LearnerProgress:
        """Where the learner stands. Within `between_steps`, loss, accuracy and tasks are those before the call."""
        names = hidden_layer_names(self._spec)
        return LearnerProgress(
            step=self._state.steps[0],
            examples=self._examples,
            pending=len(self._pending),
            loss=self._progress.loss.value,
            accuracy=self._progress.accuracy.value,
            replacements=dict(zip(names, self._state.replacements[0], strict=True)),
            tasks=tuple(self._progress.tasks),
            task_count=self._progress.task_count,
        )

    def train(
        self,
        batch: Batch,
        *,
        return_outputs: bool = False,
        between_steps: Callable[[], None] | None = None,
    ) -> TrainResult:
        """Learns from the examples, in steps of `batch_size`; a remainder waits for the next call.

        `between_steps` runs after every step but the last; with the compiled engine after every few steps, which take
        about a millisecond at most, and with the stacked engine on a GPU after every eight. It also runs between two
        layers of a plasticity sample, which can take longer than steps. The learner is whole at that moment and may
        predict; it refuses to change. An exception from it stops training there: the steps taken are accounted for, the
        examples not yet applied wait, and the sample that was being taken is left out.

        Raises `DivergenceError` if outputs, losses, parameters or the optimizer's state are no longer finite when the
        steps are taken (also where `between_steps` raised; its exception is then the context). The learner is in no
        defined state after that: go on with one restored from a snapshot.
        """
        training = self._begin(batch)
        self._start(training)
        watched = int(between_steps is not None)
        try:
            steps = self._next_steps(training, watched)
            while steps:
                training.work.run(steps)
                self._after_steps(training, between_steps)
                steps = self._next_steps(training, watched)
                if steps and between_steps is not None:
                    between_steps()
        finally:
            result = self._finish(training, return_outputs)
        return result

    def _begin(self, batch: Batch) -> Training:
        """Takes up the examples that wait and these; changes nothing, for it may run out of memory."""
        if self._training:
            self._refuse_while_training("train")
        self._check_fits(batch)
        waiting = Examples.of(batch)
        if self._pending is not self._none:
            waiting = self._pending.followed_by(waiting)
        count = len(waiting.features)
        step_size = self._batch_size or count
        left = count % step_size
        due, later = waiting.split_at(count - left) if left else (waiting, self._none)
        work = self._engine.begin(due, step_size, self._probe)
        step = self._state.steps[0]
        return Training(due, later, work, step_size, step, step + count // step_size, self._examples)

    def _start(self, training: Training) -> None:
        self._pending = training.later
        self._training = True

    def _has_steps_left(self, training: Training) -> bool:
        return self._state.steps[0] < training.last_step

    def _next_steps(self, training: Training, watched: int) -> int:
        """Steps up to the next plasticity sample, or to the end; fewer if somebody watches so many learners that run
        together; 0 at the end."""
        step, interval = self._state.steps[0], self._interval
        steps = training.last_step - step
        if interval and steps:
            steps = min(steps, interval - step % interval)
        return min(steps, self._engine.steps_between_calls(training.step_size, watched)) if watched else steps

    def _after_steps(self, training: Training, between_steps: Callable[[], None] | None) -> None:
        """Counts the examples of the steps taken, and takes the plasticity sample that is due."""
        step, interval = self._state.steps[0], self._interval
        self._examples = training.examples_before + (step - training.steps_before) * training.step_size
        if interval and step % interval == 0:
            self._samples.append(self._sample(between_steps))

    def _finish(self, training: Training, return_outputs: bool) -> TrainResult:
        """Accounts for the steps taken; the examples of the others wait. Raises `DivergenceError`."""
        self._training = False
        first_step, step_size = training.steps_before + 1, training.step_size
        last_step = self._state.steps[0]
        steps = last_step - training.steps_before
        applied = steps * step_size
        self._examples = training.examples_before + applied
        tasks = training.due.tasks
        if last_step < training.last_step:
            learned, rest = training.due.split_at(applied)
            tasks = learned.tasks
            self._pending = rest.followed_by(self._pending)
        loss, accuracy = self._account(applied, tasks, training.work, first_step, step_size)
        return TrainResult(
            steps=steps,
            first_step=first_step,
            examples=applied,
            pending=len(self._pending.features),
            loss=loss,
            accuracy=accuracy,
            outputs=training.work.outputs() if return_outputs else None,
        )

    def _refuse_while_training(self, action: str) -> None:
        if self._training:
            raise CbpError(f"{action} cannot be called from between_steps: only predictions can; call it after train")

    def _check_fits(self, batch: Batch) -> None:
        """A batch validated for another specification must not get in, for it would fail between two updates."""
        features, targets = batch.features, batch.targets
        if (
            features.shape[1:] == self._feature_row
            and targets.shape[1:] == self._target_row
            and (features.dtype is _FLOAT32 or features.dtype == _FLOAT32)
            and (targets.dtype is self._target_dtype or targets.dtype == self._target_dtype)
        ):
            return
        violations = []
        for name, array, expected in (
            ("features", batch.features, self._none.features),
            ("targets", batch.targets, self._none.targets),
        ):
            if (array.dtype, array.shape[1:]) != (expected.dtype, expected.shape[1:]):
                description = (
                    f"Expected {expected.dtype} of shape {['N', *expected.shape[1:]]}, got {array.dtype} of shape "
                    f"{list(array.shape)}; validate the batch for this learner's specification"
                )
                violations.append(FieldViolation(name, description))
        raise BatchError(violations)

    def _account(
        self, count: int, tasks: Sequence[TaskRun], work: Work, first_step: int, step_size: int
    ) -> tuple[float | None, float | None]:
        """Adds the applied examples to the averages; returns the means of their losses and accuracies.

        Raises `DivergenceError`, and adds nothing then.
        """
        if not count:
            return None, None
        tally, finite = work.tally()
        if not finite:
            self._refuse_divergence(work.scores()[0], work.outputs(), first_step, step_size)
        progress = self._progress
        progress.extend(tally, count, self._average_decay)
        loss, accuracy = tally.loss / count, None if tally.accuracy is None else tally.accuracy / count
        if len(tasks) == 1:
            progress.extend_task(tasks[0][0], count, loss, accuracy, first_step, first_step - 1 + count // step_size)
        else:
            self._account_for_tasks(tasks, work, first_step, step_size)
        return loss, accuracy

    def _account_for_tasks(self, tasks: Sequence[TaskRun], work: Work, first_step: int, step_size: int) -> None:
        example_losses, accuracies = work.scores()
        start = 0
        for task, count in tasks:
            end = start + count
            self._progress.extend_task(
                task,
                count,
                float(example_losses[start:end].mean()),
                None if accuracies is None else float(accuracies[start:end].mean()),
                first_step + start // step_size,
                first_step + (end - 1) // step_size,
            )
            start = end

    def _refuse_divergence(
        self, example_losses: NDArray[np.float64], outputs: NDArray[np.float32], first_step: int, step_size: int
    ) -> None:
        """Raises `DivergenceError` if there is reason to; finite numbers may have a sum that is not."""
        wrong = ~np.isfinite(example_losses)
        if wrong.any():
            example = int(wrong.argmax())
            what: Diverged = "loss" if np.isfinite(outputs[example]).all() else "outputs"
            raise DivergenceError(first_step + example // step_size, what)
        for what, numbers in self._state.checked_numbers():
            if not bool(numbers.isfinite().all()):
                raise DivergenceError(self._state.steps[0], what)

    def predict(self, features: ArrayLike) -> NDArray[np.float32]:
        """[N, C] raw outputs (logits, or predicted values) for [N, …] features. Changes nothing.

        Raises `BatchError` if the features do not fit.
        """
        checked = validate_features(self._spec, features)
        outputs = np.empty((len(checked), self._spec.network.out_features), np.float32)
        at_once = max(PREDICTION_VALUES // max(profile_of(self._spec.network).activation_values, 1), 1)
        for start in range(0, len(checked), at_once):
            part = slice(start, start + at_once)
            inputs = torch.tensor(checked[part], device=self._device).unsqueeze(0)
            outputs[part] = self._engine.predict(inputs)[0].cpu().numpy()
        return outputs

    def update(self, spec: LearnerSpec) -> None:
        """Goes on with another specification; see `LearnerSpec.check_update` for what may differ.

        Ages and utilities stay, so a layer whose resets are switched on replaces by what it has seen so far. After a
        change of the utility's kind, the old kind fades from the running average at the decay rate.
        """
        self._refuse_while_training("update")
        self._spec.check_update(spec)
        self._adopt(spec)
        self._state.adopt(spec)
        self._engine.configure([spec])
        self._probe = self._probe.resized(spec.monitoring.probe_size)

    def switch_engine(self, engine: EngineChoice) -> None:
        """Goes on with another engine, as if restored from a snapshot; nothing is copied. Raises `CbpError` if it
        cannot run on the learner's device."""
        self._refuse_while_training("switch_engine")
        self._engine_name = resolve_engine(engine, self._spec, self._device)
        self._engine = make_engine(self._engine_name, self._spec, self._state, self._device)

    def reset_units(self, layers: Sequence[int], fraction: float) -> dict[str, int]:
        """Resets the units of least utility in these hidden layers now, whatever rates are set there.

        `fraction`, above 0 and at most 1, is of each layer's units, rounded up to whole units; only mature units are
        reset, so there may be fewer. Returns how many it reset, by layer. What the rates still owe stays owed.

        Raises `SpecError` if there is no such layer, or the fraction is out of range.
        """
        self._refuse_while_training("reset_units")
        self._check_reset(layers, fraction)
        # Decimal: 0.07 of 100 units is 7 units, and not the 8 that binary rounding makes of it.
        share = Decimal(repr(float(fraction)))
        wanted = [
            math.ceil(share * width) if layer in layers else 0
            for layer, width in enumerate(profile_of(self._spec.network).hidden_units)
        ]
        [counts] = self._engine.reset_units([wanted])
        return {hidden_layer_name(layer): counts[layer] for layer in sorted(layers)}

    def _check_reset(self, layers: Sequence[int], fraction: float) -> None:
        hidden = len(profile_of(self._spec.network).hidden_units)
        if not hidden:
            raise SpecError([FieldViolation("layers", "The network has no hidden units that could be reset")])
        violations = [
            FieldViolation(
                f"layers[{place}]", f"Expected a hidden layer's index, 0 to {hidden - 1}; got {shown(layer)}"
            )
            for place, layer in enumerate(layers)
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < hidden
        ]
        if not violations and (not layers or len(set(layers)) < len(layers)):
            violations.append(FieldViolation("layers", "Expected at least one hidden layer, and each at most once"))
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= 1:
            violations.append(
                FieldViolation("fraction", f"Expected a number above 0 and at most 1; got {shown(fraction)}")
            )
        if violations:
            raise SpecError(violations)

    def sample_plasticity(self) -> PlasticitySample:
        """Measures every layer now, on the recent examples; changes nothing."""
        return self._sample()

    def _sample(self, between_layers: Callable[[], None] | None = None) -> PlasticitySample:
        return PlasticitySample(
            step=self._state.steps[0],
            examples=self._examples,
            layers=self._engine.measure(self._probe, between_layers),
        )

    def take_samples(self) -> list[PlasticitySample]:
        """The samples that training has taken since the last call, at most the last 1024; they are not in snapshots."""
        samples = list(self._samples)
        self._samples.clear()
        return samples

    def snapshot(self, into: LearnerSnapshot | None = None) -> LearnerSnapshot:
        """A copy of everything; restored, it continues bit for bit like this learner.

        `into` is an earlier snapshot that is not needed any more: where its tensors fit they are written over, which
        saves the time that fresh memory takes. The initial parameters never change; a learner's snapshots share them,
        on the CPU also with the learner itself.
        """
        self._refuse_while_training("snapshot")
        state = self._state
        changing = state.changing_tensors() | {
            "pending.features": torch.from_numpy(self._pending.features),
            "pending.targets": torch.from_numpy(self._pending.targets),
            "pending.weights": torch.from_numpy(self._pending.known_weights()),
            "probe.features": torch.from_numpy(self._probe.features),
            "probe.targets": torch.from_numpy(self._probe.targets),
        }
        if self._initial_parameters is None:
            self._initial_parameters = {name: tensor.cpu() for name, tensor in state.first_tensors().items()}
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "spec": self._spec.to_plain(),
            "examples": self._examples,
            "pending_tasks": [list(run) for run in self._pending.tasks],
            "progress": self._progress.to_plain(),
        } | state.to_plain()
        room = {} if into is None else into.tensors
        copies = {name: _copy_to_host(tensor, room.get(name)) for name, tensor in changing.items()}
        return LearnerSnapshot(tensors=copies | self._initial_parameters, metadata=metadata)

    @classmethod
    def restore(
        cls, snapshot: LearnerSnapshot, *, device: torch.device | str = "cpu", engine: EngineChoice = "torch"
    ) -> "Learner":
        """The learner that the snapshot was taken of. Raises `SnapshotError` if anything is missing or does not fit.

        The engine may be another one than that of the snapshot's learner.
        """
        check_engine(engine, torch.device(device))
        spec = snapshot.read_spec()
        resolve_engine(engine, spec, torch.device(device))
        try:
            _check_size(spec, snapshot.tensors)
            learner = cls(spec, device=device, engine=engine)
            learner._load(snapshot.tensors, snapshot.metadata)
        except SnapshotError:
            raise
        except SpecError as error:
            raise SnapshotError.of_spec(error) from error
        except (CbpError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise SnapshotError(f"The snapshot cannot be restored: {type(error).__name__}: {error}") from error
        return learner

    def _load(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        saved = read_learner(self._state.saved_as, metadata, self._spec)
        pending = self._examples_in(tensors, "pending", saved.pending_tasks, weighted=True)
        recent = self._examples_in(tensors, "probe", None)
        most = min(self._spec.monitoring.probe_size, saved.examples)
        if len(recent) > most:
            text = f"Expected at most {most}, by monitoring.probe_size and the examples learnt from; got {len(recent)}"
            raise SnapshotError.of([FieldViolation("probe.features", text)])
        self._state.load(tensors, saved)
        self._examples = saved.examples
        self._progress = ProgressTracker.of(saved.progress)
        self._pending = pending if len(pending) else self._none
        self._probe = Probe(self._spec.monitoring.probe_size, recent.features, recent.targets)

    def _examples_in(
        self, tensors: Mapping[str, Tensor], part: str, tasks: Sequence[TaskRun] | None, *, weighted: bool = False
    ) -> Examples:
        """Those of a part of a snapshot, checked as a batch is, in memory of their own; without tasks if None."""

        def on_host(field: str, *row: int, dtype: torch.dtype = torch.float32) -> NDArray[Any]:
            copy: NDArray[Any] = take_tensor(tensors, f"{part}.{field}", (None, *row), dtype).numpy().copy()
            return copy

        labels = self._spec.loss.kind == "cross_entropy"
        features = on_host("features", *self._spec.network.input_shape)
        targets = (
            on_host("targets", dtype=torch.int64) if labels else on_host("targets", self._spec.network.out_features)
        )
        weights = on_host("weights") if weighted else None
        runs = [("", len(features))] if tasks is None else tasks
        try:
            return Examples.checked(self._spec, features, targets, weights, runs)
        except BatchError as error:
            raise SnapshotError.of(
                FieldViolation("pending_tasks" if each.field == "tasks" else f"{part}.{each.field}", each.description)
                for each in error.violations
            ) from error


def _check_size(spec: LearnerSpec, tensors: Mapping[str, Tensor]) -> None:
    """Nothing large is built that the snapshot has no parameters for, whatever its specification claims."""
    expected = profile_of(spec.network).parameters
    held = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("parameters."))
    if expected > 2 * held + _QUICKLY_BUILT:
        text = f"Makes {expected} parameters, where the snapshot's tensors hold {held}"
        raise SnapshotError.of([FieldViolation("spec.network", text)])


def _copy_to_host(tensor: Tensor, room: Tensor | None) -> Tensor:
    """A copy on the CPU, in `room` if that has just the shape and type for it."""
    if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype or not room.is_contiguous():
        room = torch.empty(tensor.shape, dtype=tensor.dtype)
    return room.copy_(tensor)
