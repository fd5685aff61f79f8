"""Training many learners in one call."""

from collections.abc import Callable, Sequence

from cbp.engines.choice import run_together
from cbp.errors import CbpError, DivergenceError
from cbp.examples.batches import Batch
from cbp.learner import Learner, Training
from cbp.results import TrainResult


def train_together(
    pairs: Sequence[tuple[Learner, Batch]],
    *,
    return_outputs: bool = False,
    between_steps: Callable[[], None] | None = None,
) -> list[TrainResult | DivergenceError]:
    """What `learner.train(batch)` would have done for each pair, in as few engine calls as possible; results in order.

    Learners of engine "stacked" step together, up to a fixed number at a time, if they have the device, network, loss,
    size of step, kind of optimizer and utility in common, and all of them or none use momentum, Nesterov's, weight
    decay, clipping, and resets in part. Those of engine "compiled" are divided among as many threads as torch may use;
    others take turns. Company changes nothing: results and learners are, bit for bit, those of any other grouping.

    A learner that diverges has its `DivergenceError` in place of a result; the others' stand. `between_steps` is
    called after every few steps, as in `Learner.train`, once for all learners. An exception from it stops training
    there: the steps taken are accounted for, and the examples not yet applied wait; if some learner has diverged by
    then, its `DivergenceError` is raised, with the exception as its cause.

    Raises `CbpError` if a learner occurs twice, `BatchError` if a batch does not fit its learner; nothing has changed
    then.
    """
    if len({id(learner) for learner, _ in pairs}) < len(pairs):
        raise CbpError("pairs: A learner occurs twice; join its batches, or train it in two calls")
    begun = [(learner, learner._begin(batch)) for learner, batch in pairs]
    for learner, training in begun:
        learner._start(training)
    try:
        _take_steps(begun, between_steps)
    except BaseException as interruption:
        for result in _finish(begun, return_outputs=False):
            if isinstance(result, DivergenceError):
                raise result from interruption
        raise
    return _finish(begun, return_outputs)


def _take_steps(begun: Sequence[tuple[Learner, Training]], between_steps: Callable[[], None] | None) -> None:
    going = [(learner, training) for learner, training in begun if learner._has_steps_left(training)]
    while going:
        watched = 0 if between_steps is None else len(going)
        run_together([(training.work, learner._next_steps(training, watched)) for learner, training in going])
        for learner, training in going:
            learner._after_steps(training, between_steps)
        going = [(learner, training) for learner, training in going if learner._has_steps_left(training)]
        if between_steps is not None and going:
            between_steps()


def _finish(begun: Sequence[tuple[Learner, Training]], return_outputs: bool) -> list[TrainResult | DivergenceError]:
    results: list[TrainResult | DivergenceError] = []
    for learner, training in begun:
        try:
            results.append(learner._finish(training, return_outputs))
        except DivergenceError as divergence:
            results.append(divergence)
    return results
