"""Streams by example: these lines of Ollama's in, these chunks out, wherever the network cuts them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from gateway.backends import ollama_reply
from gateway.backends.ollama_stream import ChatDecoder, OllamaDecoder, TextDecoder
from gateway.wire import WireError, ndjson
from gateway.wire.assemble import Assembler
from gateway.wire.chat import Chunk
from tests_standalone.backends.ollama_samples import as_one, counting, sample

ENDED = [
    *("text", "crlf", "no_last_line_end", "counts_omitted", "prompt_cached", "thinking", "tools", "tools_several"),
    *("tools_in_last_line", "tools_cut", "cold_load", "length", "empty", "load", "unusual_text", "logprobs"),
    "after_done",
]
BROKEN = ["no_done", "error", "error_first"]
SHORT = ["crlf", "no_last_line_end", "no_done", "error_first", "counts_omitted"]


def decoded(*pieces: bytes, kind: type[OllamaDecoder] = ChatDecoder) -> tuple[list[dict[str, Any]], bool]:
    """The chunks' values, each of which is what its bytes say."""
    decoder = kind(counting())
    chunks: list[Chunk] = [chunk for piece in pieces for chunk in decoder.feed(piece)]
    chunks += decoder.flush()
    assert [json.loads(chunk.raw) for chunk in chunks] == [chunk.data for chunk in chunks]
    return [chunk.data for chunk in chunks], decoder.complete


def deltas(name: str) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in decoded(sample(name))[0] if chunk["choices"]]


def finish(name: str) -> str | None:
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in decoded(sample(name))[0] if chunk["choices"]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    found: str | None = reasons[-1]
    return found


class TestStream:
    def test_text(self) -> None:
        chunks, complete = decoded(sample("text"))
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1760742847, "model": "llama3.2"}
        said = [{"role": "assistant", "content": "The"}, {"content": " sky"}, {"content": " is blue."}]
        assert complete
        assert chunks == [
            *(
                head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
                for delta in said
            ),
            head | {"choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]},
            head
            | {
                "choices": [],
                "usage": {"prompt_tokens": 26, "completion_tokens": 282, "total_tokens": 308},
                "timings": {
                    "prompt_n": 26,
                    "prompt_ms": 342.546,
                    "prompt_per_second": 75.9,
                    "predicted_n": 282,
                    "predicted_ms": 4535.599,
                    "predicted_per_second": 62.17,
                    "load_ms": 1.335,
                },
            },
        ]

    def test_the_bytes_are_compact(self) -> None:
        first = ChatDecoder(counting()).feed(sample("text"))[0].raw
        assert first == (
            b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760742847,"model":"llama3.2","choices":'
            b'[{"index":0,"delta":{"role":"assistant","content":"The"},"logprobs":null,"finish_reason":null}]}'
        )

    def test_thinking_comes_before_text_even_in_one_line(self) -> None:
        assert deltas("thinking") == [
            {"role": "assistant", "reasoning_content": "Okay"},
            {"reasoning_content": ", so 2 < 3."},
            {"reasoning_content": " Done."},
            {"content": "Yes"},
            {"content": "!"},
            {},
        ]
        assert finish("thinking") == "stop"

    def test_a_tool_call(self) -> None:
        arguments = '{"city":"Zürich","days":2,"at":{"hour":[6,18]}}'
        call = {"index": 0, "id": "call_x2f9k1ab", "type": "function"}
        assert deltas("tools") == [
            {
                "role": "assistant",
                "tool_calls": [call | {"function": {"name": "get_weather", "arguments": arguments}}],
            },
            {},
        ]
        assert finish("tools") == "tool_calls"

    def test_several_tool_calls_are_counted_on_over_lines_and_get_ids(self) -> None:
        calls = [call for delta in deltas("tools_several") for call in delta.get("tool_calls", ())]
        assert [(call["index"], call["id"], call["function"]["arguments"]) for call in calls] == [
            (0, "call_1", '{"city":"Paris"}'),
            (1, "call_2", "{}"),
            (2, "call_3", '{"zone":"CET"}'),
            (3, "call_4", '{"zone":"UTC"}'),
        ]
        assert finish("tools_several") == "tool_calls"

    def test_a_tool_call_in_the_last_line(self) -> None:
        assert deltas("tools_in_last_line")[0]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
        assert finish("tools_in_last_line") == "tool_calls"

    def test_an_answer_that_was_cut_says_so_even_with_tool_calls(self) -> None:
        assert finish("length") == finish("tools_cut") == "length"

    def test_the_time_of_a_cold_load(self) -> None:
        assert decoded(sample("cold_load"))[0][-1]["timings"]["load_ms"] == 93412.346

    @pytest.mark.parametrize(
        ("name", "usage"),
        [("prompt_cached", (0, 1, 1)), ("empty", (3, 0, 3)), ("load", (0, 0, 0)), ("crlf", (0, 1, 1))],
    )
    def test_counts_that_are_left_out_are_zero(self, name: str, usage: tuple[int, ...]) -> None:
        assert tuple(decoded(sample(name))[0][-1]["usage"].values()) == usage

    def test_no_counts_for_what_was_said_is_no_usage(self) -> None:
        chunks, complete = decoded(sample("counts_omitted"))
        assert complete
        assert [chunk.get("usage") for chunk in chunks] == [None, None]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    def test_an_empty_answer_has_a_role(self) -> None:
        assert deltas("empty") == deltas("load") == [{"role": "assistant", "content": ""}]
        assert finish("empty") == finish("load") == "stop"

    def test_logprobs(self) -> None:
        chunks, _ = decoded(sample("logprobs"))
        assert [chunk["choices"][0]["logprobs"] for chunk in chunks[:3]] == [
            {
                "content": [
                    {
                        "token": "The",
                        "logprob": -0.1,
                        "bytes": [84, 104, 101],
                        "top_logprobs": [
                            {"token": "The", "logprob": -0.1, "bytes": [84, 104, 101]},
                            {"token": "A", "logprob": -2.5, "bytes": None},
                        ],
                    }
                ],
                "refusal": None,
            },
            {
                "content": [{"token": "\ufffd", "logprob": -0.2, "bytes": [240, 159], "top_logprobs": []}],
                "refusal": None,
            },
            None,
        ]
        assert deltas("logprobs")[1] == {"content": ""}

    def test_logprobs_of_a_line_are_sent_once(self) -> None:
        line = {"message": {"thinking": "Hm", "content": "Hi"}, "logprobs": [{"token": "Hi", "logprob": -1}]}
        chunks, _ = decoded(json.dumps(line).encode())
        assert [chunk["choices"][0]["logprobs"] is None for chunk in chunks] == [False, True]

    def test_an_error_line_is_an_error_chunk_and_no_end(self) -> None:
        chunks, complete = decoded(sample("error"))
        assert chunks[-1] == {"error": "an error was encountered while running the model: unexpected EOF"}
        assert [bool(chunk.get("choices")) for chunk in chunks] == [True, True, False]
        assert not complete

    def test_a_stream_that_just_ends_is_not_complete(self) -> None:
        chunks, complete = decoded(sample("no_done"))
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None]
        assert not complete

    def test_what_comes_after_the_end_may_be_anything(self) -> None:
        assert decoded(sample("after_done"))[0] == decoded(sample("no_last_line_end"))[0]
        decoder = ChatDecoder()
        decoder.feed(sample("text"))
        assert decoder.feed(b"x" * (ndjson.MAX_LINE + 1)) == decoder.flush() == []

    def test_what_came_before_a_broken_line_leaves_first(self) -> None:
        decoder = ChatDecoder()
        assert len(decoder.feed(sample("no_done") + b"<html>\n")) == 1
        with pytest.raises(WireError):
            decoder.feed(b"{}\n")
        assert not decoder.complete

    @pytest.mark.parametrize(
        "line",
        [
            *(b"<html>", b"[]", b"null", b"{}", b'{"message":"x"}', b'{"message":{"content":[5]}}'),
            *(b'{"message":{"content":""},"logprobs":[5]}', b'{"message":{"tool_calls":5}}'),
            *(b'{"message":{"thinking":5}}', b'{"message":{"tool_calls":[5]}}', b'{"message":{"tool_calls":[{}]}}'),
        ],
    )
    def test_lines_that_are_none(self, line: bytes) -> None:
        with pytest.raises(WireError):
            ChatDecoder().feed(line + b"\n")

    def test_a_line_cut_in_half(self) -> None:
        decoder = ChatDecoder()
        assert len(decoder.feed(sample("broken_line"))) == 1
        with pytest.raises(WireError):
            decoder.flush()

    @pytest.mark.parametrize("created_at", ["0001-01-01T00:00:00Z", "yesterday", 5, None])
    def test_a_time_that_is_none(self, created_at: object) -> None:
        line = {"model": "m", "created_at": created_at, "message": {"content": "x"}}
        assert decoded(json.dumps(line).encode())[0][0]["created"] == 0


@pytest.mark.parametrize("name", [*ENDED, *BROKEN])
def test_a_cut_at_any_byte_changes_nothing(name: str) -> None:
    stream = sample(name)
    whole = decoded(stream)
    assert whole[1] == (name in ENDED)
    assert whole[0]
    for cut in range(len(stream)):
        assert decoded(stream[:cut], stream[cut:]) == whole, cut
    assert decoded(*(bytes([byte]) for byte in stream)) == whole


@pytest.mark.parametrize("name", SHORT)
def test_two_cuts_at_any_bytes_change_nothing(name: str) -> None:
    stream = sample(name)
    whole = decoded(stream)
    for one, two in itertools.combinations(range(len(stream) + 1), 2):
        assert decoded(stream[:one], stream[one:two], stream[two:]) == whole, (one, two)


@pytest.mark.parametrize("name", [name for name in ENDED if name != "after_done"])
def test_a_whole_reply_says_what_its_stream_says(name: str) -> None:
    """The lines of a stream, put together as `stream: false` would have sent them."""
    chunks, _ = decoded(sample(name))
    answer = Assembler()
    for chunk in chunks:
        answer.add(chunk["choices"])
    whole = ollama_reply.completion(as_one(sample(name)), counting())
    message, streamed = whole["choices"][0]["message"], answer.message()
    assert {key: value for key, value in message.items() if value} == {
        key: value for key, value in streamed.items() if value
    }
    assert whole["choices"][0]["finish_reason"] == answer.finish_reasons[0]
    told = chunks[-1] if not chunks[-1]["choices"] else {}
    assert (whole.get("usage"), whole.get("timings")) == (told.get("usage"), told.get("timings"))


class TestText:
    """The older completions."""

    def test_stream(self) -> None:
        chunks, complete = decoded(sample("generate"), kind=TextDecoder)
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1760742847, "model": "m"}
        odds = [
            {
                "tokens": ["def"],
                "token_logprobs": [-0.5],
                "top_logprobs": [{"def": -0.5, "class": -1.5}],
                "text_offset": [0],
            },
            {"tokens": [" ", "f"], "token_logprobs": [-1, -2], "top_logprobs": [{}, {}], "text_offset": [3, 4]},
        ]
        assert complete
        assert chunks == [
            head | {"choices": [{"text": "def", "index": 0, "logprobs": odds[0], "finish_reason": None}]},
            head | {"choices": [{"text": " f", "index": 0, "logprobs": odds[1], "finish_reason": None}]},
            head | {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]},
            head
            | {
                "choices": [],
                "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
                "timings": {"predicted_n": 3, "predicted_ms": 30.0, "predicted_per_second": 100.0},
            },
        ]

    def test_cut_at_any_byte(self) -> None:
        stream = sample("generate")
        for cut in range(len(stream)):
            assert decoded(stream[:cut], stream[cut:], kind=TextDecoder) == decoded(stream, kind=TextDecoder), cut
