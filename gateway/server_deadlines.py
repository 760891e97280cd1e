"""How long a connection may be idle, and how long a peer may take nothing of what waits for it."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable

__all__ = ["TCP_CLOSED", "IdleDeadline", "WriteDeadline", "tcp_progress"]

logger = logging.getLogger(__name__)

TCP_CLOSED = 7  # TCP_CLOSE in <netinet/tcp.h>


class IdleDeadline:
    """Calls `missed` when nothing has ended the idleness for so long.

    Idleness begins and ends with each request, so neither touches the timer: that runs on, and looks at the clock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, missed: Callable[[], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._missed = missed
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._check)

    def end(self) -> None:
        self._since = None

    def stop(self) -> None:
        """For good. Whoever would have been told is let go."""
        self._missed = _nothing
        self._since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left = self._since + self._seconds - self._loop.time()
        if left > 0.001:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._missed()


class WriteDeadline:
    """Ends a connection whose peer takes nothing of what waits for it. One that is slow has all the time it needs."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._transport = transport
        self._loop = loop
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._seen = (0, 0)

    def start(self) -> None:
        self.stop()
        self._seen = self._progress()
        self._timer = self._loop.call_later(self._seconds, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        if self._progress() != self._seen:
            self.start()  # slow, but reading
        else:
            logger.info("A client read nothing for %g s; its connection is closed", self._seconds)
            self._transport.abort()

    def _progress(self) -> tuple[int, int]:
        return self._transport.get_write_buffer_size(), tcp_progress(self._transport)[1]


def _nothing() -> None:
    return None


def tcp_progress(transport: asyncio.Transport) -> tuple[int, int]:
    """The connection's TCP state and how many of our bytes the peer has acknowledged; zeros where not known."""
    if not hasattr(socket, "TCP_INFO"):
        return 0, 0
    try:
        # struct tcp_info of Linux: the state is its first byte, tcpi_bytes_acked lies at 120.
        info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    except OSError:
        return 0, 0
    return info[0], struct.unpack_from("=Q", info, 120)[0] if len(info) >= 128 else 0
