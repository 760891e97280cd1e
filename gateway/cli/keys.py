"""`gateway keys create | list | revoke`"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from decimal import Decimal, InvalidOperation

from gateway.auth import digest, new_key
from gateway.cli.common import moment, open_database, settings_from, shown_time, table
from gateway.cli.usage import dollars
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.logs import escaped
from gateway.pricing import NANO
from gateway.store import keys
from gateway.store.database import Database
from gateway.store.keys import StoredKey

_MOST = 10**12


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    if options.action == "create":
        return asyncio.run(_create(settings, options))
    if options.action == "list":
        return asyncio.run(_list(settings))
    return asyncio.run(_revoke(settings, options.id))


async def make_key(database: Database, user: str, **fields: object) -> tuple[StoredKey, str]:
    """A new key in the database; the second value is its secret, which is nowhere else."""
    secret = new_key()
    values: dict[str, object] = {
        "name": None, "is_admin": False, "models": None, "requests_per_minute": None, "tokens_per_minute": None,
        "max_parallel": None, "budget_nanousd": None, "budget_period": None, "expires_at": None,
    }  # fmt: skip
    values.update(fields)
    key = StoredKey(
        id=f"key_{secrets.token_hex(8)}",
        digest=digest(secret),
        hint=secret[-4:],
        user_id=user,
        created_at=int(time.time() * 1000),
        **values,  # type: ignore[arg-type] # the fields named above and nothing else
    )
    await keys.add(database, key)
    return key, secret


async def _create(settings: Settings, options: argparse.Namespace) -> int:
    fields = _fields(options)
    async with open_database(settings) as database:
        key, secret = await make_key(database, options.user, **fields)
    print(secret)
    if any((key.requests_per_minute, key.tokens_per_minute, key.max_parallel, key.budget_nanousd)):
        print("note: limits and budgets are stored with the key, but not enforced yet", file=sys.stderr)
    print(f"id {key.id}, user {key.user_id}. The key is shown this once; only its digest is kept.", file=sys.stderr)
    return 0


def _fields(options: argparse.Namespace) -> dict[str, object]:
    for flag, name in (("--user", options.user), ("--name", options.name)):
        if name is not None and (not name.strip() or len(name) > 256 or not name.isprintable()):
            raise ConfigError([f"{flag}: give a name of 1 to 256 printable characters"])
    limits = {"rpm": options.rpm, "tpm": options.tpm, "max-parallel": options.max_parallel}
    given = {name: value for name, value in limits.items() if value is not None}
    wrong = [f"--{name}: must be 1 to {_MOST:,}" for name, value in given.items() if not 1 <= value <= _MOST]
    if wrong:
        raise ConfigError(wrong)
    if options.period and options.budget is None:
        raise ConfigError(["--period: goes with --budget"])
    models = (
        None if options.models is None else tuple(name.strip() for name in options.models.split(",") if name.strip())
    )
    if models == ():
        raise ConfigError(["--models: name at least one model"])
    expires = None if options.expires is None else moment(options.expires, "--expires", "ahead")
    if expires is not None and expires <= time.time() * 1000:
        raise ConfigError(["--expires: lies in the past"])
    budget = _budget(options.budget)
    return {
        "name": options.name,
        "is_admin": options.admin,
        "models": models,
        "requests_per_minute": options.rpm,
        "tokens_per_minute": options.tpm,
        "max_parallel": options.max_parallel,
        "budget_nanousd": budget,
        "budget_period": None if budget is None else options.period or "total",
        "expires_at": expires,
    }


def _budget(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        nano = int(Decimal(text) * NANO)
    except (InvalidOperation, ValueError, OverflowError):
        nano = 0
    if not 0 < nano < 2**62:
        raise ConfigError([f"--budget: {text!r} is no amount of USD, such as 25 or 0.50"])
    return nano


async def _list(settings: Settings) -> int:
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
    said = [
        "admin" if key.is_admin else "",
        f"models {','.join(key.models)}" if key.models is not None else "",
        f"{key.requests_per_minute} requests/min" if key.requests_per_minute else "",
        f"{key.tokens_per_minute} tokens/min" if key.tokens_per_minute else "",
        f"{key.max_parallel} parallel" if key.max_parallel else "",
        f"{dollars(key.budget_nanousd)} USD/{key.budget_period}" if key.budget_nanousd else "",
    ]
    return "; ".join(part for part in said if part)


async def _revoke(settings: Settings, key_id: str) -> int:
    async with open_database(settings) as database:
        done = await keys.revoke(database, key_id, int(time.time() * 1000))
    if not done:
        raise ConfigError([f"there is no key {escaped(key_id)}: `gateway keys list` shows them"])
    print(f"{key_id} is revoked")
    return 0
