"""HTTP to upstreams: the seam between backends and whatever client carries the bytes (aiohttp, for now).

The client's rules: no redirects, no cookies, no proxy from the environment, identity encoding asked for, one time
limit each for connecting, for the first byte, for silence between reads, and in total. Reading pauses the socket.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import aiohttp
from aiohttp.connector import Connection

from gateway.errors import NeverSent, UpstreamError, UpstreamTimeout, UpstreamUnreachable

MAX_READ = 1 << 16


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None: no limit. `first_byte` counts from when the request leaves; a whole answer has none before it is
    done, so it is long."""

    connect: float | None = 5
    first_byte: float | None = 600
    idle: float | None = 120
    total: float | None = None


class Response(Protocol):
    """A reply whose head has come."""

    status: int
    headers: Mapping[str, str]
    """By name, whatever its case."""

    async def read(self) -> bytes:
        """The next bytes of the body, as they come; empty at its end."""

    async def read_all(self, limit: int) -> bytes:
        """The whole body. Raises UpstreamError if it is longer than `limit`."""

    def at_end(self) -> bool:
        """Has the end of the body been read?"""

    def close(self) -> None:
        """Gives the connection back after the end of the body, else drops it; a waiting read fails."""


class Transport(Protocol):
    """Raises UpstreamUnreachable (nothing was sent), UpstreamTimeout or UpstreamError."""

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeouts: Timeouts
    ) -> Response: ...

    async def aclose(self) -> None: ...


class AiohttpTransport:
    """One pool of connections for all backends of a worker. Make it inside the running loop."""

    def __init__(self, ca_file: str | None = None) -> None:
        context = ssl.create_default_context(cafile=ca_file) if ca_file else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=10, keepalive_timeout=15, ssl=context),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=64 << 10,
            max_field_size=64 << 10,
            read_bufsize=MAX_READ,
            request_class=_MarkedRequest,
        )

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeouts: Timeouts
    ) -> Response:
        limits = aiohttp.ClientTimeout(total=timeouts.total, connect=timeouts.connect, sock_connect=timeouts.connect)
        marker = _Marker(timeouts.first_byte)
        token = _marker.set(marker)
        try:
            with _Mapped():
                async with asyncio.timeout(None) as marker.timer:
                    response = await self._session.request(
                        method, url, headers=headers, data=body, timeout=limits, allow_redirects=False
                    )
        except asyncio.CancelledError:
            if marker.sent:
                raise
            raise NeverSent("The call was ended before it was sent.", log="ended before sending") from None
        finally:
            _marker.reset(token)
        return _AiohttpResponse(response, timeouts.idle)

    async def aclose(self) -> None:
        await self._session.close()


class _Marker:
    """Of one request: has it begun to leave? From then on the limit for its first byte runs."""

    def __init__(self, first_byte: float | None) -> None:
        self.sent = False
        self.timer: asyncio.Timeout
        self._first_byte = first_byte

    def set(self) -> None:
        self.sent = True
        if self._first_byte is not None:
            self.timer.reschedule(asyncio.get_running_loop().time() + self._first_byte)


_marker: ContextVar[_Marker] = ContextVar("marker")


class _MarkedRequest(aiohttp.ClientRequest):
    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        _marker.get().set()
        return await super().send(conn)


class _AiohttpResponse:
    def __init__(self, response: aiohttp.ClientResponse, idle: float | None) -> None:
        self._idle = idle
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        with _Mapped():
            async with asyncio.timeout(self._idle):
                return await self._response.content.readany()

    async def read_all(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while piece := await self.read():
            parts.append(piece)
            size += len(piece)
            if size > limit:
                self.close()
                raise UpstreamError("The upstream's reply is too large.", log=f"reply over {limit} bytes")
        return b"".join(parts)

    def at_end(self) -> bool:
        return self._response.content.at_eof()

    def close(self) -> None:
        if self.at_end():
            self._response.release()
        else:
            self._response.close()


class _Mapped:
    """The client's exceptions become ours, here and nowhere else."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if failure is None or isinstance(failure, asyncio.CancelledError):
            return
        cause = f"{type(failure).__name__}: {failure}"
        if isinstance(failure, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            raise UpstreamUnreachable("The upstream could not be reached.", log=cause) from failure
        if isinstance(failure, TimeoutError):
            raise UpstreamTimeout("The upstream did not answer in time.", log=cause) from failure
        if isinstance(failure, (aiohttp.ClientError, OSError, ValueError)):
            raise UpstreamError("The connection to the upstream broke.", log=cause) from failure
