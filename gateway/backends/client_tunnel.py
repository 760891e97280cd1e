"""The way through an HTTP proxy: CONNECT for every origin, http as well as https, so that the proxy passes bytes and
nothing else. Of the ways to say who we are it knows Basic. Upstreams on this machine are reached without it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Self, TypeVar, cast
from urllib.parse import unquote, urlsplit

from gateway.backends.client_request import Origin, ascii_host, bracketed

MAX_ANSWER = 1 << 16
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: ([^\r\n]*))?\r\n")
P = TypeVar("P", bound=asyncio.BaseProtocol)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it is, and the value of `proxy-authorization`, if it wants one."""

    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"proxy {bracketed(self.host)}:{self.port}"

    def serves(self, origin: Origin) -> bool:
        return not _is_here(origin.host)

    def request(self, origin: Origin) -> bytes:
        place = f"{bracketed(origin.host)}:{origin.port}"
        who = "" if self.credentials is None else f"proxy-authorization: {self.credentials}\r\n"
        return f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\n{who}\r\n".encode("ascii")


def proxy_of(url: str) -> Proxy:
    """From `http://[user:password@]host:port`; user and password may be percent-encoded. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.port is None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("the proxy is not http://[user:password@]host:port")
    credentials = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = f"Basic {b64encode(pair.encode()).decode('ascii')}"
    return Proxy(ascii_host(parts.hostname or ""), parts.port, credentials)


def _is_here(host: str) -> bool:
    name = host.rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    plain = getattr(address, "ipv4_mapped", None) or address
    return plain.is_loopback or plain.is_unspecified


class Tunnel(asyncio.Protocol):
    """A connection through a proxy on its way to become one to an origin. Whatever fails is an OSError (or ValueError,
    from TLS); the caller then aborts `transport`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.transport: asyncio.Transport
        self._loop = loop
        self._came = b""
        self._cause = "it hung up"
        self._answered: asyncio.Future[tuple[int, str] | None] = loop.create_future()
        self._spoiled = False

    @classmethod
    async def open(cls, proxy: Proxy, origin: Origin, family: int, address: str) -> Self:
        """To an address of the proxy, up to a good answer."""
        loop = asyncio.get_running_loop()
        _, tunnel = await loop.create_connection(lambda: cls(loop), address, proxy.port, family=family)
        try:
            tunnel.transport.write(proxy.request(origin))
            answer = await tunnel._answered
            if answer is None:
                raise ConnectionError(f"no answer to CONNECT: {tunnel._cause}")
            if not 200 <= answer[0] < 300:
                raise ConnectionError(f"CONNECT was refused: {answer[0]} {answer[1]}".rstrip())
            tunnel._must_be_clean()
        except BaseException:
            tunnel.transport.abort()
            raise
        return tunnel

    async def secure(self, context: ssl.SSLContext, name: str, goodbye: float) -> None:
        """TLS with the origin, inside."""
        made = await self._loop.start_tls(
            self.transport, self, context, server_hostname=name, ssl_shutdown_timeout=goodbye
        )
        self.transport = cast(asyncio.Transport, made)

    def hand_over(self, protocol: P) -> P:
        """What comes from now on is the protocol's."""
        self._must_be_clean()
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        return protocol

    def _must_be_clean(self) -> None:
        if self._spoiled or self.transport.is_closing():
            raise ConnectionError("closed, or bytes that nobody asked for, as soon as it was made")

    # --- the loop's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def data_received(self, data: bytes) -> None:
        if self._answered.done():
            self._spoiled = True
            return
        self._came += data
        while (end := self._came.find(b"\r\n\r\n")) >= 0:
            head, self._came = self._came[: end + 2], self._came[end + 4 :]
            found = _STATUS.match(head)
            if found is None:
                self._fail("it speaks no HTTP")
            elif (status := int(found[1])) >= 200:
                self._spoiled = bool(self._came)
                self._answered.set_result((status, _printable(found[2] or b"")))
            if self._answered.done():
                return
        if len(self._came) > MAX_ANSWER:
            self._fail("its answer is too large")

    def eof_received(self) -> None:
        self._fail("it hung up")

    def connection_lost(self, cause: Exception | None) -> None:
        self._fail(f"{type(cause).__name__}: {cause}" if cause else "it hung up")

    def _fail(self, cause: str) -> None:
        self._spoiled = True
        if not self._answered.done():
            self._cause = cause
            self._answered.set_result(None)


def _printable(phrase: bytes) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", phrase.decode("latin-1"))[:80]
