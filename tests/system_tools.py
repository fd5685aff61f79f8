"""Programs that come with the system, for tests that need one."""

import os
import shutil

import pytest


def system_tool(name: str) -> str:
    """The path of a program; without it the test is skipped, but fails in CI."""
    path = shutil.which(name)
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} is not installed")
    return path
