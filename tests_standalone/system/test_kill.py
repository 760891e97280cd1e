"""`kill -9` of workers under load: what a client saw complete is in the database, once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from typing import Any

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of

KILLS = 100
CLIENTS = 12
WORKERS = 3


async def test_nothing_acknowledged_is_lost(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    models = {"answer": {"backend": "up", "price": PRICE}}
    gateway = await start(in_front_of(upstream, database_url, workers=WORKERS, models=models))
    chance = random.Random(9)
    seen: list[str] = []
    done = asyncio.Event()
    clients = [
        asyncio.create_task(_client(gateway.port, seen, done, random.Random(number))) for number in range(CLIENTS)
    ]
    for _ in range(KILLS):
        before = len(seen)
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        while len(seen) == before or not (pids := gateway.worker_pids()):  # who is killed must be serving under load
            await asyncio.sleep(0.01)
        with suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
    done.set()
    await asyncio.gather(*clients)
    assert await end(gateway) == 0

    assert len(seen) > KILLS
    rows = await _request_ids(gateway)
    assert [request for request in seen if rows[request] != 1] == []
    await _turns_are_whole(gateway)


async def _client(port: int, seen: list[str], done: asyncio.Event, chance: random.Random) -> None:
    while not done.is_set():
        stream = chance.random() < 0.6
        body = {"model": "answer", "stream": stream, "messages": [{"role": "user", "content": "Tell me more"}]}
        text = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        try:
            writer.write(f"{head}connection: close\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text)
            answer = await reader.read()
        except OSError:
            continue
        finally:
            writer.close()
        request = _complete(answer, stream)
        if request is not None:
            seen.append(request)


def _complete(answer: bytes, stream: bool) -> str | None:
    """The request id of an answer that its client takes for whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if not head.startswith(b"HTTP/1.1 200"):
        return None
    whole = b"data: [DONE]\n\n" in body if stream else len(body) == int(fields[b"content-length"])
    return fields[b"x-request-id"].decode() if whole else None


async def _request_ids(gateway: GatewayProcess) -> Counter[str]:
    rows = await asyncio.to_thread(gateway.query, "SELECT request_id FROM usage_view WHERE status = 'ok'")
    return Counter(row["request_id"] for row in rows)


async def _turns_are_whole(gateway: GatewayProcess) -> None:
    """Every turn has both its messages, and the totals are those of its rows."""

    async def query(sql: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(gateway.query, sql)

    roles = await query("SELECT conversation_id, role, COUNT(*) AS n FROM messages_view GROUP BY conversation_id, role")
    assert {(row["role"], row["n"]) for row in roles} == {("user", 1), ("assistant", 1)}
    rows = await query("SELECT COUNT(*) AS n FROM usage_view WHERE conversation_id IS NOT NULL")
    talks = await query("SELECT COUNT(*) AS n FROM conversations_view")
    sessions = await query("SELECT SUM(conversation_count) AS n, SUM(total_tokens) AS tokens FROM sessions_view")
    used = await query("SELECT SUM(output_tokens) AS tokens FROM usage_view WHERE session_id IS NOT NULL")
    assert rows[0]["n"] == talks[0]["n"] == sessions[0]["n"]
    assert sessions[0]["tokens"] == used[0]["tokens"]
