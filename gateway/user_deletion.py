"""Deleting a user: keys first, then all that was said and kept; what it cost stays without a name.

`delete_user` begins, and does what it can in a given time. The rest, and what calls leave that were running meanwhile,
is done by `purge`, which looks again each minute for a day: `pass_over` is one such look. Each step can be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway.store import keys, purge, user_deletions
from gateway.store.database import Database
from gateway.store.keys import Changes
from gateway.store.user_deletions import Deletion

PAUSE = 0.02
"""Seconds between batches, so that turns get through."""


@dataclass(slots=True)
class Removed:
    """What a pass has removed or made anonymous, and whether there was time for all of it."""

    conversations: int = 0
    sessions: int = 0
    stored_completions: int = 0
    usage_rows: int = 0
    finished: bool = False


async def delete_user(
    database: Database,
    user_id: str,
    *,
    seconds: float,
    check: Callable[[Changes], Awaitable[None]] | None = None,
) -> tuple[Deletion, Removed]:
    """`check` is asked before anything is done, while no key changes; what it raises ends it all."""
    async with keys.changing(database) as changes:
        if check is not None:
            await check(changes)
        who = await user_deletions.begin(changes, user_id, int(time.time() * 1000))
    return who, await pass_over(database, who, seconds=seconds)


async def pass_over(database: Database, who: Deletion, *, seconds: float) -> Removed:
    """Removes what there is of the user, for so long."""
    end = time.monotonic() + seconds
    removed = Removed()

    async def some(part: Callable[[Database, Deletion], Awaitable[int]]) -> int:
        total = 0
        while time.monotonic() < end and (count := await part(database, who)):
            total += count
            await asyncio.sleep(PAUSE)
        return total

    await user_deletions.remove_keys(database, who)
    removed.conversations = await some(_conversations)
    removed.stored_completions = await some(user_deletions.remove_completions)
    removed.sessions = await some(user_deletions.remove_sessions)
    removed.usage_rows = await some(user_deletions.make_anonymous)
    await user_deletions.forget_limits(database, who)
    removed.finished = time.monotonic() < end
    return removed


async def _conversations(database: Database, who: Deletion) -> int:
    found = await user_deletions.conversations(database, who)
    await purge.remove(database, found, idle_since=0)
    return len(found)
