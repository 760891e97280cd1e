"""Where a request comes from: IP addresses as sockets and proxies tell them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_MOST_SHOWN = 64


def is_loopback(address: str | None) -> bool:
    found = _parsed(address)
    return found is not None and found.is_loopback


def client_address(peer: str | None, headers: Iterable[tuple[bytes, bytes]], trusted: tuple[str, ...]) -> str | None:
    """The peer of the socket, or what the last trusted proxy says of its own: hops are counted from the right."""
    if not trusted:
        return peer
    told = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1")
    for earlier in [part.strip() for part in reversed(told.split(",")) if part.strip()]:
        if not _is_among(peer, trusted):
            break
        peer = earlier[:_MOST_SHOWN]
    return peer


def neighbourhood(address: str | None) -> str:
    """What one client can be taken to have: an IPv4 address, or the /64 that its IPv6 address is in."""
    found = _parsed(address)
    if found is None:
        return address or ""
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(found), 64), strict=False))
    return str(found)


def _parsed(address: str | None) -> Address | None:
    """None: it is none. An IPv4 address in IPv6's clothes, as a socket of both versions shows it, is the former."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _is_among(address: str | None, networks: tuple[str, ...]) -> bool:
    found = _parsed(address)
    return found is not None and any(found in network for network in _networks(networks))


@functools.lru_cache(maxsize=8)
def _networks(texts: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)
