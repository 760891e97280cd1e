"""An upstream's behaviour and a client's in; what the client gets, and exactly the rows that belong to it, out.

Prices are one nano-dollar for a token of input and two for one of output.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from gateway import call as calls
from gateway import ledger as ledgers
from gateway import relay as relays
from gateway.auth import Caller
from gateway.backends.base import ModelInfo
from gateway.backends.scripted import Script, ScriptedBackend
from gateway.call import Job, Relay
from gateway.catalog import Catalog, Model, OnDisconnect, Route
from gateway.conversations import Conversations, Talk
from gateway.drain import Drain
from gateway.errors import (
    GatewayError,
    NeverSent,
    NotRecorded,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.ledger import Ledger
from gateway.metering import Outcome
from gateway.pricing import Price, configured
from gateway.relay import Exchange, StreamExchange
from gateway.responses import StreamResponse
from gateway.store.database import Database
from gateway.tokens import TokenCounter
from gateway.wire.chat import ChatRequest, Chunk, Completion, Usage
from gateway.wire.jsontext import dumps
from tests_standalone.conftest import NOON, Unsteady, no_limits, rows, settle

PRICE = Price(1_000_000, 2_000_000)
END = "the end mark"
HANG = "nothing more comes"
Act = Any
"""What an upstream does with a call: an exception is raised, an object is the whole reply, a list are the reads of a
stream: lists of chunks, exceptions, END, or HANG."""


class Upstream:
    """A backend that does one act after the other and remembers what it was asked."""

    def __init__(self, name: str = "up", *acts: Act) -> None:
        self.name = name
        self.asked: list[ChatRequest] = []
        self.streams: list[Stream] = []
        self._acts = list(acts)

    async def models(self) -> Sequence[ModelInfo]:
        return []

    async def complete(self, request: ChatRequest) -> Completion:
        act = self._next(request)
        await asyncio.sleep(0)
        if act == HANG:
            await asyncio.Event().wait()
        return act if isinstance(act, Completion) else Completion(dumps(act), act)

    async def stream(self, request: ChatRequest) -> Stream:
        act = self._next(request)
        if act == HANG:
            await asyncio.Event().wait()
        self.streams.append(Stream(act))
        return self.streams[-1]

    async def aclose(self) -> None:
        """Nothing is held."""

    def _next(self, request: ChatRequest) -> Act:
        self.asked.append(request)
        act = self._acts.pop(0)
        if isinstance(act, Exception):
            raise act
        return act


class Stream:
    def __init__(self, reads: Sequence[Any]) -> None:
        self.complete = False
        self.closed = asyncio.Event()
        self.go_on = asyncio.Event()
        self._reads = list(reads)

    async def read(self) -> Sequence[Chunk]:
        act = self._reads.pop(0) if self._reads else ()
        if act == HANG:
            waits = [asyncio.ensure_future(event.wait()) for event in (self.closed, self.go_on)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if self.closed.is_set():
                raise UpstreamError("The connection to the upstream broke.")
            return await self.read()
        if self.closed.is_set():
            raise UpstreamError("The connection to the upstream broke.")
        if isinstance(act, Exception):
            raise act
        if act == END:
            self.complete = True
            return ()
        return [Chunk(raw=item) if isinstance(item, bytes) else Chunk(data=item) for item in act]

    async def close(self) -> None:
        self.closed.set()


def whole(content: str | None = "hello", usage: Any = (10, 5), **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    reply = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice]}
    return reply | ({} if usage is None else {"usage": counted(usage)}) | fields


def counted(usage: Any) -> Any:
    if not isinstance(usage, tuple):
        return usage
    return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}


def chunk(content: str | None = None, reason: str | None = None, index: int = 0, **delta: Any) -> dict[str, Any]:
    said = delta if content is None else {"content": content, **delta}
    choice = {"index": index, "delta": said, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def usage_chunk(usage: Any = (10, 5)) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": counted(usage)}


HELLO = [
    [chunk(role="assistant")],
    [chunk("hel")],
    [chunk("lo")],
    [chunk(reason="stop")],
    [usage_chunk()],
    END,
]


def refusal(status: int) -> UpstreamError:
    return UpstreamError(f"The upstream said {status}.", status=status, upstream_status=status)


def unreachable() -> UpstreamError:
    return UpstreamUnreachable("The upstream could not be reached.")


class Rig:
    """A relay on a real database."""

    def __init__(self, database: Database) -> None:
        self.database = Unsteady(database)
        self.ledger = Ledger(self.database)
        self.drain = Drain()
        self.conversations = Conversations(database)
        self.relay = Relay(Catalog({}), no_limits(), self.ledger, self.drain, TokenCounter())
        self.talk: Talk | None = None

    def use(self, *models: Model) -> None:
        self.relay = Relay(Catalog({}, models), no_limits(), self.ledger, self.drain, TokenCounter())

    async def job(self, model: Model, *, keep: bool = True, **fields: Any) -> Job:
        """A call of ann's that says `12 characters` (3 tokens by estimate)."""
        body = {"model": model.name, "messages": [{"role": "user", "content": "12characters"}], **fields}
        request = ChatRequest.parse(json.dumps(body).encode())
        caller = Caller("ann", "key_1")
        if self.talk is not None:
            self.talk.close()
        self.talk = await self.conversations.open(caller, request, None) if keep else None
        sent = self.conversations.prepare(request, self.talk)
        return Job("req_1", caller, "kid", model, sent, self.talk, request.wants_usage, at=NOON)

    async def exchange(self, *upstreams: Upstream | ScriptedBackend, **options: Any) -> Exchange:
        return Exchange(self.relay, await self.job(model(*upstreams, **_routing(options)), **options))

    async def stream(self, *upstreams: Upstream | ScriptedBackend, **options: Any) -> StreamExchange:
        found = await self.job(model(*upstreams, **_routing(options)), stream=True, **options)
        return StreamExchange(self.relay, found)

    async def rows(self) -> list[dict[str, Any]]:
        columns = (
            "attempt, backend, model, upstream_model, status, finish_reason, input_tokens, output_tokens, counted_by, "
            "cost_nanousd, price_unknown, charged, stream, ended_by, conversation_id, request_id, user_id, key_id, "
            "end_user"
        )
        found = await rows(self.database, f"SELECT {columns} FROM usage_rows ORDER BY attempt")
        return [dict(zip(columns.split(", "), row, strict=True)) for row in found]

    async def check_rows(self, *expected: Mapping[str, Any]) -> None:
        """Exactly these rows, as far as their columns are named."""
        found = await self.rows()
        assert [{key: row[key] for key in want} for row, want in zip(found, expected, strict=False)] == list(expected)
        assert len(found) == len(expected)
        assert [row["attempt"] for row in found] == list(range(1, len(found) + 1))

    async def said(self) -> list[tuple[str, Any, str | None]]:
        """The stored messages: role, content, finish_reason."""
        found = await rows(self.database, "SELECT role, content, finish_reason FROM messages ORDER BY seq")
        return [(role, json.loads(content), reason) for role, content, reason in found]


def _routing(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options.pop(key) for key in ("price", "on_disconnect") if key in options}


def model(
    *upstreams: Upstream | ScriptedBackend, price: Price | None = PRICE, on_disconnect: OnDisconnect = "drain"
) -> Model:
    """`m`, which the upstreams serve in that order as far as weights can say so."""
    weights = [10 ** (6 * (len(upstreams) - place)) for place in range(len(upstreams))]
    return Model(
        "m",
        [Route(backend, "m", price, weight, on_disconnect) for backend, weight in zip(upstreams, weights, strict=True)],
    )


@pytest.fixture
async def rig(sqlite: Database) -> AsyncIterator[Rig]:
    found = Rig(sqlite)
    found.ledger.start()
    yield found
    found.database.let_go()
    await found.ledger.aclose(grace=0.1)


async def drive(exchange: StreamExchange) -> list[Any]:
    """Opens and reads to the end: the events that left, parsed."""
    return events(await exchange.open() + await rest(exchange))


async def rest(exchange: StreamExchange) -> bytes:
    left = b""
    while not exchange.ended:
        left += await exchange.read()
    return left


async def drive_until_failure(exchange: StreamExchange) -> tuple[list[Any], GatewayError]:
    left = b""
    try:
        left += await exchange.open()
        while not exchange.ended:
            left += await exchange.read()
    except GatewayError as failure:
        assert exchange.ended
        return events(left), failure
    raise AssertionError(f"it ended well: {events(left)}")


def events(sent: bytes) -> list[Any]:
    found = [event.removeprefix(b"data: ") for event in sent.split(b"\n\n") if event]
    return [event.decode() if event == b"[DONE]" else json.loads(event) for event in found]


def texts(found: list[Any]) -> str:
    deltas = [choice["delta"] for event in found if isinstance(event, dict) for choice in event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


OK_ROW = {
    "backend": "up", "model": "m", "upstream_model": "m", "status": "ok", "finish_reason": "stop", "input_tokens": 10,
    "output_tokens": 5, "counted_by": "upstream", "cost_nanousd": 20, "price_unknown": 0, "charged": 1,
    "ended_by": None, "request_id": "req_1", "user_id": "ann", "key_id": "key_1", "end_user": "kid",
}  # fmt: skip
FAILED_ROW = {
    "status": "error", "input_tokens": 0, "output_tokens": 0, "cost_nanousd": 0, "price_unknown": 0, "charged": 0,
    "finish_reason": None, "ended_by": None,
}  # fmt: skip


def failed_row(failure: UpstreamError) -> dict[str, Any]:
    """What nobody answered may have cost something; what was refused or not reached has cost nothing."""
    refused = failure.upstream_status is not None or isinstance(failure, UpstreamUnreachable)
    return FAILED_ROW | ({} if refused else {"cost_nanousd": None})


SAID = [("user", "12characters", None), ("assistant", "hello", "stop")]
ASKED = SAID[:1]


# A whole reply


async def test_a_reply_is_recorded_and_says_what_it_cost(rig: Rig) -> None:
    exchange = await rig.exchange(Upstream("up", whole()))
    reply = await exchange.complete()

    found = json.loads(reply.body)
    assert reply.cost == 20e-9
    assert found.items() >= whole(usage=None).items()
    assert found["usage"] == counted((10, 5)) | {"cost": 20e-9}
    assert found["cost"] == 20e-9
    assert found["conversation_id"] == exchange.conversation_id
    assert found["timings"].items() >= {"prompt_n": 10, "predicted_n": 5}.items()
    await rig.check_rows(OK_ROW | {"stream": 0, "conversation_id": exchange.conversation_id})
    assert await rig.said() == SAID


async def test_all_other_bytes_of_a_reply_are_the_upstreams(rig: Rig) -> None:
    raw = (
        b'{ "x" : 1.00, "id": "c1","object": "chat.completion", "created":1, "model":"m",\n'
        b' "choices":[{"index":0,"message":{"role":"assistant","content":"\\u0041"},"finish_reason":"stop"}],\n'
        b'  "usage": {"prompt_tokens":10, "completion_tokens":5,"total_tokens":15,"y": 1e2},\n'
        b'"timings":{"z":1}, "big": 1 }'
    )
    exchange = await rig.exchange(Upstream("up", Completion(raw, json.loads(raw))), keep=False)
    reply = await exchange.complete()
    assert reply.body == raw.replace(b'"y": 1e2}', b'"y": 1e2,"cost":2e-8}').replace(b": 1 }", b': 1,"cost":2e-8}')


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("told", ["nothing of ours", "timings", "cost", "conversation_id", "usage.cost", "usage after"])
async def test_what_is_added_in_one_step_is_what_edits_add(rig: Rig, told: str, blank: str, keep: bool) -> None:
    data = whole(created=1, system_fingerprint='"usage"')
    if told == "usage.cost":
        data["usage"]["cost"] = 3
    elif told == "usage after":
        data = {"usage": data["usage"], **data}
    elif told != "nothing of ours":
        data[told] = {"told": 1}
    completion = Completion(json.dumps(data, separators=(",", ":" + blank)).encode(), data)
    exchange = await rig.exchange(Upstream("up", completion), keep=keep)
    reply = await exchange.complete()

    outcome = Outcome("ok", Usage(10, 5), "upstream", "stop")
    assert reply.body == exchange._edited_body(completion, outcome, exchange._meter.rows[-1], reply.cost)
    assert json.loads(reply.body)["usage"]["cost"] == 20e-9


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "none",
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 10**30},
        {"prompt_tokens": "7"},
    ],
)
async def test_a_reply_without_true_usage_is_estimated_and_says_so(rig: Rig, usage: Any) -> None:
    """A97, A99: 12 characters asked, 7 answered."""
    reply = await (await rig.exchange(Upstream("up", whole("7 chars", usage)))).complete()
    assert json.loads(reply.body)["usage"] == counted((3, 2)) | {"cost": 7e-9}
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "input_tokens": 3, "output_tokens": 2, "cost_nanousd": 7})


NEGATIVE = {"prompt_tokens": -1, "completion_tokens": 5}


@pytest.mark.parametrize("usage", [{"prompt_tokens": 10, "completion_tokens": 5}, None, {}, NEGATIVE])
@pytest.mark.parametrize("streamed", [False, True])
async def test_somebody_hears_of_a_usage_that_cannot_be_true(
    rig: Rig, caplog: pytest.LogCaptureFixture, usage: Any, streamed: bool
) -> None:
    """A99: the log and the metrics. Who tells nothing has told nothing untrue."""
    told: list[tuple[str, str]] = []
    rig.relay = replace(rig.relay, failed=lambda backend, failure: told.append((backend, type(failure).__name__)))
    if streamed:
        await drive(await rig.stream(Upstream("up", [*HELLO[:4], [{**usage_chunk(), "usage": usage}], END])))
    else:
        await (await rig.exchange(Upstream("up", whole("7 chars", usage)))).complete()
    doubted = usage is NEGATIVE
    assert told == ([("up", "UntrueUsage")] if doubted else [])
    assert caplog.text.count("up told a usage that cannot be true") == doubted


async def test_a_price_nobody_knows_is_null_and_flagged(rig: Rig) -> None:
    reply = await (await rig.exchange(Upstream("up", whole()), price=None)).complete()
    found = json.loads(reply.body)
    assert (reply.cost, found["cost"], found["usage"]["cost"]) == (None, None, None)
    await rig.check_rows(OK_ROW | {"cost_nanousd": None, "price_unknown": 1})
    assert await rows(rig.database, "SELECT total_cost_nanousd FROM conversations") == [(0,)]


async def test_a_model_that_costs_nothing_costs_nothing(rig: Rig) -> None:
    reply = await (await rig.exchange(Upstream("up", whole()), price=Price(0, 0))).complete()
    assert reply.cost == 0
    await rig.check_rows(OK_ROW | {"cost_nanousd": 0})


async def test_all_choices_count_and_the_first_is_kept(rig: Rig) -> None:
    message = {"role": "assistant", "content": "12345678"}
    choices = [{"index": index, "message": message, "finish_reason": "length"} for index in range(3)]
    await (await rig.exchange(Upstream("up", whole(choices=choices, usage=None)), n=3)).complete()
    await rig.check_rows({"output_tokens": 6, "finish_reason": "length", "counted_by": "gateway"})
    assert await rig.said() == [*ASKED, ("assistant", "12345678", "length")]


TOOL_CALLS = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}]


async def test_tool_calls_are_kept(rig: Rig) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    await (await rig.exchange(Upstream("up", whole(choices=[choice])))).complete()
    await rig.check_rows(OK_ROW | {"finish_reason": "tool_calls"})
    ((extra,),) = await rows(rig.database, "SELECT extra FROM messages WHERE role = 'assistant'")
    assert json.loads(extra) == {"tool_calls": TOOL_CALLS}


STRANGE = {
    "no choices": {"choices": []},
    "a choice that is none": {"choices": [5]},
    "a message that is none": {"choices": [{"message": 5, "finish_reason": 7}]},
    "no message": {"choices": [{"index": 0}]},
    "no role": {"choices": [{"message": {"content": "x"}}]},
    "content of another type": {"choices": [{"message": {"role": "assistant", "content": {"x": 1}}}]},
    "parts that are none": {"choices": [{"message": {"role": "assistant", "content": [1, None]}}]},
    "tool calls that are none": {"choices": [{"message": {"role": "assistant", "tool_calls": "x"}}]},
    "text no engine stores": {"choices": [{"message": {"role": "assistant", "content": "a\x00\ud800"}}]},
    "a reason no engine stores": {"choices": [{"message": {"role": "assistant"}, "finish_reason": "a\x00\ud800"}]},
    "null in many places": {"choices": [{"message": None, "finish_reason": None}], "usage": None, "timings": None},
}


@pytest.mark.parametrize("fields", STRANGE.values(), ids=STRANGE.keys())
async def test_a_strange_reply_is_paid_for_and_recorded_like_any_other(rig: Rig, fields: dict[str, Any]) -> None:
    exchange = await rig.exchange(Upstream("up", whole(**fields)))
    reply = await exchange.complete()
    found = json.loads(reply.body)
    assert found["conversation_id"] == exchange.conversation_id
    assert isinstance(found["usage"]["cost"], float)
    await rig.check_rows({"status": "ok", "charged": 1})


async def test_the_echo_counts_words(rig: Rig) -> None:
    exchange = await rig.exchange(ScriptedBackend("echo", {"m": Script(reply="one two three")}))
    reply = await exchange.complete()
    assert json.loads(reply.body)["usage"]["completion_tokens"] == 3
    await rig.check_rows({"backend": "echo", "input_tokens": 1, "output_tokens": 3, "cost_nanousd": 7})


# Attempts, the same for whole replies and for streams


Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["whole", "stream"])
def call(request: pytest.FixtureRequest, rig: Rig) -> Call:
    """Runs one call to its end, of either kind."""

    async def one(*upstreams: Upstream, **options: Any) -> Any:
        if request.param == "whole":
            return await (await rig.exchange(*upstreams, **options)).complete()
        return await drive(await rig.stream(*upstreams, **options))

    one.answer = whole() if request.param == "whole" else HELLO  # type: ignore[attr-defined]  # what an upstream says
    return one


def answer(call: Call) -> Act:
    return call.answer  # type: ignore[attr-defined]  # as above


@pytest.mark.parametrize("failure", [refusal(500), refusal(502), refusal(503), refusal(529), unreachable()], ids=str)
async def test_a_failure_that_may_pass_is_tried_once_more(rig: Rig, call: Call, failure: UpstreamError) -> None:
    upstream = Upstream("up", failure, answer(call))
    await call(upstream)
    assert len(upstream.asked) == 2
    await rig.check_rows(FAILED_ROW, OK_ROW)
    assert await rig.said() == SAID
    first, second = await rig.rows()
    assert first["conversation_id"] == second["conversation_id"] is not None
    assert first["request_id"] == second["request_id"]


@pytest.mark.parametrize("failure", [refusal(500), unreachable()], ids=str)
async def test_and_only_once(rig: Rig, call: Call, failure: UpstreamError) -> None:
    upstream = Upstream("up", refusal(503), failure, answer(call))
    with pytest.raises(UpstreamError) as caught:
        await call(upstream)
    assert caught.value is failure
    assert failure.headers["x-should-retry"] == "false"
    await rig.check_rows(FAILED_ROW, FAILED_ROW)


@pytest.mark.parametrize(
    "failure",
    [refusal(400), refusal(404), refusal(409), refusal(413), refusal(415), refusal(422), refusal(401), refusal(429),
     UpstreamTimeout("The upstream did not answer in time."), UpstreamError("The connection to the upstream broke.")],
    ids=str,
)  # fmt: skip
async def test_no_other_failure_is_tried_again_on_the_same_route(rig: Rig, call: Call, failure: UpstreamError) -> None:
    upstream = Upstream("up", failure, answer(call))
    with pytest.raises(UpstreamError) as caught:
        await call(upstream)
    assert caught.value is failure
    assert ("x-should-retry" in failure.headers) is (failure.status >= 500)
    assert len(upstream.asked) == 1
    await rig.check_rows(failed_row(failure))
    assert await rig.said() == []
    assert await rows(rig.database, "SELECT id FROM conversations") == []


@pytest.mark.parametrize(
    "failure",
    [refusal(500), refusal(401), refusal(403), refusal(429), refusal(504), unreachable(),
     UpstreamTimeout("The upstream did not answer in time."), UpstreamError("The connection to the upstream broke.")],
    ids=str,
)  # fmt: skip
async def test_the_next_route_is_tried_after_any_failure_that_is_not_the_clients(
    rig: Rig, call: Call, failure: UpstreamError
) -> None:
    first, second = Upstream("first", failure), Upstream("up", answer(call))
    await call(first, second)
    await rig.check_rows(failed_row(failure) | {"backend": "first"}, OK_ROW)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 415, 422])
async def test_no_route_is_tried_after_the_clients_own_mistake(rig: Rig, call: Call, status: int) -> None:
    first, second = Upstream("first", refusal(status)), Upstream("up", answer(call))
    with pytest.raises(UpstreamError) as caught:
        await call(first, second)
    assert caught.value.status == status
    assert second.asked == []
    await rig.check_rows(FAILED_ROW | {"backend": "first"})


async def test_every_route_once_then_the_last_failure(rig: Rig, call: Call) -> None:
    upstreams = [Upstream(name, refusal(status)) for name, status in (("a", 500), ("b", 429), ("c", 503))]
    with pytest.raises(UpstreamError) as caught:
        await call(*upstreams)
    assert caught.value.upstream_status == 503
    await rig.check_rows(*(FAILED_ROW | {"backend": name} for name in "abc"))


async def test_a_fallback_is_called_by_its_own_names_and_prices(rig: Rig) -> None:
    first, second = Upstream("first", refusal(500)), Upstream("up", whole())
    spare = Model("spare", [Route(second, "real-spare", Price(0, 10_000_000))])
    wanted = Model("m", [Route(first, "real-m", PRICE)], fallbacks=["spare"])
    rig.use(wanted, spare)
    await Exchange(rig.relay, await rig.job(wanted)).complete()
    assert [first.asked[0].model, second.asked[0].model] == ["real-m", "real-spare"]
    await rig.check_rows(
        FAILED_ROW | {"backend": "first", "model": "m", "upstream_model": "real-m"},
        OK_ROW | {"model": "spare", "upstream_model": "real-spare", "cost_nanousd": 50},
    )


async def test_the_upstream_gets_the_request_as_it_was(rig: Rig) -> None:
    upstream = Upstream("up", whole())
    found = await rig.job(model(upstream), temperature=1.0, unknown={"a": [None]})
    await Exchange(rig.relay, found).complete()
    assert upstream.asked == [found.request]


# The database at the end


async def test_an_answer_that_cannot_be_recorded_is_withheld(
    rig: Rig, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    rig.database.down = True
    with pytest.raises(NotRecorded) as caught:
        await call(Upstream("up", answer(call)))
    assert caught.value.headers == {"x-should-retry": "false"}
    assert caught.value.status == 503


async def test_a_stream_that_cannot_be_recorded_never_looks_finished(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    rig.database.down = True
    upstream = Upstream("up", HELLO)
    left, failure = await drive_until_failure(await rig.stream(upstream))
    assert isinstance(failure, NotRecorded)
    assert texts(left) == "hello"
    assert [event["choices"][0]["finish_reason"] for event in left] == [None] * 3
    assert upstream.streams[0].closed.is_set()


async def test_a_failed_call_stays_failed_when_it_cannot_be_recorded(
    rig: Rig, call: Call, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    rig.database.down = True
    with pytest.raises(UpstreamError, match="said 400"):
        await call(Upstream("up", refusal(400)))
    assert "not recorded" in caplog.text


async def test_the_turn_comes_into_the_books_when_the_database_is_back(
    rig: Rig, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    monkeypatch.setattr(ledgers, "RETRY_PAUSE", 0.005)
    rig.database.down = True
    with pytest.raises(NotRecorded):
        await call(Upstream("up", answer(call)))
    rig.database.down = False
    monkeypatch.setattr(ledgers, "DEADLINE", 60)
    await rig.ledger.record(ledgers.Turn([]))
    await rig.check_rows(OK_ROW)
    assert await rig.said() == SAID


async def test_who_is_cancelled_while_the_turn_is_written_takes_nothing_along(rig: Rig, call: Call) -> None:
    rig.database.hold()
    calling = asyncio.ensure_future(call(Upstream("up", answer(call))))
    await asyncio.sleep(0.02)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    rig.database.let_go()
    await rig.ledger.record(ledgers.Turn([]))
    await rig.check_rows(OK_ROW)


# A stream


async def test_a_stream_is_recorded_before_its_last_chunk_leaves(rig: Rig) -> None:
    exchange = await rig.stream(Upstream("up", HELLO))
    left = [await exchange.open()]
    for _ in range(4):
        left.append(await exchange.read())
        assert await rig.rows() == []
    assert [texts(events(part)) for part in left] == ["", "hel", "lo", "", ""]
    assert not exchange.ended

    rig.database.hold()
    last = asyncio.ensure_future(exchange.read())
    await settle()
    assert not last.done()
    rig.database.let_go()
    finish, done = events(await last)
    assert exchange.ended
    assert done == "[DONE]"
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert finish["usage"] == counted((10, 5)) | {"cost": 20e-9}
    assert finish["conversation_id"] == exchange.conversation_id
    assert finish["timings"].items() >= {"prompt_n": 10, "predicted_n": 5}.items()
    await rig.check_rows(OK_ROW | {"stream": 1, "conversation_id": exchange.conversation_id})
    assert await rig.said() == SAID


async def test_who_asks_for_usage_gets_it_in_a_chunk_of_its_own(rig: Rig) -> None:
    found = await drive(await rig.stream(Upstream("up", HELLO), stream_options={"include_usage": True}))
    assert found[-1] == "[DONE]"
    assert (found[-2]["choices"], found[-2]["usage"]["cost"]) == ([], 20e-9)
    assert found[-3]["choices"][0]["finish_reason"] == "stop"
    await rig.check_rows(OK_ROW)


async def test_many_chunks_in_one_read(rig: Rig) -> None:
    chunks = [item for read in HELLO[:-1] for item in read]
    found = await drive(await rig.stream(Upstream("up", [chunks, END])))
    assert texts(found) == "hello"
    assert found[-1] == "[DONE]"
    await rig.check_rows(OK_ROW)


@pytest.mark.parametrize("end", [[END], []], ids=["with its end mark", "just ended"])
async def test_a_stream_without_usage_is_estimated(rig: Rig, end: list[Any]) -> None:
    """A stream that told why it ended is whole, even without `[DONE]`."""
    found = await drive(await rig.stream(Upstream("up", [*HELLO[:4], *end])))
    assert found[-2]["usage"] == counted((3, 2)) | {"cost": 7e-9}
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "input_tokens": 3, "output_tokens": 2, "cost_nanousd": 7})


async def test_a_stream_of_an_unknown_price(rig: Rig) -> None:
    found = await drive(await rig.stream(Upstream("up", HELLO), price=None))
    assert found[-2]["usage"]["cost"] is None
    await rig.check_rows(OK_ROW | {"cost_nanousd": None, "price_unknown": 1})


async def test_a_stream_that_ends_without_a_reason_gets_one(rig: Rig) -> None:
    found = await drive(await rig.stream(Upstream("up", [*HELLO[:3], END])))
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    await rig.check_rows({"status": "ok", "finish_reason": "stop"})


async def test_streamed_choices_count_together_and_the_first_is_kept(rig: Rig) -> None:
    reads = [[chunk("1234", index=index)] for index in (1, 0, 2)]
    reads += [[chunk(reason="stop", index=index)] for index in (0, 1, 2)]
    found = await drive(await rig.stream(Upstream("up", [*reads, END]), n=3))
    assert sum("usage" in event for event in found[:-1]) == 1
    await rig.check_rows({"output_tokens": 3, "counted_by": "gateway", "finish_reason": "stop"})
    assert await rig.said() == [*ASKED, ("assistant", "1234", "stop")]


async def test_streamed_tool_calls_are_put_together(rig: Rig) -> None:
    head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"a"', ":1}")]
    reads = [[chunk(tool_calls=[item])] for item in (head, *pieces)]
    await drive(await rig.stream(Upstream("up", [*reads, [chunk(reason="tool_calls")], [usage_chunk()], END])))
    await rig.check_rows(OK_ROW | {"finish_reason": "tool_calls"})
    ((extra,),) = await rows(rig.database, "SELECT extra FROM messages WHERE role = 'assistant'")
    assert json.loads(extra) == {"tool_calls": TOOL_CALLS}


async def test_a_second_try_that_was_never_sent_is_no_attempt(rig: Rig) -> None:
    exchange = await rig.exchange(Upstream("up", refusal(503), NeverSent("The call was ended before it was sent.")))
    with pytest.raises(NeverSent):
        await exchange.complete()
    await rig.check_rows(FAILED_ROW)
    assert await rig.said() == []


async def test_half_a_tool_call_is_not_kept_for_its_result_would_never_come(rig: Rig) -> None:
    half = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    exchange = await rig.stream(Upstream("up", [[chunk("so ")], [chunk(tool_calls=[half])], UpstreamError("cut")]))
    await drive_until_failure(exchange)
    assert await rig.said() == [*ASKED, ("assistant", "so ", "error")]
    assert await rows(rig.database, "SELECT extra FROM messages WHERE role = 'assistant'") == [(None,)]


# A stream that fails before its first chunk


NO_CHUNK: dict[str, tuple[Any, bool]] = {
    "an error for the operator": ([[{"error": {"message": "overloaded", "code": 503}}]], True),
    "an error with a status in words": ([[{"error": {"message": "overloaded", "code": "502"}}]], True),
    "an error of the client's": ([[{"error": {"message": "too long", "code": 400}}]], False),
    "an error without a status": ([[{"error": {"message": "something"}}]], False),
    "no JSON": ([[b"nonsense"]], False),
    "nothing": ([], False),
    "only the end mark": ([END], False),
    "a failing read": ([UpstreamTimeout("The upstream did not answer in time.")], False),
    "a failing read that may pass": ([refusal(500)], True),
}


@pytest.mark.parametrize(("reads", "again"), NO_CHUNK.values(), ids=NO_CHUNK.keys())
async def test_a_first_chunk_that_is_none_is_a_failed_attempt(rig: Rig, reads: list[Any], again: bool) -> None:
    upstream = Upstream("up", reads, HELLO)
    exchange = await rig.stream(upstream)
    if again:
        assert texts(await drive(exchange)) == "hello"
        await rig.check_rows(FAILED_ROW, OK_ROW)
    else:
        left, failure = await drive_until_failure(exchange)
        assert left == []
        assert failure.status in (400, 502, 504)
        await rig.check_rows(failed_row(failure))
        assert await rig.said() == []
    assert upstream.streams[0].closed.is_set()


async def test_a_first_chunk_that_is_none_leads_to_the_next_route(rig: Rig) -> None:
    for_the_first = Upstream("first", [[{"error": {"message": "something"}}]])
    assert texts(await drive(await rig.stream(for_the_first, Upstream("up", HELLO)))) == "hello"
    await rig.check_rows(FAILED_ROW | {"backend": "first", "cost_nanousd": None}, OK_ROW)


async def test_no_attempt_follows_once_the_client_has_its_status(rig: Rig) -> None:
    upstream = Upstream("up", [HANG, refusal(503)], HELLO)
    exchange = await rig.stream(upstream)
    opening = asyncio.ensure_future(exchange.open())
    await settle()
    exchange.status_sent()
    upstream.streams[0].go_on.set()
    with pytest.raises(UpstreamError):
        await opening
    assert len(upstream.asked) == 1
    await rig.check_rows(FAILED_ROW)


# A stream that fails in the middle


BROKEN: dict[str, Any] = {
    "a failing read": UpstreamError("The connection to the upstream broke."),
    "a failing read that could be tried again": refusal(503),
    "a timeout": UpstreamTimeout("The upstream did not answer in time."),
    "an error event": [{"error": {"message": "overloaded", "code": 503}}],
    "another error event": [{"object": "error", "message": "x"}],
    "an error as text": [{"error": "x"}],
    "no JSON": [b"{"],
    "cut": (),
}


@pytest.mark.parametrize("act", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("said", [1, 2, 3])
async def test_a_broken_answer_is_billed_and_kept_as_far_as_it_came(rig: Rig, act: Any, said: int) -> None:
    upstream = Upstream("up", [*HELLO[:said], act], HELLO)
    left, failure = await drive_until_failure(await rig.stream(upstream))
    text = "hello"[: [0, 0, 3, 5][said]]
    assert texts(left) == text
    assert "[DONE]" not in left
    assert failure.status >= 400
    assert len(upstream.asked) == 1
    assert upstream.streams[0].closed.is_set()
    tokens = -(-len(text) // 4)
    await rig.check_rows(
        {"status": "error", "finish_reason": "error", "input_tokens": 3, "output_tokens": tokens, "charged": 1,
         "counted_by": "gateway", "cost_nanousd": 3 + 2 * tokens, "ended_by": None}
    )  # fmt: skip
    assert await rig.said() == ASKED + ([("assistant", text, "error")] if text else [])


async def test_what_came_in_the_same_read_as_an_error_leaves_before_it(rig: Rig) -> None:
    reads = [[chunk("hel")], [chunk("lo"), {"error": {"message": "overloaded"}}]]
    left, failure = await drive_until_failure(await rig.stream(Upstream("up", reads)))
    assert texts(left) == "hello"
    assert "overloaded" in failure.message
    await rig.check_rows({"status": "error", "output_tokens": 2})
    assert await rig.said() == [*ASKED, ("assistant", "hello", "error")]


async def test_a_break_after_usage_is_billed_by_the_upstreams_figures(rig: Rig) -> None:
    reads = [*HELLO[:3], [usage_chunk((7, 4))], UpstreamError("The connection to the upstream broke.")]
    await drive_until_failure(await rig.stream(Upstream("up", reads)))
    await rig.check_rows({"status": "error", "input_tokens": 7, "output_tokens": 4, "counted_by": "upstream"})


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("how", ["fail_after", "cut_after"])
async def test_the_scripted_backend_fails_and_cuts_wherever_it_is_told(rig: Rig, how: str, most: int) -> None:
    """A role, two words, the reason, the usage; cut after the reason, the stream is whole."""
    backend = ScriptedBackend("up", {"m": Script(reply="one two", **{how: most})})  # type: ignore[arg-type]  # a count
    exchange = await rig.stream(backend)
    if how == "cut_after" and most == 4:
        assert texts(await drive(exchange)) == "one two"
        await rig.check_rows({"status": "ok", "charged": 1})
        return
    left, _ = await drive_until_failure(exchange)
    assert texts(left) == "".join(["", "one", " two"][:most])
    await rig.check_rows({"status": "error", "charged": int(most > 0)})


# A client that leaves


LEFT = {"status": "client_disconnected", "finish_reason": "client_disconnected", "charged": 1}


@pytest.mark.parametrize("read", range(6))
async def test_a_client_that_leaves_is_drained_wherever_it_was(rig: Rig, read: int) -> None:
    """It left before the first chunk, or after so many reads: the upstream is read to its end and the turn is whole."""
    upstream = Upstream("up", HELLO)
    exchange = await rig.stream(upstream)
    await read_some(exchange, read)
    exchange.client_left()
    await (drive(exchange) if read == 0 else rest(exchange))
    await rig.check_rows(OK_ROW | LEFT | {"ended_by": "drain"})
    assert await rig.said() == [*ASKED, ("assistant", "hello", "client_disconnected")]
    assert upstream.streams[0].closed.is_set()


@pytest.mark.parametrize("read", range(6))
async def test_a_client_that_leaves_is_cancelled_wherever_it_was(rig: Rig, read: int) -> None:
    upstream = Upstream("up", HELLO)
    exchange = await rig.stream(upstream, on_disconnect="cancel")
    await read_some(exchange, read)
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await (drive(exchange) if read == 0 else rest(exchange))
    await settle()
    text = ["", "", "hel", "hello", "hello", "hello"][read]
    tokens = {"input_tokens": 3, "output_tokens": -(-len(text) // 4), "counted_by": "gateway"}
    if read == 5:
        tokens = {"input_tokens": 10, "output_tokens": 5, "counted_by": "upstream"}
    if read == 0:  # the call was never sent, so there is none to count
        await rig.check_rows()
        assert upstream.asked == []
        return
    await rig.check_rows(LEFT | tokens | {"ended_by": "cancel"})
    assert await rig.said() == ASKED + ([("assistant", text, "client_disconnected")] if text else [])
    assert all(stream.closed.is_set() for stream in upstream.streams)


@pytest.mark.parametrize("read", range(5))
async def test_a_client_that_leaves_while_nothing_comes_is_cancelled_at_once(rig: Rig, read: int) -> None:
    upstream = Upstream("up", [*HELLO[:read], HANG, *HELLO[read:]])
    exchange = await rig.stream(upstream, on_disconnect="cancel")
    await read_some(exchange, read)
    waiting = asyncio.ensure_future(exchange.open() if read == 0 else exchange.read())
    await settle()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await waiting
    assert exchange.ended
    assert upstream.streams[0].closed.is_set()
    await rig.check_rows(LEFT | {"ended_by": "cancel", "counted_by": "gateway"})


@pytest.mark.parametrize("read", range(5))
async def test_a_client_that_leaves_while_nothing_comes_is_drained_when_it_comes(rig: Rig, read: int) -> None:
    upstream = Upstream("up", [*HELLO[:read], HANG, *HELLO[read:]])
    exchange = await rig.stream(upstream)
    await read_some(exchange, read)
    waiting = asyncio.ensure_future(exchange.open() if read == 0 else exchange.read())
    await settle()
    exchange.client_left()
    await settle()
    assert not waiting.done()
    upstream.streams[0].go_on.set()
    await waiting
    await rest(exchange)
    await rig.check_rows(OK_ROW | LEFT | {"ended_by": "drain"})


@pytest.mark.parametrize("read", range(5))
async def test_draining_ends_when_its_time_is_up(rig: Rig, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DRAIN_SECONDS", 0.01)
    upstream = Upstream("up", [*HELLO[:read], HANG, *HELLO[read:]])
    exchange = await rig.stream(upstream)
    await read_some(exchange, read)
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await (drive(exchange) if read == 0 else rest(exchange))
    assert upstream.streams[0].closed.is_set()
    await rig.check_rows(LEFT | {"counted_by": "gateway"})


async def test_draining_ends_after_so_much_more_text(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "DRAIN_CHARACTERS", 40)
    exchange = await rig.stream(Upstream("up", [[chunk("x" * 100)], *[[chunk("y" * 30)]] * 10, END]))
    await exchange.open()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await rest(exchange)
    await rig.check_rows(LEFT | {"output_tokens": 40, "counted_by": "gateway"})


async def test_an_upstream_that_breaks_while_a_client_is_drained(rig: Rig) -> None:
    exchange = await rig.stream(Upstream("up", [*HELLO[:2], UpstreamError("The connection to the upstream broke.")]))
    await exchange.open()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await rest(exchange)
    await rig.check_rows(LEFT | {"output_tokens": 1, "ended_by": "drain"})
    assert await rig.said() == [*ASKED, ("assistant", "hel", "client_disconnected")]


async def test_a_client_leaves_once(rig: Rig) -> None:
    exchange = await rig.stream(Upstream("up", HELLO))
    await exchange.open()
    exchange.client_left()
    exchange.client_left()
    await rest(exchange)
    exchange.client_left()
    exchange.interrupt()
    await rig.check_rows(OK_ROW | LEFT | {"ended_by": "drain"})


async def test_no_attempt_follows_a_client_that_left(rig: Rig) -> None:
    upstream = Upstream("up", [HANG, refusal(503)], HELLO)
    exchange = await rig.stream(upstream)
    opening = asyncio.ensure_future(exchange.open())
    await settle()
    exchange.client_left()
    upstream.streams[0].go_on.set()
    with pytest.raises(UpstreamError):
        await opening
    assert len(upstream.asked) == 1
    assert len(await rig.rows()) == 1


@pytest.mark.parametrize("when", ["before the call", "during it"])
@pytest.mark.parametrize("policy", ["drain", "cancel"])
async def test_a_client_that_does_not_wait_for_a_whole_reply(rig: Rig, policy: OnDisconnect, when: str) -> None:
    act = whole() if policy == "drain" else HANG
    exchange = await rig.exchange(Upstream("up", act), on_disconnect=policy)
    if when == "before the call":
        exchange.client_left()
    calling = asyncio.ensure_future(exchange.complete())
    if when == "during it":
        await (asyncio.sleep(0) if policy == "drain" else settle())
        exchange.client_left()
    if policy == "drain":
        await calling
        await rig.check_rows(OK_ROW | LEFT | {"ended_by": "drain"})
        assert await rig.said() == [*ASKED, ("assistant", "hello", "client_disconnected")]
    else:
        with pytest.raises(UpstreamError):
            await calling
        row = LEFT | {"ended_by": "cancel", "input_tokens": 3, "output_tokens": 0}
        await rig.check_rows(*([row] if when == "during it" else []))
        assert await rig.said() == (ASKED if when == "during it" else [])


async def test_draining_a_whole_reply_ends_when_its_time_is_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DRAIN_SECONDS", 0.01)
    exchange = await rig.exchange(Upstream("up", HANG))
    calling = asyncio.ensure_future(exchange.complete())
    await settle()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await calling
    await rig.check_rows(LEFT | {"input_tokens": 3, "output_tokens": 0})


@pytest.mark.parametrize("policy", ["drain", "cancel"])
async def test_a_client_that_leaves_before_the_upstream_has_accepted(rig: Rig, policy: OnDisconnect) -> None:
    upstream = Upstream("up", HANG)
    exchange = await rig.stream(upstream, on_disconnect=policy)
    opening = asyncio.ensure_future(exchange.open())
    await settle()
    exchange.client_left()
    await settle()
    if policy == "drain":
        assert not opening.done()
        exchange.interrupt()
    with pytest.raises(GatewayError):
        await opening
    await rig.check_rows(LEFT | {"input_tokens": 3, "output_tokens": 0})


@pytest.mark.parametrize("failure", [refusal(400), refusal(503), unreachable()], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refusal_costs_nothing_even_if_the_client_has_left(
    rig: Rig, streamed: bool, failure: UpstreamError
) -> None:
    exchange = await (rig.stream if streamed else rig.exchange)(Upstream("up", failure))
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await (exchange.open() if isinstance(exchange, StreamExchange) else exchange.complete())
    await rig.check_rows({"cost_nanousd": 0, "charged": 0})


async def test_the_row_says_that_draining_ended_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DRAIN_SECONDS", 0.01)
    exchange = await rig.stream(Upstream("up", [*HELLO[:2], HANG]))
    await read_some(exchange, 2)
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await rest(exchange)
    await rig.check_rows(LEFT | {"ended_by": "drain"})


# The end of the worker


CUT = {"status": "interrupted", "finish_reason": "interrupted", "charged": 1}


@pytest.mark.parametrize("read", range(1, 6))
async def test_a_stream_is_cut_recorded_and_told(rig: Rig, read: int) -> None:
    upstream = Upstream("up", HELLO)
    exchange = await rig.stream(upstream)
    await read_some(exchange, read)
    exchange.interrupt()
    with pytest.raises(Unavailable, match="shutting down"):
        await rest(exchange)
    text = ["", "", "hel", "hello", "hello", "hello"][read]
    await rig.check_rows(CUT | {"output_tokens": 5 if read == 5 else -(-len(text) // 4)})
    assert await rig.said() == ASKED + ([("assistant", text, "interrupted")] if text else [])
    await settle()
    assert upstream.streams[0].closed.is_set()


@pytest.mark.parametrize("read", range(1, 5))
async def test_a_stream_that_waits_is_cut_too(rig: Rig, read: int) -> None:
    upstream = Upstream("up", [*HELLO[:read], HANG])
    exchange = await rig.stream(upstream)
    await read_some(exchange, read)
    waiting = asyncio.ensure_future(exchange.read())
    await settle()
    exchange.interrupt()
    with pytest.raises(Unavailable):
        await waiting
    await rig.check_rows(CUT)


@pytest.mark.parametrize("reads", [HANG, [HANG]], ids=["before it is accepted", "before it begins"])
@pytest.mark.parametrize("cut_before", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_that_has_no_answer_yet_is_cut_recorded_and_told(
    rig: Rig, streamed: bool, cut_before: bool, reads: Act
) -> None:
    if cut_before:
        rig.drain.cut()
    exchange = await (rig.stream if streamed else rig.exchange)(Upstream("up", reads if streamed else HANG))
    rig.drain.enter(exchange.interrupt)
    work = exchange.open() if isinstance(exchange, StreamExchange) else exchange.complete()
    calling = asyncio.ensure_future(work)
    await settle()
    rig.drain.cut()
    with pytest.raises(Unavailable, match="shutting down") as caught:
        await calling
    assert caught.value.headers["x-should-retry"] == "false"
    await rig.check_rows(*([] if cut_before else [CUT | {"input_tokens": 3, "output_tokens": 0}]))
    assert await rig.said() == ([] if cut_before else ASKED)


async def test_no_disconnect_policy_ended_a_call_that_was_cut(rig: Rig) -> None:
    exchange = await rig.stream(Upstream("up", HELLO))
    await exchange.open()
    exchange.interrupt()
    with pytest.raises(Unavailable):
        await rest(exchange)
    await rig.check_rows(CUT | {"ended_by": None})


async def test_a_client_that_had_left_stays_so_when_the_worker_ends(rig: Rig) -> None:
    exchange = await rig.stream(Upstream("up", [*HELLO[:2], HANG]))
    await read_some(exchange, 2)
    exchange.client_left()
    waiting = asyncio.ensure_future(exchange.read())
    await settle()
    exchange.interrupt()
    with pytest.raises(UpstreamError):
        await waiting
    await rig.check_rows(LEFT | {"output_tokens": 1})


# Conversations


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_end_of_the_worker_does_not_reach_a_call_that_has_failed(rig: Rig, streamed: bool) -> None:
    exchange = await (rig.stream if streamed else rig.exchange)(Upstream("up", refusal(400)))
    if isinstance(exchange, StreamExchange):
        response = StreamResponse(exchange, rig.drain, list, first_chunk_wait=None)
        working = response(asyncio.Event().wait, asyncio.Event().wait)  # type: ignore[arg-type]  # neither is called
    else:
        working = exchange.complete()  # type: ignore[assignment]  # gives a reply
    with pytest.raises(UpstreamError):
        await working
    rig.drain.cut()
    assert exchange.stopped is None


async def test_a_failed_call_leaves_a_conversation_as_it_was(rig: Rig) -> None:
    await (await rig.exchange(Upstream("up", whole()), conversation_id="x")).complete()
    with pytest.raises(UpstreamError):
        await (await rig.exchange(Upstream("up", refusal(400)), conversation_id="x")).complete()
    assert await rig.said() == SAID
    assert [row["conversation_id"] for row in await rig.rows()] == ["x", "x"]


async def test_totals_are_those_of_the_rows(rig: Rig) -> None:
    for act in (HELLO, [*HELLO[:2], UpstreamError("The connection to the upstream broke.")], HELLO):
        exchange = await rig.stream(Upstream("up", act), conversation_id="x")
        try:
            await drive(exchange)
        except UpstreamError:
            continue
    sums = "SELECT SUM(input_tokens), SUM(output_tokens), SUM(cost_nanousd) FROM usage_rows"
    totals = "SELECT total_tokens_input, total_tokens_output, total_cost_nanousd FROM conversations"
    assert await rows(rig.database, sums) == await rows(rig.database, totals)
    session = "SELECT total_tokens, total_cost_nanousd, conversation_count FROM sessions"
    ((_, tokens_out, cost),) = await rows(rig.database, totals)
    assert await rows(rig.database, session) == [(tokens_out, cost, 1)]


@pytest.mark.parametrize("keep", [True, False])
async def test_a_call_that_is_no_turn_leaves_only_its_rows(rig: Rig, call: Call, keep: bool) -> None:
    await call(Upstream("up", answer(call)), keep=keep)
    assert len(await rig.said()) == 2 * keep
    ((conversation,),) = await rows(rig.database, "SELECT conversation_id FROM usage_rows")
    assert (conversation is not None) is keep


# Calls side by side


async def test_calls_side_by_side_do_not_mix(rig: Rig) -> None:
    async def one(number: int) -> None:
        upstream = Upstream(
            f"up-{number}", [[chunk(f"{number}-{part} ")] for part in range(5)] + [[chunk(reason="stop")], END]
        )
        exchange = await rig.stream(upstream, conversation_id=f"c-{number}")
        assert texts(await drive(exchange)) == "".join(f"{number}-{part} " for part in range(5))

    await asyncio.gather(*(one(number) for number in range(50)))
    sql = """
        SELECT c.id, m.content, u.backend FROM conversations c JOIN messages m ON m.conversation_pk = c.pk
        JOIN usage_rows u ON u.conversation_id = c.id WHERE m.role = 'assistant'"""
    found = await rows(rig.database, sql)
    assert len(found) == 50
    for name, content, backend in found:
        number = name.removeprefix("c-")
        assert backend == f"up-{number}"
        assert json.loads(content) == "".join(f"{number}-{part} " for part in range(5))


# What nobody foresaw, and what is known to be wrong


async def test_the_first_chunk_of_a_second_attempt_is_timed_like_its_row(rig: Rig) -> None:
    """Ten seconds went by before the attempt that answered began."""
    found = await rig.job(model(Upstream("up", HELLO)), stream=True)
    found.started -= 10
    left = await drive(StreamExchange(rig.relay, found))
    ((ttft_ms, duration_ms),) = await rows(rig.database, "SELECT ttft_ms, duration_ms FROM usage_rows")
    assert ttft_ms <= duration_ms
    assert left[-2]["timings"]["prompt_ms"] < 10_000


async def test_a_mistake_in_a_backend_leaves_a_row(rig: Rig, call: Call) -> None:
    with pytest.raises(UpstreamError, match="could not read"):
        await call(Upstream("up", ValueError("nobody foresaw this")))
    assert len(await rig.rows()) == 1


async def test_doubled_usage_is_shown_as_it_was_recorded(rig: Rig) -> None:
    raw = b'{"usage":null,"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}'
    reply = await (await rig.exchange(Upstream("up", Completion(raw, json.loads(raw))))).complete()
    await rig.check_rows(OK_ROW | {"finish_reason": None})
    assert json.loads(reply.body)["usage"]["prompt_tokens"] == 10


async def read_some(exchange: StreamExchange, reads: int) -> None:
    if reads:
        await exchange.open()
    for _ in range(reads - 1):
        await exchange.read()


# What a call is counted and priced by when others could say so


async def test_streams_that_are_cut_do_not_wait_for_their_counts(rig: Rig) -> None:
    """A text of a million equal letters has an eighth of that in tokens; an estimate says a quarter."""
    prompt = [{"role": "user", "content": "a" * 1_000_000}]
    exchanges, reading = [], []
    for number in range(20):
        upstream = Upstream("up", [*HELLO[:3], HANG])
        found = await rig.job(
            Model("gpt-4o", [Route(upstream, "gpt-4o", PRICE)]), keep=False, stream=True, messages=prompt
        )
        found.request_id = f"req_{number}"
        exchanges.append(StreamExchange(rig.relay, found))
        await read_some(exchanges[-1], 3)
        reading.append(asyncio.ensure_future(exchanges[-1].read()))
    await settle()
    for exchange in exchanges:
        exchange.interrupt()
    assert {type(each) for each in await asyncio.gather(*reading, return_exceptions=True)} == {Unavailable}
    expected = CUT | {"counted_by": "gateway", "input_tokens": 250_000, "output_tokens": 2}
    found = await rig.rows()
    assert len({row["request_id"] for row in found}) == len(found) == 20
    assert all(row.items() >= expected.items() for row in found)


@pytest.mark.parametrize(
    ("asked", "told", "cost"),
    [
        ("batch", None, 20),
        ("priority", None, 20),
        ("priority", "default", 20),
        ("priority", "flex", None),
        (None, "performance", 60),
        ("default", "performance", 60),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_only_the_reply_says_in_which_service_tier_it_was_made(
    rig: Rig, streamed: bool, asked: str | None, told: str | None, cost: int | None
) -> None:
    """As the upstream says it, before its word is mended for the client."""
    price = configured(
        {"input": Decimal("0.001"), "output": Decimal("0.002"), "service_tiers": {"performance": Decimal(3)}}
    )
    said = {} if told is None else {"service_tier": told}
    fields = {} if asked is None else {"service_tier": asked}
    if streamed:
        acts = [[each | said for each in act] if isinstance(act, list) else act for act in HELLO]
        left = await drive(await rig.stream(Upstream("up", acts), price=price, **fields))
        shown = left[0]
    else:
        exchange = await rig.exchange(Upstream("up", whole(**said)), price=price, **fields)
        shown = json.loads((await exchange.complete()).body)
    await rig.check_rows(OK_ROW | {"cost_nanousd": cost, "price_unknown": int(cost is None)})
    assert shown.get("service_tier") == ("default" if told == "performance" else told)


# What is billed, by whoever has counted it


BY_KIND = Price(1_000_000, 2_000_000, cached_input=100_000, reasoning=3_000_000)
MANY_KINDS = counted((100, 20)) | {
    "prompt_tokens_details": {"cached_tokens": 60},
    "completion_tokens_details": {"reasoning_tokens": 15},
}


async def billed(rig: Rig, streamed: bool, reply: dict[str, Any], reads: Sequence[Any], **options: Any) -> Any:
    """The usage that the client is told, for an answer that comes whole or as these chunks."""
    if streamed:
        return (await drive(await rig.stream(Upstream("up", [*reads, END]), **options)))[-2]["usage"]
    return json.loads((await (await rig.exchange(Upstream("up", reply), **options)).complete()).body)["usage"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a97_five_answers_that_nobody_counted(rig: Rig, streamed: bool) -> None:
    """Five times 8 characters are 10 tokens; five answers are one call, with one prompt."""
    message = {"role": "assistant", "content": "8 chars."}
    choices = [{"index": index, "message": message, "finish_reason": "stop"} for index in range(5)]
    reads = [[chunk("8 ch", index=index) for index in range(5)], [chunk("ars.", index=index) for index in range(5)]]
    reads += [[chunk(reason="stop", index=index)] for index in range(5)]
    told = await billed(rig, streamed, whole(choices=choices, usage=None), reads, n=5)
    assert told == counted((3, 10)) | {"cost": 23e-9}
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "input_tokens": 3, "output_tokens": 10, "cost_nanousd": 23})


@pytest.mark.parametrize("streamed", [False, True])
async def test_a97_thoughts_and_tool_calls_that_nobody_counted(rig: Rig, streamed: bool) -> None:
    """16 characters of thought, `f` and `{"a":1}`."""
    said = {"role": "assistant", "content": None, "reasoning_content": "sixteen letters.", "tool_calls": TOOL_CALLS}
    reply = whole(choices=[{"index": 0, "message": said, "finish_reason": "tool_calls"}], usage=None)
    calls = [{"index": 0, **TOOL_CALLS[0]}]
    reads = [[chunk(reasoning_content="sixteen letters.")], [chunk(tool_calls=calls)], [chunk(reason="tool_calls")]]
    told = await billed(rig, streamed, reply, reads)
    assert told == counted((3, 6)) | {"cost": 15e-9}
    row = {"counted_by": "gateway", "input_tokens": 3, "output_tokens": 6, "cost_nanousd": 15}
    await rig.check_rows(OK_ROW | row | {"finish_reason": "tool_calls"})


@pytest.mark.parametrize("streamed", [False, True])
async def test_a97_cached_tokens_and_thoughts_have_their_own_price(rig: Rig, streamed: bool) -> None:
    """40 x 1 + 60 x 0.1 for the prompt, 5 x 2 + 15 x 3 for all five answers."""
    reads = [*HELLO[:4], [usage_chunk(MANY_KINDS)]]
    told = await billed(rig, streamed, whole(usage=MANY_KINDS), reads, n=5, price=BY_KIND)
    assert told == MANY_KINDS | {"cost": 101e-9}
    await rig.check_rows(OK_ROW | {"input_tokens": 100, "output_tokens": 20, "cost_nanousd": 101})
    assert await rows(rig.database, "SELECT cached_tokens, reasoning_tokens FROM usage_rows") == [(60, 15)]


UNTRUE = {
    "none": None,
    "empty": {},
    "a text": "many",
    "negative": counted((-10, 5)),
    "a negative answer": counted((10, -5)),
    "10 to the 30": counted((10**30, 5)),
    "10 to the 30 answered": counted((10, 10**30)),
    "texts": {"prompt_tokens": "10", "completion_tokens": "5", "total_tokens": "15"},
    "half a token": {"prompt_tokens": 10.5, "completion_tokens": 5},
    "true": {"prompt_tokens": True, "completion_tokens": 5},
    "a list": [10, 5],
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("untrue", UNTRUE.values(), ids=UNTRUE.keys())
async def test_a99_a_stream_whose_usage_cannot_be_true_is_counted(rig: Rig, untrue: Any, asked: bool) -> None:
    """In each chunk, and as bytes: what JSON makes of them is a part of it. 12 characters asked, 5 answered."""
    chunks = [each[0] | {"usage": untrue} for each in (*HELLO[:4], [usage_chunk()])]
    reads = [[json.dumps(each).encode()] for each in chunks]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    assert await billed(rig, True, {}, reads, **options) == counted((3, 2)) | {"cost": 7e-9}
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "input_tokens": 3, "output_tokens": 2, "cost_nanousd": 7})


@pytest.mark.parametrize(
    ("told", "counts"),
    [
        ([(10, 1), (10, 2), (10, 3), (10, 4)], (10, 4)),
        ([(10, 4), (9, 3), (8, 2), (7, 1)], (10, 4)),
        ([(10, 4), (0, 0), (0, 0), (0, 0)], (10, 4)),
        ([(10, 1), (10, 4), (-1, -1), (10**30, 10**30)], (10, 4)),
        ([(-1, -1), (10, 4), "many", None], (10, 4)),
        ([(10, 4), (5, 2), (20, 8), (10, 4)], (20, 8)),
    ],
    ids=["growing", "decreasing", "zero at last", "absurd at last", "once", "up and down"],
)
async def test_a99_usage_in_many_chunks_is_that_of_one_of_them(
    rig: Rig, told: Sequence[Any], counts: tuple[int, int]
) -> None:
    """The last that can be true, and that is not less than one before: never their sum."""
    reads = [[each[0] | {"usage": counted(usage)}] for each, usage in zip(HELLO[:4], told, strict=True)]
    cost = counts[0] + 2 * counts[1]
    assert await billed(rig, True, {}, reads) == counted(counts) | {"cost": pytest.approx(cost / 1e9)}
    await rig.check_rows(OK_ROW | {"input_tokens": counts[0], "output_tokens": counts[1], "cost_nanousd": cost})


async def test_a99_parts_are_never_more_than_their_whole(rig: Rig) -> None:
    """Else what is left of the prompt would be less than nothing."""
    usage = counted((10, 5)) | {
        "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": -5},
        "completion_tokens_details": {"reasoning_tokens": 99},
    }
    await (await rig.exchange(Upstream("up", whole(usage=usage)), price=BY_KIND)).complete()
    await rig.check_rows(OK_ROW | {"cost_nanousd": 1 + 15})
    assert await rows(rig.database, "SELECT cached_tokens, reasoning_tokens FROM usage_rows") == [(10, 5)]
