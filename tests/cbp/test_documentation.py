"""The examples in the documents run, and the documents name every setting and measure."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from cbp import (
    AdamSpec,
    AdamWSpec,
    LayerPlasticity,
    Learner,
    LearnerSpec,
    MethodSpec,
    ResetSpec,
    RmspropSpec,
    SgdSpec,
)
from cbp.spec.learner_spec import Initializer, Utility
from cbp.spec.network_spec import AnyNetwork, RegisteredSpec

REPOSITORY = Path(__file__).parents[2]
ALGORITHM = (REPOSITORY / "docs" / "algorithm.md").read_text(encoding="utf-8")
EXPORT = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
FORGETTING = (REPOSITORY / "docs" / "forgetting.md").read_text(encoding="utf-8")
METHODS = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
NETWORKS = (REPOSITORY / "docs" / "networks.md").read_text(encoding="utf-8")
MODULES = (REPOSITORY / "docs" / "modules.md").read_text(encoding="utf-8")
README = (REPOSITORY / "cbp" / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    pytest.param(code, id=f"{name}-{index}")
    for name, text in (
        ("algorithm", ALGORITHM),
        ("export", EXPORT),
        ("forgetting", FORGETTING),
        ("methods", METHODS),
        ("modules", MODULES),
        ("networks", NETWORKS),
        ("readme", README),
    )
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(
    code: str, make_spec: Callable[..., LearnerSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clicks.safetensors").write_bytes(Learner(make_spec()).snapshot().to_bytes())
    exec(compile(code, "example", "exec"), {})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 14


@pytest.mark.parametrize("name", [*get_args(Utility), *get_args(Initializer)])
def test_choices_are_documented(name: str) -> None:
    assert re.search(rf"^\| {name}\b", ALGORITHM, re.MULTILINE)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LayerPlasticity)][2:])
def test_measures_are_documented(name: str) -> None:
    assert f"| {name} |" in ALGORITHM


@pytest.mark.parametrize("name", ResetSpec.model_fields)
def test_reset_settings_say_what_they_mean(name: str) -> None:
    assert ResetSpec.model_fields[name].description


@pytest.mark.parametrize("kind", [SgdSpec, RmspropSpec, AdamSpec, AdamWSpec])
def test_optimizers_are_documented(kind: type[SgdSpec | RmspropSpec | AdamSpec | AdamWSpec]) -> None:
    assert f"| {kind.model_fields['kind'].default} |" in ALGORITHM
    assert all(field.description for name, field in kind.model_fields.items() if name != "kind")


def test_limits_on_forgetting_are_documented() -> None:
    for name in ("layers", "replacement_rate", "strength", "max_replacements", "replacement_window"):
        assert name in ResetSpec.model_fields
        assert f"`{name}`" in FORGETTING


@pytest.mark.parametrize("method", get_args(get_args(MethodSpec)[0]), ids=lambda spec: spec.__name__)
def test_settings_of_methods_say_what_they_mean(method: Any) -> None:
    rules = METHODS.partition("## What there is")[2].partition("Where we depart")[0]
    name = method.__name__.removesuffix("Spec")
    [row] = [line for line in rules.splitlines() if line.startswith(f"| `{name}` |")]
    for field, info in method.model_fields.items():
        if field != "kind":
            assert info.description
            assert f"`{field}`" in row


def test_the_table_of_a_module_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", MODULES, re.DOTALL)[0]
    exec(compile(code, "example", "exec"), {})
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert printed in MODULES


@pytest.mark.parametrize("network", get_args(AnyNetwork))
def test_kinds_of_networks_are_documented_with_their_fields(network: type[AnyNetwork]) -> None:
    [row] = [line for line in NETWORKS.splitlines() if line.startswith(f"| `{network.model_fields['kind'].default}` |")]
    for field in set(network.model_fields) - {"kind", "out_features"}:
        assert f"`{field}`" in row or (network is RegisteredSpec and field == "inputs")
