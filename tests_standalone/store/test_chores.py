"""Work that one does for all."""

from __future__ import annotations

import asyncio

from gateway.store import chores
from gateway.store.database import Database
from tests_standalone.conftest import opened, rows


async def test_the_first_who_asks_has_it_and_begins_at_the_beginning(migrated: Database) -> None:
    assert await chores.take(migrated, "purge", "a", 60) == 0
    assert await chores.take(migrated, "purge", "b", 60) is None


async def test_of_many_at_once_one_has_it(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as other:
        got = await asyncio.gather(
            *(chores.take(database, "purge", f"{place}", 60) for place, database in enumerate([one, other] * 5))
        )
    assert sorted(place is None for place in got) == [False, *[True] * 9]


async def test_the_next_goes_on_where_the_last_was_when_its_time_is_over(migrated: Database) -> None:
    assert await chores.take(migrated, "purge", "a", 60) == 0
    assert await chores.go_on(migrated, "purge", "a", 0, 77)
    assert await chores.take(migrated, "purge", "b", 60) == 77


async def test_who_was_too_slow_is_told(migrated: Database) -> None:
    await chores.take(migrated, "purge", "a", 0)
    assert await chores.take(migrated, "purge", "b", 60) == 0
    assert not await chores.go_on(migrated, "purge", "a", 60, 99)
    assert await rows(migrated, "SELECT holder, place FROM chores") == [("b", 0)]


async def test_one_thing_does_not_wait_for_another(migrated: Database) -> None:
    assert await chores.take(migrated, "purge", "a", 60) == 0
    assert await chores.take(migrated, "other", "b", 60) == 0


async def test_the_time_is_that_of_the_database(migrated: Database) -> None:
    await chores.take(migrated, "purge", "a", 60)
    now = await chores.now(migrated)
    assert 0 < (await rows(migrated, "SELECT until FROM chores"))[0][0] - now <= 60_000
