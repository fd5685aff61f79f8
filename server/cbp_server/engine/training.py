"""One batch being learnt, in slices short enough for others to have their turns in between.

Slices are cut by the learner's spec alone, so a batch is learnt in the same way whatever else the engine has to do.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np

from cbp import Batch, Learner, LearnerSpec, TrainResult

#: Multiplications of one slice, about; some 30 ms on one core.
_SLICE_WORK = 2e8
_MOST_STEPS = 512


class StopTrainingError(Exception):
    """Raised between two steps to stop there."""


class TrainingJob:
    """Learns one batch slice by slice.

    Args:
        between_steps: called between any two steps of a slice; may raise `StopTrainingError`.
    """

    def __init__(
        self, learner: Learner, batch: Batch, *, return_outputs: bool, between_steps: Callable[[], None]
    ) -> None:
        self._learner = learner
        self._batch = batch
        self._return_outputs = return_outputs
        self._between_steps = between_steps
        self._slice = _slice_examples(learner.spec) or len(batch)
        self._taken = 0
        self._results: list[TrainResult] = []
        self.seconds = 0.0  # spent on it so far

    @property
    def finished(self) -> bool:
        return self._taken == len(self._batch)

    def run_slice(self) -> None:
        """Learns the next examples.

        Raises:
            StopTrainingError: from between_steps; the examples of this slice that are left wait in the learner.
        """
        part = self._take(self._taken + self._slice)
        result = self._learner.train(part, return_outputs=self._return_outputs, between_steps=self._between_steps)
        self._results.append(result)

    def give_up(self) -> None:
        """Leaves the examples that have not been learnt waiting in the learner."""
        if not self.finished:
            with suppress(StopTrainingError):  # after one step; the others wait
                self._learner.train(self._take(len(self._batch)), between_steps=_stop)

    def result(self) -> TrainResult:
        """Of the whole batch, as if it had been learnt in one go."""
        return _joined(self._results)

    def _take(self, end: int) -> Batch:
        rows = slice(self._taken, end)
        self._taken = min(end, len(self._batch))
        batch = self._batch
        weights = None if batch.weights is None else batch.weights[rows]
        return Batch(features=batch.features[rows], targets=batch.targets[rows], weights=weights, task=batch.task)


def _stop() -> None:
    raise StopTrainingError


def _slice_examples(spec: LearnerSpec) -> int:
    """Examples of one slice; 0 if a batch is one step and cannot be cut."""
    if spec.batch_size == 0:
        return 0
    widths = [spec.network.in_features, *spec.network.hidden, spec.network.out_features]
    weights = sum(before * after for before, after in pairwise(widths))
    steps = _SLICE_WORK / (weights * spec.batch_size)
    return int(min(max(steps, 1), _MOST_STEPS)) * spec.batch_size


def _joined(results: Sequence[TrainResult]) -> TrainResult:
    if len(results) == 1:
        return results[0]
    outputs = [result.outputs for result in results if result.outputs is not None]
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
