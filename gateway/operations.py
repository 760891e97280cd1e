"""Everything that is not chat: embeddings, moderations, pictures, sound. Relayed, metered and recorded, never changed
but for `cost` inside `usage` (and `usage` itself, where an upstream forgot that of embeddings).

The last bytes of a reply are held until its row is durable. What an upstream does not report is counted where it can be
(the input of embeddings, moderations and speech), and else unknown: cost null, never 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

from gateway.backends.base import OperationReply
from gateway.call import Call, Job, Relay, backend_failed, cut_short
from gateway.catalog import Route
from gateway.errors import GatewayError, UpstreamError
from gateway.metering import Outcome, milliseconds_since
from gateway.pricing import usd
from gateway.wire import WireError, splice, sse
from gateway.wire.chat import Message, Usage, take_apart
from gateway.wire.jsontext import dumps, loads
from gateway.wire.operation import EMBEDDINGS, MODERATIONS, SPEECH, OperationRequest, is_json

MAX_REPLY = 64 << 20
_LARGE = 256 << 10
_COUNTED = frozenset({EMBEDDINGS, MODERATIONS})
"""Operations whose whole use is their input."""
_BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")


class OperationExchange(Call[OperationRequest]):
    """`open` once, then `read` until `ended`; every call gives the bytes that may leave.

    `content_type` and, for a reply that came whole (JSON), `length` and `cost` are known once it is open.
    """

    def __init__(self, relay: Relay, job: Job[OperationRequest]) -> None:
        super().__init__(relay, job)
        self.ended = False
        self.content_type = ""
        self.length: int | None = None
        self.cost: float | None = None
        self._reply: OperationReply | None = None
        self._held = bytearray()
        self._may_leave = 0
        self._usage: Usage | None = None
        self._events: sse.SSEDecoder | None = None
        self._ttft_ms: int | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def is_event_stream(self) -> bool:
        return self._events is not None

    async def open(self) -> bytes:
        """The first bytes, or the whole of a JSON reply, recorded. Raises GatewayError, recorded."""
        try:
            first = await self._try_routes(self._open_once)
        except GatewayError as failure:
            self.ended = True
            self._stop_timer()
            raise await self._record_failure(failure) from None
        finally:
            if self._reply is None:
                self._give_back()
        if self.length is not None:
            try:
                return await self._whole(first)
            finally:
                self._give_back()
        try:
            return self._hold(first)
        except UpstreamError as failure:
            try:
                await self._end_early(failure)
            finally:
                await self.close()

    async def read(self, write: Callable[[bytes], bool] | None = None) -> bytes:
        """The next bytes; may be empty. The last ones come after the row is durable. Raises GatewayError, recorded."""
        try:
            return await self._next()
        finally:
            if self.ended:
                await self.close()

    async def close(self) -> None:
        self._stop_timer()
        self._give_back()
        if self._reply is not None:
            await self._reply.close()

    def _break_off(self) -> None:
        super()._break_off()
        if self._reply is not None and self._closing is None:
            self._closing = asyncio.ensure_future(self._reply.close())

    async def _open_once(self, route: Route, request: OperationRequest) -> bytes:
        reply = await route.backend.operate(request)  # type: ignore[attr-defined] # attempts() gives operators only
        try:
            first = (
                b"".join([piece async for piece in _pieces(reply)])
                if is_json(reply.content_type)
                else await reply.read()
            )
        except BaseException:
            await reply.close()
            raise
        self._ttft_ms = milliseconds_since(self._attempt_started)
        self.content_type, self._reply = reply.content_type, reply
        if is_json(reply.content_type):
            self.length = len(first)
            await reply.close()
        elif reply.content_type.lower().startswith("text/event-stream"):
            self._events = sse.SSEDecoder(max_line=MAX_REPLY)
        return first

    async def _whole(self, body: bytes) -> bytes:
        self.ended = True
        self._stop_timer()
        data = _members(body)
        told = data.get("usage") if isinstance(data, dict) else None
        outcome = await self._outcome(Usage.read(told), [], None)
        row = self._row(outcome)
        await self._record(None, row)
        self.cost = usd(row.cost_nanousd)
        if isinstance(told, dict):
            cost = dumps(self.cost)
            body = splice.edit(body, data, {"usage": lambda text: splice.edit(text, told, {"cost": cost})})
        elif isinstance(data, dict) and self.job.request.operation == EMBEDDINGS:
            tokens = outcome.usage.input_tokens
            usage = {"prompt_tokens": tokens, "total_tokens": tokens, "cost": self.cost}
            body = splice.edit(body, data, {"usage": dumps(usage)})
        self.length = len(body)
        return body

    async def _next(self) -> bytes:
        assert self._reply is not None
        try:
            if self._broken_off:
                raise UpstreamError("The call was broken off.")
            piece = await self._reply.read()
            leaving = self._hold(piece) if piece else b""
        except UpstreamError as failure:
            await self._end_early(failure)
        except Exception as failure:  # a backend's own mistake must not cost the call its row
            await self._end_early(backend_failed(failure))
        if piece:
            return leaving
        self.ended = True
        row = self._row(await self._ended_outcome())
        await self._record(None, row)
        return bytes(self._held)

    def _hold(self, piece: bytes) -> bytes:
        """Keeps the newest piece, lets go what came before it: of events only whole ones, so that a comment or an error
        can stand behind them. Raises UpstreamError."""
        self._look_for_usage(piece)
        leaving = bytes(self._held[: self._may_leave])
        del self._held[: self._may_leave]
        searched = max(0, len(self._held) - 2)
        self._held += piece
        self._may_leave = len(self._held) if self._events is None else _end_of_events(self._held, searched)
        if len(self._held) > MAX_REPLY:
            raise UpstreamError("The upstream sent an event that is too large.", log=f"event over {MAX_REPLY} bytes")
        return leaving

    def _look_for_usage(self, piece: bytes) -> None:
        """In the events that the piece completes, or (no piece) in what is left of them."""
        if self._events is None:
            return
        try:
            for payload in self._events.feed(piece) if piece else self._events.flush():
                if b'"usage"' in payload:
                    self._usage = Usage.read(loads(payload).get("usage")) or self._usage
        except (WireError, ValueError, AttributeError):
            pass  # it passes as it came; the row then says that the gateway counted

    async def _end_early(self, failure: UpstreamError) -> NoReturn:
        self.ended = True
        outcome = await self._ended_outcome()
        if self.stopped is None:
            self._failed_midway(outcome, failure)
        await self._record(None, self._row(outcome))
        raise cut_short() if self.stopped == "interrupted" else failure

    async def _ended_outcome(self) -> Outcome:
        self._look_for_usage(b"")
        outcome = await self._outcome(self._usage, [], None)
        outcome.ttft_ms = self._ttft_ms
        return outcome

    async def _outcome(self, told: Usage | None, answers: list[Message], reason: object) -> Outcome:
        outcome = await super()._outcome(told, answers, reason)
        outcome.cost_unknown = told is None and self.job.request.operation not in _COUNTED
        return outcome

    async def _estimate(self, answers: list[Message]) -> Usage:
        data, operation = self.job.request.data, self.job.request.operation
        texts, tokens = take_apart(data.get("input")) if operation in (*_COUNTED, SPEECH) else ([], 0)
        return Usage(
            input_tokens=tokens + await self._relay.counter.text(self._counted_model, texts, hurried=self._hurried)
        )


def _end_of_events(text: bytearray, start: int) -> int:
    """Where the last blank line from `start` on ends; 0: there is none."""
    return max((at + len(mark) for mark in _BLANK_LINES if (at := text.rfind(mark, start)) >= 0), default=0)


def _members(body: bytes) -> Any:
    """What the reply parses to; of a large one only `usage`, where that can be found without the rest."""
    try:
        place = splice.sole_value(body, "usage") if len(body) > _LARGE else None
        if place is not None and body[place[1] :].strip() != b"}":  # not the last one, so perhaps not of the reply
            place = None
        return loads(body) if place is None else {"usage": loads(body[place[0] : place[1]])}
    except ValueError:
        return None


async def _pieces(reply: OperationReply) -> Any:
    while piece := await reply.read():
        yield piece
