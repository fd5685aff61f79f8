"""What tests of whole servers share."""

import os

import pytest
from faults.sqlite_vfs import library_path


@pytest.fixture
def watched_sqlite():
    """For tests that watch what SQLite writes and syncs, or let it fail."""
    if library_path() is None:
        reason = "this Python's SQLite is linked statically, so it can be neither watched nor made to fail"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
