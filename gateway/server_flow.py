"""What lies between an answer and its socket: when more is read, where it is written, who closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sized

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from gateway.outbox import Outbox

__all__ = ["GatewayFlow", "Outlet", "outbox_of"]


_MOST_HELD = 64 * 1024
"""Bytes of one connection that wait for others', and that are copied to leave in one piece."""


class GatewayFlow(FlowControl):
    """Reads on only when no request is queued, and remembers since when."""

    def __init__(self, transport: asyncio.Transport, queued: Sized) -> None:
        super().__init__(transport)
        self._queued = queued
        self.resumed_at = 0.0

    def resume_reading(self) -> None:
        if self.read_paused and not self._queued:
            super().resume_reading()
            self.resumed_at = time.monotonic()


class Outlet:
    """A connection's way out, for its cycles and for the protocol: what is written leaves in that order, and before
    the connection closes. The protocol decides how to close (`leave`)."""

    __slots__ = ("_held", "_leave", "_outbox", "_size", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, outbox: Outbox, leave: Callable[[], None]) -> None:
        self._transport = transport
        self._outbox = outbox
        self._leave = leave
        self._held: list[bytes] = []
        self._size = 0  # of what is held, if anything is
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """At once."""
        if self._held:
            self._held.append(data)
            self.flush()
        else:
            self._transport.write(data)

    def write_soon(self, data: bytes) -> None:
        """Together with what others write now; at once if it is much."""
        held, size = self._held, len(data)
        if held:
            size += self._size
        else:
            waiting = self._outbox.waiting
            if not waiting:
                self._outbox.wake()
            waiting.append(self)
        held.append(data)
        self._size = size
        if size > _MOST_HELD:
            self.flush()

    def flush(self) -> None:
        """Drops what is held if the connection was reset by the peer in this turn of the loop, or broken off by us."""
        held = self._held
        if len(held) == 1:
            data = held.pop()
            if not self.is_closing():
                self._transport.write(data)
        elif held:
            self._flush_many(held)

    def _flush_many(self, held: list[bytes]) -> None:
        size, self._held = self._size, []
        if self.is_closing():
            return
        if size > _MOST_HELD:
            self._transport.writelines(held)
        else:
            self._transport.write(b"".join(held))

    def close(self) -> None:
        self.flush()
        self._leave()

    def let_go(self) -> None:
        """The connection is lost. Without this, it and its last request would wait for the collector of cycles."""
        self._leave = _nothing
        self._held = []


def _nothing() -> None:
    return None


def outbox_of(state: ServerState, loop: asyncio.AbstractEventLoop) -> Outbox:
    """One for all connections of a server."""
    found: Outbox | None = vars(state).get("outbox")
    if found is None:
        found = vars(state)["outbox"] = Outbox(loop)
    return found
