"""What the scripted upstream can do: the fields of a script, and the scripts that have a name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]

DONE = "[DONE]"


@dataclass(frozen=True, kw_only=True)
class Script:
    """One behaviour. The defaults are a well-behaved OpenAI."""

    # How it starts
    status: int = 200
    """An error status comes with its body in OpenAI's shape."""
    fail_first: int = 0
    """Only so many first tries with the same probe get the status, body, trouble or delay; the next ones succeed."""
    head_delay: float = 0
    early: bool = False
    """Replies before the request's body is read. Only where header or base URL select the script."""
    interim: Sequence[int] = ()
    headers: Sequence[tuple[str, str]] = ()
    content_type: str | None = None
    body: str | None = None
    """A whole body, sent as it is."""

    # What it says
    text: str | None = None
    pieces: Sequence[str] = ()
    """The exact deltas of the content."""
    words: int = 0
    word_bytes: int = 0
    """A size for each of `words`, with its space."""
    echo: bool = False
    """The content is the request's JSON without its messages."""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: int = 0
    arguments: str | None = None
    finish_reason: str | None = "stop"
    cached_share: float = 0
    usage: Literal["asked", "finish", "never", "always", "running", "early", "twice"] = "asked"
    """`asked`: as OpenAI does. `finish`: on the finish chunk, as DeepSeek does. `always`: the usage chunk unasked.
    `running`: so far, on every chunk. `early`: before the content. `twice`: on the finish chunk and after it."""
    service_tier: str | None = None
    vendor: Mapping[str, Json] = field(default_factory=dict)
    """Members of a vendor's own for every `top`, `choice`, `delta` (or message) and `usage`."""
    raw: str = ""
    """Members for the top level, as JSON text that is sent as it stands."""

    # How the stream is written
    events: Sequence[str] = ()
    """The data of all events, sent as they are."""
    ignores_stream: bool = False
    """A JSON body where a stream was asked for."""
    streams_always: bool = False
    prelude: Sequence[Json] = ()
    """Chunks (merged over a usual one) before the first."""
    ending: Sequence[str] = (DONE,)
    prefix: str = ""
    """Before the body."""
    before: str = ""
    """Before each event."""
    newline: str = "\n"
    space: str = " "
    multi_line: bool = False
    spaced: bool = False
    ascii: bool = False
    first_delay: float = 0
    delay: float = 0

    # What goes wrong: `then`, once `after` events (or half of a whole body) were sent
    after: int = 3
    then: Literal["drop", "fin", "rst", "tear", "hang", "hold", "error", "error-event", "garbage", "endless"] | None = (
        None
    )
    """`drop`: no byte of a reply. `tear`: `fin` inside an event. `hang`: silence. `hold`: silence until `release()`,
    before the head if `after` is -1. `error`, `error-event`: an error in the stream, which then ends. `garbage`: an
    event that is no JSON. `endless`: a line that does not end."""

    # How bytes travel
    framing: Literal["auto", "chunked", "length", "close"] = "auto"
    length_error: int = 0
    """Added to the true content-length."""
    split: int = 0
    """So many bytes in each HTTP chunk and each write."""
    gzip: Literal["", "flushed", "late"] = ""
    trailers: Sequence[tuple[str, str]] = ()
    send_buffer: int = 0
    close: Literal["", "announced", "silent", "next"] = ""
    """After the reply: with or without `connection: close`, or not before the next request on that connection."""

    def with_fields(self, fields: Mapping[str, Any]) -> Script:
        known = {each.name for each in dataclasses.fields(self)}
        if unknown := sorted(set(fields) - known):
            raise ScriptError(f"a script has no field {', '.join(unknown)}")
        return dataclasses.replace(self, **fields)

    def sound(self) -> Script:
        """This script after its failures."""
        return dataclasses.replace(self, status=200, body=None, then=None, head_delay=0, headers=())


class ScriptError(Exception):
    """A test asked for a script that nobody has written."""


VENDOR_FIELDS: Mapping[str, Json] = {
    "top": {"provider": "Acme", "x_acme": {"region": "eu", "ids": [1, 2, 3], "note": None}},
    "choice": {"native_finish_reason": "STOP", "stop_reason": None},
    "delta": {"x_annotations": [{"kind": "naïve", "score": 0.25}]},
    "usage": {"queue_time": 0.0125, "x_units": 7},
}
ODD_JSON = (
    '"big" : 123456789012345678901234567890,"float":1.0e+02 , "tiny":1E-7,"negative_zero":-0.0,"trailing_zero":1.50,'
    '"escapes":"\\u0041\\/\\u00e9\\t", "nested" :{ "empty":{ } ,"list":[ ]}'
)
UNICODE_TEXT = "Grüße, 世界! مرحبا 👩‍👩‍👧‍👦 emoji 🏳️‍🌈 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢"
LINE_SEPARATORS = "one\u2028two \u2029three \u0085four \u000bfive \u000csix \x1cseven"
AZURE_PRELUDE: Json = {
    "id": "",
    "object": "",
    "created": 0,
    "model": "",
    "choices": [],
    "prompt_filter_results": [
        {"prompt_index": 0, "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}
    ],
}
HTML = "<!DOCTYPE html><html><body><h1>Welcome to nginx!</h1></body></html>\n"

ERRORS: dict[int, tuple[str, str | None, str | None, str]] = {
    400: ("invalid_request_error", "messages[0].role", "invalid_value", "Invalid value: 'robot'."),
    401: ("invalid_request_error", None, "invalid_api_key", "Incorrect API key provided: sk-wrong."),
    402: ("insufficient_balance", None, "invalid_request_error", "Insufficient Balance"),
    403: ("permission_error", None, "unsupported_country", "Country, region, or territory not supported."),
    404: ("invalid_request_error", None, "model_not_found", "The model does not exist or you have no access to it."),
    408: ("timeout", None, None, "The request timed out."),
    409: ("conflict", None, None, "The request conflicts with another one."),
    413: ("invalid_request_error", None, "request_too_large", "The request is too large."),
    422: ("invalid_request_error", "temperature", None, "The parameter could not be processed."),
    429: ("requests", None, "rate_limit_exceeded", "Rate limit reached for requests. Please try again in 1s."),
    500: ("server_error", None, None, "The server had an error while processing your request. Sorry about that!"),
    502: ("server_error", None, None, "Bad gateway."),
    503: ("service_unavailable_error", None, "server_is_overloaded", "The engine is currently overloaded."),
    504: ("server_error", None, None, "The upstream timed out."),
    529: ("overloaded_error", None, None, "Overloaded"),
}
_RETRY_AFTER = {429: (("retry-after", "1"), ("retry-after-ms", "50"))}

SCRIPTS: dict[str, Script] = {
    "answer": Script(),
    # What it says
    "vendor-fields": Script(vendor=VENDOR_FIELDS),
    "odd-json": Script(raw=ODD_JSON, spaced=True),
    "echo-request": Script(echo=True),
    "reasoning": Script(reasoning="First I think, then I answer."),
    "refusal": Script(refusal="I'm sorry, I can't help with that."),
    "tools": Script(tool_calls=1),
    "parallel-tools": Script(tool_calls=2),
    "tools-no-arguments": Script(tool_calls=1, arguments="{}"),
    "cached": Script(cached_share=0.5),
    "length": Script(finish_reason="length"),
    "content-filter": Script(finish_reason="content_filter"),
    "finish-missing": Script(finish_reason=None),
    "finish-empty": Script(finish_reason=""),
    "vendor-tier": Script(service_tier="on_demand"),
    "azure-prelude": Script(prelude=(AZURE_PRELUDE,)),
    "unicode": Script(text=UNICODE_TEXT),
    "unicode-escaped": Script(text=UNICODE_TEXT, ascii=True),
    "lone-surrogate": Script(pieces=("half: ", "\ud83d", " end"), ascii=True),
    "surrogate-pair-split": Script(pieces=("smile: ", "\ud83d", "\ude00", " end"), ascii=True),
    "nul": Script(pieces=("before ", "\x00", " after")),
    "line-separators": Script(text=LINE_SEPARATORS),
    # Where the usage is
    "usage-on-finish": Script(usage="finish"),
    "no-usage": Script(usage="never"),
    "usage-always": Script(usage="always"),
    "usage-running": Script(usage="running"),
    "usage-early": Script(usage="early"),
    "usage-twice": Script(usage="twice"),
    # Time
    "slow-headers": Script(head_delay=0.5),
    "slow-start": Script(first_delay=0.5),
    "slow-chunks": Script(words=10, delay=0.1),
    "held": Script(then="hold", after=2, words=10),
    "held-start": Script(then="hold", after=0),
    "held-headers": Script(then="hold", after=-1),
    "never": Script(head_delay=math.inf),
    "never-after-headers": Script(then="hang", after=0),
    "hang-mid-stream": Script(then="hang", words=10),
    # Errors
    **{f"error-{status}": Script(status=status, headers=_RETRY_AFTER.get(status, ())) for status in ERRORS},
    "error-429-quota": Script(
        status=429,
        body='{"error":{"message":"You exceeded your current quota, please check your plan and billing details.",'
        '"type":"insufficient_quota","param":null,"code":"insufficient_quota"}}',
    ),
    "error-context": Script(
        status=400,
        body='{"error":{"message":"This model\'s maximum context length is 8192 tokens.",'
        '"type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}',
    ),
    "error-int-code": Script(status=400, body='{"error":{"message":"Bad value","type":"BadRequestError","code":400}}'),
    "error-detail": Script(status=422, body='{"detail":[{"loc":["body","messages"],"msg":"field required"}]}'),
    "error-text": Script(status=500, body='{"error":"it broke"}'),
    "error-html": Script(status=502, content_type="text/html", body="<html><h1>502 Bad Gateway</h1></html>"),
    "fail-once": Script(status=503, fail_first=1),
    "fail-twice": Script(status=503, fail_first=2),
    "fail-once-500": Script(status=500, fail_first=1),
    "fail-once-429": Script(status=429, fail_first=1, headers=(("retry-after-ms", "10"),)),
    "fail-once-drop": Script(then="drop", fail_first=1),
    "error-mid-stream": Script(then="error", words=10),
    "error-event-mid-stream": Script(then="error-event", words=10),
    # The connection
    "drop": Script(then="drop"),
    "cut-fin": Script(then="fin", words=10),
    "cut-rst": Script(then="rst", words=10),
    "cut-in-event": Script(then="tear", words=10),
    "cut-at-once": Script(then="fin", after=0),
    "redirect": Script(status=307, headers=(("location", "/redirected/v1/chat/completions"),), body=""),
    "redirect-302": Script(status=302, headers=(("location", "/redirected/v1/chat/completions"),), body=""),
    "early-reply": Script(status=413, early=True),
    "interim": Script(interim=(102, 103)),
    "close-announced": Script(close="announced"),
    "close-silent": Script(close="silent"),
    "close-next": Script(close="next"),
    "big-header": Script(headers=(("x-big", "h" * (100 << 10)),)),
    "duplicate-headers": Script(
        headers=(("x-twice", "a"), ("x-twice", "b"), ("set-cookie", "c=1"), ("set-cookie", "d=2"))
    ),
    "trailers": Script(framing="chunked", trailers=(("x-checksum", "abc"),)),
    # The body
    "chunked": Script(framing="chunked"),
    "content-length": Script(framing="length"),
    "close-delimited": Script(framing="close"),
    "short-body": Script(framing="length", length_error=+100),
    "long-body": Script(framing="length", length_error=-10),
    "gzip": Script(gzip="flushed"),
    "gzip-late": Script(gzip="late"),
    "gzip-bomb": Script(gzip="flushed", words=1, word_bytes=64 << 20),
    "empty-body": Script(body=""),
    "html": Script(content_type="text/html; charset=utf-8", body=HTML),
    "invalid-json": Script(then="garbage"),
    "json-not-stream": Script(ignores_stream=True),
    "stream-not-json": Script(streams_always=True),
    "blank-lines": Script(prefix="\n\n\n"),
    # Server-sent events
    "crlf": Script(newline="\r\n"),
    "cr": Script(newline="\r"),
    "no-space": Script(space=""),
    "bom": Script(prefix="\ufeff"),
    "comments": Script(before=": OPENROUTER PROCESSING\n\n: ping\n"),
    "sse-fields": Script(before="event: message\nid: 7\nretry: 1000\n"),
    "multi-line": Script(multi_line=True),
    "bytewise": Script(split=1, text=UNICODE_TEXT),
    "split-7": Script(split=7, text=UNICODE_TEXT),
    "no-done": Script(ending=()),
    "double-done": Script(ending=(DONE, DONE)),
    "after-done": Script(ending=(DONE, '{"late":true}')),
    # Size
    "long-line": Script(words=1, word_bytes=2 << 20),
    "endless-line": Script(then="endless"),
    "thousand": Script(words=1000),
    "flood": Script(words=10_000, word_bytes=10_000, send_buffer=64 << 10),
}


def error_body(status: int, message: str | None = None) -> bytes:
    """An error as OpenAI writes it."""
    kind, param, code, usual = ERRORS.get(status, ERRORS[500 if status >= 500 else 400])
    error = {"message": message or usual, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, indent=4).encode() + b"\n"
