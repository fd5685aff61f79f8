"""Servers that do as a test says, for what a well-behaved server would not."""

from collections.abc import AsyncIterator

import pytest

from tests.client.scripted_server import ScriptedServer


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedServer]:
    """A running scripted server."""
    async with ScriptedServer() as server:
        yield server
