"""One reply, from the parser's callbacks on one side to `read` on the other.

What comes while nobody reads is kept; beyond `HIGH_WATER` the socket is paused until it has been read. Bytes that are
no body (a head, framing, trailers) are bounded by `MAX_HEAD` between one piece of body and the next. Time is measured
only while somebody waits here, apart from the limit on the whole.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from gateway.backends.client_head import MAX_HEAD, KnownHeads, folded
from gateway.backends.transport import Response, Timeouts
from gateway.errors import UpstreamError, UpstreamTimeout

HIGH_WATER = 1 << 16
_CHUNK = b"%x\r\n%b\r\n"
_KEPT_CHUNK_STARTS = 4096

Lane = Callable[[bytes], bool]
"""Takes all that one read brought, in one step; or says False, and has done nothing."""


@lru_cache(_KEPT_CHUNK_STARTS)
def chunk_start(length: int) -> bytes:
    """The line that an HTTP chunk of so many bytes in all begins with, if its size is written as most do; empty if
    there is none."""
    for digits in range(1, 9):
        size = length - digits - len(b"\r\n\r\n")
        start = b"%x\r\n" % max(size, 0)
        if size > 0 and len(start) == digits + len(b"\r\n"):
            return start
    return b""


class Line(Protocol):
    """What a reply asks of its connection."""

    def due(self, at: float) -> None:
        """Calls the reply's `overdue` at that time of the loop's clock, if no later time was named since."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop_sending(self) -> None:
        """What is left of the request is not wanted."""

    def finish(self, keep: bool) -> None:
        """The reply has ended; may the connection be used again?"""

    def retire(self, reply: Reply) -> None:
        """After `finish`: the connection is not used again, unless it is already."""

    def drop(self) -> None:
        """Closes the socket at once."""


class Reply:
    """A `Response`, once `check_head` has let it pass. One task reads it; any may close it."""

    __slots__ = (
        "_between_chunks", "_bodiless", "_complete", "_end", "_failure", "_find_lane", "_headed", "_heads", "_idle",
        "_junk", "_keep", "_left", "_line", "_loop", "_parser", "_paused", "_pieces", "_raw", "_silent",
        "_silent_until", "_size", "_take", "_take_failed", "_until_close", "_waiter", "came_at", "headers", "lane",
        "status",
    )  # fmt: skip
    chunk_start = staticmethod(chunk_start)

    def __init__(
        self,
        line: Line,
        loop: asyncio.AbstractEventLoop,
        *,
        bodiless: bool,
        timeouts: Timeouts,
        end: float,
        heads: KnownHeads | None = None,
    ) -> None:
        """`bodiless`: its method has replies without a body. `end`: the time of the loop's clock when all must be
        over."""
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._line: Line | None = line
        self._left: Line | None = None
        self._loop = loop
        self._bodiless = bodiless
        self._idle = math.inf if timeouts.idle is None else timeouts.idle
        self._end = end
        self._heads = None if bodiless else heads
        self._parser: HttpResponseParser | None = None
        self._raw: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._silent = 0
        self._silent_until = math.inf
        self._between_chunks = False
        self._headed = self._complete = self._junk = self._keep = self._paused = self._until_close = False
        self._failure: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None
        self._take_failed: Exception | None = None
        self._find_lane: Callable[[Reply], Lane | None] | None = None
        self.lane: Lane | None = None
        self.came_at = 0.0

    # --- the reading side

    def head_came(self, first_byte: float | None) -> asyncio.Future[None]:
        """Done once status and headers are there, or will never be: ask `check_head`."""
        if self._headed or self._line is None:
            ended = self._loop.create_future()
            ended.set_result(None)
            return ended
        return self._wait(self._line, math.inf if first_byte is None else first_byte)

    def check_head(self) -> None:
        """Raises what has become of a reply without one."""
        if not self._headed:
            raise self._failure or broken("the exchange was ended")

    async def read(self) -> bytes:
        while not self._pieces and self._line is not None:
            await self._wait(self._line, self._idle)
        pieces = self._pieces
        if not pieces:
            if self._failure is not None:
                raise self._failure
            return b""
        found = self._come()
        if self._paused and self._line is not None:
            self._paused = False
            self._line.resume()
        return found

    async def push(
        self, take: Callable[[bytes], bool], find_lane: Callable[[Reply], Lane | None] | None = None
    ) -> None:
        """Hands over what comes while the socket is being read, so that no task has to wake for it. Returns when
        `take` says False, raises what it raises, and leaves the rest, the end too, to `read`.

        Between two HTTP chunks `find_lane` is asked for a `lane`: who feeds this offers it the next reads first."""
        while self._pieces:
            if not take(await self.read()):
                return
        if self._line is None:
            return
        self._take, self._find_lane = take, find_lane
        try:
            await self._wait(self._line, self._idle)
        finally:
            self._take_no_more()
            failure, self._take_failed = self._take_failed, None
        if failure is not None:
            raise failure

    def _take_no_more(self) -> None:
        self._take = self._find_lane = self.lane = None
        self._between_chunks = False

    def _come(self) -> bytes:
        """The pieces that have come, as one."""
        pieces = self._pieces
        found = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        return found

    async def read_all(self, limit: int) -> bytes:
        if self._line is None and self._failure is None and self._size <= limit:  # it has come already
            return self._come()
        return await read_whole(self, limit)

    def at_end(self) -> bool:
        return self._complete and not self._pieces

    def close(self) -> None:
        if self._line is not None:
            self._pieces.clear()
            self.fail(broken("closed by us"))

    def distrust(self) -> None:
        """Closes; nobody uses the connection again, though the reply may have come to a clean end."""
        self.close()
        if self._left is not None:
            self._left.retire(self)

    def untouched(self) -> bool:
        """Has nothing come of it?"""
        return self._silent == 0 and not self._headed

    def _wait(self, line: Line, seconds: float) -> asyncio.Future[None]:
        """Done once `_wake` is called. No coroutine: each of them costs whenever a task resumes below it."""
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("a reply is read by one task at a time")
        waiter = self._waiter = self._loop.create_future()
        until = self._silent_until = self._loop.time() + seconds
        line.due(until if until < self._end else self._end)
        return waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- what the connection tells

    def feed(self, data: bytes) -> None:
        self.lane = None
        start = chunk_start(len(data)) if self._between_chunks else b""
        piece = data.removeprefix(start).removesuffix(b"\r\n") if start else data
        plain = len(data) - len(piece) == len(start) + 2
        if not plain:
            piece = self._parse(data)
        take = self._take
        if piece and take is not None:
            self._silent_until = self._loop.time() + self._idle
            try:
                goes_on = take(piece)
            except Exception as failure:
                goes_on, self._take_failed = False, failure
            if not goes_on:
                self._take_no_more()
                self._wake()
        if not plain:
            self._settle()
        if self._between_chunks and self._find_lane is not None:
            self.lane = self._find_lane(self)

    def _parse(self, data: bytes) -> bytes:
        """What is to be handed over; nothing if nobody takes it."""
        known = len(self._pieces)
        begins = self._parser is None
        if begins:
            if self._heads is not None and self._is_known(self._heads, data):
                return b""
            self._parser = HttpResponseParser(self)
        parser = self._parser
        assert parser is not None
        self._silent += len(data)
        self._between_chunks = False
        try:
            parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as failure:
            if not self._complete:
                self.fail(broken(f"malformed reply: {failure.__context__ or failure}"))
                return b""
            self._junk = True
        if begins and self._complete and self._keep and not self._junk and self.status == 200 and self._heads:
            self._heads.learn(data, self.headers)
        if len(self._pieces) == known:
            return b""
        self._silent = 0
        if self._take is not None:
            piece = self._come()
            self._between_chunks = data == _CHUNK % (len(piece), piece)
            return piece
        self._wake()
        return b""

    def _is_known(self, heads: KnownHeads, data: bytes) -> bool:
        """Is that all of a reply of a known kind? It is read then."""
        found = heads.read(data)
        if found is None:
            return False
        self.status = 200
        self.headers, body = found
        self._pieces.append(body)
        self._size = len(body)
        self._headed = self._complete = self._keep = True
        self._wake()
        return True

    def _settle(self) -> None:
        """After bytes that were parsed: has the reply ended, or is too much of it here?"""
        if self._complete:
            self._over(self._keep and not self._junk)
        elif self._silent > MAX_HEAD:
            self.fail(broken("malformed reply: its head or framing is too large"))
        elif self._size > HIGH_WATER and not self._paused and self._line is not None:
            self._paused = True
            self._line.pause()

    def lost(self, cause: Exception | None) -> None:
        """The connection has ended. A reply without a length of its own ends with it."""
        if self._until_close and cause is None:
            self._complete = True
            self._over(keep=False)
            self._wake()
        else:
            said = f"{type(cause).__name__}: {cause}" if cause else "closed by the upstream"
            self.fail(broken(f"{said}, {'within' if self._headed else 'before'} the reply"))

    def overdue(self, now: float) -> float:
        """The time that `due` named has come. Returns the next one."""
        if now >= self._end:
            self._fail_late("the reply took longer than its limit in total")
        elif self._waiter is not None and not self._waiter.done():
            if self.came_at:
                self._silent_until = max(self._silent_until, self.came_at + self._idle)
            if now < self._silent_until:  # something has come since
                return min(self._silent_until, self._end)
            self._fail_late(f"silence for {self._idle} s within the reply" if self._headed else "no reply in time")
        return self._end

    def _fail_late(self, cause: str) -> None:
        self.fail(UpstreamTimeout("The upstream did not answer in time.", log=cause))

    def fail(self, failure: UpstreamError) -> None:
        """Ends the exchange, unless it has ended already."""
        line = self._line
        if line is not None:
            self._line = self._parser = None
            self._failure = failure
            line.drop()
            self._wake()

    def _over(self, keep: bool) -> None:
        line = self._line
        self._line = self._parser = None
        if line is not None:
            if self._paused:
                line.resume()
            self._left = line
            line.finish(keep)

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        self._junk = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:
            self._raw.append((name, value))

    def on_headers_complete(self) -> None:
        if self._headed:
            return
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            if status == 101 or status < 100:
                raise ValueError(f"status {status} was not asked for")
            self._raw.clear()
            return
        self.headers = headers = folded(self._raw, self._silent)
        coding = headers.get("transfer-encoding")
        if coding is not None and coding.lower() != "chunked":
            raise ValueError(f"unknown transfer-encoding {coding!r}")
        self._until_close = coding is None and "content-length" not in headers
        self.status = status
        self._headed = True
        self._silent = 0
        if status >= 300 and self._line is not None:
            self._line.stop_sending()
        self._complete = self._bodiless
        if self._waiter is not None:
            self._wake()

    def on_body(self, piece: bytes) -> None:
        if not self._complete:
            self._pieces.append(piece)
            self._size += len(piece)

    def on_message_complete(self) -> None:
        if self._headed and not self._complete:
            assert self._parser is not None
            self._complete = True
            self._keep = self._parser.should_keep_alive()
            if self._waiter is not None:
                self._wake()


def broken(cause: str) -> UpstreamError:
    return UpstreamError("The connection to the upstream broke.", log=cause)


async def read_whole(response: Response, limit: int) -> bytes:
    """The body. Raises UpstreamError, and closes, if it is longer than `limit`."""
    parts: list[bytes] = []
    size = 0
    while piece := await response.read():
        parts.append(piece)
        size += len(piece)
        if size > limit:
            response.close()
            raise UpstreamError("The upstream's reply is too large.", log=f"reply over {limit} bytes")
    return parts[0] if len(parts) == 1 else b"".join(parts)
