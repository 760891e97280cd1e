"""The usual chunk, without parsing it: one that differs from the chunk before it in its text and in nothing else.

A `Template` is made of a chunk that was read the long way. It holds the bytes before the text and those behind it;
OpenAI's `obfuscation`, random padding that each of its chunks has, may differ too. What has the same bytes around one
JSON string is the same chunk with another text, so all that was found out about the first one holds. That is only so
for the chunk that comes next: what is not the same again has to be read, and ends the template.

How a chunk like that leaves is found out with a `Probe`: the chunk with a mark in place of its text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.wire.chunk_edit import parts_without_usual_usage
from gateway.wire.jsontext import loads

Json = dict[str, Any]

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TEXTS = {
    key: re.compile(b'"' + key.encode() + rb'"\s*:\s*(' + _STRING + b")")
    for key in ("content", "reasoning_content", "reasoning", "arguments", "text")
}
_USUAL_TEXTS = {key: b'"%b"' % key.encode() for key in ("content", "reasoning_content")}
_PADDING_KEY = b'"obfuscation"'
_PADDING = re.compile(rb'"obfuscation"\s*:\s*"([A-Za-z0-9]+)"')
MARK = f"/{secrets.token_hex(8)}"
"""In no upstream's text."""
_MARK = b"\\" + MARK.encode()
"""As it stands in a probe. Written anew it loses its backslash, so one can tell."""
_PADDED = b"padding" + secrets.token_hex(8).encode()
_MARKS = re.compile(re.escape(_MARK) + b"|" + _PADDED)
_MARKS_REWRITTEN = re.compile(MARK.encode())
_BACKSLASH, _CR, _LF = b"\\\r\n"
_DATA, _BLANK = b"data: ", b"\n\n"
"""An event of one line begins and ends so."""


class Template:
    """`read` a chunk: its text and the bytes that leave for it, or None for a chunk that is not like this one.

    One event of the plain kind is `before`, a JSON string and `behind`, `around` bytes and the string; it leaves with
    other bytes around the string if it is `changed`. From `shortest_two` bytes on a piece may be more than one, and so
    may any piece if the chunk is not plain. With padding, `middle` (from the quote that ends the text), the padding and
    a quote come between the string and `behind`. `in_place`: it is a line, and its text leaves in the bytes it came in.
    """

    __slots__ = (
        *("_between", "_end", "_event_end", "_event_start", "_head", "_leaving", "_leaving_between", "_leaving_end"),
        *("_leaving_start", "_one_line", "_rewritten", "_start", "_string_end", "_string_start", "_tail"),
        *("around", "before", "behind", "changed", "in_place", "leaving_before", "leaving_behind", "leaving_middle"),
        *("middle", "shortest_two"),
    )

    def __init__(self, parts: list[bytes], leaving: list[bytes], *, rewritten: bool) -> None:
        """`parts` and `leaving`: what comes and what leaves around the text (and the padding). `rewritten`: it does
        not leave in the bytes in which it came."""
        self._head = parts[0]
        self.middle = parts[1] if len(parts) == 3 else b""
        self.leaving_middle = leaving[1] if len(parts) == 3 else b""
        self._tail = parts[-1]
        self._start = len(self._head) - 1
        self._end = 1 - len(self._tail)
        self._leaving = leaving
        self.changed = rewritten or leaving != parts
        self._rewritten = rewritten
        text = b"".join(parts)  # nothing leaves on more lines than it came on
        self._one_line = not (_LF in text or _CR in text)
        self._event_start = _DATA + self._head
        self._event_end = self._tail + _BLANK
        self._between = self._event_end + self._event_start
        self._string_start = len(_DATA) + self._start
        self._string_end = self._end - len(_BLANK)
        self.around = len(self._between) - 2
        self.in_place = self._one_line and not rewritten
        self.shortest_two = 2 * len(self._between) if self.in_place and not self.middle else 0
        self._leaving_start, self._leaving_end = _DATA + leaving[0], leaving[-1] + _BLANK
        self.before, self.behind = self._event_start[:-1], self._event_end[1:]
        self.leaving_before, self.leaving_behind = self._leaving_start[:-1], self._leaving_end[1:]
        self._leaving_between = self._leaving_end + self._leaving_start

    def events(self, piece: bytes) -> tuple[list[str], bytes] | None:
        """Whole events of such chunks and nothing else, as one read of a socket brings them: their texts, and the
        events that leave (the very same bytes, if they may)."""
        if not (self._one_line and piece.startswith(self._event_start) and piece.endswith(self._event_end)):
            return None
        if self.middle or self._rewritten:
            return self._one_by_one(piece)
        string = piece[self._string_start : self._string_end]
        inside = string[1:-1].split(self._between)
        if len(inside) > 1:
            if _BACKSLASH in string:
                return self._one_by_one(piece)
            string = b'["%b"]' % b'","'.join(inside)  # as many strings as that, or one of them was none
        try:
            texts = orjson.loads(string)
        except orjson.JSONDecodeError:
            return None
        if len(inside) == 1:
            texts = [texts]
        elif len(texts) != len(inside):
            return None
        if not self.changed:
            return texts, piece
        leaving = inside[0] if len(inside) == 1 else self._leaving_between.join(inside)
        return texts, b"%b%b%b" % (self._leaving_start, leaving, self._leaving_end)

    def _one_by_one(self, piece: bytes) -> tuple[list[str], bytes] | None:
        texts: list[str] = []
        leaving: list[bytes] = []
        for raw in piece[len(_DATA) : -len(_BLANK)].split(_BLANK + _DATA):
            found = self.read(raw)
            if found is None:
                return None
            texts.append(found[0])
            leaving.append(found[1])
        if not self.changed:
            return texts, piece
        return texts, b"%b%b%b" % (_DATA, (_BLANK + _DATA).join(leaving), _BLANK)

    def read(self, raw: bytes) -> tuple[str, bytes] | None:
        if not (raw.startswith(self._head) and raw.endswith(self._tail)):
            return None
        if self.middle:
            return self._read_padded(raw)
        string = raw[self._start : self._end]
        try:
            text = orjson.loads(string)  # one string and no more, or this fails; so do lone surrogates: the long way
        except orjson.JSONDecodeError:
            return None
        if self._rewritten:  # an empty text may not need the repair
            return (text, orjson.dumps(text)[1:-1].join(self._leaving)) if text else None
        return text, string[1:-1].join(self._leaving) if self.changed else raw

    def _read_padded(self, raw: bytes) -> tuple[str, bytes] | None:
        stop = raw.find(self.middle, self._start)
        string = raw[self._start : stop + 1]
        padding = raw[stop + len(self.middle) : self._end - 1]
        try:
            text = orjson.loads(string)
        except orjson.JSONDecodeError:
            return None
        if not padding.isalnum():
            return None
        if not self.changed:
            return text, raw
        head, middle, tail = self._leaving
        return text, b"".join((head, string[1:-1], middle, padding, tail))


def around_text(raw: bytes, data: Mapping[str, Any]) -> tuple[str, list[bytes]] | None:
    """Of a chunk that is right as it is: which member of its delta has the only text, and the bytes around it. None
    where that is not certain without a `Probe`.

    It is certain where no backslash is: each key stands there as it is spelled then, so the one key of that name is the
    one that the parser found.
    """
    [choice, *more] = data["choices"]
    delta = choice.get("delta")
    if more or not isinstance(delta, dict) or _BACKSLASH in raw:
        return None
    told = [*delta] if len(delta) == 1 else [key for key, value in delta.items() if value is not None]
    if len(told) != 1 or (key := told[0]) not in _USUAL_TEXTS:
        return None
    if choice.get("finish_reason") is not None or data.get("usage") is not None:
        return None
    place = _sole_string(raw, _USUAL_TEXTS[key])
    if place is None or place[0] == place[1]:
        return None
    start, end = place
    if raw.find(_PADDING_KEY, end) < 0:
        return key, [raw[:start], raw[end:]]
    padding = _sole_string(raw, _PADDING_KEY) if "obfuscation" in data else None
    if padding is None or not raw[slice(*padding)].isalnum():
        return None
    return key, [raw[:start], raw[end : padding[0]], raw[padding[1] :]]


def plain_parts(
    raw: bytes, data: Mapping[str, Any], *, without_usage: bool
) -> tuple[str, list[bytes], list[bytes]] | None:
    """What `around_text` gives, and the bytes around the text as they leave: without usage, if it has to go."""
    around = around_text(raw, data)
    if around is None:
        return None
    key, parts = around
    leaving = parts_without_usual_usage(parts) if without_usage and "usage" in data else parts
    return None if leaving is None else (key, parts, leaving)


def _sole_string(raw: bytes, key: bytes) -> tuple[int, int] | None:
    """Where the text stands behind a key that is there once, in bytes without backslashes."""
    at = raw.find(key)
    start = at + len(key) + 2
    if at < 0 or raw[start - 2 : start] != b':"' or raw.find(key, start) >= 0:
        return None
    return start, raw.find(b'"', start)


@dataclass(frozen=True, slots=True)
class Probe:
    """A chunk whose text is `MARK`: `raw`, and the `data` it parses to. `parts` are the bytes around the marks."""

    raw: bytes
    data: Json
    parts: list[bytes]

    @classmethod
    def of(cls, raw: bytes, data: Json) -> Probe | None:
        """None for a chunk that the next one will hardly be like."""
        found = _text_of(data)
        place = _TEXTS[found[0]].search(raw) if found is not None else None
        if found is None or place is None or MARK.encode() in raw:
            return None
        parts, marks = [raw[: place.start(1) + 1], raw[place.end(1) - 1 :]], [_MARK]
        padding = _PADDING.search(parts[1])
        if padding is not None:
            parts[1:] = [parts[1][: padding.start(1)], parts[1][padding.end(1) :]]
            marks.append(_PADDED)
        probe = b"".join(part + mark for part, mark in zip(parts, [*marks, b""], strict=True))
        like = loads(probe)
        return cls(probe, like, parts) if _is_same_but(like, data, *found, padded=padding is not None) else None

    def template(self, right: Json, leaving: bytes) -> Template | None:
        """`right`: the probe as it was put right, or its own data; `leaving`: the bytes that would leave for it."""
        rewritten = right is not self.data
        parts = (_MARKS_REWRITTEN if rewritten else _MARKS).split(leaving)
        if rewritten and len(self.parts) == 2 and len(parts) > 1:
            return Template(self.parts, parts, rewritten=True)
        if not rewritten and len(parts) == len(self.parts):
            return Template(self.parts, parts, rewritten=False)
        return None


def _is_same_but(like: Json, data: Json, key: str, text: str, *, padded: bool) -> bool:
    """Is a probe its chunk, but for the text and the padding, and are both marks where they should be?"""
    holder = _holder(like["choices"][0], key)
    if holder.get(key) != MARK or (padded and like.get("obfuscation") != _PADDED.decode()):
        return False
    holder[key] = text
    same = (like | {"obfuscation": data["obfuscation"]} if padded else like) == data
    holder[key] = MARK
    return same


def _text_of(data: Json) -> tuple[str, str] | None:
    """Member and text of a chunk that adds to one text and says nothing else that could add up."""
    choices = data["choices"]
    if len(choices) != 1 or not isinstance(choices[0], dict) or data.get("usage") is not None:
        return None
    choice = choices[0]
    if choice.get("finish_reason") is not None:
        return None
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return ("text", choice["text"]) if isinstance(choice.get("text"), str) else None
    texts = {key: value for key, value in delta.items() if value and key != "role" and _adds_up(value)}
    if not texts:
        return ("content", "") if delta.get("content") == "" else None
    [(key, text), *more] = texts.items()
    if more:
        return None
    if key == "tool_calls":
        return _arguments_of(text)
    return (key, text) if key in _TEXTS and isinstance(text, str) else None


def _adds_up(value: object) -> bool:
    return isinstance(value, (str, list, dict))


def _arguments_of(pieces: object) -> tuple[str, str] | None:
    """Of a piece that goes on with a call and does not name one."""
    if not isinstance(pieces, list) or len(pieces) != 1 or not isinstance(pieces[0], dict) or pieces[0].get("id"):
        return None
    function = pieces[0].get("function")
    if not isinstance(function, dict) or function.get("name") or not isinstance(function.get("arguments"), str):
        return None
    return "arguments", function["arguments"]


def _holder(choice: Json, key: str) -> Json:
    """The object that has the text."""
    if key == "text":
        return choice
    delta: Json = choice["delta"]
    if key == "arguments":
        function: Json = delta["tool_calls"][0]["function"]
        return function
    return delta
