"""The background task that removes for good what is not to be kept. Each worker has it, and one works at a time.

- A row in the database says who works, until when by its clock (`store.chores`): whoever finds it free does the next
  round, so the work goes on when a worker dies.
- A round takes small steps and rests after each for several times as long as it took. What it does not get done in its
  time is left to the next; each part of it is done a little in every round.
- Conversations that were not used for `retention_days` are deleted; those deleted longer than `deleted_days` ago are
  removed, with their messages, and with their sessions when these are over and empty. Stored completions go after
  `retention_days`, whoever made them.
- Old conversations are found by walking along their numbers, which are in the order of time, up to the first that is
  too young: an index by the time of their last use would have to be changed by every turn. What the walk deletes is
  removed in the next round.
- Users who were deleted in the last day are looked after once more (`user_deletion`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable
from typing import TypeVar

from gateway.errors import DatabaseUnavailable
from gateway.ids import random_hex
from gateway.store import chores, purge, user_deletions
from gateway.store.database import Database
from gateway.user_deletion import pass_over

log = logging.getLogger("gateway.purge")

NAME = "purge"
WALK = "walk"
DAY = 24 * 60 * 60 * 1000
EVERY = 60.0
"""Seconds from one round to the next."""
WALK_EVERY = 60 * 60.0
"""Seconds from the end of one walk to the beginning of the next."""
ROUND = 30.0
REST = 4
LEAST_REST = 0.02
T = TypeVar("T")


class Purge:
    """`retention_days` None: what is not deleted is kept for ever."""

    def __init__(
        self,
        database: Database,
        *,
        retention_days: int | None = None,
        deleted_days: int = 30,
        session_idle_minutes: int = 30,
        every: float = EVERY,
    ) -> None:
        self._database = database
        self._retention = None if retention_days is None else retention_days * DAY
        self._deleted = deleted_days * DAY
        self._idle = session_idle_minutes * 60_000
        self._every = every
        self._me = f"p_{random_hex()}"
        self._task: asyncio.Task[None] | None = None
        self._removed_to = (-1, 0)
        self._end = 0.0

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="purge")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await asyncio.sleep(self._every * random.uniform(0.5, 1))
        while True:
            try:
                await self.round()
            except DatabaseUnavailable as failure:
                log.warning("old conversations are not removed, trying again: %s", failure.cause)
            except Exception:
                log.exception("removing old conversations failed")
            await asyncio.sleep(self._every)

    async def round(self) -> bool:
        """One round; False if it is somebody else's turn."""
        if await chores.take(self._database, NAME, self._me, self._every + ROUND) is None:
            return False
        self._end = time.monotonic() + ROUND
        now = await chores.now(self._database)
        await self._look_after_deleted_users(now)
        await self._remove(now - self._deleted, now - self._idle)
        if self._retention is not None:
            await self._remove_completions(now - self._retention)
            await self._expire(now - self._retention)
        return await chores.go_on(self._database, NAME, self._me, self._every, 0)

    async def _look_after_deleted_users(self, now: int) -> None:
        found = await user_deletions.running(self._database)
        random.shuffle(found)  # nobody is always the last, for whom there was no time
        for who in found:
            done = await pass_over(self._database, who, seconds=self._end - time.monotonic())
            if done.finished and who.until < now:
                await user_deletions.forget(self._database, who)
            if self._is_over:
                return

    async def _remove(self, before: int, idle_since: int) -> None:
        """Goes on behind what the last round has seen: not all that branches keep is to be looked at each time."""
        while True:
            found = await purge.due(self._database, before, self._removed_to)
            await self._rested(purge.remove(self._database, found, idle_since=idle_since))
            self._removed_to = (found[-1].deleted_at, found[-1].number) if found else (-1, 0)
            if not found or self._is_over:
                return

    async def _remove_completions(self, created_before: int) -> None:
        while await self._rested(purge.remove_completions(self._database, created_before)):
            if self._is_over:
                return

    async def _expire(self, unused_since: int) -> None:
        """A part of the walk, from where the last round has stopped."""
        place = await chores.take(self._database, WALK, self._me, ROUND)
        if place is None:
            return
        while True:
            place = await self._rested(purge.expire(self._database, place, unused_since=unused_since))
            if not place or self._is_over:
                break
        await chores.go_on(self._database, WALK, self._me, 0 if place else WALK_EVERY, place)

    @property
    def _is_over(self) -> bool:
        return time.monotonic() > self._end

    async def _rested(self, work: Awaitable[T]) -> T:
        began = time.monotonic()
        done = await work
        await asyncio.sleep(max(LEAST_REST, REST * (time.monotonic() - began)))
        return done
