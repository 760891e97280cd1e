"""From settings to backends and the catalog over them: the half of the composition root that knows the vendors.

A new type of backend is a row in `config_backends.BACKEND_TYPES` and a line in `build_backend`; a package of somebody
else's adds one through the entry-point group `gateway.backends` (docs/plugins.md).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from gateway.backends.adapt import Adapter
from gateway.backends.azure import AzureBackend, AzureTranslator
from gateway.backends.base import Backend, ModelInfo
from gateway.backends.http import HTTPBackend
from gateway.backends.ollama import OllamaBackend
from gateway.backends.ollama_wire import OllamaTranslator
from gateway.backends.openai import OpenAITranslator
from gateway.backends.scripted import ECHO, Script, ScriptedBackend
from gateway.backends.transport import Access, Timeouts, Transport
from gateway.catalog import Catalog, Model, Provider, Route
from gateway.config import PLUGINS, BackendSettings, ModelSettings, PriceSettings, Settings
from gateway.errors import ConfigError
from gateway.price_table import PriceTable
from gateway.pricing import Priced, configured

PROBE_SECONDS = 1.0
OLLAMA_PORT = "11434"


def build_catalog(settings: Settings, transports: Mapping[Access, Transport]) -> Catalog:
    """`transports`: one for each of `accesses`. Raises ConfigError."""
    table = PriceTable.load()
    providers = {
        name: _provider(name, backend, transports[_access(settings, backend)], settings, table)
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


def accesses(settings: Settings) -> set[Access]:
    """The ways in which backends are reached. Each wants a transport of its own."""
    return {_access(settings, backend) for backend in settings.backends.values()}


def _access(settings: Settings, backend: BackendSettings) -> Access:
    proxy = settings.server.upstream_proxy
    return Access(backend.ca_file, backend.client_cert, backend.client_key, proxy)


def fixed_models(settings: BackendSettings) -> tuple[str, ...]:
    """The models that a backend has by its settings alone; none: it is asked."""
    return settings.models or tuple(settings.scripts) or ((ECHO,) if settings.type == "scripted" else ())


def build_backend(name: str, settings: BackendSettings, transport: Transport) -> Backend:
    """One backend from its settings. Raises ConfigError for a plugin that cannot be made."""
    key, limits = settings.api_key.get_secret_value(), settings.timeouts
    common = {
        "headers": {header: value.get_secret_value() for header, value in settings.headers.items()},
        "timeouts": Timeouts(limits.connect, limits.first_byte, limits.idle, limits.total),
    }
    url, most = settings.base_url or "", int((settings.max_event_mb or 1) * (1 << 20))
    match settings.type:
        case "scripted":
            return _scripted(name, settings)
        case "openai":
            openai = OpenAITranslator(key, Adapter(settings.quirks), max_event=most)
            return HTTPBackend(name, url, openai, transport, **common)  # type: ignore[arg-type] # `common` above
        case "azure":
            azure = AzureTranslator(key, Adapter(settings.quirks), api_version=settings.api_version, max_event=most)
            return AzureBackend(name, url, azure, transport, **common)  # type: ignore[arg-type] # `common` above
        case "ollama":
            ollama = OllamaTranslator(
                key, keep_alive=settings.keep_alive, num_ctx=settings.num_ctx, options=settings.options
            )
            return OllamaBackend(name, url, ollama, transport, **common)  # type: ignore[arg-type] # `common` above
    return _plugin(name, settings, transport)


def with_local_ollama(settings: Settings) -> Settings:
    """Where nobody wrote a backend, an Ollama that answers on its usual address is one; the built-in `echo` then goes.
    `OLLAMA_HOST` names another address, as it does for Ollama itself."""
    if not settings.probe_ollama:
        return settings
    settings = settings.model_copy(update={"probe_ollama": False})
    url = _ollama_url(os.environ.get("OLLAMA_HOST", ""))
    try:
        ollama = BackendSettings(type="ollama", base_url=url)
    except ValueError:  # what is no address answers to nobody
        return settings
    if not _answers(url):
        return settings
    found = {name: backend for name, backend in settings.backends.items() if backend.type != "scripted"}
    found["ollama"] = ollama
    notes = tuple(note for note in settings.notes if "`echo`" not in note)
    return settings.model_copy(update={"backends": found, "notes": notes})


def _ollama_url(told: str) -> str:
    """From what Ollama understands: nothing, a host, host:port, :port, or a URL, whose port is its scheme's if it names
    none. A server's `0.0.0.0` is this machine."""
    scheme, sign, rest = told.strip(" '\"").partition("://")
    if not sign:
        scheme, rest = "http", scheme
    place, _, path = rest.rstrip("/").partition("/")
    if place.count(":") > 1 and not place.startswith("["):
        place = f"[{place}]"
    host, _, port = place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    port = port or ("" if sign else OLLAMA_PORT)
    return f"{scheme}://{host}{port and ':' + port}{path and '/' + path}"


def _answers(url: str) -> bool:
    try:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(parts.hostname or "", parts.port, timeout=PROBE_SECONDS)) as connection:
            connection.request("GET", f"{parts.path}/api/version")
            return b'"version"' in connection.getresponse().read(1000)
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _scripted(name: str, settings: BackendSettings) -> ScriptedBackend:
    scripts = {
        model: Script(**{key: getattr(script, key) for key in Script.__slots__})
        for model, script in settings.scripts.items()
    }
    return ScriptedBackend(name, scripts)


def _plugin(name: str, settings: BackendSettings, transport: Transport) -> Backend:
    for point in entry_points(group=PLUGINS, name=settings.type):
        try:
            backend: Backend = point.load()(name, settings, transport)
        except Exception as failure:
            why = f"its package cannot make a backend: {type(failure).__name__}: {failure}"
            raise ConfigError([f"backends.{name}: {why}"]) from failure
        return backend
    raise ConfigError([f"backends.{name}.type: no installed package has the type {settings.type}"])


def _provider(
    name: str, settings: BackendSettings, transport: Transport, everything: Settings, table: PriceTable
) -> Provider:
    prices = {model: _price(price) for model, price in everything.prices.items()}
    provider = Provider(
        build_backend(name, settings, transport),
        on_disconnect=settings.on_disconnect,
        refuse=frozenset(settings.refuse),
        static=bool(fixed_models(settings)),
        prices={model: price for model, price in prices.items() if price is not None},
        free=settings.type == "scripted",
        vendor=settings.vendor_name,
        table=table,
        context_window=settings.num_ctx,
    )
    provider.listed = {model: ModelInfo(model) for model in fixed_models(settings)}
    return provider


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
    return Model(name, routes, settings.fallbacks, settings.max_output_tokens, settings.context_window)


def _price(settings: PriceSettings | None) -> Priced | None:
    return None if settings is None else configured(settings.model_dump())
