"""Batches learnt: in rows and slices, so that every learner has its turn and predictions are answered between steps."""

import time
from collections.abc import Callable, Sequence
from typing import cast

import structlog
import torch

from cbp import CbpError, DivergenceError, EngineName, LearnerProgress, TrainResult
from cbp_server.engine import messages, training
from cbp_server.engine.hosted_learner import HostedLearner, check_order, check_sequence
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.outbox import Outbox
from cbp_server.engine.roster import Roster
from cbp_server.engine.trainability import TrainabilityTests
from cbp_server.engine.training import StopTrainingError, TrainingJob
from cbp_server.errors import BatchNotLearnt, NotInEngine, ServerDraining
from cbp_server.records.samples import PackedSample

#: Seconds between two full progress reports of a learner that has more batches waiting.
_PROGRESS_INTERVAL = 0.25
#: Seconds after which a learner begins no other batch in its turn, and batches of a turn at most.
_LONGEST_TURN = 2e-3
_LONGEST_ROW = 16
#: Learners that share a call of the stacked engine at most.
_LARGEST_GROUP = 1024
#: Learners of a call of compiled code that one thread goes through, one after another; others wait meanwhile.
_SHARES_OF_A_THREAD = 4

log = structlog.get_logger("cbp_server.engine")


class Learning:
    """Takes batches from the inbox and answers what came of them.

    Args:
        predict: answers one waiting prediction, between two steps.
    """

    def __init__(
        self,
        roster: Roster,
        inbox: Inbox,
        outbox: Outbox,
        tests: TrainabilityTests,
        predict: Callable[[messages.Call], None],
    ) -> None:
        self._roster = roster
        self._inbox = inbox
        self._outbox = outbox
        self._tests = tests
        self._predict = predict
        self._begun: dict[str, TrainingJob] = {}  # by learner: batches between two slices
        self._loners: set[str] = set()  # learners that a call failed with which they shared
        self._learn_until = 0.0  # monotonic; predictions have had their share up to then

    def train(self, first: messages.Call) -> None:
        """Learns a batch, or the next part of one; what goes with it makes the turn worth its while."""
        company = self._company(first)
        if company or not self._fits_one_slice(first):
            self._train_in_slices([first, *company])
        else:
            self._train_in_a_row([first, *self._inbox.take_batches_behind(first, _LONGEST_ROW - 1)])

    def abort(self) -> None:
        """Gives up what has not been learnt; it is done once the batches under way have come to their next step."""
        for call in self._inbox.take_dropped():
            self._outbox.fail(call, ServerDraining())
        # Batches between two slices come up again by themselves, and are given up at the end of one more slice.

    def _fits_one_slice(self, call: messages.Call) -> bool:
        request = cast(messages.Train, call.request)
        hosted = self._roster.find(request.learner)
        return hosted is not None and request.learner not in self._begun and hosted.pace.fits_one_slice(request.batch)

    def _train_in_a_row(self, calls: Sequence[messages.Call]) -> None:
        """Learns batches of one learner, as many as its turn has time for.

        They are checked before, and accounted for afterwards, all in one go: between two batches every line of code
        costs several times what it costs in a loop, since the processor has forgotten it.
        """
        hosted = self._roster.get(calls[0].request.learner)
        row, refusal = self._checked(hosted, calls)
        if row and (len(row) > 1 or hosted.pace.takes_long(len(row[0].batch))):
            self._outbox.flush()
        results: list[TrainResult] = []
        failure: Exception | None = None
        started = time.perf_counter()
        ends = started + _LONGEST_TURN
        try:
            training.run_row(
                hosted.learner,
                [request.batch for request in row],
                results,
                return_outputs=[request.return_outputs for request in row],
                between_steps=self._between_steps,
                is_over=lambda: self._inbox.has_predictions or time.perf_counter() > ends,
            )
        except Exception as error:
            failure = error
        self._outbox.count(time.perf_counter() - started, sum(result.steps for result in results))
        learnt = len(results)
        if learnt < len(row):
            refusal = None  # of a batch that has not had its turn
        ended_at_one = failure is not None or refusal is not None
        self._inbox.give_back(calls[learnt + ended_at_one :])
        self._report_row(hosted, calls, row, results)
        if failure is not None:
            self._take_failure(hosted, calls[learnt], failure)
        elif refusal is not None:
            self._outbox.fail(calls[learnt], refusal)

    def _checked(
        self, hosted: HostedLearner, calls: Sequence[messages.Call]
    ) -> tuple[list[messages.Train], CbpError | None]:
        """The batches that may be learnt one after another, and why the one behind them may not, if there is one that
        may never be."""
        row: list[messages.Train] = []
        position = hosted.journal_position
        sequences: dict[str, int] = {}
        for call in calls:
            request = cast(messages.Train, call.request)
            producer = request.producer
            if producer not in sequences:
                sequences[producer] = hosted.sequence_of(producer)
            try:
                check_order(position, request.journal_position - request.journaled)
                check_sequence(sequences[producer], request)
            except CbpError as refusal:
                return row, refusal
            if not hosted.pace.fits_one_slice(request.batch):
                break
            row.append(request)
            position = request.journal_position
            sequences[producer] = request.sequence
        return row, None

    def _report_row(
        self,
        hosted: HostedLearner,
        calls: Sequence[messages.Call],
        row: Sequence[messages.Train],
        results: Sequence[TrainResult],
    ) -> None:
        newest = len(results) - 1
        for index, (call, request, result) in enumerate(zip(calls, row, results, strict=False)):
            hosted.advance(request)
            samples = hosted.stamp(hosted.learner.take_samples()) if index == newest else ()
            if not call.quiet:
                progress = self._due_progress(request.learner, hosted) if index == newest else None
                self._report(call, result, samples, progress)
        if results:
            self._test_if_due(hosted, results[-1])

    def _take_failure(self, hosted: HostedLearner, call: messages.Call, failure: Exception) -> None:
        if isinstance(failure, StopTrainingError):
            self._give_up(hosted, call)
        else:
            self._lose([call], failure)

    def _give_up(self, hosted: HostedLearner, call: messages.Call) -> None:
        """The batch counts as applied: what is left of it waits in the learner, and is in its last checkpoint."""
        hosted.advance(cast(messages.Train, call.request))
        self._outbox.fail(call, ServerDraining())

    def _train_in_slices(self, calls: Sequence[messages.Call]) -> None:
        """Learns the next part of each batch, of different learners, in as few engine calls as possible; answers those
        that are finished."""
        under_way: list[tuple[messages.Call, TrainingJob]] = []
        for call in calls:
            try:
                under_way.append((call, self._job(cast(messages.Train, call.request))))
            except CbpError as error:  # nothing has changed
                self._outbox.fail(call, error)
        if not under_way:
            return
        jobs = [job for _, job in under_way]
        if not all(job.is_short for job in jobs):
            self._outbox.flush()
        steps_before = sum(job.steps for job in jobs)
        started = time.perf_counter()
        try:
            stopped = self._run_or_give_up(jobs)
        except Exception as error:
            self._lose([call for call, _ in under_way], error)
            return
        self._outbox.count(time.perf_counter() - started, sum(job.steps for job in jobs) - steps_before)
        for call, job in under_way:
            self._settle(call, job, stopped=stopped)

    def _company(self, first: messages.Call) -> list[messages.Call]:
        """Batches of other learners that gain from sharing a call with this one."""
        engine = self._shared_engine(first.request.learner)
        if engine == "stacked":
            most = _LARGEST_GROUP - 1
        elif engine == "compiled" and torch.get_num_threads() > 1:
            most = _SHARES_OF_A_THREAD * torch.get_num_threads() - 1
        else:
            return []
        return self._inbox.take_company(first, lambda uid: self._shared_engine(uid) == engine, most)

    def _shared_engine(self, uid: str) -> EngineName | None:
        """The engine whose calls the learner may share with others."""
        hosted = self._roster.find(uid)
        return None if hosted is None or uid in self._loners else hosted.learner.engine

    def _job(self, request: messages.Train) -> TrainingJob:
        job = self._begun.pop(request.learner, None)
        if job is None:
            hosted = self._roster.get(request.learner)
            check_order(hosted.journal_position, request.journal_position - request.journaled)
            check_sequence(hosted.sequence_of(request.producer), request)
            job = TrainingJob(hosted.learner, request.batch, hosted.pace, return_outputs=request.return_outputs)
        return job

    def _lose(self, calls: Sequence[messages.Call], error: Exception) -> None:
        """Some of the batches' steps may have been made. The only whole states left are in the checkpoints."""
        for call in calls:
            request = cast(messages.Train, call.request)
            self._roster.drop(request.learner)
            if len(calls) == 1:
                self._outbox.fail(call, _not_learnt(error, request))
            else:  # whose batch it was shows when each is learnt again, alone
                self._loners.add(request.learner)
                self._outbox.fail(call, NotInEngine())
        if len(calls) > 1:
            log.exception("training failed half-way", learners=len(calls), exc_info=error)

    def _settle(self, call: messages.Call, job: TrainingJob, *, stopped: bool) -> None:
        request = cast(messages.Train, call.request)
        if job.failure is not None:
            self._lose([call], job.failure)
        elif stopped:
            self._give_up(self._roster.get(request.learner), call)
        elif job.finished:
            self._finish(call, request, job)
        else:
            self._begun[request.learner] = job
            self._inbox.put_back(call)

    def _run_or_give_up(self, jobs: Sequence[TrainingJob]) -> bool:
        """Whether the batches were given up."""
        try:
            self._run(jobs)
        except StopTrainingError:
            for job in jobs:
                job.give_up()
            return True
        return False

    def _run(self, jobs: Sequence[TrainingJob]) -> None:
        """Goes on with the batches until one of them is finished or somebody else wants a turn."""
        while True:
            training.run_slices(jobs, between_steps=self._between_steps)
            if any(job.finished or job.failure for job in jobs) or self._inbox.has_turns():
                break
            self._answer_predictions()
            self._outbox.flush_due()
        if self._inbox.aborting and not all(job.finished for job in jobs):
            raise StopTrainingError

    def _finish(self, call: messages.Call, request: messages.Train, job: TrainingJob) -> None:
        hosted = self._roster.get(request.learner)
        hosted.advance(request)
        samples = hosted.stamp(hosted.learner.take_samples())
        result = job.result()
        if not call.quiet:
            self._report(call, result, samples, self._due_progress(request.learner, hosted))
        self._test_if_due(hosted, result)

    def _test_if_due(self, hosted: HostedLearner, result: TrainResult) -> None:
        """Has a copy of the learner tested, if enough steps have passed; and whoever is next, if a test has ended."""
        if hosted.begins_test(_last_step(result)):
            self._tests.add(hosted)
        self._tests.start_next()

    def _report(
        self,
        call: messages.Call,
        result: TrainResult,
        samples: tuple[PackedSample, ...],
        progress: LearnerProgress | None,
    ) -> None:
        report = messages.TrainReport(result=result, step=_last_step(result), samples=samples, progress=progress)
        self._outbox.hold(messages.Answer(call.number, value=report))

    def _due_progress(self, uid: str, hosted: HostedLearner) -> LearnerProgress | None:
        now = time.monotonic()
        if now - hosted.reported_at < _PROGRESS_INTERVAL and self._inbox.has_training(uid):
            return None
        hosted.reported_at = now
        return hosted.learner.progress

    def _between_steps(self) -> None:
        if self._inbox.aborting:
            raise StopTrainingError
        self._outbox.flush_due()
        self._answer_predictions()

    def _answer_predictions(self) -> None:
        """Answers one waiting prediction, unless predictions have just had as much time as is now learning's due."""
        started = time.monotonic()
        if started < self._learn_until or (call := self._inbox.take_prediction()) is None:
            return
        self._predict(call)
        ended = time.monotonic()
        self._learn_until = ended + (ended - started)


def _last_step(result: TrainResult) -> int:
    """The learner's step after the batch."""
    return result.first_step + result.steps - 1


def _not_learnt(error: Exception, request: messages.Train) -> BatchNotLearnt:
    """Why the batch could not be learnt, in words for an operator."""
    diverged = isinstance(error, DivergenceError)
    if not diverged:
        log.exception("training failed half-way", learner=request.learner, exc_info=error)
    reason = str(error) if isinstance(error, CbpError) else f"{type(error).__name__}: {error}"
    return BatchNotLearnt(request.journal_position, request.producer, request.sequence, reason, diverged=diverged)
