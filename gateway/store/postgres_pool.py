"""The connections to one PostgreSQL, at most so many.

A pool of our own because taking and giving back are all that most calls add to a statement: here they are a pop and an
append, where asyncpg's makes two proxies, a task and a reset. Who has waited longest is first. The connection that was
given back last is taken first, so those that are not needed are left alone, until they are closed for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from gateway.errors import DatabaseUnavailable

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

IDLE_SECONDS = 300.0
"""So long a connection may lie and be used again: firewalls forget one without a word. The last one lies on."""


class Pool:
    """Make it inside the running loop. Every connection that is taken must be given back or dropped."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], most: int) -> None:
        self._connect = connect
        self._most = most
        self.loop = asyncio.get_running_loop()
        self._open: set[Connection] = set()
        self._stale: set[Connection] = set()
        self._ended: set[object] = set()
        """Those of the open ones that have said so: to ask each of them takes longer, and each call wants to know."""
        self._connecting = 0
        self._idle: deque[tuple[Connection, float]] = deque()
        """With the time since when, oldest first."""
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        """None is a place: the waiter may connect by itself. It is counted in `_connecting` already."""
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._returned = asyncio.Event()

    @property
    def size(self) -> int:
        """Connections that are open, or being made."""
        return len(self._open) + self._connecting

    @property
    def busy(self) -> int:
        return self.size - len(self._idle)

    @property
    def is_cut(self) -> bool:
        """Was a free connection closed by the other side?"""
        return bool(self._ended) and any(connection in self._ended for connection, _ in self._idle)

    def take_idle(self) -> Connection | None:
        """A free connection, if there is one: what `take` gives without waiting."""
        while self._idle:
            connection, since = self._idle.pop()
            if not connection.is_closed() and since > self.loop.time() - IDLE_SECONDS:
                return connection
            self.drop(connection)
        return None

    async def take(self) -> Connection:
        """A free connection, a new one, or the next that is given back; whatever connecting raises."""
        if (idle := self.take_idle()) is not None:
            return idle
        if self._closing:
            raise DatabaseUnavailable("the database is closed")
        if self.size < self._most:
            self._connecting += 1
            return await self._make()
        return await self._handed() or await self._make()

    def give(self, connection: Connection) -> None:
        """Back from one who is done with it, outside a transaction."""
        if connection.is_closed() or connection in self._stale:
            self.drop(connection)
            return
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append((connection, self.loop.time()))
        self._returned.set()
        if self._timer is None and not self._closing:
            self._timer = self.loop.call_later(IDLE_SECONDS, self._close_unused)

    def drop(self, connection: Connection) -> None:
        """Away with it, without waiting for the server."""
        self._open.discard(connection)
        self._stale.discard(connection)
        self._ended.discard(connection)
        connection.terminate()
        self._returned.set()
        self._offer_place()

    def expire(self) -> None:
        """No connection of now is used again: those that are free go at once, the others when they come back."""
        self._stale = set(self._open)
        while self._idle:
            self.drop(self._idle.pop()[0])

    async def close(self) -> None:
        """Waits for those at work, then says goodbye to the server. Cancelled, it drops what is still open."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        try:
            while self._open or self._connecting:
                self._returned.clear()
                leaving = [connection for connection, _ in self._idle]
                self._idle.clear()
                await asyncio.gather(*(connection.close() for connection in leaving))
                self._open.difference_update(leaving)
                if self._open or self._connecting:
                    await self._returned.wait()
        finally:
            for connection in list(self._open):
                self.drop(connection)

    async def _make(self) -> Connection:
        try:
            connection = await self._connect()
        except BaseException:
            self._connecting -= 1
            self._returned.set()
            self._offer_place()
            raise
        self._connecting -= 1
        self._open.add(connection)
        connection.add_termination_listener(self._has_ended)
        if connection.is_closed():  # before anybody listened
            self._ended.add(connection)
        return connection

    def _has_ended(self, connection: object) -> None:
        """Said after the fact: it may have been dropped by now."""
        if connection in self._open:
            self._ended.add(connection)

    async def _handed(self) -> Connection | None:
        waiter: asyncio.Future[Connection | None] = self.loop.create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it came in the same moment: the next one's
                self._pass_on(waiter.result())
            raise

    def _pass_on(self, handed: Connection | None) -> None:
        if handed is None:
            self._connecting -= 1
            self._offer_place()
        else:
            self.give(handed)

    def _offer_place(self) -> None:
        while self._waiting and self.size < self._most:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._connecting += 1
                waiter.set_result(None)

    def _close_unused(self) -> None:
        self._timer = None
        now = self.loop.time()
        while len(self._idle) > 1 and self._idle[0][1] <= now - IDLE_SECONDS:
            self.drop(self._idle.popleft()[0])
        if len(self._idle) > 1:
            self._timer = self.loop.call_at(self._idle[0][1] + IDLE_SECONDS, self._close_unused)
