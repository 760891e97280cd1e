"""The settings: config.yaml and the environment become one frozen tree of values, or a list of every mistake.

    settings = load_settings()            # or load_settings("config.yaml", os.environ, {"server.port": 9000})
    settings.server.port, settings.backends["openai"].base_url

Where values come from, and which source wins, is in `config_sources.py`. Here is what they may be: first each value
alone (pydantic), then what they say about each other (the functions named `_check_...`). A new kind of backend is a
row in `BACKEND_TYPES`.

No complaint, repr or description holds a secret. `model_dump()` does, as SecretStr.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from gateway import config_sources as sources
from gateway.config_sources import Draft, Path, bare, is_section
from gateway.errors import ConfigError

MASK = "**********"
_COMMON = frozenset({"on_disconnect", "refuse", "models", "timeouts"})


@dataclass(frozen=True, slots=True)
class BackendType:
    """What a backend of this type may say, besides its type, and what it has to say."""

    options: frozenset[str]
    required: frozenset[str] = frozenset()


BACKEND_TYPES: dict[str, BackendType] = {
    "openai": BackendType(_COMMON | {"base_url", "api_key", "headers", "ca_file"}, frozenset({"base_url"})),
    "scripted": BackendType(_COMMON | {"scripts"}),
}


# Values


def mask_url(text: str) -> str:
    """The URL without its password; over HTTP without its user, too. Rather too much is hidden than too little."""
    text = re.sub(r"^([\w.+-]+://[^:@/]*):.*@", rf"\1:{MASK}@", text, flags=re.DOTALL)
    text = re.sub(r"^(https?://)[^@/?#]*@", rf"\1{MASK}@", text)
    return re.sub(
        r"([?&][^=&]*(?:pass|pwd|key|token|secret|sig)[^=&]*=)[^&#]*", rf"\1{MASK}", text, flags=re.IGNORECASE
    )


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _price(value: Any) -> Any:
    return value if value is None else sources.dollars(value)


def _list(value: Any) -> Any:
    return sources.items(value) if isinstance(value, str) else value


def _choice(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _secret(value: Any) -> Any:
    return "" if value is None else value.strip() if isinstance(value, str) else value


def _mapping(value: Any) -> Any:
    return {} if value is None else value


def _database_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    kind, _, driver = scheme.lower().partition("+")
    if kind in ("postgres", "postgresql") and driver in (
        "",
        "asyncpg",
        "psycopg",
        "psycopg2",
        "psycopg_async",
        "pg8000",
    ):
        if re.search(r"\s", rest) or not rest:
            raise ValueError("must look like postgresql://user:password@host:5432/name")
        return f"{kind}://{rest}"
    if kind != "sqlite" or driver not in ("", "aiosqlite", "pysqlite"):
        raise ValueError("must begin with sqlite:///, postgresql:// or postgres://")
    name = rest.removeprefix("/")
    if not name or ":memory:" in name or "mode=memory" in name:
        raise ValueError("must name a file, as the workers share it: sqlite:///data/gateway.db")
    if not rest.startswith("/"):
        raise ValueError(
            "needs three slashes for a relative path and four for an absolute one: sqlite:///data/gateway.db"
        )
    if "?" in name:
        raise ValueError("must end after the file's name; options after ? are not supported for SQLite")
    return f"sqlite:///{name}"


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s?#]", url):
        raise ValueError("must be an http:// or https:// address without ? and #, like https://api.openai.com/v1")
    return url.rstrip("/")


def _storage_url(url: str) -> str:
    if re.fullmatch(r"s3://[\w.-]+(/[^?#@]*)?", url):
        return url.rstrip("/")
    if not url.strip() or re.match(r"[\w.+-]+:/", url):
        raise ValueError(
            "must be a folder like data/files, or s3://bucket/prefix with the keys in access_key and secret_key"
        )
    return url


def _proxy(address: str) -> str:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError:
        raise ValueError("must hold IP addresses or networks like 10.0.0.0/8") from None
    return address


def _allowed_host(host: str) -> str:
    if not re.fullmatch(r"[\w.:\[\]-]+", host):
        raise ValueError("must hold host names like chat.example.com, without https://")
    return host.lower()


_READERS: dict[Any, Callable[[Any], Any]] = {
    int: _number,
    float: _number,
    Decimal: _price,
    tuple: _list,
    Literal: _choice,
    SecretStr: _secret,
    dict: _mapping,
}


class Section(BaseModel):
    """A part of the settings. What comes from the environment is text: each field reads it as what it holds."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False, protected_namespaces=()
    )
    verbatim: ClassVar[frozenset[str]] = frozenset()
    """Optional texts that may be empty, or the word null."""

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        annotation = cls.model_fields[name].annotation
        kind = bare(annotation)
        if kind is not annotation:
            if isinstance(value, str) and value.strip() in ("", "null", "~") and name not in cls.verbatim:
                return None
        elif is_section(kind):
            return _mapping(value)
        if get_origin(kind) is dict and isinstance(value, dict) and is_section(sources.inside(kind, "")):
            return {key: _mapping(entry) for key, entry in value.items()}
        read = _READERS.get(get_origin(kind) or kind)
        return value if read is None or (value is None and kind is not annotation) else read(value)

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, mask_url(value) if isinstance(value, str) else value


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
    name: str = "gateway"
    version: str | None = None
    log_format: Literal["auto", "text", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

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
        return tuple(_proxy(address) for address in proxies)

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_allowed_host(host) for host in hosts)


class AuthSettings(Section):
    mode: Literal["auto", "keys", "open"] = "auto"
    admin_key: SecretStr = SecretStr("")


class TimeoutSettings(Section):
    """Seconds. `first_byte` and `idle` are silences; `total` None: as long as it takes."""

    connect: float = Field(5, gt=0)
    first_byte: float = Field(600, gt=0)
    idle: float = Field(120, gt=0)
    total: float | None = Field(None, gt=0)


class ScriptSettings(Section):
    """A scripted answer, for tests and demos. `reply` None: the prompt is echoed."""

    verbatim = frozenset({"reply", "reasoning"})

    reply: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    delay: float = Field(0, ge=0)
    first_delay: float = Field(0, ge=0)
    usage: Literal["exact", "missing"] = "exact"
    finish_reason: str | None = None
    error_status: int | None = Field(None, ge=400, le=599)
    error_message: str = "scripted failure"
    fail_after: int | None = Field(None, ge=0)
    cut_after: int | None = Field(None, ge=0)

    @field_validator("tool_calls")
    @classmethod
    def _named(cls, calls: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for call in calls:
            named = isinstance(call.get("name"), str) and bool(call["name"])
            if not named or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict | str):
                raise ValueError("must hold calls like {name: get_weather, arguments: {city: Paris}}")
        return calls


class BackendSettings(Section):
    """One upstream. Which of the options belong to which type: `BACKEND_TYPES`."""

    type: str
    base_url: str | None = None
    api_key: SecretStr = SecretStr("")
    on_disconnect: Literal["drain", "cancel"] | None = None
    headers: dict[str, SecretStr] = {}
    refuse: tuple[str, ...] = ("chat_template", "logits_processors", "kv_transfer_params")
    models: tuple[str, ...] = ()
    ca_file: str | None = None
    timeouts: TimeoutSettings = TimeoutSettings()
    scripts: dict[str, ScriptSettings] = {}

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        return None if url is None else _base_url(url)

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[\x21-\x7e]*", key.get_secret_value()):
            raise ValueError("must be one word of printable ASCII characters")
        return key

    @field_validator("headers")
    @classmethod
    def _lines(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError("must have names of letters, digits and -")
            if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value.get_secret_value()):
                raise ValueError("must have values of one line")
        return headers


class PriceSettings(Section):
    """USD per million tokens; None: nobody said, so what its parent costs."""

    input: Decimal | None = None
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    output: Decimal | None = None
    reasoning: Decimal | None = None
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None


class RouteSettings(Section):
    backend: str
    model: str | None = None
    weight: int = Field(1, gt=0)
    price: PriceSettings | None = None


class ModelSettings(Section):
    """A public name: either one backend or several routes. `model` None: the upstream knows it by the public name."""

    backend: str | None = None
    model: str | None = None
    price: PriceSettings | None = None
    routes: tuple[RouteSettings, ...] = ()
    fallbacks: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    on_disconnect: Literal["drain", "cancel"] | None = None


class DatabaseSettings(Section):
    url: str = "sqlite:///data/gateway.db"
    auto_migrate: bool = True
    pool_size: int = Field(4, ge=1, le=1000)
    statement_cache: bool = True

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        return _database_url(url.strip())

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
        return _storage_url(url)

    @field_validator("endpoint")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        return None if url is None else _base_url(url)


class LimitSettings(Section):
    """None: no limit. `burst` None: one minute's worth."""

    requests_per_minute: int | None = Field(600, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_parallel: int | None = Field(None, ge=1)
    burst: int | None = Field(None, ge=1)
    store: Literal["auto", "memory", "database"] = "auto"


class ConversationSettings(Section):
    threading: Literal["auto", "explicit", "off"] = "auto"
    system_prompt_file: str | None = None


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
    conversations: ConversationSettings = ConversationSettings()
    files: FileSettings = FileSettings()
    max_input_length: int | None = Field(None, ge=1)
    stream_responses: bool = True


class Settings(WrittenSettings):
    """What the gateway runs with: `backends` are those that are on; `prices` are of models without an entry."""

    prices: dict[str, PriceSettings] = {}
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """The effective settings as YAML, without secrets."""
        shown = {name: _shown(value) for name, value in self if name != "notes" and (name != "prices" or value)}
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120)


def _shown(value: Any) -> Any:
    """As plain YAML values. Entries of maps show what belongs to them and holds something."""
    if isinstance(value, BackendSettings):
        belongs = BACKEND_TYPES[value.type].options | {"type"} if value.type in BACKEND_TYPES else {*dict(value)}
        return {name: _shown(item) for name, item in value if name in belongs and not _idle(value, name)}
    if isinstance(value, ModelSettings | RouteSettings | PriceSettings | ScriptSettings):
        return {name: _shown(item) for name, item in value if not _idle(value, name)}
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
    prices = _read(path or "", os.environ if environ is None else environ, overrides or {}, draft)
    backends, models = draft.names("backends"), draft.names("models")
    written = _validated(draft)
    if written is not None:
        _check_backends(written, draft)
        _check_models(written, backends, models, draft)
        _check_files(written, draft)
    if written is None or draft.problems:
        raise ConfigError(draft.problems)
    return _finished(written, prices, draft.notes)


def _read(
    path: str, environ: Mapping[str, str], flags: Mapping[str, Any], draft: Draft
) -> dict[str, dict[str, Decimal]]:
    """Fill the draft from all sources, strong before weak; the result is seed 3's price, if it has no model entry."""
    environ = sources.effective_environment(environ, draft)
    path = path or environ.get("GATEWAY_CONFIG", "")
    sources.read_file(path or "config.yaml", required=bool(path), environ=environ, draft=draft)
    pricing = draft.tree.pop("pricing", None)
    sources.adopt_seed_keys(draft)
    model = draft.get(("default_model",))
    names_backends = bool(draft.names("backends"))
    sources.read_environment(environ, draft, WrittenSettings)
    sources.read_flags(flags, draft)
    sources.fill_from_seeds(environ, draft)
    if not names_backends:
        sources.fill_vendors(environ, draft)
    return sources.adopt_pricing(pricing, model or draft.get(("default_model",)), draft)


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
        return f"unknown setting; did you mean {sources.dotted(sources.nearest_setting(path, WrittenSettings))}?"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind.startswith("int_"):
        return "must be a whole number"
    if kind.startswith("float_") or kind == "finite_number":
        return "must be a number"
    if kind.startswith(("model_", "dict_")):
        return "must be a mapping of settings"
    return _WORDING.get(kind, "is not valid").format_map(context)


def _check_backends(written: WrittenSettings, draft: Draft) -> None:
    for name, backend in written.backends.items():
        path: Path = ("backends", name)
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            draft.complain(path, "is no name for a backend: use letters, digits, '.', '_' and '-'", value_gone=False)
        kind = BACKEND_TYPES.get(backend.type)
        if kind is None:
            draft.complain((*path, "type"), f"unknown type; known types: {', '.join(BACKEND_TYPES)}")
            continue
        for key in sorted(backend.model_fields_set - kind.options - {"type"}):
            draft.complain((*path, key), f"does not belong to type {backend.type}; remove it")
        for key in sorted(kind.required):
            if getattr(backend, key) is None and not draft.reported((*path, key)):
                draft.complain((*path, key), f"is missing; type {backend.type} needs it")


def _check_models(written: WrittenSettings, backends: set[str], models: set[str], draft: Draft) -> None:
    """`backends` and `models` are all names that were written, also those of entries with mistakes."""

    def check_backend(path: Path, name: str | None) -> None:
        if name is not None and name not in backends:
            near = sources.nearest(name, sorted(backends))
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
                near = sources.nearest(fallback, sorted(models))
                draft.complain(path, f"no such model; did you mean {near}?")


def _check_files(written: WrittenSettings, draft: Draft) -> None:
    named: dict[Path, str | None] = {
        ("conversations", "system_prompt_file"): written.conversations.system_prompt_file,
        **{("backends", name, "ca_file"): backend.ca_file for name, backend in written.backends.items()},
    }
    for path, file in named.items():
        if file is not None and not os.path.isfile(file):
            draft.complain(path, "no such file; relative paths begin at the working directory")


def _finished(written: WrittenSettings, prices: dict[str, dict[str, Decimal]], notes: list[str]) -> Settings:
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
    if written.limits != LimitSettings():
        notes.append("limits.* is read but not enforced yet")
    return Settings(**values | {"backends": backends, "prices": prices, "notes": tuple(notes)})
