"""What others see of a server that is not up yet."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

from cbp_client import Client, Unavailable

SPEC = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.05},
}
#: While there is a pipe at this place, the catalog is read only when the test has opened the pipe and closed it again.
SLOW_CATALOG = """
import os, pathlib
if "SLOW_CATALOG" in os.environ:
    from cbp_server.store import catalog

    read = catalog.Catalog.learners

    def learners(self):
        pipe = pathlib.Path(os.environ["SLOW_CATALOG"])
        if pipe.exists():
            pipe.read_bytes()
        return read(self)

    catalog.Catalog.learners = learners
"""


class SlowServer(ServerProcess):
    def __init__(self, directory: Path, *flags: str) -> None:
        super().__init__(directory / "data", *flags)
        self.pipe = directory / "catalog"

    def environment(self) -> dict[str, str]:
        place = self.pipe.parent
        (place / "sitecustomize.py").write_text(SLOW_CATALOG)
        path = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
        return super().environment() | {"PYTHONPATH": path, "SLOW_CATALOG": str(self.pipe)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SlowServer]:
    server = SlowServer(tmp_path)
    server.start()
    yield server
    server.close()


def test_a_learner_is_never_said_to_be_missing_while_the_catalog_is_read(server: SlowServer) -> None:
    with Client(server.grpc_target) as client:
        client.create_learner("clicks", **SPEC)
    assert server.stop() == 0
    os.mkfifo(server.pipe)
    server.launch()
    with server.pipe.open("wb"):  # opens when the server reads
        server.pipe.unlink()
        with Client(server.grpc_target, timeout=0.5) as client, pytest.raises(Unavailable):
            client.get_learner("clicks")
    server.wait_until_ready()
    with Client(server.grpc_target) as client:
        assert client.get_learner("clicks").id == "clicks"
