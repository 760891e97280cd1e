"""`/admin/users`: who uses the gateway, and deleting a user with all that was said, with an admin key.

Nobody deletes a user with a key that has more than their own (`key_rules.more_than`), as nobody changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from gateway.api.common import identify, services
from gateway.api.own_body import is_id, iso_time, limit_reader, list_of, name_reader, read_query
from gateway.auth import Caller
from gateway.errors import NotFound, PermissionDenied, Unauthenticated
from gateway.key_rules import more_than
from gateway.responses import Receive, Scope, Send, send_json
from gateway.store import user_deletions
from gateway.store.keys import Changes
from gateway.store.user_deletions import User
from gateway.user_deletion import delete_user
from gateway.wire.jsontext import dumps

SECONDS = 20.0
"""How long a reply may take. What is left then is done in the background."""
_LISTED, _MOST_LISTED = 100, 1000
_QUERY = {"limit": limit_reader(_MOST_LISTED), "after": name_reader}


class ListUsers:
    """`GET /admin/users[?limit=&after=]`: who has a key or has made a call, by name."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        (await identify(scope)).check_admin()
        query = read_query(scope, _QUERY)
        limit = query.get("limit", _LISTED)
        found = await user_deletions.listed(services(scope).database, query.get("after", ""), limit + 1)
        await send_json(send, 200, list_of([_shown(user) for user in found], limit))


class DeleteUser:
    """`DELETE /admin/users/{id}`: keys, conversations, sessions and stored completions go; costs stay, anonymous.

    `finished` false: it takes longer, and goes on in the background. May be asked again.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = await identify(scope)
        caller.check_admin()
        user_id, database = scope["path_params"]["id"], services(scope).database
        if not is_id(user_id) or not await user_deletions.known(database, user_id):
            raise NotFound("There is no user with this id.", param="id")

        async def check(changes: Changes) -> None:
            await _check(changes, caller, user_id)

        who, removed = await delete_user(database, user_id, seconds=SECONDS, check=check)
        told = {"id": user_id, "object": "user.deleted", "deleted": True, "finished": removed.finished}
        await send_json(send, 200, dumps({**told, "anonymous_id": who.anonymous_id}))


ENDPOINTS: Sequence[tuple[str, str, Callable[[], Any], str]] = (
    ("GET", "/admin/users", ListUsers, "The users"),
    ("DELETE", "/admin/users/{id:path}", DeleteUser, "Delete a user, and all that is theirs but anonymous costs"),
)


def routes() -> list[BaseRoute]:
    return [Route(path, endpoint(), methods=[method]) for method, path, endpoint, _ in ENDPOINTS]


async def _check(changes: Changes, caller: Caller, user_id: str) -> None:
    """The admin key of the configuration has no bounds."""
    if caller.key_id is None:
        return
    maker = await changes.find(caller.key_id)
    if not maker.usable(int(time.time() * 1000)):
        raise Unauthenticated("The API key is not valid any more.", log="revoked meanwhile")
    if not maker.is_admin:
        raise PermissionDenied("The key has no admin rights any more.")
    for key in await changes.of(user_id):
        field = None if key.revoked_at is not None else more_than(maker, key)
        if field is not None:
            raise PermissionDenied(f"A key of this user has more than yours ('{field}').", param=field)


def _shown(user: User) -> dict[str, Any]:
    return {
        "id": user.user_id,
        "object": "user",
        "active_keys": user.active_keys,
        "first_call_at": iso_time(user.first_call),
        "last_call_at": iso_time(user.last_call),
    }
