"""The books against an upstream that keeps its own: rows neither missing nor double, tokens exact where reported."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from contextlib import suppress
from typing import Any

import pytest

from tests_standalone.support.upstream import Record, ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of

REQUESTS = 1000
AT_ONCE = 32
SCRIPTS = [
    "answer", "answer", "answer", "tools", "cached", "reasoning", "no-usage", "usage-on-finish", "unicode",
    "lone-surrogate", "nul", "error-400", "error-429", "error-500", "fail-once", "cut-fin", "cut-rst",
    "error-mid-stream", "invalid-json",
]  # fmt: skip


async def test_ledger_and_tally_agree(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    models = {name: {"backend": "up", "price": PRICE} for name in [*SCRIPTS, "slow"]}
    gateway = await start(in_front_of(upstream, database_url, workers=2, models=models))
    chance = random.Random(20261121)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with room:
            await _call(gateway.port, f"p{number}", chance)

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    await upstream.settled()
    assert await end(gateway) == 0

    told: dict[str, list[Record]] = defaultdict(list)
    for record in upstream.tally:
        told[record.probe or ""].append(record)
    booked: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in await asyncio.to_thread(gateway.query, "SELECT * FROM usage_view ORDER BY attempt"):
        booked[row["end_user"]].append(row)

    assert {probe: len(rows) for probe, rows in booked.items()} == {probe: len(rows) for probe, rows in told.items()}
    exact = 0
    for probe, records in told.items():
        for record, row in zip(records, booked[probe], strict=True):
            if record.usage is not None and record.outcome == "finished" and record.script != "invalid-json":
                exact += 1
                assert row["counted_by"] == "upstream", (probe, record.script, row)
                counted = (row["input_tokens"], row["output_tokens"], row["cached_tokens"], row["reasoning_tokens"])
                usage = record.usage
                assert counted == (usage.prompt, usage.completion, usage.cached, usage.reasoning)
                assert float(row["cost_usd"]) == pytest.approx(_cost(usage), abs=1e-12)
    assert exact > REQUESTS / 3
    await _totals_agree(gateway)


def _cost(usage: Any) -> float:
    return ((usage.prompt - usage.cached) * 2.0 + usage.cached * 1.0 + usage.completion * 8.0) / 1e6


async def _totals_agree(gateway: Any) -> None:
    """What conversations and sessions say they used is what their rows say."""
    for view, key, counted in (
        ("conversations_view", "conversation_id", "input_tokens + output_tokens"),
        ("sessions_view", "session_id", "output_tokens"),  # a session counts what was answered
    ):
        sums = f"SUM({counted}) AS tokens, SUM(cost_usd) AS cost"
        rows = await asyncio.to_thread(gateway.query, f"SELECT * FROM {view}")
        used = await asyncio.to_thread(
            gateway.query, f"SELECT {key} AS id, {sums} FROM usage_view WHERE {key} IS NOT NULL GROUP BY {key}"
        )
        by_id = {row["id"]: row for row in used}
        for row in rows:
            tokens = (
                row["total_tokens"] if "total_tokens" in row else row["total_tokens_input"] + row["total_tokens_output"]
            )
            assert tokens == by_id[row["id"]]["tokens"]
            assert float(row["total_cost"]) == pytest.approx(float(by_id[row["id"]]["cost"]), abs=1e-9)


async def _call(port: int, probe: str, chance: random.Random) -> None:
    """JSON, a stream, or a client that leaves somewhere."""
    kind = chance.choices(["json", "stream", "leave"], [3, 4, 3])[0]
    said: dict[str, Any] = {"content": f"hello from {probe} and so on", "role": "user"}
    script = chance.choice(SCRIPTS)
    if kind == "leave":
        script = "slow"
        said["content"] = json.dumps({"script": "answer", "words": 20, "delay": 0.002}) + " " + said["content"]
    body = {
        "model": script,
        "messages": [said],
        "user": probe,
        "stream": kind == "stream" or (kind == "leave" and chance.random() < 0.7),
        **({"stream_options": {"include_usage": True}} if chance.random() < 0.3 else {}),
    }
    text = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"connection: close\r\ncontent-length: {len(text)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + text)
        if kind == "leave":
            with suppress(TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(chance.uniform(0, 0.08)):
                    await reader.readexactly(chance.randint(1, 6000))
        else:
            await reader.read()
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
