"""A Prometheus of one's own, set up as deploy/ has it, and what the panels of the dashboards there ask it."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx

DEPLOY = Path(__file__).parents[1] / "deploy"
SETUP = DEPLOY / "prometheus"
DASHBOARDS = tuple(sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")))


class Prometheus:
    """A Prometheus process that scrapes one server, and evaluates the alerts."""

    def __init__(self, binary: str, directory: Path, target: str, interval: str = "1s") -> None:
        """`target` is the host:port of a server's HTTP, `interval` the time between two scrapes."""
        config = (SETUP / "prometheus.yml").read_text()
        config = config.replace("server:8080", target).replace("15s", interval)
        (directory / "prometheus.yml").write_text(config)
        shutil.copy(SETUP / "alerts.yml", directory)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._log = (directory / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                binary,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        self._api = httpx.Client(
            base_url=f"http://{address}/api/v1", transport=httpx.HTTPTransport(retries=10), timeout=10
        )

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer; raises if it is no success."""
        response = self._api.get(path, params=parameters)
        body = response.json()
        assert body["status"] == "success", body
        return body["data"]

    def values(self, query: str) -> list[float]:
        """The value of each series that `query` finds now."""
        return [float(series["value"][1]) for series in self.get("/query", query=query)["result"]]

    def answers(self) -> bool:
        """Whether it has scraped the server by now."""
        try:
            return bool(self.values("up"))
        except (httpx.TransportError, ValueError):  # while it starts it answers in plain text
            return False

    def close(self) -> None:
        self._api.close()
        self._process.terminate()
        self._process.wait(30)
        self._log.close()


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """The panels that ask something, as the dashboard's JSON has them."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def filled_in(query: str, *, learner: str = ".*", window: str = "1m") -> str:
    """The query as Grafana sends it for learners that match, with every other variable at All."""
    query = query.replace("$__rate_interval", window).replace("$__range", window)
    query = query.replace("$learner", learner)
    query = re.sub(r"\$(instance|layer)\b", ".*", query)
    assert "$" not in query, query
    return query
