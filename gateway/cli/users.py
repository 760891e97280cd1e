"""`gateway users list | delete`"""

from __future__ import annotations

import argparse
import asyncio

from gateway.cli.common import open_database, settings_from, shown_time, table
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.logs import escaped
from gateway.store import user_deletions
from gateway.user_deletion import delete_user, pass_over

_AT_ONCE = 1000
_SECONDS = 3600.0


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    actions = {"list": _list, "delete": _delete}
    return asyncio.run(actions[options.action](settings, options))


async def _list(settings: Settings, _: argparse.Namespace) -> int:
    rows: list[tuple[object, ...]] = []
    async with open_database(settings) as database:
        after = ""
        while found := await user_deletions.listed(database, after, _AT_ONCE):
            rows += [
                (user.user_id, user.active_keys, shown_time(user.first_call), shown_time(user.last_call))
                for user in found
            ]
            after = found[-1].user_id
    print(table(("user", "active keys", "first call", "last call"), rows, right=(1,)))
    return 0


async def _delete(settings: Settings, options: argparse.Namespace) -> int:
    user = options.user
    if not options.yes:
        what = f"all that {escaped(user)} said and kept, and the keys, cannot be brought back"
        raise ConfigError([f"{what}: say --yes to delete it; what it cost stays, without the name"])
    async with open_database(settings) as database:
        if not await user_deletions.known(database, user):
            raise ConfigError([f"there is no user {escaped(user)}: `gateway users list` shows them"])
        who, removed = await delete_user(database, user, seconds=_SECONDS)
        while not removed.finished:
            removed = await pass_over(database, who, seconds=_SECONDS)
    print(f"{escaped(user)} is deleted; what it cost is listed under {who.anonymous_id}")
    return 0
