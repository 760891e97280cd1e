"""Requests in, requests with their history out; turns in, conversations out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth import Caller
from gateway.conversations import TITLE_LENGTH, Conversations, Talk, link, new_id
from gateway.errors import BadRequest, NotFound
from gateway.store import conversations as rows_of
from gateway.store.database import Database
from gateway.store.text import clean
from gateway.wire.chat import ChatRequest, Message
from tests_standalone.conftest import NOON, rows

ANN, BOB = Caller("ann", "key_1"), Caller("bob")


def request(*messages: Message | str, **fields: Any) -> ChatRequest:
    """A request with these messages; a string is a user's. Written as Python's json does it: all but ASCII escaped."""
    said = [{"role": "user", "content": item} if isinstance(item, str) else item for item in messages]
    return ChatRequest.parse(json.dumps({"model": "m", "messages": said, **fields}).encode())


def assistant(content: object, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


async def save(database: Database, talk: Talk, answer: Message | None, at: int = NOON, **figures: Any) -> None:
    values: dict[str, Any] = {
        "model": "m",
        "finish_reason": "stop",
        "input_tokens": 3,
        "output_tokens": 2,
        "cost_nanousd": 7,
    }
    await database.write(rows_of.save([talk.turn(answer, at, **values | figures)]))


async def one_turn(
    conversations: Conversations,
    database: Database,
    asked: ChatRequest,
    answer: Message | None,
    caller: Caller = ANN,
) -> tuple[Talk, ChatRequest]:
    """Opens, prepares and saves: the talk, and what the upstream was sent."""
    talk = await conversations.open(caller, asked, None)
    assert talk is not None
    sent = conversations.prepare(asked, talk)
    await save(database, talk, answer)
    return talk, sent


# Which conversation


async def test_a_call_that_names_none_is_a_new_one(sqlite: Database) -> None:
    conversations = Conversations(sqlite)
    first, second = [await conversations.open(ANN, request("hi"), None) for _ in range(2)]
    assert first is not None
    assert second is not None
    assert first.id != second.id
    assert first.is_new
    assert len(first.id) == len("conv_") + 32
    assert int(first.id.removeprefix("conv_"), 16)


@pytest.mark.parametrize("name", ["a", "my-chat_7", "x" * 128, "conv_short", "conv_" + "A" * 32, "conv_" + "0" * 33])
async def test_an_unknown_name_is_made_under_that_name(migrated: Database, name: str) -> None:
    conversations = Conversations(migrated)
    talk, _ = await one_turn(conversations, migrated, request("hi", conversation_id=name), assistant("hello"))
    assert (talk.id, talk.is_new) == (name, True)
    again = await conversations.open(ANN, request("more", conversation_id=name), None)
    assert again is not None
    assert (again.pk, again.is_new, len(again.history)) == (talk.pk, False, 2)


async def test_an_unknown_id_of_our_own_form_is_not_found(sqlite: Database) -> None:
    with pytest.raises(NotFound) as caught:
        await Conversations(sqlite).open(ANN, request("hi", conversation_id=new_id()), None)
    assert (caught.value.status, caught.value.param) == (404, "conversation_id")


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a/b", "../a", "x" * 129, "é", "a\n", "a\x00", "'; --", "%", "a.b", "🙂", "conv:1", "\ud800"],
)
async def test_a_name_of_another_form_is_refused(sqlite: Database, name: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await Conversations(sqlite).open(ANN, request("hi", conversation_id=name), None)
    assert (caught.value.status, caught.value.param) == (400, "conversation_id")


async def test_a_conversation_of_another_user_does_not_exist(migrated: Database) -> None:
    """A19. An id of ours is 404; a name is a conversation of the caller's own."""
    conversations = Conversations(migrated)
    own, _ = await one_turn(conversations, migrated, request("secret"), assistant("canary"))
    await one_turn(conversations, migrated, request("secret", conversation_id="named"), assistant("canary"))

    with pytest.raises(NotFound):
        await conversations.open(BOB, request("hi", conversation_id=own.id), None)
    talk, sent = await one_turn(conversations, migrated, request("hi", conversation_id="named"), None, caller=BOB)
    assert talk.is_new
    assert "canary" not in sent.raw.decode()
    assert await rows(migrated, "SELECT user_id FROM conversations WHERE id = 'named' ORDER BY user_id") == [
        ("ann",),
        ("bob",),
    ]


@pytest.mark.parametrize(
    ("threading", "name", "kept"),
    [("auto", None, True), ("auto", "x", True), ("explicit", None, False), ("explicit", "x", True),
     ("off", None, False), ("off", "x", False), ("off", "not a name", False)],
)  # fmt: skip
async def test_threading_says_what_is_kept(sqlite: Database, threading: Any, name: str | None, kept: bool) -> None:
    conversations = Conversations(sqlite, threading=threading)
    asked = request("hi") if name is None else request("hi", conversation_id=name)
    talk = await conversations.open(ANN, asked, None)
    assert (talk is not None) is kept
    assert conversations.prepare(asked, talk).raw == request("hi").raw


# What the upstream is sent


async def test_the_history_comes_first_and_our_field_is_taken_out(migrated: Database) -> None:
    conversations = Conversations(migrated)
    await one_turn(conversations, migrated, request("one", conversation_id="x"), assistant("1"))
    await one_turn(conversations, migrated, request("two", conversation_id="x"), assistant("2"))
    asked = request("three", conversation_id="x", temperature=1.0, unknown={"a": [1e2]})
    _, sent = await one_turn(conversations, migrated, asked, assistant("3"))

    assert [message["content"] for message in sent.messages] == ["one", "1", "two", "2", "three"]
    assert json.loads(sent.raw) == sent.data
    assert sent.data.keys() == {"model", "messages", "temperature", "unknown"}
    assert b'"temperature": 1.0, "unknown": {"a": [100.0]}' in sent.raw


async def test_a_first_call_leaves_as_it_came(sqlite: Database) -> None:
    conversations = Conversations(sqlite)
    raw = b'{"messages" :[ {"content":"\\u0041", "role":"user","x":1.00} ],\t"model":"m"}'
    asked = ChatRequest.parse(raw)
    talk = await conversations.open(ANN, asked, None)
    assert conversations.prepare(asked, talk).raw == raw


TOOL_CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\u0000 \\ud800 🙂"}'}},
    {"id": "call_2", "type": "custom", "custom": {"name": "g", "input": "{{7*7}} ${HOME} '; DROP TABLE x; --"}},
]
MESSAGES: dict[str, Message] = {
    "text": {"role": "user", "content": "plain"},
    "emoji": {"role": "user", "content": "🙂 \U0010ffff e\u0301 \u202e ünïcode"},
    "NUL": {"role": "user", "content": "a\x00b \\u0000 c\x01"},
    "half a pair": {"role": "user", "content": "\ud83d and \ude42"},
    "half a pair in a field": {"role": "user", "content": "x", "name": "\ud83d\x00"},
    "quotes": {"role": "user", "content": "\"'\\\b\f\n\r\t/ </script> {{7*7}} %s $1"},
    "empty": {"role": "user", "content": ""},
    "long": {"role": "user", "content": "x🙂" * 100_000},
    "null": {"role": "assistant", "content": None},
    "unknown fields": {"role": "user", "content": "x", "name": "kid", "z": {"b": [1, 2.5, None, True]}, "a": "ü"},
    "tool calls": {"role": "assistant", "content": None, "tool_calls": TOOL_CALLS},
    "tool calls and text": {"role": "assistant", "content": "let me see", "tool_calls": TOOL_CALLS, "refusal": None},
    "tool": {"role": "tool", "content": '{"result": 1e400}', "tool_call_id": "call_1"},
    "reasoning": {"role": "assistant", "content": "x", "reasoning_content": "because\x00", "audio": {"id": "a"}},
    "parts": {
        "role": "user",
        "content": [
            {"type": "text", "text": "look \x00\ud800🙂", "cache_control": {"type": "ephemeral"}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}},
            {"type": "future_part", "anything": [[[]]]},
        ],
    },
    "no parts": {"role": "user", "content": []},
    "developer": {"role": "developer", "content": "be brief"},
    "another role": {"role": "ipython", "content": "x"},
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
async def test_what_was_said_is_sent_again_as_it_was_said(migrated: Database, message: Message) -> None:
    """Asked once and answered once with the same message; both are there at the next turn, nothing lost or added."""
    conversations = Conversations(migrated)
    answer = message if message["role"] == "assistant" else assistant("fine", x=[message["content"]])
    await one_turn(conversations, migrated, request(message, conversation_id="x"), answer)
    _, sent = await one_turn(conversations, migrated, request("next", conversation_id="x"), None)
    assert sent.messages == [message, answer, {"role": "user", "content": "next"}]
    assert json.loads(sent.raw) == sent.data
    sent.raw.decode("utf-8")


async def test_the_bytes_of_the_new_messages_are_left_alone(migrated: Database) -> None:
    conversations = Conversations(migrated)
    await one_turn(conversations, migrated, request("one", conversation_id="x"), assistant("1"))
    raw = b'{"conversation_id":"x", "messages":[ {"role":"user","content":"\\u0041 \\/","n":1.00} ] , "model":"m"}'
    _, sent = await one_turn(conversations, migrated, ChatRequest.parse(raw), None)
    assert sent.raw == (
        b'{"messages":[{"role":"user","content":"one"},{"role":"assistant","content":"1"},'
        b' {"role":"user","content":"\\u0041 \\/","n":1.00} ] , "model":"m"}'
    )


async def test_a_message_without_content_stays_one(migrated: Database) -> None:
    conversations = Conversations(migrated)
    call: Message = {"role": "assistant", "tool_calls": TOOL_CALLS}
    await one_turn(conversations, migrated, request(call, conversation_id="x"), None)
    _, sent = await one_turn(conversations, migrated, request("next", conversation_id="x"), None)
    assert sent.messages[0].get("content") is None
    assert sent.messages[0]["tool_calls"] == TOOL_CALLS


# System prompts


SYSTEM = {"role": "system", "content": "Be kind."}


async def test_the_system_prompt_goes_first_and_is_kept_with_the_conversation(migrated: Database) -> None:
    conversations = Conversations(migrated, system_prompt="Be kind.")
    _, first = await one_turn(conversations, migrated, request("hi", conversation_id="x"), assistant("hello"))
    assert first.messages == [SYSTEM, {"role": "user", "content": "hi"}]
    _, second = await one_turn(conversations, migrated, request("more", conversation_id="x"), None)
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("threading", ["auto", "off"])
async def test_a_request_with_a_system_message_gets_no_other(sqlite: Database, role: str, threading: Any) -> None:
    conversations = Conversations(sqlite, threading=threading, system_prompt="Be kind.")
    asked = request({"role": role, "content": "Be brief."}, "hi")
    assert conversations.prepare(asked, await conversations.open(ANN, asked, None)).raw == asked.raw


@pytest.mark.parametrize("threading", ["explicit", "off"])
async def test_a_call_that_is_not_kept_gets_the_system_prompt_too(sqlite: Database, threading: Any) -> None:
    conversations = Conversations(sqlite, threading=threading, system_prompt="Be kind.")
    asked = request("hi")
    sent = conversations.prepare(asked, await conversations.open(ANN, asked, None))
    assert sent.messages == [SYSTEM, {"role": "user", "content": "hi"}]


async def test_no_system_prompt_is_none(sqlite: Database) -> None:
    conversations = Conversations(sqlite, system_prompt="")
    asked = request("hi")
    assert conversations.prepare(asked, await conversations.open(ANN, asked, None)).raw == asked.raw


# What is kept


async def test_a_turn_is_the_new_messages_and_the_answer(migrated: Database) -> None:
    conversations = Conversations(migrated)
    asked = request({"role": "system", "content": "s"}, "hi", conversation_id="x")
    talk = await conversations.open(ANN, asked, "kid")
    assert talk is not None
    await save(migrated, talk, assistant("hello"))
    later = await conversations.open(ANN, request("more", conversation_id="x"), "kid")
    assert later is not None
    await save(migrated, later, None, NOON + 5)

    assert await rows(
        migrated, "SELECT seq, role, content, tokens, cost_nanousd, model, finish_reason FROM messages ORDER BY seq"
    ) == [
        (1, "system", '"s"', 0, None, None, None),
        (2, "user", '"hi"', 0, None, None, None),
        (3, "assistant", '"hello"', 2, 7, "m", "stop"),
        (4, "user", '"more"', 0, None, None, None),
    ]
    assert await rows(
        migrated,
        "SELECT id, user_id, key_id, end_user, created_at, last_used, message_count, title, total_tokens_input, "
        "total_tokens_output, total_cost_nanousd FROM conversations",
    ) == [("x", "ann", "key_1", "kid", NOON, NOON + 5, 4, "hi", 6, 4, 14)]


@pytest.mark.parametrize("label", ["a\x00b", "\ud800", "x" * 1000, "🙂"])
async def test_an_end_user_of_any_text_costs_no_turn(migrated: Database, label: str) -> None:
    """A85. A label that no engine stores is stored as far as it can be."""
    conversations = Conversations(migrated)
    talk = await conversations.open(ANN, request("hi"), label)
    assert talk is not None
    await save(migrated, talk, assistant("hello"))
    ((stored,),) = await rows(migrated, "SELECT end_user FROM conversations")
    assert len(stored) == min(len(label), 256)


@pytest.mark.parametrize("text", ["a\x00b", "\ud800"])
async def test_a_role_or_a_reason_of_any_text_costs_no_turn(migrated: Database, text: str) -> None:
    conversations = Conversations(migrated)
    talk = await conversations.open(ANN, request({"role": text, "content": "x"}), None)
    assert talk is not None
    await save(migrated, talk, assistant("hello"), model=text, finish_reason=text)
    assert await rows(migrated, "SELECT COUNT(*) FROM messages") == [(2,)]


BROKEN: dict[str, Message] = {
    "no role": {"content": "hello"},
    "null role": {"role": None, "content": "hello"},
    "another type of role": {"role": 5, "content": "hello"},
    "nothing": {},
    "parts that are none": {"role": "assistant", "content": [1, "text", None, {"type": "text"}, {"text": 5}]},
    "content of another type": {"role": "assistant", "content": {"text": "hello"}},
    "a number": {"role": "assistant", "content": 5},
    "tool calls that are none": {"role": "assistant", "content": "hello", "tool_calls": 5},
    "a tool call that is none": {"role": "assistant", "content": "hello", "tool_calls": [None, 5, {"function": 1}]},
    "deep": {"role": "assistant", "content": "x", "y": json.loads("[" * 150 + "]" * 150)},
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
async def test_whatever_an_upstream_answers_costs_no_turn(migrated: Database, answer: Message) -> None:
    """It was paid for. What is stored is the assistant's."""
    conversations = Conversations(migrated)
    await one_turn(conversations, migrated, request("hi", conversation_id="x"), answer)
    assert await rows(migrated, "SELECT role FROM messages ORDER BY seq") == [("user",), ("assistant",)]
    _, sent = await one_turn(conversations, migrated, request("next", conversation_id="x"), None)
    assert sent.messages[1].get("content") == answer.get("content")


@pytest.mark.parametrize(
    ("messages", "title"),
    [
        (["hello"], "hello"),
        ([{"role": "system", "content": "s"}, assistant("a"), "first", "second"], "first"),
        (["  two\n\n  words\t"], "two words"),
        (["two  words"], "two words"),
        (["x" * 200], "x" * TITLE_LENGTH),
        ([" " * 10_000 + "late"], None),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "look"}]}],
            "look",
        ),
        (["a\x00b\ud800"], "a\ufffdb\ufffd"),
        (["🙂" * 100], "🙂" * TITLE_LENGTH),
        ([""], None),
        ([{"role": "system", "content": "only"}], None),
        ([{"role": "user", "content": None}], None),
    ],
)
async def test_the_title_is_the_start_of_what_the_user_said_first(
    migrated: Database, messages: list[Any], title: str | None
) -> None:
    await one_turn(Conversations(migrated), migrated, request(*messages), assistant("a"))
    assert await rows(migrated, "SELECT title FROM conversations") == [(title,)]


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n\u00a0\u2003\x00\ud800é"), max_size=2 * TITLE_LENGTH) | st.text())
def test_the_title_of_any_text(text: str) -> None:
    talk = Talk("conv_1", "c_1", ANN, None, True, [user(text)])
    turn = talk.turn(None, NOON, model="m", finish_reason=None, input_tokens=0, output_tokens=0, cost_nanousd=0)
    assert turn.title == (clean(" ".join(text[: 8 * TITLE_LENGTH].split()), TITLE_LENGTH) or None)


# The chain: a resent history is recognised by it


def chain(*messages: Message) -> str:
    found = ""
    for message in messages:
        found = link(found, message)
    return found


def user(content: object, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


PICTURE = {"type": "image_url", "image_url": {"url": "data:,x"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@settings(deadline=None)
@given(st.text() | st.text(st.sampled_from(" \ta\ud800é\\")), st.sampled_from(["user", "assistant", "tool", "é"]))
def test_a_text_and_its_only_part_are_the_same(text: str, role: str) -> None:
    message: Message = {"role": role, "content": text, "name": "x"}
    assert chain(message) == chain(message | {"content": [{"type": "text", "text": text}]})
    assert chain(message) == chain(message | {"tool_call_id": None, "tool_calls": []})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([user("hi")], [user([{"type": "text", "text": "hi"}])]),
        ([user("hi")], [user("  hi\n")]),
        ([user("hi")], [{"role": "system", "content": "s"}, user("hi")]),
        ([user("hi")], [{"role": "developer", "content": "s"}, user("hi")]),
        ([user("hi"), {"role": "system", "content": "s"}], [user("hi")]),
        ([assistant("x")], [assistant("x", reasoning_content="because", reasoning="so")]),
        ([assistant("x")], [assistant("x", refusal=None, annotations=[], audio=None)]),
        ([assistant("x")], [assistant("x", tool_calls=[])]),
        ([assistant(None)], [assistant("")]),
        ([assistant("x", tool_calls=[CALL])], [assistant("x", tool_calls=[CALL | {"id": "c2", "index": 0}])]),
        ([user("a\nb")], [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]),
    ],
    ids=[
        "parts", "outer space", "a system message", "a developer message", "a system message after it", "reasoning",
        "fields that are empty", "no tool calls", "no text", "ids of calls", "several parts",
    ],
)  # fmt: skip
def test_the_chain_is_the_same(one: list[Message], other: list[Message]) -> None:
    assert chain(*one) == chain(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([user("hi")], [user("ho")]),
        ([user("hi")], [assistant("hi")]),
        ([user("hi")], [user("Hi")]),
        ([user("a b")], [user("a  b")]),
        ([user("hi"), user("ho")], [user("ho"), user("hi")]),
        ([user("hi"), user("ho")], [user("hiho")]),
        ([user("hi")], [user("hi"), user("hi")]),
        ([user("hi")], [user([{"type": "text", "text": "hi"}, PICTURE])]),
        ([user([PICTURE])], [user([PICTURE | {"image_url": {"url": "data:,y"}}])]),
        ([assistant("x")], [assistant("x", tool_calls=[CALL])]),
        (
            [assistant("x", tool_calls=[CALL])],
            [assistant("x", tool_calls=[CALL | {"function": {"name": "f", "arguments": "{1}"}}])],
        ),
        (
            [{"role": "tool", "content": "1", "tool_call_id": "a"}],
            [{"role": "tool", "content": "1", "tool_call_id": "b"}],
        ),
        ([user("a\x00b")], [user("ab")]),
        ([user("\ud800")], [user("\ud801")]),
    ],
    ids=[
        "text", "role", "case", "inner space", "order", "joined", "repeated", "a picture", "another picture",
        "a tool call", "another call", "another result", "NUL", "half a pair",
    ],
)  # fmt: skip
def test_the_chain_is_another(one: list[Message], other: list[Message]) -> None:
    assert chain(*one) != chain(*other)


async def test_the_stored_chain_goes_on_from_turn_to_turn(migrated: Database) -> None:
    conversations = Conversations(migrated)
    system = {"role": "system", "content": "s"}
    await one_turn(conversations, migrated, request(system, "hi", conversation_id="x"), assistant("hello"))
    await one_turn(conversations, migrated, request("more", conversation_id="x"), assistant("yes"))
    stored = [row[0] for row in await rows(migrated, "SELECT chain FROM messages ORDER BY seq")]
    said = [user("hi"), assistant("hello"), user("more"), assistant("yes")]
    assert stored == [None, *(chain(*said[:count]) for count in (1, 2, 3, 4))]
