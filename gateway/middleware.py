"""What surrounds every route, as plain ASGI: CORS, request ids and the access log, errors, spellings of a path.

From the outside in: `CORS`, `Observed` with the `ErrorBoundary`, `OnePath`, then the router. CORS is outermost so that
a refusal carries its headers too: without them a browser reports a network error and nothing else.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.exceptions import HTTPException

from gateway import logs
from gateway.addresses import client_address
from gateway.errors import GatewayError, MethodNotAllowed, NotFound
from gateway.ids import ordered_hex
from gateway.responses import (
    Header,
    Message,
    Receive,
    Scope,
    Send,
    SendWhole,
    error_body,
    send_error,
    send_whole,
    whole_way,
)

log = logging.getLogger("gateway")

App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SLASHES = re.compile(r"/{2,}")
_CALLS = r"chat/completions|completions|embeddings|moderations|images/[a-z]+|audio/[a-z]+"
_AZURE = re.compile(rf"/openai/deployments/(.+?)(/(?:{_CALLS}))|/openai(/v1(?:/.*)?)")
_WITHOUT_V1 = re.compile(rf"/({_CALLS}|models)(/.*)?")
_VARY: list[Header] = [(b"vary", b"Origin")]
_METHODS = b"GET, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED = (
    b"x-request-id, retry-after, retry-after-ms, x-should-retry, x-conversation-id, x-gateway-backend, "
    b"x-gateway-model, x-gateway-cost, x-gateway-omitted-turns, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    b"x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, "
    b"x-ratelimit-reset-tokens, openai-processing-ms"
)


def headers_by_name(scope: Scope) -> Mapping[bytes, bytes]:
    """The first header of each name (lower case)."""
    try:
        found: dict[bytes, bytes] = scope["gateway.headers"]
    except KeyError:
        found = scope["gateway.headers"] = dict(reversed(scope["headers"]))
    return found


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that name (lower case)."""
    return headers_by_name(scope).get(name)


def one_path(path: str) -> str:
    """The one spelling that routes know: no doubled slash, no slash at the end, one `/v1`."""
    if "//" in path:
        path = _SLASHES.sub("/", path)
    if path.endswith("/") and path != "/":
        path = path[:-1]
    azure = _AZURE.fullmatch(path)
    if azure is not None:
        path = azure[3] or azure[2]
    while path.startswith("/v1/v1/") or path == "/v1/v1":
        path = path[3:]
    return f"/v1{path}" if _WITHOUT_V1.fullmatch(path) else path


class CORS:
    """For `/v1` and its spellings without it. `origins` empty: off. Preflights need no key and name no list of
    headers: SDKs send a dozen of their own, so what is asked for is what is allowed."""

    def __init__(self, app: App, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.rstrip("/").encode() for origin in origins)
        self._any = b"*" in self._origins

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        origin = headers_by_name(scope).get(b"origin")
        if origin is None and scope["method"] != "OPTIONS":
            return self._app(scope, receive, send)
        if not (self._origins and one_path(scope["path"]).startswith("/v1")):
            origin = None
        allowed = origin is not None and (self._any or origin in self._origins)
        if scope["method"] == "OPTIONS":
            plain = [*_VARY, (b"allow", _METHODS), (b"x-request-id", _new_id().encode())]
            return _send_empty(send, 204, self._preflight(scope, origin) if origin is not None and allowed else plain)
        if origin is None:
            return self._app(scope, receive, send)
        extra = [*self._origin(origin), (b"access-control-expose-headers", _EXPOSED)] if allowed else _VARY

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = _varied(message["headers"], extra)
            return send(message)

        return self._app(scope, receive, send_with_headers)

    def _origin(self, origin: bytes) -> list[Header]:
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin), *_VARY]

    def _preflight(self, scope: Scope, origin: bytes) -> list[Header]:
        asked = header(scope, b"access-control-request-headers")
        found = [*self._origin(origin), (b"access-control-allow-methods", _METHODS)]
        if asked is not None:
            found.append((b"access-control-allow-headers", asked))
        if header(scope, b"access-control-request-private-network") == b"true":
            found.append((b"access-control-allow-private-network", b"true"))
        return [*found, (b"access-control-max-age", b"86400")]


class RequestMetrics(Protocol):
    """Who counts requests. `route` is the path as its route was written, empty if no route knows it."""

    def request_begun(self) -> None: ...

    def stream_begun(self) -> None: ...

    def request_ended(self, route: str, method: str, status: int, seconds: float, *, streamed: bool) -> None: ...


class _Answer:
    """The `send` of a request: the answer gets its id, and `state` and `metrics` hear that it has begun."""

    __slots__ = ("_id_header", "_metrics", "_send", "_state", "_whole", "streamed")

    def __init__(
        self,
        send: Send,
        whole: SendWhole | None,
        state: MutableMapping[str, Any],
        id_header: Header,
        metrics: RequestMetrics | None,
    ) -> None:
        self._send = send
        self._whole = whole
        self._state = state
        self._id_header = id_header
        self._metrics = metrics
        self.streamed = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message["headers"] = self._begun(message["status"], message["headers"])
        return self._send(message)

    def whole(self, status: int, headers: Sequence[Header], body: bytes, more: bool = False) -> Awaitable[None]:
        """Of an answer that is no stream of events, or of the beginning (`more`) of any."""
        if self._whole is None:
            return send_whole(self, status, headers, body, more)
        if more:
            return self._whole(status, self._begun(status, headers), body, more)
        self._state["status"] = status
        return self._whole(status, [*headers, self._id_header], body)

    def _begun(self, status: int, headers: Sequence[Header]) -> Sequence[Header]:
        """The headers that leave."""
        self._state["status"] = status
        if self._metrics is not None and _is_event_stream(headers):
            self.streamed = True
            self._metrics.stream_begun()
        return [*headers, self._id_header]


class Observed:
    """Gives every request an id and a line in the access log: method, path, status, time. Never the query string,
    a header that could hold a secret, or a word of a prompt. `X-Forwarded-For` counts only from `trusted_proxies`.

    The state's `metrics`, if there, counts them. Its `status` is that of an answer that has begun.
    """

    def __init__(self, inner: ErrorBoundary, trusted_proxies: Iterable[str] = ()) -> None:
        self._app, self._answer_failure = inner.app, inner.answer
        self._trusted = tuple(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = headers_by_name(scope).get(b"x-request-id")
        request_id = _new_id() if given is None or not _SAFE_REQUEST_ID.fullmatch(given) else given.decode()
        started = time.perf_counter()
        state = scope["state"]
        state["request_id"] = request_id
        metrics: RequestMetrics | None = state.get("metrics")
        id_header = (b"x-request-id", request_id.encode())
        answer = _Answer(send, whole_way(scope, send), state, id_header, metrics)
        if metrics is not None:
            metrics.request_begun()
        try:
            await self._app(scope, receive, answer)
        except Exception as raised:
            await self._answer_failure(raised, scope, answer)
        finally:
            seconds = time.perf_counter() - started
            status = 499 if state.get("client_left") else state.get("status", 499)
            if metrics is not None:
                route = scope.get("route")
                metrics.request_ended(
                    "" if route is None else route.path, scope["method"], status, seconds, streamed=answer.streamed
                )
            logs.access(
                request_id, scope["method"], scope["path"], status, seconds,
                _client(scope, self._trusted), state.get("user"), state.get("model"),
            )  # fmt: skip


class ErrorBoundary:
    """The last place where a failure becomes a reply, in OpenAI's shape or, if a dialect has put one into the state, by
    its `error_body`. What nobody foresaw is a 500 with an id.

    Around `app`, and no application itself: `Observed`, which notes whether the answer has begun, asks it. Every frame
    between a request's task and what it waits for is walked at each of its waits."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def answer(self, raised: Exception, scope: Scope, send: Send) -> None:
        """In a frame of its own: one that holds the failure and is held by it would keep the request for a while."""
        failure = _as_gateway_error(raised)
        unforeseen = failure.status == 500
        if failure.log or unforeseen:
            log.log(
                logging.ERROR if unforeseen else logging.WARNING,
                "%s: %s",
                scope["state"].get("request_id"),
                failure.log or failure.message,
                exc_info=raised if unforeseen else None,
            )
        if "status" not in scope["state"]:
            await send_error(send, failure, _closing(scope), scope["state"].get("error_body", error_body))


class OnePath:
    """Rewrites the spellings of a path to the one that routes know, Azure's among them: there the path names the model
    (the deployment) if the body does not. Never a redirect: POST bodies get lost in them."""

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            azure = _AZURE.fullmatch(_SLASHES.sub("/", scope["path"]).rstrip("/"))
            if azure is not None and azure[1] is not None:
                scope["state"]["deployment"] = azure[1]
            scope["path"] = one_path(scope["path"])
        return self._app(scope, receive, send)


def _varied(headers: Iterable[Header], extra: Iterable[Header]) -> list[Header]:
    """All of them, with one `vary`."""
    both = [*headers, *extra]
    varies = [value for name, value in both if name == b"vary"]
    if len(varies) < 2:
        return both
    return [*(pair for pair in both if pair[0] != b"vary"), (b"vary", b", ".join(varies))]


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """For a path that no route knows."""
    if scope["type"] == "http":
        raise NotFound(f"Unknown path: {scope['method']} {scope['path'][:200]}")


def _client(scope: Scope, trusted: tuple[str, ...]) -> str | None:
    told = scope.get("client")
    peer = told[0] if told else None
    return client_address(peer, scope["headers"], trusted) if trusted else peer


def _new_id() -> str:
    return f"req_{ordered_hex()}"


def _is_event_stream(headers: Iterable[Header]) -> bool:
    for name, value in headers:
        if name == b"content-type":
            return value.startswith(b"text/event-stream")
    return False


def _as_gateway_error(raised: Exception) -> GatewayError:
    if isinstance(raised, GatewayError):
        return raised
    if isinstance(raised, HTTPException) and raised.status_code == 405:
        return MethodNotAllowed("This path does not take that method.", headers=dict(raised.headers or {}))
    return GatewayError("The gateway failed to answer. Its log says more under the id of this request.")


def _closing(scope: Scope) -> list[Header]:
    """A body that nobody will read ends the connection: it must not be taken for the next request."""
    if scope["state"].get("body_read"):
        return []
    length = header(scope, b"content-length")
    small = length is None or (length.isdigit() and int(length) <= 1 << 16)
    return [] if small and header(scope, b"transfer-encoding") is None else [(b"connection", b"close")]


async def _send_empty(send: Send, status: int, headers: list[Header]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
