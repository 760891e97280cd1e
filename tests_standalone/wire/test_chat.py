"""Chat requests, chunks and usage by example: what is checked, what is changed, and that the rest rides along."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest, BodyTooLarge
from gateway.wire import chat
from gateway.wire.body import check_members, parsed
from gateway.wire.chat import ChatRequest, Chunk, Usage, text_of
from gateway.wire.jsontext import dumps

READ = (
    *("model", "messages", "stream", "stream_options", "conversation_id", "user", "safety_identifier", "tools"),
    *("max_tokens", "max_completion_tokens", "n", "top_logprobs"),
)
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def parse(**fields: Any) -> ChatRequest:
    return ChatRequest.parse(dumps(HELLO | fields))


def refusal(raw: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        ChatRequest.parse(raw)
    return caught.value


class TestReading:
    def test_what_the_gateway_acts_on(self) -> None:
        request = parse(stream=True, n=3, stream_options={"include_usage": True})
        assert request.model == "m"
        assert request.messages == HELLO["messages"]
        assert (request.stream, request.choice_count, request.wants_usage) == (True, 3, True)

    def test_what_is_left_out(self) -> None:
        request = ChatRequest.parse(b'{"messages":[{"role":"user"}]}')
        assert request.model is None
        assert (request.stream, request.choice_count, request.wants_usage) == (False, 1, False)

    def test_it_is_told_anew_of_a_request_that_was_changed(self) -> None:
        request = parse(stream=True)
        assert request.with_model("another").model == "another"
        assert not request.with_fields(stream=b"false").stream
        left = request.with_fields(stream=None, model=None)
        assert (left.stream, left.model) == (False, None)

    @pytest.mark.parametrize(
        "key",
        [key for key in READ if key != "messages"],
    )
    def test_null_is_absent(self, key: str) -> None:
        request = parse(**{key: None})
        assert (request.stream, request.choice_count, request.wants_usage) == (False, 1, False)

    def test_fields_nobody_here_knows_survive_to_the_byte(self) -> None:
        raw = b'{ "x": 1.10, "messages":[ {"role":"user","content":"\\u00e9","y":[1.0, 1e2]} ],\n"z": {"a" :"\\/"} }'
        assert ChatRequest.parse(raw).raw is raw

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "user", "content": "text"},
            {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {}}]},
            {"role": "system", "content": [{"type": "text", "text": "t"}]},
            {"role": "developer", "content": "t"},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "assistant", "tool_calls": []},
            {"role": "tool", "tool_call_id": "c", "content": ""},
            {"role": "a role of tomorrow", "content": []},
        ],
    )
    def test_messages_of_all_kinds(self, message: dict[str, Any]) -> None:
        assert parse(messages=[message]).messages == [message]

    @pytest.mark.parametrize("text", ["\0", "\ud83d", "\uffff", "\u2028", "😀"])
    def test_any_text(self, text: str) -> None:
        assert parse(messages=[{"role": "user", "content": text}]).messages[0]["content"] == text


class TestRefusing:
    @pytest.mark.parametrize(
        "raw",
        [b"", b"nope", b'{"messages": [}', b"[]", b'"x"', b"null", b"\xff", b"\xef\xbb\xbf{}", "{}".encode("utf-16")],
    )
    def test_no_json_object(self, raw: bytes) -> None:
        failure = refusal(raw)
        assert failure.status == 400
        assert failure.code == "invalid_json"

    @pytest.mark.parametrize("deep", [b"[" * 10**5, b"[" * 600 + b"]" * 600, b'{"a":' * 300 + b"18446744073709551616"])
    def test_nested_too_deeply(self, deep: bytes) -> None:
        assert refusal(b'{"messages":[{"role":"user"}],"big":18446744073709551615,"x":' + deep + b"}").status == 400

    @pytest.mark.parametrize(
        "number", [b"18446744073709551616", b"7" * 70, b"7" * 5000, b"1e400", b"1E+400", b"1e-400", b"NaN", b"Infinity"]
    )
    @pytest.mark.parametrize("lone", [b"", b'"\\ud83d"'])
    def test_a_number_that_cannot_be_held_is_named(self, number: bytes, lone: bytes) -> None:
        raw = b'{"messages":[{"role":"user","content":' + (lone or b'""') + b'}],"a":{"b":[0,' + number + b"]}}"
        failure = refusal(raw)
        assert (failure.param, failure.code) == ("a.b[1]", "invalid_value")
        assert "'a.b[1]'" in failure.message

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": {}}, "messages"),
            ({"messages": ["hello"]}, "messages[0]"),
            ({"messages": [{"role": "user"}, None]}, "messages[1]"),
            ({"messages": [{}]}, "messages[0].role"),
            ({"messages": [{"role": 1}]}, "messages[0].role"),
            ({"messages": [{"role": ""}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": ["t"]}]}, "messages[0].content[0]"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}, {"type": 1}]}]}, "messages[0].content[1]"),
            ({"model": 1}, "model"),
            ({"model": ["m"]}, "model"),
            ({"stream": 1}, "stream"),
            ({"stream": "true"}, "stream"),
            ({"stream_options": True}, "stream_options"),
            ({"conversation_id": 1}, "conversation_id"),
            ({"user": 1}, "user"),
            ({"safety_identifier": {}}, "safety_identifier"),
            ({"tools": {}}, "tools"),
            ({"max_tokens": "10"}, "max_tokens"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"max_tokens": 10**12}, "max_tokens"),
            ({"max_completion_tokens": []}, "max_completion_tokens"),
            ({"max_completion_tokens": -(10**12)}, "max_completion_tokens"),
            ({"top_logprobs": "5"}, "top_logprobs"),
            ({"n": 0}, "n"),
            ({"n": -1}, "n"),
            ({"n": 129}, "n"),
            ({"n": 1.0}, "n"),
            ({"n": False}, "n"),
        ],
    )
    def test_the_field_is_named(self, fields: dict[str, Any], param: str) -> None:
        failure = refusal(dumps(HELLO | fields))
        assert failure.status == 400
        assert failure.param == param
        assert param in failure.message

    def test_a_shadowed_field_does_not_count(self) -> None:
        assert ChatRequest.parse(b'{"messages":1,"messages":[{"role":"user"}]}').messages == [{"role": "user"}]
        assert refusal(b'{"messages":[{"role":"user"}],"messages":1}').param == "messages"


_NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(READ), _JSON, min_size=1, max_size=3))
def test_any_type_in_any_field_is_a_request_or_refused(fields: dict[str, Any]) -> None:
    raw = json.dumps(HELLO | fields).encode()
    try:
        request = ChatRequest.parse(raw)
    except BadRequest:
        return
    assert request.data == json.loads(request.raw)
    assert request.model is None or isinstance(request.model, str)
    assert 1 <= request.choice_count <= 128
    assert isinstance(request.stream, bool)
    assert request.asking_for_usage().wants_usage
    assert request.with_history([b'{"role":"system"}']).messages[1:] == request.messages


_PLAIN = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", ""]), "content": _JSON}), max_size=2
        )
    },
    optional={
        "model": st.sampled_from(["m", "", None]),
        "stream": st.booleans(),
        "temperature": _NUMBERS,
        "max_tokens": st.integers(-1, 2**70),
        "Model": st.just("x"),
        "n": st.integers(0, 200),
    },
)


@given(_PLAIN)
def test_what_seems_plain_has_nothing_wrong(fields: dict[str, Any]) -> None:
    raw = json.dumps(fields).encode()
    with contextlib.suppress(BadRequest):
        data = parsed(raw)
        if chat._is_plain(data):
            check_members(raw, data)
            ChatRequest._check(data)
            assert all(data[key] > 0 for key in ("max_tokens", "max_completion_tokens") if key in data)
            return
    assert not chat._is_plain(json.loads(raw))


def test_a_chat_of_texts_is_plain_and_one_with_more_is_not() -> None:
    data = HELLO | {"model": "m", "stream": True, "temperature": 0.5, "max_tokens": 9}
    assert chat._is_plain(data)
    assert not any(chat._is_plain(data | other) for other in ({"x": 1}, {"max_tokens": 0}, {"temperature": 0.0}))


@given(st.binary() | st.text('{}[]",:messagrolu 10\\').map(str.encode))
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    with contextlib.suppress(BadRequest):
        ChatRequest.parse(raw)


class TestTokenLimits:
    @pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
    @pytest.mark.parametrize("value", [0, -1, -(10**9)])
    def test_not_above_zero_is_dropped_and_nothing_else(self, key: str, value: int) -> None:
        member = f'"{key}": {value}, '
        kept = '{ "model": "é", "messages": [ {"role": "user"} ], "temperature": 1.0 }'
        request = ChatRequest.parse(kept.replace('"messages"', member + '"messages"').encode())
        assert request.raw == kept.encode()
        assert key not in request.data

    def test_both_at_once(self) -> None:
        raw = b'{"max_tokens":0,"messages":[{"role":"user"}],"max_completion_tokens":-5}'
        assert ChatRequest.parse(raw).raw == b'{"messages":[{"role":"user"}]}'

    def test_the_last_of_doubled_ones_counts(self) -> None:
        raw = b'{"messages":[{"role":"user"}],"max_tokens":5,"max_tokens":0}'
        assert ChatRequest.parse(raw).raw == b'{"messages":[{"role":"user"}]}'

    @pytest.mark.parametrize("value", [1, 10**9, None])
    def test_others_stay(self, value: int | None) -> None:
        assert parse(max_tokens=value).data["max_tokens"] == value


class TestChanging:
    RAW = b'{ "model" : "a" , "messages":[ {"role":"user", "n":1.0} ] ,"x":1e2 }'

    def test_a_field(self) -> None:
        request = ChatRequest.parse(self.RAW).with_fields(model=b'"b"')
        assert request.raw == self.RAW.replace(b'"a"', b'"b"')
        assert request.model == "b"

    def test_the_request_before_stays_as_it_was(self) -> None:
        request = ChatRequest.parse(self.RAW)
        request.with_fields(model=b'"b"', x=None, y=b"1")
        assert (request.raw, request.model) == (self.RAW, "a")

    def test_fields_come_and_go(self) -> None:
        request = ChatRequest.parse(self.RAW).with_fields(x=None, model=None, y=b"[0]", z=None)
        assert request.raw == b'{ "messages":[ {"role":"user", "n":1.0} ],"y":[0]}'
        assert request.data == json.loads(request.raw)

    def test_history_comes_before_the_own_messages(self) -> None:
        stored = [b'{"role":"user","content":"1"}', b'{"role": "assistant", "content": 2.0}']
        request = ChatRequest.parse(self.RAW).with_history(stored)
        own = b' {"role":"user", "n":1.0} '
        assert request.raw == self.RAW.replace(own, b",".join((*stored, own)))
        assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]

    def test_no_history(self) -> None:
        request = ChatRequest.parse(self.RAW)
        assert request.with_history([]) is request

    def test_history_before_doubled_messages(self) -> None:
        raw = b'{"messages":[{"role":"tool"}],"x":1.0,"messages":[{"role":"user"},{"role":"user","content":"\\ud83d"}]}'
        request = ChatRequest.parse(raw).with_history([b'{"role":"system"}'])
        assert request.data == json.loads(request.raw)
        assert [message["role"] for message in request.messages] == ["system", "user", "user"]
        assert request.raw.count(b'"messages"') == 1


class TestAskingForUsage:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (
                b'{"messages":[{"role":"user"}] }',
                b'{"messages":[{"role":"user"}],"stream_options":{"include_usage":true}}',
            ),
            (
                b'{"stream_options": null, "messages":[{"role":"user"}]}',
                b'{"stream_options": {"include_usage":true}, "messages":[{"role":"user"}]}',
            ),
            (
                b'{"stream_options":{"include_usage":false}, "messages":[ {"role":"user"}]}',
                b'{"stream_options":{"include_usage":true}, "messages":[ {"role":"user"}]}',
            ),
            (
                b'{"stream_options":{"include_obfuscation":false}, "messages":[{"role":"user"}]}',
                b'{"stream_options":{"include_obfuscation":false,"include_usage":true}, "messages":[{"role":"user"}]}',
            ),
        ],
    )
    def test_added(self, before: bytes, after: bytes) -> None:
        request = ChatRequest.parse(before)
        assert not request.wants_usage
        assert request.asking_for_usage().raw == after
        assert request.asking_for_usage().wants_usage

    def test_already_there(self) -> None:
        request = parse(stream_options={"include_usage": True})
        assert request.asking_for_usage() is request


class TestUsage:
    def test_openai(self) -> None:
        told = {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 20, "audio_tokens": 10},
            "completion_tokens_details": {"reasoning_tokens": 40, "audio_tokens": 5, "accepted_prediction_tokens": 1},
        }
        assert Usage.read(told) == Usage(100, 50, 30, 20, 10, 40, 5)

    def test_pictures_and_sound(self) -> None:
        told = {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "prompt_tokens_details": {"cached_tokens": 30, "audio_tokens": 10, "image_tokens": 20, "text_tokens": 40},
            "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": 6, "image_tokens": 7},
        }
        assert Usage.read(told) == Usage(
            *(100, 50),
            cached_tokens=30,
            audio_input_tokens=10,
            reasoning_tokens=5,
            audio_output_tokens=6,
            image_input_tokens=20,
            image_output_tokens=7,
        )

    @pytest.mark.parametrize(
        ("outside", "drawn"),
        [
            ({}, 400),
            ({"output_tokens_details": None}, 400),
            ({"output_tokens_details": {"image_tokens": 390, "text_tokens": 10}}, 390),
            ({"output_tokens_details": {"text_tokens": 400}}, 0),
        ],
        ids=["gpt-image-1", "null", "gpt-image-1.5", "only text"],
    )
    def test_a_picture_that_was_made(self, outside: dict[str, Any], drawn: int) -> None:
        inside = {"text_tokens": 100, "image_tokens": 900}
        told = {"input_tokens": 1000, "output_tokens": 400, "total_tokens": 1400, "input_tokens_details": inside}
        assert Usage.read(told | outside) == Usage(1000, 400, image_input_tokens=900, image_output_tokens=drawn)

    def test_words_from_sound_are_no_picture(self) -> None:
        told = {"input_tokens": 9, "output_tokens": 4, "input_token_details": {"text_tokens": 1, "audio_tokens": 8}}
        assert Usage.read(told) == Usage(9, 4, audio_input_tokens=8)

    @pytest.mark.parametrize(
        ("creation", "lasting"),
        [
            ({"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 40}, 40),
            ({"ephemeral_1h_input_tokens": 61}, 60),
            ({"ephemeral_1h_input_tokens": "40"}, 0),
            ({}, 0),
            (40, 0),
            (None, 0),
        ],
    )
    def test_an_hour_in_the_cache_is_a_part_of_what_was_written(self, creation: object, lasting: int) -> None:
        told = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cache_write_tokens": 60}}
        expected = Usage(100, 1, cache_write_tokens=60, cache_write_1h_tokens=lasting)
        assert Usage.read(told | {"cache_creation": creation}) == expected

    def test_deepseek(self) -> None:
        told = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5}
        assert Usage.read(told) == Usage(9, 1, cached_tokens=4)

    def test_both_at_once_are_not_added_up(self) -> None:
        told = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}, "prompt_cache_hit_tokens": 4}
        assert Usage.read(told) == Usage(9, cached_tokens=4)

    @pytest.mark.parametrize("told", [None, [], "10", 10, True, {}, {"total_tokens": 5}, {"completion_tokens": 5}])
    def test_missing(self, told: object) -> None:
        assert Usage.read(told) is None

    @pytest.mark.parametrize("bad", [None, -1, 10**30, 10**9 + 1, "5", 5.5, True, [5], {"n": 5}])
    def test_totals_that_cannot_be_true(self, bad: object) -> None:
        assert Usage.read({"prompt_tokens": bad, "completion_tokens": 1}) is None
        assert Usage.read({"prompt_tokens": 1, "completion_tokens": bad}) is None

    @pytest.mark.parametrize("bad", [None, -1, 10**30, "5", 5.5, True, [5], {}])
    def test_details_that_cannot_be_true_are_none(self, bad: object) -> None:
        kinds = ("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens", "reasoning_tokens")
        parts = dict.fromkeys(kinds, bad)
        told = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_cache_hit_tokens": bad}
        for details in (parts, bad):
            given = told | {"prompt_tokens_details": details, "completion_tokens_details": details}
            assert Usage.read(given) == Usage(7, 5)

    def test_details_larger_than_the_totals(self) -> None:
        """A99."""
        told = {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 6, "audio_tokens": 6},
            "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 3},
        }
        assert Usage.read(told) == Usage(10, 5, 6, 4, 0, 3, 2)

    @given(st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "prompt_cache_hit_tokens"]), _JSON))
    def test_anything(self, told: dict[str, Any]) -> None:
        Usage.read(told)

    @given(*[st.integers(0, 200)] * 2, *[st.lists(st.integers(0, 200), min_size=4, max_size=4)] * 2)
    def test_no_token_is_counted_twice(self, prompt: int, completion: int, ins: list[int], outs: list[int]) -> None:
        inside = dict(zip(("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens"), ins, strict=True))
        outside = dict(zip(("reasoning_tokens", "audio_tokens", "image_tokens"), outs[:3], strict=True))
        usage = Usage.read(
            {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "prompt_tokens_details": inside,
                "completion_tokens_details": outside,
                "cache_creation": {"ephemeral_1h_input_tokens": outs[3]},
            }
        )
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (prompt, completion)
        parts = (
            usage.cached_tokens,
            usage.cache_write_tokens,
            usage.audio_input_tokens,
            usage.image_input_tokens,
        )
        assert sum(parts) == min(prompt, sum(ins))
        assert usage.reasoning_tokens + usage.audio_output_tokens + usage.image_output_tokens == min(
            completion, sum(outs[:3])
        )
        assert usage.cache_write_1h_tokens == min(outs[3], usage.cache_write_tokens)

    def test_written(self) -> None:
        told = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        assert Usage(3, 4).to_openai() == told
        assert Usage.read(told) == Usage(3, 4)


class TestChunk:
    def test_bytes_and_data_are_made_from_each_other(self) -> None:
        assert Chunk(raw=b'{ "a": 1 }').data == {"a": 1}
        assert Chunk(data={"a": 1}).raw == b'{"a":1}'

    def test_bytes_stay_as_they_came(self) -> None:
        chunk = Chunk(raw=b'{ "a": 1.0 }')
        assert chunk.data == {"a": 1}
        assert chunk.raw == b'{ "a": 1.0 }'

    @pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b"null", b"1", b"[DONE]", b"\xff"])
    def test_no_object(self, raw: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            _ = Chunk(raw=raw).data


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"text": 1}, "x", None, {"text": "y"}], "y"),
        ({"text": "x"}, ""),
        (5, ""),
    ],
)
def test_text_of(content: object, text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize("many", [b"[" + b"[]," * 600_000 + b"[]]", b"{" + b'"a":1,' * 600_000 + b'"b":1}'])
def test_a_body_of_more_values_than_a_worker_has_time_for(many: bytes) -> None:
    with pytest.raises(BodyTooLarge, match="too many JSON values"):
        ChatRequest.parse(b'{"messages":[{"role":"user","content":"x"}],"x":' + many + b"}")
