"""What a checkpoint says of producers reaches those that it is about."""

from types import SimpleNamespace
from typing import Any, cast

from cbp_server.engine.messages import Position
from cbp_server.learners.checkpointing import _note_durable
from cbp_server.streams.producers import Producer


def test_a_checkpoint_makes_nothing_durable_of_a_later_life_of_the_name():
    """Without a journal what a checkpoint holds is durable; one that was under way may hold the life before."""
    later = Producer.newcomer("web", epoch_floor=3)
    hosted = cast(Any, SimpleNamespace(producers={"web": later}, sessions={}, record=SimpleNamespace(producers={})))
    _note_durable(hosted, "web", Position(epoch=3, sequence=50))
    assert later.durable == 0
    _note_durable(hosted, "web", Position(epoch=4, sequence=2, life=3))
    assert later.durable == 2
    assert hosted.record.producers["web"].durable_sequence == 2
