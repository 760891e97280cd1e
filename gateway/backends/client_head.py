"""Heads of replies. `folded` makes one of what the parser told of it.

Heads of whole replies may be known from replies before: the status line, the names and what frames the body are
the same to the byte, and only what nobody acts on (a date, an id) and the length of the body may differ.

Such a reply needs no parser if it has come in one read and is just as long as it says. Any other goes to the parser.
Heads are learnt from what the parser has understood, so nothing is read here in another way than there; once in a
while only, for learning costs as much as parsing many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

MAX_HEAD = 1 << 16
MAX_HEADERS = 256
_KEPT_NAMES = 1024
_USUAL_NAME = 64
_MOST_BYTES = 4 << 10
_MOST_HEADS = 4
_PAUSE = 256
"""Replies to the parser between one head that is learnt and the next."""
_SECURE = frozenset(
    {
        *("connection", "proxy-connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"),
        *("content-encoding", "content-type", "content-range", "retry-after", "retry-after-ms"),
    }
)
"""Names of headers that are known with their values only: somebody acts on them."""
_START = re.compile(rb"HTTP/1\.1 200(?: [ -~]*)?\r\n")
_VALUE = rb"([!-~](?:[ -~]*[!-~])?)\r\n"
_LENGTH = rb"([1-9][0-9]{0,8})\r\n"
_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): " + _VALUE)


class KnownHeads:
    """Of one origin."""

    __slots__ = ("_heads", "_pause")

    def __init__(self) -> None:
        self._heads: list[_KnownHead] = []
        self._pause = 0

    def read(self, data: bytes) -> tuple[dict[str, str], bytes] | None:
        """The headers and the body, if these are the bytes of one whole reply, of status 200, with a known head."""
        for head in self._heads:
            found = head.read(data)
            if found is not None:
                return found
        return None

    def learn(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Of a whole reply of status 200 that the parser has read, and after which its connection may be kept."""
        if self._pause:
            self._pause -= 1
            return
        self._pause = _PAUSE
        head = _KnownHead.of(data, headers)
        if head is not None:
            self._heads = [head, *self._heads[: _MOST_HEADS - 1]]


class _KnownHead:
    __slots__ = ("_headers", "_match", "_names")

    def __init__(self, pattern: bytes, names: list[str], headers: dict[str, str]) -> None:
        """`names`: of the headers whose values the pattern finds, in their order."""
        self._match = re.compile(pattern).match
        self._names = names
        self._headers = headers

    @classmethod
    def of(cls, data: bytes, headers: Mapping[str, str]) -> _KnownHead | None:
        """None: it is long, written in an unusual way, or frames its body by something else than its length."""
        start = _START.match(data)
        if start is None or "transfer-encoding" in headers or "content-length" not in headers:
            return None
        pattern, at = re.escape(start[0]), start.end()
        names: list[str] = []
        said: dict[str, str] = {}
        while (line := _LINE.match(data, at, _MOST_BYTES)) is not None:
            name, at = line[1].decode().lower(), line.end()
            if name in said:
                return None
            said[name] = line[2].decode()
            if name in _SECURE:
                pattern += re.escape(line[0])
            else:
                pattern += re.escape(line[1]) + b": " + (_LENGTH if name == "content-length" else _VALUE)
                names.append(name)
        known = said == headers and data.startswith(b"\r\n", at)
        return cls(pattern + rb"\r\n", names, said) if known else None

    def read(self, data: bytes) -> tuple[dict[str, str], bytes] | None:
        found = self._match(data, 0, _MOST_BYTES)
        if found is None:
            return None
        headers, body = self._headers.copy(), data[found.end() :]
        headers.update(zip(self._names, map(bytes.decode, found.groups()), strict=True))
        return (headers, body) if int(headers["content-length"]) == len(body) else None


def folded(raw: list[tuple[bytes, bytes]], came: int) -> dict[str, str]:
    """By names in lower case, of which each is there once. `came`: bytes of it, at least. Raises ValueError."""
    if len(raw) > MAX_HEADERS or (
        came > MAX_HEAD and sum(len(name) + len(value) + 4 for name, value in raw) > MAX_HEAD
    ):
        raise ValueError("its head is too large")
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name = _header_name(raw_name) if len(raw_name) <= _USUAL_NAME else _lowered(raw_name)
        value = raw_value.decode("latin-1").rstrip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _lowered(raw: bytes) -> str:
    return raw.decode("latin-1").lower()


_header_name = lru_cache(_KEPT_NAMES)(_lowered)
