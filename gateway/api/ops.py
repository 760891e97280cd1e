"""Health, and what this server is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway import __version__
from gateway.api.common import Services, peer, services
from gateway.errors import DatabaseUnavailable
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store import keys
from gateway.wire.jsontext import dumps


class Health:
    """The union of what the legacy APIs answer. Always 200 while the process answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = services(scope).settings
        body = {
            "status": "ok",
            "timestamp": datetime.now(UTC).isoformat(),
            "response_code": 200,
            "version": settings.server.version or __version__,
            "name": settings.server.name,
        }
        await send_json(send, 200, dumps(body))


class Live:
    """The process answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, dumps({"status": "ok"}))


class Ready:
    """200 only if the database answers and the gateway is not draining; causes only for the configured admin key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = services(scope)
        cause = await _database_trouble(found)
        checks = {"database": "ok" if cause is None else "down", "storage": "unused", "backends": found.catalog.health}
        ready = cause is None and not found.drain.stopping
        status = "ok" if ready else "draining" if found.drain.stopping else "unavailable"
        body: dict[str, Any] = {"status": status, "checks": checks}
        if cause is not None and found.auth.is_configured_admin(peer(scope)):
            body["details"] = {"database": cause}
        await send_json(send, 200 if ready else 503, dumps(body), () if ready else [(b"retry-after", b"2")])


class About:
    """`GET /`: name, version and endpoints."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = services(scope).settings
        listed: Sequence[dict[str, str]] = scope["state"]["endpoints"]
        name = settings.server.name
        version = settings.server.version or __version__
        body = {"app_name": name, "name": name, "version": version, "endpoints": listed}
        await send_json(send, 200, dumps(body))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/", About, "This list"),
    ("GET", "/health", Health, "Is the gateway up?"),
    ("GET", "/health/live", Live, "Does the process answer?"),
    ("GET", "/health/ready", Ready, "Can it take work?"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


async def _database_trouble(found: Services) -> str | None:
    if not found.readiness.ready:
        return found.readiness.cause
    try:
        await keys.state(found.database)
    except DatabaseUnavailable as failure:
        return failure.cause
    return found.relay.ledger.trouble
