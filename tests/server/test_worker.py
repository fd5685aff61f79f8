"""The engine's work on shared calls that fail in a way nobody foresaw."""

import threading

import numpy as np
import pytest
import torch

from cbp import Batch, Learner, LearnerSpec, train_together
from cbp_server.engine import messages, training
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.worker import EngineWorker
from cbp_server.errors import BatchNotLearnt, EngineFault, NotInEngine

SPEC = LearnerSpec.parse(
    {
        "network": {"kind": "mlp", "in_features": 3, "hidden": [4], "out_features": 2},
        "loss": "mse",
        "optimizer": {"kind": "sgd", "lr": 0.01},
    }
)


class Front:
    """Asks the worker and waits for its answers."""

    def __init__(self, tmp_path):
        self._inbox = Inbox(group_wait=0.3)  # so that what is asked at once goes together
        self._answers = {}
        self._answered = threading.Condition()
        self.steps = 0
        options = messages.EngineOptions(str(tmp_path), "cpu", "stacked", 1, 0.0, "info", "json")
        self._worker = EngineWorker(options, self._inbox, self._take)
        self._thread = threading.Thread(target=self._worker.run)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._inbox.close()
        self._thread.join(30.0)

    def _take(self, news):
        with self._answered:
            self._answers |= {answer.number: answer for answer in news.answers}
            self.steps += news.steps
            self._answered.notify()

    def ask(self, *requests, quiet=()):
        """All at once; their answers, but those of `quiet`, which come before: what they are answered is in `heard`."""
        numbers = [id(request) for request in requests]
        self._inbox.put(*(messages.Call(id(request), request, quiet=True) for request in quiet))
        for number, request in zip(numbers, requests, strict=True):
            self._inbox.put(messages.Call(number, request))
        if not self._thread.is_alive():
            self._thread.start()
        with self._answered:
            assert self._answered.wait_for(lambda: all(number in self._answers for number in numbers), 30.0)
            self.heard = [self._answers.get(id(request)) for request in quiet]
            return [self._answers.pop(number) for number in numbers]


def train(uid, value, sequence=1):
    features = np.full((5, 3), value, np.float32)
    batch = Batch.validate(SPEC, features, np.zeros((5, 2), np.float32))
    return messages.Train(uid, sequence, "web", 1, sequence, "hash", batch, return_outputs=False)


def watch_engine_calls(monkeypatch, watcher):
    """Calls `watcher` with the pairs of learner and batch of each call, before it is made."""

    def together(pairs, **options):
        watcher(pairs)
        return train_together(pairs, **options)

    def alone(learner, batch, **options):
        watcher([(learner, batch)])
        return learn(learner, batch, **options)

    learn = Learner.train
    monkeypatch.setattr(training, "train_together", together)
    monkeypatch.setattr(Learner, "train", alone)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["stacked", "compiled"])
@pytest.mark.usefixtures("two_threads")
def test_learners_of_one_engine_share_calls(tmp_path, monkeypatch, engine):
    companies = []

    watch_engine_calls(
        monkeypatch, lambda pairs: companies.append({learner.engine for learner, _ in pairs} | {len(pairs)})
    )
    with Front(tmp_path) as front:
        front.ask(*(messages.Create(uid, SPEC, engine) for uid in "ab"), messages.Create("c", SPEC, "torch"))
        answers = front.ask(train("a", 1.0), train("c", 2.0), train("b", 3.0))
    assert [answer.value.result.steps for answer in answers] == [5, 5, 5]
    assert companies == [{engine, 2}, {"torch", 1}]


def test_after_a_failure_in_company_each_learns_alone(tmp_path, monkeypatch):
    companies = []

    def fail_for_the_unlucky(pairs):
        companies.append(len(pairs))
        if any(batch.features[0, 0] == 13.0 for _, batch in pairs):
            raise RuntimeError("unforeseen")

    watch_engine_calls(monkeypatch, fail_for_the_unlucky)
    with Front(tmp_path) as front:
        created = front.ask(messages.Create("a", SPEC, "stacked"), messages.Create("b", SPEC, "stacked"))
        assert [answer.error for answer in created] == [None, None]
        failed = front.ask(train("a", 1.0), train("b", 13.0))
        assert [type(answer.error) for answer in failed] == [NotInEngine, NotInEngine]

        front.ask(messages.Create("a", SPEC, "stacked"), messages.Create("b", SPEC, "stacked"))
        lucky, unlucky = front.ask(train("a", 1.0), train("b", 13.0))
    assert lucky.value.result.steps == 5
    assert isinstance(unlucky.error, BatchNotLearnt)
    assert not unlucky.error.diverged
    assert companies == [2, 1, 1]


def test_results_carry_outputs_only_where_they_are_wanted(tmp_path):
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "stacked"), messages.Create("b", SPEC, "stacked"))
        wanting = messages.Train(**vars(train("a", 1.0)) | {"return_outputs": True})
        with_outputs, without = front.ask(wanting, train("b", 1.0))
    assert with_outputs.value.result.outputs.shape == (5, 2)
    assert without.value.result.outputs is None


def test_quiet_calls_are_answered_only_if_they_fail(tmp_path):
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "torch"))
        [last] = front.ask(train("a", 1.0, 3), quiet=[train("a", 1.0, 1), train("a", 1.0, 2), train("a", 1.0, 2)])
        first, second, repeated = front.heard
        assert first is second is None
        assert isinstance(repeated.error, EngineFault)
        assert last.value.step == 15
        assert front.steps == 15


def test_results_do_not_wait_for_what_comes_behind_them(tmp_path, monkeypatch):
    sent, at_hand = [], []
    inbox = Inbox()
    options = messages.EngineOptions(str(tmp_path), "cpu", "torch", 1, 0.0, "info", "json")
    worker = EngineWorker(options, inbox, sent.append)
    monkeypatch.setattr(worker, "_engine_at_hand", lambda name: at_hand.append(len(sent)) or name)
    requests = [messages.Create("a", SPEC, "torch"), train("a", 1.0), messages.Create("a", SPEC, "torch")]
    inbox.put(*(messages.Call(number, request) for number, request in enumerate(requests)))
    thread = threading.Thread(target=worker.run)
    thread.start()
    while sum(len(news.answers) for news in sent) < 3 and thread.is_alive():
        thread.join(0.01)
    inbox.close()
    thread.join(30.0)
    assert at_hand == [0, 2]


def test_an_engine_that_the_device_lacks_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("cbp_server.engine.worker._resolve_device", lambda _: "cuda")
    options = messages.EngineOptions(str(tmp_path), "auto", "compiled", 1, 0.0, "info", "json")
    with pytest.raises(SystemExit, match="--engine compiled runs on the CPU, not on cuda"):
        EngineWorker(options, Inbox(), lambda _: None)
