"""HTTP for people and tools: status page, read-only API, health, metrics."""

from cbp_server.web.app import create_app

__all__ = ["create_app"]
