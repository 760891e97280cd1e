"""Leases asked for, and those that were free."""

from __future__ import annotations

import asyncio

from gateway.store import turn_leases
from gateway.store.database import Database
from gateway.store.turn_leases import LONG_OVER, SECONDS, Lease, release_step, renew, sweep, take
from tests_standalone.conftest import opened, rows

HELD = "SELECT user_id, conversation_id, holder FROM turn_leases ORDER BY user_id, conversation_id"


def lease(name: str = "chat", holder: str = "h1", user: str = "ann") -> Lease:
    return Lease(user, name, holder)


async def let_time_pass(database: Database, seconds: float) -> None:
    await database.write([("UPDATE turn_leases SET until = until - CAST($1 AS BIGINT)", [(int(seconds * 1000),)])])


async def left(database: Database) -> float:
    """Seconds that the only lease has still, by the database's clock."""
    now = turn_leases._NOW[database.dialect]
    ((milliseconds,),) = await rows(database, f"SELECT until - {now} FROM turn_leases")
    return float(milliseconds) / 1000


async def test_a_lease_is_taken_once(migrated: Database) -> None:
    assert await take(migrated, [lease()]) == {"h1"}
    assert SECONDS - 5 < await left(migrated) <= SECONDS
    assert await take(migrated, [lease(holder="h2")]) == set()
    assert await take(migrated, [lease()]) == set()
    assert await rows(migrated, HELD) == [("ann", "chat", "h1")]


async def test_several_at_once_are_taken_as_far_as_they_are_free(migrated: Database) -> None:
    await take(migrated, [lease("b", "old")])
    asked = [lease(name, f"h_{name}") for name in "cba"] + [lease("b", "h_bob", user="bob")]
    assert await take(migrated, asked) == {"h_a", "h_c", "h_bob"}


async def test_a_lease_that_has_run_out_is_free(migrated: Database) -> None:
    await take(migrated, [lease()])
    await let_time_pass(migrated, SECONDS + 1)
    assert await take(migrated, [lease(holder="h2")]) == {"h2"}
    await migrated.write([release_step([lease()])])
    assert await rows(migrated, HELD) == [("ann", "chat", "h2")]


async def test_one_that_is_renewed_goes_on(migrated: Database) -> None:
    await take(migrated, [lease(), lease("other", "h2")])
    await let_time_pass(migrated, 15)
    await renew(migrated, [lease(), lease("gone", "h3")])
    await let_time_pass(migrated, 15)
    assert await take(migrated, [lease(holder="x"), lease("other", "y")]) == {"y"}


async def test_one_that_somebody_else_has_by_now_is_not_renewed(migrated: Database) -> None:
    await take(migrated, [lease(holder="h2")])
    await let_time_pass(migrated, 15)
    await renew(migrated, [lease(holder="h1")])
    assert await left(migrated) < 6


async def test_what_is_given_back_is_free(migrated: Database) -> None:
    await take(migrated, [lease(), lease("other", "h2")])
    await migrated.write([release_step([lease("other", "h2"), lease()])])
    assert await rows(migrated, HELD) == []


async def test_what_nobody_asks_for_again_is_removed(migrated: Database) -> None:
    await take(migrated, [lease()])
    await let_time_pass(migrated, SECONDS + LONG_OVER - 5)
    await sweep(migrated)
    assert len(await rows(migrated, HELD)) == 1
    await let_time_pass(migrated, 10)
    await sweep(migrated)
    assert await rows(migrated, HELD) == []


async def test_of_many_workers_one_gets_it(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        for turn in range(10):
            asked = [
                take(database, [lease(name, f"{turn}-{name}-{number}") for name in "abc"])
                for number, database in enumerate([one, two] * 4)
            ]
            taken = sorted(holder for found in await asyncio.gather(*asked) for holder in found)
            assert [holder.split("-")[1] for holder in taken] == ["a", "b", "c"]
            await one.write([release_step(lease(holder.split("-")[1], holder) for holder in taken)])
