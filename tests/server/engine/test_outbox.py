"""Answers go together where they come fast, and none is forgotten."""

import time

from cbp_server.engine.messages import Answer
from cbp_server.engine.outbox import Outbox


def numbers(sent):
    return [[answer.number for answer in news.answers] for news in sent]


def test_answers_held_go_together():
    sent = []
    outbox = Outbox(sent.append)
    for number in range(3):
        outbox.hold(Answer(number))
    assert sent == []
    outbox.flush()
    outbox.flush()
    assert numbers(sent) == [[0, 1, 2]]


def test_no_more_are_held_than_go_together():
    sent = []
    outbox = Outbox(sent.append)
    for number in range(20):
        outbox.hold(Answer(number))
    assert numbers(sent) == [list(range(16))]


def test_what_cannot_wait_goes_behind_what_is_held():
    sent = []
    outbox = Outbox(sent.append)
    outbox.hold(Answer(1))
    outbox.put(Answer(2))
    assert numbers(sent) == [[1, 2]]


def test_only_what_has_been_held_for_long_is_due(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sent = []
    outbox = Outbox(sent.append)
    outbox.hold(Answer(1))
    now += 0.0005
    outbox.flush_due()
    assert sent == []
    now += 0.001
    outbox.flush_due()
    assert numbers(sent) == [[1]]


def test_work_is_told_once():
    sent = []
    outbox = Outbox(sent.append)
    outbox.count(0.5, 10)
    outbox.count(0.25, 5)
    outbox.put(Answer(1))
    outbox.put(Answer(2))
    assert [(news.train_seconds, news.steps) for news in sent] == [(0.75, 15), (0.0, 0)]
