"""`gateway keys create | update | rotate | list | revoke`"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import replace
from decimal import Decimal
from typing import Any

from gateway.auth import digest, new_key
from gateway.cli.common import moment, open_database, settings_from, shown_time, table
from gateway.cli.usage import dollars
from gateway.config import Settings
from gateway.errors import ConfigError, NotFound
from gateway.key_rules import Mistake, changed, new_stored_key, read
from gateway.logs import escaped
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import StoredKey

NONE = "none"
"""Lifts a limit."""
_FLAGS = {
    "user": "--user", "name": "--name", "requests_per_minute": "--rpm", "request_burst": "--burst",
    "tokens_per_minute": "--tpm", "token_burst": "--token-burst", "max_parallel": "--max-parallel",
    "budget_usd": "--budget", "budget_period": "--period", "models": "--models", "labels": "--label",
    "per_end_user": "--per-end-user", "expires_at": "--expires", "admin": "--admin",
}  # fmt: skip
_LONGEST_OVERLAP = 30 * 24 * 60 * 60 * 1000


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    actions = {"create": _create, "update": _update, "rotate": _rotate, "list": _list, "revoke": _revoke}
    try:
        return asyncio.run(actions[options.action](settings, options))
    except Mistake as mistake:
        raise ConfigError([f"{_FLAGS[mistake.field]}: {mistake.what}"]) from None
    except NotFound:
        raise ConfigError([f"there is no key {escaped(options.id)}: `gateway keys list` shows them"]) from None


async def make_key(database: Database, user: str, **fields: object) -> tuple[StoredKey, str]:
    """A new key in the database, with these fields of a StoredKey; the second value is its secret, which is nowhere
    else."""
    secret = new_key()
    key = changed(new_stored_key(user, digest(secret), secret[-4:]), fields)
    await keys.add(database, key)
    return key, secret


async def _create(settings: Settings, options: argparse.Namespace) -> int:
    fields = _fields(options)
    changed(new_stored_key(fields["user_id"], "", ""), fields)  # mistakes come before the database
    async with open_database(settings) as database:
        key, secret = await make_key(database, fields.pop("user_id"), **fields)
    print(secret)
    print(f"id {key.id}, user {key.user_id}. The key is shown this once; only its digest is kept.", file=sys.stderr)
    return 0


async def _update(settings: Settings, options: argparse.Namespace) -> int:
    fields = _fields(options)
    if not fields:
        raise ConfigError([f"nothing to change: name a flag, such as --rpm 60 or --rpm {NONE}"])
    async with open_database(settings) as database:
        key = await keys.update(database, options.id, lambda key: changed(_not_revoked(key), fields))
    print(f"{key.id} is changed: {_rights(key) or 'no limits of its own'}")
    return 0


async def _rotate(settings: Settings, options: argparse.Namespace) -> int:
    now = int(time.time() * 1000)
    until = None if options.overlap is None else moment(options.overlap, "--overlap", "ahead")
    if until is not None and not 0 <= until - now <= _LONGEST_OVERLAP + 60_000:
        raise ConfigError(["--overlap: must be 0m to 30d"])
    secret = new_key()
    async with open_database(settings) as database:
        key = await keys.update(
            database, options.id, lambda key: _not_revoked(key).rotated(digest(secret), secret[-4:], until)
        )
    print(secret)
    old = "The one from before is void" if until is None else f"The one from before is good until {shown_time(until)}"
    print(f"id {key.id}, user {key.user_id}. The new secret is shown this once. {old}.", file=sys.stderr)
    return 0


def _not_revoked(key: StoredKey) -> StoredKey:
    if key.revoked_at is not None:
        raise ConfigError([f"{key.id} is revoked for good: make a new key"])
    return key


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as the fields of a StoredKey. Flags that nobody gave are not among the options."""
    said = {field: value for field, value in vars(options).items() if field in _FLAGS}
    said = {field: None if value == NONE and field != "user" else value for field, value in said.items()}
    if said.get("models") is not None:
        said["models"] = [name.strip() for name in said["models"].split(",") if name.strip()]
    if said.get("expires_at") is not None:
        said["expires_at"] = Decimal(moment(said["expires_at"], "--expires", "ahead")) / 1000
    if "labels" in said:
        said["labels"] = None if said["labels"] == [NONE] else dict(map(_label, said["labels"]))
    return read(said)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Mistake("labels", "write NAME=TEXT")
    return name, value


async def _list(settings: Settings, _: argparse.Namespace) -> int:
    async with open_database(settings) as database:
        found = await keys.listed(database)
    rows = [(key.id, f"...{key.hint}", key.user_id, key.name or "", _state(key), _rights(key)) for key in found]
    print(table(("id", "key", "user", "name", "state", "rights and limits"), rows))
    return 0


def _state(key: StoredKey) -> str:
    if key.revoked_at is not None:
        return f"revoked {shown_time(key.revoked_at)}"
    if not key.usable(int(time.time() * 1000)):
        return f"expired {shown_time(key.expires_at)}"
    return "active" if key.expires_at is None else f"until {shown_time(key.expires_at)}"


def _rights(key: StoredKey) -> str:
    limits = {
        "requests/min": key.requests_per_minute,
        "requests at once": key.request_burst,
        "tokens/min": key.tokens_per_minute,
        "tokens at once": key.token_burst,
        "parallel": key.max_parallel,
    }
    said = [
        "admin" if key.is_admin else "",
        f"models {','.join(key.models)}" if key.models is not None else "",
        *(f"{limit} {what}" for what, limit in limits.items() if limit is not None),
        f"{dollars(key.budget_nanousd)} USD/{key.budget_period}" if key.budget_nanousd else "",
        "for each end user" if key.per_end_user else "",
        *(f"{name}={text}" for name, text in key.labels.items()),
    ]
    return "; ".join(part for part in said if part)


async def _revoke(settings: Settings, options: argparse.Namespace) -> int:
    now = int(time.time() * 1000)
    async with open_database(settings) as database:
        await keys.update(database, options.id, lambda key: replace(key, revoked_at=key.revoked_at or now))
    print(f"{options.id} is revoked")
    return 0
