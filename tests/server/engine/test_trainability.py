"""Tests of trainability beside training: who is tested when, and that nobody else notices."""

import gc
import logging
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from server_process import wait_until

from cbp import Batch, Learner, LearnerSpec, Trainability
from cbp_server.engine import trainability
from cbp_server.engine.hosted_learner import HostedLearner
from cbp_server.engine.trainability import TrainabilityTests
from cbp_server.records.samples import unpack

RESULT = Trainability(step=1, loss=1.0, fresh_loss=1.0, chance_loss=2.0)


def spec_of(**monitoring):
    return LearnerSpec.parse(
        {
            "network": {"kind": "mlp", "in_features": 3, "hidden": [4], "out_features": 2},
            "loss": "mse",
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "monitoring": monitoring,
        }
    )


@dataclass(eq=False)
class Subject:
    learner: Learner
    trainability: Trainability | None = None


def subject(examples=64):
    learner = Learner(spec_of())
    random = np.random.default_rng(0)
    learner.train(Batch.validate(learner.spec, random.normal(size=(examples, 3)), random.normal(size=(examples, 2))))
    return Subject(learner)


@pytest.fixture
def tests():
    made = TrainabilityTests(share=1.0)
    yield made
    made.close()


@pytest.fixture
def begun(monkeypatch):
    """Steps at which learners were copied, by test begun; each test lasts until it is let go on."""

    class Begun(list):
        go_on = threading.Semaphore(0)

    begun = Begun()

    def wait_for_it(snapshot, **_):
        begun.append(snapshot.metadata["step"])
        assert begun.go_on.acquire(timeout=30)
        return RESULT

    monkeypatch.setattr(trainability, "measure_trainability", wait_for_it)
    return begun


def test_a_learner_is_tested_on_a_copy(tests):
    tested = subject()
    tests.add(tested)
    tests.start_next()
    wait_until(lambda: tested.trainability is not None)
    assert tested.trainability.step == 64
    assert tested.learner.progress.step == 64


def test_one_test_at_a_time_and_each_in_its_turn(tests, begun):
    first, second, third = (subject(examples) for examples in (40, 50, 60))
    for tested in (first, second, third, second):
        tests.add(tested)
        tests.start_next()
    wait_until(lambda: begun == [40])
    for expected in ([40, 50], [40, 50, 60]):
        begun.go_on.release()

        def next_has_begun(expected=expected):
            tests.start_next()
            return begun == expected

        wait_until(next_has_begun)
    begun.go_on.release()
    wait_until(lambda: third.trainability is RESULT)
    tests.start_next()
    assert begun == [40, 50, 60], "who waits already does not wait twice"


def test_a_learner_that_is_gone_is_not_tested(tests, begun):
    first, gone, last = (subject(examples) for examples in (40, 50, 60))
    for tested in (first, gone, last):
        tests.add(tested)
    tests.start_next()
    wait_until(lambda: begun == [40])
    del gone, tested
    gc.collect()
    begun.go_on.release()

    def last_has_begun():
        tests.start_next()
        return len(begun) == 2

    wait_until(last_has_begun)
    assert begun == [40, 60]
    del first, last
    begun.go_on.release()


def test_a_test_that_fails_is_logged_and_over(tests, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    tested = subject()
    monkeypatch.setattr(trainability, "measure_trainability", fail)
    with caplog.at_level(logging.ERROR):
        tests.add(tested)
        tests.start_next()
        wait_until(lambda: not tests._under_way)
    assert tested.trainability is None
    monkeypatch.undo()
    tests.add(tested)
    tests.start_next()
    wait_until(lambda: tested.trainability is not None)


def test_a_learner_that_cannot_be_copied_does_not_hold_up_others(tests, monkeypatch):
    broken, whole = subject(), subject()
    monkeypatch.setattr(broken, "learner", None)
    tests.add(broken)
    tests.add(whole)
    tests.start_next()
    wait_until(lambda: whole.trainability is not None)


def test_it_rests_for_most_of_the_time(monkeypatch):
    """By the clock that the test turns: a test's own work moves it, and so does a rest."""
    now = [0.0]
    rests = []
    tests = TrainabilityTests(share=0.05)
    monkeypatch.setattr(trainability.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        tests._closing, "wait", lambda seconds: rests.append(seconds) or now.__setitem__(0, now[0] + seconds)
    )
    for worked in (0.4e-3, 0.4e-3, 0.4e-3, 10e-3):
        now[0] += worked
        tests._rest()
    assert rests == pytest.approx([19 * 1.2e-3, 19 * 10e-3])
    assert sum(rests) / now[0] == pytest.approx(0.95)
    tests.close()


def test_closing_gives_up_the_test_under_way():
    tests = TrainabilityTests(share=1e-9)  # its first rest would last for days
    tested = subject()
    tests.add(tested)
    tests.start_next()
    started = time.monotonic()
    tests.close()
    assert time.monotonic() - started < 20
    assert tested.trainability is None


def test_tests_are_due_by_the_learners_steps():
    hosted = HostedLearner(Learner(spec_of(trainability_interval=100)))
    assert [step for step in (10, 99, 105, 150, 199, 230, 230, 500, 599) if hosted.begins_test(step)] == [105, 230, 500]
    hosted.revise(spec_of(trainability_interval=0), "now")
    assert not hosted.begins_test(10_000)
    hosted.revise(spec_of(trainability_interval=50), "now")
    assert hosted.begins_test(10_000)
    assert not HostedLearner(Learner(spec_of())).begins_test(10_000)


def test_samples_carry_the_newest_test():
    hosted = HostedLearner(Learner(spec_of()))
    [before] = hosted.stamp([hosted.learner.sample_plasticity()])
    hosted.trainability = RESULT
    [after] = hosted.stamp([hosted.learner.sample_plasticity()])
    assert [unpack(each).sample.trainability for each in (before, after)] == [None, RESULT]
