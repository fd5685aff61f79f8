"""Batches being learnt, in slices short enough for others to have their turns in between.

Slices are cut by the learner's spec alone, so a batch is learnt in the same way whatever else the engine has to do.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from cbp import Batch, DivergenceError, Learner, LearnerSpec, TrainResult, train_together
from cbp.architectures.profile import profile_of

#: Multiplications of one slice, about; some 30 ms on one core.
_SLICE_WORK = 2e8
_MOST_STEPS = 512
#: Multiplications that take some 0.3 ms.
_LONG_WORK = 2e6


class StopTrainingError(Exception):
    """Raised between two steps to stop there."""


class TrainingJob:
    """Learns one batch slice by slice.

    Attributes:
        failure: why the batch cannot be learnt; the learner is in no defined state then.
    """

    def __init__(self, learner: Learner, batch: Batch, pace: "Pace", *, return_outputs: bool) -> None:
        self.learner = learner
        self.return_outputs = return_outputs
        self.failure: DivergenceError | None = None
        self._batch = batch
        self._pace = pace
        self._slice = pace.slice_examples or len(batch)
        self._taken = 0  # examples, up to the end of the slice that was handed out last
        self._learnt = 0
        self._results: list[TrainResult] = []

    @property
    def finished(self) -> bool:
        return self._learnt == len(self._batch)

    @property
    def is_short(self) -> bool:
        """Whether the next slice takes well below a millisecond."""
        return not self._pace.takes_long(min(self._slice, len(self._batch) - self._taken))

    @property
    def steps(self) -> int:
        """Taken so far."""
        return sum(result.steps for result in self._results)

    def give_up(self) -> None:
        """Leaves the examples that have not been learnt waiting in the learner."""
        if self.failure is None and self._taken < len(self._batch):
            with suppress(StopTrainingError):  # after one step; the others wait
                self.learner.train(self._take(len(self._batch)), between_steps=_stop)

    def result(self) -> TrainResult:
        """Of the whole batch, as if it had been learnt in one go."""
        return _joined(self._results, return_outputs=self.return_outputs)

    def next_slice(self) -> Batch:
        """The examples to learn next; `learnt` takes what came of it."""
        return self._take(self._taken + self._slice)

    def learnt(self, result: TrainResult | DivergenceError) -> None:
        if isinstance(result, DivergenceError):
            self.failure = result
        else:
            self._results.append(result)
            self._learnt = self._taken

    def learn_alone(self, between_steps: Callable[[], None]) -> None:
        """`next_slice` and `learnt` in one, for less."""
        try:
            self.learnt(
                self.learner.train(self.next_slice(), return_outputs=self.return_outputs, between_steps=between_steps)
            )
        except DivergenceError as divergence:
            self.learnt(divergence)

    def _take(self, end: int) -> Batch:
        batch = self._batch
        rows = slice(self._taken, end)
        self._taken = min(end, len(batch))
        if rows.start == 0 and self._taken == len(batch):
            return batch
        weights = None if batch.weights is None else batch.weights[rows]
        return Batch(features=batch.features[rows], targets=batch.targets[rows], weights=weights, task=batch.task)


def run_slices(jobs: Sequence[TrainingJob], between_steps: Callable[[], None]) -> None:
    """Learns the next slice of each batch, in as few engine calls as possible.

    Args:
        between_steps: called every few steps; may raise `StopTrainingError`.

    Raises:
        StopTrainingError: from between_steps; the examples of these slices that are left wait in their learners.
    """
    if len(jobs) == 1:
        jobs[0].learn_alone(between_steps)
        return
    results = train_together(
        [(job.learner, job.next_slice()) for job in jobs],
        return_outputs=any(job.return_outputs for job in jobs),
        between_steps=between_steps,
    )
    for job, result in zip(jobs, results, strict=True):
        job.learnt(result)


def run_row(
    learner: Learner,
    batches: Sequence[Batch],
    results: list[TrainResult],
    *,
    return_outputs: Sequence[bool],
    between_steps: Callable[[], None],
    is_over: Callable[[], bool],
) -> None:
    """Learns batches that need no slicing one after another, until the row `is_over`.

    Args:
        results: gets each batch's as it is learnt; those before one that fails are there.
        between_steps: as in `run_slices`.
        is_over: asked after each batch.

    Raises:
        DivergenceError: the learner is in no defined state then.
        StopTrainingError: from between_steps; the examples of this batch that are left wait in the learner.
    """
    train = learner.train
    for batch, wants_outputs in zip(batches, return_outputs, strict=True):
        results.append(train(batch, return_outputs=wants_outputs, between_steps=between_steps))
        if is_over():
            break


def _stop() -> None:
    raise StopTrainingError


@dataclass(frozen=True)
class Pace:
    """How a learner's batches are cut.

    Attributes:
        example_work: multiplications for one example, forwards.
        slice_examples: examples of one slice; 0 if a batch is one step and cannot be cut.
    """

    example_work: int
    slice_examples: int

    @classmethod
    def of(cls, spec: LearnerSpec) -> "Pace":
        """What no update of a learner changes."""
        work = profile_of(spec.network).multiplications
        if spec.batch_size == 0:
            return cls(work, 0)
        steps = _SLICE_WORK / (work * spec.batch_size)
        return cls(work, int(min(max(steps, 1), _MOST_STEPS)) * spec.batch_size)

    def fits_one_slice(self, batch: Batch) -> bool:
        """Whether the batch is not cut."""
        return not self.slice_examples or len(batch) <= self.slice_examples

    def takes_long(self, examples: int) -> bool:
        """Whether it takes a large part of a millisecond, or more, to learn so many examples."""
        return examples * self.example_work >= _LONG_WORK


def _joined(results: Sequence[TrainResult], *, return_outputs: bool) -> TrainResult:
    if len(results) == 1:
        alone = results[0]
        return alone if return_outputs or alone.outputs is None else replace(alone, outputs=None)
    outputs = [result.outputs for result in results if result.outputs is not None] if return_outputs else []
    return TrainResult(
        steps=sum(result.steps for result in results),
        first_step=results[0].first_step,
        examples=sum(result.examples for result in results),
        pending=results[-1].pending,
        loss=_mean([(result.loss, result.examples) for result in results]),
        accuracy=_mean([(result.accuracy, result.examples) for result in results]),
        outputs=np.concatenate(outputs) if outputs else None,
    )


def _mean(parts: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, count) for value, count in parts if value is not None]
    if not known:
        return None
    return sum(value * count for value, count in known) / sum(count for _, count in known)
