"""A gateway of its own for each test, in front of a scripted upstream, on either engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests_standalone.support.databases import database_urls, postgres, sqlite_url
from tests_standalone.support.gateway import GatewayProcess
from tests_standalone.support.upstream import ScriptedUpstream

__all__ = ["database_urls", "postgres"]

PRICE = {"input": 2.0, "cached_input": 1.0, "output": 8.0}

Start = Callable[..., Awaitable[GatewayProcess]]


@pytest.fixture
def workers() -> int:
    """Two, where a test does not ask for more: each takes a second to start."""
    return 2


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    urls: dict[str, str] = request.getfixturevalue("database_urls")
    return urls["postgres"]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts gateways, ready when they are returned; all of them end with the test."""
    async with AsyncExitStack() as stack:
        count = 0

        async def starter(config: dict[str, Any], **options: Any) -> GatewayProcess:
            nonlocal count
            count += 1
            gateway = GatewayProcess(config, folder=tmp_path / f"gateway{count}", **options)
            return await stack.enter_async_context(gateway)

        yield starter


def in_front_of(
    upstream: ScriptedUpstream, database_url: str | None = None, *, workers: int = 1, **more: Any
) -> dict[str, Any]:
    """A configuration in which every model name that is not in `models` goes to the upstream, without a price."""
    config: dict[str, Any] = {
        "backends": {"up": {"type": "openai", "base_url": upstream.base_url, "api_key": "sk-upstream-secret"}},
        "default_backend": "up",
        **more,
    }
    config["server"] = {"workers": workers, **config.get("server", {})}
    if database_url is not None:
        config["database"] = {"url": database_url}
    return config


async def end(gateway: GatewayProcess) -> int:
    """SIGTERM, and the exit code."""
    gateway.terminate()
    return await asyncio.to_thread(gateway.wait)
