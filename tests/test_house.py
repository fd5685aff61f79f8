"""The walls between packages and wings stand, and docs/architecture.md shows them as they are."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["id"]: contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=root, capture_output=True, text=True
    )


def test_no_import_goes_up_or_in_a_circle() -> None:
    ended = lint(ROOT)
    assert not ended.returncode, ended.stdout


def wings(package: str) -> list[list[str]]:
    """Layer by layer, from the top."""
    return [re.split(r" [|:] ", layer) for layer in CONTRACTS[package]["layers"]]


@pytest.mark.parametrize(("package", "folder"), [("cbp", "cbp/cbp"), ("cbp_server", "server/cbp_server")])
def test_the_document_shows_the_wings_in_their_order(package: str, folder: str) -> None:
    picture = next(
        block for block in re.findall(r"```\n(.*?)```", ARCHITECTURE, re.DOTALL) if block.startswith(f"{folder}/")
    )
    shown = [re.split(r"\s{3,}", line.strip())[0].split() for line in picture.splitlines()[1:] if line.strip()]
    assert [[name.rstrip("/") for name in layer] for layer in shown] == wings(package)
    for layer in shown:
        for name in layer:
            room = ROOT / folder / name
            assert room.is_dir() if name.endswith("/") else room.with_suffix(".py").is_file(), name


@pytest.mark.parametrize("folder", ["cbp/cbp", "server/cbp_server"])
def test_every_wing_says_what_belongs_there(folder: str) -> None:
    for init in (ROOT / folder).glob("*/__init__.py"):
        assert init.read_text(encoding="utf-8").startswith('"""'), init
