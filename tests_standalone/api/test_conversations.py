"""`/conversations`: what it takes and tells."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from tests_standalone.api.conftest import ADMIN, Answer, App, Launch

SHOWN = {
    "id", "object", "number", "user_id", "session_id", "parent_id", "parent_seq", "title", "summary", "tags",
    "metadata", "image_urls", "pinned", "archived", "message_count", "total_tokens_input", "total_tokens_output",
    "total_cost", "created_at", "last_used",
}  # fmt: skip
MESSAGE = {"id", "object", "seq", "role", "content", "tokens", "cost", "model", "finish_reason", "created_at"}
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture
async def app(launch: Launch) -> App:
    return await launch(backends={"echo": {"type": "scripted"}})


async def ask(app: App, method: str, path: str, body: Any = b"") -> Answer:
    path, _, query = path.partition("?")
    return await app.call(method, path, body, ADMIN, query_string=query.encode())


async def told(app: App, method: str, path: str, body: Any = b"") -> Any:
    answer = await ask(app, method, path, body)
    assert answer.status == 200, answer.body
    return answer.json


async def chat(app: App, *messages: Any, **fields: Any) -> Any:
    said = [{"role": "user", "content": text} if isinstance(text, str) else text for text in messages]
    return await told(app, "POST", "/v1/chat/completions", {"model": "echo", "messages": said, **fields})


def error(answer: Answer) -> tuple[int, str | None, str | None]:
    found = answer.json["error"]
    assert answer.json["detail"] == found["message"]
    assert found["message"].isprintable()
    return answer.status, found["code"], found["param"]


async def test_one_is_made_without_a_body_and_shown(app: App) -> None:
    made = await told(app, "POST", "/conversations")
    assert made.keys() == SHOWN
    assert made | {"id": "", "session_id": "", "created_at": "", "last_used": ""} == {
        "id": "", "object": "conversation", "number": 1, "user_id": "admin", "session_id": "", "parent_id": None,
        "parent_seq": None, "title": None, "summary": None, "tags": [], "metadata": {}, "image_urls": [],
        "pinned": False, "archived": False, "message_count": 0, "total_tokens_input": 0, "total_tokens_output": 0,
        "total_cost": 0.0, "created_at": "", "last_used": "",
    }  # fmt: skip
    assert made["created_at"] == made["last_used"]
    assert made["created_at"].endswith("Z")
    assert await told(app, "GET", f"/conversations/{made['id']}") == made
    assert (await told(app, "GET", "/conversations/"))["data"] == [made]


async def test_all_that_can_be_said_of_a_new_one(app: App) -> None:
    said = {"id": "my-chat_1", "title": "Ünïcode 🙂", "tags": ["a", "b", "a"], "metadata": {"k": "v\x00"}}
    made = await told(app, "POST", "/conversations", said)
    assert {name: made[name] for name in said} == said | {"tags": ["a", "b"]}
    answer = await ask(app, "POST", "/conversations", {"id": "my-chat_1"})
    assert error(answer) == (409, "already_exists", "id")


async def test_a_turn_is_seen_with_its_messages_and_its_cost(app: App) -> None:
    made = await told(app, "POST", "/conversations", {"title": "Mine"})
    parts = [{"type": "text", "text": "look"}]
    answer = await chat(app, {"role": "user", "content": parts}, conversation_id=made["id"])
    found = await told(app, "GET", f"/conversations/{made['id']}")
    assert (found["title"], found["message_count"]) == ("Mine", 2)
    assert found["total_tokens_input"] == answer["usage"]["prompt_tokens"]
    assert found["total_tokens_output"] == answer["usage"]["completion_tokens"]
    listed = await told(app, "GET", f"/conversations/{made['id']}/messages")
    asked, answered = listed["data"]
    assert asked.keys() == MESSAGE
    assert answered.keys() == MESSAGE | {"refusal"}
    assert (asked["seq"], asked["role"], asked["content"]) == (1, "user", parts)
    assert (asked["tokens"], asked["cost"]) == (0, None)
    assert (answered["seq"], answered["role"], answered["content"]) == (2, "assistant", "look")
    assert (answered["object"], answered["finish_reason"], answered["cost"]) == ("conversation.message", "stop", 0.0)
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (asked["id"], answered["id"], False)


async def test_what_was_sent_beside_the_content_stands_beside_it_and_ours_wins(app: App) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL], "id": "theirs", "seq": 99}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    await chat(app, "hi", called, result, conversation_id="chat")
    data = (await told(app, "GET", "/conversations/chat/messages"))["data"]
    assert [message["seq"] for message in data] == [1, 2, 3, 4]
    assert data[1]["tool_calls"] == [TOOL_CALL]
    assert data[1]["id"].startswith("msg_")
    assert (data[1]["content"], data[2]["tool_call_id"]) == (None, "call_1")


async def test_messages_in_pages(app: App) -> None:
    for number in range(4):
        await chat(app, f"question {number}", conversation_id="chat")
    for order in ("asc", "desc"):
        found: list[int] = []
        after = ""
        while True:
            page = await told(app, "GET", f"/conversations/chat/messages?limit=3&order={order}{after}")
            found += [message["seq"] for message in page["data"]]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert found == sorted(range(1, 9), reverse=order == "desc")


async def test_conversations_in_pages(app: App) -> None:
    made = [(await told(app, "POST", "/conversations"))["id"] for _ in range(5)]
    first = await told(app, "GET", "/conversations?limit=2")
    assert [one["id"] for one in first["data"]] == made[:2:-1]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", made[4], made[3], True)
    rest = await told(app, "GET", f"/conversations?limit=3&after={made[3]}")
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    none = await told(app, "GET", f"/conversations?after={made[0]}")
    assert none == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize("method", ["PATCH", "POST"])
async def test_a_change_is_of_the_fields_that_are_sent(app: App, method: str) -> None:
    made = await told(app, "POST", "/conversations", {"id": "chat", "title": "T", "metadata": {"a": "b"}})
    full = {"title": "Other", "summary": "S", "tags": ["x"], "metadata": {}, "pinned": True, "archived": True}
    assert await told(app, method, "/conversations/chat", full) == made | full
    assert await told(app, method, "/conversations/chat", {"tags": None, "pinned": False}) == made | full | {
        "tags": [],
        "pinned": False,
    }
    assert (await told(app, "GET", "/conversations"))["data"] == []
    assert len((await told(app, "GET", "/conversations?archived=true&tag=x"))["data"]) == 0
    assert len((await told(app, "GET", "/conversations?archived=all"))["data"]) == 1
    nothing = dict.fromkeys(("title", "summary", "tags", "metadata"))
    assert await told(app, method, "/conversations/chat", {**nothing, "archived": False}) == made | {
        "title": None,
        "metadata": {},
    }


async def test_deleted_and_brought_back(app: App) -> None:
    await chat(app, "hello", conversation_id="chat")
    before = await told(app, "GET", "/conversations/chat")
    deleted = await told(app, "DELETE", "/conversations/chat")
    assert deleted == {"id": "chat", "object": "conversation.deleted", "deleted": True}
    for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/messages")):
        assert error(await ask(app, method, f"/conversations/chat{path}", b"")) == (404, "not_found", "id")
    assert (await told(app, "GET", "/conversations?archived=all"))["data"] == []
    assert (await told(app, "GET", "/users/me/stats"))["total_tokens_input"] == before["total_tokens_input"]
    for _ in range(2):
        assert await told(app, "POST", "/conversations/chat/undelete") == before
    assert len((await told(app, "GET", "/conversations/chat/messages"))["data"]) == 2
    assert error(await ask(app, "POST", "/conversations/none/undelete")) == (404, "not_found", "id")
    await told(app, "DELETE", "/conversations/chat")
    await told(app, "POST", "/conversations", {"id": "chat"})
    assert error(await ask(app, "POST", "/conversations/chat/undelete")) == (409, "conflict", "id")


async def test_a_deleted_one_is_begun_anew_under_its_name_and_not_under_its_number(app: App) -> None:
    made = await told(app, "POST", "/conversations")
    await told(app, "DELETE", f"/conversations/{made['id']}")
    said = {"model": "echo", "messages": [{"role": "user", "content": "x"}], "conversation_id": made["id"]}
    assert (await ask(app, "POST", "/v1/chat/completions", said)).status == 404


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        ({"titel": "x"}, "unknown_parameter", "titel"), ({"title": 1}, "invalid_value", "title"),
        ({"title": " "}, "invalid_value", "title"), ({"title": "x" * 501}, "invalid_value", "title"),
        ({"title": "a\x00"}, "invalid_value", "title"), ({"tags": "a"}, "invalid_value", "tags"),
        ({"tags": [""]}, "invalid_value", "tags"), ({"tags": [1]}, "invalid_value", "tags"),
        ({"tags": ["a\n"]}, "invalid_value", "tags"), ({"tags": ["a"] * 33}, "invalid_value", "tags"),
        ({"metadata": {"a": 1}}, "invalid_value", "metadata"), ({"metadata": []}, "invalid_value", "metadata"),
        ({"metadata": {"a": "x" * 513}}, "invalid_value", "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "invalid_value", "metadata"),
        ({"number": 5}, "read_only_parameter", "number"), ({"user_id": "bob"}, "read_only_parameter", "user_id"),
        ({"total_cost": 0}, "read_only_parameter", "total_cost"),
    ],
)  # fmt: skip
async def test_every_mistake_names_its_field(app: App, said: dict[str, Any], code: str, param: str) -> None:
    await told(app, "POST", "/conversations", {"id": "chat"})
    for method, path in (("POST", ""), ("PATCH", "/chat")):
        assert error(await ask(app, method, f"/conversations{path}", said)) == (400, code, param)
    assert len((await told(app, "GET", "/conversations"))["data"]) == 1


@pytest.mark.parametrize(
    ("said", "param"),
    [({"id": name}, "id") for name in ("", "a b", "ä", "x" * 129, 5, "conv_" + "0" * 32)]
    + [({"session_id": name}, "session_id") for name in ("", 5, "a\x00")],
)
async def test_ids_that_cannot_be(app: App, said: dict[str, Any], param: str) -> None:
    assert error(await ask(app, "POST", "/conversations", said)) == (400, "invalid_value", param)


@pytest.mark.parametrize("said", [{"pinned": 1}, {"archived": "yes"}, {"pinned": None}, {"summary": 5}])
async def test_flags_are_true_or_false(app: App, said: dict[str, Any]) -> None:
    await told(app, "POST", "/conversations", {"id": "chat"})
    assert error(await ask(app, "PATCH", "/conversations/chat", said)) == (400, "invalid_value", next(iter(said)))
    for name in ("id", "session_id"):
        answer = await ask(app, "PATCH", "/conversations/chat", {name: "other"})
        assert error(answer) == (400, "read_only_parameter", name)


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=0", "invalid_value", "limit"), ("limit=101", "invalid_value", "limit"),
        ("limit=x", "invalid_value", "limit"), ("limit=1&limit=2", "invalid_value", "limit"),
        ("order=up", "invalid_value", "order"), ("after=", "invalid_value", "after"),
        ("after=none", "invalid_value", "after"), ("archived=1", "invalid_value", "archived"),
        ("pinned=all", "invalid_value", "pinned"), ("tag=", "invalid_value", "tag"),
        ("user=bob", "unknown_parameter", "user"), ("sort=user_id", "unknown_parameter", "sort"),
    ],
)  # fmt: skip
async def test_every_mistake_in_a_query_names_its_parameter(app: App, query: str, code: str, param: str) -> None:
    assert error(await ask(app, "GET", f"/conversations?{query}")) == (400, code, param)


async def test_bodies_are_json_and_say_so(app: App) -> None:
    for body, kind, status in (
        (b"{}", "text/plain", 415),
        (b"[]", "application/json", 400),
        (b"{", "application/json", 400),
    ):
        answer = await app.call("POST", "/conversations", body, {**ADMIN, "content-type": kind})
        assert answer.status == status
    assert (await app.call("POST", "/conversations", b"", {**ADMIN, "content-type": ""})).status == 200


async def test_refusals_and_unknown_callers_are_told_in_the_same_manner(app: App) -> None:
    answer = await app.call("GET", "/conversations", headers={"authorization": "Bearer sk-wrong"})
    assert error(answer)[0] == 401


@pytest.mark.parametrize("tag", ["می\u200cخواهم", "👩\u200d💻", "a & b"])
async def test_a_tag_in_any_language(app: App, tag: str) -> None:
    made = await told(app, "POST", "/conversations", {"tags": [tag]})
    found = await told(app, "GET", f"/conversations?tag={quote(tag)}")
    assert [one["id"] for one in found["data"]] == [made["id"]]


@pytest.mark.parametrize(
    ("path", "methods"), [("/conversations", "GET, HEAD, POST"), ("/conversations/x", "DELETE, GET, HEAD, PATCH, POST")]
)
async def test_a_wrong_method_is_told_all_that_there_are(app: App, path: str, methods: str) -> None:
    answer = await ask(app, "PUT", path)
    assert (answer.status, answer.headers["allow"]) == (405, methods)
