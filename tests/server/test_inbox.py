"""The engine's inbox: order within a learner, turns between learners, predictions first."""

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cbp_server.engine.inbox import Inbox
from cbp_server.engine.messages import Call, Predict, Sample, Train


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_learners_take_turns_and_keep_their_order(learners):
    inbox = Inbox()
    for number, learner in enumerate(learners):
        inbox.put(Call(number, Sample(learner)))
    taken = [inbox.take() for _ in learners]
    for learner in "abc":
        numbers = [call.number for call in taken if call.request.learner_id == learner]
        assert numbers == sorted(numbers)
    served = dict.fromkeys(set(learners), 0)
    for call in taken:
        waiting = [learner for learner in served if served[learner] < learners.count(learner)]
        assert served[call.request.learner_id] == min(served[learner] for learner in waiting)
        served[call.request.learner_id] += 1


def test_a_prediction_overtakes_what_waits():
    inbox = Inbox()
    inbox.put(Call(0, Sample("a")))
    assert inbox.take_prediction() is None
    inbox.put(Call(1, Predict("a", np.zeros((1, 1)))))
    assert inbox.take_prediction().number == 1
    assert inbox.take_prediction() is None
    inbox.put(Call(2, Predict("a", np.zeros((1, 1)))))
    assert [inbox.take().number, inbox.take().number] == [2, 0]


def test_closing_wakes_the_one_who_waits():
    inbox = Inbox()
    taken = []
    taker = threading.Thread(target=lambda: taken.append(inbox.take()))
    taker.start()
    inbox.close()
    taker.join(10)
    assert taken == [None]


def test_it_knows_whether_a_learner_has_more_to_learn():
    inbox = Inbox()
    train = Train("a", "web", 1, 1, "hash", batch=None, return_outputs=False)
    inbox.put(Call(0, train))
    inbox.put(Call(1, train))
    inbox.put(Call(2, Sample("a")))
    inbox.take()
    assert inbox.has_training("a")
    inbox.take()
    assert not inbox.has_training("a")  # a sample brings no news of what was learnt
    assert not inbox.has_training("b")
