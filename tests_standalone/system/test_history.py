"""Many clients, four workers, some of which are killed: what clients saw is what is kept."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import pytest

from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.system.conftest import PRICE, Start, end, in_front_of
from tests_standalone.system.history_checker import Conversation, Kept, Log, Message, check
from tests_standalone.system.history_clients import MODELS, Client, Club, MarkingUpstream
from tests_standalone.system.http import call

OPERATIONS = int(os.environ.get("HISTORY_OPERATIONS", "1200"))
"""`make history` does 10,000 of them."""
USERS = ("ann", "bob", "cyd", "dan", "eve", "fay")
WORKERS = 4
KILLS = 4
ADMIN = "sk-admin-of-this-test"
SHOWN = 300


@pytest.fixture
async def upstream() -> AsyncIterator[MarkingUpstream]:
    async with MarkingUpstream() as running:
        yield running


async def test_what_was_seen_is_kept(upstream: MarkingUpstream, start: Start, database_url: str) -> None:
    models = {name: {"backend": "up", "model": "answer", "price": PRICE} for name in MODELS}
    models["cancelled"]["on_disconnect"] = "cancel"
    auth = {"mode": "keys", "admin_key": ADMIN}
    gateway = await start(in_front_of(upstream, database_url, workers=WORKERS, models=models, auth=auth))
    keys = {user: await _key(gateway, user) for user in USERS}
    club = Club(gateway.port, OPERATIONS)
    everyone = [client for user in USERS for client in _clients(club, user, keys[user])]
    killer = asyncio.create_task(_kill(gateway, club))
    await asyncio.gather(*(client.run() for client in everyone))
    await killer
    await upstream.until(lambda tally: all(record.outcome for record in tally))
    shown = await _shown(gateway, keys, club.log)
    assert await end(gateway) == 0

    kept = await asyncio.to_thread(_kept, gateway, upstream, *shown)
    assert check(club.log, kept) == []
    _enough(club.log, kept)


def _clients(club: Club, user: str, key: str) -> list[Client]:
    """Two that send all they know each time, two on one conversation, one with its own, one that groups its calls."""
    kinds: list[dict[str, Any]] = [{}, {}, {"named": True}, {"group": True}]
    together = f"shared-{user}"
    kinds += [{"named": True, "shared": together}, {"named": True, "shared": together, "manages": False}]
    chances = (random.Random(f"{user} {number}") for number in range(len(kinds)))
    return [Client(club, user, key, chance, **kind) for chance, kind in zip(chances, kinds, strict=True)]


async def _kill(gateway: GatewayProcess, club: Club) -> None:
    """A worker each time another part of the work is done."""
    chance = random.Random(5)
    for part in range(1, KILLS + 1):
        while club.left > OPERATIONS * (1 - part / (KILLS + 1)):
            await asyncio.sleep(0.02)
        with suppress(ProcessLookupError, IndexError):
            os.kill(chance.choice(gateway.worker_pids()), signal.SIGKILL)


def _enough(log: Log, kept: Kept) -> None:
    """All kinds of things have happened, or nothing was proven."""
    whole = sum(said.complete for said in log.said)
    assert whole > OPERATIONS / 3
    assert any(said.status == 409 for said in log.said)
    assert any(not said.complete and said.answer for said in log.said)
    assert any(one.parent_pk for one in kept.conversations)
    assert any(one.deleted for one in kept.conversations)
    assert log.reads
    assert log.titles


# --- the end, as the API and the tables tell it


async def _key(gateway: GatewayProcess, user: str) -> str:
    admin = {"authorization": f"Bearer {ADMIN}"}
    key: str = (await call(gateway.port, "POST", "/admin/keys", admin, {"user": user})).json["key"]
    return key


async def _shown(
    gateway: GatewayProcess, keys: dict[str, str], log: Log
) -> tuple[dict[str, list[str]], dict[tuple[str, str], list[str]]]:
    listed = {user: await _pages(gateway, key, "/conversations?limit=100", "id") for user, key in keys.items()}
    places = [(user, one) for user, ids in listed.items() for one in ids]
    chosen = random.Random(1).sample(places, min(SHOWN, len(places)))
    shown = {}
    for user, one in chosen:
        shown[user, one] = await _pages(gateway, keys[user], f"/conversations/{one}/messages?limit=100", "content")
    return listed, shown


async def _pages(gateway: GatewayProcess, key: str, path: str, what: str) -> list[str]:
    found: list[str] = []
    after = ""
    while True:
        answer = await call(gateway.port, "GET", path + after, {"authorization": f"Bearer {key}"})
        assert answer.status == 200, answer.body
        page = answer.json
        found += [row[what] or "" for row in page["data"]]
        if not page["has_more"]:
            return found
        after = f"&after={page['last_id']}"


def _kept(
    gateway: GatewayProcess,
    upstream: MarkingUpstream,
    listed: dict[str, list[str]],
    shown: dict[tuple[str, str], list[str]],
) -> Kept:
    own: dict[str, list[Message]] = {}
    for row in gateway.query("SELECT * FROM messages ORDER BY conversation_pk, seq"):
        own.setdefault(row["conversation_pk"], []).append(_message(row))
    conversations = [_conversation(row, own.get(row["pk"], [])) for row in gateway.query("SELECT * FROM conversations")]
    used = gateway.query(
        "SELECT user_id, conversation_id, SUM(input_tokens + output_tokens) AS tokens FROM usage_rows "
        "WHERE conversation_id IS NOT NULL GROUP BY user_id, conversation_id"
    )
    tokens = {(row["user_id"], row["conversation_id"]): int(row["tokens"]) for row in used}
    return Kept(conversations, tokens, shown, listed, upstream.prompts())


def _message(row: dict[str, Any]) -> Message:
    is_answer = row["role"] == "assistant" and row["model"] is not None
    text = json.loads(row["content"]) or ""
    return Message(seq=row["seq"], role=row["role"], text=text, is_answer=is_answer, tokens=row["tokens"])


def _conversation(row: dict[str, Any], messages: Sequence[Message]) -> Conversation:
    return Conversation(
        pk=row["pk"],
        id=row["id"],
        user=row["user_id"],
        parent_pk=row["parent_pk"],
        parent_seq=row["parent_seq"],
        message_count=row["message_count"],
        title=row["title"],
        deleted=row["deleted_at"] is not None,
        tokens=row["total_tokens_input"] + row["total_tokens_output"],
        messages=messages,
    )
