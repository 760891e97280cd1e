"""One request and its answer: what uvicorn's RequestResponseCycle is to its protocol, with less work for each chunk.

Rules of the answer:

* What is sent, the head too, leaves once the loop has run what is ready: together with what follows it, and behind the
  answers to others (`outbox`). Before it is taken, `send` waits while the peer has not taken what was written earlier.
* The scope's extension `gateway.way_out` offers `pass_on`, which takes pieces of a body without a task that sends, and
  `whole`, which takes an answer that is there in one piece.
* An application that returns before the end of its answer means it: what it wrote is sent, the closing chunk is not.
* A body of the request that nobody waited for ends the connection.

Rules of `receive`: as ASGI has it. The callable that the application is given has also two methods: `whole_body` spares
those who read it the waiting where there is none, and `when_gone` those who have read it a task that waits for
`http.disconnect`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from uvicorn._types import ASGI3Application, ASGIReceiveEvent, ASGISendEvent, HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway.server_flow import GatewayFlow, Outlet
from gateway.server_head import Header, error_body

__all__ = ["GatewayCycle"]

logger = logging.getLogger(__name__)

_NAME = re.compile(rb'[^\x00-\x1f\x7f()<>@,;:\\\[\]={} \t"]++')
_IN_NO_VALUE = bytes({*range(0x20), 0x7F} - {0x09})
_MOST_SHAPES = 256
_MOST_IN_ONE = 64 * 1024
"""Bytes of a body that are copied to leave with the head."""


@dataclass(slots=True)
class _Shape:
    """What an answer's headers are by their names: `lines` to put the values in, and the places of those that count
    here (None: there is none)."""

    lines: bytes
    connection: int | None
    encoding: int | None
    length: int | None


_shapes: dict[tuple[bytes, ...], _Shape] = {}
"""By names that were told before: sound and in lower case."""


class _SizeLines(dict[int, bytes]):
    """The first lines of chunks, those of usual ones made beforehand."""

    def __missing__(self, size: int) -> bytes:
        return b"%x\r\n" % size


_SIZE_LINES = _SizeLines({size: b"%x\r\n" % size for size in range(1024)})


class _Sent:
    """What there is to wait for when something was sent: nothing."""

    __slots__ = ()

    def __await__(self) -> Iterator[None]:
        return _NOTHING


_NOTHING: Iterator[None] = iter(())
SENT = cast("Awaitable[None]", _Sent())


class GatewayCycle:
    """`on_response` is called when the answer is complete. To call it is the application's `receive`."""

    more_body = True
    disconnected = False
    response_started = False
    response_complete = False
    passed_at = 0.0
    filler = b""
    _body_size = 0
    _news = False  # since the last `receive`
    _wake: asyncio.Event | None = None
    _gone: Callable[[], None] | None = None
    _chunked = False  # as long as chunks may be written
    _left: int | None = 0  # bytes that the answer's body still has to have; None: as many as come

    def __init__(
        self,
        scope: HTTPScope,
        transport: Outlet,
        flow: GatewayFlow,
        loop: asyncio.AbstractEventLoop,
        default_headers: Iterable[Header],
        on_response: Callable[[], None],
        notes: dict[str, Any],
        *,
        expect_100_continue: bool,
        keep_alive: bool,
    ) -> None:
        self.scope = scope
        self.transport = transport
        self.flow = flow
        self.notes = notes
        self.keep_alive = keep_alive
        self._loop = loop
        self._default_headers = default_headers
        self._on_response = on_response
        self._expects_100_continue = expect_100_continue
        self._body: list[bytes] = []

    async def run_asgi(self, app: ASGI3Application) -> None:
        self.scope["extensions"] = {"gateway.way_out": self}  # type: ignore[dict-item]  # no settings, an object
        try:
            await app(self.scope, self, self.send)
        except asyncio.CancelledError:  # the drain is over; nobody waits for this task, so it may end quietly
            await self._fail(503, "service_unavailable_error", "unavailable", "The gateway is shutting down.")
        except Exception:
            logger.exception("The application failed")
            await self._fail(500, "server_error", None, "The gateway failed while it processed the request.")
        else:
            if not self.response_complete:
                await self._returned_early()
        finally:
            self._on_response = _nothing
            del self.scope["extensions"]  # which knows us

    async def _returned_early(self) -> None:
        if not self.response_started and not self.disconnected:
            logger.error("The application returned without an answer")
        await self._fail(500, "server_error", None, "The gateway had no answer to the request.")

    async def _fail(self, status: int, kind: str, code: str | None, message: str) -> None:
        """Ends an answer that the application left unfinished; does nothing after a finished one."""
        if self.response_complete or self.disconnected:
            return
        if self.response_started:
            self.transport.close()
            return
        body = error_body(message, kind, code)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))
        await self.whole(status, headers, body)

    # -- the request -----------------------------------------------------------------------------------------------

    def body_arrived(self, data: bytes) -> None:
        self._body.append(data)
        self._body_size += len(data)
        if self._body_size > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self._tell()

    def body_ended(self) -> None:
        self.more_body = False
        self._tell()

    def arrived_whole(self, body: bytes) -> None:
        self.more_body = False
        self.body_arrived(body)

    def disconnect(self) -> None:
        """The client is gone, or this request will not be complete. Does nothing once the answer is."""
        if self.response_complete or self.disconnected:
            return
        self.disconnected = True
        self._chunked = False
        self._tell()
        if self._gone is not None:
            self._loop.call_soon(self._call_gone)

    async def __call__(self) -> ASGIReceiveEvent:
        if self._expects_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self._hear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self._arrived(), "more_body": self.more_body}

    def whole_body(self) -> bytes | None:
        """The request's body, if nothing has been received of it and all of it is here; None: await it."""
        if self.more_body or self.disconnected or self.response_complete or self._expects_100_continue:
            return None
        self.flow.resume_reading()
        self._news = False
        return self._arrived()

    def _arrived(self) -> bytes:
        body, self._body, self._body_size = b"".join(self._body), [], 0
        return body

    def when_gone(self, call: Callable[[], None]) -> Callable[[], None]:
        """Has the loop call this once if the client leaves before its answer is complete, when `receive` would say
        `http.disconnect`; gives what revokes that. For who has read the request's body. There is one at a time."""
        self._gone = call
        if self.disconnected:
            self._loop.call_soon(self._call_gone)
        elif not self.response_complete:
            self.flow.resume_reading()  # only a connection that is read tells of its end
        return self._forget_gone

    def _call_gone(self) -> None:
        call, self._gone = self._gone, None
        if call is not None:
            call()

    def _forget_gone(self) -> None:
        self._gone = None

    def _tell(self) -> None:
        self._news = True
        if self._wake is not None:
            self._wake.set()

    async def _hear(self) -> None:
        if not self._news:
            self._wake = self._wake or asyncio.Event()
            await self._wake.wait()
        self._news = False
        if self._wake is not None:
            self._wake.clear()

    # -- the answer ------------------------------------------------------------------------------------------------

    def send(self, message: ASGISendEvent) -> Awaitable[None]:
        if self.flow.write_paused and not self.disconnected:
            return self._send_later(message)
        self._take(message)
        return SENT

    async def _send_later(self, message: ASGISendEvent) -> None:
        await self.flow.drain()
        self._take(message)

    def _take(self, message: ASGISendEvent) -> None:
        if self.disconnected:
            return
        if message["type"] == "http.response.body" and self.response_started and not self.response_complete:
            self._write(message.get("body", b""), message.get("more_body", False))
        elif message["type"] == "http.response.start" and not self.response_started:
            self.transport.write_soon(self._head(message["status"], message.get("headers", ())))
        else:
            raise RuntimeError(f"{message['type']!r} was sent out of turn, or after the end of the answer.")

    def whole(self, status: int, headers: Iterable[Header], body: bytes, more: bool = False) -> Awaitable[None]:
        """All of an answer, or (`more`) its beginning: what `send` does with the first two messages."""
        if self.response_started or self.disconnected or self.flow.write_paused or len(body) > _MOST_IN_ONE:
            return self._in_two(status, headers, body, more)
        self.transport.write_soon(self._head(status, headers) + self._framed(body, more))
        if not more:
            self._complete()
        return SENT

    async def _in_two(self, status: int, headers: Iterable[Header], body: bytes, more: bool) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    def pass_on(self, data: bytes) -> bool:
        """A piece of the body, between the first and the last that `send` takes. False: the peer takes no more at the
        moment, so the next one is to be `send`."""
        if not (self._chunked and data):
            return self._pass_unchunked(data)
        self.passed_at = self._loop.time()
        self.transport.write_soon(_SIZE_LINES[len(data)] + data + b"\r\n")
        return not self.flow.write_paused

    def pass_chunk(self, chunk: bytes) -> float | None:
        """`pass_on` for what is framed as a chunk already; tells the time. None, and nothing done, where more than a
        write would be to do."""
        if not self._chunked or self.flow.write_paused:
            return None
        self.passed_at = now = self._loop.time()
        self.transport.write_soon(chunk)
        return now

    def _pass_unchunked(self, data: bytes) -> bool:
        if self.disconnected:
            return True
        if not self.response_started or self.response_complete:
            raise RuntimeError("A piece of a body was passed on before or after its answer.")
        self.passed_at = self._loop.time()
        self._write(data, more=True)
        return not self.flow.write_paused

    def provoke(self) -> None:
        """Writes something that a client who still listens skips, and that the kernel of one who is gone answers with a
        reset: an interim reply before the answer (100 is the one that every HTTP/1.1 client skips), its filler later.
        What is on its way to the client anyway does the same."""
        if not self.response_started:
            if self.scope["http_version"] == "1.1":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif self.filler and not self.flow.write_paused:
            self.pass_on(self.filler)

    def _head(self, status: int, headers: Iterable[Header]) -> bytes:
        """With it the answer has begun."""
        self.response_started = True
        self._expects_100_continue = False
        told = [*self._default_headers, *headers]
        names, values = zip(*told, strict=True) if told else ((), ())
        shape = _shapes.get(names) or _shape_of(names)
        together = b"".join(values)
        if len(together) != len(together.translate(None, _IN_NO_VALUE)):
            raise _unsound()
        return b"".join((STATUS_LINE[status], shape.lines % values, self._frame(status, shape, values), b"\r\n"))

    def _frame(self, status: int, shape: _Shape, values: Sequence[bytes]) -> bytes:
        """Settles how the body is framed and whether the connection goes on. Gives the lines that nobody told."""
        untold = b""
        if shape.connection is not None and _says_close(values[shape.connection]):
            self.keep_alive = False
        elif not self._goes_on():
            untold += b"connection: close\r\n"
        if shape.encoding is not None and values[shape.encoding].lower() == b"chunked":
            self._chunked = self.scope["method"] != "HEAD"
        elif shape.length is not None:
            self._left = int(values[shape.length])
        elif self.scope["http_version"] == "1.0":
            self._left = None
        elif self.scope["method"] != "HEAD" and status not in (204, 304):
            self._chunked = True
            untold += b"transfer-encoding: chunked\r\n"
        return untold

    def _write(self, body: bytes, more: bool) -> None:
        data = self._framed(body, more)
        if data:
            self.transport.write_soon(data)
        if not more:
            self._complete()

    def _framed(self, body: bytes, more: bool) -> bytes:
        if not self._chunked:
            return self._counted(body)
        data = _SIZE_LINES[len(body)] + body + b"\r\n" if body else b""
        return data if more else data + b"0\r\n\r\n"

    def _counted(self, body: bytes) -> bytes:
        if self.scope["method"] == "HEAD":
            self._left = 0
            return b""
        if self._left is not None:
            if len(body) > self._left:
                raise RuntimeError("The answer's body is longer than its Content-Length.")
            self._left -= len(body)
        return body

    def _complete(self) -> None:
        if self._left:
            raise RuntimeError("The answer's body is shorter than its Content-Length.")
        self.response_complete = True
        self._chunked = False
        self._tell()
        if not self._goes_on():
            self.transport.close()
        self._on_response()

    def _goes_on(self) -> bool:
        """Whether the connection has a next request; asked when the answer begins and when it ends."""
        if self.more_body:
            self.keep_alive = False
        return self.keep_alive


def _shape_of(told: Iterable[bytes]) -> _Shape:
    """Remembered, if the names are in lower case. Raises RuntimeError."""
    names = tuple([name.lower() for name in told])
    if not all(map(_NAME.fullmatch, names)):
        raise _unsound()
    lines = b"".join([name.replace(b"%", b"%%") + b": %b\r\n" for name in names])
    place = {name: place for place, name in enumerate(names)}.get  # of the last one
    shape = _Shape(lines, place(b"connection"), place(b"transfer-encoding"), place(b"content-length"))
    if len(_shapes) < _MOST_SHAPES:
        _shapes[names] = shape
    return shape


def _says_close(connection: bytes) -> bool:
    return b"close" in connection.lower().replace(b" ", b"").split(b",")


def _unsound() -> RuntimeError:
    return RuntimeError("A header of the answer has a name or a value that is none.")


def _nothing() -> None:
    return None
