"""One logical request and its attempts at upstreams: what chat and all other operations have in common.

A `Call` tries the routes of its model until one answers, remembers each attempt as a usage row, and at its end hands
everything to the ledger as one turn; its reply is released only after that.

Rules (contract, sections 4 and 8; design, decisions 3, 5, 6):

- Attempts are repeated only before the first byte to the client: elsewhere or again when the request is known to be
  unsent, once again or on the next route after 500, 502, 503 and 529, on the next route after any failure that is not
  the client's own. Routes that cool down come last.
- A client that leaves does not end the work. By `on_disconnect` the upstream is read on (`drain`: until its usage
  comes, at most 30 s or 2,000 tokens) or broken off (`cancel`). The turn is recorded either way.
- When the worker's drain time is up, what runs is broken off, recorded as interrupted, and the client is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NoReturn, TypeVar

from gateway import attempts, estimates
from gateway.admission import Admission
from gateway.auth import Caller
from gateway.catalog import Catalog, Model, Route
from gateway.drain import Drain
from gateway.errors import (
    UNSENT,
    BadRequest,
    GatewayError,
    NeverSent,
    Unavailable,
    UntrueUsage,
    UpstreamError,
)
from gateway.ledger import Ledger
from gateway.metering import Meter, Outcome, nothing
from gateway.store.stored import StoredCompletion
from gateway.store.usage import UsageRow
from gateway.stored import Keep
from gateway.talks import Talk
from gateway.tickets import Demand, Ticket
from gateway.tokens import TokenCounter
from gateway.turns import Turn
from gateway.wire.chat import ChatRequest, Message, Usage
from gateway.wire.operation import OperationRequest

log = logging.getLogger("gateway.relay")

DRAIN_SECONDS = 30.0
StopReason = Literal["client_disconnected", "interrupted"]
T = TypeVar("T")
R = TypeVar("R", ChatRequest, OperationRequest)


@dataclass(slots=True)
class Job(Generic[R]):
    """What a dialect asks for. `request` is what the upstream shall see; `talk` None: no conversation is kept.

    `assumed_model`: the name that OpenAI's API gives to a request without one; it is not sent where the upstream knows
    the model by that name. `keep`: what is to be stored of it, if it comes to its end.
    """

    request_id: str
    caller: Caller
    end_user: str | None
    model: Model
    request: R
    talk: Talk | None
    wants_usage: bool = False
    assumed_model: str | None = None
    keep: Keep | None = None
    at: int = field(default_factory=lambda: int(time.time() * 1000))
    started: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class Reply:
    """A whole answer, durable, ready to be sent."""

    body: bytes
    cost: float | None


@dataclass(frozen=True, slots=True)
class Relay:
    """What every call needs. One for each worker. `observe` is told of each attempt that is over, `failed` of each
    failure of a backend, by its name. `max_output_tokens`: of an answer that neither request nor model limits."""

    catalog: Catalog
    admission: Admission
    ledger: Ledger
    drain: Drain
    counter: TokenCounter
    observe: Callable[[UsageRow], None] = lambda row: None
    failed: Callable[[str, UpstreamError], None] = lambda backend, failure: None
    max_output_tokens: int = 4096
    loop: asyncio.AbstractEventLoop | None = None
    """In which they all run, if it is known: asking asyncio for it costs a system call each time."""


class Call(Generic[R]):
    """One logical request. `route` is the one in use, or the last one that was."""

    route: Route | None = None
    stopped: StopReason | None = None
    _running: asyncio.Task[Any] | None = None
    _committed = False
    _broken_off = False
    _interrupted = False
    _out_of_time = False
    _stored: StoredCompletion | None = None
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, relay: Relay, job: Job[R]) -> None:
        self.job: Job[R] = job
        self.ticket = Ticket()
        self._relay = relay
        self._meter = Meter(job.request_id, job.caller, job.end_user, job.at, stream=job.request.stream)
        self._name = job.model.name
        self._attempt_started = job.started

    def status_sent(self) -> None:
        """Our client has a status 200 by now: no attempt may follow."""
        self._committed = True

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
        self._out_of_time = True
        self._break_off()

    @property
    def policy(self) -> Literal["drain", "cancel"]:
        route = self.route or self.job.model.routes[0]
        return route.on_disconnect

    @property
    def is_event_stream(self) -> bool:
        """May comments and error events be written between its pieces?"""
        return self.job.request.stream

    @property
    def conversation_id(self) -> str | None:
        return self.job.talk.id if self.job.talk is not None else None

    # --- attempts

    def _demand(self, priced: bool) -> Demand:
        relay, job, request = self._relay, self.job, self.job.request
        read = estimates.input_tokens(request)
        written = estimates.output_tokens(request, job.model.max_output_tokens or relay.max_output_tokens)
        if not priced:
            return Demand(read + written)
        routes = relay.catalog.routes(job.model)
        return Demand(read + written, estimates.cost(routes, job.at, read, written, request.data.get("service_tier")))

    def _give_back(self) -> None:
        """At the end of every call, however it ended: what no turn has taken along."""
        if self.ticket.holds:
            self._relay.admission.release(self._relay.admission.settle(self.ticket, 0, 0))

    async def _try_routes(
        self, call: Callable[[Route, R], Coroutine[Any, Any, T]], check: Callable[[T], T] | None = None
    ) -> T:
        """The answer of the first route that gives one which passes the `check`, once the limits have let the call in.
        Raises GatewayError."""
        job, relay = self.job, self._relay
        self.ticket = await relay.admission.admit(job.caller, job.end_user, self._demand)
        plan = relay.catalog.attempts(job.model, job.request.operation)
        if len(plan) == 1:
            plan *= 2
        for number, (name, route) in enumerate(plan, 1):
            self._name, self.route, self._attempt_started = name, route, time.perf_counter()
            failures_before = route.health.failures
            try:
                cancelled_before = self._begin_work()
                try:
                    answer = await call(route, self._request_for(route))
                    if check is not None:
                        answer = check(answer)
                except BaseException as raised:
                    self._judge(raised, cancelled_before)
                finally:
                    self._end_work()
            except BadRequest:  # this backend can never do it, and was not asked
                follower = attempts.follower(plan, number)
                if follower is None or follower is route:
                    raise
            except UpstreamError as failure:
                if not self._broken_off:
                    route.health.failed(failure)
                    relay.failed(route.backend.name, failure)
                follower = attempts.follower(plan, number)
                ended = self.stopped or self._committed
                if ended or follower is None or not attempts.may_follow(failure, route, follower):
                    raise
                log.warning("%s failed (%s), trying again", route.backend.name, failure.log or failure.message)
                self._row(nothing("error", cost_unknown=not attempts.refused(failure)), charged=False)
            else:
                route.health.answered(failures_before)
                return answer
        raise AssertionError("a model has at least one route")

    def _begin_work(self) -> int:
        """From here to `_end_work` `_break_off` can end what runs upstream. This is done in our own task, as
        `asyncio.timeout` does it: another one would cost more than what it does. Gives how often it is cancelled."""
        if self._broken_off:
            raise NeverSent("The call was broken off.", log=self.stopped)
        task = asyncio.current_task(self._relay.loop)
        assert task is not None
        self._running = task
        return task.cancelling()

    def _judge(self, raised: BaseException, cancelled_before: int) -> NoReturn:
        """Raises what has ended the work, as the call shall see it: UpstreamError where `_break_off` has."""
        task = self._running
        assert task is not None
        if isinstance(raised, asyncio.CancelledError):
            if not self._interrupted:
                raise raised
            self._interrupted = False
            if task.uncancel() > cancelled_before:  # somebody else cancels, too
                raise raised
            kind = NeverSent if UNSENT in raised.args else UpstreamError
            raise kind("The call was broken off.", log=self.stopped) from None
        if isinstance(raised, NeverSent):
            if not self._interrupted and task.cancelling() > cancelled_before:  # by others, in the client's words
                raise asyncio.CancelledError from None
            raise raised
        if isinstance(raised, GatewayError) or not isinstance(raised, Exception):
            raise raised
        raise backend_failed(raised) from raised  # a backend's own mistake must not cost the call its row

    def _end_work(self) -> None:
        task, self._running = self._running, None
        if self._interrupted and task is not None:  # and the work ended in another way
            self._interrupted = False
            task.uncancel()

    def _break_off(self) -> None:
        self._broken_off = True
        if self._running is not None and not self._interrupted:
            self._interrupted = True
            self._running.cancel()

    def _request_for(self, route: Route) -> R:
        request = self.job.request
        if (request.model or self.job.assumed_model) == route.upstream_model and not attempts.names_others(request):
            return request
        return request.with_model(route.upstream_model)

    # --- records

    async def _estimate(self, answers: list[Message]) -> Usage:
        """What was used, for an upstream that did not say."""
        raise NotImplementedError

    def _hurried(self) -> bool:
        """Is the worker ending? Then a record must not wait for exact figures."""
        return self._out_of_time

    @property
    def _counted_model(self) -> str:
        return self.route.upstream_model if self.route is not None else self.job.model.name

    async def _outcome(self, told: Usage | None, answers: list[Message], reason: object) -> Outcome:
        if told is not None:
            return self._outcome_as_told(told, reason)
        return self._ended(Outcome("ok", await self._estimate(answers), "gateway", _text(reason)))

    def _outcome_as_told(self, usage: Usage, reason: object) -> Outcome:
        """Of an answer whose usage the upstream has told."""
        return self._ended(Outcome("ok", usage, "upstream", _text(reason)))

    def _ended(self, outcome: Outcome) -> Outcome:
        if self.stopped is not None:
            outcome.status = outcome.finish_reason = self.stopped
            outcome.ended_by = self.policy if self.stopped == "client_disconnected" else None
        return outcome

    async def _record_failure(self, failure: GatewayError) -> GatewayError:
        """A call that has no answer: its rows, and what was asked if it was not the upstream's fault. Returns the
        failure as the client shall see it."""
        if self.route is None:
            return failure
        if isinstance(failure, NeverSent) or not isinstance(failure, UpstreamError):  # no call, so no row of its own
            earlier = self._meter.rows[-1] if self._meter.rows else None
            await self._record_quietly(earlier, keep_talk=False)
            return cut_short() if self.stopped == "interrupted" else failure
        refused = attempts.refused(failure)
        ended_by_us = self.stopped is not None and not refused
        outcome = await self._outcome(None, [], None) if ended_by_us else nothing("error", cost_unknown=not refused)
        row = self._row(outcome, charged=ended_by_us)
        if failure.status >= 500:
            failure.headers.setdefault("x-should-retry", "false")
        await self._record_quietly(row, keep_talk=ended_by_us)
        return cut_short() if self.stopped == "interrupted" else failure

    async def _record_quietly(self, row: UsageRow | None, *, keep_talk: bool) -> None:
        """For a call that has failed anyway: its client hears of that failure, the log of this one."""
        try:
            if row is not None:
                await self._record(None, row, keep_talk=keep_talk)
        except GatewayError as unrecorded:
            log.error("a failed call is not recorded: %s", unrecorded.log or unrecorded.message)

    async def _record(self, answer: Message | None, row: UsageRow, *, keep_talk: bool = True) -> None:
        """One turn to the ledger. Once given it is the ledger's, even if this task is cancelled."""
        turn = self._turn(answer, row, keep_talk=keep_talk)
        await self._relay.ledger.record(turn)
        self._was_recorded(turn)

    def _turn(self, answer: Message | None, row: UsageRow, *, keep_talk: bool = True) -> Turn:
        """For the ledger. What it holds of its limits is the turn's to give back."""
        talk, conversation = self.job.talk, None
        if talk is not None:
            if keep_talk or not talk.is_new:
                row.conversation_id = talk.id
            if keep_talk:
                conversation = talk.turn(
                    answer,
                    row.created_at,
                    model=row.model,
                    finish_reason=row.finish_reason,
                    input_tokens=row.input_tokens,
                    output_tokens=row.output_tokens,
                    cost_nanousd=row.cost_nanousd or 0,
                )
        rows = self._meter.rows
        if len(rows) > 1:
            for earlier in rows:
                earlier.conversation_id = row.conversation_id
        settlements = self._relay.admission.settle(self.ticket, *self._meter.charged())
        return Turn(rows, conversation, settlements, self._stored)

    def _was_recorded(self, turn: Turn) -> None:
        if self.job.talk is not None and turn.conversation is not None:
            self.job.talk.recorded = True

    def _row(self, outcome: Outcome, *, charged: bool = True) -> UsageRow:
        assert self.route is not None
        row = self._meter.row(self.route, self._name, outcome, self._attempt_started, charged=charged)
        self._relay.observe(row)
        return row

    def _failed_midway(self, outcome: Outcome, failure: UpstreamError) -> None:
        """A reply that had begun has broken, and not because we broke it off."""
        assert self.route is not None
        outcome.status, outcome.finish_reason = "error", "error"
        self._relay.failed(self.route.backend.name, failure)

    def _doubt_usage(self) -> None:
        """The upstream has told a usage that cannot be true. It is not believed, and somebody should know."""
        assert self.route is not None
        log.warning("%s told a usage that cannot be true", self.route.backend.name)
        self._relay.failed(self.route.backend.name, UntrueUsage("The upstream told a usage that cannot be true."))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _text(reason: object) -> str | None:
    return reason if isinstance(reason, str) else None


def backend_failed(failure: Exception) -> UpstreamError:
    log.error("a backend failed in a way that nobody foresaw", exc_info=failure)
    return UpstreamError("The gateway could not read the upstream's answer.", log=type(failure).__name__)


def cut_short() -> Unavailable:
    """The upstream may have been paid already, so a client should not repeat the call by itself."""
    failure = Unavailable("The gateway is shutting down and had to break off this answer.")
    failure.headers["x-should-retry"] = "false"
    return failure
