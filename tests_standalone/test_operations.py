"""An upstream's reply to an operation and a client's behaviour in; the bytes that leave, and the rows, out.

Prices are one nano-dollar for a token of input and two for one of output.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from gateway import call as calls
from gateway import ledger as ledgers
from gateway import operations
from gateway.auth import Caller
from gateway.backends.base import ModelInfo
from gateway.call import Job, Relay
from gateway.catalog import Catalog, Model, OnDisconnect, Route
from gateway.drain import Drain
from gateway.errors import GatewayError, NotFound, NotRecorded, Unavailable, UpstreamError
from gateway.ledger import Ledger
from gateway.operations import OperationExchange
from gateway.pricing import Price
from gateway.responses import Scope, StreamResponse
from gateway.store.database import Database
from gateway.tokens import TokenCounter
from gateway.wire.operation import CHAT, EMBEDDINGS, OPERATIONS, SPEECH, OperationRequest
from tests_standalone.conftest import NOON, Unsteady, eventually, no_limits, rows, settle

PRICE = Price(1_000_000, 2_000_000)
HANG = "nothing more comes"
JSON, EVENTS, SOUND = "application/json", "text/event-stream; charset=utf-8", "audio/mpeg"
IMAGES = "images/generations"


class Answer:
    """A reply: each read gives the next bytes, raises the next exception, or hangs until it is closed or goes on."""

    def __init__(self, content_type: str, *acts: Any) -> None:
        self.content_type = content_type
        self.closed = asyncio.Event()
        self.go_on = asyncio.Event()
        self.reads = 0
        self._acts = list(acts)

    async def read(self) -> bytes:
        self.reads += 1
        act = self._acts.pop(0) if self._acts else b""
        if act == HANG:
            waits = [asyncio.ensure_future(event.wait()) for event in (self.closed, self.go_on)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if not self.closed.is_set():
                return await self.read()
        if self.closed.is_set():
            raise UpstreamError("The connection to the upstream broke.")
        if isinstance(act, Exception):
            raise act
        assert isinstance(act, bytes)
        return act

    async def close(self) -> None:
        self.closed.set()


class Upstream:
    """A backend that gives one answer after the other, or raises it; HANG: none comes."""

    def __init__(self, name: str = "up", *answers: Any, does: frozenset[str] = OPERATIONS) -> None:
        self.name = name
        self.operations = does
        self.asked: list[OperationRequest] = []
        self._answers = list(answers)

    async def models(self) -> Sequence[ModelInfo]:
        return []

    async def complete(self, request: Any) -> Any:
        raise NotImplementedError

    async def stream(self, request: Any) -> Any:
        raise NotImplementedError

    async def operate(self, request: OperationRequest) -> Answer:
        self.asked.append(request)
        answer = self._answers.pop(0)
        if answer == HANG:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Answer)
        return answer

    async def aclose(self) -> None:
        """Nothing is held."""


class Rig:
    """A relay on a real database."""

    def __init__(self, database: Database) -> None:
        self.database = Unsteady(database)
        self.ledger = Ledger(self.database)
        self.relay = Relay(Catalog({}), no_limits(), self.ledger, Drain(), TokenCounter())

    def exchange(
        self,
        *upstreams: Upstream,
        operation: str = EMBEDDINGS,
        price: Price | None = PRICE,
        on_disconnect: OnDisconnect = "drain",
        **fields: Any,
    ) -> OperationExchange:
        """A call of ann's with an input of 12 characters (3 tokens by estimate) to the upstreams, in that order."""
        body = {"model": "m", "input": "12characters", **fields}
        request = OperationRequest.parse(operation, "application/json", json.dumps(body).encode())
        weights = [10 ** (6 * (len(upstreams) - place)) for place in range(len(upstreams))]
        routes = [
            Route(each, "m", price, weight, on_disconnect) for each, weight in zip(upstreams, weights, strict=True)
        ]
        return OperationExchange(
            self.relay, Job("req_1", Caller("ann", "key_1"), "kid", Model("m", routes), request, None, at=NOON)
        )

    async def check_rows(self, *expected: Mapping[str, Any]) -> None:
        """Exactly these rows, as far as their columns are named."""
        columns = (
            "attempt, backend, model, upstream_model, status, finish_reason, input_tokens, output_tokens, counted_by, "
            "cost_nanousd, price_unknown, charged, stream, ended_by, conversation_id, request_id, user_id, key_id, "
            "end_user, ttft_ms"
        )
        found = await rows(self.database, f"SELECT {columns} FROM usage_rows ORDER BY attempt")
        named = [dict(zip(columns.split(", "), row, strict=True)) for row in found]
        assert [{key: row[key] for key in want} for row, want in zip(named, expected, strict=False)] == list(expected)
        assert len(named) == len(expected)


@pytest.fixture
async def rig(sqlite: Database) -> AsyncIterator[Rig]:
    found = Rig(sqlite)
    found.ledger.start()
    yield found
    found.database.let_go()
    await found.ledger.aclose(grace=0.1)


async def drive(exchange: OperationExchange) -> bytes:
    left = await exchange.open()
    while not exchange.ended:
        left += await exchange.read()
    return left


async def drive_until_failure(exchange: OperationExchange) -> tuple[bytes, GatewayError]:
    left = b""
    try:
        left += await exchange.open()
        while not exchange.ended:
            left += await exchange.read()
    except GatewayError as failure:
        assert exchange.ended
        return left, failure
    raise AssertionError(f"it ended well: {left!r}")


def vectors(usage: Any = (3, 0), **fields: Any) -> bytes:
    told = {"prompt_tokens": usage[0], "total_tokens": usage[0]} if isinstance(usage, tuple) else usage
    body = {"object": "list", "data": [{"embedding": [0.5]}], "model": "m", **fields}
    return json.dumps(body if told is None else {**body, "usage": told}, indent=1).encode()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def refusal(status: int) -> UpstreamError:
    return UpstreamError(f"The upstream said {status}.", status=status, upstream_status=status)


OK_ROW = {
    "attempt": 1, "backend": "up", "model": "m", "upstream_model": "m", "status": "ok", "finish_reason": None,
    "input_tokens": 3, "output_tokens": 0, "counted_by": "upstream", "cost_nanousd": 3, "price_unknown": 0,
    "charged": 1, "ended_by": None, "conversation_id": None, "request_id": "req_1", "user_id": "ann",
    "key_id": "key_1", "end_user": "kid",
}  # fmt: skip
UNKNOWN_ROW = OK_ROW | {"input_tokens": 0, "counted_by": "gateway", "cost_nanousd": None}


# JSON


async def test_a_reply_that_came_whole_says_what_it_cost_and_is_else_as_it_came(rig: Rig) -> None:
    exchange = rig.exchange(Upstream("up", Answer(JSON, vectors()[:20], vectors()[20:])))
    body = await exchange.open()
    assert exchange.ended
    assert not exchange.is_event_stream
    assert body == vectors().replace(b'"total_tokens": 3\n }', b'"total_tokens": 3,"cost":3e-9}')
    assert (exchange.length, exchange.cost) == (len(body), 3e-9)
    await rig.check_rows(OK_ROW | {"stream": 0})


async def test_it_leaves_after_its_row_is_durable(rig: Rig) -> None:
    rig.database.hold()
    opening = asyncio.ensure_future(rig.exchange(Upstream("up", Answer(JSON, vectors()))).open())
    await settle()
    assert not opening.done()
    rig.database.let_go()
    await opening
    await rig.check_rows(OK_ROW)


@pytest.mark.parametrize("usage", [None, {}, "none", {"prompt_tokens": -1}])
async def test_embeddings_without_true_usage_are_counted(rig: Rig, usage: Any) -> None:
    exchange = rig.exchange(Upstream("up", Answer(JSON, vectors(usage))))
    found = json.loads(await exchange.open())
    assert found["usage"]["cost"] == exchange.cost == 3e-9
    if not isinstance(usage, dict):
        assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "cost": 3e-9}
    await rig.check_rows(OK_ROW | {"counted_by": "gateway"})


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [("12characters", 3), (["12characters", "1234"], 4), ([1, 2, 3], 3), ([[1, 2], [3]], 3), (7, 0)],
)
async def test_what_was_put_in_is_counted_in_any_form(rig: Rig, asked: Any, tokens: int) -> None:
    await rig.exchange(Upstream("up", Answer(JSON, vectors(None))), input=asked).open()
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "input_tokens": tokens, "cost_nanousd": tokens})


async def test_moderations_get_no_usage_of_ours(rig: Rig) -> None:
    body = b'{"results": [ {"flagged": false} ]}'
    exchange = rig.exchange(Upstream("up", Answer(JSON, body)), operation="moderations")
    assert await exchange.open() == body
    assert exchange.length == len(body)
    await rig.check_rows(OK_ROW | {"counted_by": "gateway"})


async def test_pictures_without_usage_have_an_unknown_cost(rig: Rig) -> None:
    body = b'{"created":1,"data":[{"url":"http://x"}]}'
    exchange = rig.exchange(Upstream("up", Answer(JSON, body)), operation=IMAGES)
    assert await exchange.open() == body
    assert exchange.cost is None
    await rig.check_rows(UNKNOWN_ROW)


async def test_sound_that_is_told_by_seconds_has_an_unknown_cost(rig: Rig) -> None:
    body = json.dumps({"text": "hi", "usage": {"type": "duration", "seconds": 3}}).encode()
    exchange = rig.exchange(Upstream("up", Answer(JSON, body)), operation="audio/transcriptions")
    assert json.loads(await exchange.open())["usage"] == {"type": "duration", "seconds": 3, "cost": None}
    await rig.check_rows(UNKNOWN_ROW)


async def test_without_a_price_the_cost_is_null_and_flagged(rig: Rig) -> None:
    exchange = rig.exchange(Upstream("up", Answer(JSON, vectors())), price=None)
    assert json.loads(await exchange.open())["usage"]["cost"] is None
    await rig.check_rows(OK_ROW | {"cost_nanousd": None, "price_unknown": 1})


@pytest.mark.parametrize("body", [b"", b"[1, 2]", b'"text"', b"no json", b'{"data": [}'])
async def test_json_that_is_no_object_passes(rig: Rig, body: bytes) -> None:
    exchange = rig.exchange(Upstream("up", Answer("application/problem+json", body)))
    assert await exchange.open() == body
    assert exchange.length == len(body)
    await rig.check_rows(OK_ROW | {"counted_by": "gateway"})


async def test_a_reply_that_cannot_be_recorded_is_withheld(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    rig.database.down = True
    exchange = rig.exchange(Upstream("up", Answer(JSON, vectors())))
    with pytest.raises(NotRecorded):
        await exchange.open()
    assert exchange.ended


# Bytes of any kind


async def test_bytes_pass_as_they_come_and_the_last_are_held_until_the_row_is_durable(rig: Rig) -> None:
    answer = Answer(SOUND, b"one", b"two", b"three")
    exchange = rig.exchange(Upstream("up", answer), operation=SPEECH)
    assert [await exchange.open(), await exchange.read(), await exchange.read()] == [b"", b"one", b"two"]
    assert not exchange.ended
    await rig.check_rows()

    rig.database.hold()
    last = asyncio.ensure_future(exchange.read())
    await settle()
    assert not last.done()
    rig.database.let_go()
    assert await last == b"three"
    assert exchange.ended
    assert answer.closed.is_set()
    assert (exchange.content_type, exchange.length, exchange.is_event_stream) == (SOUND, None, False)
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "cost_nanousd": None})


async def test_a_reply_of_no_bytes(rig: Rig) -> None:
    assert await drive(rig.exchange(Upstream("up", Answer(SOUND)), operation=SPEECH)) == b""
    await rig.check_rows(OK_ROW | {"counted_by": "gateway", "cost_nanousd": None})


async def test_bytes_that_look_like_events_are_none(rig: Rig) -> None:
    said = event(usage={"input_tokens": 1, "output_tokens": 1})
    assert await drive(rig.exchange(Upstream("up", Answer("text/plain", said)), operation=SPEECH)) == said
    await rig.check_rows({"counted_by": "gateway"})


async def test_the_last_bytes_are_withheld_when_they_cannot_be_recorded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "DEADLINE", 0.02)
    rig.database.down = True
    answer = Answer(SOUND, b"one", b"two")
    left, failure = await drive_until_failure(rig.exchange(Upstream("up", answer), operation=SPEECH))
    assert left == b"one"
    assert isinstance(failure, NotRecorded)
    assert answer.closed.is_set()


@pytest.mark.parametrize(
    "failure", [UpstreamError("The connection to the upstream broke."), ValueError("odd")], ids=repr
)
async def test_a_reply_that_breaks_off_is_no_success(rig: Rig, failure: Exception) -> None:
    answer = Answer(SOUND, b"one", b"two", failure)
    left, caught = await drive_until_failure(rig.exchange(Upstream("up", answer), operation=SPEECH))
    assert left == b"one"
    assert isinstance(caught, UpstreamError)
    assert answer.closed.is_set()
    await rig.check_rows(
        OK_ROW | {"status": "error", "finish_reason": "error", "counted_by": "gateway", "cost_nanousd": None}
    )


# Events

USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
PAINTED = [event(type="partial", b64_json="x" * 50), event(type="completed", usage=USAGE)]
PAINTED_ROW = OK_ROW | {"input_tokens": 10, "output_tokens": 5, "cost_nanousd": 20, "stream": 1}


def painted(rig: Rig, *acts: Any, **options: Any) -> OperationExchange:
    return rig.exchange(Upstream("up", Answer(EVENTS, *acts)), operation=IMAGES, stream=True, **options)


async def test_events_pass_as_they_came_and_their_usage_is_read(rig: Rig) -> None:
    exchange = painted(rig, *PAINTED)
    assert [await exchange.open(), await exchange.read()] == [b"", PAINTED[0]]
    assert exchange.is_event_stream
    await rig.check_rows()
    assert await exchange.read() == PAINTED[1]
    assert exchange.ended
    await rig.check_rows(PAINTED_ROW)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
async def test_only_whole_events_leave_however_they_come(rig: Rig, newline: bytes, size: int) -> None:
    """A ping or an error that is written between two pieces stands between two events."""
    stream = (b"event: a\nid: 1\n" + PAINTED[0] + b": comment\n\n" + PAINTED[1]).replace(b"\n", newline)
    exchange = painted(rig, *(stream[at : at + size] for at in range(0, len(stream), size)))
    left = await exchange.open()
    while not exchange.ended:
        assert left == b"" or left.endswith(newline * 2)
        left += await exchange.read()
    assert left == stream
    await rig.check_rows(PAINTED_ROW)


async def test_the_last_event_is_held_with_what_belongs_to_it(rig: Rig) -> None:
    exchange = painted(rig, PAINTED[0] + PAINTED[1][:9], PAINTED[1][9:], b"data: [DONE]\n\n")
    assert [await exchange.open(), await exchange.read(), await exchange.read()] == [b"", PAINTED[0], PAINTED[1]]
    assert await exchange.read() == b"data: [DONE]\n\n"
    await rig.check_rows(PAINTED_ROW)


async def test_a_last_event_without_its_blank_line_counts(rig: Rig) -> None:
    stream = PAINTED[0] + PAINTED[1][:-1]
    assert await drive(painted(rig, stream)) == stream
    await rig.check_rows(PAINTED_ROW)


@pytest.mark.parametrize(
    "odd",
    [b"data: {\n\n", b'data: ["usage"]\n\n', b'data: {"usage":7}\n\n', b"data\n\n", b"\xff\xfe\n\n", b"plain text"],
)
async def test_events_that_are_odd_pass_too(rig: Rig, odd: bytes) -> None:
    assert await drive(painted(rig, PAINTED[1], odd)) == PAINTED[1] + odd
    await rig.check_rows(PAINTED_ROW)


async def test_events_without_usage_have_an_unknown_cost(rig: Rig) -> None:
    await drive(painted(rig, PAINTED[0]))
    await rig.check_rows(UNKNOWN_ROW | {"stream": 1})


async def test_what_was_told_before_it_broke_is_charged(rig: Rig) -> None:
    left, _ = await drive_until_failure(painted(rig, *PAINTED, b"data: half", UpstreamError("It broke.")))
    assert left == b"".join(PAINTED)
    await rig.check_rows(PAINTED_ROW | {"status": "error", "finish_reason": "error"})


async def test_an_event_without_end_is_broken_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MAX_REPLY", 1000)
    exchange = painted(rig, PAINTED[1], b"data: ", *[b"x" * 100] * 1000)
    left, failure = await drive_until_failure(exchange)
    assert left == PAINTED[1]
    assert failure.status == 502
    await rig.check_rows(PAINTED_ROW | {"status": "error", "finish_reason": "error"})


# Attempts


async def test_the_next_route_is_tried_and_each_attempt_has_its_row(rig: Rig) -> None:
    broken = Answer(JSON, b'{"object', UpstreamError("It broke."))
    upstreams = Upstream("first", refusal(429)), Upstream("second", broken), Upstream("up", Answer(JSON, vectors()))
    await rig.exchange(*upstreams).open()
    assert broken.closed.is_set()
    await rig.check_rows(
        {"attempt": 1, "backend": "first", "status": "error", "charged": 0, "cost_nanousd": 0},
        {"attempt": 2, "backend": "second", "status": "error", "charged": 0, "cost_nanousd": None},
        OK_ROW | {"attempt": 3},
    )


async def test_only_backends_that_can_do_it_are_asked(rig: Rig) -> None:
    chats = Upstream("chats", does=frozenset({CHAT}))
    await rig.exchange(chats, Upstream("up", Answer(JSON, vectors()))).open()
    assert chats.asked == []
    await rig.check_rows(OK_ROW)


async def test_nobody_can_do_it(rig: Rig) -> None:
    exchange = rig.exchange(Upstream("chats", does=frozenset({CHAT})))
    with pytest.raises(NotFound):
        await exchange.open()
    assert exchange.ended
    await rig.check_rows()


async def test_the_first_bytes_may_be_waited_for_elsewhere(rig: Rig) -> None:
    silent = Answer(SOUND, UpstreamError("It broke."))
    upstreams = Upstream("silent", silent), Upstream("up", Answer(SOUND, b"hello"))
    assert await drive(rig.exchange(*upstreams, operation=SPEECH)) == b"hello"
    assert silent.closed.is_set()


async def test_after_them_there_is_no_other_attempt(rig: Rig) -> None:
    spare = Upstream("spare", Answer(SOUND, b"hello"))
    broken = Upstream("up", Answer(SOUND, b"one", b"two", refusal(503)))
    await drive_until_failure(rig.exchange(broken, spare, operation=SPEECH))
    assert spare.asked == []
    await rig.check_rows({"status": "error", "charged": 1})


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_the_clients_own_mistake_is_told(rig: Rig, status: int) -> None:
    spare = Upstream("spare", Answer(JSON, vectors()))
    with pytest.raises(UpstreamError) as caught:
        await rig.exchange(Upstream("up", refusal(status)), spare).open()
    assert caught.value.status == status
    assert spare.asked == []
    await rig.check_rows(
        OK_ROW | {"status": "error", "counted_by": "gateway", "input_tokens": 0, "cost_nanousd": 0, "charged": 0}
    )


# Clients that leave, workers that end

LEFT_ROW = {"status": "client_disconnected", "finish_reason": "client_disconnected", "charged": 1}


async def test_who_leaves_before_the_reply_has_it_drained(rig: Rig) -> None:
    answer = Answer(JSON, HANG, vectors())
    exchange = rig.exchange(Upstream("up", answer))
    opening = asyncio.ensure_future(exchange.open())
    await settle()
    exchange.client_left()
    await settle()
    assert not opening.done()
    answer.go_on.set()
    await opening
    await rig.check_rows(OK_ROW | LEFT_ROW | {"ended_by": "drain"})


@pytest.mark.parametrize(("operation", "cost"), [(EMBEDDINGS, 3), (SPEECH, None)])
async def test_or_cancelled_as_the_route_says(rig: Rig, operation: str, cost: int | None) -> None:
    exchange = rig.exchange(Upstream("up", HANG), operation=operation, on_disconnect="cancel")
    opening = asyncio.ensure_future(exchange.open())
    await settle()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await opening
    await rig.check_rows(OK_ROW | LEFT_ROW | {"counted_by": "gateway", "ended_by": "cancel", "cost_nanousd": cost})


async def test_a_stream_whose_client_leaves_is_drained(rig: Rig) -> None:
    answer = Answer(EVENTS, PAINTED[0], HANG, PAINTED[1])
    exchange = rig.exchange(Upstream("up", answer), operation=IMAGES, stream=True)
    await exchange.open()
    exchange.client_left()
    answer.go_on.set()
    while not exchange.ended:
        await exchange.read()
    await rig.check_rows(PAINTED_ROW | LEFT_ROW | {"ended_by": "drain"})


async def test_but_not_for_ever(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DRAIN_SECONDS", 0.01)
    answer = Answer(EVENTS, PAINTED[1], HANG)
    exchange = rig.exchange(Upstream("up", answer), operation=IMAGES, stream=True)
    await exchange.open()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await exchange.read()
    assert answer.closed.is_set()
    await rig.check_rows(PAINTED_ROW | LEFT_ROW | {"ended_by": "drain"})


async def test_a_stream_whose_client_leaves_is_cancelled_as_the_route_says(rig: Rig) -> None:
    answer = Answer(SOUND, b"one", HANG)
    exchange = rig.exchange(Upstream("up", answer), operation=SPEECH, on_disconnect="cancel")
    await exchange.open()
    reading = asyncio.ensure_future(exchange.read())
    await settle()
    exchange.client_left()
    with pytest.raises(UpstreamError):
        await reading
    assert answer.closed.is_set()
    await rig.check_rows(OK_ROW | LEFT_ROW | {"counted_by": "gateway", "ended_by": "cancel", "cost_nanousd": None})


@pytest.mark.parametrize("when", ["before the reply", "in the reply", "between two reads"])
async def test_a_worker_that_ends_tells_its_client_and_records(rig: Rig, when: str) -> None:
    answer = HANG if when == "before the reply" else Answer(SOUND, b"one", b"two", HANG)
    exchange = rig.exchange(Upstream("up", answer), operation=SPEECH)
    running = asyncio.ensure_future(drive(exchange)) if when != "between two reads" else None
    if running is None:
        await exchange.open()
        exchange.interrupt()
        running = asyncio.ensure_future(exchange.read())
    else:
        await settle()
        exchange.interrupt()
    with pytest.raises(Unavailable) as caught:
        await running
    assert caught.value.headers["x-should-retry"] == "false"
    assert exchange.ended
    await rig.check_rows({"status": "interrupted", "finish_reason": "interrupted", "ended_by": None, "charged": 1})


# Together with the response that drives it


class Client:
    """Takes what is sent; stays."""

    def __init__(self) -> None:
        self.got: list[Scope] = []

    async def receive(self) -> Scope:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Scope) -> None:
        self.got.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


async def test_pings_and_errors_stand_between_events(rig: Rig) -> None:
    answer = Answer(EVENTS, PAINTED[0], PAINTED[1] + b'data: {"half', HANG, UpstreamError("It broke."))
    exchange = rig.exchange(Upstream("up", answer), operation=IMAGES, stream=True)
    client = Client()
    response = StreamResponse(exchange, Drain(), list, first_chunk_wait=None, ping_seconds=0.01)
    responding = asyncio.ensure_future(response(client.receive, client.send))
    await eventually(lambda: _has(client, b": ping\n"))
    answer.go_on.set()
    await responding
    left = client.body.replace(b": ping\n", b"")
    assert left.startswith(PAINTED[0])
    assert json.loads(left.removeprefix(PAINTED[0] + b"data: "))["error"]["message"] == "It broke."
    assert client.got[-1]["more_body"]


async def _has(client: Client, mark: bytes) -> bool:
    return mark in client.body


# Large replies


async def test_a_large_reply_is_recorded_and_priced_by_a_look_at_the_usage_at_its_end(rig: Rig) -> None:
    """The rest is not parsed: here it could not be."""
    usage = b'"usage":{"prompt_tokens":3,"total_tokens":3}'
    data = b'"data":[%b no JSON ]' % (b'{"embedding":[0.5]},' * 20_000)
    raw = b'{"object":"list",%b,%b}' % (data, usage)
    exchange = rig.exchange(Upstream("up", Answer(JSON, raw)))
    assert await exchange.open() == raw.replace(b'"total_tokens":3', b'"total_tokens":3,"cost":3e-9')
    await rig.check_rows(OK_ROW)


async def test_a_large_reply_whose_last_usage_is_of_something_else(rig: Rig) -> None:
    raw = b'{"data":[%b],"meta":{"usage":{"prompt_tokens":9}}}' % b",".join([b'{"embedding":[0.5]}'] * 20_000)
    found = json.loads(await rig.exchange(Upstream("up", Answer(JSON, raw))).open())
    assert found["meta"] == {"usage": {"prompt_tokens": 9}}
    assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "cost": 3e-9}


@pytest.mark.parametrize("usage", [b'"usage":null,', b""])
async def test_a_large_reply_without_usage_is_counted(rig: Rig, usage: bytes) -> None:
    raw = b'{%b"data":[%b]}' % (usage, b",".join([b'{"embedding":[0.5]}'] * 20_000))
    found = json.loads(await rig.exchange(Upstream("up", Answer(JSON, raw))).open())
    assert found["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "cost": 3e-9}
    assert found["data"] == json.loads(raw)["data"]
    await rig.check_rows(OK_ROW | {"counted_by": "gateway"})
