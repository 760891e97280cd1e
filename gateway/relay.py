"""The one use case: route, call, meter, record. What every dialect does with a chat request.

An `Exchange` is one logical request. It tries the routes of its model until one answers, remembers each attempt as a
usage row, and at its end hands everything to the ledger as one turn; its reply is released only after that.

Rules (contract, sections 4 and 8; design, decisions 3, 5, 6):

- Attempts are repeated only before the first byte to the client: elsewhere or again when the request is known to be
  unsent, once again or on the next route after 500, 502, 503 and 529, on the next route after any failure that is not
  the client's own.
- A client that leaves does not end the work. By `on_disconnect` the upstream is read on (`drain`: until its usage
  comes, at most 30 s or 2,000 tokens) or broken off (`cancel`). The turn is recorded either way.
- When the worker's drain time is up, what runs is broken off, recorded as interrupted, and the client is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from gateway.auth import Caller
from gateway.backends.base import ChunkStream
from gateway.catalog import Catalog, Model, Route
from gateway.conversations import Talk
from gateway.drain import Drain
from gateway.errors import GatewayError, NeverSent, Unavailable, UpstreamError, UpstreamUnreachable
from gateway.ledger import Ledger, Turn
from gateway.metering import Meter, Outcome, milliseconds_since, nothing, timings
from gateway.pricing import usd
from gateway.store.usage import UsageRow
from gateway.tokens import answer_characters, estimate
from gateway.wire import WireError, splice
from gateway.wire.chat import ChatRequest, Chunk, Completion, Message, Usage
from gateway.wire.failures import streamed_error
from gateway.wire.jsontext import dumps
from gateway.wire.stream import ChatStream, StreamedError

log = logging.getLogger("gateway.relay")

DRAIN_SECONDS = 30.0
DRAIN_CHARACTERS = 4 * 2000
_AGAIN = frozenset({500, 502, 503, 529})
_CLIENTS_OWN = frozenset({400, 404, 409, 413, 415, 422})
StopReason = Literal["client_disconnected", "interrupted"]
T = TypeVar("T")


@dataclass(slots=True)
class Job:
    """What a dialect asks for. `request` is what the upstream shall see; `talk` None: no conversation is kept."""

    request_id: str
    caller: Caller
    end_user: str | None
    model: Model
    request: ChatRequest
    talk: Talk | None
    wants_usage: bool = False
    at: int = field(default_factory=lambda: int(time.time() * 1000))
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, durable, ready to be sent."""

    body: bytes
    cost: float | None


class Relay:
    """Starts exchanges. One for each worker."""

    def __init__(self, catalog: Catalog, ledger: Ledger, drain: Drain) -> None:
        self.catalog = catalog
        self.ledger = ledger
        self.drain = drain

    def exchange(self, job: Job) -> Exchange:
        return Exchange(self, job)

    def stream(self, job: Job) -> StreamExchange:
        return StreamExchange(self, job)


class Exchange:
    """One logical request. `route` is the one in use, or the last one that was."""

    def __init__(self, relay: Relay, job: Job) -> None:
        self.job = job
        self.route: Route | None = None
        self.stopped: StopReason | None = None
        self._relay = relay
        self._meter = Meter(job.request_id, job.caller, job.end_user, job.at, stream=job.request.stream)
        self._name = job.model.name
        self._attempt_started = job.started
        self._running: asyncio.Task[Any] | None = None
        self._committed = False
        self._broken_off = False
        self._timer: asyncio.TimerHandle | None = None

    async def complete(self) -> Reply:
        """The whole reply, recorded. Raises GatewayError."""
        with self._relay.drain.entered(self.interrupt):
            try:
                completion = await self._try_routes(self._complete_once)
            except GatewayError as failure:
                raise await self._record_failure(failure) from None
            finally:
                self._stop_timer()
            return await self._record_completion(completion)

    def client_left(self) -> None:
        """The client is gone: read on or break off, as the route says."""
        if self.stopped is not None:
            return
        self.stopped = "client_disconnected"
        if self.policy == "cancel":
            self._break_off()
        else:
            self._timer = asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._break_off)

    def interrupt(self) -> None:
        """The worker has no more time."""
        self.stopped = self.stopped or "interrupted"
        self._break_off()

    @property
    def policy(self) -> Literal["drain", "cancel"]:
        route = self.route or self.job.model.routes[0]
        return route.on_disconnect

    @property
    def conversation_id(self) -> str | None:
        return self.job.talk.id if self.job.talk is not None else None

    # --- attempts

    async def _try_routes(self, call: Callable[[Route, ChatRequest], Awaitable[T]]) -> T:
        plan = list(self._relay.catalog.attempts(self.job.model))
        if len(plan) == 1:
            plan *= 2
        for number, (name, route) in enumerate(plan, 1):
            self._name, self.route, self._attempt_started = name, route, time.perf_counter()
            try:
                return await self._run(call(route, self._request_for(route)))
            except UpstreamError as failure:
                follower = plan[number][1] if number < len(plan) else None
                if self.stopped or self._committed or follower is None or not _may_follow(failure, route, follower):
                    raise
                log.warning("%s failed (%s), trying again", route.backend.name, failure.log or failure.message)
                self._row(nothing("error", cost_unknown=not _refused(failure)), charged=False)
        raise AssertionError("a model has at least one route")

    async def _run(self, work: Awaitable[T]) -> T:
        """Runs upstream work so that `_break_off` can end it; then raises UpstreamError instead of cancelling us."""
        begun = False

        async def begin() -> T:
            nonlocal begun
            begun = True
            return await work

        self._running = task = asyncio.ensure_future(begin())
        if self._broken_off:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if not begun and asyncio.iscoroutine(work):
                work.close()
            if not self._broken_off:
                raise
            kind = UpstreamError if begun else NeverSent
            raise kind("The call was broken off.", log=self.stopped) from None
        except GatewayError:
            raise
        except Exception as failure:  # a backend's own mistake must not cost the call its row
            raise _backend_failed(failure) from failure
        finally:
            self._running = None

    def _break_off(self) -> None:
        self._broken_off = True
        if self._running is not None:
            self._running.cancel()

    def _request_for(self, route: Route) -> ChatRequest:
        request = self.job.request
        if request.model == route.upstream_model:
            return request
        return request.with_fields(model=dumps(route.upstream_model))

    async def _complete_once(self, route: Route, request: ChatRequest) -> Completion:
        return await route.backend.complete(request)

    # --- records

    async def _record_completion(self, completion: Completion) -> Reply:
        choices = [choice for choice in completion.data["choices"] if isinstance(choice, dict)]
        answers: list[Message] = [c["message"] for c in choices if isinstance(c.get("message"), dict)]
        reason = choices[0].get("finish_reason") if choices else None
        outcome = self._outcome(Usage.read(completion.data.get("usage")), answers, reason)
        row = self._row(outcome)
        await self._record(answers[0] if answers else None, row)
        return Reply(self._reply_body(completion, outcome, row), usd(row.cost_nanousd))

    def _outcome(self, told: Usage | None, answers: Sequence[Message], reason: object) -> Outcome:
        usage = told
        if usage is None:
            usage = estimate(self.job.request.messages, sum(answer_characters(answer) for answer in answers))
        finish_reason = reason if isinstance(reason, str) else None
        outcome = Outcome("ok", usage, "upstream" if told else "gateway", finish_reason)
        if self.stopped is not None:
            outcome.status = outcome.finish_reason = self.stopped
            outcome.ended_by = self.policy if self.stopped == "client_disconnected" else None
        return outcome

    def _reply_body(self, completion: Completion, outcome: Outcome, row: UsageRow) -> bytes:
        data, cost = completion.data, usd(row.cost_nanousd)
        told = data.get("usage")
        changes: dict[str, splice.Change] = {"cost": dumps(cost)}
        if isinstance(told, dict) and outcome.counted_by == "upstream":
            changes["usage"] = lambda text: splice.edit(text, told, {"cost": dumps(cost)})
        else:
            changes["usage"] = dumps({**outcome.usage.to_openai(), "cost": cost})
        if self.conversation_id is not None:
            changes["conversation_id"] = dumps(self.conversation_id)
        if "timings" not in data:
            changes["timings"] = dumps(timings(outcome, row))
        return splice.edit(completion.raw, data, changes)

    async def _record_failure(self, failure: GatewayError) -> GatewayError:
        """An exchange that has no answer: its rows, and what was asked if it was not the upstream's fault. Returns
        the failure as the client shall see it."""
        if self.route is None:
            return failure
        if isinstance(failure, NeverSent):  # no call, so no row of its own
            earlier = self._meter.rows[-1] if self._meter.rows else None
            await self._record_quietly(earlier, keep_talk=False)
            return _cut_short() if self.stopped == "interrupted" else failure
        refused = _refused(failure)
        cut_short = self.stopped is not None and not refused
        outcome = self._outcome(None, [], None) if cut_short else nothing("error", cost_unknown=not refused)
        row = self._row(outcome, charged=cut_short)
        if isinstance(failure, UpstreamError) and failure.status >= 500:
            failure.headers.setdefault("x-should-retry", "false")
        await self._record_quietly(row, keep_talk=cut_short)
        return _cut_short() if self.stopped == "interrupted" else failure

    async def _record_quietly(self, row: UsageRow | None, *, keep_talk: bool) -> None:
        """For a call that has failed anyway: its client hears of that failure, the log of this one."""
        try:
            if row is not None:
                await self._record(None, row, keep_talk=keep_talk)
        except GatewayError as unrecorded:
            log.error("a failed call is not recorded: %s", unrecorded.log or unrecorded.message)

    async def _record(self, answer: Message | None, row: UsageRow, *, keep_talk: bool = True) -> None:
        """One turn to the ledger. Once begun it goes on, even if this task is cancelled."""
        conversation = None
        if self.job.talk is not None and (keep_talk or not self.job.talk.is_new):
            row.conversation_id = self.conversation_id
        if self.job.talk is not None and keep_talk:
            conversation = self.job.talk.turn(
                answer,
                row.created_at,
                model=row.model,
                finish_reason=row.finish_reason,
                input_tokens=row.input_tokens,
                output_tokens=row.output_tokens,
                cost_nanousd=row.cost_nanousd or 0,
            )
        for earlier in self._meter.rows:
            earlier.conversation_id = row.conversation_id
        await asyncio.shield(asyncio.ensure_future(self._relay.ledger.record(Turn(self._meter.rows, conversation))))

    def _row(self, outcome: Outcome, *, charged: bool = True) -> UsageRow:
        assert self.route is not None
        return self._meter.row(self.route, self._name, outcome, self._attempt_started, charged=charged)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class StreamExchange(Exchange):
    """A streamed exchange. `open` once, then `read` until `ended`; every call gives the bytes that may leave."""

    def __init__(self, relay: Relay, job: Job) -> None:
        super().__init__(relay, job)
        self.ended = False
        self._stream: ChunkStream | None = None
        self._editor = ChatStream(wants_usage=job.wants_usage)
        self._ttft_ms: int | None = None
        self._seen_when_left = 0
        self._closing: asyncio.Task[None] | None = None

    def status_sent(self) -> None:
        """Our client has a status 200 by now: no attempt may follow."""
        self._committed = True

    async def open(self) -> bytes:
        """The first bytes, once the first chunk has come. Raises GatewayError, recorded."""
        try:
            return await self._try_routes(self._open_once)
        except GatewayError as failure:
            self.ended = True
            self._stop_timer()
            raise await self._record_failure(failure) from None

    async def read(self) -> bytes:
        """The next bytes; may be empty. The last ones come after the turn is durable. Raises GatewayError, recorded."""
        try:
            return await self._next()
        except GatewayError:
            self.ended = True
            raise
        finally:
            if self.ended:
                await self.close()

    async def close(self) -> None:
        self._stop_timer()
        if self._stream is not None:
            await self._stream.close()

    def client_left(self) -> None:
        self._seen_when_left = self._editor.answer.characters
        super().client_left()

    def _break_off(self) -> None:
        super()._break_off()
        if self._stream is not None and self._closing is None:
            self._closing = asyncio.ensure_future(self._stream.close())

    async def _open_once(self, route: Route, request: ChatRequest) -> bytes:
        self._editor = ChatStream(wants_usage=self.job.wants_usage)
        stream = await route.backend.stream(request)
        try:
            chunks = await stream.read()
            if not chunks:
                raise UpstreamError("The upstream ended its stream before it began.")
            self._ttft_ms = milliseconds_since(self._attempt_started)
            leaving = self._feed(chunks)
        except BaseException:
            await stream.close()
            raise
        self._stream = stream
        return leaving

    async def _next(self) -> bytes:
        assert self._stream is not None
        if self._broken_off:
            await self._end_early(UpstreamError("The call was broken off."))
        try:
            if self._editor.failure is not None:
                raise _as_upstream_error(self._editor.failure)
            chunks = await self._stream.read()
            leaving = self._feed(chunks)
            if not chunks and not (self._stream.complete or self._editor.finished):
                raise UpstreamError("The upstream broke off its answer.", log="stream ended without its end mark")
        except UpstreamError as failure:
            await self._end_early(failure)
        except Exception as failure:  # a backend's own mistake must not cost the turn its record
            await self._end_early(_backend_failed(failure))
        if chunks:
            self._bound_drain()
            return leaving
        return await self._end()

    def _feed(self, chunks: Sequence[Chunk]) -> bytes:
        try:
            return self._editor.feed(chunks)
        except (StreamedError, WireError) as failure:
            raise _as_upstream_error(failure) from None

    def _bound_drain(self) -> None:
        seen = self._editor.answer.characters - self._seen_when_left
        if self.stopped == "client_disconnected" and seen > DRAIN_CHARACTERS:
            self._break_off()

    async def _end(self) -> bytes:
        self.ended = True
        outcome = self._stream_outcome()
        if outcome.finish_reason is None:
            outcome.finish_reason = self._editor.assumed_finish_reason
        row = self._row(outcome)
        await self._record(self._editor.answer.message(), row)
        extra: dict[str, Any] = {} if self.conversation_id is None else {"conversation_id": self.conversation_id}
        extra["timings"] = self._editor.timings or timings(outcome, row)
        return self._editor.end(outcome.usage, usd(row.cost_nanousd), extra)

    async def _end_early(self, failure: UpstreamError) -> NoReturn:
        """A broken answer: what came is recorded and billed, then the failure is raised."""
        self.ended = True
        outcome = self._stream_outcome()
        if self.stopped is None:
            outcome.status, outcome.finish_reason = "error", "error"
        row = self._row(outcome)
        await self._record(self._partial_answer(), row)
        if self.stopped == "interrupted":
            raise _cut_short()
        raise failure

    def _partial_answer(self) -> Message | None:
        """What of a broken answer may stand in a history: no tool call, for its arguments may be half and no result
        will ever follow."""
        answer = self._editor.answer.message()
        if self._editor.finished:
            return answer
        kept = {key: value for key, value in answer.items() if key not in ("tool_calls", "function_call")}
        return kept if any(value for key, value in kept.items() if key != "role") else None

    def _stream_outcome(self) -> Outcome:
        answers = [self._editor.answer.message(index) for index in self._editor.answer.indexes]
        outcome = self._outcome(self._editor.usage, answers, self._editor.finish_reason)
        outcome.ttft_ms = self._ttft_ms
        return outcome


def _refused(failure: GatewayError) -> bool:
    """Did the upstream say no, or hear nothing of it? Then nothing was used."""
    return isinstance(failure, UpstreamUnreachable) or failure.upstream_status is not None


def _backend_failed(failure: Exception) -> UpstreamError:
    log.error("a backend failed in a way that nobody foresaw", exc_info=failure)
    return UpstreamError("The gateway could not read the upstream's answer.", log=type(failure).__name__)


def _cut_short() -> Unavailable:
    """The upstream may have been paid already, so a client should not repeat the call by itself."""
    failure = Unavailable("The gateway is shutting down and had to break off this answer.")
    failure.headers["x-should-retry"] = "false"
    return failure


def _as_upstream_error(failure: StreamedError | WireError) -> UpstreamError:
    if isinstance(failure, StreamedError):
        return streamed_error(failure.error)
    return UpstreamError("The upstream sent something that is no valid chunk.", log=str(failure))


def _may_follow(failure: UpstreamError, route: Route, follower: Route) -> bool:
    if isinstance(failure, UpstreamUnreachable) or failure.upstream_status in _AGAIN:
        return True
    return follower is not route and failure.upstream_status not in _CLIENTS_OWN
