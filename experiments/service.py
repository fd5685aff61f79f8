"""One experiment entirely over gRPC: the server teaches the learners, and what it reports is compared with learners of
the same specification in this process.

Shapes: T tasks, N examples of the last task, C classes.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cbp import Batch, DivergenceError, Learner, LearnerProgress, LearnerSpec, PlasticitySample, train_together
from cbp_client import AsyncClient, AsyncLearner, NotFound
from experiments import figures
from experiments.cells import Cell
from experiments.findings import Size, of_masks, small_cell
from experiments.streams import Examples
from experiments.tables import markdown

MOST_TASKS = 128
"""Task records that a server keeps of each learner."""
ROUNDING = 1e-9
"""Differences of float64 means of the same float32 numbers are far smaller, those of learners that differ larger."""
_EXAMPLES_A_MESSAGE = 100
_MASKS = ("none", "only first", "all")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one learner did."""

    cell: Cell
    accuracies: NDArray[np.float64]
    """[T] online accuracy."""
    first_weights: NDArray[np.float64]
    """[T] mean |w| of the first layer at the end of each task."""
    outputs: NDArray[np.float32]
    """[N, C] for the examples of the last task, after it."""

    def difference(self, other: "Outcome") -> float:
        """The largest of any of these numbers, relative to numbers of at least 1."""
        pairs: tuple[tuple[NDArray[Any], NDArray[Any]], ...] = (
            (self.accuracies, other.accuracies),
            (self.first_weights, other.first_weights),
            (self.outputs, other.outputs),
        )
        return max(float((np.abs(one - two) / np.maximum(1.0, np.abs(two))).max()) for one, two in pairs)


@dataclass(frozen=True, eq=False)
class Followed(Outcome):
    """What one learner did in this process, and how it stood at the start and after each message."""

    standings: Mapping[int, LearnerProgress]
    """By the examples learnt."""
    samples: Sequence[PlasticitySample]
    """Of the end of each task."""


def experiment(tasks: int) -> list[Cell]:
    """Three masks on permuted digits of 8×8."""
    return list(of_masks(small_cell(Size(seeds=1, tasks=tasks, examples=1797)), _MASKS))


def learner_id(cell: Cell) -> str:
    """Under which the cell's learner is on the server."""
    return f"experiment-{cell.mask_name.replace(' ', '-')}"


def over_grpc(target: str, cells: Sequence[Cell], seed: int, on_task: Callable[[str, int], None]) -> list[Outcome]:
    """Creates the learners on the server at `target`, in place of those of an earlier run, and streams to all at once.

    `on_task` is told the learner's id and the number of tasks sent to it. Raises `cbp_client` errors.
    """
    return asyncio.run(_over_grpc(target, cells, seed, on_task))


async def _over_grpc(
    target: str, cells: Sequence[Cell], seed: int, on_task: Callable[[str, int], None]
) -> list[Outcome]:
    async with AsyncClient(target) as client:
        await client.wait_until_ready()
        learners = [await _new_learner(client, cell, seed) for cell in cells]
        return await asyncio.gather(
            *(_stream(learner, cell, seed, on_task) for learner, cell in zip(learners, cells, strict=True))
        )


async def _new_learner(client: AsyncClient, cell: Cell, seed: int) -> AsyncLearner:
    with contextlib.suppress(NotFound):
        await (await client.get_learner(learner_id(cell))).delete()
    return await client.create_learner(learner_id(cell), **_monitored(cell, seed))


def _monitored(cell: Cell, seed: int) -> dict[str, Any]:
    """The cell's specification, with a plasticity sample at the end of every task."""
    plain = cell.learner_spec(seed).to_plain()
    plain["monitoring"]["interval"] = cell.stream.examples
    return plain


async def _stream(learner: AsyncLearner, cell: Cell, seed: int, on_task: Callable[[str, int], None]) -> Outcome:
    async with learner.stream("experiment") as stream:
        for number in range(cell.tasks):
            features, labels = cell.stream.task(seed, number)
            await stream.send_many(features, labels, task=_task_name(number), examples_per_message=_EXAMPLES_A_MESSAGE)
            on_task(learner.id, number + 1)
    info = await learner.refresh()
    samples = await learner.plasticity(history=cell.tasks)
    prediction = await learner.predict(features)
    return Outcome(
        cell,
        np.array([task.accuracy for task in info.progress.tasks], np.float64),
        np.array([sample.layers[0].mean_abs_weight for sample in samples], np.float64),
        prediction.outputs,
    )


def _task_name(number: int) -> str:
    return f"task-{number + 1:03d}"


def in_process(cells: Sequence[Cell], seed: int) -> list[Followed]:
    """What learners here do with the same messages. Raises `DivergenceError`."""
    learners = [Learner(LearnerSpec.parse(_monitored(cell, seed)), engine="auto") for cell in cells]
    standings = [{0: learner.progress} for learner in learners]
    samples: list[list[PlasticitySample]] = [[] for _ in cells]
    for message, task in _messages(cells[0], seed):
        batches = [Batch.validate(learner.spec, *message, task=task) for learner in learners]
        for place, result in enumerate(train_together(list(zip(learners, batches, strict=True)))):
            if isinstance(result, DivergenceError):
                raise result
            progress = learners[place].progress
            standings[place][progress.examples] = progress
            samples[place] += learners[place].take_samples()
    features, _ = cells[0].stream.task(seed, cells[0].tasks - 1)
    return [
        Followed(
            cell,
            np.array([task.accuracy for task in learner.progress.tasks], np.float64),
            np.array([sample.layers[0].mean_abs_weight for sample in samples[place]], np.float64),
            learner.predict(features),
            standings[place],
            samples[place],
        )
        for place, (cell, learner) in enumerate(zip(cells, learners, strict=True))
    ]


def _messages(cell: Cell, seed: int) -> Iterator[tuple[Examples, str]]:
    """As the client cuts them, each with its task's name."""
    for number in range(cell.tasks):
        features, labels = cell.stream.task(seed, number)
        for start in range(0, len(labels), _EXAMPLES_A_MESSAGE):
            part = slice(start, start + _EXAMPLES_A_MESSAGE)
            yield (features[part], labels[part]), _task_name(number)


def comparison(served: Sequence[Outcome], local: Sequence[Outcome]) -> str:
    """A Markdown table of both ends of both, and the largest difference of any number."""
    rows = [
        [
            one.cell.mask_name,
            *(f"{outcome.accuracies[place]:.4f}" for place in (0, -1) for outcome in (one, other)),
            f"{one.difference(other):.1e}",
        ]
        for one, other in zip(served, local, strict=True)
    ]
    headings = ("resets", "first task, served", "here", "last task, served", "here", "largest difference")
    return markdown(headings, rows)


def picture(served: Sequence[Outcome], local: Sequence[Outcome]) -> Figure:
    """Lines are the server's numbers, dots those of this process."""
    figure = figures.new_figure(12, 4)
    accuracy, weights = figure.subplots(1, 2)
    places = np.arange(1, served[0].cell.tasks + 1)
    for axes, measure, scale in ((accuracy, "accuracies", 100.0), (weights, "first_weights", 1.0)):
        curves = {one.cell.mask_name: (places, scale * getattr(one, measure)[np.newaxis]) for one in served}
        for place, other in enumerate(local):
            colour = figures.colour_of(other.cell.mask_name, place)
            axes.plot(places, scale * getattr(other, measure), "o", color=colour, markersize=3.5, alpha=0.5)
        figures.draw_curves(axes, curves)
    figures.finish(accuracy, "Online accuracy", "task", "%")
    figures.finish(weights, "Weight magnitude, first layer", "task", "mean |w|")
    figures.headline(figure, "Lines: as the server reports it; dots: the same learners in one process; one run")
    return figure
