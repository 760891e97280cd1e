"""What can be said of a backend: the kinds there are, their options, and what belongs to which kind.

A kind that comes from elsewhere is known by its name in the entry-point group `gateway.backends`; it is not imported
here. How requests are changed for an upstream (`QuirkSettings`) is laid over what its vendor is known to want.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from gateway.backends.vendors import NOBODY, VENDORS, CallIds, Quirks, quirks_of, vendor_of
from gateway.config_draft import Draft, Path, check_file, nearest
from gateway.config_values import Section, base_url

PLUGINS = "gateway.backends"
_KEPT = frozenset({"model", "messages", "stream"})


class CallIdSettings(Section):
    """Which ids of tool calls an upstream takes; the others are hashed. Nothing said: all of them."""

    alphabet: Literal["any", "word", "alphanumeric"] = "any"
    length: int | None = Field(None, ge=6, le=64)
    max_length: int | None = Field(None, ge=6, le=1000)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.length is not None and self.max_length is not None:
            raise ValueError("must have length, which is exact, or max_length; keep one")
        return self


class QuirkSettings(Section):
    """How requests are changed for an upstream. None: as the vendor is known to want it."""

    drop: tuple[str, ...] | None = None
    rename: dict[str, str] | None = None
    defaults: dict[str, Any] | None = None
    roles: dict[str, str] | None = None
    tool_call_ids: CallIdSettings | None = None
    tool_call_reasoning: Literal["pass", "fill", "strip"] | None = None
    message_fields: tuple[str, ...] | None = None
    flatten: tuple[str, ...] | None = None
    usage_in_stream: bool | None = None
    most_choices: int | None = Field(None, ge=1)

    @field_validator("drop")
    @classmethod
    def _droppable(cls, paths: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for path in paths or ():
            if path in _KEPT or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", path):
                raise ValueError(
                    "must hold names like logprobs or stream_options.include_obfuscation; not model, messages or stream"
                )
        return paths

    @field_validator("rename")
    @classmethod
    def _renamable(cls, names: dict[str, str] | None) -> dict[str, str] | None:
        for name in (*(names or {}), *(names or {}).values()):
            if name in _KEPT or not re.fullmatch(r"[^\s.]+", name):
                raise ValueError("must hold names like seed: random_seed; not model, messages or stream")
        if names and not names.keys().isdisjoint(names.values()):
            raise ValueError("must not rename a field to one that is renamed itself")
        return names

    @field_validator("defaults")
    @classmethod
    def _sendable_defaults(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        if values and not _KEPT.isdisjoint(values):
            raise ValueError("must not hold model, messages or stream")
        try:
            json.dumps(values, allow_nan=False)
        except ValueError:
            raise ValueError("must hold numbers that JSON has") from None
        return values

    def said(self) -> Quirks:
        """What is written here, alone."""
        ids = self.tool_call_ids
        values = {name: getattr(self, name) for name in QuirkSettings.model_fields if name != "tool_call_ids"}
        return Quirks(**values, tool_call_ids=None if ids is None else CallIds(**ids.model_dump()))


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


class BackendSettings(QuirkSettings):
    """One upstream. Which of the options belong to which type: `BACKEND_TYPES`."""

    private: ClassVar[frozenset[str]] = frozenset({"options"})

    type: str
    base_url: str | None = None
    api_key: SecretStr = SecretStr("")
    api_version: str | None = None
    vendor: str | None = None
    on_disconnect: Literal["drain", "cancel"] | None = None
    headers: dict[str, SecretStr] = {}
    refuse: tuple[str, ...] = ("chat_template", "logits_processors", "kv_transfer_params")
    models: tuple[str, ...] = ()
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    timeouts: TimeoutSettings = TimeoutSettings()
    max_event_mb: float | None = Field(None, gt=0, le=64)
    by_model: dict[str, QuirkSettings] | None = None
    keep_alive: int | float | str | None = None
    num_ctx: int | None = Field(None, ge=1)
    options: dict[str, Any] = {}
    scripts: dict[str, ScriptSettings] = {}

    @property
    def vendor_name(self) -> str | None:
        """Whose peculiarities and prices apply; None: nobody's that we know."""
        if self.vendor is not None:
            return None if self.vendor == NOBODY else self.vendor
        return self.type if self.type == "azure" else vendor_of(self.base_url)

    @property
    def quirks(self) -> Quirks:
        """What is written here over what the vendor is known to want."""
        models = None if self.by_model is None else {name: quirks.said() for name, quirks in self.by_model.items()}
        return replace(self.said(), by_model=models).over(quirks_of(self.vendor_name))

    @model_validator(mode="before")
    @classmethod
    def _at_its_usual_address(cls, values: Any) -> Any:
        kind = BACKEND_TYPES.get(str(values.get("type"))) if isinstance(values, dict) else None
        if kind is None or kind.usual_url is None or values.get("base_url"):
            return values
        return {**values, "base_url": kind.usual_url}

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        return None if url is None else base_url(url)

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[\x21-\x7e]*", key.get_secret_value()):
            raise ValueError("must be one word of printable ASCII characters")
        return key

    @field_validator("api_version")
    @classmethod
    def _version(cls, version: str | None) -> str | None:
        if version == "v1":
            return None
        if version is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d(-preview)?", version):
            raise ValueError("must look like 2024-10-21 or 2025-01-01-preview; null or v1 for the form without a date")
        return version

    @field_validator("vendor")
    @classmethod
    def _known_vendor(cls, vendor: str | None) -> str | None:
        if vendor is None or vendor in VENDORS or vendor == NOBODY:
            return vendor
        raise ValueError(f"no such vendor; did you mean {nearest(vendor, [*VENDORS, NOBODY])}? `none` is nobody")

    @field_validator("keep_alive")
    @classmethod
    def _duration(cls, time: int | float | str | None) -> int | float | str | None:
        if not isinstance(time, str):
            return time
        if re.fullmatch(r"-?\d+(\.\d+)?", time.strip()):
            return float(time) if "." in time else int(time)
        if not re.fullmatch(r"-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", time.strip()):
            raise ValueError("must be seconds, or a text like 5m or 24h")
        return time.strip()

    @field_validator("headers")
    @classmethod
    def _lines(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in headers.items():
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError("must have names of letters, digits and -")
            if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value.get_secret_value()):
                raise ValueError("must have values of one line")
            if name.lower() in _OURS:
                raise ValueError(f"must not set {name.lower()}, which the gateway writes itself")
        return headers


_OURS = frozenset({"host", "connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})
"""Of a request's head, what the client that sends it decides."""


@dataclass(frozen=True, slots=True)
class BackendType:
    """What a backend of this type may say, besides its type, and what it has to say. `usual_url` stands for an address
    that is not given; `own_path` is the end of an address that the gateway appends itself."""

    options: frozenset[str]
    required: frozenset[str] = frozenset()
    usual_url: str | None = None
    own_path: str | None = None


_FILES = ("ca_file", "client_cert", "client_key")
_COMMON = frozenset({"on_disconnect", "refuse", "models", "timeouts"})
_HTTP = _COMMON | {"base_url", "api_key", "headers", *_FILES}
_OPENAI = _HTTP | {"vendor", "by_model", "max_event_mb", *QuirkSettings.model_fields}
_ADDRESS = frozenset({"base_url"})

BACKEND_TYPES: dict[str, BackendType] = {
    "openai": BackendType(_OPENAI, _ADDRESS),
    "azure": BackendType(_OPENAI | {"api_version"}, _ADDRESS, own_path=r"/openai(/.*)?"),
    "ollama": BackendType(
        _HTTP | {"keep_alive", "num_ctx", "options"}, usual_url="http://127.0.0.1:11434", own_path=r"/(v1|api)"
    ),
    "scripted": BackendType(_COMMON | {"scripts"}),
}
PLUGIN = BackendType(_HTTP | {"vendor", "options"})


def plugin_types() -> list[str]:
    """The types that installed packages add. Their code is not imported."""
    from importlib.metadata import entry_points  # not needed by those who have none

    return sorted({point.name for point in entry_points(group=PLUGINS)} - BACKEND_TYPES.keys())


def check_backends(backends: Mapping[str, BackendSettings], draft: Draft) -> None:
    """What the options of each backend say about each other."""
    for name, backend in backends.items():
        path: Path = ("backends", name)
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            draft.complain(path, "is no name for a backend: use letters, digits, '.', '_' and '-'", value_gone=False)
        kind = BACKEND_TYPES.get(backend.type)
        if kind is None:
            plugins = plugin_types()
            if backend.type not in plugins:
                known = ", ".join([*BACKEND_TYPES, *plugins])
                draft.complain((*path, "type"), f"unknown type; known types: {known}")
                continue
            kind = PLUGIN
        _check_options(path, backend, kind, draft)
        _check_files(path, backend, draft)


def _check_options(path: Path, backend: BackendSettings, kind: BackendType, draft: Draft) -> None:
    for key in sorted(backend.model_fields_set - kind.options - {"type"}):
        draft.complain((*path, key), f"does not belong to type {backend.type}; remove it")
    for key in sorted(kind.required):
        if getattr(backend, key) is None and not draft.reported((*path, key)):
            draft.complain((*path, key), f"is missing; type {backend.type} needs it")
    if kind.own_path and re.search(kind.own_path + r"\Z", backend.base_url or ""):
        draft.complain((*path, "base_url"), "must end before the part of the path that the gateway adds itself")


def _check_files(path: Path, backend: BackendSettings, draft: Draft) -> None:
    for key in _FILES:
        check_file((*path, key), getattr(backend, key), draft)
    if backend.client_key is not None and backend.client_cert is None:
        draft.complain((*path, "client_key"), "belongs to a client_cert; add it")
    if any(getattr(backend, key) for key in _FILES) and not any(draft.reported((*path, key)) for key in _FILES):
        _check_certificates(path, backend, draft)


def _check_certificates(path: Path, backend: BackendSettings, draft: Draft) -> None:
    import ssl  # not needed by those who have none

    def no_pass_phrase() -> str:
        raise OSError("nobody is there to type it")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if backend.ca_file is not None:
        try:
            context.load_verify_locations(backend.ca_file)
        except OSError:
            draft.complain((*path, "ca_file"), "holds no certificates that can be read, as PEM")
    if backend.client_cert is not None:
        try:
            context.load_cert_chain(backend.client_cert, backend.client_key, no_pass_phrase)
        except OSError:
            what = "must hold a certificate that fits client_key, or both in one file, as PEM and without a pass phrase"
            draft.complain((*path, "client_cert"), what)
