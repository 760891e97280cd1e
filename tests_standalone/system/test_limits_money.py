"""Budgets, and what calls that fail give back: what is spent is what the rows say, and never more than there was."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from typing import Any

import pytest

from tests_standalone.support.gateway import GatewayProcess, free_port
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start
from tests_standalone.system.http import Answer, call, chat, request_bytes
from tests_standalone.system.limited import Key, book, charged, held, keyed, settled_book

SCRIPTS = (
    "answer", "no-usage", "tools", "cached", "error-400", "error-429", "error-500", "fail-once", "cut-fin",
    "error-mid-stream", "slow-start", "invalid-json", "held-headers", "dear", "embedder",
)  # fmt: skip
MODELS: dict[str, Any] = {name: {"backend": "up", "price": PRICE} for name in SCRIPTS}
MODELS["gone"] = {"backend": "gone", "price": PRICE}
GONE = {"type": "openai", "base_url": f"http://127.0.0.1:{free_port()}/v1", "api_key": "any"}
PLENTY = 1_000_000
UNIT = 60_000
RESET = struct.pack("ii", 1, 0)


def configured(upstream: ScriptedUpstream, database_url: str, **more: Any) -> dict[str, Any]:
    config = keyed(upstream, database_url, models=MODELS, **more)
    config["backends"]["gone"] = GONE
    return config


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start, database_url: str, workers: int) -> GatewayProcess:
    return await start(configured(upstream, database_url, workers=workers))


def costing(words: int, **more: Any) -> dict[str, Any]:
    """A call with so many words in (two bytes each) and out."""
    script = json.dumps({"script": "answer", "words": words})
    return chat("answer", script + " a" * words, **{"max_tokens": words, **more})


def check_quota(answer: Answer) -> None:
    error = answer.json["error"]
    assert (answer.status, error["code"], error["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


# --- never more than there is


@pytest.mark.parametrize("workers", [4])
async def test_a94_two_hundred_at_once_and_a_budget_for_one(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    most, used = 2100 * 2000 + 1000 * 8000, 1004 * 2000 + 1000 * 8000
    budget = most * 3 // 2
    assert used + most > budget > most, "no second one, even after the first"
    key = await Key.made(gateway, budget=f"{budget / 1e9:.9f}")
    answers = await key.ask_at_once(200, costing(1000))
    let_in = [answer for answer in answers if answer.status == 200]
    for answer in answers:
        if answer.status != 200:
            check_quota(answer)
    found = await settled_book(gateway, key.subject)
    print(f"budget for one: {len(let_in)} of 200 let in, {found.spent} of {budget} nano-dollars spent")
    assert len(let_in) == len(upstream.tally) == 1
    assert found.spent == (await charged(gateway))[1] == used <= budget
    assert found.holds == (0, 0, 0)
    check_quota(await key.ask(costing(1000)))


@pytest.mark.parametrize("period", ["day", "month", "total"])
async def test_a_budget_is_used_up_but_not_overspent(gateway: GatewayProcess, period: str) -> None:
    """By whole answers and streams alike, with many at once."""
    budget = 100_000_000
    key = await Key.made(gateway, budget=f"{budget / 1e9:.9f}", period=period)
    chance = random.Random(5)
    codes: list[int] = []

    async def client() -> None:
        while True:
            words = chance.randint(10, 300)
            answer = await key.ask(costing(words, stream=chance.random() < 0.5))
            codes.append(answer.status)
            if answer.status != 200 and words < 60:
                check_quota(answer)
                return

    await asyncio.gather(*(client() for _ in range(12)))
    found = await settled_book(gateway, key.subject)
    print(f"budget for a {period}: {found.spent} of {budget} nano-dollars spent by {codes.count(200)} calls")
    assert 0.9 * budget < found.spent == (await charged(gateway))[1] <= budget
    await key.update("--budget", "1")
    while (await key.ask(costing(300))).status == 429:
        await asyncio.sleep(0.1)
    assert (await book(gateway, key.subject)).spent == (await charged(gateway))[1]


async def test_the_budget_of_the_whole_gateway(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    budgets = {"gateway": {"usd": "0.05", "period": "month"}, "key": {"usd": "0.04", "period": "day"}}
    gateway = await start(configured(upstream, database_url, budgets=budgets))
    ann, ben = await Key.made(gateway, "ann"), await Key.made(gateway, "ben")
    for key in (ann, ben):
        while (answer := await key.ask(costing(300))).status == 200:
            pass
        check_quota(answer)
        assert ("the gateway" if key is ben else "this key") in answer.json["error"]["message"]
    spent = [(await book(gateway, subject)).spent for subject in (ann.subject, ben.subject, "gateway")]
    print(f"budgets of two keys and the gateway: {spent} of [40000000, 40000000, 50000000] nano-dollars spent")
    assert spent[0] <= 40_000_000
    assert spent[0] + spent[1] == spent[2] == (await charged(gateway))[1] <= 50_000_000


async def test_a_budget_that_comes_late_knows_what_was_spent_before(gateway: GatewayProcess) -> None:
    key = await Key.made(gateway)
    for _ in range(5):
        assert (await key.ask(costing(1000))).status == 200
    _, spent = await charged(gateway)
    await key.update("--budget", f"{spent / 1e9 + 0.001:.9f}", "--period", "month")
    while (answer := await key.ask(costing(1000))).status == 200:
        await asyncio.sleep(0.05)  # for no longer than a second
    check_quota(answer)
    assert spent <= (await book(gateway, key.subject)).spent <= (await charged(gateway))[1]


async def test_a_price_that_nobody_knows(upstream: ScriptedUpstream, start: Start, database_url: str) -> None:
    gateway = await start(configured(upstream, database_url, workers=2))
    key = await Key.made(gateway, budget="1")
    refused = await key.ask(chat("nobody-knows-its-price"))
    assert (refused.status, refused.json["error"]["code"]) == (403, "price_unknown")
    assert "models.NAME.price" in refused.json["error"]["message"]
    assert upstream.tally == []
    assert (await key.ask(costing(5))).status == 200
    free = await Key.made(gateway, "ben")
    assert (await free.ask(chat("nobody-knows-its-price"))).status == 200

    gateway.terminate()
    await asyncio.to_thread(gateway.wait)
    gateway.config["budgets"] = {"allow_unpriced": True}
    await asyncio.to_thread(gateway.start)
    before = (await book(gateway, key.subject)).spent
    assert (await key.ask(chat("nobody-knows-its-price"))).status == 200
    assert (await book(gateway, key.subject)).spent == before


# --- what is given back


async def limited(gateway: GatewayProcess) -> Key:
    """A key whose tokens do not come back by themselves."""
    return await Key.made(gateway, max_parallel=50, tpm=1, token_burst=PLENTY, budget="1000")


async def check_books(key: Key) -> tuple[int, int]:
    """Nothing is held, and what is gone is what the rows say. Returns the tokens and nano-dollars that are gone."""
    while (found := await book(key.gateway, key.subject)).holds != (0, 0, 0):
        await asyncio.sleep(0.05)
    tokens, cost = await charged(key.gateway)
    assert found.spent == cost
    assert 0 <= found.level - (PLENTY - tokens) * UNIT <= 5 * UNIT, (found, tokens)
    return tokens, cost


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_fails_first_costs_nothing(gateway: GatewayProcess, stream: bool) -> None:
    key = await limited(gateway)
    for model, status in (("error-400", 400), ("error-429", 429), ("error-500", 502), ("gone", 502)):
        answer = await key.ask(chat(model, stream=stream))
        assert answer.status == status, answer.body
        assert await check_books(key) == (0, 0), model
    assert (await key.ask(chat("answer", max_tokens="many", stream=stream))).status == 400
    assert await check_books(key) == (0, 0)
    assert (await key.ask(chat("fail-once", user="x", stream=stream))).status == 200
    tokens, cost = await check_books(key)
    assert tokens > 0
    assert cost > 0


async def test_a_call_that_is_cut_costs_what_it_used(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    key = await limited(gateway)
    answer = await key.ask(chat("cut-fin", stream=True))
    assert not answer.clean_end
    tokens, cost = await check_books(key)
    assert 0 < tokens < 50
    assert cost > 0

    [running] = await held(key, upstream, 1, chat("held-headers"))
    key.gateway.terminate()
    await asyncio.sleep(0.3)
    key.gateway.terminate()
    await running
    await asyncio.to_thread(key.gateway.wait)
    assert (await check_books(key))[0] > tokens


async def test_embeddings_cost_what_they_cost(gateway: GatewayProcess) -> None:
    key = await limited(gateway)
    body = {"model": "embedder", "input": ["one two", "three"]}
    answer = await call(gateway.port, "POST", "/v1/embeddings", key.headers, body)
    assert answer.status == 200
    assert await check_books(key) == (3, 6000)


@pytest.mark.parametrize("workers", [4])
async def test_after_all_that_can_happen_the_books_agree(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    """Answers, failures, cuts and clients that leave at any time, over all workers."""
    key = await limited(gateway)
    chance = random.Random(11)
    scripts = [name for name in (*SCRIPTS, "gone") if name not in ("held-headers", "embedder")]

    async def client(number: int) -> None:
        for turn in range(20):
            body = chat(chance.choice(scripts), user=f"u{number}-{turn}", stream=chance.random() < 0.6, max_tokens=99)
            if chance.random() < 0.4:
                await leave(gateway, key, body, chance.random() ** 3 * 0.3)
            else:
                await key.ask(body)

    await asyncio.gather(*(client(number) for number in range(20)))
    await upstream.settled()
    tokens, cost = await check_books(key)
    print(f"{len(upstream.tally)} calls at the upstream: {tokens} tokens and {cost} nano-dollars, in all books alike")
    assert tokens > 0


async def leave(gateway: GatewayProcess, key: Key, body: Any, after: float) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request_bytes("POST", "/v1/chat/completions", key.headers, body))
    await asyncio.sleep(after)
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
