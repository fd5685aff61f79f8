"""The examples in the documents run, and the documents name every setting and measure."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from cbp import LayerPlasticity, MethodSpec, ResetSpec
from cbp.spec import Initializer, Utility

REPOSITORY = Path(__file__).parents[2]
ALGORITHM = (REPOSITORY / "docs" / "algorithm.md").read_text(encoding="utf-8")
EXPORT = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
METHODS = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
MODULES = (REPOSITORY / "docs" / "modules.md").read_text(encoding="utf-8")
README = (REPOSITORY / "cbp" / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    pytest.param(code, id=f"{name}-{index}")
    for name, text in (
        ("algorithm", ALGORITHM),
        ("export", EXPORT),
        ("methods", METHODS),
        ("modules", MODULES),
        ("readme", README),
    )
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str) -> None:
    exec(compile(code, "example", "exec"), {})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize("name", [*get_args(Utility), *get_args(Initializer)])
def test_choices_are_documented(name: str) -> None:
    assert re.search(rf"^\| {name}\b", ALGORITHM, re.MULTILINE)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LayerPlasticity)][2:])
def test_measures_are_documented(name: str) -> None:
    assert f"| {name} |" in ALGORITHM


@pytest.mark.parametrize("name", ResetSpec.model_fields)
def test_reset_settings_say_what_they_mean(name: str) -> None:
    assert ResetSpec.model_fields[name].description


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
