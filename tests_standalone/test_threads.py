"""A client's messages in, the stored conversation that they go on with out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.store.conversations import Place, StoredMessage
from gateway.threads import (
    Known,
    as_json,
    best,
    chain_of,
    goes_on_with,
    grouped,
    is_background,
    last_answer,
    link,
    linked,
    partial,
    recognised,
    seed,
    shortened,
)
from gateway.wire.chat import ChatRequest, Message
from gateway.wire.jsontext import dumps

START = seed("ann", "key_1", None)


def user(content: object, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


def assistant(content: object, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


SYSTEM: Message = {"role": "system", "content": "Be kind."}


def chain(*messages: Message) -> str:
    return chain_of(START, messages)


# What counts of a message

PICTURE = {"type": "image_url", "image_url": {"url": "data:,x"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":[1,{"y":2,"x":1}],"b":"é"}'}}
RESPACED = ASKED | {"function": {"arguments": '{ "b" : "\\u00e9",\n"a": [1, {"x": 1, "y": 2}] }', "name": "f"}}
UNREADABLE = ASKED | {"function": {"name": "f", "arguments": '{"a":[1,{"y":2,"x":1}],"b":"é"'}}
OWN = {"id": "c2", "type": "custom", "custom": {"name": "g", "input": "x"}}


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
        ([assistant(None, tool_calls=[ASKED])], [assistant("", tool_calls=[RESPACED])]),
        ([assistant(None, tool_calls=[ASKED])], [{"role": "assistant", "tool_calls": [ASKED | {"id": "other"}]}]),
        ([assistant(None, function_call=ASKED["function"])], [assistant("", function_call=RESPACED["function"])]),
        ([assistant(None, tool_calls=[OWN])], [assistant(None, tool_calls=[OWN | {"id": "other"}])]),
        ([assistant(None, audio={"id": "a", "data": "..."})], [assistant(None, audio={"id": "a"})]),
    ],
    ids=[
        "parts", "outer space", "a system message", "a developer message", "a system message after it", "reasoning",
        "fields that are empty", "no tool calls", "no text", "ids of calls", "several parts", "spaces in arguments",
        "no content", "an older call", "ids of custom calls", "sound by its id",
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
        ([assistant(None, tool_calls=[ASKED])], [assistant(None, tool_calls=[ASKED, ASKED])]),
        ([assistant(None, tool_calls=[OWN])], [assistant(None)]),
        ([assistant(None, function_call=CALL["function"])], [assistant(None)]),
        ([assistant(None, audio={"id": "a"})], [assistant(None, audio={"id": "b"})]),
        ([assistant(None, tool_calls=[UNREADABLE])], [assistant(None, tool_calls=[ASKED])]),
    ],
    ids=[
        "text", "role", "case", "inner space", "order", "joined", "repeated", "a picture", "another picture",
        "a tool call", "another call", "another result", "NUL", "half a pair", "a call twice", "a custom call",
        "an older call", "another sound", "arguments that are no JSON",
    ],
)  # fmt: skip
def test_the_chain_is_another(one: list[Message], other: list[Message]) -> None:
    assert chain(*one) != chain(*other)


def test_the_chain_begins_with_whose_it_is() -> None:
    starts = [seed("ann", None, None), seed("ann", "k", None), seed("ann", None, "k"), seed("ann", "k", "kid"), START]
    assert len({chain_of(start, [user("hi")]) for start in starts}) == 5
    assert seed("a", "b", None) != seed("ab", None, None)


def test_a_partial_answer_is_chained_without_its_text() -> None:
    before = chain(user("hi"))
    assert partial(before) != before
    assert partial(before) not in {link(before, assistant(text)) for text in ("", "partial", before)}
    assert partial(before) != partial(partial(before))


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \n"), max_size=8), st.integers(0, 8))
def test_an_answer_that_broke_off_is_meant_by_any_beginning_of_it(text: str, length: int) -> None:
    assert goes_on_with(assistant(text[:length]), assistant(text))
    assert goes_on_with(assistant(text), assistant(text[:length]))


@pytest.mark.parametrize(
    ("message", "stored", "meant"),
    [
        (assistant("Hello wor"), assistant("Hello"), True),
        (assistant(" Hello\n"), assistant("Hello world"), True),
        (assistant([{"type": "text", "text": "Hel"}]), assistant("Hello"), True),
        (assistant(None), assistant("Hello"), True),
        (assistant("Hallo"), assistant("Hello"), False),
        (assistant("Hello", tool_calls=[CALL]), assistant("Hello"), False),
        (assistant("Hello", tool_calls=[CALL]), assistant("Hello there", tool_calls=[CALL]), True),
        (assistant("Hello"), assistant("Hello", tool_calls=[CALL]), True),
    ],
)
def test_what_a_client_may_have_of_an_answer_that_broke_off(message: Message, stored: Message, meant: bool) -> None:
    assert goes_on_with(message, stored) is meant


# Which of the stored answers


def place(pk: str, at: int = 0, *, last: bool = True, seq: int = 2, cut: str | None = None) -> Place:
    content = None if cut is None else json.dumps(cut)
    return Place(pk, f"id_{pk}", None, None, seq, last, at, content, None if cut is None else "{}")


@pytest.mark.parametrize(
    ("found", "pk"),
    [
        ([], None),
        ([place("a")], "a"),
        ([place("a", 1), place("b", 2)], "b"),
        ([place("a", 1), place("b", 2, last=False)], "a"),
        ([place("a", 1, last=False), place("b", 2, last=False)], "b"),
        ([place("taken", 2), place("a", 1)], "a"),
        ([place("taken", 1, last=False), place("taken", 2)], "taken"),
        ([place("a", 1, cut="Hello wo"), place("b", 0)], "b"),
        ([place("a", 1, cut="Hello wo"), place("b", 0, last=False)], "b"),
        ([place("a", 1, cut="Hel")], "a"),
        ([place("a", 1, cut="Hallo")], None),
        ([place("a", 1, cut="Hallo"), place("b", 0, cut="H")], "b"),
    ],
)
def test_the_end_of_a_conversation_before_the_newest_and_whole_before_broken(
    found: Sequence[Place], pk: str | None
) -> None:
    chosen = best(found, assistant("Hello world"), {("taken", 2)})
    assert (None if chosen is None else chosen.pk) == pk


@pytest.mark.parametrize(
    ("roles", "last"),
    [
        (["user"], None),
        (["system", "user"], None),
        (["user", "assistant", "user"], 1),
        (["user", "assistant", "tool"], 1),
        (["user", "assistant", "user", "assistant"], 3),
    ],
)
def test_the_last_answer(roles: list[str], last: int | None) -> None:
    assert last_answer([{"role": role, "content": "x"} for role in roles]) == last


# A history that the client sends although the gateway has it


def stored(*messages: Message, cut: Sequence[int] = ()) -> list[StoredMessage]:
    """As they lie in the table, from seq 1; `cut` are the numbers of those that broke off."""
    found = []
    for seq, message in enumerate(messages, 1):
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        reason = "client_disconnected" if seq in cut else "stop" if message["role"] == "assistant" else None
        text = dumps(extra).decode() if extra else None
        content = dumps(message.get("content")).decode()
        found.append(StoredMessage("", message["role"], content, text, None, finish_reason=reason, seq=seq))
    return found


U1, A1, U2, A2, U3 = user("one"), assistant("1"), user("two"), assistant("2"), user("three")
RESULT: Message = {"role": "tool", "content": "4", "tool_call_id": "c1"}
ASKS = assistant(None, tool_calls=[ASKED])


@pytest.mark.parametrize(
    ("kept", "sent", "found"),
    [
        ([U1, A1], [U2], None),
        ([U1, A1], [U1], None),
        ([U1, A1], [U1, A1, U2], (2, 2)),
        ([SYSTEM, U1, A1], [U1, A1, U2], (2, 3)),
        ([U1, A1], [SYSTEM, user(" one\n"), assistant([{"type": "text", "text": "1"}], x=1), U2], (3, 2)),
        ([U1, A1, U2, A2], [U1, A1, U2, A2, U3], (4, 4)),
        ([U1, A1, U2, A2], [U1, A1, U3], (2, 2)),
        ([U1, A1, U2, A2], [U1, A1, U2], (2, 2)),
        ([U1, A1, U2, A2], [U1, A1, U3, A2, U3], (2, 2)),
        ([U1, A1, U2, A2], [U1, assistant("other"), U2, A2, U3], None),
        ([U1, A1, U2, A2], [U2, A2, U3], None),
        ([U1, ASKS, RESULT, A2], [U1, ASKS, RESULT, A2, U3], (4, 4)),
        ([U1, ASKS, RESULT, A2], [U1, assistant("", tool_calls=[RESPACED]), RESULT], (2, 2)),
        ([], [U1, A1, U2], None),
    ],
)
def test_a_history_is_recognised_as_far_as_it_is_the_stored_one(
    kept: list[Message], sent: list[Message], found: tuple[int, int] | None
) -> None:
    known = recognised(START, stored(*kept), sent)
    if found is None:
        assert known is None
    else:
        assert known == Known(found[0], chain(*sent[: found[0]]), found[1])


def test_an_answer_that_broke_off_is_recognised_and_what_follows_it() -> None:
    kept = stored(U1, assistant("Hello wor"), U2, A2, cut=[2])
    assert recognised(START, kept, [U1, assistant("Hel"), U3]) == Known(2, chain(U1, assistant("Hel")), 2)
    sent = [U1, assistant("Hello"), U2, A2, U3]
    assert recognised(START, kept, sent) == Known(4, chain(*sent[:4]), 4)
    assert recognised(START, kept, [U1, assistant("Bye"), U2, A2, U3]) is None


def test_an_answer_is_known_by_its_stored_chain_and_nothing_is_read_for_it() -> None:
    kept = [StoredMessage("", "user", "no JSON", None, chain(U1), seq=1)]
    kept.append(StoredMessage("", "assistant", "no JSON", None, chain(U1, A1), seq=2))
    assert recognised(START, kept, [SYSTEM, U1, A1, U2]) == Known(3, chain(U1, A1), 2)


@pytest.mark.parametrize(
    ("kept", "sent", "begin"),
    [
        ([U1, A1, U2, A2], [U2, A2, U3], 2),
        ([U1, A1, U2, A2], [SYSTEM, user(" two\n"), A2, U3], 2),
        ([U1, A1, SYSTEM, U2, A2], [A1, U2, A2, U3], 1),
        ([U1, A1, U2, A2], [A2], 3),
        ([U1, A1, U2, A2], [U1, A1, U3], None),
        ([U1, A1, U2, A2], [U3], None),
        ([U1, A1], [U2, A2, U1, A1, U3], None),
        ([], [A1, U2], None),
    ],
)
def test_a_shortened_history_is_the_end_of_the_stored_one(
    kept: list[Message], sent: list[Message], begin: int | None
) -> None:
    assert shortened(stored(*kept), sent) == begin


def test_a_shortened_history_may_end_with_an_answer_that_broke_off() -> None:
    assert shortened(stored(U1, A1, U2, assistant("Hello wor"), cut=[4]), [U2, assistant("Hel"), U3]) == 2


TEXTS = st.sampled_from(["a", "b", " a", "", "é\ud800"])
TALKS = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXTS)
)


@settings(deadline=None)
@given(TALKS, TALKS, st.integers(0, 6))
def test_what_is_recognised_is_the_longest_that_is_the_same(kept: list[Message], new: list[Message], same: int) -> None:
    """Against the plain definition: message by message."""
    sent = [*kept[:same], *new]
    longest = 0
    for count, (one, other) in enumerate(zip(kept, sent, strict=False), 1):
        if (one["role"], one["content"].strip()) != (other["role"], other["content"].strip()):
            break
        if one["role"] == "assistant":
            longest = count
    known = recognised(START, stored(*kept), sent)
    assert (0 if known is None else known.seq) == longest
    assert known is None or known.place == longest


# A conversation that a header names


@pytest.mark.parametrize(
    ("kept", "sent", "new"),
    [
        ([U1, A1], [U1, A1, U2], 2),
        ([U1, A1], [SYSTEM, U1, A1, SYSTEM, U2], 3),
        ([U1, A1], [U1], 1),
        ([U1, A1, U2, A2], [U1, A1, U2], 3),
        ([U1, A1, U2, A2], [U1], 0),
        ([U1, A1, U2, A2], [U1, A1, U3], 2),
        ([U1, A1], [U2, A2, U3], 2),
        ([U1, A1], [U2], 0),
        ([U1, A1], [SYSTEM, U2], 0),
        ([], [U1, A1, U2], 2),
    ],
    ids=[
        "goes on", "system messages", "made again", "later made again", "an earlier one made again",
        "edited", "another history", "no history", "a system message",
        "nothing is kept",
    ],
)  # fmt: skip
def test_new_is_what_comes_after_the_last_known_message(kept: list[Message], sent: list[Message], new: int) -> None:
    chains = frozenset(chain(*kept[:count]) for count in range(1, len(kept) + 1))
    asked = [count for count, message in enumerate(kept, 1) if message["role"] != "assistant"]
    last_asked = chain(*kept[: asked[-1]]) if asked else None
    assert grouped(START, chains, last_asked, sent) == Known(new, chain(*sent[:new]))


def test_new_is_what_comes_after_an_answer_that_broke_off() -> None:
    chains = frozenset([chain(U1), partial(chain(U1))])
    sent = [U1, assistant("half"), U2]
    assert grouped(START, chains, chain(U1), sent) == Known(2, chain(*sent[:2]))


# What a frontend asks for itself


def asked(*messages: Message, **fields: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": messages, **fields}).encode())


@pytest.mark.parametrize(
    ("request_", "background"),
    [
        (asked(user("### Task:\nGenerate a concise title")), True),
        (asked(user("\n### Task:\nSuggest 3-5 follow-ups"), stream=False), True),
        (asked(user([{"type": "text", "text": "### Task:\nGenerate tags"}])), True),
        (asked(user("### Task:\nGenerate a title"), stream=True), False),
        (asked(SYSTEM, user("### Task:\nGenerate a title")), False),
        (asked(U1, A1, user("### Task:")), False),
        (asked(assistant("### Task:")), False),
        (asked(user("what does ### Task: mean?")), False),
        (asked(user("hi")), False),
        (asked(user(None)), False),
    ],
)
def test_titles_tags_and_follow_ups_are_background(request_: ChatRequest, background: bool) -> None:
    assert is_background(request_) is background


def test_a_stored_message_is_json_again() -> None:
    for message in (U1, ASKS, RESULT, assistant("x", z={"a": [1.5]}), user([PICTURE])):
        (kept,) = stored(message)
        assert json.loads(as_json(kept)) == {"content": None, **message}
        assert linked(START, message, kept.content.encode()) == link(START, message)
