"""An upstream's error bodies, in all the shapes that are about, as our client shall see them.

Shapes: `{"error": {...}}`, `{"error": "text"}`, a flat object with `message` or `detail`, any of them in an array
(Gemini), or no JSON at all. The client's own mistakes pass with the upstream's words; what only the operator can mend
keeps its words to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import UpstreamError

_PASSED = frozenset({400, 404, 409, 413, 415, 422})
_OPERATORS = {401: "the gateway's key", 402: "the gateway's balance", 403: "the gateway's permissions"}
_MOST_WORDS = 2000


def streamed_error(error: object) -> UpstreamError:
    """An error that came inside a reply of status 200. A `code` that is an HTTP status is taken as one."""
    message, fields = _read_error(error)
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and len(code) == 3 and code.isdecimal():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        failure = error_from(error, code, {})
        failure.message = message if message and code not in _OPERATORS else failure.message
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
        failure.headers = {name: headers[name] for name in ("retry-after", "retry-after-ms") if name in headers}
        return failure
    return _operators_fault(status, own_words)


def _for_the_log(how: str, fields: Mapping[str, str | None]) -> str:
    """Never the upstream's sentence: it may quote a prompt or a key."""
    said = " ".join(f"{key}={value[:80]}" for key, value in fields.items() if value and key != "param")
    return f"the upstream failed {how} {said}".rstrip()


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
    if isinstance(data, list) and data:
        data = data[0]
    error = data.get("error") if isinstance(data, dict) else data
    if not isinstance(error, (str, dict)):
        error = data
    if isinstance(error, str):
        return error[:_MOST_WORDS], {}
    if not isinstance(error, dict):
        return "", {}
    said = error.get("message") or error.get("detail") or ""
    fields = {key: _word(error.get(key)) for key in ("type", "code", "param")}
    return (said if isinstance(said, str) else "")[:_MOST_WORDS], fields


def _word(value: object) -> str | None:
    """`code` and friends are strings or null, whatever the upstream made of them."""
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value)[:200]
