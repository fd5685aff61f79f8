"""Checkpoints on disk: whole or not there, the newest first, old ones removed after new ones exist."""

import os
from pathlib import Path

import pytest

from cbp_server.store.checkpoints import CheckpointDirectory


def contents(directory: CheckpointDirectory, learner_id: str) -> list[bytes]:
    return [path.read_bytes() for path in directory.paths(learner_id)]


def test_the_newest_comes_first_and_the_oldest_goes(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep=2)
    for data in (b"one", b"two", b"three"):
        directory.write("clicks", data)
    assert contents(directory, "clicks") == [b"three", b"two"]
    assert CheckpointDirectory(tmp_path).learner_ids() == ["clicks"]


def test_a_failed_write_leaves_the_ones_before(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path)
    directory.write("clicks", b"one")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            directory.write("clicks", b"two")
    assert contents(directory, "clicks") == [b"one"]
    assert [path.name for path in (tmp_path / "learners" / "clicks").iterdir()] == [
        "checkpoint-000000000001.safetensors"
    ]


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    directory = CheckpointDirectory(tmp_path)
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("rename"), replace(path, target)))
    directory.write("clicks", b"one")
    assert order[-3:] == ["fsync", "rename", "fsync"]


def test_leftovers_of_a_crash_are_cleared(tmp_path):
    CheckpointDirectory(tmp_path).write("clicks", b"one")
    (tmp_path / "learners" / "clicks" / "checkpoint-000000000002.safetensors.writing").write_bytes(b"tw")
    (tmp_path / "learners" / ".deleted-123").mkdir()

    directory = CheckpointDirectory(tmp_path)

    assert contents(directory, "clicks") == [b"one"]
    assert sorted(path.name for path in (tmp_path / "learners").iterdir()) == ["clicks"]


def test_a_deleted_learner_is_gone_and_its_name_free(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.write("clicks", b"one")
    directory.delete("clicks", "uid")
    directory.delete("clicks", "uid")
    assert directory.learner_ids() == []
    directory.write("clicks", b"again")
    assert contents(directory, "clicks") == [b"again"]
