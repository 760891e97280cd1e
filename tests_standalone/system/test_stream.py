"""Streams on real sockets: what leaves when, slow and vanished clients, broken upstreams (contract, section 4)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, in_front_of
from tests_standalone.system.http import call, chat, post_chat, request_bytes

PRICED = {"priced": {"backend": "up", "model": "answer", "price": PRICE}}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start) -> GatewayProcess:
    return await start(in_front_of(upstream, models=PRICED, server={"first_chunk_wait": 0.3}))


@pytest.mark.parametrize("script", ["vendor-fields", "odd-json", "unicode", "tools", "reasoning", "line-separators"])
async def test_chunks_pass_to_the_byte(gateway: GatewayProcess, upstream: ScriptedUpstream, script: str) -> None:
    body = chat(script, stream=True, stream_options={"include_usage": True})
    answer = await post_chat(gateway.port, body)
    sent = upstream.tally[-1].events
    passed = [line.removeprefix("data: ") for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    assert passed[:-2] == sent[:-2]
    assert passed[-1] == sent[-1] == "[DONE]"
    usage, told = json.loads(passed[-2]), json.loads(sent[-2])
    added = {key: usage.pop(key) for key in ("conversation_id", "timings")}
    assert added["conversation_id"] == answer.headers["x-conversation-id"]
    assert usage["usage"].pop("cost", "absent") is None
    assert usage == told


async def test_the_request_passes_to_the_byte_but_for_the_asked_usage(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    said = b'"messages":[{"role":"user","content":"h\\u00e9"}]'
    odd = b"{ " + said + b' ,"model":"answer","x_top_k":1.50, "stream" : true , "e":{} }'
    await post_chat(gateway.port, odd)
    assert upstream.tally[-1].body == odd[:-2] + b',"stream_options":{"include_usage":true}' + b"}"
    plain = odd.replace(b'"stream" : true , ', b"")
    await post_chat(gateway.port, plain)
    assert upstream.tally[-1].body == plain


async def test_a_json_reply_passes_to_the_byte_but_for_what_is_added(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    answer = await post_chat(gateway.port, chat("odd-json"))
    told = bytes(upstream.tally[-1].reply)
    assert answer.body.startswith(told[: told.index(b'"usage"')])
    assert b"123456789012345678901234567890" in answer.body
    assert {*answer.json} - {*json.loads(told)} == {"conversation_id", "cost", "timings"}


async def test_the_first_chunk_leaves_before_the_second_is_made(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("held", stream=True, user="p")))
    await reader.readuntil(b"\r\n\r\n")
    await reader.readuntil(b"}\n\n")
    assert upstream.tally[-1].outcome is None
    upstream.release("p")
    rest = await reader.read()
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()


async def test_the_status_goes_out_when_the_first_chunk_takes_long(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("held-start", stream=True, user="p")))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert upstream.tally[-1].outcome is None
    upstream.release("p")
    assert (await reader.read()).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    writer.close()


@pytest.mark.parametrize(
    "script",
    ["cut-fin", "cut-rst", "cut-in-event", "error-mid-stream", "error-event-mid-stream", "invalid-json", "long-line"],
)
async def test_a_stream_that_fails_never_looks_finished(gateway: GatewayProcess, script: str) -> None:
    body = chat(script, json.dumps({"script": script, "after": 3, "delay": 0.01}), stream=True)
    answer = await post_chat(gateway.port, body)
    if answer.status == 200:
        assert not answer.clean_end
        assert "[DONE]" not in answer.events
        assert "message" in answer.events[-1]["error"]
        assert sum("error" in event for event in answer.events) == 1
    else:
        assert answer.status == 502
    rows = gateway.query("SELECT status, price_unknown, cost_usd FROM usage_view")
    assert [(row["status"], bool(row["price_unknown"])) for row in rows] == [("error", answer.status == 200)]


async def test_a_slow_reader_pauses_the_upstream(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    before = _resident(gateway.pid)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 14)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("flood", stream=True)))
    await reader.readuntil(b"\r\n\r\n")
    written = -1
    while not upstream.tally or written != upstream.tally[-1].bytes_written:
        written = upstream.tally[-1].bytes_written if upstream.tally else -1
        await asyncio.sleep(0.3)
    assert upstream.tally[-1].outcome is None
    assert written < 30 << 20
    assert _resident(gateway.pid) - before < 16 << 20
    writer.transport.abort()
    row = await _only_row(gateway)
    assert row["status"] == row["finish_reason"] == "client_disconnected"


async def test_a_client_that_leaves_cancels_what_has_no_price(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    await _leave_after_first_chunk(gateway, chat("held", json.dumps({"script": "held", "words": 50}), stream=True))
    record = (await upstream.settled())[0]
    row = await _only_row(gateway)
    assert record.outcome == "client_closed"
    assert (row["status"], row["counted_by"], row["cost_usd"]) == ("client_disconnected", "gateway", None)
    stored = gateway.query("SELECT role, finish_reason FROM messages_view ORDER BY seq")
    assert [tuple(message.values()) for message in stored] == [("user", None), ("assistant", "client_disconnected")]


async def test_a_client_that_leaves_does_not_end_what_has_a_price(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    script = json.dumps({"script": "answer", "words": 30, "delay": 0.01})
    await _leave_after_first_chunk(gateway, chat("priced", script, stream=True))
    record = (await upstream.settled())[0]
    row = await _only_row(gateway)
    assert record.usage is not None
    assert (row["status"], row["counted_by"]) == ("client_disconnected", "upstream")
    assert row["output_tokens"] == record.usage.completion
    assert float(row["cost_usd"]) > 0


async def test_leaving_before_the_first_chunk_and_leaving_a_json_call_are_recorded(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    for stream in (True, False):
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("held-headers", stream=stream)))
        await upstream.until(lambda tally, count=2 - stream: len(tally) == count)  # type: ignore[misc] # bound per round
        writer.transport.abort()
    while len(rows := gateway.query("SELECT status, output_tokens FROM usage_view")) < 2:
        await asyncio.sleep(0.02)
    assert [(row["status"], row["output_tokens"]) for row in rows] == [("client_disconnected", 0)] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunk_framing(gateway: GatewayProcess, stream: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    request = request_bytes("POST", "/v1/chat/completions", body=chat("answer", stream=stream))
    writer.write(request.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"data: {" if stream else b"{")
    assert body.endswith(b"data: [DONE]\n\n" if stream else b"}")
    writer.close()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b'{"model":"echo"}', 400),
        ("/v1/chat/completions", {"model": "echo", "messages": []}, 400),
        ("/v1/chat/completions", chat("x") | {"conversation_id": "no spaces"}, 400),
        ("/v1/chat/completions", chat("x") | {"conversation_id": "conv_" + "0" * 32}, 404),
        ("/v1/chat/completions", chat("x") | {"n": 0}, 400),
        ("/v1/chat/completions", chat("x") | {"chat_template": "{{7*7}}"}, 400),
        ("/v1/embeddings", {}, 400),
        ("/v1/nothing", {}, 404),
        ("/chat/completions/", chat("answer"), 200),
        ("//v1/v1//chat/completions", chat("answer"), 200),
    ],
)
async def test_requests_are_understood_or_refused_with_a_reason(
    gateway: GatewayProcess, upstream: ScriptedUpstream, path: str, body: Any, status: int
) -> None:
    answer = await call(gateway.port, "POST", path, body=body)
    assert answer.status == status
    assert answer.headers["x-request-id"]
    assert len(upstream.tally) == (status == 200)
    if status != 200:
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}


async def test_too_large_and_of_the_wrong_type_is_refused_before_it_is_read(gateway: GatewayProcess) -> None:
    big = await call(gateway.port, "POST", "/v1/chat/completions", {"content-length": str(40 << 20)}, b"")
    text = await call(gateway.port, "POST", "/v1/chat/completions", {"content-type": "text/plain"}, chat("answer"))
    assert (big.status, big.json["error"]["code"]) == (413, "request_too_large")
    assert text.status == 415


async def test_odd_text_survives_or_is_refused_and_no_row_is_lost(
    start: Start, upstream: ScriptedUpstream, database_url: str
) -> None:
    gateway = await start(in_front_of(upstream, database_url))
    kept = ["nul \x00 byte", "lone \ud800 surrogate", "pair \U0001f600", "sep \u2028", "\uffff", "\\u0000"]
    for content in kept:
        answer = await post_chat(gateway.port, chat("unicode-escaped", content))
        assert answer.status == 200
    raw = await post_chat(gateway.port, b'{"model":"answer","messages":[{"role":"user","content":"\xff\xed\xa0\x80"}]}')
    assert raw.status == 400
    for number, content in enumerate(kept):
        sent = upstream.tally[number].request["messages"][0]["content"]
        assert sent == content
    stored = gateway.query("SELECT content FROM messages WHERE role = 'user' ORDER BY created_at, id")
    assert sorted(json.loads(row["content"]) for row in stored) == sorted(kept)
    shown = gateway.query("SELECT content FROM messages_view WHERE role = 'user'")
    assert len(shown) == len(kept)


async def _leave_after_first_chunk(gateway: GatewayProcess, body: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=body))
    await reader.readuntil(b"}\n\n")
    writer.transport.abort()


async def _only_row(gateway: GatewayProcess) -> dict[str, Any]:
    while not (rows := gateway.query("SELECT * FROM usage_view")):
        await asyncio.sleep(0.02)
    assert len(rows) == 1
    return rows[0]


def _resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
