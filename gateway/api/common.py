"""What dialects share: the caller of a request, its body, the state that the lifespan has built."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.auth import Auth, Caller, Peer
from gateway.catalog import Catalog
from gateway.config import Settings
from gateway.conversations import Conversations
from gateway.drain import Drain
from gateway.errors import BadRequest, BodyTooLarge, Unavailable, UnsupportedMediaType
from gateway.middleware import header
from gateway.relay import Relay
from gateway.responses import Receive, Scope
from gateway.store.database import Database


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
        client[0] if client else None, server[0] if server else None, scope["headers"], scope.get("query_string", b"")
    )


async def identify(scope: Scope) -> Caller:
    """Who is asking. Raises Unauthenticated, BadRequest, Unavailable. Nothing of the body is read for it."""
    found = services(scope)
    found.readiness.check()
    caller = await found.auth.identify(peer(scope))
    scope["state"]["user"] = caller.user_id
    return caller


async def read_json_body(scope: Scope, receive: Receive) -> bytes:
    """The body of a JSON route. Raises UnsupportedMediaType, and BodyTooLarge: before reading if the length is told."""
    kind = (header(scope, b"content-type") or b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise UnsupportedMediaType("Send the body as JSON, with `Content-Type: application/json`.")
    if header(scope, b"content-encoding") not in (None, b"identity"):
        raise UnsupportedMediaType("Compressed request bodies are not accepted. Send the JSON as it is.")
    limit = int(services(scope).settings.server.max_body_mb * 1024 * 1024)
    length = header(scope, b"content-length")
    if length is not None and int(length) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The request ended before its body was complete.", log="client left while sending")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            scope["state"]["body_read"] = True
            return b"".join(parts) if len(parts) > 1 else parts[0]


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit / 1024 / 1024:g} MiB (server.max_body_mb).")
