"""Where the server listens: a host's addresses, the same for every protocol.

gRPC and uvicorn would each read a name in their own way: one listens on all of its addresses, the other on the first.
"""

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack

_EVERY_IPV6, _EVERY_IPV4 = "::", "0.0.0.0"  # noqa: S104
#: Of an address that this machine does not have, or of a kind that it does not have.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listening_addresses(host: str) -> list[str]:
    """Every address of this machine that `host` names, in the order in which it is resolved.

    A wildcard stands for every interface with IPv4 and IPv6, whichever of the two it is written in, because gRPC knows
    no other: it is `::` where the machine has IPv6.

    Raises:
        OSError: the name cannot be resolved, or none of its addresses is this machine's.
    """
    resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys(_numeric(sockaddr) for *_, sockaddr in resolved))
    if not {_EVERY_IPV6, _EVERY_IPV4}.isdisjoint(addresses):
        return [_EVERY_IPV6 if socket.has_dualstack_ipv6() else _EVERY_IPV4]
    present: list[str] = []
    for address in addresses:
        try:
            _bound(address, 0).close()
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            absent = error
        else:
            present.append(address)
    if not present:
        raise absent
    return present


def listen(addresses: Sequence[str], port: int) -> list[socket.socket]:
    """A listening socket for each address, all on one port; with port 0 the system chooses it.

    Raises:
        OSError: the port is taken at one of them.
    """
    with ExitStack() as closing:
        sockets: list[socket.socket] = []
        for address in addresses:
            listener = _bound(address, port)
            closing.callback(listener.close)
            sockets.append(listener)
            port = port_of(listener)
        for listener in sockets:
            listener.listen()
        closing.pop_all()
        return sockets


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def with_port(host: str, port: int) -> str:
    """As in a URL: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bound(address: str, port: int) -> socket.socket:
    family, kind, protocol, _, sockaddr = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address == _EVERY_IPV6 else 1)
        bound.bind(sockaddr)
    except BaseException:
        bound.close()
        raise
    return bound


def _numeric(sockaddr: tuple[object, ...]) -> str:
    host, _ = socket.getnameinfo(sockaddr, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)  # type: ignore[arg-type]
    return host
