"""What may be said of a key, to `/admin/keys` and on the command line, and what one key may give to another.

The names are those of the API; the command line turns its flags into them. A mistake names its field.
"""

from __future__ import annotations

import difflib
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeGuard

from gateway.pricing import NANO
from gateway.store.keys import StoredKey

_MOST = 10**12
_MOST_USD = 10**9
_LATEST = 253_402_300_799_999
"""The end of the year 9999."""
_MOST_MODELS = 1000
_MOST_LABELS = 16
_USD = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,9}))?", re.ASCII)
_PERIODS = ("day", "month", "total")


class Mistake(Exception):
    """`field` is as the API names it; `what` goes on from there."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what}")
        self.field = field
        self.what = what


class UnknownField(Mistake):
    """`what` names the nearest one."""


def new_stored_key(user: str, digest: str, hint: str, created_by: str | None = None) -> StoredKey:
    """A key without rights or limits."""
    return StoredKey(
        id=f"key_{secrets.token_hex(8)}", digest=digest, hint=hint, user_id=user, name=None, is_admin=False,
        models=None, requests_per_minute=None, tokens_per_minute=None, max_parallel=None, budget_nanousd=None,
        budget_period=None, created_at=int(time.time() * 1000), expires_at=None, created_by=created_by,
    )  # fmt: skip


def read(said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a StoredKey that are said, as it has them. Raises Mistake for the first that cannot be."""
    found: dict[str, Any] = {}
    for field, value in said.items():
        if field not in _FIELDS:
            raise UnknownField(field, did_you_mean(field, _FIELDS))
        stored, reader = _FIELDS[field]
        try:
            found[stored] = reader(value)
        except ValueError as wrong:
            raise Mistake(field, str(wrong)) from None
    return found


def changed(key: StoredKey, fields: Mapping[str, Any]) -> StoredKey:
    """The key with what `read` has found. A budget has a period (the whole time, if nobody says), and a period has a
    budget. Raises Mistake."""
    new = replace(key, **fields)
    if new.budget_nanousd is not None:
        return replace(new, budget_period=new.budget_period or "total")
    if fields.get("budget_period") is not None:
        raise Mistake("budget_period", "goes with a budget")
    return replace(new, budget_period=None)


def more_than(maker: StoredKey, key: StoredKey) -> str | None:
    """The field in which a key has more than the one that would make or change it; None: in none.

    Limits that the maker has not do not bound the key. A bucket without a size of its own holds a minute's worth. Money
    for a longer time is less than as much for a shorter one. What every end user may have is more than what all may.
    """
    if key.is_admin and not maker.is_admin:
        return "admin"
    if maker.models is not None and (key.models is None or not set(key.models) <= set(maker.models)):
        return "models"
    for field, most, asked in (
        ("requests_per_minute", maker.requests_per_minute, key.requests_per_minute),
        ("request_burst", *_bursts(maker, key, "request_burst", "requests_per_minute")),
        ("tokens_per_minute", maker.tokens_per_minute, key.tokens_per_minute),
        ("token_burst", *_bursts(maker, key, "token_burst", "tokens_per_minute")),
        ("max_parallel", maker.max_parallel, key.max_parallel),
        ("budget_usd", maker.budget_nanousd, key.budget_nanousd),
        ("expires_at", maker.expires_at, key.expires_at),
    ):
        if most is not None and (asked is None or asked > most):
            return field
    if maker.budget_nanousd is not None and _length(key) < _length(maker):
        return "budget_period"
    shared = (maker.requests_per_minute, maker.tokens_per_minute, maker.max_parallel)
    if key.per_end_user and not maker.per_end_user and any(limit is not None for limit in shared):
        return "per_end_user"
    return None


def _bursts(maker: StoredKey, key: StoredKey, burst: str, rate: str) -> tuple[int | None, int | None]:
    of_maker, of_key = (getattr(one, burst) or getattr(one, rate) for one in (maker, key))
    return of_maker, of_key


def _length(key: StoredKey) -> int:
    return _PERIODS.index(key.budget_period or "total")


def usd_text(nano: int | None) -> str | None:
    """Exact, as short as it can be: `12.5`."""
    return None if nano is None else f"{Decimal(nano).scaleb(-9).normalize():f}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"is not known; did you mean {near[0]}?" if near else "is not known"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 256 or not value.isprintable():
        raise ValueError("must be 1 to 256 printable characters")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> int:
    if not _is_whole(value) or not 1 <= value <= _MOST:
        raise ValueError(f"must be 1 to {_MOST:,}")
    return value


def _nanodollars(value: Any) -> int:
    text = f"{value:f}" if isinstance(value, Decimal) else str(value) if _is_whole(value) else value
    found = _USD.fullmatch(text) if isinstance(text, str) else None
    nano = 0 if found is None else int(found[1]) * NANO + int((found[2] or "0").ljust(9, "0"))
    if not 0 < nano <= _MOST_USD * NANO:
        raise ValueError("must be an amount of USD, such as 25 or 0.50, with nine decimals at most")
    return nano


def _period(value: Any) -> str:
    if not isinstance(value, str) or value not in _PERIODS:
        raise ValueError("must be day, month or total")
    return value


def _models(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST_MODELS:
        raise ValueError("must be a list that names at least one model")
    return tuple(dict.fromkeys(_text(name) for name in value))


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MOST_LABELS:
        raise ValueError(f"must be at most {_MOST_LABELS} names with a text each")
    return {_text(name): _text(text) for name, text in value.items()}


def _moment(value: Any) -> int:
    """ISO 8601 (UTC, if it does not say), or seconds since 1970."""
    milliseconds = None
    if _is_whole(value) or isinstance(value, Decimal):
        milliseconds = int(value * 1000)
    elif isinstance(value, str):
        try:
            said = datetime.fromisoformat(value)
            milliseconds = int((said if said.tzinfo else said.replace(tzinfo=UTC)).timestamp() * 1000)
        except (ValueError, OverflowError):
            pass
    if milliseconds is None or milliseconds > _LATEST:
        raise ValueError("is no time: write 2026-12-31T12:00:00Z, or seconds since 1970")
    if milliseconds <= time.time() * 1000:
        raise ValueError("lies in the past")
    return milliseconds


def _or_none(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else reader(value)


_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "user": ("user_id", _text),
    "name": ("name", _or_none(_text)),
    "admin": ("is_admin", _flag),
    "models": ("models", _or_none(_models)),
    "requests_per_minute": ("requests_per_minute", _or_none(_count)),
    "request_burst": ("request_burst", _or_none(_count)),
    "tokens_per_minute": ("tokens_per_minute", _or_none(_count)),
    "token_burst": ("token_burst", _or_none(_count)),
    "max_parallel": ("max_parallel", _or_none(_count)),
    "budget_usd": ("budget_nanousd", _or_none(_nanodollars)),
    "budget_period": ("budget_period", _or_none(_period)),
    "per_end_user": ("per_end_user", _flag),
    "labels": ("labels", lambda value: {} if value is None else _labels(value)),
    "expires_at": ("expires_at", _or_none(_moment)),
}
