"""A short run of the crash harness; `make torture` is the long one."""

from torture import torture


def test_learners_survive_kill_9_bit_for_bit(tmp_path):
    outcome = torture(kills=4, seed=7, directory=tmp_path)
    assert outcome.batches > 0
