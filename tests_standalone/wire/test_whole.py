"""Chunks in, the object out that the answer would have been without a stream."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.wire.chat import Chunk, Usage
from gateway.wire.stream import ChatStream

Json = dict[str, Any]

HEAD: Json = {"id": "upstreams-own", "object": "chat.completion.chunk", "created": 7, "model": "m"}
LAST = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cost": 0.5}, "timings": {"x": 1}}


def chunk(*choices: Json, **more: Any) -> bytes:
    return json.dumps({**HEAD, "choices": choices, **more}).encode()


def says(text: str, index: int = 0, **more: Any) -> Json:
    return {"index": index, "delta": {"content": text}, "finish_reason": None, **more}


def begins(index: int = 0, **delta: Any) -> Json:
    return {"index": index, "delta": {"role": "assistant", **delta}, "finish_reason": None}


def ends(reason: str = "stop", index: int = 0) -> Json:
    return {"index": index, "delta": {}, "finish_reason": reason}


def streamed(*chunks: bytes, wants_usage: bool = False) -> tuple[Json, list[Json]]:
    """The whole object, and the chunks that left."""
    stream = ChatStream(wants_usage=wants_usage, id="ours")
    left = b"".join(stream.feed([Chunk(raw=raw)]) for raw in chunks)
    whole = stream.whole(Usage(3, 2), 0.5, {"timings": {"x": 1}})
    left += stream.end(Usage(3, 2), 0.5, {})
    events = [event.removeprefix(b"data: ") for event in left.split(b"\n\n") if event]
    return whole, [json.loads(event) for event in events[:-1]]


def message(text: str | None, **more: Any) -> Json:
    return {"refusal": None, "role": "assistant", "content": text, **more}


@pytest.mark.parametrize("wants_usage", [False, True])
def test_a_text_with_the_name_that_the_gateway_gave(wants_usage: bool) -> None:
    whole, left = streamed(
        chunk(begins(content=""), service_tier="default", system_fingerprint="fp"),
        *(chunk(says(text), obfuscation="x") for text in ("Hel", "lo", " you", "!", "!")),
        chunk(ends()),
        wants_usage=wants_usage,
    )
    choice = {"index": 0, "message": message("Hello you!!"), "logprobs": None, "finish_reason": "stop"}
    about = {"service_tier": "default", "system_fingerprint": "fp"}
    name = {"id": "ours", "object": "chat.completion", "created": 7, "model": "m"}
    assert whole == {**name, **about, "choices": [choice], **LAST}
    assert {part["id"] for part in left} == {"ours"}
    said = [choice["delta"].get("content") or "" for part in left for choice in part["choices"]]
    assert "".join(said) == "Hello you!!"


def test_several_choices_tool_calls_and_a_refusal() -> None:
    def call(index: int, arguments: str, **more: Any) -> Json:
        return {
            "tool_calls": [{"index": index, "function": {"arguments": arguments, **more.pop("function", {})}, **more}]
        }

    named: Json = {"id": "call_1", "type": "function", "function": {"name": "look"}}
    whole, _ = streamed(
        chunk(begins(content=None, **call(0, "", **named))),
        chunk(begins(1, content=None, refusal="")),
        *(chunk({"index": 0, "delta": call(0, part), "finish_reason": None}) for part in ('{"a"', ":", "1", "1", "}")),
        chunk({"index": 1, "delta": {"refusal": "No."}, "finish_reason": None}),
        chunk(ends("tool_calls")),
        chunk(ends("content_filter", 1)),
    )
    look = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a":11}'}}
    assert [choice["message"] for choice in whole["choices"]] == [
        message(None, tool_calls=[look]),
        {**message(None), "refusal": "No."},
    ]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["tool_calls", "content_filter"]


def test_logprobs_are_joined_even_if_chunks_are_the_same() -> None:
    told = [{"token": "la", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    whole, _ = streamed(
        chunk(begins(content="")),
        *[chunk(says("la", logprobs={"content": told, "refusal": None}))] * 4,
        *[chunk(says(" end", logprobs=None))] * 3,
        chunk(ends()),
    )
    [choice] = whole["choices"]
    assert choice["message"]["content"] == "la" * 4 + " end" * 3
    assert choice["logprobs"] == {"content": told * 4, "refusal": None}


def test_what_an_upstream_leaves_out() -> None:
    """No name, no role, no end."""
    whole, _ = streamed(b'{"choices":[{"delta":{"content":"Hi"}}]}')
    assert whole["id"] == "ours"
    assert whole["choices"] == [
        {"index": 0, "message": message("Hi"), "logprobs": None, "finish_reason": "stop"},
    ]


def test_the_usage_that_was_told_with_its_details() -> None:
    told = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    whole, left = streamed(chunk(begins(content="x")), chunk(ends()), chunk(usage=told), wants_usage=True)
    assert whole["usage"] == {**told, "cost": 0.5} == left[-1]["usage"]
    assert left[-1]["id"] == "ours"
