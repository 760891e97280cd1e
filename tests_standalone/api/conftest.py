"""The whole application in the test's own loop, without a server: requests are ASGI messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from gateway.app import Gateway
from gateway.auth import digest, new_key
from gateway.config import load_settings
from gateway.store import keys
from tests_standalone.conftest import rows, stored_key
from tests_standalone.support.databases import sqlite_url
from tests_standalone.support.upstream import ScriptedUpstream

ADMIN_KEY = "sk-admin-of-the-tests"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    finished: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class App:
    """Open it with `async with`; it has its own SQLite, and an admin key, so that nobody gets in without one."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        file = folder / "config.yaml"
        written = {"auth": {"admin_key": ADMIN_KEY}, "database": {"url": sqlite_url(folder)}, **config}
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        self.gateway = Gateway(load_settings(str(file), {}))
        self._state: dict[str, Any] = {}
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._answered: asyncio.Queue[Any] = asyncio.Queue()
        self._running: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        self._running = asyncio.create_task(self.gateway(scope, self._told.get, self._answered.put))
        await self._tell("startup")
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._tell("shutdown")
        await self._running

    async def _tell(self, what: str) -> None:
        await self._told.put({"type": f"lifespan.{what}"})
        assert (await self._answered.get())["type"] == f"lifespan.{what}.complete"

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return await rows(self._state["services"].database, sql)

    async def add_key(self, *models: str) -> dict[str, str]:
        """The header that holds a new key, for these models only."""
        secret = new_key()
        key = stored_key(digest=digest(secret), models=models)
        await keys.add(self._state["services"].database, key)
        return {"authorization": f"Bearer {secret}"}

    async def call(
        self,
        method: str,
        path: str,
        body: Any = b"",
        headers: Mapping[str, str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        **scope: Any,
    ) -> Answer:
        """`body`: bytes or JSON, whose length is told. `messages` of the server may bring it instead."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": "localhost", "content-type": "application/json", **ADMIN}
        fields |= {"content-length": str(len(raw))} if messages is None else {}
        told = [{"type": "http.request", "body": raw}] if messages is None else messages
        return await self._exchange({"method": method, "path": path, **scope}, fields | dict(headers or {}), told)

    async def _exchange(self, scope: dict[str, Any], headers: Mapping[str, str], messages: Sequence[Any]) -> Answer:
        sent: list[Any] = []
        waiting = list(messages)

        async def receive() -> Any:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        usual: dict[str, Any] = {
            "type": "http", "http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": "",
            "client": ("127.0.0.1", 50_000), "server": ("127.0.0.1", 8000), "state": dict(self._state),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        }  # fmt: skip
        await self.gateway(usual | scope | {"raw_path": scope["path"].encode()}, receive, send)
        found = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
        whole = b"".join(message["body"] for message in sent[1:])
        return Answer(sent[0]["status"], found, whole, not sent[-1].get("more_body", False))


Launch = Callable[..., Awaitable[App]]


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Launch]:
    """Opens an application with these settings; it ends with the test."""
    async with AsyncExitStack() as stack:

        async def opener(**config: Any) -> App:
            return await stack.enter_async_context(App(tmp_path, config))

        yield opener


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as running:
        yield running


def at(upstream: ScriptedUpstream, **options: Any) -> dict[str, Any]:
    """A backend's settings."""
    return {"type": "openai", "base_url": upstream.base_url, "api_key": "sk-upstream", **options}
