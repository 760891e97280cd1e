"""The chunks at both ends of a stream, known again without parsing: the role, the `finish_reason`, the usage.

An upstream sends each of them in stream after stream with the same bytes but for `id`, `created`, counts and OpenAI's
padding. What such a chunk does follows from the other bytes alone. So that is found out once, by reading a specimen
with an `id`, a time and a padding of our own, and remembered for as many shapes as one worker may well see; nothing of
a stream is kept. A shape is looked at when it has come for the second time: some upstreams never send one again. Known
is the plainest kind only: a chat's only choice, with nothing to put right and nothing to tell but a role or an end.
None is said of all others: they are to be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from gateway.wire.chunk_edit import with_last_words, without_usage
from gateway.wire.jsontext import loads
from gateway.wire.repair import REASONS, is_named
from gateway.wire.template import Template, plain_parts

_NAME = re.compile(
    rb'\{"id": ?"([!#-\[\]-~]{1,200})", ?((?:"object": ?"chat\.completion\.chunk", ?)?)"created": ?([1-9][0-9]{9}),'
)
_ID, _CREATED = "specimen", 1_700_000_000
_ABOUT = frozenset(
    {"id", "object", "created", "model", "service_tier", "system_fingerprint", "choices", "usage", "obfuscation"}
)
_OF_CHOICE = frozenset({"index", "delta", "logprobs", "finish_reason"})
_FINISH = b'"finish_reason":"'
_USAGE = b'"usage":{'
_PADDING, _OUR_PADDING = b',"obfuscation":"', b',"obfuscation":"specimen"'
_LONGEST = 1000
"""Bytes of a shape that is remembered."""
_SHAPES, _MOST_MET = 256, 1024
"""Of each kind."""
_FLAT = 400
"""Bytes that cannot be nested too deeply (`jsontext.MAX_DEPTH`)."""


@dataclass(slots=True)
class Opening:
    """What a first chunk does: it tells the role and no more, unless `text` is empty instead of none. `leaving`: what
    leaves of the shape; `around_text`: the bytes, behind the name of the stream, around the text (and the padding) of
    chunks that may follow, as they come and as they leave."""

    about: bytes
    model: str
    tier: str | None
    text: str | None
    leaving: bytes
    around_text: tuple[list[bytes], list[bytes]] | None


@dataclass(slots=True)
class Ending:
    """What the chunk does that ends the choice. `last`: the bytes behind the stream's name before the usage that is put
    in, and those behind it before other last words."""

    reason: str
    tier: str | None
    text: str | None
    last: tuple[bytes, bytes]


_Shape = TypeVar("_Shape")


class _Shapes(dict[tuple[bytes, bytes], _Shape | None], Generic[_Shape]):
    """What `judge` says of shapes that have come more than once. Of all others, which may hold somebody's text, no more
    is kept than a hash."""

    def __init__(self, judge: Callable[[bytes, bytes], _Shape | None]) -> None:
        self._judge = judge
        self._met: dict[int, bool] = {}
        """Hashes of those that came once (False), and of those that no judgement makes known (True)."""

    def __missing__(self, key: tuple[bytes, bytes]) -> _Shape | None:
        trace = hash(key)
        unknown = self._met.get(trace)
        if unknown is None:
            if len(self._met) >= _MOST_MET:
                self._met.clear()
            self._met[trace] = False
        if unknown is not False:
            return None
        known = self._judge(*key)
        if known is None:
            self._met[trace] = True
            return None
        if len(self) >= _SHAPES:
            del self[next(iter(self))]
        self[key] = known
        return known


class Known:
    """A stream that opened with a known chunk. `name`: what its chunks begin with; `told`: what that tells; `first`:
    what leaves."""

    __slots__ = ("first", "name", "opening", "told")

    def __init__(self, name: bytes, told: dict[str, Any], opening: Opening, first: bytes) -> None:
        self.name = name
        self.told = told
        self.opening = opening
        self.first = first

    @classmethod
    def of(cls, raw: bytes) -> Known | None:
        """Of its first chunk."""
        name = _NAME.match(raw)
        if name is None or len(raw) > _LONGEST:
            return None
        told_id, about, created = name.groups()
        shape, padding = _shape(raw[name.end() :])
        opening = _openings[about, shape]
        if opening is None:
            return None
        told = {"id": told_id.decode(), "created": int(created), "model": opening.model}
        return cls(name[0], told, opening, name[0] + _padded(opening.leaving, padding))

    def template(self) -> Template | None:
        """A guess at the next chunk: one with a text."""
        around = self.opening.around_text
        if around is None:
            return None
        (before, *behind), (leaving_before, *leaving_behind) = around
        name = self.name
        return Template([name + before, *behind], [name + leaving_before, *leaving_behind], rewritten=False)

    def ending(self, raw: bytes) -> tuple[Ending, bytes, bytes] | None:
        """With what leaves around the usage that is put in."""
        if not raw.startswith(self.name) or raw.find(_FINISH) < 0 or len(raw) > _LONGEST:
            return None
        shape, padding = _shape(raw[len(self.name) :])
        ending = _endings[self.opening.about, shape]
        if ending is None:
            return None
        before, behind = ending.last
        return ending, self.name + _padded(before, padding), _padded(behind, padding)

    def usage(self, raw: bytes) -> tuple[dict[str, Any], str | None] | None:
        """Of a chunk that tells that and nothing else: its `usage`, and the service tier."""
        start = raw.find(_USAGE) + len(_USAGE) - 1
        if start < len(_USAGE) or not raw.startswith(self.name):
            return None
        told, padding = _shape(raw[start:])
        if padding:
            told = told[: -len(_OUR_PADDING) - 1] + b"}"
        before = raw[len(self.name) : start]
        if not told.endswith(b"}}") or len(told) > _FLAT or len(before) > _LONGEST:
            return None
        shape = _beginnings_of_usage[self.opening.about, before]
        if shape is None:
            return None
        try:
            usage = orjson.loads(told[:-1])
        except orjson.JSONDecodeError:
            return None
        return usage, shape[0]


def _shape(raw: bytes) -> tuple[bytes, bytes]:
    """With our padding for the upstream's, if it has one and that is its end; and the upstream's."""
    if raw[-2:] != b'"}':
        return raw, b""
    at = raw.rfind(_PADDING)
    padding = raw[at + len(_PADDING) : -2]
    if at < 0 or (padding and not padding.isalnum()):
        return raw, b""
    return raw[:at] + _OUR_PADDING + b"}", raw[at:-1]


def _padded(leaving: bytes, padding: bytes) -> bytes:
    return leaving.replace(_OUR_PADDING, padding) if padding else leaving


def _opening(about: bytes, shape: bytes) -> Opening | None:
    name, data = _specimen(about, shape)
    choice = _sole_choice(data)
    if choice is None or choice["delta"].get("role") != "assistant" or choice.get("finish_reason") is not None:
        return None
    leaving = without_usage(name + shape, data) if "usage" in data else name + shape
    if not leaving.startswith(name):
        return None
    text = choice["delta"].get("content")
    around = _around_text(about, shape, choice["delta"]) if text is not None else None
    return Opening(about, data["model"], data.get("service_tier"), text, leaving[len(name) :], around)


def _ending(about: bytes, shape: bytes) -> Ending | None:
    name, data = _specimen(about, shape)
    choice = _sole_choice(data)
    reason = choice.get("finish_reason") if choice is not None else None
    if choice is None or choice["delta"].get("role") is not None or type(reason) is not str or reason not in REASONS:
        return None
    bare = with_last_words(name + shape, data, {"usage": 0}).removesuffix(b"}")
    with_more = with_last_words(name + shape, data, {"usage": 0, "more": 0})
    before, usage, behind = bare.partition(b',"usage":0')
    if not before.startswith(name) or not usage or with_more != bare + b',"more":0}':
        return None
    last = before[len(name) :], behind
    return Ending(reason, data.get("service_tier"), choice["delta"].get("content"), last)


def _before_usage(about: bytes, shape: bytes) -> tuple[str | None] | None:
    """The service tier in a tuple."""
    _, data = _specimen(about, shape + b"{}}")
    return (data.get("service_tier"),) if data and data["choices"] == [] and data["usage"] == {} else None


_openings, _endings, _beginnings_of_usage = _Shapes(_opening), _Shapes(_ending), _Shapes(_before_usage)


def _specimen(about: bytes, shape: bytes) -> tuple[bytes, dict[str, Any]]:
    """A chunk of that shape: how it begins, and what it parses to; empty if it is none that can be known."""
    name = b'{"id":"%b",%b"created":%d,' % (_ID.encode(), about, _CREATED)
    try:
        data = loads(name + shape)
    except ValueError:
        return name, {}
    if b"\n" in shape or data.keys() - _ABOUT or "choices" not in data or not is_named(data):
        return name, {}
    own = (data["id"], data["created"], data["object"]) == (_ID, _CREATED, "chat.completion.chunk")
    return name, data if own and shape.count(_OUR_PADDING) <= 1 else {}


def _sole_choice(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a specimen, if its delta says nothing but a role and an empty text."""
    if not data or data.get("usage") is not None or type(data["choices"]) is not list or len(data["choices"]) != 1:
        return None
    choice = data["choices"][0]
    if type(choice) is not dict or choice.keys() - _OF_CHOICE or choice.get("logprobs") is not None:
        return None
    index, delta = choice.get("index"), choice.get("delta")
    if type(index) is not int or index != 0 or type(delta) is not dict or "tool_calls" in delta:
        return None
    said = {key for key, value in delta.items() if value is not None} - {"role"}
    return choice if not said or (said == {"content"} and delta["content"] == "") else None


def _around_text(about: bytes, shape: bytes, delta: Mapping[str, Any]) -> tuple[list[bytes], list[bytes]] | None:
    """Of the same chunk with a text as all that its delta has."""
    told = b'"delta":%b' % orjson.dumps(delta)
    if shape.count(told) != 1:
        return None
    shape = shape.replace(told, b'"delta":{"content":"a"}')
    name, data = _specimen(about, shape)
    plain = plain_parts(name + shape, data, without_usage=True) if data else None
    if plain is None:
        return None
    parts, leaving = plain[1:]
    return [parts[0][len(name) :], *parts[1:]], [leaving[0][len(name) :], *leaving[1:]]
