"""What broken upstreams send, put right on its way out: the rules for values, and whole replies.

What is right stays as it is, to the byte; the rest of a repaired reply does too. Repaired is what clients are known to
break on: ids, indexes, roles and reasons that are missing or not OpenAI's, arguments that are no text, null where a
number is due, `reasoning` without `reasoning_content`. Chunks of a stream follow the same rules with a memory: see
`wire.chunk_repair`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any, TypeGuard

from gateway.wire import splice
from gateway.wire.chat import MOST_TOKENS, Completion, Usage
from gateway.wire.failures import StreamedError
from gateway.wire.jsontext import dumps
from gateway.wire.operation import CHAT, COMPLETIONS

Json = dict[str, Any]

REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
_FOREIGN_REASONS = {
    **{reason: reason for reason in REASONS},
    **dict.fromkeys(("max_tokens", "max_length", "max_output_tokens", "model_length", "token_limit"), "length"),
    **dict.fromkeys(("context_length", "context_length_exceeded", "model_context_window_exceeded"), "length"),
    **dict.fromkeys(("tool_call", "tool_use", "tool_uses"), "tool_calls"),
    **dict.fromkeys(("content_filtered", "safety", "recitation", "blocklist", "prohibited_content"), "content_filter"),
    **dict.fromkeys(("spii", "image_safety", "guardrail_intervened", "refusal", "sensitive"), "content_filter"),
}
"""Other vendors' words, in small letters. Whatever is not here (`eos`, `end_turn`, `COMPLETE`) means `stop`."""
_GAVE_UP = frozenset(
    {"insufficient_system_resource", "error", "aborted", "abort", "network_error", "cancelled", "canceled"}
)
_TIERS = frozenset({"auto", "default", "flex", "scale", "priority", "fast", "ultrafast"})
_COUNTS = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
_PREFIXES = {CHAT: "chatcmpl", COMPLETIONS: "cmpl"}
_OBJECTS = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}


def completion(reply: Completion, *, model: str = "", at: int = 0) -> Completion:
    """The reply as a client can read it; the same object if nothing is wrong with it.

    `model` and `at` (Unix seconds) name a reply that does not name itself. Raises StreamedError for an upstream that
    gave up.
    """
    data = reply.data
    right_usage = _usage_if_right(data)
    if right_usage is not None:
        reply.usage = right_usage
        return reply
    choices = data.get("choices")
    choices = choices if isinstance(choices, list) else []
    operation = COMPLETIONS if _is_text(data, choices) else CHAT
    repaired = [_choice(place, choice, operation) for place, choice in enumerate(choices) if isinstance(choice, dict)]
    changes = tier(data) | _usage_change(data)
    if unnamed(data):
        changes |= missing_name(data, new_name(operation, model, at))
    if not same(repaired, choices):
        changes["choices"] = repaired
    if not changes:
        return reply
    texts = {key: None if value is None else dumps(value) for key, value in changes.items()}
    right = {key: value for key, value in {**data, **changes}.items() if value is not None or key not in changes}
    return Completion(splice.edit(reply.raw, data, texts), right)


def _usage_if_right(data: Mapping[str, Any]) -> Usage | None:
    """Of a chat reply of the usual kind, with nothing to put right. Told in no time; None: look closer."""
    choices = data.get("choices")
    if type(choices) is not list or not is_named(data):
        return None
    for choice in choices:
        if not _is_right_choice(choice):
            return None
    told = data.get("usage")
    if type(told) is not dict:
        return None
    usual = _usual_usage(told)
    return Usage.read(told) if usual is None and _is_right_usage(told) else usual


def _is_right_choice(choice: object) -> bool:
    if type(choice) is not dict or type(message := choice.get("message")) is not dict:
        return False
    index, reason = choice.get("index"), choice.get("finish_reason")
    return (
        type(index) is int
        and index >= 0
        and type(reason) is str
        and reason in REASONS
        and "content" in message
        and "role" in message
        and message["role"] == "assistant"
        and "tool_calls" not in message
        and ("reasoning" not in message or not message["reasoning"])
    )


def _usual_usage(told: Json) -> Usage | None:
    """Of right usage in the words of OpenAI's chat and no others; None: look closer."""
    if len(told) != 5:
        return None
    try:
        asked, answered, total = told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]
        inside, outside = told["prompt_tokens_details"], told["completion_tokens_details"]
    except KeyError:
        return None
    if not (type(asked) is int and type(answered) is int and type(total) is int):
        return None
    if not (0 <= asked <= MOST_TOKENS and 0 <= answered <= MOST_TOKENS and total >= 0):
        return None
    if type(inside) is not dict or type(outside) is not dict:
        return None
    parts_asked, parts_answered = inside.values(), outside.values()
    if None in parts_asked or None in parts_answered:
        return None
    return Usage.read(told) if any(parts_asked) or any(parts_answered) else Usage(asked, answered)


def _is_right_usage(told: Json) -> bool:
    asked, answered, total = told.get("prompt_tokens"), told.get("completion_tokens"), told.get("total_tokens")
    if not (type(asked) is int and type(answered) is int and type(total) is int):
        return False
    if not (0 <= asked <= MOST_TOKENS and 0 <= answered <= MOST_TOKENS and total >= 0):
        return False
    for key, value in told.items():
        if key in _COUNTS:
            continue
        if type(value) is int:
            if key.endswith("_details"):
                return False
        elif type(value) is not dict or None in value.values():
            return False
    return True


def _is_text(data: Mapping[str, Any], choices: list[Any]) -> bool:
    """Is it a reply of the older completions?"""
    told = [choice for choice in choices if isinstance(choice, dict)]
    if any(isinstance(choice.get("message"), dict) for choice in told):
        return False
    return data.get("object") == "text_completion" or any("text" in choice for choice in told)


def _usage_change(data: Mapping[str, Any]) -> Json:
    """None for usage that is not to be believed: it is taken out."""
    told = told_usage(data)
    right = usage(told)
    return {} if right is data.get("usage") or (right is None and "usage" not in data) else {"usage": right}


def _choice(place: int, choice: Json, operation: str) -> Json:
    """One choice of a whole reply."""
    changes: Json = {}
    if not is_count(choice.get("index")):
        changes["index"] = place
    calls = False
    if operation == COMPLETIONS:
        if not isinstance(choice.get("text"), str):
            changes["text"] = ""
    else:
        told = choice.get("message")
        message = _message(told if isinstance(told, dict) else {})
        calls = bool(message.get("tool_calls"))
        if message is not told:
            changes["message"] = message
    said = choice.get("finish_reason")
    reason = finish_reason(said, choice, calls=calls) or ("tool_calls" if calls else "stop")
    if reason != said:
        changes["finish_reason"] = reason
    return {**choice, **changes} if changes else choice


def _message(message: Json) -> Json:
    changes = reasoning(message)
    if message.get("role") != "assistant":
        changes["role"] = "assistant"
    told = message.get("tool_calls", [])
    calls = _calls(told) if isinstance(told, list) else []
    if calls and not same(calls, told):
        changes["tool_calls"] = calls
    if "content" not in message or (calls and message["content"] == ""):
        changes["content"] = None
    if "tool_calls" in message and not calls:
        return {key: value for key, value in {**message, **changes}.items() if key != "tool_calls"}
    return {**message, **changes} if changes else message


def _calls(calls: Iterable[Any]) -> list[Json]:
    """The tool calls of a whole reply; what is none is left out."""
    found: list[Json] = []
    ids: set[str] = set()
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("function") or call.get("custom"), dict):
            continue
        changes = call_head(call, ids)
        function = call.get("function")
        if isinstance(function, dict):
            text = arguments(function.get("arguments")) or "{}"
            if text != function.get("arguments"):
                changes["function"] = {**function, "arguments": text}
        found.append({**call, **changes} if changes else call)
        ids.add(found[-1]["id"])
    return found


# --- values, in replies and in chunks


def same(these: list[Any], those: list[Any]) -> bool:
    """Are these the very objects?"""
    return len(these) == len(those) and all(map(is_, these, those))


def is_count(value: object) -> TypeGuard[int]:
    """A whole number, as an index or a count is one."""
    return type(value) is int and value >= 0


def finish_reason(said: object, choice: Mapping[str, Any], *, calls: bool) -> str | None:
    """OpenAI's word for it; None if nothing is said. Raises StreamedError if the upstream gave up."""
    if not isinstance(said, str) or not said:
        return None
    if said not in REASONS:
        word = said.strip().lower().replace("-", "_")
        if word in _GAVE_UP:
            raise StreamedError(_gave_up(word, choice.get("error")))
        said = _FOREIGN_REASONS.get(word, "stop")
    return "tool_calls" if calls and said == "stop" else said


def _gave_up(word: str, error: object) -> object:
    told = error if isinstance(error, dict) else {}
    return {"code": 503, "message": f"The upstream gave up its answer ({word}).", **told}


def reasoning(message: Mapping[str, Any]) -> Json:
    """`reasoning_content`, where an upstream calls it `reasoning`."""
    thought = message.get("reasoning")
    if not thought or not isinstance(thought, str) or message.get("reasoning_content"):
        return {}
    return {"reasoning_content": thought}


def call_head(call: Mapping[str, Any], taken: Iterable[str]) -> Json:
    """What a tool call lacks of `id` and `type`. Ids are not given twice."""
    found: Json = {}
    told = call.get("id")
    if not isinstance(told, str) or told in ("", "null") or told in taken:
        found["id"] = f"call_{secrets.token_hex(12)}"
    if not (isinstance(call.get("type"), str) and call["type"]):
        found["type"] = "custom" if isinstance(call.get("custom"), dict) else "function"
    return found


def arguments(value: object) -> str:
    """The arguments of a tool call as JSON text; empty if there are none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else dumps(value).decode()


def tier(data: Mapping[str, Any]) -> Json:
    """A `service_tier` that OpenAI's enum lacks is `default`."""
    told = data.get("service_tier")
    return {} if told is None or (isinstance(told, str) and told in _TIERS) else {"service_tier": "default"}


def new_name(operation: str, model: str, at: int, *, stream: bool = False) -> Json:
    """The members that name a reply, for one that has none."""
    kind = "chat.completion.chunk" if stream and operation == CHAT else _OBJECTS[operation]
    return {"id": f"{_PREFIXES[operation]}-{secrets.token_hex(12)}", "object": kind, "created": at, "model": model}


def is_named(data: Mapping[str, Any]) -> bool:
    """Is nothing `unnamed`, and is its `service_tier` one of OpenAI's? Told in no time."""
    try:
        name, kind, model, created = data["id"], data["object"], data["model"], data["created"]
    except KeyError:
        return False
    if not (type(name) is str and type(kind) is str and type(model) is str and type(created) is int):
        return False
    if not (name and kind and model and created > 0):
        return False
    if "service_tier" not in data:
        return True
    told = data["service_tier"]
    return told is None or (type(told) is str and told in _TIERS)


def unnamed(data: Mapping[str, Any]) -> list[str]:
    """Which of `id`, `object`, `model` and `created` are missing, or are no name."""
    found = [key for key in ("id", "object", "model") if not (isinstance(data.get(key), str) and data[key])]
    created = data.get("created")
    return found if type(created) is int and created > 0 else [*found, "created"]


def missing_name(data: Mapping[str, Any], name: Mapping[str, Any]) -> Json:
    """What is missing, from `name` as far as that knows it."""
    found = {key: name[key] for key in unnamed(data) if name[key]}
    created = data.get("created")
    if isinstance(created, float) and created >= 1:
        found["created"] = int(created)
    return found


def told_usage(data: Mapping[str, Any]) -> object:
    """Groq tells it under `x_groq`."""
    told = data.get("usage")
    groq = data.get("x_groq") if told is None else None
    return groq.get("usage") if isinstance(groq, dict) else told


def is_untrue(told: object) -> bool:
    """Is what `usage` does not believe more than nothing? An upstream that does not know says null or leaves it out."""
    return told.get("prompt_tokens") is not None if isinstance(told, dict) else bool(told)


def usage(told: object) -> Json | None:
    """A `usage` object of whole numbers, the same object if it is one; None if its counts cannot be true.

    Null is 0, except for `prompt_tokens`: no call costs nothing, so an upstream that does not know is not believed.
    """
    if not isinstance(told, dict):
        return None
    if _is_right_usage(told):
        return told
    changes: Json = {}
    gone: set[str] = set()
    for key, value in told.items():
        if key.endswith("_tokens") and value is None:
            changes[key] = 0
        elif key.endswith("_tokens_details"):
            if not isinstance(value, dict):
                gone.add(key)
            elif None in value.values():
                changes[key] = {inner: 0 if count is None else count for inner, count in value.items()}
    if "completion_tokens" not in told:
        changes["completion_tokens"] = 0
    counts = Usage.read({**told, **changes}) if told.get("prompt_tokens") is not None else None
    if counts is None:
        return None
    if not is_count(told.get("total_tokens")):
        changes["total_tokens"] = counts.input_tokens + counts.output_tokens
    if not changes and not gone:
        return told
    return {key: value for key, value in {**told, **changes}.items() if key not in gone}
