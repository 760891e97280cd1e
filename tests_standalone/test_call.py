"""Several calls in a row: who is tried, who is left alone for a while, and the rows of all attempts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from gateway import health as healths
from gateway.auth import Caller
from gateway.backends.base import ModelInfo
from gateway.call import Job, Relay
from gateway.catalog import Catalog, Model, OnDisconnect, Route
from gateway.drain import Drain
from gateway.errors import BadRequest, GatewayError, NeverSent, Unavailable, UpstreamError, UpstreamUnreachable
from gateway.ledger import Ledger
from gateway.relay import Exchange
from gateway.store.database import Database
from gateway.store.usage import UsageRow
from gateway.tokens import TokenCounter
from gateway.wire.chat import ChatRequest, Completion
from tests_standalone.conftest import NOON, no_limits, rows, settle

HANG = "no answer comes"
OK = "an answer"


class Upstream:
    """A backend that does one act after the other (an exception is raised) and then the last one again and again."""

    def __init__(self, name: str, *acts: Any) -> None:
        self.name = name
        self.asked: list[ChatRequest] = []
        self._acts = list(acts)

    async def models(self) -> Sequence[ModelInfo]:
        return []

    async def complete(self, request: ChatRequest) -> Completion:
        self.asked.append(request)
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        if act == HANG:
            await asyncio.Event().wait()
        if isinstance(act, Exception):
            raise act
        data = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
        return Completion(json.dumps(data).encode(), data)

    async def stream(self, request: ChatRequest) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Nothing is held."""


def refusal(status: int, retry_after: float | None = None) -> UpstreamError:
    failure = UpstreamError(f"The upstream said {status}.", status=status, upstream_status=status)
    failure.retry_after = retry_after
    return failure


def never() -> BadRequest:
    return BadRequest("This upstream takes one choice.", param="n")


def unreachable() -> UpstreamError:
    return UpstreamUnreachable("The upstream could not be reached.")


class Rig:
    """A relay on a real database, and one model that the upstreams serve, tried in that order."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.ledger = Ledger(database)
        self.observed: list[UsageRow] = []
        self.relay = Relay(Catalog({}), no_limits(), self.ledger, Drain(), TokenCounter(), self.observed.append)
        self.model = Model("m", [])
        self._calls = 0

    def use(self, *upstreams: Upstream, on_disconnect: OnDisconnect = "drain") -> list[Route]:
        weights = [10 ** (6 * (len(upstreams) - place)) for place in range(len(upstreams))]
        routes = [
            Route(each, "m", None, weight, on_disconnect) for each, weight in zip(upstreams, weights, strict=True)
        ]
        self.model = Model("m", routes)
        return routes

    def exchange(self, named: bytes = b'"model":"m"') -> Exchange:
        self._calls += 1
        request = ChatRequest.parse(b'{%b,"messages":[{"role":"user","content":"hello"}]}' % named)
        return Exchange(
            self.relay, Job(f"req_{self._calls}", Caller("ann", None), None, self.model, request, None, at=NOON)
        )

    async def call(self) -> Exchange:
        exchange = self.exchange()
        await exchange.complete()
        return exchange

    async def attempts(self, number: int | None = None) -> list[tuple[int, str, str, int]]:
        """The rows of a call, else of the last one: attempt, backend, status, charged."""
        sql = "SELECT attempt, backend, status, charged FROM usage_rows WHERE request_id = $1 ORDER BY attempt"
        return await rows(self.database, sql, f"req_{number or self._calls}")


@pytest.fixture
async def rig(sqlite: Database) -> AsyncIterator[Rig]:
    found = Rig(sqlite)
    found.ledger.start()
    yield found
    await found.ledger.aclose(grace=0.1)


# What a backend can never do


async def test_another_backend_may_be_able_to_do_it(rig: Rig) -> None:
    rig.use(Upstream("a", never()), Upstream("b", OK))
    exchange = await rig.call()
    assert exchange.route is not None
    assert exchange.route.backend.name == "b"
    assert await rig.attempts() == [(1, "b", "ok", 1)], "a was not called"
    assert exchange.job.model.routes[0].health.calls == 0


async def test_nobody_can_ever_do_it(rig: Rig) -> None:
    rig.use(Upstream("a", never()), Upstream("b", never()))
    with pytest.raises(BadRequest, match="one choice"):
        await rig.call()
    assert await rig.attempts() == []


async def test_the_only_backend_can_never_do_it_and_is_asked_once(rig: Rig) -> None:
    upstream = Upstream("a", never())
    rig.use(upstream)
    with pytest.raises(BadRequest):
        await rig.call()
    assert len(upstream.asked) == 1


async def test_a_failure_before_it_has_its_row(rig: Rig) -> None:
    rig.use(Upstream("a", refusal(500)), Upstream("b", never()))
    with pytest.raises(GatewayError):
        await rig.call()
    assert await rig.attempts() == [(1, "a", "error", 0)]


# The model of the request


@pytest.mark.parametrize(
    ("named", "sent"),
    [
        (b'"model" : "m"', b'"model" : "m"'),
        (b'"x":{"model":"dear"},"model" : "m"', b'"x":{"model":"dear"},"model" : "m"'),
        (b'"model":"dear","model":"m"', b'"model":"m"'),
        (b'"mod\\u0065l":"dear","model":"m"', b'"model":"m"'),
        (b'"model":"dear","\\u006dodel":"m"', b'"model":"m"'),
    ],
    ids=["once", "once at the top", "twice", "twice, the first escaped", "twice, the last escaped"],
)
async def test_the_upstream_finds_no_other_model_than_we_did(rig: Rig, named: bytes, sent: bytes) -> None:
    upstream = Upstream("a", OK)
    rig.use(upstream)
    await rig.exchange(named).complete()
    assert upstream.asked[0].raw == b'{%b,"messages":[{"role":"user","content":"hello"}]}' % sent


# Health


async def test_a_route_that_said_when_to_come_back_is_not_asked_until_then(rig: Rig) -> None:
    busy, spare = Upstream("a", refusal(429, retry_after=600), OK), Upstream("b", OK)
    first, _ = rig.use(busy, spare)
    await rig.call()
    assert await rig.attempts() == [(1, "a", "error", 0), (2, "b", "ok", 1)]
    for _ in range(5):
        await rig.call()
        assert await rig.attempts() == [(1, "b", "ok", 1)]
    assert len(busy.asked) == 1
    first.health.cooling_until = 0
    await rig.call()
    assert await rig.attempts() == [(1, "a", "ok", 1)]


async def test_when_all_cool_the_first_to_recover_is_tried_and_its_words_are_told(rig: Rig) -> None:
    a, b = Upstream("a", refusal(429, retry_after=600)), Upstream("b", refusal(429, retry_after=300))
    rig.use(a, b)
    for order in ("ab", "ba"):
        with pytest.raises(UpstreamError) as caught:
            await rig.call()
        assert caught.value.upstream_status == 429
        assert await rig.attempts() == [(1, order[0], "error", 0), (2, order[1], "error", 0)]


async def test_the_only_route_is_tried_though_it_cools(rig: Rig) -> None:
    (route,) = rig.use(Upstream("a", refusal(429, retry_after=600), OK))
    with pytest.raises(UpstreamError):
        await rig.call()
    assert route.health.cooling
    await rig.call()
    assert not route.health.cooling
    assert await rig.attempts() == [(1, "a", "ok", 1)]


@pytest.mark.parametrize("failure", [refusal(500), refusal(401), unreachable(), UpstreamError("It broke.")], ids=str)
async def test_failures_of_the_upstream_cool_it_down(
    rig: Rig, failure: UpstreamError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healths, "FIRST_PAUSE", healths.LONGEST_PAUSE)
    broken = Upstream("a", failure)
    route, _ = rig.use(broken, Upstream("b", OK))
    await rig.call()
    await rig.call()
    assert len(broken.asked) == 1
    assert route.health.describe()["failures"] == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_the_clients_mistakes_do_not(rig: Rig, status: int) -> None:
    route, _ = rig.use(Upstream("a", refusal(status), OK), Upstream("b", OK))
    with pytest.raises(UpstreamError):
        await rig.call()
    await rig.call()
    assert await rig.attempts() == [(1, "a", "ok", 1)]
    assert route.health.describe()["failures"] == 0


async def test_the_answer_to_an_older_call_does_not_end_a_newer_pause(rig: Rig) -> None:
    answer = asyncio.Event()

    class Slow(Upstream):
        """Its first call is answered late."""

        async def complete(self, request: ChatRequest) -> Completion:
            if not self.asked:
                self.asked.append(request)
                await answer.wait()
            return await super().complete(request)

    route, _ = rig.use(Slow("a", refusal(429, retry_after=600), OK), Upstream("b", OK))
    route.health.failed(refusal(500))
    route.health.cooling_until = 0
    older = asyncio.ensure_future(rig.call())
    await settle()
    await rig.call()
    assert route.health.cooling
    answer.set()
    await older
    assert await rig.attempts(1) == [(1, "a", "ok", 1)]
    assert route.health.cooling


async def test_once_more_on_the_only_route_counts_twice(rig: Rig) -> None:
    (route,) = rig.use(Upstream("a", refusal(503)))
    with pytest.raises(UpstreamError):
        await rig.call()
    described = route.health.describe()
    assert (described["calls"], described["failures"], described["failures_in_a_row"]) == (2, 2, 2)
    assert await rig.attempts() == [(1, "a", "error", 0), (2, "a", "error", 0)]


async def test_a_call_that_we_broke_off_is_not_the_upstreams_fault(rig: Rig) -> None:
    (route,) = rig.use(Upstream("a", HANG), on_disconnect="cancel")
    exchange = rig.exchange()
    running = asyncio.ensure_future(exchange.complete())
    await settle()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await running
    assert not route.health.cooling
    assert route.health.calls == 0
    assert await rig.attempts() == [(1, "a", "client_disconnected", 1)]


# Ends


async def test_nobody_else_is_tried_for_a_client_that_has_left(rig: Rig) -> None:
    spare = Upstream("b", OK)
    slow = asyncio.Event()

    class Slow(Upstream):
        async def complete(self, request: ChatRequest) -> Completion:
            await slow.wait()
            return await super().complete(request)

    rig.use(Slow("a", refusal(500)), spare)
    exchange = rig.exchange()
    running = asyncio.ensure_future(exchange.complete())
    await settle()
    exchange.client_left()
    slow.set()
    with pytest.raises(UpstreamError):
        await running
    assert spare.asked == []
    assert await rig.attempts() == [(1, "a", "error", 0)]


async def test_a_call_that_is_ended_before_it_began_has_no_row(rig: Rig) -> None:
    upstream = Upstream("a", OK)
    rig.use(upstream)
    exchange = rig.exchange()
    exchange.interrupt()
    with pytest.raises(Unavailable):
        await exchange.complete()
    assert upstream.asked == []
    assert await rig.attempts() == []


class Connecting(Upstream):
    """Its connection is never made; it says so when the call ends before."""

    async def complete(self, request: ChatRequest) -> Completion:
        self.asked.append(request)
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value] # it never returns
        except asyncio.CancelledError:
            raise NeverSent("The call was ended before it was sent.") from None


async def test_nor_one_whose_only_try_was_never_sent(rig: Rig) -> None:
    (route,) = rig.use(Connecting("a"), on_disconnect="cancel")
    exchange = rig.exchange()
    running = asyncio.ensure_future(exchange.complete())
    await settle()
    exchange.client_left()
    with pytest.raises(NeverSent):
        await running
    assert await rig.attempts() == []
    assert route.health.calls == 0


@pytest.mark.parametrize("kind", [Connecting, Upstream])
async def test_who_is_cancelled_from_outside_tries_nobody_else(rig: Rig, kind: type[Upstream]) -> None:
    spare = Upstream("b", OK)
    route, _ = rig.use(kind("a", HANG), spare)
    running = asyncio.ensure_future(rig.exchange().complete())
    await settle()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert spare.asked == []
    assert not route.health.cooling


# Records


async def test_every_attempt_is_observed_once(rig: Rig) -> None:
    rig.use(Upstream("a", refusal(429)), Upstream("b", unreachable()), Upstream("c", OK))
    await rig.call()
    assert [(row.attempt, row.backend, row.status) for row in rig.observed] == [
        (1, "a", "error"),
        (2, "b", "error"),
        (3, "c", "ok"),
    ]
    assert await rig.attempts() == [(1, "a", "error", 0), (2, "b", "error", 0), (3, "c", "ok", 1)]


async def test_a_backends_own_mistake_is_a_failure_like_others(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.use(Upstream("a", KeyError("nobody thought of this")), Upstream("b", OK))
    await rig.call()
    assert await rig.attempts() == [(1, "a", "error", 0), (2, "b", "ok", 1)]
    assert "nobody thought of this" in caplog.text
    (_, cost), _ = await rows(rig.database, "SELECT attempt, cost_nanousd FROM usage_rows ORDER BY attempt")
    assert cost is None, "it may have cost something"


@pytest.mark.parametrize("ours_first", [True, False])
async def test_a_cancellation_from_outside_outlives_our_own(rig: Rig, ours_first: bool) -> None:
    """Both come before the call runs again."""
    rig.use(Upstream("a", HANG), Upstream("b", OK))
    exchange = rig.exchange()
    running = asyncio.ensure_future(exchange.complete())
    await settle()
    ends = [exchange.interrupt, running.cancel]
    for end in ends if ours_first else reversed(ends):
        end()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert running.cancelling() == 1
