"""The connections to one origin.

A lease is the right to use one connection. At most `most` are out at once; who comes later waits, and the next lease
that ends passes to whoever has waited longest. Connections that nobody leases are kept open for `idle_seconds`, and
the one used last is used next, so that the others may expire.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from gateway.backends.client_dial import GOODBYE_SECONDS, Dialer
from gateway.backends.client_head import KnownHeads
from gateway.backends.client_protocol import Connection
from gateway.backends.client_request import Origin
from gateway.outbox import Outbox


class Pool:
    """An `Owner`. Every lease ends once: by `released`, by `dropped`, or because `open` fails."""

    def __init__(self, origin: Origin, dialer: Dialer, *, most: int, idle_seconds: float) -> None:
        self._origin = origin
        self._dialer = dialer
        self._most = most
        self._idle_seconds = idle_seconds
        self.leases = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.idle: dict[Connection, None] = {}
        self.sockets: set[Connection] = set()
        self._outbox = Outbox(asyncio.get_running_loop())
        self._heads = KnownHeads()
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None

    def take(self) -> Connection | None:
        """An idle connection, leased, if there is one and the caller need not wait."""
        if not self.idle or self.leases >= self._most:
            return None
        connection = self._pop_idle()
        if connection is not None:
            self.leases += 1
        return connection

    async def open(self, until: float, *, fresh: bool = False) -> Connection:
        """A leased connection, before that time of the loop's clock; `fresh`: not one that was used before. Raises
        OSError (TimeoutError is one)."""
        await self._lease(until)
        try:
            return (None if fresh else self._pop_idle()) or await self._dial(until)
        except BaseException:
            self._end_lease()
            raise

    async def aclose(self) -> None:
        """Breaks off what runs, refuses who waits, and gives TLS a moment to say goodbye."""
        self._closed = True
        for waiter in self.waiting:
            waiter.cancel()
        for connection in list(self.sockets):
            connection.end()
        try:
            if self.sockets:
                self._emptied = asyncio.get_running_loop().create_future()
                await asyncio.wait([self._emptied], timeout=GOODBYE_SECONDS)
        finally:
            for connection in list(self.sockets):
                connection.drop()

    async def _lease(self, until: float) -> None:
        if self.leases < self._most:
            self.leases += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        try:
            async with asyncio.timeout_at(until if until < math.inf else None):
                await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._end_lease()
            elif waiter in self.waiting:
                self.waiting.remove(waiter)
            raise

    def _end_lease(self) -> None:
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.leases -= 1

    def _pop_idle(self) -> Connection | None:
        while self.idle:
            connection, _ = self.idle.popitem()
            if connection.ready():
                return connection
            connection.drop()
        return None

    async def _dial(self, until: float) -> Connection:
        loop = asyncio.get_running_loop()
        connection = await self._dialer.dial(
            self._origin, lambda: Connection(self, loop, self._outbox, self._heads), until
        )
        if self._closed:
            connection.drop()
        if not connection.open or connection.transport.is_closing():
            raise ConnectionError("closed as soon as it was made")
        self.sockets.add(connection)
        return connection

    # --- what connections tell

    def released(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self.idle[connection] = None
            connection.wait_idle(self._idle_seconds)
        self._end_lease()

    def dropped(self, connection: Connection, *, leased: bool) -> None:
        self.idle.pop(connection, None)
        if leased:
            self._end_lease()

    def closed(self, connection: Connection) -> None:
        self.sockets.discard(connection)
        if self._emptied is not None and not self.sockets and not self._emptied.done():
            self._emptied.set_result(None)
