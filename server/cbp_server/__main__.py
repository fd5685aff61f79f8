"""The command `cbp-server`."""

import asyncio
import sys

from cbp_server.app import StartError, serve
from cbp_server.process.logs import configure_logging
from cbp_server.process.memory import keep_freed_memory, shorten_collections
from cbp_server.settings import load_settings


def main() -> None:
    """Runs a server until it is told to stop."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    keep_freed_memory()
    shorten_collections()
    try:
        sys.exit(asyncio.run(serve(settings)))
    except StartError as error:
        sys.exit(f"cbp-server: {error}")


if __name__ == "__main__":
    main()
