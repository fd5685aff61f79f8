"""Carries out requests from the front, one at a time, on the learners of one device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cbp_server.engine import messages
from cbp_server.engine.hosted_learner import HostedLearner, check_order, check_sequence
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.learning import Learning
from cbp_server.engine.outbox import Outbox
from cbp_server.engine.preparation import Preparation
from cbp_server.engine.roster import Roster
from cbp_server.engine.saving import Saving
from cbp_server.engine.trainability import TrainabilityTests
from cbp_server.records.samples import PackedSample
from cbp_server.store.checkpoints import CheckpointFiles


class EngineWorker:
    """Hands each request to whom it concerns, in the order in which the inbox gives them out.

    Args:
        send: takes what there is to say; called from more than one thread, one call at a time.
    """

    def __init__(self, options: messages.EngineOptions, inbox: Inbox, send: Callable[[messages.Answers], None]) -> None:
        self._device = _resolve_device(options.device)
        self._preparation = _preparation(options.engine, self._device)
        files = CheckpointFiles(options.checkpoint_url)
        self._inbox = inbox
        self._outbox = Outbox(send)
        self._roster = Roster(self._device, self._preparation, files)
        self._tests = TrainabilityTests()
        self._learning = Learning(self._roster, inbox, self._outbox, self._tests, self._carry_out)
        self._saving = Saving(self._roster, self._outbox, files)

    @property
    def ready(self) -> messages.EngineReady:
        return messages.EngineReady(self._device, self._preparation.compiled)

    def run(self) -> None:
        """Carries out requests until the inbox closes, then finishes the checkpoints under way."""
        while True:
            if self._inbox.would_wait:
                self._outbox.flush()
            if (call := self._inbox.take()) is None:
                break
            self._carry_out(call)
        self._tests.close()
        self._saving.close()

    def _carry_out(self, call: messages.Call) -> None:
        if not isinstance(call.request, messages.Train):  # it may take long, as making a learner does
            self._outbox.flush()
        match call.request:
            case messages.Predict() as request:
                self._outbox.reply(call, partial(self._predict, request))
            case messages.Train():
                self._learning.train(call)
            case messages.AbortTraining():
                self._outbox.reply(call, self._learning.abort)
            case messages.Sample() as request:
                self._outbox.reply(call, partial(self._sample, request))
            case messages.Change() as request:
                self._outbox.reply(call, partial(self._change, request))
            case messages.Checkpoint() as request:
                self._saving.checkpoint(call, request)
            case messages.Export() as request:
                self._saving.export(call, request)
            case messages.Prepare():
                self._preparation.when_finished(partial(self._prepared, call))
            case messages.Request() as request:
                self._outbox.reply(call, partial(self._roster.administer, request))

    def _predict(self, request: messages.Predict) -> messages.PredictReport:
        learner = self._roster.get(request.learner).learner
        return messages.PredictReport(learner.predict(request.features), learner.progress.step)

    def _sample(self, request: messages.Sample) -> PackedSample:
        hosted = self._roster.get(request.learner)
        return hosted.stamp([hosted.learner.sample_plasticity()])[0]

    def _change(self, request: messages.Change[Any]) -> object:
        """Applies an entry of the journal other than a batch; one that the learner refuses has no effect."""
        hosted = self._roster.get(request.learner)
        check_order(hosted.journal_position, request.journal_position - 1)
        try:
            return self._applied_change(hosted, request)
        finally:
            hosted.applied(request)

    def _applied_change(self, hosted: HostedLearner, request: messages.Change[Any]) -> object:
        match request:
            case messages.OpenProducer():
                producer = hosted.producer(request.producer)
                producer.epoch, producer.stream_id = request.epoch, request.stream_id
            case messages.ForgetProducer():
                hosted.forget(request.producer)
            case messages.Update():
                hosted.revise(request.spec, request.update_time)
            case messages.ResetUnits():
                counts = hosted.learner.reset_units(request.layers, request.fraction)
                return messages.ResetReport(counts, hosted.learner.progress)
            case messages.Skip():
                check_sequence(hosted.sequence_of(request.producer), request)
                hosted.advance(request)
            case messages.SwitchEngine():
                hosted.learner.switch_engine(self._roster.engine_at_hand(request.engine))
            case messages.Pass():
                pass
            case _:
                raise TypeError(f"the engine knows no change {type(request).__name__}")
        return None

    def _prepared(self, call: messages.Call, compiled: bool) -> None:
        self._outbox.put(messages.Answer(call.number, value=messages.PrepareReport(compiled)))


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("cbp-server: --device cuda, but torch sees no CUDA device; use --device auto or cpu")
    return device


def _preparation(engine: str, device: str) -> Preparation:
    preparation = Preparation()
    if engine == "compiled" and device != "cpu":
        raise SystemExit(f"cbp-server: --engine compiled runs on the CPU, not on {device}; use --engine auto")
    if device == "cpu" and engine in ("auto", "compiled"):
        preparation.begin(at_once=engine == "compiled")
    else:
        preparation.skip()
    return preparation
