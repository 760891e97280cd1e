"""What one value of the settings may look like, whether YAML or the environment wrote it, and how it is shown.

`Section` is the base of all parts of the settings: it reads each field as what the field holds. No message here quotes
a value: any value may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Literal, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationInfo, field_validator

from gateway.config_draft import Draft, bare, inside, is_section
from gateway.config_file import parse

MASK = "**********"
_SECRET_NAME = re.compile(r"key|token|secret|pass|pwd|credential", re.IGNORECASE)


# As it is shown


def mask_url(text: str) -> str:
    """The URL without its password; over HTTP without its user, too. Rather too much is hidden than too little."""
    text = re.sub(r"^([\w.+-]+://[^:@/]*):.*@", rf"\1:{MASK}@", text, flags=re.DOTALL)
    text = re.sub(r"^(https?://)[^@/?#]*@", rf"\1{MASK}@", text)
    return re.sub(
        r"([?&][^=&]*(?:pass|pwd|key|token|secret|sig)[^=&]*=)[^&#]*", rf"\1{MASK}", text, flags=re.IGNORECASE
    )


def masked(value: Any, *, secret: bool = False) -> Any:
    """A free mapping as it may be shown: no text under a name that sounds like a secret, no password in a URL."""
    if isinstance(value, dict):
        return {key: masked(item, secret=secret or bool(_SECRET_NAME.search(str(key)))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, secret=secret) for item in value]
    return (MASK if secret and value else mask_url(value)) if isinstance(value, str) else value


# As it is written


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _price(value: Any) -> Any:
    return value if value is None else dollars(value)


def _list(value: Any) -> Any:
    return items(value) if isinstance(value, str) else value


def _choice(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _secret(value: Any) -> Any:
    return "" if value is None else value.strip() if isinstance(value, str) else value


def _mapping(value: Any) -> Any:
    return {} if value is None else value


def database_url(url: str) -> str:
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


def base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s?#]", url):
        raise ValueError("must be an http:// or https:// address without ? and #, like https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must hold no user and password; send them with headers: {authorization: Basic ...}")
    return url.rstrip("/")


def storage_url(url: str) -> str:
    if re.fullmatch(r"s3://[\w.-]+(/[^?#@]*)?", url):
        return url.rstrip("/")
    if not url.strip() or re.match(r"[\w.+-]+:/", url):
        raise ValueError(
            "must be a folder like data/files, or s3://bucket/prefix with the keys in access_key and secret_key"
        )
    return url


def proxy(address: str) -> str:
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError:
        raise ValueError("must hold IP addresses or networks like 10.0.0.0/8") from None
    return address


def upstream_proxy(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme == "http" and bool(parts.hostname) and bool(parts.port) and parts.path in ("", "/")
    except ValueError:
        good = False
    if not good or re.search(r"[\s?#]", url) or not url.isascii():
        raise ValueError(
            "must look like http://host:3128 or http://user:password@host:3128, with %40 for @ and the like;"
            " it is asked with CONNECT, other kinds of proxy are not spoken"
        )
    return url.rstrip("/")


def allowed_host(host: str) -> str:
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
    private: ClassVar[frozenset[str]] = frozenset()
    """Free mappings that may hold secrets."""
    amounts: ClassVar[frozenset[str]] = frozenset()
    """Decimals that are USD, not prices."""

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
        if get_origin(kind) is dict and isinstance(value, dict) and is_section(inside(kind, "")):
            return {key: _mapping(entry) for key, entry in value.items()}
        read = _amount if name in cls.amounts else _READERS.get(get_origin(kind) or kind)
        return value if read is None or (value is None and kind is not annotation) else read(value)

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            if name in self.private:
                yield name, masked(value)
            else:
                yield name, mask_url(value) if isinstance(value, str) else value


# Texts as values


def free_value(text: str) -> Any:
    """What stands in a free mapping, given as one text: a value as in YAML and JSON, or else the text."""
    draft = Draft()
    try:
        value = parse(text, draft, None)
    except (yaml.YAMLError, RecursionError):
        return text
    return text if draft.problems else value


def items(text: str) -> list[Any]:
    """A list given as one text: `[a, b]` as in YAML and JSON, or `a, b`."""
    if not text.strip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    draft = Draft()
    try:
        value = parse(text, draft, None)
    except (yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, list) or draft.problems:
        raise ValueError("must be a list: [a, b] or a, b")
    return value


def dollars(value: Any, times: int = 1) -> Decimal:
    """USD per million tokens, exactly as written: a float counts as its shortest decimal form."""
    price = _exact(value)
    if not 0 <= price * times <= 10**6:
        raise ValueError("must be from 0 to 1000000 USD per million tokens")
    return _nano(price * times)


def _amount(value: Any) -> Decimal:
    """USD."""
    amount = _exact(value)
    if not 0 < amount <= 10**9:
        raise ValueError("must be more than 0 and at most 1000000000 USD")
    return _nano(amount)


def _exact(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number of USD")
    try:
        found = Decimal(value.strip() if isinstance(value, str) else repr(value) if isinstance(value, float) else value)
    except InvalidOperation:
        raise ValueError("must be a number of USD") from None
    if not found.is_finite():
        raise ValueError("must be a number of USD")
    return found


def _nano(amount: Decimal) -> Decimal:
    exponent = amount.normalize().as_tuple().exponent
    if isinstance(exponent, int) and exponent < -9:
        raise ValueError("must have at most 9 decimals")
    return amount
