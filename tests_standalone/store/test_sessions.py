"""Sessions: which one is current, and what is summed."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store import sessions
from gateway.store.database import Database
from gateway.store.sessions import SessionTotals
from tests_standalone.conftest import NOON, opened, rows

TOTALS = "SELECT id, conversation_count, total_tokens, total_cost_nanousd, last_activity FROM sessions ORDER BY id"


async def test_a_new_session_is_empty_and_active(migrated: Database) -> None:
    await sessions.open_session(migrated, "s", "ann", NOON)
    assert await rows(migrated, "SELECT * FROM sessions") == [("s", "ann", NOON, NOON, None, 0, 0, 0)]


@pytest.mark.parametrize(
    ("user", "since", "current"),
    [("ann", NOON, "s"), ("ann", NOON - 1, "s"), ("ann", NOON + 1, None), ("bob", 0, None), ("' OR '1'='1", 0, None)],
    ids=["active just then", "active since", "idle since", "of another user", "SQL"],
)
async def test_the_current_session(migrated: Database, user: str, since: int, current: str | None) -> None:
    await sessions.open_session(migrated, "s", "ann", NOON)
    assert await sessions.current(migrated, user, active_since=since) == current


async def test_the_newest_of_several_is_the_current_one_and_an_ended_one_never_is(migrated: Database) -> None:
    for name, at in (("old", 1), ("newest", 3), ("new", 2)):
        await sessions.open_session(migrated, name, "ann", NOON + at)
    assert await sessions.current(migrated, "ann", active_since=NOON) == "newest"
    await migrated.write([("UPDATE sessions SET ended_at = $1 WHERE id = 'newest'", [(NOON + 3,)])])
    assert await sessions.current(migrated, "ann", active_since=NOON) == "new"


async def test_totals_are_added_and_activity_never_goes_back(migrated: Database) -> None:
    await sessions.open_session(migrated, "a", "ann", NOON)
    await sessions.open_session(migrated, "b", "bob", NOON)
    await migrated.write(
        [
            sessions.add_totals([SessionTotals("b", 1, 30, 300, NOON + 9), SessionTotals("a", 1, 10, 100, NOON + 5)]),
            sessions.add_totals([SessionTotals("a", 0, 1, 2, NOON - 5), SessionTotals("gone", 1, 1, 1, NOON)]),
        ]
    )
    assert await rows(migrated, TOTALS) == [("a", 1, 11, 102, NOON + 5), ("b", 1, 30, 300, NOON + 9)]


async def test_workers_that_add_to_the_same_sessions_lose_nothing(tables_url: str) -> None:
    names = [f"s{number}" for number in range(5)]
    async with opened(tables_url) as one, opened(tables_url) as two:
        for name in names:
            await sessions.open_session(one, name, "ann", NOON)
        forth, back = ([SessionTotals(name, 1, 2, 3, NOON) for name in order] for order in (names, names[::-1]))
        both = [one.write([sessions.add_totals(forth)]) for _ in range(20)]
        both += [two.write([sessions.add_totals(back)]) for _ in range(20)]
        await asyncio.gather(*both)
        assert await rows(two, TOTALS) == [(name, 40, 80, 120, NOON) for name in names]
