"""gRPC and HTTP listen where `--host` says, both at the same addresses."""

import socket

import pytest

from cbp_server.process.addresses import listen, listening_addresses, port_of, with_port


def present(address: str) -> bool:
    try:
        return listening_addresses(address) == [address]
    except OSError:
        return False


LOOPBACKS = [address for address in ("127.0.0.1", "127.0.0.2", "::1") if present(address)]
needs_ipv6 = pytest.mark.skipif("::1" not in LOOPBACKS, reason="this machine has no IPv6")


@pytest.fixture
def names(monkeypatch):
    """Names and their addresses, as a resolver would have them."""
    known: dict[str, list[str]] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return [found for address in known.get(host, [host]) for found in resolve(address, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@needs_ipv6
def test_a_name_stands_for_all_its_addresses_once(names):
    names["here"] = ["127.0.0.1", "::1", "127.0.0.1", "127.0.0.2"]
    assert listening_addresses("here") == ["127.0.0.1", "::1", "127.0.0.2"]
    assert listening_addresses("127.0.0.1") == ["127.0.0.1"]


def test_addresses_that_this_machine_has_not_are_left_out(names):
    names["here"] = ["192.0.2.7", "127.0.0.1", "2001:db8::7"]
    assert listening_addresses("here") == ["127.0.0.1"]
    with pytest.raises(OSError, match="Cannot assign requested address"):
        listening_addresses("192.0.2.7")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_is_every_interface_of_both_families(monkeypatch, host):
    for has_ipv6, every in ((True, "::"), (False, "0.0.0.0")):
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda has_ipv6=has_ipv6: has_ipv6)
        assert listening_addresses(host) == [every]


@pytest.mark.parametrize("addresses", [LOOPBACKS, pytest.param(["::"], marks=needs_ipv6)])
def test_one_port_at_every_address(addresses):
    listeners = listen(addresses, 0)
    try:
        assert len({port_of(listener) for listener in listeners}) == 1
        for address in LOOPBACKS:
            socket.create_connection((address, port_of(listeners[0])), timeout=10).close()
    finally:
        for listener in listeners:
            listener.close()


def test_a_port_that_is_taken_at_one_address_is_taken():
    with socket.create_server(("127.0.0.2", 0)) as taken:
        with pytest.raises(OSError, match="Address already in use"):
            listen(["127.0.0.1", "127.0.0.2"], port_of(taken))
        socket.create_server(("127.0.0.1", port_of(taken))).close()  # nothing was kept of the attempt


def test_an_ipv6_address_stands_in_brackets():
    assert (with_port("::1", 80), with_port("localhost", 80)) == ("[::1]:80", "localhost:80")
