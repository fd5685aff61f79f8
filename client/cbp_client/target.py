"""Where a server is: the address as users write it, and what may stand in between."""

import ipaddress
import os
import re
from urllib.parse import urlsplit

from cbp_client.arguments import invalid
from cbp_proto.plain import shown

DEFAULT_PORT = 50051
DEFAULT_TARGET = f"localhost:{DEFAULT_PORT}"

# What gRPC looks at, in this order; only the first that is set counts.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")

# Name resolvers of gRPC, each with an address of its own form behind it.
_RESOLVERS = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|google-c2p):")
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@\[\]]+)(:(?P<port>\d+))?")


def address(target: object) -> str:
    """The address that gRPC is given for what a user gives: host and port, 50051 if there is none.

    Raises:
        InvalidArgument: it is no address.
    """
    if not isinstance(target, str):
        raise invalid("target", f"must be a text such as {DEFAULT_TARGET}, not {shown(target)}")
    if _RESOLVERS.match(target):
        return target
    scheme, found, rest = target.partition("://")
    if found:
        raise invalid("target", f"must be HOST:PORT without {scheme}://, such as {rest.rstrip('/') or DEFAULT_TARGET}")
    parts = _HOST_AND_PORT.fullmatch(f"[{target}]" if _is_ipv6(target) else target)
    if parts is None or not 0 < int(parts["port"] or DEFAULT_PORT) < 2**16:
        raise invalid("target", f"must be HOST:PORT, such as {DEFAULT_TARGET}, not {shown(target)}")
    return f"{parts['host']}:{parts['port'] or DEFAULT_PORT}"


def is_loopback(address: str) -> bool:
    """Whether the server is on this machine, where no proxy leads."""
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost") or address.startswith(("unix:", "unix-abstract:"))


def proxy_hint(address: str) -> str:
    """What to say of an HTTP proxy that the environment puts in front of the address; empty if there is none."""
    name = next((name for name in _PROXIES if os.environ.get(name)), None)
    host = _host(address)
    if name is None or is_loopback(address) or _excepted(host):
        return ""
    proxy = urlsplit(os.environ[name]).netloc.rpartition("@")[2] or "?"  # without name and password
    return f" by way of the proxy {proxy}, which {name} in the environment names; no_proxy={host} goes without it"


def _excepted(host: str) -> bool:
    listed = next((os.environ[name] for name in _EXCEPTIONS if os.environ.get(name)), "")
    entries = [entry.strip().lower() for entry in listed.split(",")]
    return any(entry and (host.lower().endswith(entry) or _contains(entry, host)) for entry in entries)


def _contains(network: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _host(address: str) -> str:
    resolver = _RESOLVERS.match(address)
    bare = address[resolver.end() :].rpartition("/")[2] if resolver else address
    return bare.rpartition(":")[0].strip("[]") or bare


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False
