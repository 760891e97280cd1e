"""What dialects share: the caller of a request, its body, the state that the lifespan has built."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gateway.auth import Auth, Caller, Peer
from gateway.call import Call, Relay
from gateway.catalog import Catalog, Model
from gateway.config import Settings
from gateway.conversations import Conversations
from gateway.drain import Drain
from gateway.errors import BadRequest, BodyTooLarge, PermissionDenied, Unavailable, UnsupportedMediaType
from gateway.middleware import headers_by_name
from gateway.responses import Header, Receive, Scope, at_hand, header_value, notes
from gateway.store.database import Database

_VERSION: Header = (b"openai-version", b"2020-10-01")
_NAMES_MODELS = frozenset({"models", "fallbacks"})


class Readiness:
    """Is the database there and migrated? `cause` says what is in the way, for those who may know."""

    def __init__(self) -> None:
        self.ready = False
        self.cause = "starting"

    def check(self) -> None:
        """Raises Unavailable while work cannot be recorded."""
        if not self.ready:
            raise Unavailable("The gateway's database does not answer yet. Try again in a moment.", log=self.cause)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that lives as long as the worker. Built in the lifespan, reached through `scope["state"]`."""

    settings: Settings
    database: Database
    auth: Auth
    catalog: Catalog
    conversations: Conversations
    relay: Relay
    drain: Drain
    readiness: Readiness


def services(scope: Scope) -> Services:
    found: Services = scope["state"]["services"]
    return found


def peer(scope: Scope) -> Peer:
    client, server = scope.get("client"), scope.get("server")
    return Peer(
        client[0] if client else None,
        server[0] if server else None,
        scope["headers"],
        scope.get("query_string", b""),
        services(scope).settings.server.trusted_proxies,
    )


def recognized(scope: Scope) -> Caller | None:
    """Who is asking, where the request's head is like that of one before. None: `identify` it. Raises Unavailable."""
    state = scope["state"]
    found: Services = state["services"]
    found.readiness.check()
    key = notes(scope).get("key")
    caller = None if key is None else found.auth.recognize_at_once(key)
    if caller is not None:
        state["user"] = caller.user_id
    return caller


async def identify(scope: Scope) -> Caller:
    """Who is asking. Raises Unauthenticated, BadRequest, Unavailable. Nothing of the body is read for it."""
    state = scope["state"]
    found: Services = state["services"]
    found.readiness.check()
    known = notes(scope)
    key = known.get("key")
    caller = None if key is None else await found.auth.recognize(key)
    if caller is None:
        caller = await found.auth.identify(peer(scope))
        known["key"] = caller.digest
    state["user"] = caller.user_id
    return caller


async def find_model(scope: Scope, caller: Caller, name: str | None, assumed: str | None = None) -> Model:
    """The model that a request names, in its body or its path; else the assumed one, else the default. Raises
    ModelNotFound, PermissionDenied."""
    asked = name or scope["state"].get("deployment")
    return _allowed(scope, caller, await services(scope).catalog.resolve(asked or assumed), asked)


def configured_model(scope: Scope, caller: Caller, name: str | None) -> Model | None:
    """The same, of those that the configuration has. None: `find_model`. Raises PermissionDenied."""
    model = services(scope).catalog.configured(name or None)
    return None if model is None else _allowed(scope, caller, model, name)


def _allowed(scope: Scope, caller: Caller, model: Model, asked: str | None) -> Model:
    scope["state"]["model"] = model.name
    caller.check_model(model.name, asked)
    return model


def check_refused(found: Services, caller: Caller, model: Model, data: Mapping[str, Any]) -> None:
    """Raises BadRequest for a field that a backend of the model does not take, and PermissionDenied for one by which a
    key for some models could name others (OpenRouter's `models`)."""
    if caller.models is not None and _NAMES_MODELS & data.keys():
        raise PermissionDenied("This key is for certain models, so 'models' and 'fallbacks' cannot be sent with it.")
    for route in found.catalog.routes(model):
        if route.refuse:
            for key in route.refuse & data.keys():
                raise BadRequest(f"'{key}' is not accepted by this gateway.", param=key, code="unsupported_parameter")


def end_user(scope: Scope, data: Mapping[str, Any]) -> str | None:
    """A label from the client for whom it asks; never a right."""
    named = data.get("safety_identifier") or data.get("user")
    if named:
        return str(named)
    told = headers_by_name(scope).get(b"x-openwebui-user-id")
    return told.decode("latin-1") if told else None


def call_headers(call: Call[Any]) -> list[Header]:
    """What the reply to a call says about it."""
    job, route, talk = call.job, call.route, call.job.talk
    model, *others = _names(job.model.name, None if route is None else route.backend.name)
    found = [model, (b"openai-processing-ms", b"%d" % ((time.perf_counter() - job.started) * 1000)), *others]
    if talk is not None:
        found.append((b"x-conversation-id", talk.id.encode()))
        if talk.omitted_turns:
            found.append((b"x-gateway-omitted-turns", b"%d" % talk.omitted_turns))
    found += call.ticket.headers
    return found


@lru_cache(maxsize=256)
def _names(model: str, backend: str | None) -> Sequence[Header]:
    """Of models and backends, which are few."""
    found = [(b"x-gateway-model", header_value(model)), _VERSION]
    return found if backend is None else [*found, (b"x-gateway-backend", header_value(backend))]


def cost_header(cost: float | None) -> list[Header]:
    return [] if cost is None else [(b"x-gateway-cost", f"{cost:.9f}".encode())]


def media_type(scope: Scope) -> str:
    """What the body is said to be, without its parameters."""
    told = headers_by_name(scope).get(b"content-type")
    if told == b"application/json":
        return "application/json"
    return (told or b"").partition(b";")[0].strip().lower().decode("latin-1")


def json_at_hand(scope: Scope, receive: Receive) -> bytes | None:
    """The body of a JSON route, where all of it is here and the head is like that of one that was right. None: read it.
    Raises BodyTooLarge."""
    if "is_json" not in notes(scope):
        return None
    body = at_hand(receive)
    if body is not None:
        limit = _bytes(services(scope).settings.server.max_body_mb)
        if len(body) > limit:
            raise _too_large(limit, "server.max_body_mb")
        scope["state"]["body_read"] = True
    return body


def read_json_body(scope: Scope, receive: Receive) -> Awaitable[bytes]:
    """The body of a JSON route. Raises UnsupportedMediaType, and BodyTooLarge: before reading if the length is told."""
    kind = media_type(scope)
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType("Send the body as JSON, with `Content-Type: application/json`.")
    if b"content-encoding" not in headers_by_name(scope):
        notes(scope)["is_json"] = True
    return _read_body(scope, receive, services(scope).settings.server.max_body_mb, "server.max_body_mb")


async def read_form_body(scope: Scope, receive: Receive) -> bytes:
    """The body of a form. Raises as `read_json_body` does."""
    return await _read_body(scope, receive, services(scope).settings.files.max_request_mb, "files.max_request_mb")


async def _read_body(scope: Scope, receive: Receive, megabytes: float, setting: str) -> bytes:
    headers = headers_by_name(scope)
    if b"content-encoding" in headers and headers[b"content-encoding"] != b"identity":
        raise UnsupportedMediaType("Compressed request bodies are not accepted. Send the body as it is.")
    limit = _bytes(megabytes)
    length = headers.get(b"content-length")
    if length is not None and int(length) > limit:
        raise _too_large(limit, setting)
    body = at_hand(receive)
    if body is None:
        body = await _gathered(receive, limit, setting)
    elif len(body) > limit:
        raise _too_large(limit, setting)
    scope["state"]["body_read"] = True
    return body


async def _gathered(receive: Receive, limit: int, setting: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The request ended before its body was complete.", log="client left while sending")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit, setting)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _bytes(megabytes: float) -> int:
    return int(megabytes * 1024 * 1024)


def _too_large(limit: int, setting: str) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit / 1024 / 1024:g} MiB ({setting}).")
