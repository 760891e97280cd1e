"""Requests as bytes: where a URL leads, and the head that is sent there. Pure.

Whatever could smuggle a second line, or a body of another length, into a head is refused with ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

PORTS = {"http": 80, "https": 443}
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_HOST = re.compile(r"[a-z0-9._~:-]+")
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_OURS = frozenset({"host", "connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})
_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go to."""

    secure: bool
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a method and a URL come to: an origin, and the first two lines to send it."""

    origin: Origin
    method: str
    start: bytes

    def head(self, headers: bytes, body: bytes | None, *, in_chunks: bool = False) -> bytes:
        """The whole head; `headers` are lines already. `in_chunks`: the body follows in HTTP chunks."""
        if in_chunks:
            return b"%stransfer-encoding: chunked\r\n%s\r\n" % (self.start, headers)
        if body is not None:
            return b"%scontent-length: %d\r\n%s\r\n" % (self.start, len(body), headers)
        length = b"content-length: 0\r\n" if self.method in _BODY_EXPECTED else b""
        return b"%s%s%s\r\n" % (self.start, length, headers)


def target_of(method: str, url: str) -> Target:
    """Raises ValueError for what is no method or no plain http(s) URL; user-info is refused, a fragment dropped."""
    if not _TOKEN.fullmatch(method):
        raise ValueError("the method is no token")
    if any(character <= " " or character == "\x7f" for character in url):
        raise ValueError("the URL holds blanks or control characters")
    parts = urlsplit(url)
    if parts.scheme not in PORTS or "@" in parts.netloc:
        raise ValueError("the URL is not http(s)://host[:port]/...")
    host = ascii_host(parts.hostname or "")
    port = PORTS[parts.scheme] if parts.port is None else parts.port
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    place = bracketed(host) if port == PORTS[parts.scheme] else f"{bracketed(host)}:{port}"
    start = f"{method} {quote(path, safe=_PRINTABLE)} HTTP/1.1\r\nhost: {place}\r\n"
    return Target(Origin(parts.scheme == "https", host, port), method, start.encode("ascii"))


def ascii_host(host: str) -> str:
    """As it is asked for and sent. Raises ValueError for what is no host."""
    plain = host if host.isascii() else host.encode("idna").decode("ascii")
    if not _HOST.fullmatch(plain):
        raise ValueError("the URL has no usable host")
    return plain


def bracketed(host: str) -> str:
    """As it stands before a port."""
    return f"[{host}]" if ":" in host else host


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Raises ValueError for names that are no token or are the client's own business, and values of two lines."""
    lines = []
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or name.lower() in _OURS:
            raise ValueError(f"a header may not be sent: {name!r}")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name!r} has control characters")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines).encode("utf-8")
