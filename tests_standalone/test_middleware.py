"""What surrounds every route: a request in, what the application sees, what is sent, and one line of log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from starlette.routing import Route, Router

from gateway.app import DIALECTS
from gateway.errors import BadRequest, Unauthenticated, UpstreamError
from gateway.logs import JSONFormatter
from gateway.middleware import CORS, App, ErrorBoundary, Observed, OnePath, not_found, one_path
from gateway.responses import Message, Receive, Scope, Send, send_json

Headers = dict[str, str]


# One path


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("//chat//completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions//", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/models", "/v1/models"),
        ("/v1//v1/models", "/v1/models"),
        ("/v1/v1", "/v1"),
        ("/models", "/v1/models"),
        ("/models/", "/v1/models"),
        ("/models/org/model:8b", "/v1/models/org/model:8b"),
        ("/v1/models/v1/v1/x", "/v1/models/v1/v1/x"),
        ("/chat/completions/chatcmpl-1/messages", "/v1/chat/completions/chatcmpl-1/messages"),
        ("/", "/"),
        ("//", "/"),
        ("", ""),
        ("/health", "/health"),
        ("/health/", "/health"),
        ("/chat", "/chat"),
        ("/chat/", "/chat"),
        ("/chat/history", "/chat/history"),
        ("/conversations", "/conversations"),
        ("/files/x", "/files/x"),
        ("/modelsx", "/modelsx"),
        ("/v1x/v1/models", "/v1x/v1/models"),
        ("/V1/models", "/V1/models"),
        ("/api/v1/models", "/api/v1/models"),
        ("/v1/../models", "/v1/../models"),
    ],
)
def test_one_path(path: str, known: str) -> None:
    assert one_path(path) == known
    assert one_path(known) == known


def test_routes_are_spelled_as_they_are_known() -> None:
    """So a request for one of them needs no other spelling."""
    paths = [path for dialect in DIALECTS for _, path, _, _ in dialect.ENDPOINTS if "{" not in path]
    assert "/v1/chat/completions" in paths
    assert [one_path(path) for path in paths] == paths


# The stack, as the application builds it


class Answer:
    """What was sent, message by message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> Headers:
        pairs = [(name.decode().lower(), value.decode("latin-1")) for name, value in self.messages[0]["headers"]]
        assert len(dict(pairs)) == len(pairs), f"a header is doubled: {pairs}"
        return dict(pairs)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        assert found.keys() == {"error"}
        assert found["error"].keys() == {"message", "type", "param", "code"}
        inner: dict[str, Any] = found["error"]
        return inner


async def nothing_more() -> Message:
    return {"type": "http.disconnect"}


async def ok(scope: Scope, _receive: Receive, send: Send) -> None:
    await send_json(send, 200, json.dumps({"path": scope["path"]}).encode())


def failing(failure: BaseException) -> App:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise failure

    return app


def stack(inner: App, origins: Iterable[str] = ("*",), trusted: Iterable[str] = ()) -> App:
    return CORS(Observed(ErrorBoundary(OnePath(inner)), trusted), origins)


class Whole(Answer):
    """Behind our own server, which takes an answer in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.wholes = 0

    async def whole(self, status: int, headers: Any, body: bytes) -> None:
        self.wholes += 1
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


class Begun(Answer):
    """Behind our own server, which takes the beginning of an answer in one piece."""

    async def whole(self, status: int, headers: Any, body: bytes, more: bool = False) -> None:
        assert more
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


async def ask(
    app: App,
    path: str = "/v1/models",
    *,
    method: str = "GET",
    headers: Iterable[tuple[str, str]] = (),
    query: str = "",
    client: tuple[str, int] | None = ("127.0.0.1", 5000),
    state: dict[str, Any] | None = None,
    behind: Answer | None = None,
) -> Answer:
    answer = Answer() if behind is None else behind
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query.encode(), "client": client, "state": {} if state is None else state,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    if behind is not None:
        scope["extensions"] = {"gateway.way_out": behind}
    await app(scope, nothing_more, answer.send)
    return answer


# CORS


PREFLIGHT = (
    ("origin", "https://chat.example.com"),
    ("access-control-request-method", "POST"),
    ("access-control-request-headers", "authorization,x-stainless-lang"),
)


async def test_a_preflight_is_answered_without_a_key_and_allows_what_was_asked_for() -> None:
    answer = await ask(stack(failing(AssertionError())), "/v1/chat/completions", method="OPTIONS", headers=PREFLIGHT)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
        "access-control-allow-headers": "authorization,x-stainless-lang",
        "access-control-max-age": "86400",
    }


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/models/", "//models", "/v1/nothing-here"])
async def test_every_spelling_of_a_path_has_it(path: str) -> None:
    answer = await ask(stack(ok), path, method="OPTIONS", headers=PREFLIGHT)
    assert answer.status == 204
    simple = await ask(stack(ok), path, headers=PREFLIGHT[:1])
    assert simple.headers["access-control-allow-origin"] == "*"


async def test_a_private_network_is_allowed_when_asked_for() -> None:
    asked = (*PREFLIGHT, ("access-control-request-private-network", "true"))
    assert (await ask(stack(ok), method="OPTIONS", headers=asked)).headers[
        "access-control-allow-private-network"
    ] == "true"


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["*"], "https://any.example", "*"),
        (["*"], "null", "*"),
        (["https://a.example"], "https://a.example", "https://a.example"),
        (["https://a.example/"], "https://a.example", "https://a.example"),
        (["https://a.example", "*"], "https://b.example", "*"),
        (["https://a.example"], "https://b.example", None),
        (["https://a.example"], "http://a.example", None),
        (["https://a.example"], "https://a.example:8443", None),
        (["https://a.example"], "https://a.example.evil.example", None),
        (["https://a.example"], "null", None),
        (["https://例え.example", "https://a.example"], "https://a.example", "https://a.example"),
        ([], "https://a.example", None),
    ],
)
@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
async def test_which_origins_are_allowed(origins: list[str], origin: str, allowed: str | None, method: str) -> None:
    headers = [("origin", origin), *(PREFLIGHT[1:] if method == "OPTIONS" else ())]
    answer = await ask(stack(ok, origins), method=method, headers=headers)
    assert answer.headers.get("access-control-allow-origin") == allowed
    assert ("access-control-allow-methods" in answer.headers) is (allowed is not None and method == "OPTIONS")
    assert "access-control-allow-credentials" not in answer.headers
    if origins and "*" not in origins:
        assert "Origin" in answer.headers["vary"]


async def test_what_a_page_may_read() -> None:
    answer = await ask(stack(ok), headers=PREFLIGHT[:1])
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "retry-after", "x-conversation-id", "x-gateway-cost"} <= set(exposed)


@pytest.mark.parametrize(
    ("failure", "status"),
    [(Unauthenticated("no"), 401), (BadRequest("no"), 400), (UpstreamError("no"), 502), (ValueError("no"), 500)],
)
async def test_a_refusal_carries_the_headers_too(failure: Exception, status: int) -> None:
    answer = await ask(stack(failing(failure)), headers=PREFLIGHT[:1])
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/v1/models", ()), ("/health", PREFLIGHT[:1]), ("/", PREFLIGHT[:1]), ("/api/v1/models", PREFLIGHT[:1])],
    ids=["no origin", "health", "root", "another API"],
)
async def test_other_requests_know_nothing_of_it(path: str, headers: Iterable[tuple[str, str]]) -> None:
    answer = await ask(stack(ok), path, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_options_that_are_no_preflight_are_answered_too() -> None:
    answer = await ask(stack(ok), path="/nope", method="OPTIONS", headers=PREFLIGHT[:1])
    assert answer.status == 204
    assert "GET" in answer.headers["allow"]


# Request ids (A65)


@pytest.mark.parametrize("given", ["abc", "a.b-c_9", "x" * 64, "0"])
async def test_a_short_safe_id_of_the_client_is_kept(given: str) -> None:
    state: dict[str, Any] = {}
    answer = await ask(stack(ok), headers=[("x-request-id", given)], state=state)
    assert answer.headers["x-request-id"] == state["request_id"] == given


@pytest.mark.parametrize(
    "given", [None, "", "x" * 65, "x" * 10_240, "\x1b[31m", '{"a":1}', "a b", "a\nb", "é", "a/b", "a;b", "abc\n", "%41"]
)
async def test_any_other_is_replaced(given: str | None) -> None:
    state: dict[str, Any] = {}
    headers = [] if given is None else [("x-request-id", given)]
    answer = await ask(stack(ok), headers=headers, state=state)
    assert re.fullmatch(r"req_[0-9a-f]{44}", answer.headers["x-request-id"])
    assert state["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(("origin", "wholes"), [([], 1), ([("origin", "https://here")], 0)])
@pytest.mark.parametrize("inner", [ok, failing(BadRequest("no"))], ids=["ok", "refused"])
async def test_an_answer_in_one_piece_is_the_same(inner: App, origin: list[tuple[str, str]], wholes: int) -> None:
    """Where no page is to read it: then `send` is another's."""
    state: dict[str, Any] = {}
    told, whole = [("x-request-id", "mine"), *origin], Whole()
    usual = await ask(stack(inner), headers=told)
    await ask(stack(inner), headers=told, behind=whole, state=state)
    assert (whole.status, whole.headers, whole.body) == (usual.status, usual.headers, usual.body)
    assert whole.headers["x-request-id"] == "mine"
    assert (whole.wholes, state["status"]) == (wholes, usual.status)


async def test_ids_differ() -> None:
    assert len({(await ask(stack(ok))).headers["x-request-id"] for _ in range(50)}) == 50


async def test_a_failure_has_an_id_too() -> None:
    answer = await ask(stack(failing(ValueError("no"))), headers=[("x-request-id", "mine")])
    assert (answer.status, answer.headers["x-request-id"]) == (500, "mine")


# The access log (A66)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    caplog.set_level(logging.INFO)
    return lambda: [
        json.loads(JSONFormatter().format(record)) for record in caplog.records if record.name == "gateway.access"
    ]


Lines = Callable[[], list[dict[str, Any]]]


async def test_a_line_for_every_request(lines: Lines) -> None:
    state = {"user": "ann", "model": "m"}
    answer = await ask(stack(ok), "/models/", headers=[("x-request-id", "mine")], state=state)
    (line,) = lines()
    assert answer.status == 200
    wanted = {"request_id": "mine", "method": "GET", "path": "/v1/models", "status": 200, "client": "127.0.0.1"}
    assert line.items() >= (wanted | {"user": "ann", "model": "m", "level": "info"}).items()
    assert line["ms"] >= 0


@pytest.mark.parametrize(
    ("failure", "status"), [(BadRequest("x"), 400), (ValueError("x"), 500), (KeyboardInterrupt(), 499)]
)
async def test_failures_have_one_as_well(failure: BaseException, status: int, lines: Lines) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        await ask(stack(failing(failure)))
    assert [line["status"] for line in lines()] == [status]


async def test_a_client_that_left_before_an_answer_is_499(lines: Lines) -> None:
    async def silent(_scope: Scope, _receive: Receive, _send: Send) -> None:
        return

    await ask(stack(silent))
    assert [line["status"] for line in lines()] == [499]


SECRET = "sk-0123456789abcdef"


async def test_no_secret_is_logged(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    headers = [
        ("authorization", f"Bearer {SECRET}"), ("x-api-key", SECRET), ("api-key", SECRET), ("cookie", SECRET),
        ("user-agent", SECRET), ("referer", f"https://x.example/?key={SECRET}"), ("x-request-id", f"{SECRET}!"),
    ]  # fmt: skip
    for app in (stack(ok), stack(failing(BadRequest("no"))), stack(not_found)):
        await ask(app, headers=headers, query=f"api_key={SECRET}&prompt=canary")
    assert len(lines()) == 3
    assert SECRET not in caplog.text
    assert "canary" not in str([vars(record) for record in caplog.records])
    assert SECRET not in str([vars(record) for record in caplog.records])


@pytest.mark.parametrize(
    "path", ['/v1/x\n{"level":"error"}', "/\x1b[31mred", "/\r\nforged", "/\x00", "/\u202e", "/\x9b"]
)
async def test_a_path_cannot_forge_a_line(path: str, lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    await ask(stack(not_found), path, method="G\nET")
    (line,) = lines()
    assert (line["path"], line["method"]) == (path, "G\nET")
    for record in caplog.records:
        written = JSONFormatter().format(record)
        assert written.isprintable()


# The client's address (A67)


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ([], "10.0.0.1", ["1.1.1.1"], "10.0.0.1"),
        (["10.0.0.1"], "203.0.113.9", ["1.1.1.1"], "203.0.113.9"),
        (["10.0.0.1"], "10.0.0.1", [], "10.0.0.1"),
        (["10.0.0.1"], "10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", ["6.6.6.6, 1.1.1.1, 10.9.9.9"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", ["6.6.6.6", "1.1.1.1", "10.9.9.9"], "1.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", [" , ,1.1.1.1, "], "1.1.1.1"),
        (["10.0.0.0/8"], "10.0.0.1", ["6.6.6.6, unknown"], "unknown"),
        (["10.0.0.0/8"], "::ffff:10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        (["::1"], "::1", ["2001:db8::7"], "2001:db8::7"),
        (["fd00::/8", "10.0.0.0/8"], "fd00::1", ["1.1.1.1, 10.0.0.1"], "1.1.1.1"),
        (["10.0.0.1"], None, ["1.1.1.1"], None),
    ],
)
async def test_hops_are_counted_from_the_right(
    trusted: list[str], peer: str | None, forwarded: list[str], client: str | None, lines: Lines
) -> None:
    headers = [("x-forwarded-for", value) for value in forwarded]
    await ask(stack(ok, trusted=trusted), headers=headers, client=None if peer is None else (peer, 5000))
    assert [line["client"] for line in lines()] == [client]


@pytest.mark.parametrize("name", ["forwarded", "x-real-ip", "x-forwarded-host", "true-client-ip"])
async def test_other_headers_say_nothing_of_the_client(name: str, lines: Lines) -> None:
    await ask(stack(ok, trusted=["127.0.0.0/8"]), headers=[(name, "for=6.6.6.6")])
    assert [line["client"] for line in lines()] == ["127.0.0.1"]


async def test_a_long_forgery_is_cut(lines: Lines) -> None:
    await ask(stack(ok, trusted=["127.0.0.0/8"]), headers=[("x-forwarded-for", "x" * 10_000)])
    assert [len(line["client"]) for line in lines()] == [64]


# Metrics


class Told:
    """What the middleware tells, in order."""

    def __init__(self) -> None:
        self.words: list[tuple[object, ...]] = []

    def request_begun(self) -> None:
        self.words.append(("begun",))

    def stream_begun(self) -> None:
        self.words.append(("stream",))

    def request_ended(self, route: str, method: str, status: int, seconds: float, *, streamed: bool) -> None:
        assert seconds > 0
        self.words.append((route, method, status, streamed))


async def events(_scope: Scope, _receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: 1\n\n"})


async def left(scope: Scope, _receive: Receive, _send: Send) -> None:
    scope["state"]["client_left"] = True


@pytest.mark.parametrize(
    ("inner", "path", "method", "told"),
    [
        (ok, "/x", "GET", [("", "GET", 200, False)]),
        (events, "/x", "POST", [("stream",), ("", "POST", 200, True)]),
        (left, "/x", "POST", [("", "POST", 499, False)]),
        (failing(ValueError("any")), "/x", "POST", [("", "POST", 500, False)]),
        ("routed", "/models/", "GET", [("/v1/models", "GET", 200, False)]),
        ("routed", "/models", "DELETE", [("/v1/models", "DELETE", 405, False)]),
        ("routed", "/nothing", "GET", [("", "GET", 404, False)]),
    ],
)
async def test_requests_are_counted(inner: App | str, path: str, method: str, told: list[tuple[object, ...]]) -> None:
    metrics = Told()
    app = routed if isinstance(inner, str) else inner
    await ask(stack(app), path, method=method, state={"metrics": metrics})
    assert metrics.words == [("begun",), *told]


async def test_a_stream_whose_first_piece_leaves_with_its_status_counts_as_one() -> None:
    async def begun(scope: Scope, receive: Receive, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send.whole(200, headers, b"data: 1\n\n", True)
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})

    metrics, answer = Told(), Begun()
    await ask(stack(begun), "/x", method="POST", state={"metrics": metrics}, behind=answer)
    assert metrics.words == [("begun",), ("stream",), ("", "POST", 200, True)]
    assert answer.body == b"data: 1\n\ndata: 2\n\n"
    assert answer.headers["x-request-id"].startswith("req_")


async def test_a_request_that_is_cancelled_has_ended_too() -> None:
    metrics = Told()
    with contextlib.suppress(asyncio.CancelledError):
        await ask(stack(failing(asyncio.CancelledError())), state={"metrics": metrics})
    assert metrics.words == [("begun",), ("", "GET", 499, False)]


# Errors


ROUTER = Router(
    [Route("/v1/models", type("Models", (), {"__call__": staticmethod(ok)})(), methods=["GET"])],
    redirect_slashes=False,
    default=not_found,
)


async def routed(scope: Scope, receive: Receive, send: Send) -> None:
    scope["app"] = ROUTER
    await ROUTER(scope, receive, send)


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/chat/completion", "/.env", "/v1/models/../x"])
async def test_an_unknown_path(path: str) -> None:
    answer = await ask(stack(routed), path)
    assert answer.status == 404
    assert answer.error["code"] == "not_found"
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("method", ["POST", "DELETE", "TRACE", "get", "PROPFIND", "X"])
async def test_a_method_that_a_path_does_not_take(method: str) -> None:
    """A17."""
    answer = await ask(stack(routed), method=method)
    assert answer.status == 405
    assert answer.error["code"] == "method_not_allowed"
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize("path", ["/models", "/v1/models/", "//v1//models", "/v1/v1/models"])
async def test_no_spelling_is_a_redirect(path: str) -> None:
    answer = await ask(stack(routed), path)
    assert answer.status == 200
    assert json.loads(answer.body) == {"path": "/v1/models"}


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("/home/ann/secret.py: sk-canary"),
        KeyError("sk-canary"),
        RuntimeError("postgresql://user:canary@db/x"),
        RecursionError("canary"),
        AssertionError("canary"),
    ],
)
async def test_what_nobody_foresaw_says_nothing_of_the_inside(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A105. The log says it, under the id of the request."""
    answer = await ask(stack(failing(failure)), headers=[("x-request-id", "mine")])
    assert answer.status == 500
    assert answer.error["type"] == "server_error"
    assert "canary" not in answer.body.decode()
    assert type(failure).__name__ not in answer.body.decode()
    assert "/" not in answer.error["message"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage().startswith("mine: ")
    assert record.exc_info is not None
    assert record.exc_info[1] is failure


async def test_a_refusal_with_a_cause_is_a_line_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    await ask(stack(failing(UpstreamError("It failed.", log="the cause"))), headers=[("x-request-id", "mine")])
    (record,) = [record for record in caplog.records if record.name == "gateway"]
    assert (record.getMessage(), record.levelno, record.exc_info) == ("mine: the cause", logging.WARNING, None)


async def test_the_headers_of_a_failure_are_sent() -> None:
    failure = UpstreamError("Slow down.", status=429, headers={"retry-after": "7", "x-should-retry": "false"})
    answer = await ask(stack(failing(failure)))
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("7", "false")
    assert answer.headers["cache-control"] == "no-store"


async def test_a_failure_after_the_status_leaves_the_answer_open(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing may follow that looks like a second answer or like a clean end."""

    async def half(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("in the middle")

    answer = await ask(stack(half))
    assert [message["type"] for message in answer.messages] == ["http.response.start", "http.response.body"]
    assert answer.messages[-1]["more_body"]
    assert "in the middle" in caplog.text


@pytest.mark.parametrize(
    ("headers", "body_read", "closes"),
    [
        ((), False, False),
        ((("content-length", "0"),), False, False),
        ((("content-length", "65536"),), False, False),
        ((("content-length", "65537"),), False, True),
        ((("content-length", "1000000000"),), False, True),
        ((("content-length", "1000000000"),), True, False),
        ((("transfer-encoding", "chunked"),), False, True),
        ((("transfer-encoding", "chunked"),), True, False),
        ((("content-length", "nonsense"),), False, True),
    ],
)
async def test_a_large_body_that_nobody_reads_ends_the_connection(
    headers: Iterable[tuple[str, str]], body_read: bool, closes: bool
) -> None:
    """A14."""
    state = {"body_read": True} if body_read else {}
    answer = await ask(stack(failing(Unauthenticated("no"))), method="POST", headers=headers, state=state)
    assert (answer.headers.get("connection") == "close") is closes


async def test_other_scopes_pass_through() -> None:
    seen = []

    async def inner(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    send: Callable[[Message], Awaitable[None]] = Answer().send
    await stack(inner)({"type": "lifespan"}, nothing_more, send)
    await not_found({"type": "websocket"}, nothing_more, send)
    assert seen == ["lifespan"]


@pytest.mark.parametrize("path", ["/openai/deployments/m/embeddings", "//openai//deployments/m/embeddings//"])
async def test_the_deployment_is_found_however_many_slashes_there_are(path: str) -> None:
    state: dict[str, Any] = {}
    await ask(stack(ok), path, method="POST", state=state)
    assert state["deployment"] == "m"
