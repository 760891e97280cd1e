"""The official SDKs against our 429s: they wait as they are told and succeed, and do not repeat what is no use."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.node import run_node
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end
from tests_standalone.system.limited import Key, keyed

MODELS = {"answer": {"backend": "up", "price": PRICE}}
ONE_SECOND = {"rpm": 60, "burst": 1}
"""The second call in a row has to wait a second."""
NOTHING_LEFT = {"budget": "0.000001"}


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start, database_url: str, workers: int) -> GatewayProcess:
    return await start(keyed(upstream, database_url, workers=workers, models=MODELS))


async def statuses(gateway: GatewayProcess) -> list[int]:
    """Those of all chats, once the gateway has ended: in the order of its access log."""
    assert await end(gateway) == 0
    lines = [json.loads(line) for line in gateway.stderr_file.read_text().splitlines()]
    return sorted(line["status"] for line in lines if line.get("path") == "/v1/chat/completions")


async def python_asks(key: Key) -> openai.types.chat.ChatCompletion:
    secret = key.headers["authorization"].removeprefix("Bearer ")
    async with AsyncOpenAI(base_url=key.gateway.base_url, api_key=secret, max_retries=2) as sdk:
        return await sdk.chat.completions.create(
            model="answer", messages=[{"role": "user", "content": "hello"}], max_tokens=100
        )


async def node_asks_twice(key: Key) -> list[dict[str, Any]]:
    secret = key.headers["authorization"].removeprefix("Bearer ")
    environment = {"BASE_URL": key.gateway.base_url, "API_KEY": secret}
    done = await asyncio.to_thread(run_node, "limits.mjs", "answer", env=environment)
    assert done.returncode == 0, done.stderr
    printed: list[dict[str, Any]] = json.loads(done.stdout)
    return printed


async def test_python_waits_and_succeeds(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    key = await Key.made(gateway, **ONE_SECOND)
    for _ in range(3):
        assert (await python_asks(key)).choices[0].message.content
    assert len(upstream.tally) == 3
    assert await statuses(gateway) == [200] * 3 + [429] * 2, "one refusal each, then the wait was long enough"


async def test_python_does_not_repeat_what_the_budget_refuses(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    key = await Key.made(gateway, **NOTHING_LEFT)
    with pytest.raises(openai.RateLimitError) as caught:
        await python_asks(key)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert upstream.tally == []
    assert await statuses(gateway) == [429]


async def test_node_waits_and_succeeds(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    key = await Key.made(gateway, **ONE_SECOND)
    assert await node_asks_twice(key) == [{"status": 200}] * 2
    assert await statuses(gateway) == [200, 200, 429]


async def test_node_does_not_repeat_what_the_budget_refuses(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    key = await Key.made(gateway, **NOTHING_LEFT)
    told = {"class": "RateLimitError", "status": 429, "code": "insufficient_quota", "type": "insufficient_quota"}
    assert await node_asks_twice(key) == [told] * 2
    assert upstream.tally == []
    assert await statuses(gateway) == [429] * 2
