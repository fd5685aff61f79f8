"""The engine's work on shared calls that fail in a way nobody foresaw."""

import threading

import numpy as np
import pytest
import torch

from cbp import Batch, Learner, LearnerSpec, train_together
from cbp_server.engine import learning, messages, training
from cbp_server.engine.inbox import Inbox
from cbp_server.engine.worker import EngineWorker
from cbp_server.errors import BatchNotLearnt, EngineFault, NotInEngine, SequenceGap, ServerDraining

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
        self.order = []  # of the last answers' numbers
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
            self.order += [answer.number for answer in news.answers]
            self.steps += news.steps
            self._answered.notify()

    def tell(self, request):
        """Without waiting for the answer."""
        self._inbox.put(messages.Call(id(request), request))

    def ask(self, *requests, quiet=()):
        """All at once; their answers, but those of `quiet`, which come before: what they are answered is in `heard`."""
        numbers = [id(request) for request in requests]
        self.order.clear()
        self._inbox.put(*(messages.Call(id(request), request, quiet=True) for request in quiet))
        for number, request in zip(numbers, requests, strict=True):
            self._inbox.put(messages.Call(number, request))
        if not self._thread.is_alive():
            self._thread.start()
        with self._answered:
            assert self._answered.wait_for(lambda: all(number in self._answers for number in numbers), 30.0)
            self.heard = [self._answers.get(id(request)) for request in quiet]
            return [self._answers.pop(number) for number in numbers]


def train(uid, value, sequence=1, *, sequence_sent=None):
    features = np.full((5, 3), value, np.float32)
    batch = Batch.validate(SPEC, features, np.zeros((5, 2), np.float32))
    return messages.Train(uid, sequence, "web", 1, sequence_sent or sequence, "hash", batch, return_outputs=False)


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


@pytest.mark.parametrize(("longest_turn", "order"), [(60.0, "aaabbb"), (0.0, "ababab")])
def test_a_learner_goes_on_with_its_next_batches_while_its_turn_lasts(tmp_path, monkeypatch, longest_turn, order):
    monkeypatch.setattr(learning, "_LONGEST_TURN", longest_turn)
    learnt = []
    watch_engine_calls(monkeypatch, lambda pairs: learnt.append(" ab"[int(pairs[0][1].features[0, 0])]))
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "torch"), messages.Create("b", SPEC, "torch"))
        batches = [train(uid, value, sequence) for uid, value in (("a", 1.0), ("b", 2.0)) for sequence in (1, 2, 3)]
        answers = front.ask(*batches)
        assert "".join(learnt) == order
        assert [answer.value.step for answer in answers] == [5, 10, 15, 5, 10, 15]
        alone = Learner(SPEC, engine="torch")
        losses = [alone.train(batch.batch).loss for batch in batches[:3]]
        assert [answer.value.result.loss for answer in answers[:3]] == losses
        assert [answers[index].value.progress.step for index in (2, 5)] == [15, 15]
        [described] = front.ask(messages.Describe("b"))
    position = described.value.positions["web"]
    assert (described.value.journal_position, position.sequence, len(position.hashes)) == (3, 3, 3)
    assert front.steps == 30


def test_a_batch_that_fails_behind_others_takes_nothing_from_them(tmp_path, monkeypatch):
    def fail_for_the_unlucky(pairs):
        if pairs[0][1].features[0, 0] == 13.0:
            raise RuntimeError("unforeseen")

    watch_engine_calls(monkeypatch, fail_for_the_unlucky)
    monkeypatch.setattr(learning, "_LONGEST_TURN", 60.0)
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "torch"))
        good, unlucky, behind = front.ask(train("a", 1.0, 1), train("a", 13.0, 2), train("a", 1.0, 3))
    assert good.value.step == 5
    assert isinstance(unlucky.error, BatchNotLearnt)
    assert unlucky.error.sequence == 2
    assert isinstance(behind.error, NotInEngine)
    assert front.order == [good.number, unlucky.number, behind.number]


def test_a_batch_out_of_order_behind_others_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "_LONGEST_TURN", 60.0)
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "torch"))
        first, gap, second = front.ask(train("a", 1.0, 1), train("a", 1.0, 2, sequence_sent=7), train("a", 1.0, 2))
    assert first.value.step == 5
    assert isinstance(gap.error, SequenceGap)
    assert second.value.step == 10


def test_giving_up_ends_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "_LONGEST_TURN", 60.0)
    abort = messages.AbortTraining()

    def give_up_at_the_second(pairs):
        if pairs[0][1].features[0, 0] == 2.0:
            front.tell(abort)

    watch_engine_calls(monkeypatch, give_up_at_the_second)
    with Front(tmp_path) as front:
        front.ask(messages.Create("a", SPEC, "torch"))
        first, second, third = front.ask(*(train("a", float(number), number) for number in (1, 2, 3)))
        [described] = front.ask(messages.Describe("a"))
    assert first.value.step == 5
    assert isinstance(second.error, ServerDraining)
    assert isinstance(third.error, ServerDraining)
    assert described.value.journal_position == 2
    assert described.value.progress.step + described.value.progress.pending == 10


def test_results_do_not_wait_for_what_comes_behind_them(tmp_path, monkeypatch):
    sent, at_hand = [], []
    inbox = Inbox()
    options = messages.EngineOptions(str(tmp_path), "cpu", "torch", 1, 0.0, "info", "json")
    engine = EngineWorker(options, inbox, sent.append)
    monkeypatch.setattr(engine._roster, "engine_at_hand", lambda name: at_hand.append(len(sent)) or name)
    requests = [messages.Create("a", SPEC, "torch"), train("a", 1.0), messages.Create("a", SPEC, "torch")]
    inbox.put(*(messages.Call(number, request) for number, request in enumerate(requests)))
    thread = threading.Thread(target=engine.run)
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
