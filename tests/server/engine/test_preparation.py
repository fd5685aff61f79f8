"""Compiled code is made ready on the side, and the engine goes on without it where that fails."""

import sys
import threading

import structlog

from cbp_server.engine import preparation
from cbp_server.engine.preparation import Preparation


def outcome_of(prepared: Preparation) -> bool:
    outcomes: list[bool] = []
    told = threading.Event()

    def tell(compiled: bool) -> None:
        outcomes.append(compiled)
        told.set()

    prepared.when_finished(tell)
    assert told.wait(60.0)
    return outcomes[0]


def test_code_on_disk_is_loaded_at_once():
    prepared = Preparation()
    prepared.begin(at_once=False)
    assert prepared.compiled
    assert outcome_of(prepared)


def test_without_code_another_process_compiles(monkeypatch):
    answers = iter([False, True])  # before, and when that process has ended
    monkeypatch.setattr(preparation, "compiled_before", lambda: next(answers))
    prepared = Preparation()
    prepared.begin(at_once=False)
    assert outcome_of(prepared)
    assert prepared.compiled


def test_a_compiler_that_fails_leaves_torch(monkeypatch):
    monkeypatch.setattr(preparation, "compiled_before", lambda: False)
    monkeypatch.setattr(sys, "executable", "false")
    prepared = Preparation()
    with structlog.testing.capture_logs() as logs:
        prepared.begin(at_once=False)
        assert not outcome_of(prepared)
    assert "the engine's code was not compiled" in logs[-1]["event"]
    prepared.require()  # for a learner whose journal says that it has it
    assert prepared.compiled


def test_code_that_cannot_be_kept_leaves_torch(monkeypatch):
    monkeypatch.setattr(preparation, "compiled_before", lambda: False)
    prepared = Preparation()
    with structlog.testing.capture_logs() as logs:
        prepared.begin(at_once=False)
        assert not outcome_of(prepared)
    assert "NUMBA_CACHE_DIR" in logs[-1]["event"]


def test_where_there_will_be_none_nobody_waits():
    prepared = Preparation()
    prepared.skip()
    assert not outcome_of(prepared)
    assert not prepared.compiled
