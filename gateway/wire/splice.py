"""Changes to the top level of a JSON object that leave all its other bytes as they were.

Re-encoding a foreign object loses what the decoder did not keep: spacing, `1.0` against `1`, integers beyond 64 bits,
doubled keys. So members are cut out and put in as text. The caller has parsed the object already; what it parsed is
what these functions trust.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from gateway.wire.jsontext import dumps, loads

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]', re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")
_USUAL_DEPTH = 8


def _value_pattern() -> bytes:
    """A value that is nested no deeper than most are: found by one match instead of a walk over all tokens."""
    string = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
    inside = rb'[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+' % string
    for _ in range(_USUAL_DEPTH - 1):
        inside = rb'[^"{}\[\]]*+(?:(?:%b|[{\[]%b[}\]])[^"{}\[\]]*+)*+' % (string, inside)
    return rb'(?:%b|[{\[]%b[}\]]|[^"{}\[\],\s]++)' % (string, inside)


_VALUE = re.compile(rb"%b(?=[ \t\r\n]*[,}\]])" % _value_pattern(), re.DOTALL)
_MEMBER = re.compile(
    rb'[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*:[ \t\r\n]*(%b)[ \t\r\n]*([,}])' % _value_pattern(), re.DOTALL
)
_BEGIN = re.compile(rb"[ \t\r\n]*\{")
_OPEN = frozenset(b"{[")
_CLOSE = frozenset(b"}]")
_SPACE = b" \t\r\n"
_BACKSLASH, _BLANK, _BRACE = b"\\ }"
"""Numbers: a byte is found in bytes faster than bytes are."""
_MOST_KEYS = 256


class Member(NamedTuple):
    """Where a member of the object stands: its key from `start`, its value from `value` to `end`."""

    key: str
    start: int
    value: int
    end: int


def members(raw: bytes) -> list[Member]:
    """The members of the object that `raw` holds, in order, doubled keys included."""
    found = _usual_members(raw)
    return _any_members(raw) if found is None else found


def _usual_members(raw: bytes) -> list[Member] | None:
    """One match for each member; None for an object with one that is nested deeper than that can tell."""
    found: list[Member] = []
    begin = _BEGIN.match(raw)
    at = begin.end() if begin is not None else len(raw)
    while (member := _MEMBER.match(raw, at)) is not None:
        key = member[1]
        text: str = loads(key) if b"\\" in key else key[1:-1].decode()
        found.append(Member(text, member.start(1), member.start(2), member.end(2)))
        at = member.end()
        if member[3] == b"}":
            return found
    return None


def _any_members(raw: bytes) -> list[Member]:
    found: list[Member] = []
    depth = 0
    key_at: tuple[str, int] | None = None
    value_at = -1
    for token in _TOKEN.finditer(raw):
        first = raw[token.start()]
        if first in _OPEN:
            depth += 1
        elif first in _CLOSE or first == 0x2C:
            if depth == 1 and key_at is not None and value_at >= 0:
                found.append(_member(raw, key_at, value_at, token.start()))
                key_at, value_at = None, -1
            depth -= first in _CLOSE
        elif depth == 1 and first == 0x3A and value_at < 0:
            value_at = token.end()
        elif depth == 1 and first == 0x22 and key_at is None:
            key_at = (loads(token.group()), token.start())
    return found


def _member(raw: bytes, key_at: tuple[str, int], value_at: int, stop: int) -> Member:
    text = raw[value_at:stop]
    return Member(
        key_at[0], key_at[1], value_at + len(text) - len(text.lstrip(_SPACE)), value_at + len(text.rstrip(_SPACE))
    )


def sole_value(raw: bytes, key: str, value: object = None) -> tuple[int, int] | None:
    """Where the value of a top-level key stands, found without a look at the rest; None: look at all of it.

    A key that stands once in the text, and is there at the top, is that one: inside a text its quotes would be escaped.
    Unless a letter of a key is written as an escape, which nobody does who means well. `value`: what it parses to, if
    known: an object that is written as we would write it is found by that.
    """
    token = _plain_token(key)
    at = -1 if token is None else raw.find(token)
    if token is None or at < 0 or (_BACKSLASH in raw and _has_escaped_letters(raw)):
        return None
    if type(value) is dict:
        text = b":" + dumps(value)
        colon = at + len(token)
        end = colon + len(text)
        if raw[colon:end] == text and raw.find(token, end) < 0:
            return colon + 1, end
    if raw.find(token, at + 1) >= 0:
        return None
    after = _COLON.match(raw, at + len(token))
    if after is None:  # it is a value somewhere
        return None
    start = after.end()
    usual = _VALUE.match(raw, start)
    return (start, usual.end()) if usual is not None else _any_value(raw, start)


@lru_cache(maxsize=_MOST_KEYS)
def _plain_token(key: str) -> bytes | None:
    return b'"%b"' % key.encode() if key.isascii() and key.isalpha() and key.islower() else None


def _has_escaped_letters(raw: bytes) -> bool:
    return b"\\u00" in raw and (b"\\u006" in raw or b"\\u007" in raw)


def _any_value(raw: bytes, start: int) -> tuple[int, int] | None:
    depth = 0
    for found in _TOKEN.finditer(raw, start):
        first = raw[found.start()]
        if first in _OPEN:
            depth += 1
        elif first in _CLOSE or first == 0x2C:
            if depth == 0:
                return start, start + len(raw[start : found.start()].rstrip(_SPACE))
            depth -= first in _CLOSE
    return None


Change = bytes | None | Callable[[bytes], bytes]
"""A member's new JSON text, None to take it out, or a function from the text it has to the one it shall have."""


def edit(raw: bytes, data: Mapping[str, Any], changes: Mapping[str, Change]) -> bytes:
    """`raw` with members changed.

    `data` is what `raw` parses to. New members go to the end. An object with a doubled key among the changed ones is
    written anew from `data`, so that nobody downstream can read another value than we did.
    """
    replaced: dict[str, Change] = {}
    added: list[bytes] = []
    for key, text in changes.items():
        if key in data:
            replaced[key] = text
        elif type(text) is bytes:
            added += (_commas_and_keys[key], text)
    if replaced:
        raw = _edit_members(raw, data, replaced)
        if len(replaced) == len(data) and not any(replaced.values()):
            data = {}
    if not added:
        return raw
    close = len(raw) - 1 if raw[-1] == _BRACE else raw.rindex(b"}")
    before = raw[:close] if raw[close - 1] > _BLANK else raw[:close].rstrip(_SPACE)
    if not data:
        added[0] = added[0][1:]
    return b"".join((before, *added, raw[close:]))


def extended(
    raw: bytes, data: Mapping[str, Any], key: str, inner: Sequence[bytes], outer: Sequence[bytes]
) -> bytes | None:
    """`raw` with new members at the end of the object under `key` (`inner`) and at its own (`outer`), in one step.

    They come as texts, each key with the comma before it and the colon behind; the caller knows that nobody has told
    them before. None: only `edit` can tell, for that object is not there, or is not written as we would write it.
    """
    token, told = _plain_token(key), data.get(key)
    if token is None or type(told) is not dict or not told or (_BACKSLASH in raw and _has_escaped_letters(raw)):
        return None
    parts, text = raw.split(token), dumps(told)
    if len(parts) != 2 or raw[-1] != _BRACE or raw[-2] <= _BLANK:
        return None
    before, after = parts
    end = len(text)
    if after[: end + 1] != b":" + text:
        return None
    return b"".join((before, token, after[:end], *inner, after[end:-1], *outer, b"}"))


class _CommasAndKeys(dict[str, bytes]):
    """What stands before the value of a new member. Most keys that are put in are a few words of ours."""

    def __missing__(self, key: str) -> bytes:
        if len(self) >= _MOST_KEYS:
            self.clear()
        text = self[key] = b",%b:" % dumps(key)
        return text


_commas_and_keys = _CommasAndKeys()


def _edit_members(raw: bytes, data: Mapping[str, Any], changes: Mapping[str, Change]) -> bytes:
    edited = _with_values(raw, data, changes)
    return _rewritten(raw, data, changes) if edited is None else edited


def _with_values(raw: bytes, data: Mapping[str, Any], changes: Mapping[str, Change]) -> bytes | None:
    """With new values in places that were found without a look at the rest; None: look at all of it."""
    for key, text in changes.items():
        found = None if text is None else sole_value(raw, key, data[key])
        if text is None or found is None:
            return None
        start, end = found
        raw = b"".join((raw[:start], text if type(text) is bytes else _text(text, raw[start:end]), raw[end:]))
    return raw


def _rewritten(raw: bytes, data: Mapping[str, Any], changes: Mapping[str, Change]) -> bytes:
    places = members(raw)
    keys = [place.key for place in places]
    if any(keys.count(key) != 1 for key in changes):
        kept = {key: dumps(value) for key, value in data.items()}
        kept.update({key: _text(text, kept[key]) for key, text in changes.items() if text is not None})
        gone = {key for key, text in changes.items() if text is None}
        return b"{" + b",".join(dumps(key) + b":" + text for key, text in kept.items() if key not in gone) + b"}"
    out: list[bytes] = []
    at = 0
    for index, place in enumerate(places):
        if place.key not in changes:
            continue
        text = changes[place.key]
        if text is not None:
            out += (raw[at : place.value], _text(text, raw[place.value : place.end]))
            at = place.end
        elif index + 1 < len(places):
            out.append(raw[at : place.start])
            at = places[index + 1].start
        else:
            out.append(_without_last_comma(b"".join((*out, raw[at : place.start]))))
            del out[:-1]
            at = place.end
    return b"".join((*out, raw[at:]))


def _text(change: bytes | Callable[[bytes], bytes], old: bytes) -> bytes:
    return change if isinstance(change, bytes) else change(old)


def _without_last_comma(text: bytes) -> bytes:
    bare = text.rstrip(_SPACE)
    return bare[:-1] if bare.endswith(b",") else text
