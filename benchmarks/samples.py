"""The bytes that go over the wire: what clients ask and what the upstream answers, both made once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MODEL = "bench"
SLOW_MODEL = "bench-slow"
"""Streams its chunks further apart, for many streams at once."""

ANSWER_SECONDS = 0.020
CHUNK_SECONDS = 0.005
SLOW_CHUNK_SECONDS = 0.100
WORDS = 100
CHUNKS = WORDS + 2
"""Of a stream: the role, the words, the `finish_reason`. One with usage, where it is asked for, and the end mark come
together after them."""

QUESTION = (
    "Say in one hundred words why a gateway that writes everything down may still be fast, and what it must not do."
)
_ANSWER = (
    "It may be fast because the work that it does for a call is small and the waiting is shared: one round trip to "
    "the database for all calls that wait, one commit for all turns that have ended. What it must not do is parse "
    "what it passes on, or wait alone."
)
LEAST = len(_ANSWER)
"""Fewer bytes are no answer. Gateways that write it anew leave fields out or add some, but the text must be there."""
EVENTS = CHUNKS + 1
"""Of a stream, its end mark included."""
_ID = {"id": "chatcmpl-BxQ4o2mVYtJrXc8ZsLhWk0dNpe9Gf", "created": 1760000000, "model": MODEL}
_USAGE = {
    "prompt_tokens": 25,
    "completion_tokens": WORDS,
    "total_tokens": 25 + WORDS,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}


def request(
    port: int, key: str | None, model: str = MODEL, *, stream: bool = False, headers: Mapping[str, str] | None = None
) -> bytes:
    """A whole HTTP request, as an SDK would send it. A stream is asked for without `stream_options`."""
    body = _dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}], "stream": stream})
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Accept: application/json",
        "Content-Type: application/json",
        "User-Agent: benchmark/1",
        *([f"Authorization: Bearer {key}"] if key is not None else []),
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "\r\n"]).encode() + body


def completion() -> bytes:
    """A whole answer, about 700 bytes of JSON."""
    message = {"role": "assistant", "content": _ANSWER, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _dumps({**_ID, "object": "chat.completion", "choices": [choice], "usage": _USAGE})


def chunks(*, with_usage: bool) -> list[bytes]:
    """The events of a stream in the order in which they are sent, each with its end; the last ones leave as one.

    As OpenAI does it: where usage was asked for, every chunk before it carries `"usage":null`.
    """
    empty: dict[str, Any] = {"usage": None} if with_usage else {}
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": "", "refusal": None}, None)]
    deltas += [({"content": f" word{number}"}, None) for number in range(WORDS)]
    deltas += [({}, "stop")]
    made = [_event([_choice(delta, reason)], empty) for delta, reason in deltas]
    end = _event([], {"usage": _USAGE}) if with_usage else b""
    return [*made, end + b"data: [DONE]\n\n"]


def _choice(delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _event(choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
    about = {**_ID, "object": "chat.completion.chunk", "service_tier": "default", "system_fingerprint": "fp_1"}
    return b"data: " + _dumps({**about, "choices": choices, **more}) + b"\n\n"


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
