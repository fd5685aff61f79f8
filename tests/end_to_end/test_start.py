"""What others see of a server that is not up yet."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess, wait_until

from cbp_client import Client, Unavailable

SPEC = {
    "network": {"kind": "mlp", "in_features": 4, "hidden": [8], "out_features": 3},
    "loss": "cross_entropy",
    "optimizer": {"kind": "sgd", "lr": 0.05},
}
#: Lets the server's catalog be read only when the test says so.
SLOW_CATALOG = """
import os, pathlib, time
if "SLOW_CATALOG" in os.environ:
    from cbp_server.store import catalog

    read = catalog.Catalog.learners

    def learners(self):
        place = pathlib.Path(os.environ["SLOW_CATALOG"])
        (place / "reading").touch()
        while not (place / "go").exists():
            time.sleep(0.01)
        return read(self)

    catalog.Catalog.learners = learners
"""


class SlowServer(ServerProcess):
    def __init__(self, directory: Path, *flags: str) -> None:
        super().__init__(directory / "data", *flags)
        self.place = directory

    def environment(self) -> dict[str, str]:
        (self.place / "sitecustomize.py").write_text(SLOW_CATALOG)
        path = os.pathsep.join(filter(None, (str(self.place), os.environ.get("PYTHONPATH"))))
        return super().environment() | {"PYTHONPATH": path, "SLOW_CATALOG": str(self.place)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SlowServer]:
    server = SlowServer(tmp_path)
    (tmp_path / "go").touch()
    server.start()
    yield server
    (tmp_path / "go").touch()  # or it would not end
    server.close()


def test_a_learner_is_never_said_to_be_missing_while_the_catalog_is_read(server: SlowServer) -> None:
    with Client(server.grpc_target) as client:
        client.create_learner("clicks", **SPEC)
    assert server.stop() == 0
    for name in ("go", "reading"):
        (server.place / name).unlink()
    server.launch()
    wait_until((server.place / "reading").exists)
    with Client(server.grpc_target, timeout=0.5) as client, pytest.raises(Unavailable):
        client.get_learner("clicks")
    (server.place / "go").touch()
    server.wait_until_ready()
    with Client(server.grpc_target) as client:
        assert client.get_learner("clicks").id == "clicks"
