"""Shutting down, a database that goes away, several workers and gateways on one database."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from typing import Any

import pytest

from tests_standalone.support.databases import running_postgres
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.postgres import launch
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of
from tests_standalone.system.http import Answer, answer_of, call, chat, post_chat, request_bytes

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for a close that the other side sees at once."""
PRICED = {"answer": {"backend": "up", "price": PRICE}, "held": {"backend": "up", "price": PRICE}}


class Streaming:
    """A stream that has begun: `rest()` reads it to its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes) -> None:
        self._reader, self._writer, self._begun = reader, writer, begun

    async def rest(self) -> Answer:
        try:
            return answer_of(self._begun + await self._reader.read())
        finally:
            self._writer.close()


async def begin(gateway: GatewayProcess, body: dict[str, Any]) -> Streaming:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=body))
    begun = await reader.readuntil(b"\r\n\r\n") + await reader.readuntil(b"}\n\n")
    return Streaming(reader, writer, begun)


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_lets_streams_finish(upstream: ScriptedUpstream, start: Start, workers: int) -> None:
    gateway = await start(in_front_of(upstream, workers=workers, models=PRICED))
    streams = [await begin(gateway, chat("held", stream=True)) for _ in range(8)]
    gateway.terminate()
    await asyncio.sleep(0.3)
    with pytest.raises(OSError):  # noqa: PT011 # refused or reset: nothing new is taken
        await post_chat(gateway.port, chat("answer"))
    upstream.release()
    answers = await asyncio.gather(*(stream.rest() for stream in streams))
    assert all(answer.clean_end and answer.events[-1] == "[DONE]" for answer in answers)
    assert await asyncio.to_thread(gateway.wait) == 0
    rows = gateway.query("SELECT status, counted_by FROM usage_view")
    assert [tuple(row.values()) for row in rows] == [("ok", "upstream")] * 8


@pytest.mark.parametrize("how", ["drain_seconds", "second signal"])
async def test_what_runs_too_long_is_cut_told_recorded_and_billed(
    upstream: ScriptedUpstream, start: Start, how: str
) -> None:
    drain = 0.5 if how == "drain_seconds" else 60
    gateway = await start(in_front_of(upstream, models=PRICED, server={"drain_seconds": drain}))
    stream = await begin(gateway, chat("held", stream=True))
    whole = asyncio.create_task(post_chat(gateway.port, chat("held-headers")))
    await upstream.until(lambda tally: len(tally) == 2)
    gateway.terminate()
    if how == "second signal":
        await asyncio.sleep(0.2)
        gateway.send_signal(signal.SIGTERM)
    answer = await stream.rest()
    assert not answer.clean_end
    assert "shutting down" in answer.events[-1]["error"]["message"]
    assert (await whole).status == 503
    assert await asyncio.to_thread(gateway.wait) == 0
    rows = gateway.query("SELECT status, finish_reason, output_tokens, cost_usd FROM usage_view ORDER BY stream DESC")
    assert [row["status"] for row in rows] == ["interrupted", "interrupted"]
    assert rows[0]["output_tokens"] > 0
    assert rows[0]["cost_usd"] > 0
    stored = gateway.query("SELECT role, finish_reason FROM messages_view WHERE role = 'assistant'")
    assert [row["finish_reason"] for row in stored] == ["interrupted"]


async def test_a_client_that_does_not_read_cannot_keep_its_turn_from_the_record(
    upstream: ScriptedUpstream, start: Start
) -> None:
    gateway = await start(in_front_of(upstream, models=PRICED, server={"drain_seconds": 0.3}))
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1 << 12)
    writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("flood", stream=True)))
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.5)
    assert await end(gateway) in (0, 1)
    assert [row["status"] for row in gateway.query("SELECT status FROM usage_view")] == ["interrupted"]
    writer.close()


async def test_idle_ends_at_once(start: Start, upstream: ScriptedUpstream) -> None:
    gateway = await start(in_front_of(upstream, workers=2))
    assert await end(gateway) == 0


async def test_database_down_means_503_and_no_upstream_call(upstream: ScriptedUpstream, start: Start) -> None:
    server = launch()
    try:
        gateway = await start(in_front_of(upstream, server.create_database(), models=PRICED))
        assert (await post_chat(gateway.port, chat("answer"))).status == 200
        server.stop("immediate")
        refused = await post_chat(gateway.port, chat("answer"))
        assert (refused.status, refused.json["error"]["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(upstream.tally) == 1
        server.start()
        while (await call(gateway.port, "GET", "/health/ready")).status != 200:
            await asyncio.sleep(0.1)
        assert (await post_chat(gateway.port, chat("answer"))).status == 200
    finally:
        server.close()


async def test_a_database_that_takes_no_writes_stops_new_work_too(upstream: ScriptedUpstream, start: Start) -> None:
    """It reads, so only the commits can tell."""
    server = launch()
    try:
        url = server.create_database()
        name = url.rsplit("/", 1)[1]
        gateway = await start(in_front_of(upstream, url, models=PRICED))
        assert (await post_chat(gateway.port, chat("answer"))).status == 200
        server.admin(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        server.stop("fast")
        server.start()
        first = asyncio.create_task(post_chat(gateway.port, chat("answer")))
        await upstream.until(lambda tally: len(tally) == 2)
        while (await call(gateway.port, "GET", "/health/ready")).status == 200:
            await asyncio.sleep(0.05)
        refused = [await post_chat(gateway.port, chat("answer", stream=stream)) for stream in (False, True)]
        assert [answer.json["error"]["code"] for answer in refused] == ["unavailable"] * 2
        assert all("retry-after" in answer.headers for answer in refused)
        assert len(upstream.tally) == 2
        assert (await first).json["error"]["code"] == "not_recorded"
        server.admin(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        server.stop("fast")
        server.start()
        while (await call(gateway.port, "GET", "/health/ready")).status != 200:
            await asyncio.sleep(0.05)
        assert (await post_chat(gateway.port, chat("answer"))).status == 200
        assert len(gateway.query("SELECT * FROM usage_view")) == 3
    finally:
        server.close()


async def test_a_client_that_leaves_before_anything_was_sent_leaves_no_row(
    upstream: ScriptedUpstream, start: Start
) -> None:
    """As many rows as the upstream was called, however early clients go."""
    gateway = await start(in_front_of(upstream))
    for number in range(60):
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes("POST", "/v1/chat/completions", body=chat("slow-start", user=f"p{number}")))
        await asyncio.sleep(number * 0.0001)
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    assert (await post_chat(gateway.port, chat("answer", user="last"))).status == 200
    await upstream.settled()
    await end(gateway)
    booked = [row["end_user"] for row in gateway.query("SELECT end_user FROM usage_view")]
    assert sorted(booked) == sorted(record.probe or "" for record in upstream.tally)


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_running_stream_outlives_a_database_restart_or_says_that_it_is_not_recorded(
    upstream: ScriptedUpstream, start: Start, comes_back: bool
) -> None:
    server = launch()
    try:
        gateway = await start(in_front_of(upstream, server.create_database(), models=PRICED))
        stream = await begin(gateway, chat("held", stream=True))
        server.stop("immediate")
        upstream.release()
        if comes_back:
            await asyncio.sleep(0.5)
            server.start()
        answer = await stream.rest()
        if comes_back:
            assert answer.events[-1] == "[DONE]"
        else:
            assert not answer.clean_end
            assert answer.events[-1]["error"]["code"] == "not_recorded"
            server.start()
        while (await call(gateway.port, "GET", "/health/ready")).status != 200:
            await asyncio.sleep(0.1)
        while not (rows := await asyncio.to_thread(gateway.query, "SELECT status, counted_by FROM usage_view")):
            await asyncio.sleep(0.1)
        assert [tuple(row.values()) for row in rows] == [("ok", "upstream")]
    finally:
        server.close()


async def test_a_turn_of_one_worker_is_read_by_another_in_the_next_call(
    upstream: ScriptedUpstream, start: Start
) -> None:
    """Two gateways on one PostgreSQL, turn by turn in one conversation."""
    url = running_postgres().create_database()
    gateways = [await start(in_front_of(upstream, url, workers=2)) for _ in range(2)]
    said = None
    for turn in range(20):
        more = {} if said is None else {"conversation_id": said}
        answer = await post_chat(gateways[turn % 2].port, chat("answer", f"turn {turn}", **more))
        said = answer.json["conversation_id"]
        sent = [message["content"] for message in upstream.tally[-1].request["messages"] if message["role"] == "user"]
        assert sent == [f"turn {number}" for number in range(turn + 1)]
    rows = gateways[0].query("SELECT seq, role FROM messages_view ORDER BY seq")
    assert [tuple(row.values()) for row in rows] == [
        (number + 1, ("user", "assistant")[number % 2]) for number in range(40)
    ]
    totals = gateways[0].query("SELECT message_count, total_tokens_input, total_tokens_output FROM conversations_view")
    used = gateways[0].query("SELECT SUM(input_tokens) AS i, SUM(output_tokens) AS o FROM usage_view")
    assert tuple(totals[0].values()) == (40, *used[0].values())


async def test_a_revoked_key_is_refused_by_every_gateway_at_once(upstream: ScriptedUpstream, start: Start) -> None:
    url = running_postgres().create_database()
    one, two = [await start(in_front_of(upstream, url, workers=2)) for _ in range(2)]
    key_id, key = await asyncio.to_thread(one.create_key, "ann")
    headers = {"authorization": f"Bearer {key}"}
    for gateway in (one, two) * 4:
        assert (await post_chat(gateway.port, chat("answer"), headers)).status == 200
    await asyncio.to_thread(two.run, "keys", "revoke", key_id)
    for gateway in (one, two) * 4:
        assert (await post_chat(gateway.port, chat("answer"), headers)).status == 401


async def test_logs_are_json_and_hold_no_prompt_answer_or_secret(upstream: ScriptedUpstream, start: Start) -> None:
    gateway = await start(in_front_of(upstream))
    _, key = await asyncio.to_thread(gateway.create_key, "ann")
    headers = {"authorization": f"Bearer {key}"}
    for script in ("answer", "error-500", "cut-fin", "error-400", "invalid-json"):
        for stream in (False, True):
            await post_chat(gateway.port, chat(script, "prompt-canary-123", stream=stream), headers)
    await call(gateway.port, "GET", "/v1/models?secret=query-canary", headers)
    await end(gateway)
    lines = gateway.stderr_file.read_text().splitlines()
    assert all(json.loads(line)["level"] for line in lines)
    for canary in (key, "prompt-canary-123", "You said", "query-canary", "sk-upstream-secret"):
        assert canary not in gateway.logs()
