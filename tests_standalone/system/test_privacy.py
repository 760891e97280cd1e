"""`conversations.store_content: false`: what is said is written nowhere, and what it costs is. And deleting a user."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests_standalone.conftest import eventually
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream
from tests_standalone.system.conftest import PRICE, Start, in_front_of
from tests_standalone.system.http import call, chat, post_chat, request_bytes

CANARY = "KANARIENVOGEL"
SCRIPTS = ("answer", "tools", "reasoning", "refusal", "status-500", "status-400", "cut-fin", "error-event")
TABLES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
    "postgres": "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'",
}
TOOL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": f'{{"for": "{CANARY}"}}'}}


def talk(script: str, **more: Any) -> dict[str, Any]:
    """The canary in everything that a client can say. The upstream repeats what it was asked."""
    messages = [
        {"role": "system", "content": f"system {CANARY}"},
        {"role": "user", "content": f"first {CANARY}", "name": CANARY},
        {"role": "assistant", "content": None, "tool_calls": [TOOL]},
        {"role": "tool", "tool_call_id": "call_1", "content": f"result {CANARY}"},
        {"role": "assistant", "content": f"so {CANARY}", "reasoning_content": CANARY},
        {"role": "user", "content": [{"type": "text", "text": f"and now {CANARY}"}]},
    ]
    return {"model": script, "messages": messages, "metadata": {"about": CANARY}, **more}


async def say_it_in_all_ways(gateway: GatewayProcess, upstream: ScriptedUpstream) -> None:
    """Whole and streamed, with an id and without, answered, refused, failed, broken off."""
    for script in SCRIPTS:
        for stream in (False, True):
            await post_chat(gateway.port, talk(script, stream=stream))
    for _ in range(2):
        await post_chat(gateway.port, talk("answer", conversation_id="named"))
        await post_chat(gateway.port, talk("answer"), {"x-conversation-id": "grouped"})
    for stream in (False, True):  # a client that leaves
        body = talk("answer", stream=stream)
        body["messages"][-1]["content"] = f'{{"script": "answer", "then": "hold", "after": 3, "words": 40}} {CANARY}'
        calls = len(upstream.tally)
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes("POST", "/v1/chat/completions", None, body))

        async def asked(before: int = calls) -> bool:
            return len(upstream.tally) > before

        await eventually(asked)
        writer.close()
        await asyncio.sleep(0.3)  # until the gateway has seen it
        upstream.release()


def places(gateway: GatewayProcess) -> list[str]:
    """Where the canary lies: tables, files of the database, the log."""
    engine = "sqlite" if gateway.database_url.startswith("sqlite") else "postgres"
    found = []
    for table in (row["name"] for row in gateway.query(TABLES[engine])):
        if any(CANARY in repr(tuple(row.values())) for row in gateway.query(f"SELECT * FROM {table}")):
            found.append(table)
    if engine == "sqlite":
        file = Path(gateway.database_url.removeprefix("sqlite:///"))
        files = [file, *file.parent.glob(f"{file.name}-*")]
        assert len(files) > 1
        found += [each.name for each in files if CANARY.encode() in each.read_bytes()]
    return [*found, *(["the log"] if CANARY in gateway.logs() else [])]


async def gateway_with(
    start: Start, upstream: ScriptedUpstream, database_url: str, *, store_content: bool
) -> GatewayProcess:
    models = {name: {"backend": "up", "model": name, "price": PRICE} for name in SCRIPTS}
    return await start(
        in_front_of(
            upstream,
            database_url,
            models=models,
            conversations={"store_content": store_content},
            server={"log_level": "debug"},
        )
    )


async def recorded(gateway: GatewayProcess) -> None:
    """Waits for the calls whose clients left; one of them may have ended before that was seen."""
    calls = 2 * len(SCRIPTS) + 6
    while gateway.query("SELECT COUNT(DISTINCT request_id) AS count FROM usage_rows")[0]["count"] < calls:
        await asyncio.sleep(0.05)


async def test_what_is_said_is_written_nowhere_and_what_it_costs_is(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    gateway = await gateway_with(start, upstream, database_url, store_content=False)
    await say_it_in_all_ways(gateway, upstream)
    await recorded(gateway)
    assert places(gateway) == []
    answered = gateway.query("SELECT COUNT(*) AS calls, SUM(cost_nanousd) AS cost FROM usage_rows WHERE status = 'ok'")
    assert answered[0]["calls"] >= 10
    assert answered[0]["cost"] > 0
    kept = gateway.query("SELECT DISTINCT content, extra, chain FROM messages")
    assert kept == [{"content": "null", "extra": None, "chain": None}]
    totals = gateway.query("SELECT message_count, total_tokens_input, title FROM conversations WHERE id = 'named'")
    assert totals[0]["message_count"] > 2
    assert totals[0]["total_tokens_input"] > 0
    assert totals[0]["title"] is None


async def test_the_same_calls_leave_traces_where_content_is_stored(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    """That the test above can fail."""
    gateway = await gateway_with(start, upstream, database_url, store_content=True)
    await say_it_in_all_ways(gateway, upstream)
    await recorded(gateway)
    assert {"messages", "conversations"} <= set(places(gateway))
    assert "the log" not in places(gateway)


async def test_a_conversation_without_content_goes_on_without_a_history(
    upstream: ScriptedUpstream, start: Start, database_url: str
) -> None:
    gateway = await gateway_with(start, upstream, database_url, store_content=False)
    for text in ("one", "two"):
        answer = await post_chat(gateway.port, chat("answer", text, conversation_id="named"))
        assert answer.status == 200
    sent = json.loads(upstream.tally[-1].body)["messages"]
    assert sent == [{"role": "user", "content": "two"}]
    refused = await post_chat(gateway.port, chat("answer", "x", store=True))
    assert (refused.status, refused.json["error"]["param"]) == (400, "store")


@pytest.mark.parametrize("command", [False, True], ids=["over HTTP", "by the command line"])
async def test_a_deleted_user_leaves_figures_only_though_calls_are_running(
    upstream: ScriptedUpstream, start: Start, database_url: str, command: bool
) -> None:
    gateway = await start(
        in_front_of(
            upstream,
            database_url,
            workers=2,
            auth={"admin_key": "sk-admin-of-the-tests"},
            models={"answer": {"backend": "up", "model": "answer", "price": PRICE}},
        )
    )
    admin = {"authorization": "Bearer sk-admin-of-the-tests"}
    _, key = gateway.create_key(user="ann@example.com", name=CANARY)
    _, other = gateway.create_key(user="bob")
    ann, bob = {"authorization": f"Bearer {key}"}, {"authorization": f"Bearer {other}"}
    for who in (ann, bob):
        for _ in range(3):
            await post_chat(gateway.port, chat("answer", f"I am {CANARY}", store=True, metadata={"a": CANARY}), who)
    held = f'{{"script": "answer", "then": "hold", "after": 3, "words": 40}} {CANARY}'
    calls = len(upstream.tally)
    running = [
        asyncio.create_task(post_chat(gateway.port, chat("answer", held, **more), ann))
        for more in ({"stream": True}, {"stream": True, "conversation_id": "busy"})
    ]

    async def asked() -> bool:
        return len(upstream.tally) == calls + 2

    await eventually(asked)
    if command:
        said = gateway.run("users", "delete", "ann@example.com", "--yes").stdout
        anonymous = re.findall(r"deleted-[0-9a-f]{12}", said)[0]
    else:
        answer = await call(gateway.port, "DELETE", "/admin/users/ann@example.com", admin)
        assert (answer.status, answer.json["finished"]) == (200, True)
        anonymous = answer.json["anonymous_id"]

    async def locked_out() -> bool:
        return (await post_chat(gateway.port, chat("answer"), ann)).status == 401

    await eventually(locked_out)
    upstream.release()
    await asyncio.gather(*running)
    again = await call(gateway.port, "DELETE", "/admin/users/ann@example.com", admin)  # as each minute by itself
    assert again.json["anonymous_id"] == anonymous

    engine = "sqlite" if database_url.startswith("sqlite") else "postgres"
    for table in (row["name"] for row in gateway.query(TABLES[engine])):
        lines = [repr(tuple(row.values())) for row in gateway.query(f"SELECT * FROM {table}")]
        if table != "user_deletions":
            assert "ann@example.com" not in "".join(lines), table
    assert gateway.query("SELECT COUNT(*) AS n FROM usage_rows WHERE user_id = 'bob'")[0]["n"] == 3
    mine = gateway.query(f"SELECT * FROM usage_rows WHERE user_id = '{anonymous}'")
    assert len(mine) == 5
    assert all(row["cost_nanousd"] > 0 for row in mine)
    assert {row[name] for row in mine for name in ("key_id", "end_user", "session_id", "conversation_id")} == {None}
    left = gateway.query("SELECT COUNT(*) AS n FROM messages")[0]["n"]
    assert left == gateway.query("SELECT SUM(message_count) AS n FROM conversations WHERE user_id = 'bob'")[0]["n"]
