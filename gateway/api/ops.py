"""Health, and what this server is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway import __version__
from gateway.api.common import Services, identify, peer, services
from gateway.errors import DatabaseUnavailable, PermissionDenied
from gateway.metrics import Metrics
from gateway.middleware import header
from gateway.responses import NO_STORE, Receive, Scope, Send, send_json
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


class Numbers:
    """`GET /metrics` for Prometheus: the numbers of all workers of this host."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _check_scraper(scope)
        metrics: Metrics = scope["state"]["metrics"]
        accept = (header(scope, b"accept") or b"").decode("latin-1")
        body, content_type = await metrics.render(accept)
        headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body)), NO_STORE]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/", About, "This list"),
    ("GET", "/health", Health, "Is the gateway up?"),
    ("GET", "/health/live", Live, "Does the process answer?"),
    ("GET", "/health/ready", Ready, "Can it take work?"),
    ("GET", "/metrics", Numbers, "Numbers for Prometheus"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


async def _check_scraper(scope: Scope) -> None:
    """Anybody where the settings say so; else an admin, or whoever needs no key as long as there is none. The admin key
    of the configuration is enough while the database is down. Raises Unauthenticated, PermissionDenied, Unavailable."""
    found = services(scope)
    if found.settings.server.metrics == "open" or found.auth.is_configured_admin(peer(scope)):
        return
    caller = await identify(scope)
    keyless = found.settings.auth.mode == "auto" and caller.key_id is None
    if not caller.is_admin and not keyless:
        raise PermissionDenied("The metrics need an admin key, or `server.metrics: open`.")


async def _database_trouble(found: Services) -> str | None:
    if not found.readiness.ready:
        return found.readiness.cause
    try:
        await keys.state(found.database)
    except DatabaseUnavailable as failure:
        return failure.cause
    return found.relay.ledger.trouble
