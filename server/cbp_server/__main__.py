"""The command `cbp-server`."""

import asyncio
import sys

import structlog

from cbp_server.engine.spawning import SpawnedEngine
from cbp_server.process.descriptors import raise_descriptor_limit
from cbp_server.process.logs import configure_logging
from cbp_server.process.memory import keep_freed_memory, shorten_collections
from cbp_server.settings import ignored_variables, load_settings

log = structlog.get_logger("cbp_server")


def main() -> None:
    """Runs a server until it is told to stop."""
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    for variable in ignored_variables():
        log.warning("environment variable ignored", variable=variable.name, reason=variable.reason)
    raise_descriptor_limit()
    keep_freed_memory()
    engine = SpawnedEngine()
    try:
        # Here, so that both processes load what they need at the same time.
        from cbp_server.app import StartError, serve

        shorten_collections()
        try:
            sys.exit(asyncio.run(serve(settings, engine)))
        except StartError as error:
            sys.exit(f"cbp-server: {error}")
    finally:
        engine.end()  # if the server has not come so far as to do so


if __name__ == "__main__":
    main()
