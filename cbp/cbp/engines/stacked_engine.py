"""Steps of many learners at once: for a GPU, which one small network cannot keep busy.

Learners of one kind share a stack of a fixed number of rows. For a run of steps a learner's state is copied into a
row, and back at the end; rows that nobody takes step along in vain. So every operation has the same shapes, and with
them the same kernels, whoever takes part: what a learner computes depends neither on its company nor on its row.

Shapes: W rows, B examples in a step, I inputs, C outputs, U hidden units, K steps that are staged at once.
"""

import math
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbp import losses, optimizers
from cbp.engines.eager_engine import EagerEngine, Work
from cbp.engines.names import EngineName
from cbp.engines.torch_engine import StackState, TorchEngine
from cbp.examples.pending import Examples, Probe
from cbp.networks import flat_layers
from cbp.progress import Tally
from cbp.spec.learner_spec import LearnerSpec, LossSpec, MlpSpec, SgdSpec, Utility
from cbp.units.replacement import DrawSource, UnitState

_CPU_WIDTHS = (64, 32)
"""Multiples of the floats that two vector instructions take together, so that none of a row's numbers is left over for
instructions of another kind, which round differently."""
_CUDA_WIDTHS = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2)
_CPU_BYTES = 2**24
"""What the rows may take up: more does not fit the caches of a CPU."""
_CUDA_BYTES = 2**26
_STAGED_BYTES = 2**25
_STAGED_STEPS = 64
_CUDA_STEPS_BETWEEN_CALLS = 8


@dataclass(frozen=True)
class _Kind:
    """What learners have in common that share a stack."""

    network: MlpSpec
    loss: LossSpec
    optimizer: str
    uses_momentum: bool
    nesterov: bool
    clips: bool
    uses_weight_decay: bool
    utility: Utility
    resets_in_part: bool
    step_size: int
    device: torch.device
    published_order: bool


def stack_width(network: MlpSpec, step_size: int, device: torch.device) -> int:
    """Rows of a stack; 1 if the network is too large to gain from company."""
    widths = (network.in_features, *network.hidden, network.out_features)
    parameters = sum((into + 1) * out for into, out in pairwise(widths))
    row_bytes = 4 * (parameters + step_size * (2 * sum(widths)))
    on_gpu = device.type == "cuda"
    candidates, limit = (_CUDA_WIDTHS, _CUDA_BYTES) if on_gpu else (_CPU_WIDTHS, _CPU_BYTES)
    return next((width for width in candidates if width * row_bytes <= limit), 1)


class StackedEngine(EagerEngine):
    """One learner's steps, taken in a stack."""

    name: EngineName = "stacked"
    _stack: "_Stack | None" = None

    @property
    def draws(self) -> DrawSource:
        return self._draws

    def configure(self, specs: Sequence[LearnerSpec]) -> None:
        super().configure(specs)
        self._stack = None

    def begin(self, examples: Examples, step_size: int, probe: Probe) -> Work:
        if self._stack is None or self._stack.kind.step_size != step_size:
            if stack_width(self.spec.mlp, step_size, self.device) == 1:
                return super().begin(examples, step_size, probe)
            self._stack = _stack_of(self._kind(step_size), self.spec)
        return StackedWork(self, self._stack, examples, probe)

    def _kind(self, step_size: int) -> _Kind:
        spec = self.spec
        return _Kind(
            network=spec.mlp,
            loss=spec.loss,
            optimizer=spec.optimizer.kind,
            uses_momentum=optimizers.uses_momentum([spec.optimizer]),
            nesterov=isinstance(spec.optimizer, SgdSpec) and spec.optimizer.nesterov,
            clips=spec.optimizer.clip_norm is not None,
            uses_weight_decay=spec.optimizer.weight_decay > 0,
            utility=spec.resets.utility,
            resets_in_part=spec.resets.strength < 1,
            step_size=step_size,
            device=self.device,
            published_order=self._published_order,
        )

    def steps_between_calls(self, step_size: int, learners: int) -> int:
        del step_size, learners
        return _CUDA_STEPS_BETWEEN_CALLS if self.device.type == "cuda" else 1


class StackedWork:
    """A message of one learner on its way through the stack."""

    def __init__(self, engine: StackedEngine, stack: "_Stack", examples: Examples, probe: Probe) -> None:
        self.engine = engine
        self.stack = stack
        self._examples, self._probe = examples, probe
        spec, step_size = engine.spec, stack.kind.step_size
        outputs = spec.mlp.out_features
        steps = len(examples) // step_size
        targets = examples.targets if examples.targets.flags.writeable else examples.targets.copy()
        encoded = losses.encode_targets(spec.loss, torch.from_numpy(targets), outputs).numpy()
        scale = examples.known_weights() * np.float32(losses.gradient_scale(spec.loss, outputs) / step_size)
        self._feed = (
            examples.features.reshape(steps, step_size, spec.mlp.in_features),
            encoded.reshape(steps, step_size, outputs),
            scale.reshape(steps, step_size, 1),
        )
        self._outputs = np.zeros((steps, step_size, outputs), np.float32)
        self._losses = np.zeros((steps, step_size))
        self._accuracies = np.zeros((steps, step_size))
        self._finite = True
        self._fed = 0
        self._received = 0
        self._applied = 0

    def run(self, steps: int) -> None:
        self.run_together([(self, steps)])

    @staticmethod
    def run_together(turns: Sequence[tuple["StackedWork", int]]) -> None:
        by_stack: dict[_Stack, list[tuple[StackedWork, int]]] = {}
        for work, steps in turns:
            by_stack.setdefault(work.stack, []).append((work, steps))
        for stack, its_turns in by_stack.items():
            stack.run(its_turns)

    def feed(self, row: int, steps: int, room: Sequence[NDArray[np.float32]]) -> None:
        """Writes the next steps' inputs, targets and scale to a row of [K, W, B, …]."""
        here = slice(self._fed, self._fed + steps)
        for part, values in zip(room, self._feed, strict=True):
            part[:steps, row] = values[here]
        self._fed += steps

    def receive(self, row: int, steps: int, results: Sequence[NDArray[np.float32]], sums: NDArray[np.float32]) -> None:
        """Reads what these steps have yielded from a row of [K, W, B, …]; sums [n, W] are finite if the state is."""
        here = slice(self._received, self._received + steps)
        outputs, measured, accuracies = results
        self._outputs[here] = outputs[:steps, row]
        self._losses[here] = measured[:steps, row]
        self._accuracies[here] = accuracies[:steps, row]
        self._received += steps
        self._finite = bool(np.isfinite(sums[:, row]).all())

    def account_for(self, steps: int) -> None:
        """So many steps are in the learner's state now."""
        self.engine.state.steps[0] += steps
        applied = slice(self._applied, self._applied + steps * self.stack.kind.step_size)
        self._probe.extend(self._examples.features[applied], self._examples.targets[applied])
        self._applied = applied.stop

    def outputs(self) -> NDArray[np.float32]:
        return self._outputs.reshape(-1, self._outputs.shape[2])

    def tally(self) -> tuple[Tally, bool]:
        tally = Tally.of(*self.scores(), self.engine.spec.monitoring.average_decay)
        return tally, self._finite and math.isfinite(tally.loss)

    def scores(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        labelled = self.engine.spec.loss.kind in ("cross_entropy", "binary_cross_entropy")
        accuracies = self._accuracies.reshape(-1)[: self._applied] if labelled else None
        return self._losses.reshape(-1)[: self._applied], accuracies


class _RowDraws:
    """A row's draws are those of the learner in it."""

    def __init__(self, utilities: Tensor) -> None:
        self.rows: list[DrawSource] = []
        self._utilities = utilities

    def incoming_weights(self, learner: int, layer: int, count: int) -> Tensor:
        return self.rows[learner].incoming_weights(0, layer, count)

    def utilities(self) -> Tensor:
        return self._utilities


class _Chunk:
    """What up to K steps need and what they yield, on the host and on the device; on the CPU that is one and the same.

    A GPU copies beside its computations, from and to pinned memory. The host waits for it only in `collect`.
    """

    def __init__(
        self, steps: int, feed: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        width = feed[0][0]
        on_gpu = device.type == "cuda"

        def pair(*shape: int) -> tuple[Tensor, Tensor]:
            on_host = torch.zeros(shape, pin_memory=on_gpu)
            return on_host, torch.zeros(shape, device=device) if on_gpu else on_host

        self._host_feed, self.feed = pair(steps, sum(map(math.prod, feed)))
        self._host_results, self.results = pair(steps, sum(map(math.prod, results)))
        self._host_sums, self.sums = pair(2, width)
        self.feed_parts = [part.numpy() for part in _parts(self._host_feed, feed)]
        self._result_parts = [part.numpy() for part in _parts(self._host_results, results)]
        self._recipients: list[tuple[StackedWork, int, int]] = []
        self._copies: torch.cuda.Stream | None = None
        if on_gpu:
            self._device = device
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies.wait_stream(torch.cuda.current_stream(device))  # for it fills the new memory with zeros
            self._uploaded, self._computed, self._downloaded = (torch.cuda.Event() for _ in range(3))  # type: ignore[no-untyped-call]

    def upload(self, steps: int) -> None:
        if self._copies is None:
            return
        with torch.cuda.stream(self._copies):
            self.feed[:steps].copy_(self._host_feed[:steps], non_blocking=True)
            self._uploaded.record()
        torch.cuda.current_stream(self._device).wait_event(self._uploaded)

    def download(self, steps: int, recipients: Sequence[StackedWork]) -> None:
        """Starts to bring the results back; `collect` hands them out."""
        self._recipients = [(work, row, steps) for row, work in enumerate(recipients)]
        if self._copies is None:
            return
        self._computed.record(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._computed)
            self._host_results[:steps].copy_(self.results[:steps], non_blocking=True)
            self._host_sums.copy_(self.sums, non_blocking=True)
            self._downloaded.record()

    def collect(self) -> None:
        """Hands out the results of the last download; from then on the chunk is free."""
        if self._recipients and self._copies is not None:
            self._downloaded.synchronize()
        for work, row, steps in self._recipients:
            work.receive(row, steps, self._result_parts, self._host_sums.numpy())
        self._recipients = []


def _parts(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of these shapes, one after another in the last dimension."""
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes], dim=-1)
    return [piece.view(*flat.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


class _Stack(TorchEngine):
    """W rows, in which learners of one kind step together. Threads take turns."""

    def __init__(self, kind: _Kind, spec: LearnerSpec) -> None:
        network, device, step_size = kind.network, kind.device, kind.step_size
        self.kind = kind
        self.width = width = stack_width(network, step_size, device)
        self._lock = threading.Lock()
        units, outputs = sum(network.hidden), network.out_features
        self._draws_utilities = kind.utility == "random"
        feed: list[tuple[int, ...]] = [
            (width, step_size, network.in_features),
            (width, step_size, outputs),
            (width, step_size, 1),
            (width, units if self._draws_utilities else 0),
        ]
        results: list[tuple[int, ...]] = [(width, step_size, outputs), (width, step_size), (width, step_size)]
        self._feed = torch.zeros(sum(map(math.prod, feed)), device=device)
        self._results = torch.zeros(sum(map(math.prod, results)), device=device)
        self._inputs, self._targets, self._scale, utilities = _parts(self._feed, feed)
        self._outputs, self._losses, self._accuracies = _parts(self._results, results)
        self._row_draws = _RowDraws(utilities)
        super().__init__(
            [spec] * width,
            _blank_state(spec, width, device),
            device,
            self._row_draws,
            published_order=kind.published_order,
        )
        self._rows = [tensor.unbind(0) for tensor in _changing(self.state)]
        self._setting_rows = [tensor.unbind(0) for tensor in self.setting_tensors()]
        self._settings_of: list[Any] = [None] * width
        # The draws of a step come after those of the replacements before it, so they cannot be made ahead.
        bytes_a_step = 4 * (self._feed.numel() + self._results.numel())
        staged = 1 if self._draws_utilities else min(max(_STAGED_BYTES // bytes_a_step, 1), _STAGED_STEPS)
        # With two chunks the host fills one while the device works on the other.
        self._chunks = [_Chunk(staged, feed, results, device) for _ in range(2 if device.type == "cuda" else 1)]
        self._staged = staged
        self._graph = _captured(self._learn_and_score, device) if device.type == "cuda" and spec.batch_size else None

    def run(self, turns: Sequence[tuple[StackedWork, int]]) -> None:
        """Takes the works' next steps, `width` learners at a time; those with as many steps go together."""
        ordered = sorted((turn for turn in turns if turn[1]), key=lambda turn: turn[1], reverse=True)
        with self._lock, torch.inference_mode():
            try:
                for start in range(0, len(ordered), self.width):
                    group = ordered[start : start + self.width]
                    self._run_group([work for work, _ in group], [steps for _, steps in group])
            finally:
                for chunk in self._chunks:
                    chunk.collect()

    def _run_group(self, works: Sequence[StackedWork], steps: Sequence[int]) -> None:
        """Up to W works, those with most steps first: as their steps end, they go from the last row on."""
        self._take_in(works)
        taken, active = 0, len(works)
        while active:
            at_once = min(steps[active - 1] - taken, self._staged)
            self._take_steps(works[:active], taken, at_once)
            taken += at_once
            staying = next((row for row in range(active) if steps[row] == taken), active)
            if staying < active:
                self._give_back(works[staying:active], staying, taken)
            active = staying

    def _take_in(self, works: Sequence[StackedWork]) -> None:
        engines = [work.engine for work in works]
        _copy_rows(self._rows, [_changing(engine.state) for engine in engines], into_stack=True)
        self._row_draws.rows = [engine.draws for engine in engines]
        self.state.replacements[: len(works)] = [engine.state.replacements[0] for engine in engines]
        for row, engine in enumerate(engines):
            if self._settings_of[row] is not engine.settings:
                self._settings_of[row] = engine.settings
                for rows, setting in zip(self._setting_rows, engine.setting_tensors(), strict=True):
                    rows[row].copy_(setting[0])

    def _give_back(self, works: Sequence[StackedWork], first_row: int, steps: int) -> None:
        rows = [of_part[first_row:] for of_part in self._rows]
        _copy_rows(rows, [_changing(work.engine.state) for work in works], into_stack=False)
        for work in works:
            work.account_for(steps)

    def _take_steps(self, works: Sequence[StackedWork], taken: int, steps: int) -> None:
        """So many steps of the learners in the first rows, which have taken so many since they came."""
        chunk = self._chunks[0]
        self._chunks = [*self._chunks[1:], chunk]
        chunk.collect()
        *feed, utilities = chunk.feed_parts
        for row, work in enumerate(works):
            work.feed(row, steps, feed)
            if self._draws_utilities:
                utilities[0, row] = self._row_draws.rows[row].utilities()[0].numpy()
        feed[2][:steps, len(works) :] = 0.0
        due = _replacements_due([work.engine.state for work in works], taken, steps)
        chunk.upload(steps)
        nobody = [(0,) * len(self.kind.network.hidden)] * self.width
        for step in range(steps):
            self._feed.copy_(chunk.feed[step])
            if self._graph is None:
                self._learn_and_score()
            else:
                self._graph.replay()
            chunk.results[step].copy_(self._results)
            if due[step]:
                counts = list(nobody)
                for row, of_row in due[step]:
                    counts[row] = of_row
                self._replace(counts, published_order=self._published_order)
        for place, (_, numbers) in enumerate(self.state.checked_numbers()):
            torch.sum(numbers, dim=1, out=chunk.sums[place])
        chunk.download(steps, works)

    def _learn_and_score(self) -> None:
        """A step on what lies in the feed, but for replacements."""
        loss = self.kind.loss
        self.learn(self._inputs, self._targets, self._scale, self._outputs)
        self._losses.copy_(losses.example_losses(loss, self._outputs, self._targets))
        accuracies = losses.example_accuracies(loss, self._outputs, self._targets)
        if accuracies is not None:
            self._accuracies.copy_(accuracies)


_stacks: weakref.WeakValueDictionary[_Kind, _Stack] = weakref.WeakValueDictionary()
"""The stacks in use. Learners know nothing of one another; this is where those of one kind meet."""
_stacks_lock = threading.Lock()


def _stack_of(kind: _Kind, spec: LearnerSpec) -> _Stack:
    with _stacks_lock:
        stack = _stacks.get(kind)
        if stack is None:
            stack = _stacks[kind] = _Stack(kind, spec)
        return stack


def _blank_state(spec: LearnerSpec, width: int, device: torch.device) -> StackState:
    """Rows for learners to come."""
    parameters = flat_layers(spec.mlp, width, device)
    return StackState(
        parameters=parameters,
        initial_parameters=parameters,  # no step reads them
        optimizer=optimizers.initial_state([spec.optimizer] * width, spec.mlp, device),
        units=UnitState.fresh(width, sum(spec.mlp.hidden), device),
        schedules=[],
        generators=[],
        steps=[],
        replacements=[[0] * len(spec.mlp.hidden) for _ in range(width)],
    )


def _changing(state: StackState) -> list[Tensor]:
    """[L, …] tensors that steps change."""
    units, slots = state.units, state.optimizer.slots().values()
    return [state.parameters.flat, units.utility, units.age, units.mean_activation, *(slot.flat for slot in slots)]


def _copy_rows(rows: Sequence[Sequence[Tensor]], states: Sequence[Sequence[Tensor]], *, into_stack: bool) -> None:
    """Between rows[part][row] and states[row][part][0], one call a part."""
    for part, of_part in enumerate(rows):
        outside = [state[part][0] for state in states]
        inside = list(of_part[: len(states)])
        targets, sources = (inside, outside) if into_stack else (outside, inside)
        torch._foreach_copy_(targets, sources)


def _replacements_due(states: Sequence[StackState], taken: int, steps: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Per step the rows that replace units, and how many per hidden layer; moves the schedules on.

    What `ReplacementSchedule.advance` does at a step without replacements and newly mature units, which is nearly all
    of them, is done here for all rows together, in the same float64 arithmetic.
    """
    schedules = [state.schedules[0] for state in states]
    first = [state.steps[0] + taken + 1 for state in states]
    owed = np.array([schedule.accumulated for schedule in schedules])
    growth = np.zeros_like(owed)
    ripens = np.zeros(len(states), np.int64)
    due: list[list[tuple[int, tuple[int, ...]]]] = []
    for step in range(steps):
        for row in np.flatnonzero(ripens <= step).tolist():
            schedule = schedules[row]
            quiet = schedule.quiet_steps(first[row] + step)
            ripens[row] = steps if quiet is None else step + quiet
            growth[row] = [rate * mature for rate, mature in zip(schedule.rates, schedule.mature, strict=True)]
        grown = owed + growth
        replacing: list[tuple[int, tuple[int, ...]]] = []
        for row in np.flatnonzero((grown >= 1.0).any(axis=1)).tolist():
            schedule = schedules[row]
            schedule.accumulated[:] = array("d", owed[row].tobytes())
            counts = schedule.advance(first[row] + step)
            grown[row] = schedule.accumulated
            if counts is not None:
                replacing.append((row, counts))
                ripens[row] = step + 1
        owed = grown
        due.append(replacing)
    for schedule, of_row in zip(schedules, owed, strict=True):
        schedule.accumulated[:] = array("d", of_row.tobytes())
    return due


def _captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """The step as a graph, which the host starts with one call."""
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        step()  # what libraries set up at their first call must not be captured
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
        step()
    return graph
