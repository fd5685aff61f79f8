"""The `cbp` command."""

from cbp_client.cli.app import main

__all__ = ["main"]
