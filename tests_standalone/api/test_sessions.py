"""`/sessions` and `/users`: what they take and tell, and into which session a conversation goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway import current_sessions
from tests_standalone.api.conftest import App, Launch
from tests_standalone.api.test_conversations import ask, chat, error, told
from tests_standalone.support.databases import sqlite_url

SHOWN = {
    "id", "object", "user_id", "created_at", "last_activity", "ended_at", "total_tokens", "total_cost",
    "conversation_count", "is_active",
}  # fmt: skip


@pytest.fixture
async def app(launch: Launch) -> App:
    return await launch(backends={"echo": {"type": "scripted"}})


async def session_of(app: App, conversation: str) -> Any:
    return (await told(app, "GET", f"/conversations/{conversation}"))["session_id"]


@pytest.mark.parametrize("path", ["/sessions", "/sessions/"])
async def test_a_session_is_opened_with_one_conversation(app: App, path: str) -> None:
    opened = await told(app, "POST", path)
    assert opened.keys() == SHOWN | {"conversation_id", "messages"}
    assert (opened["conversation_count"], opened["is_active"], opened["messages"]) == (1, True, [])
    conversation = await told(app, "GET", f"/conversations/{opened['conversation_id']}")
    assert conversation["session_id"] == opened["id"]
    shown = await told(app, "GET", f"/sessions/{opened['id']}")
    assert shown == {name: opened[name] for name in SHOWN} | {"messages": [], "messages_left_out": False}


async def test_it_is_current_at_once_and_carries_totals(app: App) -> None:
    await chat(app, "before", conversation_id="old")
    opened = await told(app, "POST", "/sessions", {"title": "Hello", "metadata": {"a": "b"}})
    answer = await chat(app, "one two three", conversation_id="new")
    assert await session_of(app, "new") == opened["id"] != await session_of(app, "old")
    made = await told(app, "POST", "/conversations")
    assert made["session_id"] == opened["id"]
    shown = await told(app, "GET", f"/sessions/{opened['id']}")
    assert (shown["conversation_count"], shown["total_tokens"]) == (3, answer["usage"]["completion_tokens"])
    assert [message["content"] for message in shown["messages"]] == ["one two three", "one two three"]
    assert (await told(app, "GET", f"/conversations/{opened['conversation_id']}"))["title"] == "Hello"


async def test_after_its_end_what_is_new_goes_into_another(app: App) -> None:
    await chat(app, "one", conversation_id="one")
    first = await session_of(app, "one")
    for _ in range(2):
        ended = await told(app, "POST", f"/sessions/{first}/end")
        assert (ended["is_active"], ended["ended_at"] is not None) == (False, True)
    await chat(app, "two", conversation_id="two")
    second = await session_of(app, "two")
    assert second != first
    await chat(app, "more", conversation_id="one")
    assert await session_of(app, "one") == first, "it stays where it was made"
    assert error(await ask(app, "POST", "/conversations", {"session_id": first})) == (404, "not_found", "session_id")
    listed = await told(app, "GET", "/users/me/sessions")
    assert [(one["id"], one["is_active"]) for one in listed["data"]] == [(second, True), (first, False)]
    assert listed["data"][0].keys() == SHOWN


async def test_another_worker_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation of a worker that remembers a session goes elsewhere once another worker has ended that."""
    monkeypatch.setattr(current_sessions, "NEWS_SECONDS", 0.0)
    config = {"backends": {"echo": {"type": "scripted"}}, "database": {"url": sqlite_url(tmp_path)}}
    async with App(tmp_path, config) as one, App(tmp_path, config) as two:
        await chat(one, "one", conversation_id="a")
        await chat(one, "one", conversation_id="b")
        first = await session_of(one, "a")
        assert await session_of(two, "b") == first
        await told(two, "POST", f"/sessions/{first}/end")
        await chat(one, "one", conversation_id="c")
        second = await session_of(two, "c")
        assert second != first
        opened = await told(two, "POST", "/sessions")
        await chat(one, "one", conversation_id="d")
        assert await session_of(one, "d") == opened["id"] != second


async def test_only_the_newest_messages_are_shown(app: App) -> None:
    await chat(app, "first", conversation_id="chat")
    session = await session_of(app, "chat")
    many = [{"role": "user", "content": str(number)} for number in range(1000)]
    await chat(app, *many, conversation_id="other")
    shown = await told(app, "GET", f"/sessions/{session}")
    assert (len(shown["messages"]), shown["messages_left_out"]) == (1000, True)
    assert [message["content"] for message in shown["messages"][-2:]] == ["999", "999"]


async def test_sessions_in_pages_and_statistics(app: App) -> None:
    made = [(await told(app, "POST", "/sessions"))["id"] for _ in range(3)]
    page = await told(app, "GET", "/users/me/sessions?limit=2")
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (made[:0:-1], True)
    page = await told(app, "GET", f"/users/admin/sessions?limit=2&after={page['last_id']}")
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (made[:1], False)
    assert error(await ask(app, "GET", "/users/me/sessions?after=none")) == (400, "invalid_value", "after")
    answer = await chat(app, "hello you")
    assert await told(app, "GET", "/users/me/stats") == {
        "user_id": "admin", "conversation_count": 4, "session_count": 3, "message_count": 2,
        "total_tokens_input": answer["usage"]["prompt_tokens"],
        "total_tokens_output": answer["usage"]["completion_tokens"], "total_cost": 0.0,
    }  # fmt: skip


async def test_one_that_is_ended_meanwhile_is_in_nobodys_way(app: App) -> None:
    for _ in range(20):
        current = (await told(app, "POST", "/conversations"))["session_id"]
        ended = told(app, "POST", f"/sessions/{current}/end")
        await asyncio.gather(ended, *(told(app, "POST", "/conversations") for _ in range(6)))


async def test_what_is_not_there(app: App) -> None:
    for method, path in (("GET", "/sessions/none"), ("POST", "/sessions/none/end")):
        assert error(await ask(app, method, path)) == (404, "not_found", "id")
    assert (await told(app, "GET", "/users/nobody/stats"))["session_count"] == 0, "an admin may ask for any"
    assert error(await ask(app, "POST", "/sessions", {"tags": []})) == (400, "unknown_parameter", "tags")
    assert error(await ask(app, "POST", "/sessions", {"title": 5})) == (400, "invalid_value", "title")
    opened = await told(app, "POST", "/sessions")
    assert error(await ask(app, "POST", f"/sessions/{opened['id']}/end", {"a": 1})) == (400, "unknown_parameter", "a")
