"""The settings: config.yaml and the environment become one frozen tree of values, or a list of every mistake.

    settings = load_settings()            # or load_settings("config.yaml", os.environ, {"server.port": 9000})
    settings.server.port, settings.backends["openai"].base_url

Where values come from, and which source wins, is in `config_sources.py`. Here is what they may be: first each value
alone (pydantic), then what they say about each other (the functions named `_check_...`). Backends, models and what
bounds calls and conversations are in modules of their own; a new kind of backend is a row in
`config_backends.BACKEND_TYPES`.

No complaint, repr or description holds a secret. `model_dump()` does, as SecretStr.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator

from gateway import config_sources as sources
from gateway.config_backends import (
    BACKEND_TYPES,
    PLUGIN,
    PLUGINS,
    BackendSettings,
    QuirkSettings,
    ScriptSettings,
    TimeoutSettings,
    check_backends,
)
from gateway.config_draft import Draft, Path, check_file, dotted, nearest
from gateway.config_file import read_file
from gateway.config_limits import Budget, BudgetSettings, ConversationSettings, LimitSettings
from gateway.config_models import ModelSettings, PriceSettings, RouteSettings
from gateway.config_values import (
    MASK,
    Section,
    allowed_host,
    base_url,
    database_url,
    mask_url,
    masked,
    proxy,
    storage_url,
    upstream_proxy,
)
from gateway.errors import ConfigError

__all__ = [
    "BACKEND_TYPES",
    "PLUGINS",
    "BackendSettings",
    "Budget",
    "BudgetSettings",
    "ConversationSettings",
    "DatabaseSettings",
    "LimitSettings",
    "ModelSettings",
    "PriceSettings",
    "QuirkSettings",
    "RouteSettings",
    "ScriptSettings",
    "ServerSettings",
    "Settings",
    "TimeoutSettings",
    "load_settings",
    "mask_url",
]

# Sections


class ServerSettings(Section):
    host: str = Field("127.0.0.1", pattern=r"^[\w.:%\[\]-]+$")
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=1024)
    max_body_mb: float = Field(32, gt=0)
    first_chunk_wait: float = Field(15, ge=0)
    drain_seconds: float = Field(30, ge=0)
    cors_origins: tuple[str, ...] = ("*",)
    trusted_proxies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    upstream_proxy: str | None = None
    name: str = "gateway"
    version: str | None = None
    log_format: Literal["auto", "text", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics: Literal["admin", "open"] = "admin"

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Browsers send an origin without a slash at its end."""
        if not all(re.fullmatch(r"\*|null|[\w.+-]+://[^\s/]+/?", origin) for origin in origins):
            raise ValueError('must hold "*" or origins like https://chat.example.com')
        return tuple(origin.rstrip("/") for origin in origins)

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(proxy(address) for address in proxies)

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(allowed_host(host) for host in hosts)

    @field_validator("upstream_proxy")
    @classmethod
    def _proxy(cls, url: str | None) -> str | None:
        return None if url is None else upstream_proxy(url)


class AuthSettings(Section):
    mode: Literal["auto", "keys", "open"] = "auto"
    admin_key: SecretStr = SecretStr("")


class DatabaseSettings(Section):
    url: str = "sqlite:///data/gateway.db"
    auto_migrate: bool = True
    pool_size: int = Field(4, ge=1, le=1000)
    statement_cache: bool = True

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        return database_url(url.strip())

    @property
    def safe_url(self) -> str:
        """For logs and people: the password is masked."""
        return mask_url(self.url)


class StorageSettings(Section):
    url: str = "data/files"
    endpoint: str | None = None
    access_key: SecretStr = SecretStr("")
    secret_key: SecretStr = SecretStr("")
    region: str | None = None

    @field_validator("url")
    @classmethod
    def _place(cls, url: str) -> str:
        return storage_url(url)

    @field_validator("endpoint")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        return None if url is None else base_url(url)


class FileSettings(Section):
    max_mb: float = Field(20, gt=0)
    max_request_mb: float = Field(64, gt=0)
    max_upload_mb: float = Field(512, gt=0)
    max_text_chars: int = Field(200_000, ge=1)
    fetch_urls: bool = False


class WrittenSettings(Section):
    """All that can be written in the file."""

    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    backends: dict[str, BackendSettings] = {}
    models: dict[str, ModelSettings] = {}
    default_model: str | None = None
    default_backend: str | None = None
    database: DatabaseSettings = DatabaseSettings()
    storage: StorageSettings = StorageSettings()
    limits: LimitSettings = LimitSettings()
    budgets: BudgetSettings = BudgetSettings()
    conversations: ConversationSettings = ConversationSettings()
    files: FileSettings = FileSettings()
    max_input_length: int | None = Field(None, ge=1)
    stream_responses: bool = True


class Settings(WrittenSettings):
    """What the gateway runs with: `backends` are those that are on; `prices` are of models without an entry.

    `probe_ollama`: nobody wrote a backend, so an Ollama that answers on its usual address is one, too.
    `alone`: no other worker or host uses the database, as far as the one who starts us knows.
    """

    prices: dict[str, PriceSettings] = {}
    probe_ollama: bool = False
    alone: bool = False
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """The effective settings as YAML, without secrets."""
        hidden = {"notes", "probe_ollama", "alone", *(() if self.prices else ("prices",))}
        shown = {name: _shown(value) for name, value in self if name not in hidden}
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120)


def _shown(value: Any) -> Any:
    """As plain YAML values. Entries of maps show what belongs to them and holds something."""
    if isinstance(value, BackendSettings):
        belongs = BACKEND_TYPES.get(value.type, PLUGIN).options
        return {"type": value.type} | {name: item for name, item in _shown_items(value) if name in belongs}
    if isinstance(value, ModelSettings | RouteSettings | PriceSettings | ScriptSettings | QuirkSettings):
        return dict(_shown_items(value))
    if isinstance(value, Section):
        return {name: _shown(item) for name, item in value}
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if isinstance(value, float | Decimal):
        return int(value) if value == int(value) else float(value)
    return mask_url(value) if isinstance(value, str) else value


def _shown_items(section: Section) -> Iterator[tuple[str, Any]]:
    for name, item in section:
        if not _idle(section, name):
            yield name, _shown(masked(item) if name in section.private else item)


def _idle(section: Section, name: str) -> bool:
    value = getattr(section, name)
    return value in (None, (), {}) and value == type(section).model_fields[name].default


# From the sources to the settings


def load_settings(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the file, the environment and flags (`{"server.port": 9000}`). Raises ConfigError with every mistake.

    Without `path` the file is that of GATEWAY_CONFIG, else `config.yaml`; only the latter may be missing.
    """
    draft = Draft()
    prices, unwritten = _read(path or "", os.environ if environ is None else environ, overrides or {}, draft)
    backends, models = draft.names("backends"), draft.names("models")
    written = _validated(draft)
    if written is not None:
        check_backends(written.backends, draft)
        _check_models(written, backends, models, draft)
        check_file(("conversations", "system_prompt_file"), written.conversations.system_prompt_file, draft)
    if written is None or draft.problems:
        raise ConfigError(draft.problems)
    return _finished(written, prices, draft.notes, probe_ollama=unwritten)


def _read(
    path: str, environ: Mapping[str, str], flags: Mapping[str, Any], draft: Draft
) -> tuple[dict[str, dict[str, Decimal]], bool]:
    """Fill the draft from all sources, strong before weak. Returns seed 3's price, if it has no model entry, and
    whether nobody wrote a backend."""
    environ = sources.effective_environment(environ, draft)
    path = path or environ.get("GATEWAY_CONFIG", "")
    read_file(path or "config.yaml", required=bool(path), environ=environ, draft=draft)
    pricing = draft.tree.pop("pricing", None)
    sources.adopt_seed_keys(draft)
    model = draft.get(("default_model",))
    names_backends = bool(draft.names("backends"))
    sources.read_environment(environ, draft, WrittenSettings)
    sources.read_flags(flags, draft)
    sources.fill_from_seeds(environ, draft)
    unwritten = not names_backends and sources.fill_vendors(environ, draft)
    return sources.adopt_pricing(pricing, model or draft.get(("default_model",)), draft), unwritten


def _validated(draft: Draft) -> WrittenSettings | None:
    """The settings, complaining about what is wrong with each value. Wrong ones are taken out, so the rest is seen."""
    while True:
        try:
            return WrittenSettings.model_validate(draft.tree)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
        for problem in found:
            draft.complain(
                problem["loc"], _wording(problem["type"], problem["loc"], problem.get("ctx", {}), problem["msg"])
            )
        dropped = [draft.drop(problem["loc"]) for problem in reversed(found)]
        if not any(dropped):
            return None


_WORDING = {
    "missing": "is missing; add it",
    "string_type": "must be text; put it in quotes",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:.0f}",
    "string_pattern_mismatch": "must be a host name or address, like 127.0.0.1",
}


def _wording(kind: str, path: Path, context: Mapping[str, Any], message: str) -> str:
    """Our words for pydantic's; its own message only where we wrote it, as others can quote the value."""
    if kind == "extra_forbidden":
        return f"unknown setting; did you mean {dotted(sources.nearest_setting(path, WrittenSettings))}?"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind.startswith("int_"):
        return "must be a whole number"
    if kind.startswith(("float_", "decimal_")) or kind == "finite_number":
        return "must be a number"
    if kind.startswith(("model_", "dict_")):
        return "must be a mapping of settings"
    return _WORDING.get(kind, "is not valid").format_map(context)


def _check_models(written: WrittenSettings, backends: set[str], models: set[str], draft: Draft) -> None:
    """`backends` and `models` are all names that were written, also those of entries with mistakes."""

    def check_backend(path: Path, name: str | None) -> None:
        if name is not None and name not in backends:
            near = nearest(name, sorted(backends))
            draft.complain(path, "no such backend" + (f"; did you mean {near}?" if near else "; add it to backends"))

    check_backend(("default_backend",), written.default_backend)
    taken = set(models)
    for name, model in written.models.items():
        path: Path = ("models", name)
        if not re.fullmatch(r"[^\s\x00-\x1f]+", name):
            draft.complain(path, "is no name for a model: use no spaces", value_gone=False)
        if model.backend and model.routes:
            draft.complain((*path, "routes"), "cannot be given together with backend; keep one")
        elif not model.backend and not model.routes and not draft.reported(path):
            draft.complain(path, "needs a backend or routes; add one")
        check_backend((*path, "backend"), model.backend)
        for index, route in enumerate(model.routes):
            check_backend((*path, "routes", index, "backend"), route.backend)
        for index, alias in enumerate(model.aliases):
            if alias in taken:
                draft.complain((*path, "aliases", index), "is the name of another model or alias; choose another")
            taken.add(alias)
    _check_fallbacks(written, backends, taken, draft)


def _check_fallbacks(written: WrittenSettings, backends: set[str], models: set[str], draft: Draft) -> None:
    listed = {model for backend in written.backends.values() for model in (*backend.models, *backend.scripts)}
    for name, model in written.models.items():
        for index, fallback in enumerate(model.fallbacks):
            path = ("models", name, "fallbacks", index)
            if fallback == name or fallback in model.aliases:
                draft.complain(path, "is the model itself; name another")
            elif fallback not in models | listed and fallback.partition("/")[0] not in backends:
                near = nearest(fallback, sorted(models))
                draft.complain(path, f"no such model; did you mean {near}?")


def _finished(
    written: WrittenSettings, prices: dict[str, dict[str, Decimal]], notes: list[str], *, probe_ollama: bool
) -> Settings:
    """With the backends that are on, the built-in one if none is, and the notes for the start-up print."""
    values = dict(written)
    off = [
        name
        for name, b in written.backends.items()
        if "api_key" in b.model_fields_set and not b.api_key.get_secret_value()
    ]
    backends = {name: backend for name, backend in written.backends.items() if name not in off}
    notes += [f"backend {name} is off: its api_key is empty" for name in off]
    if not backends:
        backends["scripted"] = BackendSettings(type="scripted")
        why = "every backend is off" if off else "no backend is configured"
        notes.append(f"the built-in model `echo` answers, because {why}")
    found = {"backends": backends, "prices": prices, "probe_ollama": probe_ollama, "notes": tuple(notes)}
    return Settings(**values | found)
