"""Peculiarities by example: these rules and this request, that request."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gateway.backends.adapt import Adapter
from gateway.backends.vendors import CallIds, Quirks
from gateway.errors import BadRequest
from gateway.wire.chat import ChatRequest, CompletionRequest

USER = {"role": "user", "content": "Hi"}


def fields(**members: Any) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": [USER], **members}).encode())


def said(*messages: dict[str, Any]) -> ChatRequest:
    return ChatRequest.parse(json.dumps({"model": "m", "messages": messages}).encode())


def adapted_fields(quirks: Quirks, **members: Any) -> dict[str, Any]:
    request = Adapter(quirks).apply(fields(**members))
    assert json.loads(request.raw) == request.data
    return {key: value for key, value in request.data.items() if key not in ("model", "messages")}


def adapted_messages(quirks: Quirks, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    request = Adapter(quirks).apply(said(*messages))
    assert json.loads(request.raw) == request.data
    return request.messages


EVERY_RULE = Quirks(
    drop=("stop", "stream_options.include_obfuscation", "tools.function.strict", "messages.name"),
    rename={"seed": "random_seed"},
    roles={"developer": "system"},
    tool_call_ids=CallIds("alphanumeric", length=9),
    tool_call_reasoning="fill",
    message_fields=("role", "content", "tool_calls", "tool_call_id", "reasoning_content"),
    flatten=("system", "tool"),
    usage_in_stream=False,
    most_choices=2,
    by_model={"o1*": Quirks(drop=("temperature",))},
)


class TestWhatNeedsNoChange:
    RAW = b"""{ "model":"m", "x": 1.0, "n":2, "stream" : true, "temperature":0.70,
        "tools":[{"type":"function","function":{"name":"f"}}],
        "messages":[ {"role":"system","content":"s"}, {"role":"user","content":[{"type":"text","text":"a"}]},
        {"role":"assistant","content":null,"reasoning_content":"","tool_calls":[{"id":"abcdefgh1","type":"function",
        "function":{"name":"f","arguments":"{}"}}]}, {"role":"tool","tool_call_id":"abcdefgh1","content":"1"} ] }"""

    @pytest.mark.parametrize("quirks", [None, Quirks(), EVERY_RULE, Quirks(defaults={"temperature": 1, "a": None})])
    def test_is_the_same_object(self, quirks: Quirks | None) -> None:
        request = ChatRequest.parse(self.RAW)
        assert Adapter(quirks).apply(request) is request

    def test_everything_is_sent_when_nothing_is_named(self) -> None:
        quirks = Quirks(
            drop=(), rename={}, defaults={}, roles={}, tool_call_ids=CallIds(), message_fields=(), flatten=()
        )
        request = said({"role": "developer", "content": [], "x": 1, "tool_calls": [{"id": "?" * 500}]})
        assert Adapter(quirks).apply(request) is request

    def test_a_field_that_changes_leaves_the_others_as_they_were_written(self) -> None:
        raw = b'{"model":"m",  "stop": "x", "messages":[ {"role":"user","content":"\\u0041"} ], "x": 1.0}'
        assert Adapter(Quirks(drop=("stop",))).apply(ChatRequest.parse(raw)).raw == raw.replace(b'"stop": "x", ', b"")


class TestFields:
    @pytest.mark.parametrize(
        ("drop", "given", "left"),
        [
            (("stop", "n"), {"stop": ["a"], "user": "u"}, {"user": "u"}),
            (("stop",), {"stop": None}, {}),
            (
                ("stream_options.include_obfuscation",),
                {"stream_options": {"include_usage": True, "include_obfuscation": False}},
                {"stream_options": {"include_usage": True}},
            ),
            (("stream_options.include_obfuscation",), {"stream_options": None}, {"stream_options": None}),
            (
                ("tools.function.strict",),
                {"tools": [{"function": {"name": "f", "strict": True}}, {"custom": {"strict": True}}, 5]},
                {"tools": [{"function": {"name": "f"}}, {"custom": {"strict": True}}, 5]},
            ),
            (("a.b", "a"), {"a": {"b": 1}}, {}),
            (("a", "a.b"), {"a": {"b": 1}}, {}),
            (("a.b.c",), {"a": "text"}, {"a": "text"}),
            (("a.b", "a.c.d"), {"a": {"b": 1, "c": {"d": 2}}}, {"a": {"c": {}}}),
        ],
    )
    def test_dropped(self, drop: tuple[str, ...], given: dict[str, Any], left: dict[str, Any]) -> None:
        assert adapted_fields(Quirks(drop=drop), **given) == left

    @pytest.mark.parametrize(
        ("given", "left"),
        [
            ({"max_completion_tokens": 5}, {"max_tokens": 5}),
            ({"max_tokens": 5}, {"max_tokens": 5}),
            ({"max_completion_tokens": 5, "max_tokens": 6}, {"max_tokens": 6}),
            ({"max_completion_tokens": 5, "max_tokens": None}, {"max_tokens": 5}),
            ({"max_completion_tokens": None}, {}),
            ({"max_completion_tokens": None, "max_tokens": 6}, {"max_tokens": 6}),
        ],
    )
    def test_renamed(self, given: dict[str, Any], left: dict[str, Any]) -> None:
        assert adapted_fields(Quirks(rename={"max_completion_tokens": "max_tokens"}), **given) == left

    @pytest.mark.parametrize(
        ("given", "left"),
        [
            ({}, {"temperature": 0.2, "stop": ["a"]}),
            ({"temperature": None}, {"temperature": 0.2, "stop": ["a"]}),
            ({"temperature": 0, "stop": []}, {"temperature": 0, "stop": []}),
        ],
    )
    def test_defaults(self, given: dict[str, Any], left: dict[str, Any]) -> None:
        assert adapted_fields(Quirks(defaults={"temperature": 0.2, "stop": ["a"]}), **given) == left

    def test_renamed_then_dropped_then_defaults(self) -> None:
        assert adapted_fields(Quirks(rename={"a": "b"}, drop=("b",)), a=1) == {}
        assert adapted_fields(Quirks(rename={"a": "b"}, defaults={"b": 2}), a=1) == {"b": 1}
        assert adapted_fields(Quirks(drop=("b",), defaults={"b": 2}), b=1) == {"b": 2}
        assert adapted_fields(Quirks(rename={"a": "b"}, drop=("b.c",)), a={"c": 1, "d": 2}) == {"b": {"d": 2}}

    def test_stream_options(self) -> None:
        quirks = Quirks(usage_in_stream=False)
        assert adapted_fields(quirks, stream=True, stream_options={"include_usage": True}) == {"stream": True}
        assert not Adapter(quirks).asks_usage(fields())
        assert Adapter().asks_usage(fields())

    @pytest.mark.parametrize(("most", "words"), [(1, "only 1"), (3, "at most 3")])
    def test_choices(self, most: int, words: str) -> None:
        adapter = Adapter(Quirks(most_choices=most))
        for request in (fields(), fields(n=None), fields(n=most)):
            assert adapter.apply(request) is request
        with pytest.raises(BadRequest, match=f"'n' is 4, but the upstream of this model gives {words}.") as caught:
            adapter.apply(fields(n=4))
        assert (caught.value.param, caught.value.code) == ("n", "unsupported_value")

    def test_the_older_completions(self) -> None:
        request = CompletionRequest.parse(b'{"model":"m","prompt":"a","stop":"x"}')
        adapted = Adapter(EVERY_RULE).apply(request)
        assert (type(adapted), adapted.raw) == (CompletionRequest, b'{"model":"m","prompt":"a"}')


class TestByModel:
    ADAPTER = Adapter(
        Quirks(
            drop=("a",),
            rename={"b": "c"},
            by_model={
                "*-plain*": Quirks(),
                "grok-4*": Quirks(drop=("stop",), rename={"d": "e"}, usage_in_stream=False),
                "grok-*": Quirks(drop=("user",)),
            },
        )
    )

    @pytest.mark.parametrize(
        ("model", "left", "asks"),
        [
            ("grok-4-fast", {"user": "u", "c": 1, "e": 1}, False),
            ("grok-3", {"stop": "s", "c": 1, "d": 1}, True),
            ("grok-4-plain", {"stop": "s", "user": "u", "c": 1, "d": 1}, True),
            ("Grok-4", {"stop": "s", "user": "u", "c": 1, "d": 1}, True),
            ("x-grok-4", {"stop": "s", "user": "u", "c": 1, "d": 1}, True),
        ],
    )
    def test_the_first_pattern_that_fits_adds_to_the_rest(self, model: str, left: dict[str, Any], asks: bool) -> None:
        request = fields(model=model, a=1, b=1, d=1, stop="s", user="u")
        adapted = self.ADAPTER.apply(request).data
        assert {key: value for key, value in adapted.items() if key not in ("model", "messages")} == left
        assert self.ADAPTER.asks_usage(request) is asks

    def test_any_number_of_names(self) -> None:
        for number in range(2500):
            assert "a" not in self.ADAPTER.apply(fields(model=f"m{number}", a=1)).data


class TestMessages:
    @pytest.mark.parametrize(
        ("quirks", "message", "expected"),
        [
            (
                Quirks(roles={"developer": "system"}),
                {"role": "developer", "content": "c", "name": "n"},
                {"role": "system", "content": "c", "name": "n"},
            ),
            (
                Quirks(flatten=("system",)),
                {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "system", "content": "a\nb"},
            ),
            (
                Quirks(roles={"developer": "system"}, flatten=("system",)),
                {"role": "developer", "content": [{"type": "text", "text": "a"}]},
                {"role": "system", "content": "a"},
            ),
            (
                Quirks(tool_call_reasoning="fill"),
                {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}], "reasoning_content": ""},
            ),
            (
                Quirks(tool_call_reasoning="fill"),
                {"role": "assistant", "reasoning_content": None, "reasoning": "why", "tool_calls": [{"id": "a"}]},
                {"role": "assistant", "reasoning_content": "why", "reasoning": "why", "tool_calls": [{"id": "a"}]},
            ),
            (
                Quirks(tool_call_reasoning="strip"),
                {
                    "role": "assistant",
                    "content": "c",
                    "reasoning_content": "",
                    "reasoning": "r",
                    "reasoning_details": [],
                },
                {"role": "assistant", "content": "c"},
            ),
            (
                Quirks(message_fields=("role", "content")),
                {"role": "user", "content": "c", "timestamp": 5, "name": "n"},
                {"role": "user", "content": "c"},
            ),
            (
                Quirks(drop=("messages.reasoning_content", "messages.tool_calls.index")),
                {"role": "assistant", "reasoning_content": "r", "tool_calls": [{"id": "a", "index": 0}, {"id": "b"}]},
                {"role": "assistant", "tool_calls": [{"id": "a"}, {"id": "b"}]},
            ),
        ],
    )
    def test_changed(self, quirks: Quirks, message: dict[str, Any], expected: dict[str, Any]) -> None:
        assert adapted_messages(quirks, USER, message, USER) == [USER, expected, USER]

    @pytest.mark.parametrize(
        ("quirks", "message"),
        [
            (Quirks(roles={"developer": "system"}), {"role": "system", "content": "c"}),
            (Quirks(flatten=("system",)), {"role": "user", "content": [{"type": "text", "text": "a"}]}),
            (Quirks(flatten=("user",)), {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}),
            (Quirks(flatten=("user",)), {"role": "user", "content": [{"type": "text", "text": None}]}),
            (Quirks(tool_call_reasoning="fill"), {"role": "assistant", "content": "c"}),
            (Quirks(tool_call_reasoning="fill"), {"role": "assistant", "tool_calls": []}),
            (Quirks(tool_call_reasoning="fill"), {"role": "tool", "tool_calls": [{}]}),
            (Quirks(tool_call_reasoning="pass"), {"role": "assistant", "reasoning": "r", "tool_calls": [{}]}),
        ],
    )
    def test_not_changed(self, quirks: Quirks, message: dict[str, Any]) -> None:
        request = said(message)
        assert Adapter(quirks).apply(request) is request


def call(*ids: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": name, "type": "function"} for name in ids]}


def result(id: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": "1"}


def sent_ids(rule: CallIds, *messages: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for message in adapted_messages(Quirks(tool_call_ids=rule), *messages):
        found += [entry["id"] for entry in message.get("tool_calls", ())]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    return found


MISTRAL = CallIds("alphanumeric", length=9)


class TestCallIds:
    @pytest.mark.parametrize(
        ("rule", "id", "fits"),
        [
            (MISTRAL, "abcDEF123", True),
            (MISTRAL, "abcDEF12", False),
            (MISTRAL, "abcDEF12_", False),
            (MISTRAL, "abcdef123\n", False),
            (MISTRAL, "\u0661" * 9, False),
            (MISTRAL, "", False),
            (MISTRAL, "\ud83d", False),
            (CallIds("word", max_length=64), "toolu_01-x", True),
            (CallIds("word", max_length=64), "a.b", False),
            (CallIds("word", max_length=64), "a" * 65, False),
            (CallIds("word"), "a" * 500, True),
            (CallIds(max_length=40), "é" * 40, True),
            (CallIds(max_length=40), "call_" + "x" * 36, False),
            (CallIds(max_length=10), "x" * 11, False),
        ],
    )
    def test_one_that_fits_stays(self, rule: CallIds, id: str, fits: bool) -> None:
        called, answered = sent_ids(rule, call(id), result(id))
        assert called == answered
        assert (called == id) is fits
        shape = {"alphanumeric": "[A-Za-z0-9]", "word": r"[\w-]", "any": "."}[rule.alphabet]
        assert re.fullmatch(shape + "+", called, re.ASCII if rule.alphabet == "word" else 0)
        assert len(called) == rule.length or len(called) <= (rule.max_length or 500)

    def test_many_calls_stay_apart_and_keep_their_ids_as_the_conversation_grows(self) -> None:
        ids = [f"call_{number:024}" for number in range(2000)]
        messages = [message for name in ids for message in (call(name), result(name))]
        sent = sent_ids(MISTRAL, *messages)
        assert sent[::2] == sent[1::2]
        assert len({*sent}) == len(ids)
        assert sent_ids(MISTRAL, *messages[:100]) == sent[:100]

    def test_an_id_that_another_one_was_hashed_to_is_not_taken_twice(self) -> None:
        (made,) = sent_ids(MISTRAL, call("call_1"))
        sent = sent_ids(MISTRAL, call("call_1", made), result(made), result("call_1"))
        assert sent[0] == sent[3] == made
        assert sent[1] == sent[2] != made

    def test_a_hash_that_somebody_has_already_is_made_again(self) -> None:
        (made,) = sent_ids(MISTRAL, call("call_1"))
        first, second = sent_ids(MISTRAL, call(made), result("call_1"))
        assert first == made != second
        assert re.fullmatch("[A-Za-z0-9]{9}", second)

    def test_what_is_no_id_is_the_upstreams_to_judge(self) -> None:
        odd = [{"role": "assistant", "tool_calls": calls} for calls in (None, "x", [], [None, 5, {}])]
        request = said(*odd, result(None), result(5), call(None, 7))
        assert Adapter(Quirks(tool_call_ids=MISTRAL)).apply(request) is request

    def test_arguments_that_hold_half_an_emoji(self) -> None:
        odd = call("call_1") | {"content": "\ud83d"}
        assert adapted_messages(Quirks(tool_call_ids=MISTRAL), odd)[0]["content"] == "\ud83d"
