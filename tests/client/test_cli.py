"""The `cbp` command as a user runs it, against a real server."""

import csv
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.main import get_command

from cbp_client import Client
from cbp_client.cli.app import app
from tests.client.command import Run, command

_DOCS = Path(__file__).parents[2] / "docs" / "client.md"
CREATE = ("--network", "4-8-3", "--activation", "relu", "--loss", "cross_entropy", "--optimizer", "sgd", "--lr", "0.1")


class Server(Protocol):
    grpc_target: str


@pytest.fixture
def cbp(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `cbp` with these arguments."""
    return command(server.grpc_target, monkeypatch, capfd)


@pytest.fixture
def learner(cbp: Run, learner_id: str) -> str:
    assert cbp("learners", "create", learner_id, *CREATE).status == 0
    return learner_id


@pytest.fixture
def examples() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[600, 4] features and [600] labels that depend on them."""
    random = np.random.default_rng(0)
    features = random.normal(size=(600, 4)).astype(np.float32)
    return features, (features @ random.normal(size=(4, 3))).argmax(axis=1)


@pytest.fixture
def npz(tmp_path: Path, examples: tuple[NDArray[np.float32], NDArray[np.int64]]) -> Path:
    path = tmp_path / "examples.npz"
    np.savez(path, features=examples[0], targets=examples[1], tasks=np.repeat(["mon", "tue"], 300))
    return path


def test_create_show_update_delete(cbp: Run, learner_id: str) -> None:
    created = cbp("learners", "create", learner_id, *CREATE, "--resets", "first", "--replacement-rate", "0.001")
    assert (created.status, created.out) == (0, "")
    assert created.err == f"created learner {learner_id}: 4-8-3 relu\n"

    shown = json.loads(cbp("learners", "show", learner_id, "--json").out)["learner"]
    assert shown["id"] == learner_id
    assert shown["spec"]["network"]["hidden"] == [8]
    assert shown["spec"]["resets"]["layers"] == ["first"]
    assert shown["spec"]["resets"]["replacement_rate"] == 0.001

    assert cbp("learners", "update", learner_id, "--lr", "0.01", "--resets", "0").status == 0
    updated = json.loads(cbp("learners", "show", learner_id, "--json").out)["learner"]["spec"]
    assert updated["optimizer"] == shown["spec"]["optimizer"] | {"lr": 0.01}
    assert updated["resets"] == shown["spec"]["resets"] | {"layers": ["hidden_0"]}

    assert learner_id in cbp("learners", "list").out
    assert learner_id in [item["id"] for item in json.loads(cbp("learners", "list", "--json").out)]
    assert f"{learner_id} (active)" in cbp("learners", "show", learner_id).out

    deleted = cbp("learners", "delete", learner_id, "--yes")
    assert deleted.status == 0
    assert deleted.err.startswith(f"deleted learner {learner_id}")
    missing = cbp("learners", "show", learner_id)
    assert missing.status == 1
    assert missing.err.startswith(f"cbp: there is no learner '{learner_id}'")
    assert missing.err.count("\n") == 1


def test_a_shown_spec_creates_the_same_learner(cbp: Run, learner: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(cbp("learners", "show", learner, "--json").out)
    twin = f"twin-{learner}"[:60].rstrip("-")

    shown = json.loads(cbp("learners", "create", twin, "--spec", str(file), "--lr", "0.5", "--json").out)

    original = json.loads(file.read_text())["learner"]["spec"]
    assert shown["spec"] == original | {"optimizer": original["optimizer"] | {"lr": 0.5}}
    assert cbp("learners", "create", twin, "--spec", str(file)).status == 1
    assert cbp("learners", "create", twin, "--spec", str(file), "--exist-ok").status == 0


def test_a_learner_in_mixed_precision(cbp: Run, learner_id: str) -> None:
    assert cbp("learners", "create", learner_id, *CREATE, "--precision", "bfloat16").status == 0
    shown = cbp("learners", "show", learner_id).out
    assert "precision   bfloat16" in shown
    assert "engine      module" in shown
    refused = cbp("learners", "create", learner_id, *CREATE, "--precision", "float32", "--exist-ok")
    assert f"learner {learner_id} exists with precision bfloat16, not float32" in refused.err
    wrong = cbp("learners", "create", learner_id, *CREATE, "--precision", "float16")
    assert wrong.err == "cbp: precision: must be one of float32, bfloat16, not 'float16'\n"


def test_a_learner_with_methods(cbp: Run, learner: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    spec = json.loads(cbp("learners", "show", learner, "--json").out)["learner"]["spec"]
    spec["methods"] = [{"kind": "l2_init", "strength": 0.25}]
    file.write_text(json.dumps(spec))
    other = f"other-{learner}"[:60].rstrip("-")
    created = json.loads(cbp("learners", "create", other, "--spec", str(file), "--json").out)
    assert created["spec"]["methods"] == spec["methods"]
    assert "method      l2_init strength=0.25" in cbp("learners", "show", other).out

    assert cbp("learners", "create", other, "--spec", str(file), "--exist-ok").status == 0
    for methods in (
        [{"kind": "l2_init", "strength": 0.5}],
        [*spec["methods"], {"kind": "shrink_and_perturb", "shrink": 0.9, "perturb": 0.1}],
    ):
        file.write_text(json.dumps(spec | {"methods": methods}))
        refused = cbp("learners", "create", other, "--spec", str(file), "--exist-ok")
        assert refused.status == 1
        assert f"learner {other} exists with methods" in refused.err


def test_train_and_predict(cbp: Run, server: Server, learner: str, npz: Path, tmp_path: Path) -> None:
    trained = cbp("train", str(npz), "--learner", learner, "--producer", "file", "--message-size", "64")
    assert trained.status == 0
    assert "10 messages applied, 600 examples learnt: loss" in trained.err

    with Client(server.grpc_target) as client:
        info = client.get_learner(learner).info
    assert info.progress.step == 600
    assert [(task.task, task.examples) for task in info.tasks] == [("mon", 300), ("tue", 300)]

    predicted = cbp("predict", str(npz), "--learner", learner)
    rows = list(csv.DictReader(predicted.out.splitlines()))
    assert len(rows) == 600
    targets = np.load(npz)["targets"]
    assert np.mean([int(row["label"]) for row in rows] == targets) > 0.8

    output = tmp_path / "out.npz"
    assert cbp("predict", str(npz), "--learner", learner, "--output", str(output)).status == 0
    with np.load(output) as arrays:
        assert arrays["outputs"].shape == (600, 3)
        assert arrays["labels"].tolist() == [int(row["label"]) for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_train_on_a_table(
    cbp: Run, learner: str, tmp_path: Path, examples: tuple[NDArray[np.float32], NDArray[np.int64]], suffix: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    features, targets = examples
    columns: dict[str, Any] = {f"f{index}": features[:, index] for index in range(4)}
    table = pyarrow.table(columns | {"label": targets, "day": np.repeat(["mon", "tue"], 300)})
    path = tmp_path / f"table{suffix}"
    (arrow_csv.write_csv if suffix == ".csv" else parquet.write_table)(table, path)

    arguments = ("--learner", learner, "--producer", "table")
    assert cbp("train", str(path), "--target", "label", "--task", "day", *arguments).status == 0
    assert cbp("predict", str(path), "--ignore", "label", "--ignore", "day", "--learner", learner).status == 0

    missing = cbp("train", str(path), "--target", "nothing", *arguments)
    assert (missing.status, missing.err) == (
        1,
        f"cbp: {path} has no column nothing; there are f0, f1, f2, f3, label, day\n",
    )
    text = cbp("train", str(path), "--target", "label", *arguments)
    assert "column day holds string, not numbers" in text.err


def test_a_second_run_trains_again_unless_it_resumes(cbp: Run, server: Server, learner: str, npz: Path) -> None:
    command = ("train", str(npz), "--learner", learner, "--producer", "file")
    for flags, examples in [((), 600), (("--resume",), 600), ((), 1200)]:
        assert cbp(*command, *flags).status == 0
        with Client(server.grpc_target) as client:
            assert client.get_learner(learner).info.progress.examples == examples
    beyond = cbp(*command, "--resume")
    assert beyond.status == 1
    assert "the producer has sent 8 messages but the file makes 4" in beyond.err


def test_a_rejected_message_names_its_rows_and_the_corrected_file_resumes(
    cbp: Run, server: Server, learner: str, npz: Path, tmp_path: Path
) -> None:
    with np.load(npz) as arrays:
        features, targets = arrays["features"], arrays["targets"]
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, features=features, targets=np.where(np.arange(600) == 250, 9, targets))
    command = ("--learner", learner, "--producer", "file", "--message-size", "100")

    failed = cbp("train", str(wrong), *command)
    assert failed.status == 1
    assert "cbp: rows 201 to 300 were rejected, and nothing after them was applied:" in failed.err
    with Client(server.grpc_target) as client:
        assert client.get_learner(learner).info.progress.examples == 200

    np.savez(wrong, features=features, targets=targets)
    assert cbp("train", str(wrong), *command, "--resume").status == 0
    with Client(server.grpc_target) as client:
        assert client.get_learner(learner).info.progress.examples == 600


def test_watch_once(cbp: Run, learner: str, npz: Path) -> None:
    assert cbp("train", str(npz), "--learner", learner, "--producer", "file").status == 0

    watched = cbp("watch", learner, "--once")
    assert watched.status == 0
    assert learner in watched.out
    assert "600" in watched.out

    update = json.loads(cbp("watch", learner, "--once", "--json").out)
    assert [item["info"]["id"] for item in update["learners"]] == [learner]


def test_errors_name_the_field(cbp: Run, learner_id: str) -> None:
    wrong = cbp("learners", "create", learner_id, *CREATE[:-1], "-1")
    assert wrong.status == 1
    assert wrong.err.startswith("cbp: ")
    assert "optimizer.lr" in wrong.err
    assert wrong.err.count("\n") == 1

    unknown = cbp("learners", "create", learner_id, "--network", "4-8-3", "--activation", "step")
    assert unknown.err.startswith("cbp: network.activation: must be one of relu, leaky_relu")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory"),
        ({"x": np.zeros(3)}, "has no array named features, only x"),
        ({"features": np.zeros((3, 4)), "targets": np.zeros(2)}, "2 targets for 3 rows of features"),
        ("text", "is not an npz file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(cbp: Run, tmp_path: Path, content: Any, problem: str) -> None:
    path = tmp_path / "examples.npz"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        np.savez(path, **content)
    failed = cbp("train", str(path), "--learner", "any", "--producer", "any")

    assert failed.status == 1
    assert failed.err.startswith(f"cbp: {path}")
    assert problem in failed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("learners", "frob"),
        ("learners", "create", "x"),
        ("learners", "create", "x", "--network", "4"),
        ("learners", "update", "x"),
        ("train", "x.npz", "--learner", "x"),
    ],
)
def test_wrong_usage_is_status_2(cbp: Run, arguments: tuple[str, ...]) -> None:
    assert cbp(*arguments).status == 2


def test_a_server_that_is_not_there_is_one_line(cbp: Run) -> None:
    failed = cbp("--server", "127.0.0.1:1", "learners", "list")

    assert failed.status == 1
    assert failed.err.startswith("cbp: no server answers at 127.0.0.1:1: ")
    assert failed.err.count("\n") == 1


_SPEC_FLAGS = {
    "--bias-compensation", "--decay-rate", "--json", "--lr", "--maturity-threshold", "--momentum",
    "--monitoring-interval", "--no-bias-compensation", "--replacement-rate", "--resets", "--trainability-interval",
    "--utility", "--weight-decay",
}  # fmt: skip
_FLAGS = {
    "learners list": {"--deleted", "--json"},
    "learners create": _SPEC_FLAGS
    | {
        "--activation",
        "--batch-size",
        "--durability",
        "--exist-ok",
        "--loss",
        "--network",
        "--optimizer",
        "--precision",
        "--seed",
        "--spec",
    },
    "learners show": {"--json"},
    "learners update": _SPEC_FLAGS | {"--durability"},
    "learners fork": {"--durability", "--json"},
    "learners checkpoint": {"--json"},
    "learners checkpoints": {"--json"},
    "learners delete-checkpoint": {"--yes", "-y"},
    "learners forget-producer": {"--yes", "-y"},
    "learners restore": {"--checkpoint", "--json", "--position", "--yes", "-y"},
    "learners resume": {"--json", "--lr", "--skip-batch"},
    "learners reset": {"--fraction", "--json", "--layers"},
    "learners export": {"--format"},
    "learners import": {"--durability", "--json"},
    "learners delete": {"--json", "--yes", "-y"},
    "learners undelete": {"--json", "--uid"},
    "learners purge": {"--uid", "--yes", "-y"},
    "train": {"--learner", "--message-size", "--producer", "--resume", "--target", "--task"},
    "predict": {"--ignore", "--learner", "--output"},
    "watch": {"--interval", "--json", "--once"},
}


def _commands(group: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in group.commands.items():
        found |= _commands(item, f"{name} ") if hasattr(item, "commands") else {prefix + name: item}
    return found


def test_commands_and_flags_are_stable_documented_and_explained() -> None:
    commands = _commands(get_command(app))
    documentation = _DOCS.read_text()
    assert set(commands) == {*_FLAGS, "demo"}
    for name, flags in _FLAGS.items():
        options = [parameter for parameter in commands[name].params if parameter.param_type_name == "option"]
        found = {flag for option in options for flag in [*option.opts, *option.secondary_opts]} - {"--help"}
        assert found == flags, name
        assert commands[name].help
        assert all(option.help for option in options)
        assert f"cbp {name}" in documentation
    assert [flag for flags in _FLAGS.values() for flag in flags if flag not in documentation] == []


@pytest.mark.parametrize("columns", ["30", "80", "200"])
@pytest.mark.parametrize("name", ["", "learners", *_FLAGS])
def test_help_is_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, columns: str
) -> None:
    cbp = command("127.0.0.1:1", monkeypatch, capfd)
    monkeypatch.setenv("COLUMNS", columns)
    shown = "".join(cbp(*name.split(), "--help").out.split())

    described: Any = get_command(app)
    for word in name.split():
        described = described.commands[word]
    said = [described.help, *(parameter.help for parameter in described.params)]
    said += [item.help for item in getattr(described, "commands", {}).values()]
    assert [text for text in said if text and "".join(text.split()) not in shown] == []
