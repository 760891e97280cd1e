"""The composition root: settings in, an ASGI application out. It wires, and `compose` makes its backends.

`create_app()` reads the settings and builds what needs no running loop; the lifespan opens the rest and hands it to the
routes as `scope["state"]["services"]`. A database that does not answer does not keep the worker from starting: it
answers 503 until the database is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route, Router

from gateway import __version__
from gateway.admission import Admission
from gateway.api import admin, admin_keys, admin_users, conversations, openai, operations, ops, sessions, stored
from gateway.api.common import Readiness, Services
from gateway.auth import Auth
from gateway.backends.client import HTTPTransport
from gateway.call import Relay
from gateway.compose import accesses, build_catalog, with_local_ollama
from gateway.compose_limits import build_admission
from gateway.config import Settings, load_settings
from gateway.conversations import Conversations
from gateway.drain import Drain
from gateway.errors import ConfigError, DatabaseUnavailable
from gateway.key_watch import KeyWatch
from gateway.ledger import Ledger
from gateway.metrics import Metrics, public_names
from gateway.middleware import CORS, ErrorBoundary, Observed, OnePath, not_found
from gateway.purge import Purge
from gateway.responses import Message, Receive, Scope, Send
from gateway.store.connect import database_at
from gateway.store.database import Database
from gateway.store.migrate import SchemaMismatch, migrate, pending
from gateway.tokens import TokenCounter

log = logging.getLogger("gateway")

DIALECTS = (openai, stored, conversations, sessions, operations, admin, admin_keys, admin_users, ops)
_RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)


class Gateway:
    """The ASGI application. `drain` is what the server tells about the end of the worker. `http` answers requests whose
    scope has a state, as our own server's have: what `__call__` does for these, without a frame of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.drain = Drain()
        self._problems: list[str] = []
        routes = [route for dialect in DIALECTS for route in dialect.routes()]
        self._known = _without_parameters(routes)
        self._router = Router(routes, redirect_slashes=False, default=not_found, lifespan=self._lifespan)
        self._respelled = OnePath(self._routed)
        inner = ErrorBoundary(self._as_it_is)
        self.http_app = CORS(Observed(inner, settings.server.trusted_proxies), settings.server.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] == "http":
            scope.setdefault("state", {})
        await self.http_app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What keeps the gateway from starting is said in lines that name the setting, without a traceback."""

        async def plainly(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and self._problems:
                message = {**message, "message": "; ".join(self._problems)}
            await send(message)

        try:
            await self.http_app(scope, receive, plainly)
        except ConfigError:
            if not self._problems:
                raise

    async def _searched(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Each method of a path is a route of its own, and the router names those of the first one only."""
        try:
            await self._router(scope, receive, send)
        except HTTPException as wrong:
            if wrong.status_code == 405:
                fitting = [route for route in self._router.routes if route.matches(scope)[0] is not Match.NONE]
                methods = {method for route in fitting if isinstance(route, Route) for method in route.methods or ()}
                wrong.headers = {"allow": ", ".join(sorted(methods))}
            raise

    def _as_it_is(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """What most ask for is spelled as the routes are."""
        if (scope.get("method"), scope.get("path")) in self._known:
            return self._routed(scope, receive, send)
        return self._respelled(scope, receive, send)

    def _routed(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        route = self._known.get((scope.get("method", ""), scope.get("path", "")))
        if route is not None:
            scope["route"], scope["path_params"] = route, {}
            return route.app(scope, receive, send)
        scope["app"] = self  # makes the router raise for a wrong method instead of answering in plain text
        return self._searched(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[dict[str, Any]]:
        try:
            parts = self._made()
        except ConfigError as failure:
            self._problems = failure.problems
            raise
        opening = parts.bring_up()
        try:
            await asyncio.wait({opening}, timeout=3)
            parts.start()
            yield {"services": parts.services, "endpoints": _endpoints(), "metrics": parts.metrics}
        finally:
            await parts.aclose(opening)

    def _made(self) -> _Parts:
        settings = self.settings
        database = _database(settings)
        transports = {access: HTTPTransport(access) for access in accesses(settings)}
        counter = TokenCounter()
        catalog = build_catalog(settings, transports)
        metrics = Metrics(public_names(catalog, settings.models), __version__)
        watch, readiness = KeyWatch(database), Readiness()
        auth = _auth(settings, database, watch)
        admission = build_admission(settings, database, auth, watch, metrics)
        idle_ms = settings.conversations.session_idle_minutes * 60_000
        ledger = Ledger(database, metrics, admission.release, idle_ms)
        conversations = _conversations(settings, database, counter)
        purge = _purge(settings, database)
        services = Services(
            settings=settings,
            database=database,
            auth=auth,
            catalog=catalog,
            conversations=conversations,
            relay=Relay(
                catalog,
                admission,
                ledger,
                self.drain,
                counter,
                metrics.attempt_ended,
                metrics.upstream_failed,
                settings.limits.max_output_tokens,
                asyncio.get_running_loop(),
            ),
            drain=self.drain,
            readiness=readiness,
        )
        return _Parts(services, metrics, watch, admission, ledger, purge, counter, list(transports.values()))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What lives as long as the program, made and not begun; and the order in which it begins and ends."""

    services: Services
    metrics: Metrics
    watch: KeyWatch
    admission: Admission
    ledger: Ledger
    purge: Purge
    counter: TokenCounter
    transports: Sequence[HTTPTransport]

    def bring_up(self) -> asyncio.Task[None]:
        """The database in the background, and then what begins once it is there."""
        found = self.services
        bringing_up = _bring_up(found.database, found.readiness, auto_migrate=found.settings.database.auto_migrate)
        opening = asyncio.create_task(bringing_up)
        opening.add_done_callback(lambda opened: None if opened.cancelled() else self.admission.start())
        opening.add_done_callback(lambda opened: None if opened.cancelled() else self.purge.start())
        return opening

    def start(self) -> None:
        self.ledger.start()
        self.services.catalog.start()
        self.metrics.watch(self.services.database, self.ledger)

    async def aclose(self, opening: asyncio.Task[None]) -> None:
        self.metrics.close()
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await self.purge.aclose()
        await self.ledger.aclose()
        await self.services.conversations.aclose()
        await self.admission.aclose()
        await self.watch.aclose()
        await self.services.catalog.aclose()
        for transport in self.transports:
            await transport.aclose()
        self.counter.close()
        await self.services.database.close()


def _without_parameters(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], Route]:
    """What needs no search, by method and path."""
    return {
        (method, route.path): route
        for route in routes
        if isinstance(route, Route) and "{" not in route.path
        for method in route.methods or ()
    }


def create_app(settings: Settings | None = None) -> Gateway:
    """The application under any ASGI server. Without settings: from the configuration file and the environment."""
    return Gateway(with_local_ollama(settings if settings is not None else load_settings()))


async def _bring_up(database: Database, readiness: Readiness, *, auto_migrate: bool) -> None:
    """Opens and migrates the database, however long it takes."""
    attempt = 0
    while True:
        try:
            await database.open()
            waiting = [] if auto_migrate else await pending(database)
            if auto_migrate:
                await migrate(database)
            if not waiting:
                readiness.ready = True
                return
            cause = f"migrations are waiting ({', '.join(waiting)}): run `gateway migrate`"
        except DatabaseUnavailable as failure:
            cause = failure.cause
        except SchemaMismatch as failure:
            cause = str(failure)
        except Exception as failure:  # whatever it is, the worker must say so and try again
            cause = f"the database cannot be used: {type(failure).__name__}"
            log.exception("opening the database failed")
        if cause != readiness.cause:
            log.error("not ready: %s", cause)
        readiness.cause = cause
        await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
        attempt += 1


def _database(settings: Settings) -> Database:
    told = settings.database
    return database_at(told.url, pool_size=told.pool_size, statement_cache=told.statement_cache)


def _auth(settings: Settings, database: Database, watch: KeyWatch) -> Auth:
    return Auth(
        database,
        watch,
        mode=settings.auth.mode,
        admin_key=settings.auth.admin_key.get_secret_value(),
        allowed_hosts=settings.server.allowed_hosts,
        allowed_origins=settings.server.cors_origins,
    )


def _conversations(settings: Settings, database: Database, counter: TokenCounter) -> Conversations:
    prompt, told = None, settings.conversations
    path = told.system_prompt_file
    if path is not None:
        try:
            prompt = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as failure:
            raise ConfigError([f"conversations.system_prompt_file: cannot be read: {failure}"]) from None
    return Conversations(
        database,
        threading=told.threading,
        system_prompt=prompt,
        store_content=told.store_content,
        wait=told.busy == "wait",
        counter=counter,
    )


def _purge(settings: Settings, database: Database) -> Purge:
    told = settings.conversations
    return Purge(
        database,
        retention_days=told.retention_days,
        deleted_days=told.deleted_days,
        session_idle_minutes=told.session_idle_minutes,
    )


def _endpoints() -> list[dict[str, str]]:
    return [
        {"path": path, "description": about, "method": method}
        for dialect in DIALECTS
        for method, path, _, about in dialect.ENDPOINTS
    ]
