"""An upstream's error bodies, in all the shapes that are about, as our client shall see them.

Shapes: `{"error": {...}}`, `{"error": "text"}` (xAI: with a `code` beside it), a flat object with `message` or
`detail` (FastAPI: a list of mistakes), any of them in an array (Gemini), or no JSON at all. The client's own mistakes
pass with the upstream's words; what only the operator can mend keeps its words to itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.errors import UpstreamError

_PASSED = frozenset({400, 404, 409, 413, 415, 422})
_OPERATORS = {401: "the gateway's key", 402: "the gateway's balance", 403: "the gateway's permissions"}
_MOST_WORDS = 2000
_NAME = re.compile(r"[A-Za-z0-9_.:/-]+")
_DELAY = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)s")


class StreamedError(Exception):
    """The upstream sent an error object inside a reply of status 200, or says there that it gave up."""

    def __init__(self, error: object) -> None:
        super().__init__("the upstream reported an error in its reply")
        self.error = error


def error_in(data: Mapping[str, Any]) -> object:
    """The error that an event, or a reply of status 200, holds; None if it holds none."""
    error = data.get("error")
    if error:
        return data if isinstance(error, str) and "code" in data else error
    if data.get("object") == "error":
        return data
    if "choices" in data or "usage" in data or "timings" in data:
        return None
    return data if data.get("message") or data.get("detail") else None


def streamed_error(error: object) -> UpstreamError:
    """An error that came inside a reply of status 200. A `code` that is an HTTP status is taken as one."""
    message, fields = _read_error(error)
    code = error.get("code", error.get("statusCode")) if isinstance(error, dict) else None
    if isinstance(code, str) and len(code) == 3 and code.isdecimal():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        failure = error_from(error, code, {})
        if message and failure.upstream_status not in _OPERATORS:
            failure.message = message
        return failure
    return UpstreamError(
        message or "The upstream reported an error.",
        type=fields["type"] or "upstream_error" if fields else None,
        code=fields.get("code") or "upstream_error",
        log=_for_the_log("in its reply", fields),
    )


def error_from(data: object, status: int, headers: Mapping[str, str]) -> UpstreamError:
    """An upstream's error by its HTTP status (contract, section 8)."""
    message, fields = _read_error(data)
    if status == 400 and any(detail.get("reason") == "API_KEY_INVALID" for detail in _details(data)):
        status = 401  # Gemini's word for a key that is wrong: the gateway's, not the client's
    own_words = {"upstream_status": status, "log": _for_the_log(f"with status {status}", fields)}
    if status in _PASSED:
        kind = fields.get("type") or "invalid_request_error"
        return UpstreamError(
            message or f"The upstream refused the request with status {status}.",
            status=status,
            type=kind,
            code=fields.get("code"),
            param=fields.get("param"),
            **own_words,  # type: ignore[arg-type] # the two keys above
        )
    if status == 429:
        failure = UpstreamError(
            message or "The upstream's rate limit is reached.",
            status=429,
            type=fields.get("type") or "requests",
            code=fields.get("code") or "rate_limit_exceeded",
            **own_words,  # type: ignore[arg-type] # the two keys above
        )
        told = {name: headers[name] for name in ("retry-after", "retry-after-ms") if name in headers}
        failure.headers = told or _told_delay(data)
        return failure
    return _operators_fault(status, own_words)


def _for_the_log(how: str, fields: Mapping[str, str | None]) -> str:
    """Never the upstream's sentence: it may quote a prompt or a key. Some languages write sentences without spaces."""
    words = {key: value for key, value in fields.items() if value and key != "param" and _NAME.fullmatch(value)}
    return f"the upstream failed {how} {' '.join(f'{key}={value[:80]}' for key, value in words.items())}".rstrip()


def _operators_fault(status: int, own_words: dict[str, Any]) -> UpstreamError:
    """What the client cannot mend: our key, our balance, the upstream's health. Its words go nowhere."""
    if status in _OPERATORS:
        what = _OPERATORS[status]
        return UpstreamError(f"The upstream refused {what}. This is for the gateway's operator to mend.", **own_words)
    if status in (408, 504):
        failure = UpstreamError("The upstream did not answer in time.", status=504, **own_words)
        failure.code = "upstream_timeout"
        return failure
    if status in (503, 529):
        return UpstreamError("The upstream is overloaded or down.", status=503, **own_words)
    return UpstreamError(f"The upstream failed with status {status}.", **own_words)


def _read_error(data: object) -> tuple[str, dict[str, str | None]]:
    data = _first(data)
    error = data.get("error") if isinstance(data, dict) else data
    if isinstance(error, str):
        return error[:_MOST_WORDS], _fields(data) if isinstance(data, dict) else {}
    if not isinstance(error, dict):
        error = data
    if not isinstance(error, dict):
        return "", {}
    said = error.get("message") or error.get("detail") or ""
    if isinstance(said, list):
        said = "; ".join(_mistakes(said))
    return (said if isinstance(said, str) else "")[:_MOST_WORDS], _fields(error)


def _first(data: object) -> object:
    return data[0] if isinstance(data, list) and data else data


def _fields(error: Mapping[str, Any]) -> dict[str, str | None]:
    return {key: _word(error.get(key)) for key in ("type", "code", "param")}


def _mistakes(detail: list[Any]) -> Iterator[str]:
    """FastAPI's list, without what was sent: `body.messages.0.role: Field required`."""
    for mistake in detail[:20]:
        said = mistake.get("msg") if isinstance(mistake, dict) else mistake
        if not isinstance(said, str):
            continue
        path = mistake.get("loc") if isinstance(mistake, dict) else None
        where = ".".join(str(step) for step in path) if isinstance(path, list) else ""
        yield f"{where}: {said}" if where else said


def _details(data: object) -> Iterator[Mapping[str, Any]]:
    """Google's: `error.details[]`, each with an `@type`."""
    data = _first(data)
    error = data.get("error", data) if isinstance(data, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    yield from (detail for detail in details if isinstance(detail, dict)) if isinstance(details, list) else ()


def _told_delay(data: object) -> dict[str, str]:
    """When to try again, from a body (Google's RetryInfo, `12.5s`), as headers."""
    for detail in _details(data):
        delay = detail.get("retryDelay")
        found = _DELAY.fullmatch(delay) if isinstance(delay, str) else None
        if found is not None:
            seconds = float(found[1])
            return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    return {}


def _word(value: object) -> str | None:
    """`code` and friends are strings or null, whatever the upstream made of them."""
    if value is None or value == "" or isinstance(value, (dict, list)):
        return None
    return str(value)[:200]
