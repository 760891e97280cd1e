"""The composition root: settings in, an ASGI application out. The only place that wires.

`create_app()` reads the settings and builds what needs no running loop; the lifespan opens the rest and hands it to the
routes as `scope["state"]["services"]`. A database that does not answer does not keep the worker from starting: it
answers 503 until the database is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import Router

from gateway.admission import Admission
from gateway.api import openai, ops
from gateway.api.common import Readiness, Services
from gateway.auth import Auth
from gateway.backends.base import Backend, ModelInfo
from gateway.backends.http import HTTPBackend
from gateway.backends.openai import OpenAITranslator
from gateway.backends.scripted import ECHO, Script, ScriptedBackend
from gateway.backends.transport import AiohttpTransport, Timeouts, Transport
from gateway.catalog import Catalog, Model, Provider, Route
from gateway.config import BackendSettings, ModelSettings, PriceSettings, Settings, load_settings
from gateway.conversations import Conversations
from gateway.drain import Drain
from gateway.errors import ConfigError, DatabaseUnavailable
from gateway.ledger import Ledger
from gateway.middleware import CORS, ErrorBoundary, Observed, OnePath, not_found
from gateway.pricing import Price
from gateway.relay import Relay
from gateway.responses import Receive, Scope, Send
from gateway.store.connect import database_at
from gateway.store.database import Database
from gateway.store.migrate import SchemaMismatch, migrate, pending

log = logging.getLogger("gateway")

DIALECTS = (openai, ops)
_RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)


class Gateway:
    """The ASGI application. `drain` is what the server tells about the end of the worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.drain = Drain()
        routes = [route for dialect in DIALECTS for route in dialect.routes()]
        self._router = Router(routes, redirect_slashes=False, default=not_found, lifespan=self._lifespan)
        inner = ErrorBoundary(OnePath(self._routed))
        self._app = CORS(Observed(inner, settings.server.trusted_proxies), settings.server.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})
        await self._app(scope, receive, send)

    async def _routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes the router raise for a wrong method instead of answering in plain text
        await self._router(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[dict[str, Any]]:
        settings = self.settings
        database = database_at(
            settings.database.url,
            pool_size=settings.database.pool_size,
            statement_cache=settings.database.statement_cache,
        )
        transports = {path: AiohttpTransport(path) for path in _ca_files(settings)}
        ledger, admission, readiness = Ledger(database), Admission(database), Readiness()
        catalog = build_catalog(settings, transports)
        services = Services(
            settings=settings,
            database=database,
            auth=_auth(settings, database, admission),
            catalog=catalog,
            conversations=_conversations(settings, database),
            relay=Relay(catalog, ledger, self.drain),
            drain=self.drain,
            readiness=readiness,
        )
        opening = asyncio.create_task(_bring_up(database, readiness, auto_migrate=settings.database.auto_migrate))
        try:
            await asyncio.wait({opening}, timeout=3)
            ledger.start()
            catalog.start()
            yield {"services": services, "endpoints": _endpoints()}
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await ledger.aclose()
            await admission.aclose()
            await catalog.aclose()
            for transport in transports.values():
                await transport.aclose()
            await database.close()


def create_app(settings: Settings | None = None) -> Gateway:
    """The application under any ASGI server. Without settings: from the configuration file and the environment."""
    return Gateway(settings if settings is not None else load_settings())


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


def build_catalog(settings: Settings, transports: Mapping[str | None, Transport]) -> Catalog:
    providers = {
        name: _provider(name, backend, transports[backend.ca_file], settings)
        for name, backend in settings.backends.items()
    }
    models = [_model(name, model, providers) for name, model in settings.models.items()]
    aliases = {alias: name for name, model in settings.models.items() for alias in model.aliases}
    kept = [model for model in models if model.routes]
    names = {model.name for model in kept}
    return Catalog(
        providers,
        kept,
        {alias: name for alias, name in aliases.items() if name in names},
        default_model=settings.default_model,
        default_backend=settings.default_backend,
    )


def _provider(name: str, settings: BackendSettings, transport: Transport, everything: Settings) -> Provider:
    prices = {model: _price(price) for model, price in everything.prices.items()}
    provider = Provider(
        build_backend(name, settings, transport),
        on_disconnect=settings.on_disconnect,
        refuse=frozenset(settings.refuse),
        static=bool(fixed_models(settings)),
        prices={model: price for model, price in prices.items() if price is not None},
        free=settings.type == "scripted",
    )
    provider.listed = {model: ModelInfo(model) for model in fixed_models(settings)}
    return provider


def fixed_models(settings: BackendSettings) -> tuple[str, ...]:
    """The models that a backend has by its settings alone; none: it is asked."""
    return settings.models or tuple(settings.scripts) or ((ECHO,) if settings.type == "scripted" else ())


def build_backend(name: str, settings: BackendSettings, transport: Transport) -> Backend:
    """One backend from its settings. A new type is a row here and in `config.BACKEND_TYPES`."""
    if settings.type == "scripted":
        fields = Script.__slots__
        scripts = {
            model: Script(**{key: getattr(script, key) for key in fields}) for model, script in settings.scripts.items()
        }
        return ScriptedBackend(name, scripts)
    limits = settings.timeouts
    return HTTPBackend(
        name,
        settings.base_url or "",
        OpenAITranslator(settings.api_key.get_secret_value()),
        transport,
        headers={header: value.get_secret_value() for header, value in settings.headers.items()},
        timeouts=Timeouts(limits.connect, limits.first_byte, limits.idle, limits.total),
    )


def _model(name: str, settings: ModelSettings, providers: Mapping[str, Provider]) -> Model:
    """A model keeps the routes whose backends are on."""
    given = settings.routes or ()
    routes: list[Route] = [
        providers[route.backend].route(
            route.model or name, _price(route.price or settings.price), route.weight, settings.on_disconnect
        )
        for route in given
        if route.backend in providers
    ]
    own = providers.get(settings.backend or "")
    if own is not None:
        routes.append(own.route(settings.model or name, _price(settings.price), on_disconnect=settings.on_disconnect))
    return Model(name, routes, settings.fallbacks)


def _price(settings: PriceSettings | None) -> Price | None:
    return None if settings is None else Price.from_usd(settings.model_dump())


def _auth(settings: Settings, database: Database, admission: Admission) -> Auth:
    return Auth(
        database,
        admission,
        mode=settings.auth.mode,
        admin_key=settings.auth.admin_key.get_secret_value(),
        allowed_hosts=settings.server.allowed_hosts,
        allowed_origins=settings.server.cors_origins,
    )


def _conversations(settings: Settings, database: Database) -> Conversations:
    prompt = None
    path = settings.conversations.system_prompt_file
    if path is not None:
        try:
            prompt = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as failure:
            raise ConfigError([f"conversations.system_prompt_file: cannot be read: {failure}"]) from None
    return Conversations(database, threading=settings.conversations.threading, system_prompt=prompt)


def _ca_files(settings: Settings) -> set[str | None]:
    return {None, *(backend.ca_file for backend in settings.backends.values())}


def _endpoints() -> list[dict[str, str]]:
    return [
        {"path": path, "description": about, "method": method}
        for dialect in DIALECTS
        for method, path, _, about in dialect.ENDPOINTS
    ]
