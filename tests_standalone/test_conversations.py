"""Requests in, requests with their history out; turns in, conversations out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth import Caller
from gateway.catalog import Model
from gateway.conversations import Conversations, given_id
from gateway.errors import BadRequest, ConversationBusy, NotFound
from gateway.store import conversations as rows_of
from gateway.store.database import AlreadyThere, Database
from gateway.store.text import clean
from gateway.store.turn_leases import release_step
from gateway.talks import TITLE_LENGTH, Talk, new_id
from gateway.threads import chain_of, seed
from gateway.tokens import TokenCounter
from gateway.wire.chat import ChatRequest, Message
from tests_standalone.conftest import NOON, Unsteady, rows

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
    turn = talk.turn(answer, at, **values | figures)
    await database.write([*rows_of.save([turn]), release_step([talk.lease] if talk.lease else [])])
    talk.recorded = True
    talk.close()


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
    again.close()
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


# What becomes of a turn in the table


def user(content: object, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


async def test_the_stored_chain_goes_on_from_turn_to_turn(migrated: Database) -> None:
    conversations = Conversations(migrated)
    system = {"role": "system", "content": "s"}
    await one_turn(conversations, migrated, request(system, "hi", conversation_id="x"), assistant("hello"))
    await one_turn(conversations, migrated, request("more", conversation_id="x"), assistant("yes"))
    stored = [row[0] for row in await rows(migrated, "SELECT chain FROM messages ORDER BY seq")]
    said = [user("hi"), assistant("hello"), user("more"), assistant("yes")]
    start = seed("ann", "key_1", None)
    assert stored == [None, *(chain_of(start, said[:count]) for count in (1, 2, 3, 4))]


# Rule 3: nothing is given


async def say(
    conversations: Conversations,
    database: Database,
    *messages: Message | str,
    answer: Message | None = None,
    caller: Caller = ANN,
    end_user: str | None = None,
    group: str | None = None,
    figures: dict[str, Any] | None = None,
    **fields: Any,
) -> Talk:
    """One call from its beginning to its end."""
    asked = request(*messages, **fields)
    talk = await conversations.open(caller, asked, end_user, group)
    assert talk is not None
    conversations.prepare(asked, talk)
    await save(database, talk, answer or assistant("yes"), **(figures or {}))
    return talk


async def told(database: Database, talk: Talk) -> list[str]:
    """The conversation's own messages, with their places."""
    sql = "SELECT m.seq, m.content FROM messages m WHERE conversation_pk = $1 ORDER BY seq"
    return [f"{seq} {json.loads(content)}" for seq, content in await rows(database, sql, talk.pk)]


YES = assistant("yes")


async def test_a_loop_is_one_conversation(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, {"role": "system", "content": "s"}, "one")
    second = await say(conversations, migrated, "one", YES, "two")
    third = await say(conversations, migrated, "one", YES, "two", YES, "three")
    assert first.id == second.id == third.id
    assert await told(migrated, first) == ["1 s", "2 one", "3 yes", "4 two", "5 yes", "6 three", "7 yes"]
    assert await rows(migrated, "SELECT message_count, title FROM conversations") == [(7, "one")]


async def test_tool_calls_and_results_are_part_of_the_loop(migrated: Database) -> None:
    conversations = Conversations(migrated)
    call = assistant(None, tool_calls=TOOL_CALLS)
    first = await say(conversations, migrated, "what is it?", answer=call)
    result = {"role": "tool", "content": "4", "tool_call_id": "call_1"}
    again = {"role": "assistant", "tool_calls": [TOOL_CALLS[0] | {"id": "x"}, TOOL_CALLS[1]]}
    second = await say(conversations, migrated, "what is it?", again, result)
    assert second.id == first.id
    assert await rows(migrated, "SELECT role FROM messages ORDER BY seq") == [
        ("user",), ("assistant",), ("tool",), ("assistant",)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "whose"),
    [
        ({"caller": BOB}, "another user"),
        ({"caller": Caller("ann", "key_2")}, "another key"),
        ({"end_user": "kid"}, "another end user"),
    ],
)
async def test_a_history_is_looked_up_among_the_callers_own(
    migrated: Database, other: dict[str, Any], whose: str
) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one")
    second = await say(conversations, migrated, "one", YES, "two", **other)
    assert second.id != first.id, whose
    assert second.parent is None
    assert await told(migrated, second) == ["1 one", "2 yes", "3 two", "4 yes"]


async def test_what_goes_on_in_two_ways_has_a_branch(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one")
    await say(conversations, migrated, "one", YES, "two")
    branch = await say(conversations, migrated, "one", YES, "other")
    assert branch.id != first.id
    assert await told(migrated, first) == ["1 one", "2 yes", "3 two", "4 yes"]
    assert await told(migrated, branch) == ["3 other", "4 yes"]
    assert await rows(
        migrated,
        "SELECT parent_id, parent_pk, parent_seq, message_count, total_tokens_input, title FROM conversations "
        "WHERE parent_id IS NOT NULL",
    ) == [(first.id, first.pk, 2, 4, 3, "one")]

    deeper = await say(conversations, migrated, "one", YES, "other", YES, "more")
    assert deeper.id == branch.id
    twig = await say(conversations, migrated, "one", YES, "other", YES, "less")
    talk = await conversations.open(ANN, request("and now?", conversation_id=twig.id), None)
    assert talk is not None
    texts = [json.loads(message.content) for message in talk.history]
    assert texts == ["one", "yes", "other", "yes", "less", "yes"]
    talk.close()


async def test_calls_at_once_never_share_an_end(migrated: Database) -> None:
    """Whoever comes second knows at once that it is a branch."""
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one")
    asked = request("one", YES, "two")
    talks = await asyncio.gather(*(conversations.open(ANN, asked, None) for _ in range(8)))
    found = [talk for talk in talks if talk is not None]
    assert len({talk.id for talk in found}) == 8
    assert [talk.id for talk in found if not talk.is_new] == [first.id]
    for talk in found:
        await save(migrated, talk, YES)
    assert [len(await told(migrated, talk)) for talk in found if talk.is_new] == [2] * 7
    again = [await say(conversations, migrated, "one", YES, "two", YES, "three") for _ in range(8)]
    assert {talk.pk for talk in again} == {talk.pk for talk in found}


async def test_an_end_is_free_again_when_a_call_leaves_no_turn(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one")
    for _ in range(2):
        talk = await conversations.open(ANN, request("one", YES, "two"), None)
        assert talk is not None
        assert talk.id == first.id
        talk.close()


async def test_what_two_workers_do_at_once_is_refused_the_second_by_the_database(migrated: Database) -> None:
    one, two = Conversations(migrated), Conversations(migrated)
    await say(one, migrated, "one")
    talks = [await worker.open(ANN, request("one", YES, "two"), None) for worker in (one, two)]
    assert talks[0] is not None
    assert talks[1] is not None
    assert talks[0].id == talks[1].id
    await save(migrated, talks[0], YES)
    with pytest.raises(AlreadyThere):
        await save(migrated, talks[1], YES)
    assert await told(migrated, talks[0]) == ["1 one", "2 yes", "3 two", "4 yes"]


async def test_a_deleted_conversation_is_not_gone_on_with(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one")
    await migrated.write([("UPDATE conversations SET deleted_at = 1", [()])])
    second = await say(conversations, migrated, "one", YES, "two")
    assert (second.id != first.id, second.parent) == (True, None)


async def test_an_answer_that_broke_off_goes_on_as_its_client_has_it(migrated: Database) -> None:
    conversations = Conversations(migrated)
    broken = {"finish_reason": "client_disconnected"}
    first = await say(conversations, migrated, "one", answer=assistant("Hello wor"), figures=broken)
    second = await say(conversations, migrated, "one", assistant("Hello"), "two")
    third = await say(conversations, migrated, "one", assistant("Hello"), "two", YES, "three")
    assert first.id == second.id == third.id
    assert await told(migrated, first) == ["1 one", "2 Hello wor", "3 two", "4 yes", "5 three", "6 yes"]
    other = await say(conversations, migrated, "one", assistant("Bye"), "two")
    assert other.parent is None


async def test_the_first_call_of_a_conversation_asks_the_database_nothing(sqlite: Database) -> None:
    unsteady = Unsteady(sqlite)
    conversations = Conversations(unsteady)
    for messages in (["hi"], [{"role": "system", "content": "s"}, "hi"], ["hi", "there"]):
        talk = await conversations.open(ANN, request(*messages), None)
        assert talk is not None
        turn = talk.turn(YES, NOON, model="m", finish_reason="stop", input_tokens=1, output_tokens=1, cost_nanousd=1)
        statements = [sql for sql, values in rows_of.save([turn]) if values]
        assert statements == [rows_of.CREATE_ALONE, rows_of.INSERT_AT]
    assert (unsteady.fetched, unsteady.written) == ([], [])
    await conversations.open(ANN, request("hi", YES, "more"), None)
    assert len(unsteady.fetched) == 1


@pytest.mark.parametrize("group", [None, "chat"])
@pytest.mark.parametrize("threading", ["auto", "explicit", "off"])
async def test_what_a_frontend_asks_for_itself_is_no_turn(sqlite: Database, threading: Any, group: str | None) -> None:
    conversations = Conversations(sqlite, threading=threading)
    asked = request("### Task:\nGenerate a title")
    assert await conversations.open(ANN, asked, None, group) is None
    assert conversations.prepare(asked, None).raw == asked.raw


async def test_the_system_prompt_is_sent_every_time_and_kept_once(migrated: Database) -> None:
    conversations = Conversations(migrated, system_prompt="Be kind.")
    first = await say(conversations, migrated, "one")
    asked = request("one", YES, "two")
    talk = await conversations.open(ANN, asked, None)
    assert talk is not None
    assert [message["role"] for message in conversations.prepare(asked, talk).messages] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    await save(migrated, talk, YES)
    assert await told(migrated, first) == ["1 Be kind.", "2 one", "3 yes", "4 two", "5 yes"]


# Rule 2: a header


async def test_a_header_groups_and_prepends_nothing(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, {"role": "system", "content": "s"}, "one", group="chat")
    asked = request({"role": "system", "content": "s"}, "one", YES, "two")
    talk = await conversations.open(ANN, asked, None, "chat")
    assert talk is not None
    assert conversations.prepare(asked, talk).raw == asked.raw
    await save(migrated, talk, YES)
    assert (talk.id, first.id) == ("chat", "chat")
    assert await told(migrated, first) == ["1 s", "2 one", "3 yes", "4 two", "5 yes"]
    await say(conversations, migrated, "one", YES, "two", answer=assistant("no"), group="chat")
    await say(conversations, migrated, "something else", group="chat")
    assert (await told(migrated, first))[5:] == ["6 no", "7 something else", "8 yes"]
    assert await rows(migrated, "SELECT COUNT(*), MAX(message_count) FROM conversations") == [(1, 8)]


async def test_turns_of_one_header_at_once_are_all_there(migrated: Database) -> None:
    one, two = Conversations(migrated), Conversations(migrated)
    talks = [await worker.open(ANN, request(f"q{n}"), None, "chat") for n, worker in enumerate([one, two] * 3)]
    found = [talk for talk in talks if talk is not None]
    await asyncio.gather(*(save(migrated, talk, assistant(f"a{n}")) for n, talk in enumerate(found)))
    lines = [row[0] for row in await rows(migrated, "SELECT content FROM messages ORDER BY seq")]
    assert [line.replace("q", "a") for line in lines[::2]] == lines[1::2]
    assert await rows(migrated, "SELECT COUNT(*), MAX(message_count) FROM conversations") == [(1, 12)]


async def test_a_header_with_an_id_of_ours_that_is_not_the_callers(migrated: Database) -> None:
    conversations = Conversations(migrated)
    own = await say(conversations, migrated, "one")
    with pytest.raises(NotFound):
        await conversations.open(BOB, request("hi"), None, own.id)
    grouped = await conversations.open(ANN, request("hi"), None, own.id)
    assert grouped is not None
    assert grouped.pk == own.pk


async def test_explicit_threading_records_headers_and_nothing_else(sqlite: Database) -> None:
    conversations = Conversations(sqlite, threading="explicit")
    assert await conversations.open(ANN, request("hi"), None, "chat") is not None
    assert await conversations.open(ANN, request("hi", YES, "more"), None) is None


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("abc", "abc"),
        ("abc::model", "abc"),
        (" abc ", "abc"),
        ("local:x", None),
        ("a b", None),
        ("", None),
        ("::m", None),
    ],
)
def test_the_id_in_a_header(told: str, name: str | None) -> None:
    assert given_id(told) == name


# Rule 1: `conversation_id`


async def test_a_history_that_the_client_sends_itself_is_not_doubled(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, {"role": "system", "content": "s"}, "one", conversation_id="x")
    asked = request("one", YES, "two", conversation_id="x")
    talk, sent = await one_turn(conversations, migrated, asked, YES)
    assert [message["content"] for message in sent.messages] == ["s", "one", "yes", "two"]
    asked = request({"role": "system", "content": "t"}, "one", YES, "two", YES, "three", conversation_id="x")
    talk, sent = await one_turn(conversations, migrated, asked, YES)
    assert [message["content"] for message in sent.messages] == ["t", "one", "yes", "two", "yes", "three"]
    assert talk.id == "x"
    assert await told(migrated, first) == ["1 s", "2 one", "3 yes", "4 two", "5 yes", "6 three", "7 yes"]


async def test_a_client_that_goes_on_from_earlier_gets_a_branch(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one", conversation_id="x")
    await say(conversations, migrated, "two", conversation_id="x")
    branch = await say(conversations, migrated, "one", YES, "other", conversation_id="x")
    assert branch.id != "x"
    assert branch.parent == (first.id, first.pk, 2)
    assert await told(migrated, branch) == ["3 other", "4 yes"]
    assert len(await told(migrated, first)) == 4
    twig = await say(conversations, migrated, "one", YES, "third", conversation_id=branch.id)
    assert twig.parent == (branch.id, branch.pk, 2)
    _, sent = await one_turn(conversations, migrated, request("now", conversation_id=twig.id), None)
    assert [message["content"] for message in sent.messages] == ["one", "yes", "third", "yes", "now"]


async def test_a_client_that_keeps_the_name_goes_on_with_its_branch(migrated: Database) -> None:
    """It sends its own history and does not look at the reply's id."""
    conversations = Conversations(migrated)
    await say(conversations, migrated, "one", conversation_id="x")
    await say(conversations, migrated, "two", conversation_id="x")
    branch = await say(conversations, migrated, "one", YES, "other", conversation_id="x")
    for history in (["one", YES, "other", YES, "next"], ["one", YES, "other", YES, "next", YES, "last"]):
        talk, sent = await one_turn(conversations, migrated, request(*history, conversation_id="x"), YES)
        assert talk.id == branch.id
        assert len(sent.messages) == len(history)
    assert await told(migrated, branch) == ["3 other", "4 yes", "5 next", "6 yes", "7 last", "8 yes"]
    twig = await say(conversations, migrated, "one", YES, "other", YES, "again", conversation_id="x")
    assert twig.parent == (branch.id, branch.pk, 4)
    assert await rows(migrated, "SELECT * FROM turn_leases") == []


async def test_a_client_that_leaves_out_older_messages_doubles_nothing(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, {"role": "system", "content": "s"}, "one", conversation_id="x")
    await say(conversations, migrated, "two", conversation_id="x")
    asked = request("two", YES, "three", conversation_id="x")
    talk, sent = await one_turn(conversations, migrated, asked, YES)
    assert talk.id == "x"
    assert [message["content"] for message in sent.messages] == ["s", "one", "yes", "two", "yes", "three"]
    assert await told(migrated, first) == ["1 s", "2 one", "3 yes", "4 two", "5 yes", "6 three", "7 yes"]


async def test_a_first_answer_that_was_made_again_doubles_nothing(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one", conversation_id="x")
    await one_turn(conversations, migrated, request("one", conversation_id="x"), assistant("no"))
    asked = request("one", assistant("no"), "two", conversation_id="x")
    _, sent = await one_turn(conversations, migrated, asked, YES)
    assert [message["content"] for message in sent.messages] == ["one", "yes", "one", "no", "two"]
    assert await told(migrated, first) == ["1 one", "2 yes", "3 one", "4 no", "5 two", "6 yes"]


async def test_a_foreign_history_is_new(migrated: Database) -> None:
    conversations = Conversations(migrated)
    await say(conversations, migrated, "one", conversation_id="x")
    _, sent = await one_turn(conversations, migrated, request("ONE", assistant("no"), "two", conversation_id="x"), None)
    assert [message["content"] for message in sent.messages] == ["one", "yes", "ONE", "no", "two"]


async def test_a_repeated_question_is_new(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one", conversation_id="x")
    await say(conversations, migrated, "one", conversation_id="x")
    assert await told(migrated, first) == ["1 one", "2 yes", "3 one", "4 yes"]


async def test_the_clients_own_system_message_comes_first_and_is_kept_once(migrated: Database) -> None:
    conversations = Conversations(migrated)
    system: Message = {"role": "system", "content": "s"}
    first = await say(conversations, migrated, system, "one", conversation_id="x")
    _, sent = await one_turn(conversations, migrated, request(system, "two", conversation_id="x"), YES)
    assert [message["content"] for message in sent.messages] == ["s", "one", "yes", "two"]
    other = system | {"content": "t"}
    _, sent = await one_turn(conversations, migrated, request(other, "three", conversation_id="x"), YES)
    assert [message["content"] for message in sent.messages] == ["t", "one", "yes", "two", "yes", "three"]
    assert await told(migrated, first) == ["1 s", "2 one", "3 yes", "4 two", "5 yes", "6 t", "7 three", "8 yes"]


async def test_a_loop_without_an_id_goes_on_with_a_conversation_that_was_named(migrated: Database) -> None:
    conversations = Conversations(migrated)
    first = await say(conversations, migrated, "one", conversation_id="x")
    second = await say(conversations, migrated, "one", YES, "two")
    await say(conversations, migrated, "three", conversation_id="x")
    assert second.id == "x"
    assert len(await told(migrated, first)) == 6


async def test_a_conversation_that_is_there_but_empty(migrated: Database) -> None:
    """Made by somebody beforehand, in a session of its own."""
    conversations = Conversations(migrated, system_prompt="Be kind.")
    made = rows_of.ConversationTurn("c_1", "x", "ann", None, None, "sess_1", True, None, NOON, [])
    await migrated.write(rows_of.save([made]))
    talk = await say(conversations, migrated, "one", conversation_id="x")
    assert talk.session_id == "sess_1"
    assert await told(migrated, talk) == ["1 Be kind.", "2 one", "3 yes"]
    assert await rows(migrated, "SELECT pk, title, session_id, message_count FROM conversations") == [
        ("c_1", "one", "sess_1", 3)
    ]


async def test_one_turn_at_a_time(migrated: Database) -> None:
    """In one worker, and over workers; before anything is spent."""
    one, two = Conversations(migrated), Conversations(migrated)
    asked = request("hi", conversation_id="x")
    talk = await one.open(ANN, asked, None)
    assert talk is not None
    for worker in (one, two):
        with pytest.raises(ConversationBusy) as caught:
            await worker.open(ANN, asked, None)
        assert (caught.value.status, caught.value.code) == (409, "conversation_busy")
        assert int(caught.value.headers["retry-after-ms"]) > 0
    for worker in (one, two):
        other = await worker.open(BOB, asked, None)
        assert other is not None
        await save(migrated, other, YES)
    await save(migrated, talk, YES)
    later = await two.open(ANN, asked, None)
    assert later is not None
    assert len(later.history) == 2
    later.close()
    await two.aclose()


async def test_what_a_failed_call_held_is_free_for_all_workers_when_it_is_closed(migrated: Database) -> None:
    one, two = Conversations(migrated), Conversations(migrated)
    for worker in (one, two) * 3:
        talk = await worker.open(ANN, request("hi", conversation_id="x"), None)
        assert talk is not None
        await talk.aclose()
        await talk.aclose()
    assert await rows(migrated, "SELECT * FROM turn_leases") == []


@pytest.mark.parametrize("wanted", ["a b", "conv_" + "0" * 32])
async def test_a_call_that_is_refused_holds_nothing(sqlite: Database, wanted: str) -> None:
    conversations = Conversations(sqlite)
    with pytest.raises((BadRequest, NotFound)):
        await conversations.open(ANN, request("hi", conversation_id=wanted), None)
    await conversations.aclose()
    assert await rows(sqlite, "SELECT * FROM turn_leases") == []


# The window of a model


async def test_the_oldest_turns_are_left_out_and_the_answer_says_so(migrated: Database) -> None:
    conversations = Conversations(migrated, counter=TokenCounter())
    for number in range(6):
        await say(conversations, migrated, f"{number} " + "word " * 300, conversation_id="x")
    asked = request("now", conversation_id="x", max_tokens=100)
    talk = await conversations.open(ANN, asked, None)
    assert talk is not None
    await conversations.fit(talk, asked, Model("m", [], window=2000))
    sent = conversations.prepare(asked, talk)
    assert 0 < talk.omitted_turns < 6
    assert sent.messages[0]["content"].startswith(f"{talk.omitted_turns} word")
    await save(migrated, talk, YES)
    assert await rows(migrated, "SELECT seq, omitted_turns FROM messages WHERE omitted_turns > 0") == [
        (14, talk.omitted_turns)
    ]


# Without content


async def test_what_is_said_can_be_kept_from_the_database(migrated: Database) -> None:
    conversations = Conversations(migrated, store_content=False)
    for _ in range(2):
        await say(conversations, migrated, {"role": "system", "content": "s"}, "one", conversation_id="x", name="n")
    await say(conversations, migrated, "one", YES, "two")
    assert await rows(migrated, "SELECT DISTINCT content, extra, chain FROM messages") == [("null", None, None)]
    assert await rows(migrated, "SELECT message_count, title FROM conversations ORDER BY message_count") == [
        (4, None), (6, None)
    ]  # fmt: skip
    _, sent = await one_turn(Conversations(migrated), migrated, request("next", conversation_id="x"), None)
    assert [message["content"] for message in sent.messages] == ["next"]
