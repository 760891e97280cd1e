"""Replies as plain ASGI: JSON in one go, and a stream of our own that outlives its client.

`StreamResponse` drives a `StreamExchange` or an `OperationExchange`: it waits for the first chunk before it sends the
status, sends what each read gives as it comes, writes `: ping` into the silence of events, and never lets a failed
stream look finished. A slow client makes `send` wait, and who does not read pauses the upstream: nothing piles up.

Whatever the client does, the exchange is driven to its end and recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

from gateway.call import Reply
from gateway.drain import Drain
from gateway.errors import GatewayError
from gateway.operations import OperationExchange
from gateway.relay import Exchange, StreamExchange
from gateway.wire import sse
from gateway.wire.jsontext import dumps

log = logging.getLogger("gateway.responses")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]


class SendWhole(Protocol):
    """Status, headers and body of an answer that is there in one piece; with `more`, of the beginning of one. A `send`
    may have it as its attribute `whole`."""

    def __call__(self, status: int, headers: Sequence[Header], body: bytes, more: bool = False) -> Awaitable[None]: ...


PING_SECONDS = 15.0
JSON_TYPE: Header = (b"content-type", b"application/json")
NO_STORE: Header = (b"cache-control", b"no-store")
VARY: Header = (b"vary", b"authorization, x-api-key, api-key")
EVENT_STREAM: Header = (b"content-type", b"text/event-stream; charset=utf-8")
STREAM_HEADERS: Sequence[Header] = (NO_STORE, VARY, (b"x-accel-buffering", b"no"))


def send_json(send: Send, status: int, body: bytes, headers: Sequence[Header] = ()) -> Awaitable[None]:
    """A JSON reply. An own `content-type` or `cache-control` in `headers` is not expected."""
    told = [JSON_TYPE, (b"content-length", b"%d" % len(body)), NO_STORE, VARY, *headers]
    whole: SendWhole | None = getattr(send, "whole", None)
    return send_whole(send, status, told, body) if whole is None else whole(status, told, body)


async def send_whole(send: Send, status: int, headers: Sequence[Header], body: bytes, more: bool = False) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})


def error_body(failure: GatewayError) -> bytes:
    """OpenAI's error object."""
    fields = {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
    return dumps({"error": fields})


async def send_error(
    send: Send,
    failure: GatewayError,
    headers: Sequence[Header] = (),
    body: Callable[[GatewayError], bytes] = error_body,
) -> None:
    own = [(name.encode("latin-1"), header_value(value)) for name, value in failure.headers.items()]
    await send_json(send, failure.status, body(failure), [*own, *headers])


def header_value(text: str) -> bytes:
    """Any text as the value of a header: printable ASCII as it is, all else percent-encoded."""
    if text.isascii() and text.isprintable():
        return text.encode()
    return quote(text, safe=" !#$&'()*+,/:;=?@[]~", errors="replace").encode()


async def drive(exchange: Exchange, receive: Receive) -> Reply:
    """A whole reply, while watching whether the client is still there. Raises GatewayError."""
    forget = when_gone(receive, exchange.client_left)
    try:
        return await exchange.complete()
    finally:
        forget()


def when_gone(receive: Receive, gone: Callable[[], None]) -> Callable[[], object]:
    """Has `gone` called once if the client leaves; gives what revokes that. For who has read the request's body.

    Our own server's `receive` has a method for it. Another's, or one that somebody has wrapped, takes a task.
    """
    offered: Callable[[Callable[[], None]], Callable[[], object]] | None = getattr(receive, "when_gone", None)
    return offered(gone) if offered is not None else asyncio.create_task(_tell_when_gone(receive, gone)).cancel


def at_hand(receive: Receive) -> bytes | None:
    """The request's body without waiting, where our own server has all of it already. For who has received nothing."""
    offered: Callable[[], bytes | None] | None = getattr(receive, "whole_body", None)
    return offered() if offered is not None else None


class WayOut(Protocol):
    """Takes pieces of a body without a task that sends, between the first and the last that `send` takes; or the whole
    answer."""

    passed_at: float
    """When a piece was passed on, by the loop's clock."""

    filler: bytes
    """A piece that means nothing to the client. Set it where one may be written between any two others: with it the
    server finds out whether a client that shut its sending side still listens."""

    def pass_on(self, data: bytes) -> bool:
        """False: the client takes no more at the moment, so the next one is to be sent. True, and nothing done, once it
        is gone."""

    def pass_chunk(self, chunk: bytes) -> float | None:
        """`pass_on` for what is framed as an HTTP chunk already; tells the time. None, and nothing done, where more
        than a write would be to do."""

    notes: dict[str, Any]
    """What the application has found out from the head, for later requests of the connection that differ in nothing but
    the length and the content of their body: they have the same notes."""

    def send(self, message: Message) -> Awaitable[None]:
        """What the application is given as `send`, if nobody has wrapped it."""

    def whole(self, status: int, headers: Sequence[Header], body: bytes, more: bool = False) -> Awaitable[None]:
        """What `send` does with the two messages of an answer, or with its first two."""


def way_out(scope: Scope) -> WayOut | None:
    """What our own server offers."""
    extensions: Mapping[str, Any] | None = scope.get("extensions")
    return None if extensions is None else extensions.get("gateway.way_out")


def notes(scope: Scope) -> dict[str, Any]:
    """See `WayOut`. Of another server: for this request only."""
    out = way_out(scope)
    return {} if out is None else out.notes


def whole_way(scope: Scope, send: Send) -> SendWhole | None:
    """Of our own server, where `send` is its own and not a wrapped one."""
    out = way_out(scope)
    return out.whole if out is not None and send == out.send else None


async def _tell_when_gone(receive: Receive, gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


class StreamResponse:
    """Call it with the scope's `receive` and `send`. Raises GatewayError while the status is still unsent.

    `headers` is asked when the status leaves; its `content-type` is the reply's. `first_chunk_wait` None: however long.
    `way_out`: what our own server offers beside `send`.
    """

    _started = False
    _opened = False
    _writing = False
    _gone = False
    _done = False
    _pings = False
    _last_sent = 0.0
    _timer: asyncio.TimerHandle | None = None  # for the first chunk, then for pings
    _ping: asyncio.Task[None] | None = None
    _early_start: asyncio.Task[bytes] | None = None
    _cut: asyncio.Task[GatewayError] | None = None

    def __init__(
        self,
        exchange: StreamExchange | OperationExchange,
        drain: Drain,
        headers: Callable[[], Sequence[Header]],
        *,
        first_chunk_wait: float | None,
        way_out: WayOut | None = None,
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        self._exchange = exchange
        self._way_out = way_out
        if way_out is not None and isinstance(exchange, StreamExchange):
            exchange.pass_chunk = way_out.pass_chunk
        self._drain = drain
        self._headers = headers
        self._first_chunk_wait = first_chunk_wait
        self._ping_seconds = ping_seconds
        self._send: Send
        self._loop = asyncio.get_running_loop()

    async def __call__(self, receive: Receive, send: Send) -> None:
        """One frame for all that is waited for: each between a task and what it waits for is walked at each wait."""
        self._send = send
        exchange, write = self._exchange, self._way_out.pass_on if self._way_out is not None else None
        forget = when_gone(receive, self._client_left)
        stop = self._interrupt
        try:
            self._drain.enter(stop)
            data = await self._open()
            data = await self._start(data)
            while True:
                if data or exchange.ended:
                    await self._write(data, last=exchange.ended and self._cut is None)
                if self._cut is not None:
                    raise await self._cut
                if exchange.ended:
                    return
                data = await exchange.read(write)
        except GatewayError as failure:
            if not self._started:
                raise
            await self._fail(failure)
        finally:
            self._drain.leave(stop)
            self._done = True
            forget()
            if self._timer is not None:
                self._timer.cancel()

    async def _open(self) -> bytes:
        """Waits for the first chunk; when that takes too long, the status goes out before it."""
        if self._first_chunk_wait is not None:
            self._timer = self._loop.call_later(self._first_chunk_wait, self._ring)
        try:
            return await self._exchange.open()
        finally:
            self._opened = True
            if self._early_start is not None:
                await self._early_start

    def _ring(self) -> None:
        """The first chunk is late, or has come before the timer; then it is time to look for silence."""
        self._timer = None
        if self._pings:
            self._ping_if_silent()
        elif not self._opened:
            self._exchange.status_sent()
            self._early_start = asyncio.ensure_future(self._start())

    async def _start(self, first: bytes = b"") -> bytes:
        """Gives what has not left with the status."""
        if self._started or self._gone:
            return first
        self._started = True
        whole: SendWhole | None = getattr(self._send, "whole", None) if first and not self._exchange.ended else None
        if whole is None:
            await self._send({"type": "http.response.start", "status": 200, "headers": [*self._headers()]})
        else:
            self._writing = True
            try:
                await whole(200, self._headers(), first, True)
            finally:
                self._writing = False
            first = b""
        self._last_sent = self._loop.time()
        if self._exchange.is_event_stream:
            self._expect_silence()
        return first

    def _expect_silence(self) -> None:
        self._pings = True
        if self._way_out is not None:
            self._way_out.filler = sse.PING
        if self._timer is not None and (self._first_chunk_wait or 0) > self._ping_seconds:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_later(self._ping_seconds, self._ping_if_silent)

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        if self._gone or not self._started:
            return
        self._writing = True
        self._done = self._done or last
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        finally:
            self._writing = False
        self._last_sent = self._loop.time()

    async def _fail(self, failure: GatewayError) -> None:
        """One error event, if it is a stream of events; then the reply is left open, so that the server closes it
        without the last HTTP chunk."""
        self._done = True
        log.warning("stream failed: %s", failure.log or failure.message)
        if self._exchange.is_event_stream:
            await self._write(sse.encode([error_body(failure)]))

    def _client_left(self) -> None:
        if not self._done:
            self._gone = True
            self._exchange.client_left()

    def _interrupt(self) -> None:
        """The worker has no more time. A write that waits for the client must not keep the turn from its record: it is
        recorded beside, and the writer tells the client if it ever gets that far."""
        self._exchange.interrupt()
        if self._writing and self._cut is None and not self._exchange.ended:
            self._cut = asyncio.ensure_future(self._record_beside_write())

    async def _record_beside_write(self) -> GatewayError:
        while True:
            try:
                await self._exchange.read()
            except GatewayError as failure:
                return failure

    def _ping_if_silent(self) -> None:
        last_sent = max(self._last_sent, self._way_out.passed_at) if self._way_out is not None else self._last_sent
        silent = self._loop.time() - last_sent
        if silent >= self._ping_seconds and not self._writing and (self._ping is None or self._ping.done()):
            self._ping = asyncio.ensure_future(self._send_ping())
            silent = 0
        self._timer = self._loop.call_later(max(0.01, self._ping_seconds - silent), self._ping_if_silent)

    async def _send_ping(self) -> None:
        if not (self._gone or self._done or self._writing):
            await self._send({"type": "http.response.body", "body": sse.PING, "more_body": True})
            self._last_sent = self._loop.time()
