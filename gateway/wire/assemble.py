"""The chunks of a stream put together again: the message that a client saw, for the record.

Deltas are merged the way the SDKs do it: strings are concatenated, tool calls by their `index`, lists extended, the
rest overwritten; null is absent. Fields nobody here knows are kept by the same rules. Deltas are left as they are.
The `text` of the older completions counts as content.
"""

from __future__ import annotations

import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_NEVER_JOINED = frozenset({"role", "id", "type", "name"})


class _Text(list[str]):
    """A string in the making. Its pieces are joined once, at the end: adding each to the last costs the square."""


class Assembler:
    """Collects the deltas of each choice; `message` gives the assistant message as OpenAI would have sent it whole."""

    __slots__ = ("_rest", "_text", "characters", "finish_reasons")

    def __init__(self) -> None:
        self._text: dict[int, list[str]] = {}
        self._rest: dict[int, dict[str, Any]] = {}
        self.finish_reasons: dict[int, str] = {}
        self.characters = 0

    def add(self, choices: list[Any]) -> None:
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            index = choice.get("index")
            if not isinstance(index, int):
                index = 0
            delta = choice.get("delta")
            if isinstance(delta, dict):
                self._merge(index, delta)
            elif isinstance(choice.get("text"), str):
                self._merge(index, {"content": choice["text"]})
            reason = choice.get("finish_reason")
            if isinstance(reason, str) and reason:
                self.finish_reasons[index] = reason

    def say(self, text: str | None, reason: str | None = None) -> None:
        """Adds what the first choice says: no more than this."""
        self._rest.setdefault(0, {})
        if text is not None:
            self._text.setdefault(0, []).append(text)
            self.characters += len(text)
        if reason is not None:
            self.finish_reasons[0] = reason

    def _merge(self, index: int, delta: dict[str, Any]) -> None:
        rest = self._rest.get(index)
        if rest is None:
            rest = self._rest[index] = {}
        for key, value in delta.items():
            if value is None or key == "role":
                continue
            if key == "content" and isinstance(value, str):
                self._text.setdefault(index, []).append(value)
                self.characters += len(value)
            else:
                self.characters += _merge_into(rest, key, value)

    def pieces(self, index: int, key: str) -> list[str]:
        """The pieces of a text, for those who add more of them. What they add counts in `characters`: their job."""
        if key == "content":
            return self._text.setdefault(index, [])
        return _pieces(self._rest.setdefault(index, {}), key)

    def arguments(self, index: int, call: int) -> list[str]:
        """The same for the arguments of a tool call that has begun."""
        found = _call_of(self._rest[index]["tool_calls"], {"index": call})
        assert found is not None
        return _pieces(found.setdefault("function", {}), "arguments")

    def message(self, index: int = 0) -> dict[str, Any]:
        parts = self._text.get(index)
        text = None if parts is None else "".join(parts)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        rest = self._rest.get(index)
        if not rest and (text is None or text.isascii()):
            return message
        message.update(rest or {})
        if text and isinstance(message["content"], list):  # Mistral: thinking as parts, then the answer as strings
            message["content"] = [*message["content"], {"type": "text", "text": text}]
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message["tool_calls"] = [_whole_call(call) for call in calls]
            message["content"] = message["content"] or None
        finished: dict[str, Any] = _finished(message)
        return finished

    @property
    def indexes(self) -> list[int]:
        return sorted({*self._text, *self._rest, *self.finish_reasons})


def _pieces(target: dict[str, Any], key: str) -> list[str]:
    if not isinstance(target.get(key), _Text):
        target[key] = _Text()
    text: list[str] = target[key]
    return text


def _merge_into(target: dict[str, Any], key: str, value: Any) -> int:
    """Merges one field of a delta; returns how many characters of text it brought."""
    old = target.get(key)
    if isinstance(value, dict):
        inside = target[key] = old if isinstance(old, dict) else {}
        return sum(_merge_into(inside, inner, item) for inner, item in value.items())
    if isinstance(value, list):
        items = target[key] = old if type(old) is list else []
        if key == "tool_calls":
            return _merge_calls(items, value)
        items.extend(value)
    elif isinstance(value, str) and key not in _NEVER_JOINED:
        _pieces(target, key).append(value)
        return len(value)
    elif value is not None:
        target[key] = value
    return 0


def _merge_calls(calls: list[Any], pieces: list[Any]) -> int:
    count = 0
    for piece in pieces:
        if not isinstance(piece, dict):
            continue
        call = _call_of(calls, piece)
        if call is None:
            call = {"index": piece.get("index")}
            calls.append(call)
        count += sum(_merge_into(call, key, value) for key, value in piece.items() if key != "index")
    return count


def _call_of(calls: list[Any], piece: dict[str, Any]) -> dict[str, Any] | None:
    """By its index. Where an upstream leaves that out, an id opens a call and what has none belongs to the last."""
    key = "index" if piece.get("index") is not None else "id"
    if piece.get(key) is None:
        return calls[-1] if calls else None
    return next((known for known in calls if known.get(key) == piece[key]), None)


def _whole_call(call: Any) -> Any:
    """Without its index, and with the `{}` that clients get for arguments which nobody gave."""
    if not isinstance(call, dict):
        return call
    whole = {key: value for key, value in call.items() if key != "index"}
    function = whole.get("function")
    if isinstance(function, dict):
        said = function.get("arguments")
        if said is None or (isinstance(said, _Text) and not any(said)):
            whole["function"] = {**function, "arguments": "{}"}
    return whole


def _finished(value: Any) -> Any:
    """Texts joined. A surrogate pair that two deltas tore apart becomes its character again; a lone one stays."""
    if isinstance(value, _Text):
        value = "".join(value)
    if isinstance(value, str):
        if value.isascii() or _SURROGATE.search(value) is None:
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if isinstance(value, dict):
        return {key: _finished(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finished(item) for item in value]
    return value
