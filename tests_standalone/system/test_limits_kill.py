"""`kill -9` of workers and of whole gateways that hold slots, tokens and money: all of it comes back within 30 s."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start
from tests_standalone.system.http import Answer, chat
from tests_standalone.system.limited import Key, charged, keyed, lines, settled_book

BACK_WITHIN = 30.0
CALLS = 8
MODELS = {name: {"backend": "up", "price": PRICE} for name in ("answer", "held-headers")}
WORST = (100 * 8000 + 30 * 2000) / 1e9
"""More than such a call may cost, in dollars, and less than what 1.2 of them may."""


@dataclass
class Calls:
    """Calls that hold all slots, tokens and money of a key; `of` tells which of them each worker has. None of what they
    hold comes back by itself soon enough for another call."""

    key: Key
    of: dict[int, list[asyncio.Task[Answer | None]]]

    async def results(self) -> list[Answer | None]:
        return await asyncio.gather(*(call for calls in self.of.values() for call in calls))


@asynccontextmanager
async def a_key_that_is_used_up(gateway: GatewayProcess, upstream: ScriptedUpstream) -> AsyncIterator[Calls]:
    key = await Key.made(gateway, max_parallel=CALLS, tpm=1, token_burst=130 * CALLS, budget=f"{WORST * CALLS:.6f}")
    async with lines([gateway], CALLS) as found:
        calls = Calls(key, defaultdict(list))
        for line in found:
            asking = _or_none(line.ask(key.headers, a_call("held-headers")))
            calls.of[line.pid].append(asyncio.create_task(asking))
        await upstream.until(lambda tally: len(tally) == CALLS)
        refused = await key.ask(a_call("answer"))
        assert (refused.status, refused.json["error"]["code"]) == (429, "insufficient_quota")
        yield calls


def a_call(model: str) -> dict[str, Any]:
    return chat(model, "hello", max_tokens=100)


async def _or_none(answer: Awaitable[Answer]) -> Answer | None:
    """None: the connection broke."""
    with suppress(OSError, asyncio.IncompleteReadError, IndexError):
        return await answer
    return None


async def seconds_to_get_in(key: Key, died: float) -> float:
    while (answer := await _or_none(key.ask(a_call("answer")))) is None or answer.status == 429:
        assert time.monotonic() - died <= BACK_WITHIN
        await asyncio.sleep(0.2)
    assert answer.status == 200, answer.body
    return time.monotonic() - died


async def test_what_a_killed_worker_held_comes_back(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    gateway = await start(keyed(upstream, database_url, models=MODELS))
    async with a_key_that_is_used_up(gateway, upstream) as calls:
        victim = gateway.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        broken = calls.of[victim]
        assert await asyncio.gather(*broken) == [None] * len(broken) != []
        took = await seconds_to_get_in(calls.key, died)
        print(f"one of four workers killed with {len(broken)} of {CALLS} calls: back after {took:.1f} s")
        assert took <= BACK_WITHIN

        upstream.release()
        rest = [answer.status for answer in await calls.results() if answer is not None]
        assert rest == [200] * (CALLS - len(broken))
        await _nothing_is_held(gateway, calls.key, calls=len(rest) + 1)


async def test_what_a_killed_gateway_held_comes_back(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    gateway = await start(keyed(upstream, database_url, models=MODELS))
    async with a_key_that_is_used_up(gateway, upstream) as calls:
        os.killpg(gateway.pid, signal.SIGKILL)
        died = time.monotonic()
        assert await calls.results() == [None] * CALLS
        upstream.release()
        await asyncio.to_thread(gateway.wait)
        await asyncio.to_thread(gateway.start)
        took = await seconds_to_get_in(calls.key, died)
        print(f"the whole gateway killed with {CALLS} calls and started again: back after {took:.1f} s")
        assert took <= BACK_WITHIN
        await _nothing_is_held(gateway, calls.key, calls=1)


async def _nothing_is_held(gateway: GatewayProcess, key: Key, calls: int) -> None:
    """And the book has what the calls that were recorded cost."""
    found = await settled_book(gateway, key.subject)
    rows = await asyncio.to_thread(gateway.query, "SELECT status FROM usage_view")
    assert [row["status"] for row in rows] == ["ok"] * calls
    assert found.holds == (0, 0, 0)
    assert (await charged(gateway))[1] == found.spent
