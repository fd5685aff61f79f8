"""The engine's inbox: order within a learner, turns between learners, predictions first."""

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cbp_server.engine.inbox import Inbox
from cbp_server.engine.messages import AbortTraining, Call, Checkpoint, Predict, Sample, Train


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_learners_take_turns_and_keep_their_order(learners):
    inbox = Inbox()
    for number, learner in enumerate(learners):
        inbox.put(Call(number, Sample(learner)))
    taken = [inbox.take() for _ in learners]
    for learner in "abc":
        numbers = [call.number for call in taken if call.request.learner == learner]
        assert numbers == sorted(numbers)
    served = dict.fromkeys(set(learners), 0)
    for call in taken:
        waiting = [learner for learner in served if served[learner] < learners.count(learner)]
        assert served[call.request.learner] == min(served[learner] for learner in waiting)
        served[call.request.learner] += 1


def train(learner_id, sequence=1):
    return Train(learner_id, sequence, "web", 1, sequence, "hash", batch=None, return_outputs=False)


def numbers(inbox, count):
    return [inbox.take().number for _ in range(count)]


def test_predictions_and_learning_alternate():
    inbox = Inbox()
    for number in range(3):
        inbox.put(Call(number, train("a", number)))
    for number in range(10, 13):
        inbox.put(Call(number, Predict("a", np.zeros((1, 1)))))
    assert numbers(inbox, 6) == [10, 0, 11, 1, 12, 2]


def test_a_prediction_can_be_taken_between_two_steps():
    inbox = Inbox()
    inbox.put(Call(0, Sample("a")))
    assert inbox.take_prediction() is None
    inbox.put(Call(1, Predict("a", np.zeros((1, 1)))))
    assert inbox.take_prediction().number == 1
    assert inbox.take_prediction() is None


def test_a_checkpoint_waits_for_no_batch_that_has_not_begun():
    inbox = Inbox()
    inbox.put(Call(0, train("a", 1)))
    inbox.put(Call(1, train("a", 2)))
    begun = inbox.take()
    inbox.put_back(begun)
    inbox.put(Call(2, Checkpoint("a", 1, "a")))
    assert numbers(inbox, 3) == [0, 2, 1]


def test_a_batch_that_has_begun_gives_others_their_turn_and_comes_back_first():
    inbox = Inbox()
    inbox.put(Call(0, train("a", 1)))
    inbox.put(Call(1, train("a", 2)))
    begun = inbox.take()
    assert inbox.has_turns()  # its own learner's next batch
    inbox.put(Call(2, train("b")))
    inbox.put_back(begun)
    assert [inbox.take().number for _ in range(3)] in ([0, 2, 1], [2, 0, 1])


def test_aborting_drops_the_batches_that_have_not_begun():
    inbox = Inbox()
    inbox.put(Call(0, train("a", 1)))
    inbox.put(Call(1, train("a", 2)))
    inbox.put(Call(2, Sample("a")))
    inbox.put(Call(3, train("b")))
    inbox.put_back(inbox.take())
    inbox.put(Call(4, AbortTraining()))
    assert inbox.aborting
    assert [call.number for call in inbox.take_dropped()] == [1, 3]
    assert numbers(inbox, 3) == [4, 0, 2]


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
    inbox.put(Call(0, train("a", 1)))
    inbox.put(Call(1, train("a", 2)))
    inbox.put(Call(2, Sample("a")))
    inbox.take()
    assert inbox.has_training("a")
    inbox.take()
    assert not inbox.has_training("a")  # a sample brings no news of what was learnt
    assert not inbox.has_training("b")


def test_company_is_the_first_batch_of_each_other_learner_that_is_wanted():
    inbox = Inbox()
    for number, request in enumerate(
        [train("a", 1), train("a", 2), train("b", 1), Sample("c"), train("c", 1), train("d", 1), train("e", 1)]
    ):
        inbox.put(Call(number, request))
    first = inbox.take()
    company = inbox.take_company(first, lambda learner: learner != "d", 2)
    assert (first.number, [call.number for call in company]) == (0, [2, 6])  # c has something else to do first
    assert inbox.take_company(first, lambda _: True, 0) == []
    assert numbers(inbox, 4) == [3, 5, 1, 4]  # c and d have kept their places


def test_batches_behind_another_come_with_it_and_can_be_given_back():
    inbox = Inbox()
    for number, request in enumerate([*(train("a", sequence) for sequence in range(1, 5)), Sample("a"), train("b")]):
        inbox.put(Call(number, request))
    first = inbox.take()
    behind = inbox.take_batches_behind(first, 9)
    assert [call.number for call in behind] == [1, 2, 3]
    inbox.put(Call(6, Checkpoint("a", 1, "a")))
    inbox.give_back(behind[1:])
    assert numbers(inbox, 5) == [5, 6, 2, 3, 4]  # the checkpoint waits for no batch that has not begun

    inbox.put(Call(7, train("c", 1)), Call(8, train("c", 2)))
    first = inbox.take()
    assert inbox.take_batches_behind(first, 0) == []
    behind = inbox.take_batches_behind(first, 9)
    assert inbox.would_wait
    inbox.give_back([])
    assert inbox.would_wait
    inbox.give_back(behind)
    assert numbers(inbox, 1) == [8]
    assert inbox.take_batches_behind(first, 9) == []


def test_batches_that_are_given_back_while_training_is_aborted_are_dropped():
    inbox = Inbox()
    inbox.put(Call(0, train("a", 1)), Call(1, train("a", 2)))
    behind = inbox.take_batches_behind(inbox.take(), 9)
    inbox.put(Call(2, AbortTraining()))
    inbox.give_back(behind)
    assert inbox.take_dropped() == behind
    assert numbers(inbox, 1) == [2]
    assert inbox.would_wait


def test_half_a_batch_goes_on_in_company():
    inbox = Inbox()
    inbox.put(Call(0, train("a", 1)))
    begun = inbox.take()
    inbox.put(Call(1, train("b", 1)))
    inbox.put_back(begun)
    first = inbox.take()
    assert (first.number, inbox.take_company(first, lambda _: True, 9)) == (1, [begun])
    inbox.put(Call(2, Checkpoint("a", 1, "a")))
    inbox.put_back(begun)
    assert numbers(inbox, 2) == [0, 2]  # the checkpoint was there first, but a batch is not torn apart


def test_whoever_comes_first_waits_for_others():
    waiting = Inbox(group_wait=30.0)
    waiting.put(Call(0, train("a", 1)))
    waiting.put(Call(1, Predict("a", np.zeros((1, 1)))))
    waiting.put(Call(2, Predict("a", np.zeros((1, 1)))))
    assert numbers(waiting, 2) == [1, 2]  # predictions do not
    taken = []
    taker = threading.Thread(target=lambda: taken.append(waiting.take()))
    taker.start()
    waiting.put(Call(3, AbortTraining()))
    taker.join(20.0)
    assert [call.number for call in taken] == [3]

    brief = Inbox(group_wait=0.05)
    brief.put(Call(0, train("a", 1)))
    brief.put(Call(1, train("b", 1)))
    assert numbers(brief, 2) == [0, 1]


def test_it_would_wait_where_nobodys_time_has_come():
    inbox = Inbox(group_wait=60.0)
    assert inbox.would_wait
    inbox.put(Call(1, Sample("a")))
    assert inbox.would_wait  # for company
    inbox.put(Call(2, Predict("a", np.zeros((1, 1), np.float32))))
    assert not inbox.would_wait
