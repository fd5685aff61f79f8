"""How much better, or worse, a learner learns something new than it did at its beginning.

This is the direct measure of plasticity: the loss that a network reaches on a random task within a given number of
steps (Lyle et al. 2023, "Understanding plasticity in neural networks"). Here it is held against the loss of the network
with which the learner began, so that tasks of different difficulty can be compared.

Shapes: n examples of the task, C outputs.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from cbp import losses
from cbp.engines.names import EngineChoice
from cbp.errors import DivergenceError
from cbp.examples.batches import Batch
from cbp.learner import Learner
from cbp.plasticity.samples import Trainability
from cbp.serialization import LearnerSnapshot, take_tensor
from cbp.spec.learner_spec import LearnerSpec

TASK_EXAMPLES = 128
"""Examples of the task at most: the newest of the probe."""
LEAST_TASK_EXAMPLES = 32
"""With fewer in the probe there is no test: what becomes of so few labels is chance."""
PASSES = 20
"""Times that each network goes through the task."""
_MESSAGE_STEP = 16
"""Examples in a step, where a learner takes whatever a message has."""


def measure_trainability(
    snapshot: LearnerSnapshot,
    *,
    engine: EngineChoice = "torch",
    between_steps: Callable[[], None] | None = None,
) -> Trainability | None:
    """Teaches a copy of the learner, and the newborn that it once was, the same fresh task; see `Trainability.score`.

    The task: the newest 32 to 128 examples of the snapshot's probe, with targets drawn anew, which depend on the
    learner's seed and step alone: labels as evenly spread as can be, bits for binary cross entropy, normal numbers with
    each output's own mean and spread for regression. Both networks go through it 20 times, in steps of the learner's
    size (16 examples where messages decide), with its optimizer and resets; the copy also has the optimizer's state and
    the units' ages that the learner has. That is at most 5,120 examples to learn from, on the CPU.

    `between_steps` is called as by `Learner.train`; an exception from it ends the test. None if the probe holds too few
    examples. Raises `SnapshotError` if the snapshot cannot be restored.
    """
    spec = snapshot.read_spec()
    shape = (None, *spec.network.input_shape)
    seen: NDArray[np.float32] = take_tensor(snapshot.tensors, "probe.features", shape, torch.float32).numpy()
    count = min(len(seen), TASK_EXAMPLES)
    if count < LEAST_TASK_EXAMPLES:
        return None
    step_size = min(spec.batch_size or _MESSAGE_STEP, count)
    spec = spec.model_copy(
        update={"batch_size": step_size, "monitoring": spec.monitoring.model_copy(update={"interval": 0})}
    )
    count -= count % step_size
    copy = Learner.restore(_of_nobodys_stream(snapshot, spec), engine=engine)
    step = copy.progress.step
    task = Batch(
        features=seen[-count:].copy(), targets=_fresh_targets(snapshot, spec, step, count), weights=None, task=""
    )
    return Trainability(
        step=step,
        loss=_loss_after(copy, task, between_steps),
        fresh_loss=_loss_after(Learner(spec, engine=engine), task, between_steps),
        chance_loss=_chance_loss(spec, task),
    )


def _of_nobodys_stream(snapshot: LearnerSnapshot, spec: LearnerSpec) -> LearnerSnapshot:
    """With that specification, and without the examples that wait for their step."""
    waiting = {
        name: tensor[:0] for name, tensor in snapshot.tensors.items() if name.startswith("pending.") and tensor.dim()
    }
    metadata = snapshot.metadata | {"spec": spec.to_plain(), "pending_tasks": []}
    return replace(snapshot, tensors=snapshot.tensors | waiting, metadata=metadata)


def _fresh_targets(
    snapshot: LearnerSnapshot, spec: LearnerSpec, step: int, count: int
) -> NDArray[np.int64] | NDArray[np.float32]:
    random = np.random.default_rng([spec.seed, step])
    outputs = spec.network.out_features
    match spec.loss.kind:
        case "cross_entropy":
            return random.permutation(np.arange(count) % outputs)
        case "binary_cross_entropy":
            return random.integers(0, 2, (count, outputs)).astype(np.float32)
        case "mse" | "huber":
            known = take_tensor(snapshot.tensors, "probe.targets", (None, outputs), torch.float32).numpy()
            return random.normal(known.mean(axis=0), known.std(axis=0), (count, outputs)).astype(np.float32)


def _loss_after(learner: Learner, task: Batch, between_steps: Callable[[], None] | None) -> float | None:
    """Mean over the last pass, each example predicted before its update; None if the learner diverges."""
    loss = None
    try:
        for _ in range(PASSES):
            loss = learner.train(task, between_steps=between_steps).loss
            if between_steps is not None:
                between_steps()
    except DivergenceError:
        return None
    return loss


def _chance_loss(spec: LearnerSpec, task: Batch) -> float:
    """Of the constant outputs that fit the task's targets best, for huber about."""
    outputs = spec.network.out_features
    targets = losses.encode_targets(spec.loss, torch.from_numpy(task.targets), outputs)
    mean = targets.mean(dim=0)
    match spec.loss.kind:
        case "cross_entropy":
            constant = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        case "binary_cross_entropy":
            constant = mean.logit(eps=torch.finfo(mean.dtype).eps)
        case "mse" | "huber":
            constant = mean
    return float(losses.example_losses(spec.loss, constant.expand_as(targets), targets).mean())
