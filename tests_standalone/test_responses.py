"""Our streaming response, driven as a server drives it: what is sent, when, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.drain import Drain
from gateway.errors import BadRequest, UpstreamError
from gateway.responses import STREAM_HEADERS, StreamResponse, drive, header_value, notes, send_json, whole_way

Read = Callable[[], Awaitable[bytes]]


class Exchange:
    """What a StreamResponse asks of an exchange; each read is a function of the test's. The last one ends it."""

    def __init__(self, *reads: Read) -> None:
        self._reads = list(reads)
        self.ended = False
        self.committed = False
        self.told: list[str] = []
        self.is_event_stream = True

    async def open(self) -> bytes:
        return await self._next()

    async def read(self, write: Callable[[bytes], bool] | None = None) -> bytes:
        self.write = write
        return await self._next()

    async def _next(self) -> bytes:
        read = self._reads.pop(0)
        self.ended = not self._reads
        return await read()

    def status_sent(self) -> None:
        self.committed = True

    def client_left(self) -> None:
        self.told.append("client_left")

    def interrupt(self) -> None:
        self.told.append("interrupt")


class Client:
    """Takes messages while `open`; leaves when told."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self.left.set()

    async def send(self, message: Any) -> None:
        await self.reading.wait()
        self.got.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)

    @property
    def finished(self) -> bool:
        return bool(self.got) and self.got[-1].get("more_body") is False


class OfferingClient(Client):
    """Behind a server whose `receive` has a method for those who wait for the end. `told` is whom it would tell."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Callable[[], None]] = []
        self.receive = Offer(self.told)  # type: ignore[method-assign, assignment]  # as a server does

    def leave(self) -> None:
        for call in self.told:
            call()


class Offer:
    def __init__(self, told: list[Callable[[], None]]) -> None:
        self._told = told

    async def __call__(self) -> dict[str, Any]:
        raise AssertionError("nobody needs to ask")

    def when_gone(self, call: Callable[[], None]) -> Callable[[], None]:
        self._told.append(call)
        return lambda: self._told.remove(call)


class Whole:
    """What `drive` asks of an exchange."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.told: list[str] = []
        self.go_on = asyncio.Event()
        self._failure = failure

    async def complete(self) -> str:
        await self.go_on.wait()
        if self._failure is not None:
            raise self._failure
        return "reply"

    def client_left(self) -> None:
        self.told.append("client_left")
        self.go_on.set()


def gives(data: bytes) -> Read:
    async def read() -> bytes:
        return data

    return read


def waits(seconds: float, data: bytes) -> Read:
    async def read() -> bytes:
        await asyncio.sleep(seconds)
        return data

    return read


def fails(failure: Exception, after: float = 0) -> Read:
    async def read() -> bytes:
        await asyncio.sleep(after)
        raise failure

    return read


async def respond(exchange: Exchange, client: Client, drain: Drain | None = None, **options: float | None) -> None:
    wait = options.pop("first_chunk_wait", 5)
    response = StreamResponse(exchange, drain or Drain(), lambda: STREAM_HEADERS, first_chunk_wait=wait, **options)  # type: ignore[arg-type] # as far as it is asked
    await response(client.receive, client.send)


async def test_each_read_is_one_send_and_the_last_one_ends_the_reply() -> None:
    client = Client()
    await respond(Exchange(gives(b"a"), gives(b""), gives(b"b"), gives(b"c")), client)
    assert [message.get("body") for message in client.got] == [None, b"a", b"b", b"c"]
    assert client.finished
    headers = dict(client.got[0]["headers"])
    assert headers[b"cache-control"] == b"no-store"


async def test_silence_is_filled_with_pings_of_a_single_line_between_events() -> None:
    client = Client()
    await respond(Exchange(gives(b"data: 1\n\n"), waits(0.12, b"data: 2\n\n")), client, ping_seconds=0.03)
    first, *pings, last = [message["body"] for message in client.got[1:]]
    assert (first, last) == (b"data: 1\n\n", b"data: 2\n\n")
    assert len(pings) >= 2
    assert set(pings) == {b": ping\n"}


@pytest.mark.parametrize("wait", [0, 0.01, 0.03, 5, None])
async def test_they_come_however_long_the_first_chunk_would_have_been_waited_for(wait: float | None) -> None:
    client = Client()
    reads = gives(b"data: 1\n\n"), waits(0.12, b"data: 2\n\n")
    await respond(Exchange(*reads), client, first_chunk_wait=wait, ping_seconds=0.03)
    assert [message.get("body") for message in client.got[:3]] == [None, b"data: 1\n\n", b": ping\n"]
    assert client.body.endswith(b": ping\ndata: 2\n\n")


class TakesBoth:
    """A `send` that takes the status and the first piece in one call."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.begun: list[bytes] = []

    async def __call__(self, message: Any) -> None:
        await self._client.send(message)

    async def whole(self, status: int, headers: Any, body: bytes, more: bool = False) -> None:
        self.begun.append(body)
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": more})


@pytest.mark.parametrize(
    ("reads", "begun"),
    [
        ([gives(b"a"), waits(0.05, b"b"), gives(b"c")], [b"a"]),
        ([gives(b"a"), fails(UpstreamError("It broke."))], [b"a"]),
        ([gives(b""), gives(b"b")], []),
        ([gives(b"all")], []),
        ([waits(0.05, b"late"), gives(b"end")], []),
    ],
)
async def test_the_first_piece_leaves_with_the_status_where_it_can(reads: list[Read], begun: list[bytes]) -> None:
    together, apart = Client(), Client()
    send = TakesBoth(together)
    for client, way in ((together, send), (apart, apart.send)):
        response = StreamResponse(Exchange(*reads), Drain(), lambda: STREAM_HEADERS, first_chunk_wait=0.02)  # type: ignore[arg-type] # as far as it is asked
        await response(client.receive, way)
    assert [{**message, "headers": [*message.get("headers", ())]} for message in together.got] == [
        {**message, "headers": [*message.get("headers", ())]} for message in apart.got
    ]
    assert send.begun == begun


async def test_the_cut_is_told_where_status_and_first_piece_were_waiting_for_the_client() -> None:
    client, drain = Client(), Drain()
    exchange, send = Exchange(gives(b"a"), fails(UpstreamError("Shutting down."))), TakesBoth(client)
    client.reading.clear()
    response = StreamResponse(exchange, drain, lambda: STREAM_HEADERS, first_chunk_wait=5)  # type: ignore[arg-type] # as far as it is asked
    task = asyncio.ensure_future(response(client.receive, send))
    await asyncio.sleep(0.01)
    drain.cut()
    await asyncio.sleep(0.01)
    assert exchange.ended
    client.reading.set()
    await task
    assert client.body.startswith(b"a")
    assert b"Shutting down." in client.body
    assert not client.finished


async def test_no_ping_goes_out_while_chunks_come() -> None:
    client = Client()
    await respond(Exchange(*(waits(0.005, b"x") for _ in range(20))), client, ping_seconds=0.5)
    assert b"ping" not in client.body


async def test_the_status_waits_for_the_first_chunk_so_a_refusal_is_a_real_one() -> None:
    client = Client()
    with pytest.raises(BadRequest):
        await respond(Exchange(fails(BadRequest("no"))), client)
    assert client.got == []


async def test_a_late_first_chunk_has_its_status_before_it_and_may_ping() -> None:
    client, exchange = Client(), Exchange(waits(0.1, b"late"), gives(b"end"))
    await respond(exchange, client, first_chunk_wait=0.01, ping_seconds=0.02)
    assert exchange.committed
    assert client.got[0]["status"] == 200
    assert client.got[1]["body"] == b": ping\n"
    assert client.body.endswith(b"lateend")


async def test_a_failure_is_told_after_a_status_that_is_still_on_its_way() -> None:
    client, upstream_failed = Client(), asyncio.Event()

    async def read() -> bytes:
        await upstream_failed.wait()
        raise UpstreamError("It broke.")

    client.reading.clear()
    task = asyncio.ensure_future(respond(Exchange(read), client, first_chunk_wait=0.01))
    await asyncio.sleep(0.05)
    upstream_failed.set()
    client.reading.set()
    await task
    assert [message["type"] for message in client.got] == ["http.response.start", "http.response.body"]
    assert b"It broke." in client.body


@pytest.mark.parametrize("late", [True, False])
async def test_a_failure_after_the_status_is_one_event_and_no_end(late: bool) -> None:
    client, failure = Client(), UpstreamError("It broke.")
    reads = [fails(failure, after=0.05)] if late else [gives(b"data: 1\n\n"), fails(failure)]
    await respond(Exchange(*reads), client, first_chunk_wait=0.01)
    assert client.body.count(b"data: {") == 1
    assert b'"message":"It broke."' in client.body
    assert client.got[-1]["more_body"] is True
    assert not client.finished


@pytest.mark.parametrize("offers", [True, False], ids=["our server", "another server"])
async def test_a_client_that_left_is_sent_nothing_more_and_the_exchange_goes_on_to_its_end(offers: bool) -> None:
    client, exchange = OfferingClient() if offers else Client(), Exchange(gives(b"a"), waits(0.03, b"b"), gives(b"c"))
    task = asyncio.ensure_future(respond(exchange, client))
    await asyncio.sleep(0.01)
    client.leave()
    await task
    assert exchange.told == ["client_left"]
    assert exchange.ended
    assert client.body == b"a"


async def test_the_cut_is_told_even_to_a_client_that_was_not_reading_then() -> None:
    client, drain = Client(), Drain()
    exchange = Exchange(gives(b"a"), gives(b"b"), fails(UpstreamError("Shutting down.")))
    client.reading.clear()
    task = asyncio.ensure_future(respond(exchange, client, drain))
    await asyncio.sleep(0.01)
    client.reading.set()
    await asyncio.sleep(0)
    client.reading.clear()
    await asyncio.sleep(0.01)
    drain.cut()
    client.reading.set()
    await task
    assert exchange.told == ["interrupt"]
    assert b"Shutting down." in client.body
    assert not client.finished


@pytest.mark.parametrize("offers", [True, False], ids=["our server", "another server"])
@pytest.mark.parametrize("failure", [None, BadRequest("no")])
async def test_a_whole_reply_hears_that_its_client_left(offers: bool, failure: Exception | None) -> None:
    client, exchange = OfferingClient() if offers else Client(), Whole(failure)
    task = asyncio.ensure_future(drive(exchange, client.receive))  # type: ignore[arg-type]  # as far as it is asked
    await asyncio.sleep(0.01)
    client.leave()
    assert await asyncio.gather(task, return_exceptions=True) == [failure or "reply"]
    assert exchange.told == ["client_left"]


async def test_nobody_is_told_after_a_reply() -> None:
    client, whole, stream = OfferingClient(), Whole(), Exchange(gives(b"a"), gives(b"b"))
    whole.go_on.set()
    assert await drive(whole, client.receive) == "reply"  # type: ignore[arg-type, comparison-overlap]  # as above
    await respond(stream, client)
    assert client.told == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("gpt-4o", b"gpt-4o"), ("a b", b"a b"), ("é\r\nx: y", b"%C3%A9%0D%0Ax: y"), ("\ud800", b"?"), ("", b"")],
)
def test_any_text_fits_into_a_header(text: str, value: bytes) -> None:
    assert header_value(text) == value


class Out:
    """What our own server offers."""

    def __init__(self) -> None:
        self.notes = {"noted": 1}
        self.got: list[Any] = []

    async def send(self, message: Any) -> None:
        self.got.append(message)

    async def whole(self, status: int, headers: Any, body: bytes) -> None:
        self.got.append((status, headers, body))


def test_only_a_send_that_nobody_has_wrapped_takes_a_whole_answer() -> None:
    out = Out()
    scope = {"extensions": {"gateway.way_out": out}}
    assert whole_way(scope, out.send) == out.whole
    assert whole_way(scope, lambda message: out.send(message)) is None
    assert whole_way(scope, Out().send) is None
    assert whole_way({"extensions": {}}, out.send) is None
    assert whole_way({}, out.send) is None


def test_notes_of_another_server_are_for_one_request() -> None:
    assert notes({"extensions": {"gateway.way_out": Out()}}) == {"noted": 1}
    assert notes({}) == {}
    assert notes({}) is not notes({})


async def test_json_is_the_same_whole_and_in_two_messages() -> None:
    class Whole(Client):
        async def __call__(self, message: Any) -> None:
            raise AssertionError("it has `whole`")

        async def whole(self, status: int, headers: Any, body: bytes) -> None:
            self.got.append((status, headers, body))

    client, whole = Client(), Whole()
    client.reading.set()
    await send_json(client.send, 201, b"{}", [(b"x", b"y")])
    await send_json(whole, 201, b"{}", [(b"x", b"y")])
    start, body = client.got
    assert whole.got == [(start["status"], start["headers"], body["body"])]
