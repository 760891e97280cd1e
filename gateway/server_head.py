"""What a connection itself judges of a request's head, and the answer that it gives to what it refuses.

* An offer to upgrade (h2c, websocket) is declined by answering in HTTP/1.1, as RFC 9110 section 7.8 has it.
* Trailer fields are refused: the parser would add them to the headers that the application has already judged.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

__all__ = [
    "MOST_REMEMBERED",
    "HeadReader",
    "Refusal",
    "SameHead",
    "check_head",
    "error_body",
    "expects_continue",
    "path_of",
    "refused",
]

MOST_REMEMBERED = 4 * 1024
"""Bytes of a head that is kept to know the next one by it."""
_MOST_DIGITS = 8

Header = tuple[bytes, bytes]
_name_of = itemgetter(0)


class Refusal(Exception):
    """The connection's own answer to a request that never reaches the application."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class HeadReader(HttpToolsProtocol):
    """How a connection reads heads: each part as it comes, and not more of it than there may be. Raises Refusal."""

    max_head = 64 * 1024
    max_headers = 200
    max_url = 16 * 1024

    _in_body: bool
    """Is a body being received? A header is a trailer then."""

    def _too_large(self) -> Refusal:
        return head_too_large(self.max_head)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._decline_upgrade() + data[upgrade.args[0] :]
            else:
                return

    def _decline_upgrade(self) -> bytes:
        """Replaces the parser, which takes what follows an upgrade as another protocol's, by one that does not. Gives
        the head that it is to be fed."""
        parser = self.parser
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return _head_without_upgrade(parser.get_method(), self.url, parser.get_http_version(), self.headers)

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > self.max_url:
            raise Refusal(414, "url_too_long", f"The URL is longer than {self.max_url} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self.headers
        if self._in_body:
            raise Refusal(400, "malformed_request", "Trailer fields are not accepted.")
        if len(headers) >= self.max_headers:
            raise Refusal(431, "headers_too_large", f"The request has more than {self.max_headers} headers.")
        headers.append((name.lower(), value))


def check_head(method: bytes, url: bytes, version: str, headers: Sequence[Header], max_head: int) -> None:
    """What the parser lets pass and two readers of the same bytes could understand differently. Raises Refusal."""
    names = [*map(_name_of, headers)]
    if b"transfer-encoding" in names:
        _check_encodings(version, headers)
    size = len(method) + len(url) + len("  HTTP/1.1\r\n\r\n") + 4 * len(names)
    if size + sum(map(len, chain.from_iterable(headers))) > max_head:
        raise head_too_large(max_head)
    if version not in ("1.1", "1.0") or method == b"CONNECT":
        raise Refusal(400, "malformed_request", "Only HTTP/1.1 requests to this server are answered.")
    hosts = names.count(b"host")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise Refusal(400, "malformed_request", "The request must have exactly one Host header.")


def _check_encodings(version: str, headers: Sequence[Header]) -> None:
    for name, value in headers:
        if name == b"transfer-encoding" and (value.lower() != b"chunked" or version != "1.1"):
            raise Refusal(400, "malformed_request", "The transfer encoding is not supported.")


def expects_continue(headers: Sequence[Header]) -> bool:
    """Does the client wait for an interim reply before it sends the body?"""
    return b"expect" in dict(headers) and any(
        name == b"expect" and value.lower() == b"100-continue" for name, value in headers
    )


def path_of(url: bytes) -> tuple[str, bytes, bytes]:
    """The path as text and as it came, and the query string."""
    plain = len(url) <= _USUAL_URL and url.startswith(b"/") and b"?" not in url and b"#" not in url
    return _path_of_usual(url) if plain else _parsed(url)


def _parsed(url: bytes) -> tuple[str, bytes, bytes]:
    found = httptools.parse_url(url)
    path = found.path.decode("ascii")
    return unquote(path) if "%" in path else path, found.path, found.query or b""


_USUAL_URL = 128
_path_of_usual = lru_cache(maxsize=64)(_parsed)  # what stands behind a path may be a secret


class SameHead:
    """The head of a request, to know by it those of its connection that differ from it in nothing but the length of
    their body. `scope` is what it says but for its headers; `notes` are the application's."""

    __slots__ = ("_after", "_before", "_headers", "_place", "_start", "notes", "scope")

    def __init__(
        self, before: bytes, after: bytes, headers: list[Header], place: int, scope: HTTPScope, notes: dict[str, Any]
    ) -> None:
        self._before, self._start, self._after = before, len(before), after
        self._headers, self._place = headers, place
        self.scope = scope
        self.notes = notes

    @classmethod
    def of(cls, data: bytes, headers: list[Header], scope: HTTPScope, notes: dict[str, Any]) -> SameHead | None:
        """Of a request that the parser has taken, alone in this read. None: its head is too long to be kept, or there
        is more than one way to write it down."""
        end = data.find(b"\r\n\r\n", 0, MOST_REMEMBERED) + 4
        names = [*map(_name_of, headers)]
        if names.count(b"content-length") != 1 or b"expect" in names or b"transfer-encoding" in names:
            return None
        place = names.index(b"content-length")
        length = headers[place][1]
        lines = [b"%b: %b\r\n" % header for header in headers]
        before = b"".join(lines[:place]) + b"content-length: "
        after = b"\r\n" + b"".join([*lines[place + 1 :], b"\r\n"])
        first = data.find(b"\r\n") + 2
        start = first + len(before)
        if data[first:end].lower() != (before + length + after).lower():
            return None
        if not length.isdigit() or int(length) != len(data) - end:
            return None
        return cls(data[:start], data[start + len(length) : end], headers.copy(), place, scope, notes)

    def told_by(self, data: bytes) -> tuple[list[Header], bytes] | None:
        """The headers and the body, if these are the bytes of one more request with this head."""
        start, after = self._start, self._after
        end = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        if end < 0 or not data.startswith(self._before):
            return None
        length, body = data[start:end], data[end + len(after) :]
        if not length.isdigit() or not data.startswith(after, end) or int(length) != len(body):
            return None
        headers = self._headers.copy()
        headers[self._place] = (b"content-length", length)
        return headers, body


def head_too_large(max_head: int) -> Refusal:
    return Refusal(431, "headers_too_large", f"The request's head is larger than {max_head} bytes.")


def _head_without_upgrade(method: bytes, url: bytes, version: str, headers: Sequence[Header]) -> bytes:
    """The head of a request that does not offer to upgrade, and says the same in all else."""
    head = [b"%s %s HTTP/%s\r\n" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            tokens = [token.strip() for token in value.lower().split(b",")]
            value = b", ".join(token for token in tokens if token not in (b"upgrade", b"http2-settings"))
        if name not in (b"upgrade", b"http2-settings"):
            head.append(b"%s: %s\r\n" % (name, value))
    return b"".join([*head, b"\r\n"])


def refused(refusal: Refusal, default_headers: Sequence[Header]) -> bytes:
    """The whole answer, after which the connection ends."""
    body = error_body(refusal.message, "invalid_request_error", refusal.code)
    headers = [*default_headers, (b"content-type", b"application/json")]
    headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    headers.append((b"x-request-id", b"req_" + secrets.token_hex(16).encode()))
    lines = [b"%s: %s\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[refusal.status], *lines, b"\r\n", body])


def error_body(message: str, kind: str, code: str | None) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
