"""Where a server listens, and what it does when it can take no more connections."""

import http.client
import json
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import ServerProcess, wait_until

from cbp_server.process.addresses import listening_addresses, with_port


def has_ipv6() -> bool:
    try:
        return listening_addresses("::1") == ["::1"]
    except OSError:
        return False


def http_status(address: str, port: int) -> int:
    connection = http.client.HTTPConnection(address, port, timeout=30)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status
    finally:
        connection.close()


def is_serving(address: str, port: int) -> bool:
    with grpc.insecure_channel(with_port(address, port)) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_both_protocols_listen_where_host_says(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--host", "::1")
    endpoints = json.loads((server.data_dir / "endpoints.json").read_text())
    assert (endpoints["host"], endpoints["addresses"]) == ("::1", ["::1"])
    assert http_status("::1", endpoints["http_port"]) == 200
    assert is_serving("::1", endpoints["grpc_port"])
    [told] = [event for event in server.log_events() if event["event"] == "serving"]
    assert told["grpc"] == f"[::1]:{endpoints['grpc_port']}"
    assert told["http"] == f"http://[::1]:{endpoints['http_port']}"


def test_used_up_descriptors_are_told_in_few_words_and_it_serves_once_there_are_some(server: ServerProcess) -> None:
    port = int(server.http_url.rpartition(":")[2])
    used = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    lines = len(server.log.splitlines())
    event = "new connections wait: no file descriptor is left; raise the limit (ulimit -n), or have fewer clients"

    def told() -> int:
        return sum(line["event"] == event for line in server.log_events())

    with ExitStack() as closing:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 5, before[1]))
        closing.callback(resource.prlimit, server.pid, resource.RLIMIT_NOFILE, before)
        for _ in range(20):
            closing.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(lambda: told() == 1)
    assert http_status("127.0.0.1", port) == 200
    assert told() == 1
    assert len(server.log.splitlines()) - lines < 10
