"""Garbage collection: what has survived a full round is left out of the next ones, but not for ever."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from cbp_server.process import memory


class Node:
    """Part of a cycle, which only the collector can find."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def shortened() -> Iterator[None]:
    callbacks = list(gc.callbacks)
    memory.shorten_collections()
    yield
    gc.callbacks[:] = callbacks
    gc.unfreeze()


def test_survivors_are_left_out() -> None:
    before = gc.get_freeze_count()
    kept = [Node() for _ in range(1000)]
    gc.collect()
    assert gc.get_freeze_count() - before >= len(kept)
    assert not gc.get_objects(generation=2)


def test_young_garbage_is_found() -> None:
    seen = weakref.ref(Node())
    gc.collect()
    assert seen() is None


def test_old_garbage_is_found_by_a_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    seen = weakref.ref(node)
    gc.collect()
    del node
    gc.collect()
    assert seen() is not None
    monkeypatch.setattr(memory, "_WHOLE_ROUND_SECONDS", 0.0)
    gc.collect()
    assert seen() is None
