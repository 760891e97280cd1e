"""`/admin/keys`: make, list, change, rotate and revoke API keys, with an admin key.

A key never grants more than the one that makes or changes it has (`key_rules.more_than`); what that has is looked up
in the same transaction. The admin key of the configuration has no bounds. A secret is told once, by the reply of the
call that made it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import identify, read_json_body, services
from gateway.api.own_body import bad_request, iso_time, limit_reader, list_of, name_reader, read_query
from gateway.auth import Caller, digest, new_key
from gateway.errors import BadRequest, NotFound, PermissionDenied, Unauthenticated
from gateway.key_rules import Mistake, UnknownField, changed, did_you_mean, more_than, new_stored_key, read, usd_text
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store import keys
from gateway.store.keys import Changes, StoredKey
from gateway.wire.body import read_object
from gateway.wire.jsontext import dumps

_LISTED = 100
_MOST_LISTED = 1000
_LIST = {"limit": limit_reader(_MOST_LISTED), "after": name_reader, "user": name_reader}
_LONGEST_OVERLAP = 30 * 24 * 60 * 60
_READ_ONLY = frozenset({"id", "object", "key", "hint", "created_at", "created_by", "revoked_at"})


class ListKeys:
    """`GET /admin/keys[?limit=&after=&user=]`: oldest first, revoked ones too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        (await identify(scope)).check_admin()
        query = read_query(scope, _LIST)
        limit, after = query.get("limit", _LISTED), query.get("after")
        database = services(scope).database
        if after is not None and await keys.by_id(database, after) is None:
            raise BadRequest("There is no key with this id to begin after.", param="after", code="invalid_value")
        found = await keys.listed(database, limit=limit + 1, after=after, user_id=query.get("user"))
        await send_json(send, 200, list_of([_shown(key) for key in found], limit))


class MakeKey:
    """`POST /admin/keys`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await _admin(scope)
        fields = _fields(await _body(scope, receive))
        if "user_id" not in fields:
            raise BadRequest("Say whose conversations and costs these are.", param="user", code="missing_parameter")
        secret = new_key()
        blank = new_stored_key(fields["user_id"], digest(secret), secret[-4:], caller.key_id)
        key = _changed(blank, fields)
        async with keys.changing(services(scope).database) as changes:
            _check(await _maker(changes, caller), key)
            await changes.add(key)
        await send_json(send, 200, dumps({**_shown(key), "key": secret}))


class ShowKey:
    """`GET /admin/keys/{id}`"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        (await identify(scope)).check_admin()
        key = await keys.by_id(services(scope).database, scope["path_params"]["id"])
        if key is None:
            raise NotFound("There is no key with this id.", param="id")
        await send_json(send, 200, dumps(_shown(key)))


class ChangeKey:
    """`PATCH /admin/keys/{id}`: the fields that are sent; null takes a limit away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await _admin(scope)
        fields = _fields(await _body(scope, receive))
        key = await _change(scope, caller, lambda key: _changed(key, fields))
        await send_json(send, 200, dumps(_shown(key)))


class RotateKey:
    """`POST /admin/keys/{id}/rotate`: a new secret; the present one stays good for `overlap_seconds`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await _admin(scope)
        overlap = _overlap(await _body(scope, receive))
        until = int((time.time() + overlap) * 1000) if overlap else None
        secret = new_key()
        key = await _change(scope, caller, lambda key: key.rotated(digest(secret), secret[-4:], until))
        await send_json(send, 200, dumps({**_shown(key), "key": secret}))


class RevokeKey:
    """`DELETE /admin/keys/{id}`: it ends for good, and its row stays."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await _admin(scope)
        now = int(time.time() * 1000)
        key = await _change(scope, caller, lambda key: replace(key, revoked_at=key.revoked_at or now), revoked=True)
        await send_json(send, 200, dumps(_shown(key)))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/admin/keys", ListKeys, "The API keys, without their secrets"),
    ("POST", "/admin/keys", MakeKey, "Make an API key"),
    ("GET", "/admin/keys/{id}", ShowKey, "An API key"),
    ("PATCH", "/admin/keys/{id}", ChangeKey, "Change an API key"),
    ("POST", "/admin/keys/{id}", ChangeKey, "Change an API key"),
    ("POST", "/admin/keys/{id}/rotate", RotateKey, "Give an API key a new secret"),
    ("DELETE", "/admin/keys/{id}", RevokeKey, "Revoke an API key"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


async def _admin(scope: Scope) -> Caller:
    caller = await identify(scope)
    caller.check_admin()
    return caller


async def _change(
    scope: Scope, caller: Caller, change: Callable[[StoredKey], StoredKey], *, revoked: bool = False
) -> StoredKey:
    """Nobody changes a key that has more than himself. `revoked`: may it be revoked already?"""
    async with keys.changing(services(scope).database) as changes:
        maker = await _maker(changes, caller)
        key = await changes.find(scope["path_params"]["id"])
        _check(maker, key, "has more than yours")
        if key.revoked_at is not None and not revoked:
            raise BadRequest("This key is revoked for good. Make a new one.", param="id", code="key_revoked")
        new = change(key)
        _check(maker, new)
        await changes.put(new)
    return new


async def _maker(changes: Changes, caller: Caller) -> StoredKey | None:
    """The caller's key as it stands now; None: the configuration's, which has no bounds."""
    if caller.key_id is None:
        return None
    maker = await changes.find(caller.key_id)
    if not maker.usable(int(time.time() * 1000)):
        raise Unauthenticated("The API key is not valid any more.", log="revoked meanwhile")
    if not maker.is_admin:
        raise PermissionDenied("The key has no admin rights any more.")
    return maker


def _check(maker: StoredKey | None, key: StoredKey, what: str = "would have more than yours") -> None:
    """Raises PermissionDenied, which names the field."""
    field = None if maker is None else more_than(maker, key)
    if field is not None:
        raise PermissionDenied(f"The key {what} ('{field}'), and a key can grant only what it has.", param=field)


async def _body(scope: Scope, receive: Receive) -> dict[str, Any]:
    """No body is an empty object. Numbers with decimals stay exact."""
    raw = await read_json_body(scope, receive)
    if not raw.strip():
        return {}
    read_object(raw)
    found: dict[str, Any] = json.loads(raw, parse_float=Decimal)
    return found


def _fields(said: Mapping[str, Any]) -> dict[str, Any]:
    fixed = next((field for field in said if field in _READ_ONLY), None)
    if fixed is not None:
        raise BadRequest(f"'{fixed}' cannot be set.", param=fixed, code="read_only_parameter")
    try:
        return read(said)
    except Mistake as mistake:
        raise bad_request(mistake) from None


def _changed(key: StoredKey, fields: Mapping[str, Any]) -> StoredKey:
    try:
        return changed(key, fields)
    except Mistake as mistake:
        raise bad_request(mistake) from None


def _overlap(said: Mapping[str, Any]) -> int:
    unknown = next((name for name in said if name != "overlap_seconds"), None)
    if unknown is not None:
        raise bad_request(UnknownField(unknown, did_you_mean(unknown, ["overlap_seconds"])))
    overlap = said.get("overlap_seconds", 0)
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap <= _LONGEST_OVERLAP:
        raise bad_request(Mistake("overlap_seconds", f"must be a whole number, 0 to {_LONGEST_OVERLAP:,}"))
    return overlap


def _shown(key: StoredKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "api_key",
        "user": key.user_id,
        "name": key.name,
        "hint": key.hint,
        "admin": key.is_admin,
        "models": None if key.models is None else list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "request_burst": key.request_burst,
        "tokens_per_minute": key.tokens_per_minute,
        "token_burst": key.token_burst,
        "max_parallel": key.max_parallel,
        "budget_usd": usd_text(key.budget_nanousd),
        "budget_period": key.budget_period,
        "per_end_user": key.per_end_user,
        "labels": dict(key.labels),
        "expires_at": iso_time(key.expires_at),
        "created_at": iso_time(key.created_at),
        "created_by": key.created_by,
        "revoked_at": iso_time(key.revoked_at),
    }
