"""What a connection itself judges of a request's head, and the answer that it gives to what it refuses."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

__all__ = ["Refusal", "check_head", "error_body", "head_too_large", "head_without_upgrade", "refused"]

Header = tuple[bytes, bytes]


class Refusal(Exception):
    """The connection's own answer to a request that never reaches the application."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def check_head(method: bytes, url: bytes, version: str, headers: Sequence[Header], max_head: int) -> None:
    """What the parser lets pass and two readers of the same bytes could understand differently. Raises Refusal."""
    hosts = 0
    size = len(method) + len(url) + len("  HTTP/1.1\r\n\r\n")
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version != "1.1"):
            raise Refusal(400, "malformed_request", "The transfer encoding is not supported.")
    if size > max_head:
        raise head_too_large(max_head)
    if version not in ("1.1", "1.0") or method == b"CONNECT":
        raise Refusal(400, "malformed_request", "Only HTTP/1.1 requests to this server are answered.")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise Refusal(400, "malformed_request", "The request must have exactly one Host header.")


def head_too_large(max_head: int) -> Refusal:
    return Refusal(431, "headers_too_large", f"The request's head is larger than {max_head} bytes.")


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Sequence[Header]) -> bytes:
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
