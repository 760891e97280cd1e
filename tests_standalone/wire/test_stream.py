"""A chat stream by example: the upstream's chunks in, the client's bytes out, one rule at a time."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder as OpenAIsDecoder
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from gateway.backends.openai import OpenAIDecoder
from gateway.wire import WireError, splice, sse
from gateway.wire.chat import Chunk, Usage
from gateway.wire.chunk_edit import with_last_words
from gateway.wire.jsontext import dumps
from gateway.wire.stream import ChatStream, StreamedError
from tests_standalone.wire_samples import sample

Json = dict[str, Any]

FALLBACK = Usage(100, 200)
"""What the relay estimates for an upstream that told nothing."""
EXTRA = {"conversation_id": "conv_1", "timings": {"predicted_n": 6}}
RIGHT = ("openai_text", "openai_tool_calls", "deepseek", "llama_cpp", "two_choices")
BROKEN = ("azure", "groq", "vllm", "mistral", "openrouter", "gemini_compat", "local_tools", "qwen")
SAMPLES = (*RIGHT, *BROKEN)
WHOLE = tuple(name for name in SAMPLES if name not in ("llama_cpp", "two_choices"))
"""Whose answers are whole: openai's helper raises for the others, as it should."""
MADE_ID = re.compile(rb"(?<=call_)[0-9a-f]{24}")
TEXT = re.compile(rb'"content":"[^"]')


def chunk(delta: Json | None = None, finish_reason: str | None = None, index: int = 0, **more: Any) -> Json:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]} | more


def usage_chunk(usage: object, **more: Any) -> Json:
    return chunk() | {"choices": [], "usage": usage} | more


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
HELLO = chunk({"role": "assistant", "content": "Hello"})
STOP = chunk({}, "stop")
ONLY_STOP = chunk({"role": "assistant"}, "stop")
"""Of a stream that has no other chunk: the first one says the role."""
NAMED = b'"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'


def run(*chunks: Json | bytes, wants_usage: bool = False, **end: Any) -> bytes:
    """The whole stream as the client gets it."""
    stream = ChatStream(wants_usage=wants_usage)
    leaving = stream.feed([item if isinstance(item, Chunk) else made(item) for item in chunks])
    return leaving + finish(stream, **end)


def made(item: Json | bytes) -> Chunk:
    return Chunk(raw=item) if isinstance(item, bytes) else Chunk(raw=json.dumps(item).encode())


def finish(stream: ChatStream, cost: object = 0.25, extra: Json | None = None) -> bytes:
    return stream.end(stream.usage or FALLBACK, cost, EXTRA if extra is None else extra)


def read(stream: bytes) -> list[Json]:
    """As openai's SDK reads it. The last event is `[DONE]`, and there is one."""
    events = [event.data for event in OpenAIsDecoder().iter_bytes(iter([stream]))]
    assert events.pop() == "[DONE]"
    assert "[DONE]" not in events
    return [json.loads(event) for event in events]


def joined(chunks: list[Json]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of the tool calls, as helpers collect them: by index, everything concatenated."""
    calls: dict[int, tuple[str, str, str]] = {}
    for item in chunks:
        for piece in (piece for choice in item["choices"] for piece in choice["delta"].get("tool_calls") or ()):
            told_id, name, arguments = calls.get(piece["index"], ("", "", ""))
            function = piece["function"]
            calls[piece["index"]] = (
                told_id + piece.get("id", ""),
                name + function.get("name", ""),
                arguments + function.get("arguments", ""),
            )
    return [calls[index] for index in sorted(calls)]


def chunks_of(name: str) -> list[Chunk]:
    return OpenAIDecoder().feed(sample(name))


def right(raw: bytes) -> bytes:
    """With what a chunk needs so that nothing about it has to be repaired: a name, an index, a delta, a role."""
    found = re.sub(rb'"choices": ?\[\{', NAMED + rb'\g<0>"index":0,"delta":{"role":"assistant"},', raw)
    return found.replace(b"},}", b"}}")


class TestNotAsked:
    """The client did not ask for usage; we did."""

    def test_chunks_leave_at_once_and_as_they_came(self) -> None:
        stream = ChatStream(wants_usage=False)
        raw = right(b'{ "choices":[{"content":"\\u00e9", "x":1.0} ] }')
        assert stream.feed([Chunk(raw=raw)]) == b"data: " + raw + b"\n\n"

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b'{"choices":[{}],"usage":null}', b'{"choices":[{}]}'),
            (b'{"choices":[{}],"usage":null,"x":1.0}', b'{"choices":[{}],"x":1.0}'),
            (b'{"usage":null,"choices":[{}]}', b'{"choices":[{}]}'),
            (b'{"choices": [{}], "usage": null}', b'{"choices": [{}]}'),
            (b'{"usage" : null , "choices":[{}]}', b'{"choices":[{}]}'),
            (b'{"choices":[{"usage":null}]}', b'{"choices":[{"usage":null}]}'),
            (b'{"choices":[{"x":1,"usage":null}],"usage":null}', b'{"choices":[{"x":1,"usage":null}]}'),
            (b'{"choices":[{"x":",\\"usage\\":null"}],"usage":null}', b'{"choices":[{"x":",\\"usage\\":null"}]}'),
            (b'{"\\"usage":null,"choices":[{}],"usage":null}', b'{"\\"usage":null,"choices":[{}]}'),
            (b'{"choices":[{}],"us\\u0061ge":null}', b'{"choices":[{}]}'),
            (b'{"usage":null,"choices":[{}],"usage":null}', b'{"choices":[{}]}'),
            (b'{"choices":[{}],"usage":{"prompt_tokens":1},"x":1.0}', b'{"choices":[{}],"x":1.0}'),
            (b'{"choices":[{}],"usage":"soon"}', b'{"choices":[{}]}'),
        ],
    )
    def test_usage_is_taken_out_and_nothing_else(self, before: bytes, after: bytes) -> None:
        leaving = ChatStream(wants_usage=False).feed([Chunk(raw=right(before))])
        assert leaving == b"data: " + right(after) + b"\n\n"

    def test_the_finish_chunk_is_held_and_carries_all(self) -> None:
        stream = ChatStream(wants_usage=False)
        assert stream.feed([made(ONLY_STOP)]) == b""
        assert stream.feed([made(usage_chunk(USAGE))]) == b""
        last = ONLY_STOP | {"usage": USAGE | {"cost": 0.25}} | EXTRA
        assert read(finish(stream)) == [last]

    def test_its_other_bytes_stay(self) -> None:
        raw = right(b'{ "choices":[{"finish_reason":"stop","x":1.0}], "usage":null }')
        out = run(raw, usage_chunk(USAGE), cost=None, extra={})
        told = b'{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,"cost":null}'
        assert out == b"data: " + raw.replace(b"null", told) + b"\n\ndata: [DONE]\n\n"

    def test_usage_on_the_finish_chunk(self) -> None:
        out = read(run(HELLO, STOP | {"usage": USAGE}))
        assert out == [HELLO, STOP | {"usage": USAGE | {"cost": 0.25}} | EXTRA]

    def test_usage_before_the_finish_chunk(self) -> None:
        out = read(run(HELLO, usage_chunk(USAGE), STOP))
        assert out == [HELLO, STOP | {"usage": USAGE | {"cost": 0.25}} | EXTRA]

    def test_usage_on_every_chunk(self) -> None:
        early = {"usage": USAGE | {"completion_tokens": 1}}
        more = chunk({"content": "more"})
        out = read(run(HELLO | early, more | early, STOP | {"usage": USAGE}))
        assert out == [HELLO, more, STOP | {"usage": USAGE | {"cost": 0.25}} | EXTRA]

    @pytest.mark.parametrize(
        "empty", [{"choices": []}, {"choices": None}, {"choices": "x"}, {"prompt_filter_results": []}]
    )
    def test_no_chunk_without_choices(self, empty: Json) -> None:
        prelude = {"id": "", "object": "", "created": 0, "model": ""} | empty
        assert ChatStream(wants_usage=False).feed([made(prelude)]) == b""
        assert len(read(run(prelude, HELLO, prelude, STOP, prelude))) == 2

    @pytest.mark.parametrize("late", [chunk({"content": ""}), chunk({"content": "late"}), chunk({}, filter={})])
    def test_a_chunk_after_the_finish_chunk_overtakes_it(self, late: Json) -> None:
        stream = ChatStream(wants_usage=False)
        assert stream.feed([made(HELLO), made(STOP)]) == run(HELLO)[: len(sse.encode([made(HELLO).raw]))]
        assert stream.feed([made(late)]) == sse.encode([made(late).raw])
        [last] = read(finish(stream))
        assert last["usage"]["cost"] == 0.25
        assert last["choices"] == STOP["choices"]

    def test_what_was_said_with_an_early_end_leaves_before_what_follows(self) -> None:
        said = [chunk({"role": "assistant", "content": "A"}), chunk({"content": "B"}), chunk({"content": "C"})]
        ended = [{**one, "choices": [{**one["choices"][0], "finish_reason": "stop"}]} for one in said]
        out = read(run(*ended, usage_chunk(USAGE)))
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in out) == "ABC"
        assert [one["choices"][0]["finish_reason"] for one in out] == [None, None, None, "stop"]
        assert out[-1]["usage"] == USAGE | {"cost": 0.25}


class TestLastWords:
    """The members that the last chunk gets stand at its end; the usage that stood elsewhere stays where it was."""

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b'{"x":1}', b'{"x":1,"usage":{"n":1},"t":2}'),
            (b'{"x":1 } ', b'{"x":1,"usage":{"n":1},"t":2} '),
            (b'{"x":1,"usage":null}', b'{"x":1,"usage":{"n":1},"t":2}'),
            (b'{"x":1,"usage": null}', b'{"x":1,"usage": {"n":1},"t":2}'),
            (b'{"x":1,"usage": {"n":{}}}', b'{"x":1,"usage": {"n":1},"t":2}'),
            (b'{"x":1,"usage":{"n":{"m":0}}}', b'{"x":1,"usage":{"n":1},"t":2}'),
            (b'{"x":1,"usage":{"n":0},"y":{}}', b'{"x":1,"usage":{"n":1},"y":{},"t":2}'),
            (b'{"usage":{"n":0},"x":{}}', b'{"usage":{"n":1},"x":{},"t":2}'),
            (b'{"x":1,"usage":{"n":0},"x":{"y":2}}', b'{"x":1,"usage":{"n":1},"x":{"y":2},"t":2}'),
            (b'{"x":{"usage":{}},"usage":null}', b'{"x":{"usage":{}},"usage":{"n":1},"t":2}'),
            (
                b'{"us\\u0061ge":null,"x":{"y":0,"usage":null}}',
                b'{"us\\u0061ge":{"n":1},"x":{"y":0,"usage":null},"t":2}',
            ),
            (b'{"t":1,"usage":null}', b'{"t":2,"usage":{"n":1}}'),
            (b'{"usage":1,"x":1,"usage":null}', b'{"usage":{"n":1},"x":1,"t":2}'),
        ],
    )
    def test_examples(self, before: bytes, after: bytes) -> None:
        words = {"usage": {"n": 1}, "t": 2}
        assert with_last_words(before, json.loads(before), words) == after
        assert splice.edit(before, json.loads(before), {key: dumps(word) for key, word in words.items()}) == after


class TestAsked:
    """The client asked for the usage chunk."""

    def test_chunks_leave_as_they_came(self) -> None:
        for raw in (
            right(b'{"choices":[{}], "usage":null}'),
            right(b'{ "choices":[{"finish_reason":"stop"}] }'),
        ):
            assert ChatStream(wants_usage=True).feed([Chunk(raw=raw)]) == b"data: " + raw + b"\n\n"

    def test_the_usage_chunk_is_held_and_carries_all(self) -> None:
        stream = ChatStream(wants_usage=True)
        assert read(stream.feed([made(ONLY_STOP)]) + b"data: [DONE]\n\n") == [ONLY_STOP]
        assert stream.feed([made(usage_chunk(USAGE, x=1))]) == b""
        assert read(finish(stream)) == [usage_chunk(USAGE | {"cost": 0.25}, x=1) | EXTRA]

    @pytest.mark.parametrize("finishing", [STOP, chunk({"content": "!"}, "length")])
    def test_usage_on_the_finish_chunk_moves_to_a_chunk_of_its_own(self, finishing: Json) -> None:
        out = read(run(HELLO, finishing | {"usage": USAGE}, wants_usage=True))
        assert out == [HELLO, finishing | {"usage": None}, usage_chunk(USAGE | {"cost": 0.25}) | EXTRA]

    def test_usage_on_every_chunk_appears_once(self) -> None:
        told = {"usage": USAGE}
        out = read(run(HELLO | told, STOP | told, usage_chunk(USAGE), wants_usage=True))
        assert [item["usage"] for item in out] == [None, None, USAGE | {"cost": 0.25}]

    def test_several_usage_chunks_become_the_last_one(self) -> None:
        early = usage_chunk(USAGE | {"completion_tokens": 1})
        out = read(run(early, HELLO, early, STOP, usage_chunk(USAGE), wants_usage=True))
        assert out == [HELLO, STOP, usage_chunk(USAGE | {"cost": 0.25}) | EXTRA]

    @pytest.mark.parametrize("choices", [{}, {"choices": None}])
    def test_choices_are_always_there(self, choices: Json) -> None:
        told = {"id": "c", "usage": USAGE} | choices
        assert read(run(STOP, told, wants_usage=True))[-1]["choices"] == []

    def test_no_other_chunk_without_choices(self) -> None:
        assert ChatStream(wants_usage=True).feed([made(chunk() | {"choices": []})]) == b""
        assert ChatStream(wants_usage=True).feed([made(usage_chunk(None))]) == b""


class TestTwoChoices:
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_only_the_last_chunk_is_held(self, wants_usage: bool) -> None:
        chunks = chunks_of("two_choices")
        out = read(run(*(item.data for item in chunks), wants_usage=wants_usage))
        reasons = [choice["finish_reason"] for item in out for choice in item["choices"]]
        assert reasons == [None, None, None, None, "stop", None, "length"]
        assert ["conversation_id" in item for item in out] == [False] * (len(out) - 1) + [True]
        assert [item for item in out if item.get("usage")] == out[-1:]

    def test_the_first_finish_chunk_leaves_when_the_second_choice_goes_on(self) -> None:
        stream = ChatStream(wants_usage=False)
        first, second = ONLY_STOP, chunk({"role": "assistant", "content": "x"}, None, 1)
        assert stream.feed([made(first)]) == b""
        assert read(stream.feed([made(second)]) + b"data: [DONE]\n\n") == [first, second]

    def test_both_end_in_one_chunk(self) -> None:
        both = STOP | {"choices": [*STOP["choices"], chunk({"role": "assistant"}, "length", 1)["choices"][0]]}
        assert read(run(HELLO, both))[-1] == both | {"usage": FALLBACK.to_openai() | {"cost": 0.25}} | EXTRA

    def test_finished_when_all_that_were_seen_are(self) -> None:
        stream = ChatStream(wants_usage=False)
        assert not stream.finished
        stream.feed([made(chunk({"role": "assistant"}, index=index)) for index in (0, 1)])
        stream.feed([made(chunk({}, "stop", 0))])
        assert not stream.finished
        stream.feed([made(chunk({}, "length", 1))])
        assert stream.finished
        assert stream.finish_reason == "stop"


class TestBrokenUpstreams:
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_without_usage_it_is_what_the_end_is_given(self, wants_usage: bool) -> None:
        stream = ChatStream(wants_usage=wants_usage)
        out = stream.feed([made(HELLO), made(STOP)])
        assert stream.usage is None
        last = read(out + finish(stream))[-1]
        assert last["usage"] == {"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300, "cost": 0.25}
        assert last["choices"] == ([] if wants_usage else STOP["choices"])
        assert last["conversation_id"] == "conv_1"

    @pytest.mark.parametrize("bad", [{}, {"prompt_tokens": -1}, {"prompt_tokens": 10**30}, {"prompt_tokens": "3"}])
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_usage_that_cannot_be_true_is_not_passed_on(self, wants_usage: bool, bad: Json) -> None:
        """A99."""
        told = {"completion_tokens": 4} | bad
        assert read(run(STOP, usage_chunk(told), wants_usage=wants_usage))[-1]["usage"]["prompt_tokens"] == 100
        out = read(run(STOP, usage_chunk(USAGE), usage_chunk(told), wants_usage=wants_usage))
        assert out[-1]["usage"] == USAGE | {"cost": 0.25}

    def test_a_missing_count_is_added(self) -> None:
        last = read(run(STOP, usage_chunk({"prompt_tokens": 3, "completion_tokens": 4, "x": 5})))[-1]
        assert last["usage"] == USAGE | {"x": 5, "cost": 0.25}

    @pytest.mark.parametrize("wants_usage", [False, True])
    @pytest.mark.parametrize("said", [None, ""])
    def test_without_finish_reason_one_is_made_up(self, wants_usage: bool, said: str | None) -> None:
        out = read(run(HELLO, chunk({}, said), wants_usage=wants_usage))
        reasons = [choice["finish_reason"] for item in out for choice in item["choices"]]
        assert reasons == [None, None, "stop"]
        assert {item["id"] for item in out} == {"c"}
        assert out[-1]["usage"]["cost"] == 0.25

    def test_after_tool_calls_it_says_so(self) -> None:
        call = {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": "{}"}}]}
        assert read(run(chunk(call)))[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_with_nothing_at_all(self) -> None:
        for wants_usage in (False, True):
            out = read(run(wants_usage=wants_usage))
            assert out[0]["choices"] == [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": "stop"}]
            assert out[-1]["usage"]["total_tokens"] == 300

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            ({"error": {"message": "no", "code": 502}}, {"message": "no", "code": 502}),
            ({"error": "no"}, "no"),
            ({"object": "error", "message": "no"}, {"object": "error", "message": "no"}),
            (HELLO | {"object": "error"}, HELLO | {"object": "error"}),
            (HELLO | {"error": {"message": "no"}}, {"message": "no"}),
            ({"code": "c", "error": "no"}, {"code": "c", "error": "no"}),
            ({"message": "no", "type": "t"}, {"message": "no", "type": "t"}),
            ({"detail": "no"}, {"detail": "no"}),
        ],
    )
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_an_error_object_is_raised(self, data: Json, error: object, wants_usage: bool) -> None:
        stream = ChatStream(wants_usage=wants_usage)
        stream.feed([made(HELLO)])
        with pytest.raises(StreamedError) as caught:
            stream.feed([made(data)])
        assert caught.value.error == error
        assert stream.answer.message()["content"] == "Hello"

    def test_an_error_that_is_null_is_none(self) -> None:
        assert ChatStream(wants_usage=False).feed([made(HELLO | {"error": None})]) != b""

    def test_an_upstream_that_gives_up(self) -> None:
        stream = ChatStream(wants_usage=False)
        with pytest.raises(StreamedError) as caught:
            stream.feed([made(chunk({}, "insufficient_system_resource"))])
        assert caught.value.error["code"] == 503  # type: ignore[index]

    def test_words_beside_usage_or_timings_are_no_error(self) -> None:
        for beside in ({"usage": USAGE}, {"timings": {}}):
            assert ChatStream(wants_usage=False).feed([made({"message": "no"} | beside)]) == b""

    def test_row_29_null_in_usage(self) -> None:
        told = USAGE | {"prompt_tokens_details": {"cached_tokens": None}, "completion_tokens_details": None}
        for wants_usage in (False, True):
            last = read(run(HELLO, STOP, usage_chunk(told), wants_usage=wants_usage))[-1]
            assert last["usage"] == USAGE | {"prompt_tokens_details": {"cached_tokens": 0}, "cost": 0.25}

    @pytest.mark.parametrize(
        ("later", "counts"),
        [({"prompt_tokens": 0, "completion_tokens": 0}, Usage(3, 4)), ({"completion_tokens": 0}, Usage(3, 4))],
    )
    def test_usage_that_shrinks(self, later: Json, counts: Usage) -> None:
        """A99."""
        stream = ChatStream(wants_usage=True)
        stream.feed([made(usage_chunk(USAGE)), made(usage_chunk(USAGE | later))])
        assert stream.usage == counts
        assert read(finish(stream))[-1]["usage"]["completion_tokens"] == counts.output_tokens

    def test_usage_of_which_one_count_shrinks_keeps_what_was_told_about_it(self) -> None:
        """A99."""
        first = {"prompt_tokens": 1000, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 900}}
        stream = ChatStream(wants_usage=True)
        stream.feed([made(usage_chunk(first)), made(usage_chunk({"prompt_tokens": 0, "completion_tokens": 20}))])
        assert (stream.usage, stream.usage_doubted) == (Usage(1000, 20, cached_tokens=900), True)

    @pytest.mark.parametrize(
        "before", [{"prompt_tokens": None, "completion_tokens": None}, {}, {"completion_tokens": 1}]
    )
    def test_who_does_not_know_the_usage_yet_tells_nothing_untrue(self, before: Json) -> None:
        stream = ChatStream(wants_usage=True)
        stream.feed([made(usage_chunk(before)), made(usage_chunk(USAGE))])
        assert (stream.usage, stream.usage_doubted) == (Usage(3, 4), False)

    def test_the_usage_chunk_has_the_name_of_the_others(self) -> None:
        told = {"id": "", "created": 0, "model": "", "choices": [], "usage": USAGE}
        last = read(run(HELLO, STOP, told, wants_usage=True))[-1]
        assert (last["id"], last["object"], last["created"], last["model"]) == ("c", "chat.completion.chunk", 1, "m")

    def test_row_5_a_call_without_arguments_and_a_stream_without_an_end(self) -> None:
        call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}
        stream = ChatStream(wants_usage=False)
        out = stream.feed([made(chunk({"role": "assistant", "tool_calls": [call]}))])
        assert stream.answer.message()["tool_calls"][0]["function"]["arguments"] == "{}"
        assert joined(read(out + finish(stream))) == [("x", "f", "{}")]

    def test_openrouter(self) -> None:
        stream = ChatStream(wants_usage=False)
        first, second = chunks_of("openrouter_error")
        assert stream.feed([first]) == sse.encode([first.raw])
        with pytest.raises(StreamedError) as caught:
            stream.feed([second])
        assert caught.value.error["code"] == 502  # type: ignore[index]

    @pytest.mark.parametrize("raw", [b"ping", b"{", b"[]", b"null", b"\xff", b'{"choices":[{"index":NaN}]}'])
    def test_what_is_no_json_object(self, raw: bytes) -> None:
        with pytest.raises(WireError, match="not valid JSON"):
            ChatStream(wants_usage=False).feed([Chunk(raw=raw)])

    def test_an_answer_without_end(self) -> None:
        stream = ChatStream(wants_usage=False)
        much = [made(chunk({"content": "x" * (1 << 20)}))]
        with pytest.raises(WireError, match="longer than any answer"):  # noqa: PT012
            for _ in range(34):
                stream.feed(much)


class TestSamples:
    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_openais_sdk_takes_every_chunk(self, name: str, wants_usage: bool) -> None:
        out = read(run(*(item.raw for item in chunks_of(name)), wants_usage=wants_usage))
        for item in out:
            ChatCompletionChunk.model_validate(item, strict=True)
        assert [item for item in out if item.get("usage")] == out[-1:]
        assert [item for item in out if not item["choices"]] == (out[-1:] if wants_usage else [])
        assert all("usage" not in item for item in out[:-1]) or wants_usage
        assert out[-1]["usage"]["cost"] == 0.25
        assert out[-1]["conversation_id"] == "conv_1"

    @pytest.mark.parametrize("name", WHOLE)
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_openais_helper_ends_up_with_what_is_recorded(self, name: str, wants_usage: bool) -> None:
        stream, state = ChatStream(wants_usage=wants_usage), ChatCompletionStreamState()
        for item in read(stream.feed(chunks_of(name)) + finish(stream)):
            state.handle_chunk(ChatCompletionChunk.model_validate(item))
        choice, message = state.get_final_completion().choices[0], stream.answer.message()
        assert (choice.finish_reason, choice.message.content or None) == (stream.finish_reason, message["content"])
        assert [
            (call.id, call.type, call.function.name, call.function.arguments)
            for call in choice.message.tool_calls or ()
        ] == [
            (call["id"], "function", call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]

    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_chunk_by_chunk_and_in_one_go_are_the_same(self, name: str, wants_usage: bool) -> None:
        whole = run(*(item.raw for item in chunks_of(name)), wants_usage=wants_usage)
        stream = ChatStream(wants_usage=wants_usage)
        out = b"".join(stream.feed([item]) for item in chunks_of(name)) + finish(stream)
        assert MADE_ID.sub(b"", out) == MADE_ID.sub(b"", whole)

    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_a_cut_at_any_byte_changes_nothing(self, name: str, wants_usage: bool) -> None:
        source = sample(name)
        whole = MADE_ID.sub(b"", run(*(item.raw for item in chunks_of(name)), wants_usage=wants_usage))
        for cut in range(len(source)):
            decoder, stream = OpenAIDecoder(), ChatStream(wants_usage=wants_usage)
            out = stream.feed(decoder.feed(source[:cut])) + stream.feed(decoder.feed(source[cut:]))
            assert MADE_ID.sub(b"", out + finish(stream)) == whole, cut

    @pytest.mark.parametrize("name", SAMPLES)
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_every_text_leaves_with_its_chunk(self, name: str, wants_usage: bool) -> None:
        stream = ChatStream(wants_usage=wants_usage)
        for item in chunks_of(name):
            if TEXT.search(item.raw):
                assert TEXT.search(stream.feed([item]))
            else:
                stream.feed([item])

    @pytest.mark.parametrize(
        ("name", "usage", "message"),
        [
            ("openai_text", Usage(12, 6, cached_tokens=8), {"content": "Grüße, world 🌍!"}),
            ("openai_tool_calls", Usage(71, 24, cached_tokens=8), {"content": None}),
            (
                "deepseek",
                Usage(9, 15, cached_tokens=4, reasoning_tokens=11),
                {"content": "你好", "reasoning_content": "The user says 你好."},
            ),
            ("llama_cpp", Usage(7, 1), {"content": "Hi"}),
            ("two_choices", Usage(5, 3), {"content": "one"}),
            ("azure", Usage(8, 3), {"content": "Good day."}),
            ("groq", Usage(11, 4), {"content": "Fast, indeed."}),
            ("vllm", Usage(17, 5), {"content": "Yes!", "reasoning_content": "So far.", "reasoning": "So far."}),
            ("mistral", Usage(90, 30), {"content": None}),
            (
                "openrouter",
                Usage(5, 8, reasoning_tokens=4),
                {"content": 'It is "so".', "reasoning_content": "Hm, so", "reasoning": "Hm, so"},
            ),
            ("gemini_compat", Usage(40, 20), {"content": None}),
            ("local_tools", Usage(30, 12), {"content": "Let me see."}),
            ("qwen", Usage(22, 9), {"content": None}),
        ],
    )
    def test_what_the_record_gets(self, name: str, usage: Usage, message: Json) -> None:
        stream = ChatStream(wants_usage=False)
        stream.feed(chunks_of(name))
        assert stream.usage == usage
        assert stream.finished
        assert stream.answer.message().items() >= message.items()

    @pytest.mark.parametrize(
        ("name", "functions"),
        [
            ("openai_tool_calls", [("get_weather", '{"city":"Zürich"}'), ("get_time", "{}")]),
            ("mistral", [("get_weather", '{"city": "Köln"}'), ("get_time", "{}")]),
            ("gemini_compat", [("get_weather", '{"city":"Bern"}'), ("get_time", "{}")]),
            ("local_tools", [("look", '{"where":"hier"}'), ("look", "{}")]),
            ("qwen", [("get_weather", '{"city": "Bern"}')]),
        ],
    )
    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_tool_calls_for_the_client_and_for_the_record(
        self, name: str, functions: list[tuple[str, str]], wants_usage: bool
    ) -> None:
        stream = ChatStream(wants_usage=wants_usage)
        out = read(stream.feed(chunks_of(name)) + finish(stream))
        assert stream.finish_reason == "tool_calls"
        calls = stream.answer.message()["tool_calls"]
        assert [(item["function"]["name"], item["function"]["arguments"]) for item in calls] == functions
        assert joined(out) == [(item["id"], *function) for item, function in zip(calls, functions, strict=True)]

    @pytest.mark.parametrize("name", RIGHT)
    def test_right_chunks_keep_their_bytes(self, name: str) -> None:
        stream = ChatStream(wants_usage=True)
        for item in chunks_of(name):
            out = stream.feed([item])
            assert out == sse.encode([item.raw]) or isinstance(item.data.get("usage"), dict)

    @pytest.mark.parametrize("wants_usage", [False, True])
    def test_the_older_completions(self, wants_usage: bool) -> None:
        def stream() -> ChatStream:
            return ChatStream(wants_usage=wants_usage, operation="completions")

        source, once = sample("completions"), stream()
        whole = once.feed(chunks_of("completions")) + finish(once)
        assert [choice["text"] for item in read(whole) for choice in item["choices"]] == [
            *("Once", " upon", ' a "time"', "")
        ]
        for cut in range(len(source)):
            decoder, cutting = OpenAIDecoder(), stream()
            out = cutting.feed(decoder.feed(source[:cut])) + cutting.feed(decoder.feed(source[cut:]))
            assert out + finish(cutting) == whole, cut
        assert once.answer.message() == {"role": "assistant", "content": 'Once upon a "time"'}
        assert (once.usage, once.finish_reason) == (Usage(1, 4), "length")

    def test_the_older_completions_without_an_end(self) -> None:
        stream = ChatStream(wants_usage=False, operation="completions", model="m", at=7)
        out = read(stream.feed([made({"choices": [{"text": "a"}]})]) + finish(stream))
        assert [(item["object"], item["model"], item["created"]) for item in out] == [("text_completion", "m", 7)] * 2
        assert out[1]["choices"] == [{"index": 0, "text": "", "finish_reason": "stop"}]

    def test_the_upstreams_timings_are_told(self) -> None:
        stream = ChatStream(wants_usage=False)
        stream.feed(chunks_of("llama_cpp"))
        assert stream.timings == chunks_of("llama_cpp")[-1].data["timings"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
_USAGES = st.fixed_dictionaries({"prompt_tokens": _JSON, "completion_tokens": _JSON}) | _JSON
_DELTAS = st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), _JSON, max_size=2) | _JSON
_CHOICES = st.dictionaries(st.sampled_from(["index", "finish_reason", "x"]), _JSON, max_size=3).flatmap(
    lambda choice: _DELTAS.map(lambda delta: choice | {"delta": delta})
)
_CHUNKS = st.fixed_dictionaries(
    {"choices": st.lists(_CHOICES | _JSON, max_size=3) | _JSON},
    optional={"usage": _USAGES, "id": _JSON, "timings": _JSON, "object": _JSON, "x": _JSON},
)


@given(st.lists(_CHUNKS, max_size=6), st.booleans(), st.booleans())
def test_any_chunks_leave_a_stream_that_keeps_the_rules(chunks: list[Json], wants_usage: bool, in_bytes: bool) -> None:
    stream = ChatStream(wants_usage=wants_usage)
    out = b"".join(stream.feed([made(item) if in_bytes else Chunk(data=item)]) for item in chunks)
    items = read(out + finish(stream))
    assert all(isinstance(item["choices"], list) for item in items)
    assert all(item["choices"] for item in items[:-1])
    assert [item for item in items if isinstance(item.get("usage"), dict)] == items[-1:]
    assert items[-1]["usage"].keys() >= {"prompt_tokens", "completion_tokens", "total_tokens", "cost"}
    if wants_usage:
        assert items[-1]["choices"] == []
    else:
        assert all("usage" not in item for item in items[:-1])
