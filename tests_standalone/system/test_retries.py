"""SDKs that repeat by themselves, in front of an upstream whose connections break: no question is charged twice."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, end
from tests_standalone.system.limited import Key, keyed, settled_book

QUESTIONS = 100
AT_ONCE = 10
SOUND = {"script": "answer"}
RESETS: list[dict[str, Any]] = [
    {"script": "answer", "then": "drop"},  # the request came whole, and nothing is answered
    {"script": "answer", "then": "rst", "after": 0},
    {"script": "answer", "status": 503, "fail_first": 1},  # the upstream says itself that it did nothing
    {"script": "answer", "status": 503, "fail_first": 1},
]


def script_of(number: int) -> dict[str, Any]:
    return RESETS[number // 5 % len(RESETS)] if number % 5 == 0 else SOUND


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a98_one_charge_for_each_question(
    upstream: ScriptedUpstream, start: Start, database_url: str, stream: bool
) -> None:
    """Where the upstream may have been paid, the SDK is told not to repeat, and it does not."""
    models = {"any": {"backend": "up", "price": PRICE}}
    gateway = await start(keyed(upstream, database_url, workers=2, models=models))
    key = await Key.made(gateway, budget="1")
    secret = key.headers["authorization"].removeprefix("Bearer ")
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(sdk: AsyncOpenAI, number: int) -> bool:
        """Was it answered?"""
        said: Any = [{"role": "user", "content": json.dumps(script_of(number))}]
        asked: Any = {"model": "any", "messages": said, "user": f"q{number}", "max_tokens": 50, "stream": stream}
        async with room:
            try:
                answer = await sdk.chat.completions.create(**asked)
                return len([chunk async for chunk in answer]) > 0 if stream else answer.choices[0].message.content != ""
            except openai.InternalServerError as failure:
                return failure.response.headers.get("x-should-retry") != "false"

    async with AsyncOpenAI(base_url=gateway.base_url, api_key=secret, max_retries=5) as sdk:
        answered = await asyncio.gather(*(ask(sdk, number) for number in range(QUESTIONS)))
    assert answered == ["then" not in script_of(number) for number in range(QUESTIONS)]
    book = await settled_book(gateway, key.subject)
    assert await end(gateway) == 0

    told = defaultdict(list)
    for record in upstream.tally:
        told[record.probe].append(record)
    booked = defaultdict(list)
    for row in await asyncio.to_thread(gateway.query, "SELECT end_user, charged, cost_nanousd FROM usage_rows"):
        booked[row["end_user"]].append((row["charged"], row["cost_nanousd"]))
    spent = 0
    for number in range(QUESTIONS):
        records, rows = told[f"q{number}"], booked[f"q{number}"]
        assert len(rows) == len(records) == (2 if "fail_first" in script_of(number) else 1)
        usages = [record.usage for record in records if record.outcome == "finished" and record.usage is not None]
        charged = [cost for is_charged, cost in rows if is_charged]
        assert charged == [usage.prompt * 2_000 + usage.completion * 8_000 for usage in usages if answered[number]]
        assert not any(cost for is_charged, cost in rows if not is_charged)
        spent += sum(charged)
    assert (book.spent, book.holds) == (spent, (0, 0, 0))
