"""One HTTP/1.1 connection: uvicorn's httptools protocol, made fit for clients that are hostile, slow or gone.

A connection is in one of these states, and none of them lasts longer because the peer wishes it:

    idle        between requests; `Config.timeout_keep_alive` ends it (a connection's first request: `head_seconds`)
    answering   the application runs, until it or a reset ends it, or what it wrote has not moved for `write_seconds`
    head        part of a head is here; the rest comes within `head_seconds` and `max_head` bytes
    body        a body arrives; not longer than `body_seconds` without a byte while we are willing to read
    leaving     our last byte is written and our side is shut; what still arrives is dropped, then the socket closes

Rules:

* A request that cannot be understood gets one answer, and never before the answers that are due to earlier requests.
  If the answer to that very request has begun, the connection ends instead, and the application sees a disconnect.
* While requests are queued behind a running one, nothing is read. A connection holds at most one read of them.

Not nice, and so by nature: a client that closes its socket looks like one that only shut its sending side, until it
resets what we write. So after an end of file the answer goes on, and `http.disconnect` comes once a chunk (or a ping)
was written and reset: `peer_check_seconds` later at most. So something that clients skip is written at the end of file
where the answer allows it (`GatewayCycle.provoke`). Where nothing is, it comes when the peer's kernel has
forgotten the connection and resets a keep-alive probe: a good minute on Linux. Elsewhere only a failing write tells.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.config import Config
from uvicorn.server import ServerState

from gateway.server_cycle import GatewayCycle
from gateway.server_deadlines import TCP_CLOSED, IdleDeadline, WriteDeadline, tcp_progress
from gateway.server_flow import GatewayFlow, Outlet, outbox_of
from gateway.server_head import HeadReader, Refusal, SameHead, check_head, expects_continue, path_of, refused

__all__ = ["GatewayProtocol"]

logger = logging.getLogger(__name__)


class GatewayProtocol(HeadReader):
    flow: GatewayFlow
    cycle: GatewayCycle  # type: ignore[assignment]  # our own, see server_cycle
    pipeline: deque[tuple[GatewayCycle, ASGI3Application]]  # type: ignore[assignment]  # the same

    max_pipelined = 256
    write_buffer = 64 * 1024
    linger_bytes = 256 * 1024
    heads_to_remember = 3  # of a connection, not the first one, which may be the only one

    head_seconds = 20.0
    body_seconds = 30.0
    write_seconds = 60.0
    linger_seconds = 2.0
    peer_check_seconds = 1.0
    drain_grace_seconds = 0.25

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.app = getattr(self.app, "http_app", self.app)  # what answers requests, where an application has it apart
        self._running: GatewayCycle | None = None  # whose application runs; `cycle` is the one being received
        self._in_body = False
        self._same: SameHead | None = None
        self._to_remember = self.heads_to_remember
        self._undelivered = 0  # bytes since the parser last finished a request or handed out a piece of a body
        self._to_discard: int | None = None  # once set, what arrives is dropped, and read up to this many bytes
        self._last_words: bytes | None = None  # a refusal that waits for the answers before it
        self._half_closed = False
        self._draining = False
        self._leaving = False
        self._last_byte = 0.0
        self._expected: str | None = None
        self._input_timer: asyncio.TimerHandle | None = None
        self._idle = IdleDeadline(self.loop, self.timeout_keep_alive, self._close)

    # -- the life of the connection ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = GatewayFlow(transport, self.pipeline)
        self._outlet = Outlet(transport, outbox_of(self.server_state, self.loop), self._leave)
        self._write_deadline = WriteDeadline(transport, self.loop, self.write_seconds)
        transport.set_write_buffer_limits(high=self.write_buffer)
        self._expect("head", self.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self._idle.stop()
        self._write_deadline.stop()
        queued = [cycle for cycle, _ in self.pipeline]
        for cycle in (self._running, *queued, self.cycle):  # the last one may be refused and in neither
            if cycle is not None:
                cycle.disconnect()
        self._outlet.let_go()
        self.connections.discard(self)
        self.flow.resume_writing()  # whoever waits to write learns that there is nobody
        self.transport.close()
        self.parser = None  # type: ignore[assignment]  # it refers to us

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn never keeps a half-closed connection
        """True: the transport stays open, and whatever has to be closed was closed here."""
        self._half_closed = True
        if self._leaving:
            self._close()
        elif self._last_words is not None:
            self._watch_peer()
        elif self._in_body or self._undelivered:
            self._refuse(Refusal(400, "malformed_request", "The request ended before it was complete."))
        elif self._is_answering():
            self.cycle.keep_alive = False
            if self._running is not None:
                self._running.provoke()
            self._watch_peer()
        else:
            self._close()
        return True

    def shutdown(self) -> None:
        """The server drains: end now if idle, else after the request that is being received or answered."""
        self._draining = True
        if self._is_answering():
            self.cycle.keep_alive = False
        elif self._leaving or self._undelivered:
            pass
        elif self._running is None:  # freshly accepted: its request is on the way
            self._expect("head", self.drain_grace_seconds, self._head_is_late)
        else:
            self._close()

    def _is_answering(self) -> bool:
        running = self._running
        return running is not None and not (running.response_complete or running.disconnected)

    def _leave(self) -> None:
        """Closes so that the client can read what was written.

        Closing a socket with unread bytes in it makes the kernel send a reset, and the reset discards our answer at
        the other end. So while more may be on the way, shut our side only, and drop what comes for a moment.
        """
        if self._leaving:
            return
        self._leaving = True
        self._outlet.flush()
        more = self._in_body or self.flow.read_paused or self._to_discard is not None
        self.pipeline.clear()
        self._last_words = None
        if not more or self._half_closed or self.transport.is_closing():
            self._close()
            return
        self._to_discard = self.linger_bytes
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # asyncio lets it out if the peer has reset the connection
            self.transport.abort()
        else:
            self._expect("end", self.linger_seconds, self._close)

    def _close(self) -> None:
        self._leaving = True
        self._expect_nothing()
        self._idle.stop()
        self._outlet.flush()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._write_deadline.start()

    # -- bytes in ------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._to_discard is not None:
            self._to_discard -= len(data)
            if self._to_discard <= 0:
                self.flow.pause_reading()
            return
        self._idle.end()
        between = not (self._undelivered or self._in_body)
        if between and self._same is not None and self._begin_again(self._same, data):
            return
        self._undelivered += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            logger.debug("Refused: %r, %r", exc, cause)
            known = cause if isinstance(cause, Refusal) else None
            self._refuse(known or Refusal(400, "malformed_request", "The request is not well-formed HTTP/1.1."))
            return
        if self._in_body or self._undelivered or self._expected is not None:
            self._watch_input()
        elif between and self._to_remember and self.cycle.keep_alive:
            self._to_remember -= 1
            scope = self._new_scope(self.parser.get_method(), self.parser.get_http_version())
            self._same = SameHead.of(data, self.headers, scope, self.cycle.notes) or self._same

    def _begin_again(self, same: SameHead, data: bytes) -> bool:
        """A request, without the parser, if its head says what that one has said."""
        told = None if self._is_answering() else same.told_by(data)
        if told is None:
            return False
        headers, body = told
        self._expect_nothing()
        self.scope = {**same.scope, "headers": headers, "state": self.app_state.copy()}
        self.cycle = self._new_cycle(not self._draining, False, same.notes)
        self.cycle.arrived_whole(body)
        self._start_asgi_task(self.cycle, self.app)
        return True

    def on_message_begin(self) -> None:
        self._undelivered = self._undelivered or 1  # the rest of a read that completed the request before
        self.url = b""
        self.headers = []

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        check_head(method, self.url, version, self.headers, self.max_head)
        if self.parser.should_upgrade():
            return  # comes again, see HeadReader
        if len(self.pipeline) >= self.max_pipelined:
            raise Refusal(400, "too_many_requests_queued", "Too many requests were sent before the first answer.")
        self.scope = self._new_scope(method, version)
        self._in_body = True
        keep_alive = version == "1.1" and not self._draining and self.parser.should_keep_alive()
        self.cycle = self._new_cycle(keep_alive, expects_continue(self.headers), {})
        if self._is_answering():
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def _new_scope(self, method: bytes, version: str) -> HTTPScope:
        path, raw_path, query = path_of(self.url)
        return {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]  # as in uvicorn
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            "method": method.decode("ascii"),
            "path": self.root_path + path,
            "raw_path": self.root_path.encode("ascii") + raw_path,
            "query_string": query,
        }

    def _new_cycle(self, keep_alive: bool, expect_100_continue: bool, notes: dict[str, Any]) -> GatewayCycle:
        return GatewayCycle(
            self.scope,
            self._outlet,
            self.flow,
            self.loop,
            self.server_state.default_headers,
            self.on_response_complete,
            notes,
            expect_100_continue=expect_100_continue,
            keep_alive=keep_alive,
        )

    def on_body(self, body: bytes) -> None:
        self._undelivered = 0
        if not self.cycle.response_complete:
            self.cycle.body_arrived(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._undelivered = 0
        self._in_body = False
        if not self.cycle.response_complete:
            self.cycle.body_ended()

    # -- deadlines and refusals ----------------------------------------------------------------------------------

    def _watch_input(self) -> None:
        """Looks at what the parser has not delivered yet: its size, and what has to come next in time."""
        if self._undelivered > self.max_head:
            self._refuse(self._too_large())
        elif self._in_body:
            self._last_byte = time.monotonic()
            if self._expected != "body":
                self._expect("body", self.body_seconds, self._body_is_late)
        elif self._undelivered:
            if self._expected != "head":
                self._expect("head", self.head_seconds, self._head_is_late)
        else:
            self._expect_nothing()

    def _expect(self, what: str, seconds: float, missed: Callable[[], None]) -> None:
        self._expect_nothing()
        self._expected = what
        self._input_timer = self.loop.call_later(seconds, missed)

    def _expect_nothing(self) -> None:
        self._expected = None
        if self._input_timer is not None:
            self._input_timer.cancel()
            self._input_timer = None

    def _head_is_late(self) -> None:
        if self._undelivered:
            self._refuse(Refusal(408, "request_timeout", "The request's head did not arrive in time."))
        else:
            self._close()

    def _body_is_late(self) -> None:
        wait = self.body_seconds
        if not self.flow.read_paused:
            wait -= time.monotonic() - max(self._last_byte, self.flow.resumed_at)
        if wait > 0.001:
            self._expect("body", wait, self._body_is_late)
        else:
            self._refuse(Refusal(408, "request_timeout", "The request's body did not arrive in time."))

    def _watch_peer(self) -> None:
        """After its end of file only a reset can tell that the client is gone, and no read reports it."""
        if tcp_progress(self.transport)[0] == TCP_CLOSED:
            self.transport.abort()
        else:
            self._expect("reset", self.peer_check_seconds, self._watch_peer)

    def _refuse(self, refusal: Refusal) -> None:
        """Answers a request that will not reach the application, after the answers that are due, and leaves."""
        self._to_discard = 0
        self._expect_nothing()
        self.flow.pause_reading()
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # not started yet
        elif self._in_body:
            self.cycle.disconnect()
            if self.cycle.response_started:
                self._leave()
                return
        self._last_words = refused(refusal, self.server_state.default_headers)
        if not self._is_answering():
            self._say_last_words()
        elif self._half_closed:
            self._watch_peer()

    def _say_last_words(self) -> None:
        if self._last_words is not None and not self.transport.is_closing():
            self._outlet.write(self._last_words)
        self._leave()

    # -- answers -------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: GatewayCycle, app: ASGI3Application) -> None:  # type: ignore[override]  # ours
        self._running = cycle
        task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._leaving:
            return
        if self._last_words is not None and not self.pipeline:
            self._say_last_words()
        elif self._in_body and not self.pipeline:
            self._leave()  # answered without waiting for the body, so what comes next is not a request
        elif not self.transport.is_closing():
            self._go_on()

    def _go_on(self) -> None:
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._undelivered:  # else not idle: the head that is half here has its own deadline
            self._idle.begin()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():  # what a closing transport still holds stays on the clock
            self._write_deadline.stop()
