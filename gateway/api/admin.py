"""For operators, with an admin key: how the backends and their routes are doing, as the answering worker sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import identify, services
from gateway.backends.base import Loadable, operations_of
from gateway.catalog import Provider
from gateway.errors import UpstreamError
from gateway.responses import Receive, Scope, Send, send_json
from gateway.wire.jsontext import dumps

LOAD_STATE_SECONDS = 2.0


class Backends:
    """`GET /admin/backends`: each backend, what it lists and can do, what lies in its memory, the health of its routes.

    Health is of this worker: each learns from its own calls.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        (await identify(scope)).check_admin()
        providers = services(scope).catalog.providers
        described = await asyncio.gather(*(_describe(provider) for provider in providers))
        await send_json(send, 200, dumps({"object": "list", "data": described}))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/admin/backends", Backends, "The backends and the health of their routes"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


async def _describe(provider: Provider) -> dict[str, Any]:
    backend = provider.backend
    return {
        "name": backend.name,
        "status": provider.status,
        "models": len(provider.listed),
        "operations": sorted(operations_of(backend)),
        "loaded": await _loaded(backend) if isinstance(backend, Loadable) else None,
        "routes": [{"model": model, **health.describe()} for model, health in provider.health.items()],
    }


async def _loaded(backend: Loadable) -> list[dict[str, Any]] | None:
    """None: it does not say."""
    try:
        async with asyncio.timeout(LOAD_STATE_SECONDS):
            states = await backend.load_states()
    except (UpstreamError, TimeoutError):
        return None
    return [{"model": model, **asdict(state)} for model, state in states.items()]
