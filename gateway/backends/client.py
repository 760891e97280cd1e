"""The HTTP/1.1 client for upstreams: a `Transport` on asyncio and httptools that does what a gateway needs.

    HTTPTransport       one `send` from start to end: this module
      client_request    method, URL and headers to bytes
      client_upload     bodies that come piece by piece
      client_pool       leases of connections, one pool for each origin
      client_dial       new connections: names, addresses, TLS
      client_tunnel     CONNECT, where connections go through a proxy
      client_protocol   one socket, one exchange after another
      client_reply      the reply: parser, buffer, time limits
      client_head       heads of replies, and those that need no parser
      client_inflate    replies that come compressed unasked

Rules:

- Redirects are not followed, cookies not kept, proxies of the environment not used, only the one that was given.
- A connection is used again only after a reply of known length came to a clean end and the whole request was sent;
  never after an error, an end that was not asked for, or bytes that belong to no reply. Before a connection that was
  idle is used, the kernel is asked whether the upstream has hung up.
- The upstream may still hang up while a request is on its way to it. If not a byte of a reply has come then, a GET or
  HEAD on a connection that was used before is sent once again on a new one. Anything else is not: nobody can know
  whether the upstream has read it and begun to work, so it is an UpstreamError, and the relay decides.
- UpstreamUnreachable means that nothing was sent; NeverSent, that the client was closed before anything was. Who is
  cancelled before anything was sent gets a CancelledError that says so (UNSENT).
  Everything after the first write is UpstreamTimeout or UpstreamError.
- A final reply that comes before the request has left is read as it comes; if it is a refusal, sending stops.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.backends.client_dial import Dialer
from gateway.backends.client_inflate import ENCODINGS, InflatedReply
from gateway.backends.client_pool import Pool
from gateway.backends.client_protocol import Connection
from gateway.backends.client_reply import Reply, broken
from gateway.backends.client_request import Origin, Target, header_lines, target_of
from gateway.backends.client_upload import Upload
from gateway.backends.transport import Access, Body, Response, Timeouts
from gateway.errors import UNSENT, NeverSent, UpstreamError, UpstreamUnreachable

_REPEATABLE = frozenset({"GET", "HEAD"})
_KEPT_WAYS = 1024
_KEPT_HEADERS = 128


@dataclass(slots=True)
class _Way:
    """What a method and a URL come to. `lines`: those of the headers that went there last."""

    target: Target
    pool: Pool
    headers: Mapping[str, str] = field(default_factory=dict)
    lines: bytes = b""


class HTTPTransport:
    """One pool of connections for each origin. Make it inside the running loop."""

    def __init__(
        self,
        access: Access | None = None,
        *,
        max_connections_per_origin: int = 20_000,
        idle_seconds: float = 15,
    ) -> None:
        """Raises OSError for files that cannot be used."""
        self._loop = asyncio.get_running_loop()
        self._dialer = Dialer(access or Access())
        self._most = max_connections_per_origin
        self._idle_seconds = idle_seconds
        self.pools: dict[Origin, Pool] = {}
        self._ways: dict[tuple[str, str], _Way] = {}
        self._header_lines = functools.lru_cache(_KEPT_HEADERS)(header_lines)
        self._closed = False

    async def send(self, method: str, url: str, headers: Mapping[str, str], body: Body, timeouts: Timeouts) -> Response:
        upload = None
        if body is not None and not isinstance(body, bytes):
            upload, body = Upload(body), None
        try:
            way = self._ways.get((method, url)) or self._way(method, url)
            if way.headers is not headers:
                way.headers, way.lines = headers, self._header_lines(tuple(headers.items()))
            head = way.target.head(way.lines, body, in_chunks=upload is not None)
        except ValueError as failure:
            raise UpstreamError("The request to the upstream cannot be sent.", log=str(failure)) from None
        pool = way.pool
        end = math.inf if timeouts.total is None else self._loop.time() + timeouts.total
        connection = pool.take() or await self._connection(pool, timeouts, end)
        repeatable = connection.used and method in _REPEATABLE and upload is None
        bodiless = method == "HEAD"
        reply = connection.begin(head, upload or body, bodiless=bodiless, timeouts=timeouts, end=end)
        try:
            await reply.head_came(timeouts.first_byte)
            reply.check_head()
        except UpstreamError as failure:
            reply.close()
            if upload is not None and upload.failure is not None:
                raise upload.failure from None
            if not repeatable or not reply.untouched() or failure.code == "upstream_timeout":
                raise
            connection = await self._connection(pool, timeouts, end, fresh=True)
            reply = connection.begin(head, body, bodiless=bodiless, timeouts=timeouts, end=end)
            await _head_of(reply, timeouts)
        except BaseException:
            reply.close()
            raise
        return _readable(reply) if "content-encoding" in reply.headers else reply

    async def aclose(self) -> None:
        self._closed = True
        self._dialer.close()
        await asyncio.gather(*(pool.aclose() for pool in self.pools.values()))

    def _way(self, method: str, url: str) -> _Way:
        target = target_of(method, url)
        pool = self.pools.get(target.origin)
        if pool is None:
            pool = Pool(target.origin, self._dialer, most=self._most, idle_seconds=self._idle_seconds)
            self.pools[target.origin] = pool
        if len(self._ways) >= _KEPT_WAYS:
            self._ways.clear()
        way = self._ways[method, url] = _Way(target, pool)
        return way

    async def _connection(self, pool: Pool, timeouts: Timeouts, end: float, *, fresh: bool = False) -> Connection:
        until = end if timeouts.connect is None else min(end, self._loop.time() + timeouts.connect)
        try:
            if self._closed:
                raise OSError("the client is closed")
            return await pool.open(until, fresh=fresh)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError(UNSENT) from None
            raise NeverSent("The call was ended before it was sent.", log="the client was closed") from None
        except (OSError, ValueError) as failure:
            cause = f"{type(failure).__name__}: {failure}"
            raise UpstreamUnreachable("The upstream could not be reached.", log=cause) from failure


async def _head_of(reply: Reply, timeouts: Timeouts) -> None:
    try:
        await reply.head_came(timeouts.first_byte)
        reply.check_head()
    except BaseException:
        reply.close()
        raise


def _readable(reply: Reply) -> Response:
    encoding = reply.headers["content-encoding"].strip().lower()
    if encoding in ("", "identity"):
        return reply
    if encoding not in ENCODINGS:
        reply.close()
        raise broken(f"content-encoding {encoding!r} was not asked for")
    return InflatedReply(reply, encoding)
