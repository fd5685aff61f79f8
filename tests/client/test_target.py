"""Where a server is: addresses as users write them, proxies, and the event loop of a client."""

import asyncio
from typing import Any

import pytest

from cbp_client import AsyncClient, Client, ClientUnusable, InvalidArgument, StreamClosed, Unavailable
from cbp_client.target import address, proxy_hint
from tests.client.scripted_server import ScriptedServer

_NOWHERE = "http://name:secret@127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "http_proxy", "https_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("localhost", "localhost:50051"),
        ("localhost:1234", "localhost:1234"),
        ("cbp-server.models.svc", "cbp-server.models.svc:50051"),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[fe80::1%eth0]:99", "[fe80::1%eth0]:99"),
        ("dns:///server:50051", "dns:///server:50051"),
        ("unix:/run/cbp.sock", "unix:/run/cbp.sock"),
    ],
)
def test_a_port_is_added_where_there_is_none(given: str, used: str) -> None:
    assert address(given) == used


def test_a_url_is_refused_with_the_address_in_it() -> None:
    with pytest.raises(InvalidArgument, match=r"target: must be HOST:PORT without http://, such as server:50051$"):
        Client("http://server:50051/")


@pytest.mark.parametrize(
    ("target", "environment", "named"),
    [
        ("server:50051", {"http_proxy": _NOWHERE}, "http_proxy"),
        ("server:50051", {"http_proxy": "http://x:1", "grpc_proxy": _NOWHERE}, "grpc_proxy"),
        ("server:50051", {"http_proxy": _NOWHERE, "no_proxy": "other, .example.org"}, "http_proxy"),
        ("server:50051", {"http_proxy": _NOWHERE, "no_proxy": "other, SERVER"}, None),
        ("a.example.org:50051", {"https_proxy": _NOWHERE, "no_grpc_proxy": ".example.org"}, None),
        ("10.1.2.3:50051", {"http_proxy": _NOWHERE, "no_proxy": "10.0.0.0/8"}, None),
        ("dns:///server:50051", {"http_proxy": _NOWHERE}, "http_proxy"),
        ("localhost:50051", {"http_proxy": _NOWHERE}, None),
        ("[::1]:50051", {"http_proxy": _NOWHERE}, None),
        ("unix:/run/cbp.sock", {"http_proxy": _NOWHERE}, None),
        ("server:50051", {"HTTP_PROXY": _NOWHERE}, None),  # which gRPC does not read
        ("server:50051", {}, None),
    ],
)
def test_a_proxy_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, target: str, environment: dict[str, str], named: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hint = proxy_hint(target)

    if named is None:
        assert hint == ""
    else:
        host = target.rpartition("/")[2].partition(":")[0]
        assert f"by way of the proxy 127.0.0.1:9, which {named} in the environment names; no_proxy={host} goes" in hint
        assert "secret" not in hint


async def test_an_unreachable_proxy_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", _NOWHERE)
    async with AsyncClient("server.invalid", timeout=5) as client:
        with pytest.raises(Unavailable, match=r"no server answers at server\.invalid:50051 by way of the proxy 127\.0"):
            await client.delete_learner("clicks")


async def test_a_server_on_this_machine_is_reached_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedServer
) -> None:
    monkeypatch.setenv("http_proxy", _NOWHERE)
    async with AsyncClient(scripted.target, timeout=5) as client:
        assert (await client.get_learner("clicks")).id == "clicks"


async def test_an_asynchronous_client_is_made_before_there_is_a_loop(scripted: ScriptedServer) -> None:
    client = await asyncio.to_thread(AsyncClient, scripted.target)
    streams: list[Any] = []

    async def use() -> str:
        learner = await client.get_learner("clicks")
        streams.append(learner.stream("web"))
        await streams[-1].open()
        return learner.id

    for _ in range(2):  # each on a loop that ends with it
        assert await asyncio.to_thread(lambda: asyncio.run(use())) == "clicks"
    with pytest.raises(StreamClosed):
        await streams[0].send([[1.0]], [0])
    assert await use() == "clicks"
    with pytest.raises(ClientUnusable, match="in use on another event loop; make one for each") as caught:
        await asyncio.to_thread(lambda: asyncio.run(use()))
    assert caught.value.reason == "CLIENT_LOOP"
    await client.close()
    with pytest.raises(ClientUnusable, match="the client is closed"):
        await use()


async def test_no_timeout_means_no_limit(scripted: ScriptedServer) -> None:
    async with AsyncClient(scripted.target, timeout=None) as client:
        learner = await client.get_learner("clicks")
        await learner.predict([[1.0]], timeout=9)
    async with AsyncClient(scripted.target, timeout=7) as client:
        await client.get_learner("clicks")

    assert [left if left is None else round(left) for left in scripted.time_left] == [None, 9, 7]
