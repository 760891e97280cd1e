"""A chunk without its usage, with the last words of a stream, and as two. What is right stays as it came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gateway.wire import splice
from gateway.wire.chat import Usage
from gateway.wire.jsontext import dumps, loads

_USAGE = b'"usage"'
_USUAL_USAGE = b',"usage":null'
_USAGE_KEY = re.compile(rb'(?<!\\)"usage"\s*:')
_NULL_USAGE = re.compile(rb',\s*"usage"\s*:\s*null|(?<!\\)"usage"\s*:\s*null\s*,\s*')
_BACKSLASH = ord("\\")
_TOTALS = Usage().to_openai()
"""All of them are told where usage is; this is their order."""


def without_usage(raw: bytes, data: Mapping[str, Any]) -> bytes:
    """A chunk that has `usage`, without it."""
    if data["usage"] is not None:
        return splice.edit(raw, data, {"usage": None})
    usual = without_usual_usage(raw)
    if usual is not None:
        return usual
    if len(_USAGE_KEY.findall(raw)) == 1:
        return _NULL_USAGE.sub(b"", raw, count=1)
    return splice.edit(raw, data, {"usage": None})


def without_usual_usage(raw: bytes) -> bytes | None:
    """What is left if the only `usage` is null and stands where most upstreams put it; None if not."""
    at = raw.find(_USAGE) - 1
    if at < 0 or not raw.startswith(_USUAL_USAGE, at) or raw.find(_USAGE, at + 2) >= 0:
        return None
    return raw[:at] + raw[at + len(_USUAL_USAGE) :]


def parts_without_usual_usage(parts: list[bytes]) -> list[bytes] | None:
    """The same for the bytes around texts that have no quotes in them."""
    places = [place for place, part in enumerate(parts) if part.find(_USAGE) >= 0]
    left = without_usual_usage(parts[places[0]]) if len(places) == 1 else None
    return None if left is None else [*parts[: places[0]], left, *parts[places[0] + 1 :]]


def with_last_words(raw: bytes, data: Mapping[str, Any], words: Mapping[str, Any]) -> bytes:
    """The chunk with these members, the first of which is `usage`: the one that stands at its end makes way for it."""
    about = data.keys() & words.keys()
    if not about and raw.endswith(b"}"):
        return b"%b,%b" % (raw[:-1].rstrip(), dumps(words)[1:])
    if about == {"usage"} and _BACKSLASH not in raw and raw.count(_USAGE) == 1:  # no other key is this one then
        head, _, told = raw.partition(b',"usage":')
        if told == b"null}" or (told.startswith(b"{") and told.endswith(b"}}") and _is_one_value(told[:-1])):
            return b"%b,%b" % (head, dumps(words)[1:])
    return splice.edit(raw, data, {key: dumps(value) for key, value in words.items()})


def last_words(before: bytes, behind: bytes, usage: object, others: Mapping[str, Any]) -> bytes:
    """The same where it is known what comes before the usage, and what between it and the other words."""
    if not behind:
        return b"%b,%b" % (before, dumps({"usage": usage, **others})[1:])
    return b'%b,"usage":%b%b%b' % (before, dumps(usage), behind, b"," + dumps(others)[1:] if others else b"}")


def counted(told: Mapping[str, Any] | None, usage: Usage, cost: object) -> dict[str, Any]:
    """The usage of the last words: what the upstream told; what was counted, if it told nothing."""
    if told is None:
        return {**usage.to_openai(), "cost": cost}
    return {**_TOTALS, **told, "cost": cost}


def said_and_end(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A chunk with text and end as two, the text first; None if it says nothing but the end."""
    choices = data["choices"]
    if not any(choice.get("text") or any((choice.get("delta") or {}).values()) for choice in choices):
        return None
    said = [{**choice, "finish_reason": None} for choice in choices]
    bare = [
        {**choice, **{key: type(choice[key])() for key in ("delta", "text") if key in choice}} for choice in choices
    ]
    return {**data, "choices": said}, {**data, "choices": bare}


def _is_one_value(text: bytes) -> bool:
    try:
        loads(text)
    except ValueError:
        return False
    return True
