"""What lies between an answer and its socket: when more is read, where it is written, who closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sized

from uvicorn.protocols.http.flow_control import FlowControl

__all__ = ["GatewayFlow", "Outlet"]


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
    """What a cycle sees of the transport: it writes straight to the socket, but the protocol decides how to close."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close

    def let_go(self) -> None:
        """The connection is lost. Without this, it and its last request would wait for the collector of cycles."""
        self.close = _nothing


def _nothing() -> None:
    return None
