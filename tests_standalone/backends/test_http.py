"""What every backend behind HTTP does alike, in front of the scripted upstream: operations, errors, waiting times."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.base import Operator, operations_of
from gateway.backends.client import HTTPTransport
from gateway.backends.http import HTTPBackend, PassedReply, WholeReply, retry_after
from gateway.backends.openai import OpenAITranslator
from gateway.errors import UpstreamError, UpstreamUnreachable
from gateway.wire.operation import OPERATIONS, OperationRequest, is_json
from tests_standalone.backends.raw_upstream import Peer, assert_whole, raw_upstream
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.support.upstream_operations import SOUND, vector


@pytest.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    """Afterwards no connection is lent out."""
    found = HTTPTransport()
    yield found
    await assert_whole(found)
    await found.aclose()


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture
def backend(upstream: ScriptedUpstream, transport: HTTPTransport) -> HTTPBackend:
    return at(upstream.base_url, transport)


def at(url: str, transport: HTTPTransport) -> HTTPBackend:
    return HTTPBackend("up", url, OpenAITranslator("sk-upstream"), transport, headers={"x-own": "1"})


def request(operation: str = "embeddings", model: str = "m", **fields: object) -> OperationRequest:
    body = json.dumps({"model": model, "input": "one two", **fields}).encode()
    return OperationRequest.parse(operation, "application/json", body)


async def read_all(reply: WholeReply | PassedReply) -> bytes:
    pieces = []
    while piece := await reply.read():
        pieces.append(piece)
    return b"".join(pieces)


async def test_json_is_read_whole_and_put_into_shape(backend: HTTPBackend, upstream: ScriptedUpstream) -> None:
    reply = await backend.operate(request(encoding_format="float"))
    assert isinstance(reply, WholeReply)
    assert reply.content_type == "application/json"
    body = await reply.read()
    assert json.loads(body)["data"][0]["embedding"] == vector("one two")
    assert await reply.read() == b""
    await reply.close()
    (record,) = upstream.tally
    assert record.operation == "embeddings"
    assert record.headers.items() >= {"authorization": "Bearer sk-upstream", "x-own": "1", "accept": "*/*"}.items()


async def test_all_else_passes_as_it_comes(backend: HTTPBackend) -> None:
    reply = await backend.operate(request("audio/speech", voice="alloy"))
    assert isinstance(reply, PassedReply)
    assert reply.content_type == "audio/mpeg"
    assert await read_all(reply) == SOUND
    assert await reply.read() == b""
    await reply.close()


async def test_the_connection_serves_again_after_either(backend: HTTPBackend, upstream: ScriptedUpstream) -> None:
    for operation in ("embeddings", "audio/speech", "embeddings"):
        reply = await backend.operate(request(operation))
        await read_all(reply)
        await reply.close()
    assert len({record.connection for record in upstream.tally}) == 1


async def test_a_reply_that_is_closed_early_is_broken_off(transport: HTTPTransport) -> None:
    async def endless(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 1000000\r\n\r\nsound")
        await peer.gone()

    async with raw_upstream(endless) as upstream:
        reply = await at(upstream.base, transport).operate(request("audio/speech"))
        assert await reply.read() == b"sound"
        waiting = asyncio.ensure_future(reply.read())
        await asyncio.sleep(0)
        await reply.close()
        with pytest.raises(UpstreamError):
            await waiting
        await reply.close()


@pytest.mark.parametrize(
    ("head", "content_type"),
    [
        (b"content-type: text/plain; charset=utf-8\r\n", "text/plain; charset=utf-8"),
        (b"", "application/octet-stream"),
        (b"content-type: application/x-subrip\r\n", "application/x-subrip"),
    ],
)
async def test_types_that_pass(head: bytes, content_type: str, transport: HTTPTransport) -> None:
    async def text(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\n" + head + b"content-length: 4\r\n\r\ntext")

    async with raw_upstream(text) as upstream:
        reply = await at(upstream.base, transport).operate(request("audio/transcriptions"))
        assert (reply.content_type, await read_all(reply)) == (content_type, b"text")
        await reply.close()


@pytest.mark.parametrize(
    ("operation", "content_type"),
    [
        ("embeddings", b"text/html; charset=utf-8"),
        ("embeddings", b"text/event-stream"),
        ("audio/transcriptions", b"Text/HTML"),
        ("audio/speech", b"text/plain"),
        ("images/generations", b"application/jsonl"),
    ],
)
async def test_the_page_of_a_proxy_is_no_answer(operation: str, content_type: bytes, transport: HTTPTransport) -> None:
    async def page(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: " + content_type + b"\r\ncontent-length: 6\r\n\r\n<html>")

    async with raw_upstream(page) as upstream:
        with pytest.raises(UpstreamError) as caught:
            await at(upstream.base, transport).operate(request(operation))
    assert caught.value.status == 502


async def test_the_words_of_an_upstream_never_hold_our_key(transport: HTTPTransport) -> None:
    secret = "sk-upstream-secret"
    body = json.dumps({"error": {"message": f"There is no such key: {secret}, friend."}}).encode()

    async def tell_tale(peer: Peer) -> None:
        assert secret.encode() in await peer.request()
        peer.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with raw_upstream(tell_tale) as upstream:
        backend = HTTPBackend("up", upstream.base, OpenAITranslator(secret), transport)
        with pytest.raises(UpstreamError) as caught:
            await backend.operate(request("embeddings"))
    assert caught.value.message == "There is no such key: ***, friend."


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"data":[{}]}'])
async def test_json_that_is_none(body: bytes, transport: HTTPTransport) -> None:
    async def odd(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with raw_upstream(odd) as upstream:
        with pytest.raises(UpstreamError, match="no valid reply") as caught:
            await at(upstream.base, transport).operate(request(encoding_format="base64"))
    assert (caught.value.status, caught.value.upstream_status) == (502, None)


@pytest.mark.parametrize("model", ["cut-fin", "cut-rst", "drop"])
async def test_json_that_breaks_off(model: str, backend: HTTPBackend) -> None:
    with pytest.raises(UpstreamError):
        await backend.operate(request(model=model))


async def test_nobody_there(transport: HTTPTransport) -> None:
    with pytest.raises(UpstreamUnreachable):
        await at("http://127.0.0.1:1/v1", transport).operate(request())


@pytest.mark.parametrize(("status", "seen"), [(400, 400), (401, 502), (429, 429), (500, 502), (503, 503), (504, 504)])
async def test_errors_by_status(status: int, seen: int, backend: HTTPBackend) -> None:
    with pytest.raises(UpstreamError) as caught:
        await backend.operate(request(model=f"error-{status}"))
    assert (caught.value.status, caught.value.upstream_status) == (seen, status)
    assert caught.value.retry_after == (0.05 if status == 429 else None)


@pytest.mark.parametrize("status", [429, 503, 500])
async def test_when_to_come_back_is_kept_whatever_the_status(status: int, transport: HTTPTransport) -> None:
    async def busy(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 %d Busy\r\nRetry-After: 7\r\ncontent-length: 0\r\n\r\n" % status)

    async with raw_upstream(busy) as upstream:
        with pytest.raises(UpstreamError) as caught:
            await at(upstream.base, transport).operate(request())
    assert caught.value.retry_after == 7


async def test_google_says_it_in_the_body(transport: HTTPTransport) -> None:
    detail = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "12.5s"}
    body = json.dumps([{"error": {"code": 429, "message": "slow down", "details": [detail]}}]).encode()

    async def busy(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 429 Busy\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with raw_upstream(busy) as upstream:
        with pytest.raises(UpstreamError) as caught:
            await at(upstream.base, transport).operate(request())
    assert caught.value.retry_after == 12.5


def test_it_is_an_operator(backend: HTTPBackend) -> None:
    assert isinstance(backend, Operator)
    assert operations_of(backend) == OPERATIONS


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "5"}, 5),
        ({"retry-after": " 0 "}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "9" * 5000}, None),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 99999999999 07:28:00 GMT"}, None),
        ({"retry-after": "5", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "5", "retry-after-ms": "soon"}, 5),
        ({"retry-after": "5", "retry-after-ms": "nan"}, 5),
        ({"retry-after-ms": "-5"}, None),
        ({"retry-after-ms": "inf"}, None),
    ],
)
def test_when_to_come_back(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize("in_seconds", [-3600, 90])
def test_when_to_come_back_by_the_clock(in_seconds: int) -> None:
    found = retry_after({"retry-after": formatdate(time.time() + in_seconds, usegmt=True)})
    assert found is not None
    assert in_seconds - 30 < found <= in_seconds


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255)) | st.from_regex(r"\w{3}, \d+ \w{3} \d+ [\d:]+ [+-]?\w+"))
def test_any_header_is_a_time_or_none(value: str) -> None:
    assert isinstance(retry_after({"retry-after": value, "retry-after-ms": value}), float | None)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/problem+json", True),
        ("application/x-ndjson", False),
        ("text/event-stream", False),
        ("", False),
    ],
)
def test_what_is_json(content_type: str, expected: bool) -> None:
    assert is_json(content_type) is expected
