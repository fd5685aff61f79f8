"""Streams the same tasks to three learners at once: without resets, with resets in the first layer, and in all."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from cbp_client.aio import AsyncClient
from cbp_client.demo.digits import CLASSES, PIXELS, DigitTask
from cbp_client.errors import NotFound
from cbp_client.learner import AsyncLearner
from cbp_client.types import BatchResult, PlasticitySample, TaskRecord

_EXAMPLES_A_MESSAGE = 100
#: Task records that a server keeps of each learner.
MOST_TASKS = 128


@dataclass(frozen=True)
class Contestant:
    """One learner of the demo."""

    learner_id: str
    label: str
    layers: str  # resets.layers


CONTESTANTS = (
    Contestant("demo-backprop", "backprop", "none"),
    Contestant("demo-first", "resets: first layer", "first"),
    Contestant("demo-all", "resets: all layers", "all"),
)


@dataclass(frozen=True)
class Outcome:
    """What one learner did."""

    contestant: Contestant
    tasks: tuple[TaskRecord, ...]
    samples: tuple[PlasticitySample, ...]  # about one a task
    replacements: dict[str, int]  # by hidden layer


async def run_contest(
    target: str,
    tasks: list[DigitTask],
    *,
    seed: int,
    on_progress: Callable[[Contestant, BatchResult], None],
) -> list[Outcome]:
    """Creates the learners anew on the server at `target`, streams every task to each, and asks how they fared."""
    async with AsyncClient(target) as client:
        await client.wait_until_ready()
        learners = [await _new_learner(client, contestant, tasks, seed) for contestant in CONTESTANTS]
        await asyncio.gather(
            *(
                _stream(learner, contestant, tasks, on_progress)
                for learner, contestant in zip(learners, CONTESTANTS, strict=True)
            )
        )
        return [
            await _outcome(learner, contestant, len(tasks))
            for learner, contestant in zip(learners, CONTESTANTS, strict=True)
        ]


async def _new_learner(client: AsyncClient, contestant: Contestant, tasks: list[DigitTask], seed: int) -> AsyncLearner:
    with contextlib.suppress(NotFound):
        await (await client.get_learner(contestant.learner_id)).delete()  # of an earlier demo
    # One difference only: which layers are reset. lr is high enough for the loss of plasticity to show within minutes.
    return await client.create_learner(
        contestant.learner_id,
        network={"kind": "mlp", "in_features": PIXELS, "hidden": [100, 100, 100], "out_features": CLASSES},
        loss="cross_entropy",
        optimizer={"kind": "sgd", "lr": 0.02},
        batch_size=1,
        seed=seed,
        resets={"layers": contestant.layers, "replacement_rate": 1e-4, "maturity_threshold": 100},
        monitoring={"interval": len(tasks[0].labels)},
    )


async def _stream(
    learner: AsyncLearner,
    contestant: Contestant,
    tasks: list[DigitTask],
    on_progress: Callable[[Contestant, BatchResult], None],
) -> None:
    async with learner.stream("demo", on_result=lambda result: on_progress(contestant, result)) as stream:
        for task in tasks:
            await stream.send_many(task.features, task.labels, task=task.name, examples_per_message=_EXAMPLES_A_MESSAGE)


async def _outcome(learner: AsyncLearner, contestant: Contestant, tasks: int) -> Outcome:
    info = await learner.refresh()
    samples = await learner.plasticity(history=tasks)
    return Outcome(contestant, info.progress.tasks, tuple(samples), info.progress.replacements)
