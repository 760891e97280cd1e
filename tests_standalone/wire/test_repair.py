"""Whole replies by example: what a broken upstream sends in, what the client gets out.

The rows are those of the table "What clients break on" in the notes on OpenAI's wire contract; their numbers head the
names of the cases.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from gateway.wire import repair
from gateway.wire.chat import Completion, Usage
from gateway.wire.failures import StreamedError, streamed_error
from gateway.wire.jsontext import loads

Json = dict[str, Any]

NAME: Json = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1767225600, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
MADE_CALL = re.compile(r"call_[0-9a-f]{24}")


def reply(*choices: object, **more: Any) -> Json:
    return NAME | {"choices": list(choices), "usage": USAGE} | more


def said(message: object, reason: object = "stop", **more: Any) -> Json:
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason} | more


def text(content: object = "Hi", **more: Any) -> Json:
    return {"role": "assistant", "content": content, "refusal": None} | more


def repaired(data: Json, **name: Any) -> Json:
    """What the client gets. The bytes and the data say the same."""
    before = Completion(json.dumps(data).encode(), copy.deepcopy(data))
    after = repair.completion(before, **name)
    assert loads(after.raw) == after.data
    assert before.data == data
    return after.data


def choice_of(choice: object, **more: Any) -> Json:
    found: Json = repaired(reply(choice, **more))["choices"][0]
    return found


RIGHT = {
    "text": reply(said(text())),
    "calls": reply(said(text(None, tool_calls=[CALL, CALL | {"id": "call_2"}]), "tool_calls")),
    "a custom call": reply(
        said(text(None, tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "f", "input": ""}}]), "tool_calls")
    ),
    "two choices": reply(said(text()), said(text(), "length", index=1)),
    "an old function call": reply(said(text(None, function_call={"name": "f", "arguments": ""}), "function_call")),
    "both words for reasoning": reply(said(text(reasoning="hm", reasoning_content="hm"))),
    "reasoning": reply(said(text(reasoning_content="hm"))),
    "no reasoning": reply(said(text(reasoning=None, reasoning_details=[]))),
    "parts": reply(said(text([{"type": "text", "text": "Hi"}]))),
    "no refusal key": reply(said({"role": "assistant", "content": "Hi"})),
    "nothing said": reply(said(text(""))),
    "filtered": reply(said(text(), "content_filter", content_filter_results={"hate": {"filtered": False}})),
    "no choices": reply(),
    "a text": reply({"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}, object="text_completion"),
    "unknown fields": reply(said(text(x=None), x=1.0), system_fingerprint=None, x={"usage": None}, service_tier="flex"),
    "no usage": {key: value for key, value in reply(said(text())).items() if key != "usage"},
    "usage is null": reply(said(text()), usage=None, service_tier=None),
    "usage with details": reply(said(text()), usage=USAGE | {"prompt_tokens_details": {"cached_tokens": 0}, "x": None}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_passed_on_untouched(name: str) -> None:
    told = Completion(json.dumps(RIGHT[name]).encode(), RIGHT[name])
    assert repair.completion(told, model="other", at=5) is told


def test_the_other_members_keep_their_bytes() -> None:
    raw = b'{ "id":"x" ,"object":"chat.completion","created":1,"model":"m","x":1.0, "choices":[ ],"usage":'
    raw += b'{"prompt_tokens":1} }'
    after = repair.completion(Completion(raw, loads(raw)))
    usage = b'{"prompt_tokens":1,"completion_tokens":0,"total_tokens":1}'
    assert after.raw == raw.replace(b'{"prompt_tokens":1}', usage)


class TestChoices:
    def test_row_4_without_index(self) -> None:
        choices = [{key: value for key, value in said(text(word)).items() if key != "index"} for word in "ab"]
        found = repaired(reply(*choices))["choices"]
        assert [(choice["index"], choice["message"]["content"]) for choice in found] == [(0, "a"), (1, "b")]

    @pytest.mark.parametrize("index", [None, "0", -1, True, 0.0, {}])
    def test_row_4_index_that_is_none(self, index: object) -> None:
        assert choice_of(said(text(), index=index))["index"] == 0

    def test_what_is_no_choice_is_left_out(self) -> None:
        assert repaired(reply(None, said(text()), 5))["choices"] == [said(text())]

    @pytest.mark.parametrize("role", ["", None, "model", "tool", 5])
    def test_row_10_role(self, role: object) -> None:
        assert choice_of(said(text(role=role))) == said(text())

    def test_row_10_role_missing(self) -> None:
        assert choice_of(said({"content": "Hi"}))["message"] == {"content": "Hi", "role": "assistant"}

    @pytest.mark.parametrize("message", [None, "x", []])
    def test_without_message(self, message: object) -> None:
        assert choice_of(said(message))["message"] == {"role": "assistant", "content": None}

    def test_content_missing_is_null(self) -> None:
        found = choice_of(said({"role": "assistant", "tool_calls": [CALL]}, "tool_calls"))["message"]
        assert found == {"role": "assistant", "tool_calls": [CALL], "content": None}

    def test_row_6_empty_content_beside_tool_calls(self) -> None:
        message = choice_of(said(text("", tool_calls=[CALL]), "tool_calls"))["message"]
        assert message == text(None, tool_calls=[CALL])
        assert choice_of(said(text("Let me see.", tool_calls=[CALL])))["message"]["content"] == "Let me see."

    @pytest.mark.parametrize("calls", [None, [], {}, "x", [None], [{"id": "x"}], [{"function": "f"}]])
    def test_no_tool_calls_are_none(self, calls: object) -> None:
        assert choice_of(said(text("", tool_calls=calls))) == said(text(""))

    def test_row_16_reasoning(self) -> None:
        assert choice_of(said(text(reasoning="hm")))["message"] == text(reasoning="hm", reasoning_content="hm")
        assert choice_of(said(text(reasoning="hm", reasoning_content=None)))["message"]["reasoning_content"] == "hm"


class TestToolCalls:
    @pytest.mark.parametrize(
        ("arguments", "right"),
        [
            (None, "{}"),
            ("", "{}"),
            ({}, "{}"),
            ({"a": "é"}, '{"a":"é"}'),
            ([1], "[1]"),
            ('{"half', '{"half'),
            ("{}", "{}"),
        ],
    )
    def test_row_5_arguments_are_text(self, arguments: object, right: str) -> None:
        call = CALL | {"function": {"name": "f", "arguments": arguments, "x": 1}}
        message = choice_of(said(text(None, tool_calls=[call])))["message"]
        assert message["tool_calls"] == [CALL | {"function": {"name": "f", "arguments": right, "x": 1}}]

    def test_row_5_arguments_missing(self) -> None:
        message = choice_of(said(text(None, tool_calls=[CALL | {"function": {"name": "f"}}])))["message"]
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}

    @pytest.mark.parametrize("told", [{}, {"id": None}, {"id": ""}, {"id": "null"}, {"id": 5}])
    def test_an_id_is_made(self, told: Json) -> None:
        call = {"type": "function", "function": CALL["function"]} | told
        [found] = choice_of(said(text(None, tool_calls=[call])))["message"]["tool_calls"]
        assert MADE_CALL.fullmatch(found["id"])

    def test_ids_are_not_given_twice(self) -> None:
        calls = choice_of(said(text(None, tool_calls=[CALL, CALL, CALL])))["message"]["tool_calls"]
        assert calls[0] == CALL
        assert len({call["id"] for call in calls}) == 3

    @pytest.mark.parametrize("told", [{}, {"type": None}, {"type": ""}, {"type": 5}])
    def test_the_type(self, told: Json) -> None:
        function = {"id": "call_1", "function": CALL["function"]} | told
        custom = {"id": "call_2", "custom": {"name": "f", "input": "x"}} | told
        calls = choice_of(said(text(None, tool_calls=[function, custom])))["message"]["tool_calls"]
        assert [call["type"] for call in calls] == ["function", "custom"]

    def test_other_fields_stay(self) -> None:
        call = CALL | {"index": 3, "extra_content": {"google": {"thought_signature": "x"}}}
        assert choice_of(said(text(None, tool_calls=[call]), "tool_calls"))["message"]["tool_calls"] == [call]


REASONS = [
    *((word, "stop") for word in ("eos", "EOS_TOKEN", "end_turn", "stop_sequence", "COMPLETE", "Stop", "?", " stop ")),
    *((word, "length") for word in ("MAX_TOKENS", "max_tokens", "model_length", "Length", "max-tokens")),
    *((word, "tool_calls") for word in ("tool_use", "tool_call", "tool-calls", "TOOL_CALLS")),
    *((word, "content_filter") for word in ("content_filtered", "SAFETY", "content-filter", "RECITATION", "sensitive")),
]


class TestFinishReasons:
    @pytest.mark.parametrize("told", [{}, {"finish_reason": None}, {"finish_reason": ""}, {"finish_reason": 5}])
    def test_row_8_missing(self, told: Json) -> None:
        bare = {"index": 0, "message": text()} | told
        assert choice_of(bare)["finish_reason"] == "stop"
        assert choice_of(bare | {"message": text(None, tool_calls=[CALL])})["finish_reason"] == "tool_calls"

    def test_row_8_stop_with_tool_calls(self) -> None:
        assert choice_of(said(text(None, tool_calls=[CALL]), "stop")) == said(
            text(None, tool_calls=[CALL]), "tool_calls"
        )
        assert choice_of(said(text(None, tool_calls=[CALL]), "eos"))["finish_reason"] == "tool_calls"

    @pytest.mark.parametrize("reason", ["length", "content_filter"])
    def test_row_8_a_truth_stays_true_beside_tool_calls(self, reason: str) -> None:
        assert choice_of(said(text(None, tool_calls=[CALL]), reason))["finish_reason"] == reason

    @pytest.mark.parametrize(("word", "right"), REASONS)
    def test_row_9_foreign_words(self, word: str, right: str) -> None:
        assert choice_of(said(text(), word)) == said(text(), right)

    @pytest.mark.parametrize("word", ["insufficient_system_resource", "error", "aborted", "abort", "ERROR"])
    def test_an_upstream_that_gave_up_has_failed(self, word: str) -> None:
        with pytest.raises(StreamedError) as caught:
            repaired(reply(said(text(), word)))
        failure = streamed_error(caught.value.error)
        assert (failure.status, failure.upstream_status) == (503, 503)
        assert word.lower() in failure.message

    def test_with_its_own_words(self) -> None:
        error = {"code": 502, "message": "Provider disconnected", "metadata": {}}
        with pytest.raises(StreamedError) as caught:
            repaired(reply(said(text(), "error", error=error)))
        assert caught.value.error == error


class TestNames:
    @pytest.mark.parametrize("told", [{}, {"id": ""}, {"id": None}, {"id": 5}])
    def test_id(self, told: Json) -> None:
        data = {key: value for key, value in reply(said(text())).items() if key != "id"} | told
        assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", repaired(data)["id"])

    @pytest.mark.parametrize(
        ("key", "bad"),
        [(key, bad) for key in ("object", "model", "created") for bad in (None, "", 0, [])],
    )
    def test_object_model_and_created(self, key: str, bad: object) -> None:
        given = {"model": "fast", "at": 7}
        right = {"object": "chat.completion", "model": "fast", "created": 7}
        assert repaired(reply(said(text()), **{key: bad}), **given)[key] == right[key]
        missing = {inner: value for inner, value in reply(said(text())).items() if inner != key}
        assert repaired(missing, **given)[key] == right[key]

    def test_what_nobody_knows_stays(self) -> None:
        data = reply(said(text()), model="", created=0)
        assert repaired(data) == data

    def test_a_fraction_of_a_second(self) -> None:
        assert repaired(reply(said(text()), created=1767225600.75))["created"] == 1767225600

    @pytest.mark.parametrize("word", ["on_demand", "standard", "performance", "", 5])
    def test_row_9_service_tier(self, word: object) -> None:
        assert repaired(reply(said(text()), service_tier=word)) == reply(said(text()), service_tier="default")

    @pytest.mark.parametrize("word", ["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"])
    def test_row_9_service_tiers_of_openai(self, word: str) -> None:
        assert repaired(reply(said(text()), service_tier=word))["service_tier"] == word


class TestUsage:
    @pytest.mark.parametrize(
        ("told", "right"),
        [
            (USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None}, USAGE),
            (
                USAGE | {"prompt_tokens_details": {"cached_tokens": None, "audio_tokens": 1}},
                USAGE | {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 1}},
            ),
            (
                USAGE | {"completion_tokens_details": {"reasoning_tokens": None}},
                USAGE | {"completion_tokens_details": {"reasoning_tokens": 0}},
            ),
            (USAGE | {"prompt_tokens_details": []}, USAGE),
            (USAGE | {"completion_tokens": None}, {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 7}),
            (USAGE | {"total_tokens": None}, USAGE),
            (USAGE | {"total_tokens": "7"}, USAGE),
            ({"prompt_tokens": 3, "completion_tokens": 4}, USAGE),
            ({"prompt_tokens": 3}, {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}),
            (
                USAGE | {"prompt_cache_hit_tokens": None, "cost": None},
                USAGE | {"prompt_cache_hit_tokens": 0, "cost": None},
            ),
        ],
    )
    def test_row_29_null_is_zero(self, told: Json, right: Json) -> None:
        assert repaired(reply(said(text()), usage=told))["usage"] == right

    @pytest.mark.parametrize(
        "told",
        [
            {},
            [],
            "7",
            USAGE | {"prompt_tokens": -1},
            USAGE | {"completion_tokens": 10**12},
            USAGE | {"completion_tokens": 10**30},
            USAGE | {"prompt_tokens": "3"},
            USAGE | {"prompt_tokens": None},
            {"completion_tokens": 4},
        ],
    )
    def test_what_cannot_be_true_is_taken_out(self, told: object) -> None:
        """A99."""
        assert repaired(reply(said(text()), usage=told)) == NAME | {"choices": [said(text())]}

    def test_groqs(self) -> None:
        groq = {"x_groq": {"id": "req_1", "usage": USAGE | {"total_time": 0.5}}}
        data = NAME | {"choices": [said(text())]} | groq
        assert repaired(data)["usage"] == USAGE | {"total_time": 0.5}
        assert repaired(data | {"usage": None})["usage"]["total_time"] == 0.5
        other = USAGE | {"prompt_tokens": 9}
        assert repaired(data | {"usage": other})["usage"] == other


class TestTexts:
    """The older completions."""

    def test_all_at_once(self) -> None:
        found = repaired({"choices": [{"text": "a"}, {"text": None, "finish_reason": "eos"}]}, model="m", at=7)
        assert re.fullmatch(r"cmpl-[0-9a-f]{24}", found.pop("id"))
        assert found == {
            "object": "text_completion",
            "created": 7,
            "model": "m",
            "choices": [
                {"text": "a", "index": 0, "finish_reason": "stop"},
                {"text": "", "index": 1, "finish_reason": "stop"},
            ],
        }


_KEYS = ["id", "object", "created", "model", "choices", "usage", "x_groq", "service_tier", "index", "message", "role"]
_KEYS += ["content", "tool_calls", "function", "name", "arguments", "finish_reason", "reasoning", "text", "type"]
_KEYS += ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "stop", "assistant", "x", "eos"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=6),
    max_leaves=20,
)
_MESSAGES = st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4)
_CHOICES = st.fixed_dictionaries({}, optional={"index": _JSON, "message": _MESSAGES | _JSON, "finish_reason": _JSON})
_REPLIES = st.builds(
    lambda choices, rest: {**rest, "choices": choices},
    st.lists(_CHOICES | _JSON, max_size=3),
    st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=5),
)


_ODD = _JSON | st.sampled_from([1.5, 10**9 + 1, [None], {"cached_tokens": None}, "tool_calls", "default", USAGE])


@given(st.sampled_from(sorted(RIGHT)), st.lists(st.tuples(st.sampled_from(_KEYS), _ODD), max_size=2), st.data())
def test_what_seems_right_is_right(name: str, changes: list[tuple[str, Any]], draw: st.DataObject) -> None:
    """A look that takes no time says of nothing that it is right, if a closer one would put it right."""
    data = copy.deepcopy(RIGHT[name])
    for key, value in changes:
        parts = [part for part in [data, *_inside(data)] if isinstance(part, dict)]
        part = draw.draw(st.sampled_from(parts))
        if value is None and draw.draw(st.booleans()):
            part.pop(key, None)
        else:
            part[key] = copy.deepcopy(value)
    usage = repair._usage_if_right(data)
    if usage is not None:
        assert usage == Usage.read(data["usage"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repair, "_usage_if_right", lambda data: None)
            before = Completion(json.dumps(data).encode(), data)
            assert repair.completion(before) is before


def _inside(data: Json) -> list[Any]:
    choices = data["choices"] if isinstance(data["choices"], list) else []
    return [data.get("usage"), *choices, *(choice.get("message") for choice in choices if isinstance(choice, dict))]


def test_the_usual_reply_seems_right_and_one_with_a_count_for_details_does_not() -> None:
    usual = RIGHT["text"]
    assert repair._usage_if_right(usual) == Usage.read(USAGE)
    assert repair._usage_if_right(usual | {"usage": USAGE | {"prompt_tokens_details": 3}}) is None


_DETAILS = st.dictionaries(
    st.sampled_from(["cached_tokens", "audio_tokens", "reasoning_tokens"]), st.sampled_from([0, 0, 3, 9, None, 1.0, ""])
)
_USAGES = st.fixed_dictionaries(
    {"prompt_tokens": st.sampled_from([7, 7, 0, -1, 10**9 + 1, True, 7.0, None])},
    optional={
        "completion_tokens": st.sampled_from([5, 5, 0, -1, 10**9 + 1, None]),
        "total_tokens": st.sampled_from([12, 12, 0, -1, None]),
        "prompt_tokens_details": _DETAILS | st.sampled_from([None, 3, []]),
        "completion_tokens_details": _DETAILS | st.sampled_from([None, 3, []]),
        "prompt_cache_hit_tokens": st.just(2),
    },
)


@given(_USAGES)
def test_usage_that_is_told_in_the_usual_words_is_right_and_read_so(told: Json) -> None:
    usual = repair._usual_usage(told)
    if usual is not None:
        assert repair._is_right_usage(told)
        assert usual == Usage.read(told)


@pytest.mark.parametrize(("cached", "kept"), [(0, 0), (3, 3)])
def test_the_usual_words(cached: int, kept: int) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": cached}, "completion_tokens_details": {"audio_tokens": 0}}
    usage = repair._usual_usage({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, **details})
    assert usage == Usage(7, 5, cached_tokens=kept)


@given(_REPLIES)
def test_anything_becomes_what_openais_sdk_takes_and_stays_so(data: Json) -> None:
    found = repaired(data, model="m", at=5)
    again = Completion(json.dumps(found).encode(), found)
    assert repair.completion(again, model="m", at=5) is again
    for choice in found["choices"]:
        assert type(choice["index"]) is int
        assert choice["finish_reason"] in {"stop", "length", "tool_calls", "content_filter", "function_call"}
        message = choice.get("message")
        for call in message.get("tool_calls", ()) if isinstance(message, dict) else ():
            assert call["id"]
            assert call["type"]
            assert isinstance(call.get("function", {"arguments": ""})["arguments"], str)
    assert found.get("usage") is None or Usage.read(found["usage"]) is not None


@pytest.mark.parametrize("name", RIGHT)
def test_the_examples_of_right_are_right(name: str) -> None:
    data = {key: value for key, value in RIGHT[name].items() if key != "usage"}
    kind = TextCompletion if data["object"] == "text_completion" else ChatCompletion
    if name != "parts":  # Mistral's; typed clients of OpenAI do not know them
        kind.model_validate(data)
