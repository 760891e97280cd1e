"""New connections: the addresses of a name, tried in order, and TLS on top; through a proxy if there is one."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from gateway.backends.client_request import Origin
from gateway.backends.client_tunnel import Proxy, Tunnel, proxy_of
from gateway.backends.transport import Access

KNOWN_SECONDS = 10.0
FAILED_SECONDS = 1.0
GOODBYE_SECONDS = 1.0
Address = tuple[socket.AddressFamily, str]
P = TypeVar("P", bound=asyncio.BaseProtocol)


@dataclass(slots=True)
class Found:
    """What a look-up gave, and until when it is believed. `addresses` of the loop's own kind; the best one first."""

    until: float
    addresses: list[Address] = field(default_factory=list)
    failure: str | None = None


class Names:
    """Addresses of names. Asked once for all who wait at the same time."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Found] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[Found]] = {}

    async def find(self, host: str, port: int) -> Found:
        """Raises OSError."""
        found = self._found.get((host, port))
        if found is None or found.until < asyncio.get_running_loop().time():
            task = self._asking.get((host, port))
            if task is None:
                task = self._asking[host, port] = asyncio.create_task(self._ask(host, port))
            found = await asyncio.shield(task)
        if found.failure is not None:
            raise OSError(found.failure)
        return found

    def forget(self, host: str, port: int) -> None:
        self._found.pop((host, port), None)

    def close(self) -> None:
        for task in self._asking.values():
            task.cancel()

    async def _ask(self, host: str, port: int) -> Found:
        loop = asyncio.get_running_loop()
        try:
            listed = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses: list[Address] = [(family, str(address[0])) for family, _, _, _, address in listed]
            found = Found(loop.time() + KNOWN_SECONDS, addresses)
        except (OSError, UnicodeError) as failure:
            found = Found(loop.time() + FAILED_SECONDS, failure=f"{type(failure).__name__}: {failure}")
        finally:
            del self._asking[host, port]
        self._found[host, port] = found
        return found


class Dialer:
    """Makes connections. The certificate authorities of the system are read when the first one needs them."""

    def __init__(self, access: Access) -> None:
        """Raises OSError (ssl.SSLError is one) for files that cannot be used, ValueError for a proxy that is none."""
        self._names = Names()
        self._proxy = None if access.proxy is None else proxy_of(access.proxy)
        self._context: ssl.SSLContext | None = None
        if access.ca_file is not None or access.client_cert is not None:
            self._context = tls_context(access)

    async def dial(self, origin: Origin, make: Callable[[], P], until: float) -> P:
        """A connection, made before that time of the loop's clock. Raises OSError (TimeoutError is one)."""
        proxy = self._proxy if self._proxy is not None and self._proxy.serves(origin) else None
        if proxy is None:
            return await self._dial(origin.host, origin.port, partial(self._connect, origin, make), until)
        try:
            return await self._dial(proxy.host, proxy.port, partial(self._tunnel, proxy, origin, make), until)
        except OSError as failure:
            raise OSError(f"{proxy}: {type(failure).__name__}: {failure}") from failure

    async def _dial(self, host: str, port: int, connect: Callable[[Address], Awaitable[P]], until: float) -> P:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout_at(until if until < math.inf else None):
            found = await self._names.find(host, port)
            failures: list[str] = []
            for number, address in enumerate(list(found.addresses)):
                left = len(found.addresses) - number
                share = loop.time() + (until - loop.time()) / left if left > 1 and until < math.inf else None
                try:
                    async with asyncio.timeout_at(share):
                        protocol = await connect(address)
                except (OSError, ValueError) as failure:
                    failures.append(f"{address[1]}: {type(failure).__name__}: {failure}")
                    continue
                if number:
                    found.addresses = [address, *(other for other in found.addresses if other != address)]
                return protocol
            self._names.forget(host, port)
            raise OSError("; ".join(failures) or "the name has no address")

    def close(self) -> None:
        self._names.close()

    async def _connect(self, origin: Origin, make: Callable[[], P], address: Address) -> P:
        loop = asyncio.get_running_loop()
        family, host = address
        if not origin.secure:
            return (await loop.create_connection(make, host, origin.port, family=family))[1]
        made = await loop.create_connection(
            make,
            host,
            origin.port,
            family=family,
            ssl=self._trusted(),
            server_hostname=origin.host.rstrip("."),
            ssl_shutdown_timeout=GOODBYE_SECONDS,
        )
        return made[1]

    async def _tunnel(self, proxy: Proxy, origin: Origin, make: Callable[[], P], address: Address) -> P:
        tunnel = await Tunnel.open(proxy, origin, *address)
        try:
            if origin.secure:
                await tunnel.secure(self._trusted(), origin.host.rstrip("."), GOODBYE_SECONDS)
            return tunnel.hand_over(make())
        except BaseException:
            tunnel.transport.abort()
            raise

    def _trusted(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = tls_context(Access())
        return self._context


def tls_context(access: Access) -> ssl.SSLContext:
    """Raises OSError. A key that wants a pass phrase cannot be used: nobody is there to type it."""
    context = ssl.create_default_context(cafile=access.ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if access.client_cert is not None:
        context.load_cert_chain(access.client_cert, access.client_key, password=_no_pass_phrase)
    return context


def _no_pass_phrase() -> str:
    raise OSError("the key wants a pass phrase")
