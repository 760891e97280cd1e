"""Ollama's replies as OpenAI's: whole ones, embeddings, and what a line of a stream holds. Pure.

- `done_reason` is `stop` with tool calls, too: it becomes `tool_calls` unless the answer was cut (`length`).
- Counts are left out where they are 0. Where both are missing although something was said, nobody counted: then there
  is no `usage`, and the gateway estimates.
- Ollama's durations (nanoseconds) become llama.cpp's `timings`; `load_ms` is the time it took to load the model.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from gateway.backends import floats
from gateway.wire import WireError
from gateway.wire.chat import Usage
from gateway.wire.failures import streamed_error
from gateway.wire.jsontext import dumps, loads

JSON = dict[str, Any]
NewId = Callable[[str], str]

_FINISH = {"length": "length"}


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def completion(body: bytes, new_id: NewId = new_id) -> JSON:
    """A whole reply of `/api/chat`. Raises WireError, UpstreamError."""
    line = _finished(body)
    message = message_of(line)
    calls = calls_of(message, new_id)
    made: JSON = {"role": "assistant", "content": message.get("content") or (None if calls else ""), "refusal": None}
    if message.get("thinking"):
        made["reasoning_content"] = message["thinking"]
    if calls:
        made["tool_calls"] = calls
    choice = {
        "index": 0,
        "message": made,
        "logprobs": logprobs(line),
        "finish_reason": finish_reason(line, called=bool(calls)),
    }
    head = {"id": new_id("chatcmpl-"), "object": "chat.completion", **head_of(line)}
    said = bool(made["content"] or calls or message.get("thinking"))
    return {**head, "choices": [choice], **counted(line, said=said)}


def text_completion(body: bytes, new_id: NewId = new_id) -> JSON:
    """A whole reply of `/api/generate`. Raises WireError, UpstreamError."""
    line = _finished(body)
    text = text_of(line)
    choice = {
        "text": text,
        "index": 0,
        "logprobs": text_logprobs(line, 0),
        "finish_reason": finish_reason(line, called=False),
    }
    head = {"id": new_id("cmpl-"), "object": "text_completion", **head_of(line)}
    return {**head, "choices": [choice], **counted(line, said=bool(text or line.get("thinking")))}


def embeddings(body: bytes, encoding: object) -> JSON:
    """A reply of `/api/embed`. Raises WireError, UpstreamError."""
    data = parsed(body)
    found = data.get("embeddings")
    if not isinstance(found, list) or not all(isinstance(each, list) for each in found):
        raise WireError("the reply has no 'embeddings' array")
    entries = [
        {"object": "embedding", "index": index, "embedding": floats.to_base64(each) if encoding == "base64" else each}
        for index, each in enumerate(found)
    ]
    made = {"object": "list", "data": entries, "model": data.get("model")}
    if "prompt_eval_count" not in data and entries:
        return made
    count = _count(data, "prompt_eval_count")
    return made | {"usage": {"prompt_tokens": count, "total_tokens": count}}


def parsed(body: bytes) -> JSON:
    """A whole reply. Raises WireError, or UpstreamError for an error sent with status 200."""
    data = json_object(body)
    if data.get("error"):
        raise streamed_error(data["error"])
    return data


def moment(text: object) -> float | None:
    """Go's time (RFC 3339, nanoseconds) in Unix seconds; None for its zero."""
    try:
        seconds = datetime.fromisoformat(text).timestamp() if isinstance(text, str) else 0.0
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def json_object(body: bytes) -> JSON:
    """Raises WireError."""
    try:
        data = loads(body)
    except ValueError as failure:
        raise WireError(f"it is not valid JSON: {failure}") from None
    if not isinstance(data, dict):
        raise WireError("it is not a JSON object")
    return data


def _finished(body: bytes) -> JSON:
    data = parsed(body)
    if data.get("done") is not True:
        raise WireError("the reply is not done")
    return data


def head_of(line: JSON) -> JSON:
    """What every chunk begins with, but for its id."""
    return {"created": math.floor(moment(line.get("created_at")) or 0), "model": str(line.get("model") or "")}


def message_of(line: JSON) -> JSON:
    """Raises WireError."""
    message = line.get("message")
    if not isinstance(message, dict) or any(
        not isinstance(message.get(key) or "", str) for key in ("content", "thinking")
    ):
        raise WireError("a line has no message of texts")
    return message


def text_of(line: JSON) -> str:
    """Raises WireError."""
    text = line.get("response") or ""
    if not isinstance(text, str):
        raise WireError("a line has no 'response' text")
    return text


def calls_of(message: JSON, new_id: NewId) -> list[JSON]:
    """Whole tool calls, with ids. Raises WireError."""
    made = []
    for call in _objects(message, "tool_calls"):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WireError("a tool call has no function")
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else dumps(arguments or {}).decode()
        name = call["id"] if isinstance(call.get("id"), str) and call["id"] else new_id("call_")
        made.append({"id": name, "type": "function", "function": {"name": function["name"], "arguments": text}})
    return made


def finish_reason(line: JSON, *, called: bool) -> str:
    """`called`: a tool was."""
    return _FINISH.get(line.get("done_reason") or "", "tool_calls" if called else "stop")


def logprobs(line: JSON) -> JSON | None:
    """As chat has them. Raises WireError."""
    found = _objects(line, "logprobs")
    if not found:
        return None
    return {"content": [{**_token(one), "top_logprobs": _alternatives(one)} for one in found], "refusal": None}


def _objects(data: Mapping[str, Any], key: str) -> list[JSON]:
    found = data.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise WireError(f"'{key}' is no array of objects")
    return found


def _alternatives(one: Mapping[str, Any]) -> list[JSON]:
    return [_token(other) for other in _objects(one, "top_logprobs")]


def _token(one: Mapping[str, Any]) -> JSON:
    return {"token": one.get("token"), "logprob": one.get("logprob"), "bytes": one.get("bytes")}


def text_logprobs(line: JSON, offset: int) -> JSON | None:
    """As the older completions write them; `offset` is where the text of this line begins."""
    found = _objects(line, "logprobs")
    if not found:
        return None
    tokens = [str(one.get("token")) for one in found]
    return {
        "tokens": tokens,
        "token_logprobs": [one.get("logprob") for one in found],
        "top_logprobs": [{str(other["token"]): other["logprob"] for other in _alternatives(one)} for one in found],
        "text_offset": [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))],
    }


def counted(line: JSON, *, said: bool) -> JSON:
    """`usage` and `timings`, as far as they are told."""
    found: JSON = {}
    if not said or "prompt_eval_count" in line or "eval_count" in line:
        usage = Usage(_count(line, "prompt_eval_count"), _count(line, "eval_count"))
        found["usage"] = usage.to_openai()
    if timings := _timings(line):
        found["timings"] = timings
    return found


def _timings(line: JSON) -> JSON:
    found: JSON = {}
    for ours, theirs in (("prompt", "prompt_eval"), ("predicted", "eval")):
        count, nanoseconds = _count(line, f"{theirs}_count"), _count(line, f"{theirs}_duration")
        if nanoseconds:
            found |= {
                f"{ours}_n": count,
                f"{ours}_ms": round(nanoseconds / 1e6, 3),
                f"{ours}_per_second": round(count * 1e9 / nanoseconds, 2),
            }
    if found and (loading := _count(line, "load_duration")):
        found["load_ms"] = round(loading / 1e6, 3)
    return found


def _count(line: JSON, key: str) -> int:
    value = line.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
