"""Checkpoint files: one contract for every storage, then what is special to a directory and to S3."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from cbp_server.store.checkpoints import CheckpointFiles

BUCKET = "cbp-checkpoints"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A server of the S3 API on loopback, with an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """boto3's client, to look at the bucket past fsspec, which is set up to reach it."""
    options = {"endpoint_url": s3_endpoint, "key": "key", "secret": "secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options | {"config_kwargs": {"retries": {"max_attempts": 0}}})
    client = boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        config=Config(retries={"max_attempts": 0}),
    )
    client.create_bucket(Bucket=BUCKET)
    yield client
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["directory", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return {
        "directory": str(tmp_path / "data" / "checkpoints"),
        "file": f"file://{tmp_path}/checkpoints",
        "memory": f"memory://{request.node.name}",  # with [brackets], which are no pattern here
        "s3": f"s3://{BUCKET}/some/prefix/",
    }[request.param]


def test_what_is_written_is_read(root):
    files = CheckpointFiles(root)
    data = random.Random(7).randbytes(300_000)
    files.write("a", 1, data)
    files.write("a", 2, b"")
    files.write("b", 1, b"other")
    again = CheckpointFiles(root)
    assert [again.read("a", 1), again.read("a", 2), again.read("b", 1)] == [data, b"", b"other"]
    files.write("a", 1, b"replaced")
    assert again.read("a", 1) == b"replaced"


def test_what_is_not_there_cannot_be_read_and_need_not_be_deleted(root):
    files = CheckpointFiles(root)
    files.delete("a", 1)
    files.delete_all("a")
    with pytest.raises(FileNotFoundError):
        files.read("a", 1)
    files.write("a", 1, b"one")
    with pytest.raises(FileNotFoundError):
        files.read("a", 2)
    with pytest.raises(FileNotFoundError):
        files.read("b", 1)


def test_deleting_leaves_the_others(root):
    files = CheckpointFiles(root)
    for uid, number in [("a", 1), ("a", 2), ("ab", 1), ("b", 1)]:
        files.write(uid, number, uid.encode())
    files.delete("a", 1)
    assert files.read("a", 2) == b"a"
    files.delete_all("a")
    for number in (1, 2):
        with pytest.raises(FileNotFoundError):
            files.read("a", number)
    assert [files.read("ab", 1), files.read("b", 1)] == [b"ab", b"b"]
    files.write("a", 1, b"again")
    assert files.read("a", 1) == b"again"


def test_all_of_a_learners_files_go_also_those_that_another_instance_wrote(root):
    files, other = CheckpointFiles(root), CheckpointFiles(root)
    files.write("a", 1, b"one")
    files.delete_all("a")
    other.write("a", 2, b"two")
    files.delete_all("a")
    with pytest.raises(FileNotFoundError):
        other.read("a", 2)


def test_several_threads_at_once(root):
    files = CheckpointFiles(root)
    wrong: list[object] = []

    def work(uid: str) -> None:
        try:
            for number in range(1, 11):
                data = f"{uid}-{number}".encode() * 1000
                files.write(uid, number, data)
                if files.read(uid, number) != data:
                    wrong.append((uid, number))
                files.delete(uid, number - 1)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(uid,)) for uid in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("uid", ["", ".", "..", "a/b", "../a", "a.b", "a\n"])
def test_a_uid_stays_within_the_root(tmp_path, uid):
    files = CheckpointFiles(str(tmp_path))
    for use in (
        lambda: files.write(uid, 1, b""),
        lambda: files.read(uid, 1),
        lambda: files.delete(uid, 1),
        lambda: files.delete_all(uid),
    ):
        with pytest.raises(ValueError, match="is no uid"):
            use()


@pytest.mark.parametrize("root", ["nonsense://bucket", "dropbox://somewhere"])
def test_a_url_without_a_package_for_it_is_refused_at_once(root):
    with pytest.raises(ValueError, match="cannot be kept"):
        CheckpointFiles(root)


# A directory


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def failing_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_files_lie_where_the_documentation_says(tmp_path):
    CheckpointFiles(str(tmp_path / "made" / "here")).write("a", 12, b"x")
    assert names(tmp_path) == ["made/here/a/12.safetensors"]


def test_a_failed_write_leaves_the_one_before_and_no_rest(tmp_path, monkeypatch):
    files = CheckpointFiles(str(tmp_path))
    files.write("a", 1, b"one")
    with monkeypatch.context() as patch:
        failing_fsync(patch)
        for number in (1, 2):
            with pytest.raises(OSError, match="No space"):
                files.write("a", number, b"two")
    assert names(tmp_path) == ["a/1.safetensors"]
    assert files.read("a", 1) == b"one"


def test_a_learners_directory_that_could_not_be_made_durable_is_tried_again(tmp_path, monkeypatch):
    files = CheckpointFiles(str(tmp_path / "root"))
    with monkeypatch.context() as patch:
        failing_fsync(patch)
        with pytest.raises(OSError, match="No space"):
            files.write("a", 1, b"one")
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    files.write("a", 1, b"one")
    root = str(tmp_path / "root")
    assert synced == [str(tmp_path), root, f"{root}/a/1.safetensors.writing", f"{root}/a"]
    synced.clear()
    files.write("a", 2, b"two")
    assert synced == [f"{root}/a/2.safetensors.writing", f"{root}/a"]


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    files = CheckpointFiles(str(tmp_path))
    files.write("a", 1, b"one")
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("rename"), replace(path, target)))
    files.write("a", 2, b"two")
    assert order == ["fsync", "rename", "fsync"]


def test_a_rest_of_a_crash_is_overwritten_and_deleted_with_its_learner(tmp_path):
    files = CheckpointFiles(str(tmp_path))
    files.write("a", 1, b"one")
    for number in (2, 3):
        (tmp_path / "a" / f"{number}.safetensors.writing").write_bytes(b"longer than what follows")
    files.write("a", 2, b"two")
    assert files.read("a", 2) == b"two"
    files.delete_all("a")
    assert names(tmp_path) == []


def test_a_root_that_is_no_directory(tmp_path):
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(OSError, match="root"):
        CheckpointFiles(str(tmp_path / "root")).write("a", 1, b"one")


# S3


def test_objects_lie_where_the_documentation_says(s3):
    CheckpointFiles(f"s3://{BUCKET}/prefix").write("a", 12, b"x")
    CheckpointFiles(f"s3://{BUCKET}").write("a", 12, b"x")
    keys = [found["Key"] for found in s3.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert keys == ["a/12.safetensors", "prefix/a/12.safetensors"]


def test_a_large_checkpoint_goes_up_in_parts(s3):
    data = random.Random(8).randbytes(1_000_000) * 105
    files = CheckpointFiles(f"s3://{BUCKET}")
    files.write("a", 1, data)
    assert s3.head_object(Bucket=BUCKET, Key="a/1.safetensors")["ETag"].strip('"').endswith("-3")
    assert files.read("a", 1) == data


def test_a_bucket_that_is_not_there_is_not_made(s3):
    files = CheckpointFiles("s3://misspelt/prefix")
    with pytest.raises(FileNotFoundError):
        files.write("a", 1, b"one")
    with pytest.raises(FileNotFoundError):
        files.read("a", 1)
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == [BUCKET]


@pytest.fixture
def without_server(s3: object, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001, it sets up the rest
    """The storage is away: nothing listens at the endpoint."""
    monkeypatch.setitem(fsspec.config.conf["s3"], "endpoint_url", "http://127.0.0.1:1")


@pytest.mark.usefixtures("without_server")
@pytest.mark.parametrize(
    "use",
    [
        lambda files: files.write("a", 1, b"one"),
        lambda files: files.read("a", 1),
        lambda files: files.delete("a", 1),
        lambda files: files.delete_all("a"),
    ],
)
def test_storage_that_is_away_is_an_os_error(use: Callable[[CheckpointFiles], None]):
    files = CheckpointFiles(f"s3://{BUCKET}")  # which does not reach for it yet
    with pytest.raises(OSError, match="endpoint") as caught:
        use(files)
    assert not isinstance(caught.value, FileNotFoundError)


def test_an_operator_sets_it_up_by_environment_variables(s3, s3_endpoint):
    script = (
        "import sys; from cbp_server.store.checkpoints import CheckpointFiles\n"
        "CheckpointFiles(sys.argv[1]).write('a', 1, b'from afar')\n"
    )
    settings = {"FSSPEC_S3_ENDPOINT_URL": s3_endpoint, "FSSPEC_S3_KEY": "key", "FSSPEC_S3_SECRET": "secret"}
    subprocess.run([sys.executable, "-c", script, f"s3://{BUCKET}/x"], env=os.environ | settings, check=True)
    assert s3.get_object(Bucket=BUCKET, Key="x/a/1.safetensors")["Body"].read() == b"from afar"
