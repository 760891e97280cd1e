"""One connection to an upstream: an `asyncio.Protocol` that carries one exchange after another, never two at once.

    idle ──begin──> busy ──finish(keep)──> idle      the reply came to a clean end, all of the request was sent
      │               │
      └──── drop ─────┴──> gone                      anything else: end of file, error, limit, junk, an exchange ended

A connection has one timer. Naming a later time than the one it is set for costs an assignment: when it fires early, it
is set again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import socket
from typing import Protocol, cast

from gateway.backends.client_head import KnownHeads
from gateway.backends.client_reply import Reply
from gateway.backends.client_upload import Upload
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamUnreachable
from gateway.outbox import Outbox

WRITE_PIECE = 1 << 18
_TICK = 0.001
"""What a loop's timer may be early."""
_KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class Owner(Protocol):
    """Who counts the connections."""

    def released(self, connection: Connection) -> None:
        """Its exchange has ended, another one may begin."""

    def dropped(self, connection: Connection, *, leased: bool) -> None:
        """No exchange may begin on it any more. `leased`: one was running."""

    def closed(self, connection: Connection) -> None:
        """Its socket is closed."""


class Connection(asyncio.Protocol):
    """`open` while its socket is good for another exchange or for the running one."""

    def __init__(
        self, owner: Owner, loop: asyncio.AbstractEventLoop, outbox: Outbox, heads: KnownHeads | None = None
    ) -> None:
        self.open = False
        self.used = False
        self._owner = owner
        self._loop = loop
        self._outbox = outbox
        self._heads = heads
        self._hung_up: select.poll | None = None
        self.transport: asyncio.Transport
        self._reply: Reply | None = None
        self._last: Reply | None = None
        self._request: bytes | None = None
        self._unsent: memoryview | None = None
        self._upload: Upload | None = None
        self._cut_short = False
        self._choked = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._due = math.inf

    # --- exchanges

    def begin(
        self, head: bytes, body: bytes | Upload | None, *, bodiless: bool, timeouts: Timeouts, end: float
    ) -> Reply:
        """Sends a request, together with those that others send now. What does not fit into the socket follows by
        itself while the reply is awaited."""
        reply = self._reply = Reply(self, self._loop, bodiless=bodiless, timeouts=timeouts, end=end, heads=self._heads)
        self.used = True
        self._last = None
        if isinstance(body, Upload):
            self.transport.write(head)
            self._upload = body
            body.start(self)
        elif body is None or len(body) <= WRITE_PIECE:
            self._request = head + body if body else head
            self._outbox.add(self)
        else:
            self.transport.write(head)
            self._unsent = memoryview(body)
            self._send_on()
        return reply

    def flush(self) -> None:
        """Sends the request that waits to be sent with others."""
        if self._request is not None and not self.transport.is_closing():
            request, self._request = self._request, None
            self.transport.write(request)

    def ready(self) -> bool:
        """May an exchange begin? Nothing came and nobody hung up since the last one, as far as the kernel knows."""
        if not self.open or self.transport.is_closing():
            return False
        hung_up = self._hung_up or self._poll()
        return hung_up is None or not hung_up.poll(0)

    def wait_idle(self, seconds: float) -> None:
        """Closes itself if no exchange begins for so long."""
        self.due(self._loop.time() + seconds)

    def drop(self) -> None:
        if self.open:
            self._leave()
        self.transport.abort()

    def end(self) -> None:
        """From outside: breaks off what runs, else closes."""
        if self._reply is not None:
            self._reply.close()
        else:
            self.close()

    def close(self) -> None:
        """As `drop`, but with a goodbye where TLS has one."""
        if self.open:
            self._leave()
            self.transport.close()

    def _leave(self) -> None:
        self.open = False
        if self._timer is not None:
            self._timer.cancel()
        reply, self._reply = self._reply, None
        self._request = self._unsent = None
        self._stop_upload()
        self._owner.dropped(self, leased=reply is not None)

    def _poll(self) -> select.poll | None:
        """Tells what there is to read. Made once; None where the system has no such thing."""
        if hasattr(select, "poll"):
            self._hung_up = select.poll()
            self._hung_up.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return self._hung_up

    # --- what an upload asks for

    def send_piece(self, data: bytes) -> bool:
        self.transport.write(data)
        return not self._choked

    def body_ended(self, data: bytes) -> None:
        self._upload = None
        self.transport.write(data)

    def _stop_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.stop()

    # --- what its reply asks for

    def due(self, at: float) -> None:
        self._due = at
        if at < self._timer_at:
            self._set_timer(at)

    def pause(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def stop_sending(self) -> None:
        if self._unsent is not None or self._upload is not None:
            self._unsent = None
            self._stop_upload()
            self._cut_short = True

    def finish(self, keep: bool) -> None:
        sent = (
            self._request is None
            and self._unsent is None
            and self._upload is None
            and not self._cut_short
            and self.transport.get_write_buffer_size() == 0
        )
        if keep and sent and self.open:
            self._last, self._reply = self._reply, None
            self._owner.released(self)
        elif sent:
            self.close()
        else:
            self.drop()

    def retire(self, reply: Reply) -> None:
        if self._last is reply:
            self.close()

    # --- the loop's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        self.open = True
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            self.drop()
            return
        lane = reply.lane
        if lane is None or not lane(data):
            reply.feed(data)

    def eof_received(self) -> None:
        self._lose(None)

    def connection_lost(self, cause: Exception | None) -> None:
        self._lose(cause)
        self._owner.closed(self)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        if self._unsent is not None:
            self._send_on()
        elif self._upload is not None:
            self._upload.resume()

    def _lose(self, cause: Exception | None) -> None:
        reply = self._reply
        if reply is not None and self._request is not None:
            reply.fail(
                UpstreamUnreachable("The upstream could not be reached.", log="it hung up before the request left")
            )
        elif reply is not None:
            reply.lost(cause)
        self.drop()

    def _send_on(self) -> None:
        while self._unsent and not self._choked and not self.transport.is_closing():
            piece, self._unsent = self._unsent[:WRITE_PIECE], self._unsent[WRITE_PIECE:]
            self.transport.write(piece)
        if not self._unsent:
            self._unsent = None

    # --- its timer

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._loop.time() + _TICK
        if now >= self._due:
            if self._reply is None:
                self.close()
            else:
                self._due = self._reply.overdue(now)
        if self.open and self._due < math.inf:
            self._set_timer(self._due)
