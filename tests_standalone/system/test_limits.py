"""Rates and slots, as clients meet them: exact over four workers, over two gateways, and told truly in headers."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest

from tests_standalone.support.databases import running_postgres
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.postgres import launch
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import Start
from tests_standalone.system.http import Answer, call, chat
from tests_standalone.system.limited import Key, book, hammer, held, keyed, most_at_once

SECONDS = 5.0
KINDS = ("requests", "tokens")


@pytest.fixture
async def gateway(upstream: ScriptedUpstream, start: Start, database_url: str, workers: int) -> GatewayProcess:
    return await start(keyed(upstream, database_url, workers=workers))


def spoken(words: int, **more: object) -> dict[str, object]:
    """A call that is answered in so many words, each of which is a token."""
    return chat("any", json.dumps({"script": "answer", "words": words}) + " tell me", **more)


def tokens_of(upstream: ScriptedUpstream) -> int:
    return sum(record.usage.prompt + record.usage.completion for record in upstream.tally if record.usage)


def seconds_of(told: str) -> float:
    """OpenAI's `6m0s`, `1.5s`, `20ms`."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"([\d.]+)(ms|h|m|s)", told)
    assert "".join(number + unit for number, unit in parts) == told != ""
    return sum(float(number) * units[unit] for number, unit in parts)


def limits_told(answer: Answer) -> dict[str, str]:
    prefix = "x-ratelimit-"
    return {name.removeprefix(prefix): value for name, value in answer.headers.items() if name.startswith(prefix)}


# --- exact over all workers


async def requests_are_exact(gateways: list[GatewayProcess], upstream: ScriptedUpstream) -> None:
    rate, burst = 1200, 30
    key = await Key.made(gateways[0], rpm=rate, burst=burst)
    run = await hammer(gateways, key, chat("answer"), SECONDS)
    count = len(run.admitted)
    most, least = burst + rate * run.seconds / 60, burst + rate * run.pressed / 60
    print(f"requests: {count} let in of {len(run.answers)}; bound {most:.1f}, {count / least:.1%} of what there was")
    assert 0.95 * least <= count <= most
    assert count == len(upstream.tally)
    assert {(answer.status, answer.json["error"]["code"]) for answer in run.refused} == {(429, "rate_limit_exceeded")}


async def tokens_are_exact(gateways: list[GatewayProcess], upstream: ScriptedUpstream) -> None:
    rate, burst = 60_000, 3_000
    key = await Key.made(gateways[0], tpm=rate, token_burst=burst)
    body = spoken(20, max_tokens=50)
    run = await hammer(gateways, key, body, SECONDS)
    used = tokens_of(upstream)
    most, least = burst + rate * run.seconds / 60, burst + rate * run.pressed / 60
    print(
        f"tokens: {used} used by {len(run.admitted)} calls of {len(run.answers)}; bound {most:.0f}, "
        f"{used / least:.1%} of what there was"
    )
    assert run.refused
    assert 0.95 * least <= used <= most
    assert {answer.json["error"]["type"] for answer in run.refused} == {"tokens"}


@pytest.mark.parametrize("workers", [4])
async def test_requests_over_four_workers(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    await requests_are_exact([gateway], upstream)


@pytest.mark.parametrize("workers", [4])
async def test_tokens_over_four_workers(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    await tokens_are_exact([gateway], upstream)


@pytest.mark.parametrize("workers", [4])
async def test_a_large_bucket_of_which_workers_hold_parts_ahead(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    """Many calls without asking, then near the end each one asks, and not one too many is let in."""
    burst = 500
    key = await Key.made(gateway, rpm=1, burst=burst)
    run = await hammer([gateway], key, chat("answer"), SECONDS)
    print(f"a large bucket: {len(run.admitted)} let in of {len(run.answers)}; bound {burst}")
    assert run.refused
    assert 0.95 * burst <= len(run.admitted) <= burst + run.seconds / 60
    assert len(run.admitted) == len(upstream.tally)


async def test_requests_and_tokens_over_two_gateways(upstream: ScriptedUpstream, start: Start) -> None:
    url = running_postgres().create_database()
    gateways = [await start(keyed(upstream, url, workers=2)) for _ in range(2)]
    await requests_are_exact(gateways, upstream)
    upstream.reset()
    await tokens_are_exact(gateways, upstream)


@pytest.mark.parametrize("workers", [4])
async def test_never_more_at_once_than_slots(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    slots = 5
    key = await Key.made(gateway, max_parallel=slots)
    watching = asyncio.create_task(most_at_once(upstream))
    slow = chat("any", json.dumps({"script": "answer", "head_delay": 0.05}) + " hello")
    run = await hammer([gateway], key, slow, SECONDS)
    watching.cancel()
    most = await watching
    print(f"slots: {most} of {slots} at once, {len(run.admitted)} calls let in of {len(run.answers)}")
    assert most == slots
    assert len(run.admitted) == len(upstream.tally)

    calls = await held(key, upstream, slots, chat("held-headers"))
    refused = await key.ask_at_once(20, chat("answer"))
    assert {(answer.status, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
    upstream.release()
    assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * slots
    assert (await key.ask(chat("answer"))).status == 200
    assert (await key.ask(chat("answer", stream=True))).status == 200


# --- what clients are told


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_tell_the_truth(gateway: GatewayProcess, upstream: ScriptedUpstream, stream: bool) -> None:
    """The rates are too low for a refill during the test."""
    key = await Key.made(gateway, rpm=1, burst=6, tpm=1, token_burst=1000)
    body = spoken(5, max_tokens=40, stream=stream)
    asked = spent = 0
    for count in range(1, 7):
        answer = await key.ask(body)
        assert answer.status == 200
        told = limits_told(answer)
        assert set(told) == {f"{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in KINDS}
        assert (told["limit-requests"], told["limit-tokens"]) == ("6", "1000")
        assert told["remaining-requests"] == str(6 - count)
        asked = asked or 1000 - int(told["remaining-tokens"])  # at most; what the calls before it used is settled
        assert 40 < asked < 200
        assert 0 <= int(told["remaining-tokens"]) - (1000 - spent - asked) <= 1
        assert 60 * count - 30 < seconds_of(told["reset-requests"]) <= 60 * count
        assert seconds_of(told["reset-tokens"]) > 60 * (1000 - int(told["remaining-tokens"]) - 1)
        spent = tokens_of(upstream)

    refused = await key.ask(body)
    told = limits_told(refused)
    assert (refused.status, refused.json["error"]["type"]) == (429, "requests")
    assert (told["remaining-requests"], told["limit-requests"]) == ("0", "6")
    assert 0 <= int(told["remaining-tokens"]) - (1000 - spent) <= 1, "a refused call takes nothing"
    wait = int(refused.headers["retry-after-ms"]) / 1000
    assert 30 < wait <= 60
    assert wait <= int(refused.headers["retry-after"]) < wait + 1.001
    assert "x-should-retry" not in refused.headers


async def test_who_waits_as_told_is_let_in(gateway: GatewayProcess) -> None:
    for limits in ({"rpm": 60, "burst": 1}, {"tpm": 6000, "token_burst": 150}):
        key = await Key.made(gateway, **limits)
        body = spoken(20, max_tokens=80)
        for _ in range(3):
            while (answer := await key.ask(body)).status == 200:
                pass
            await asyncio.sleep(int(answer.headers["retry-after-ms"]) / 1000)
            assert (await key.ask(body)).status == 200


async def test_other_operations_have_the_same_limits(gateway: GatewayProcess) -> None:
    key = await Key.made(gateway, rpm=1, burst=2, tpm=1, token_burst=100)
    body = {"model": "answer", "input": "five words are five tokens"}
    first = await call(gateway.port, "POST", "/v1/embeddings", key.headers, body)
    assert (first.status, limits_told(first)["remaining-requests"]) == (200, "1")
    assert (await call(gateway.port, "POST", "/v1/embeddings", key.headers, body)).status == 200
    refused = await key.ask(chat("answer"))
    assert (refused.status, limits_told(refused)["remaining-tokens"]) == (429, "90")


# --- whose they are


async def test_a_key_for_end_users_gives_each_its_own_bucket(gateway: GatewayProcess) -> None:
    key = await Key.made(gateway, rpm=1, burst=2, per_end_user=True)
    said = [await key.ask(chat("answer", user=user)) for user in ("u1", "u1", "u2", "u1", "u2", "u2")]
    assert [answer.status for answer in said] == [200, 200, 200, 429, 200, 429]
    assert [limits_told(answer)["remaining-requests"] for answer in said] == ["1", "0", "1", "0", "0", "0"]
    assert (await key.ask(chat("answer"), **{"x-openwebui-user-id": "u2"})).status == 429
    assert (await key.ask(chat("answer", safety_identifier="u1", user="u3"))).status == 429
    assert (await key.ask(chat("answer", user="u3"))).status == 200

    plain = await Key.made(gateway, rpm=1, burst=2)
    said = [await plain.ask(chat("answer", user=user)) for user in ("u1", "u2", "u3")]
    assert [answer.status for answer in said] == [200, 200, 429], "for others it is a label"


async def test_a95_parallel_first_calls_of_an_unknown_end_user(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    key = await Key.made(gateway, rpm=1, burst=3, per_end_user=True)
    said = await key.ask_at_once(60, chat("answer", user="nobody-knows-me"))
    print(f"first calls of an end user: {[answer.status for answer in said].count(200)} of 60 let in, bound 3")
    assert [answer.status for answer in said].count(200) == len(upstream.tally) == 3


# --- changes reach everybody


async def let_in(key: Key, body: object, status: int = 200) -> float:
    """Seconds until ten calls in a row had that status, less what these took."""
    started = begun = time.monotonic()
    in_a_row = 0
    while in_a_row < 10:
        begun = begun if in_a_row else time.monotonic()
        in_a_row = in_a_row + 1 if (await key.ask(body)).status == status else 0
    return begun - started


async def test_revocation_and_lower_limits_reach_all_workers(gateway: GatewayProcess) -> None:
    key = await Key.made(gateway, max_parallel=100)
    assert {answer.status for answer in await key.ask_at_once(40, chat("answer"))} == {200}
    await key.update("--rpm", "1", "--burst", "1")
    assert await let_in(key, chat("answer"), 429) <= 1.5
    await key.update("--rpm", "none", "--burst", "none")
    assert await let_in(key, chat("answer")) <= 1.5

    await key.revoke()
    refused = await key.ask_at_once(40, chat("answer"))
    assert {answer.status for answer in refused} == {401}, "the statement that lets calls in says so itself"


async def test_a_slot_that_was_taken_under_other_limits_comes_back(
    gateway: GatewayProcess, upstream: ScriptedUpstream
) -> None:
    key = await Key.made(gateway, max_parallel=2)
    calls = await held(key, upstream, 2, chat("held-headers"))
    await key.update("--max-parallel", "none")
    await let_in(key, chat("answer"))
    await key.update("--max-parallel", "2")
    await let_in(key, chat("answer"), 429)
    upstream.release()
    await asyncio.gather(*calls)
    calls = await held(key, upstream, 2, chat("held-headers"))
    assert (await key.ask(chat("answer"))).status == 429
    upstream.release()
    await asyncio.gather(*calls)


# --- the database goes away


async def test_without_its_database_nobody_is_let_in_and_nothing_leaks(
    upstream: ScriptedUpstream, start: Start
) -> None:
    server = launch()
    try:
        gateway = await start(keyed(upstream, server.create_database()))
        key = await Key.made(gateway, rpm=6000, burst=100, tpm=600_000, max_parallel=4)
        calls = await held(key, upstream, 4, chat("held-headers"))
        server.stop("immediate")
        refused = await key.ask_at_once(20, chat("answer"))
        assert {(answer.status, answer.json["error"]["code"]) for answer in refused} == {(503, "unavailable")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert len(upstream.tally) == 4
        upstream.release()
        await asyncio.sleep(1)
        server.start()
        assert [answer.status for answer in await asyncio.gather(*calls)] == [200] * 4
        while (await call(gateway.port, "GET", "/health/ready")).status != 200:
            await asyncio.sleep(0.1)
        await let_in(key, chat("answer"))
        while (await book(gateway, key.subject)).holds != (0, 0, 0):
            assert (await key.ask(chat("answer"))).status in (200, 429)
            await asyncio.sleep(0.2)
        calls = await held(key, upstream, 4, chat("held-headers"))
        assert (await key.ask(chat("answer"))).status == 429
        upstream.release()
        await asyncio.gather(*calls)
    finally:
        server.close()
