"""Sessions: which one is current, and what is summed."""

from __future__ import annotations

import asyncio

import pytest

from gateway.store import sessions
from gateway.store.conversation_reads import NoSuchPlace, Order
from gateway.store.database import Database
from gateway.store.sessions import SessionTotals
from tests_standalone.conftest import NOON, opened, rows
from tests_standalone.store.test_conversations import save, turn

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


async def test_the_session_that_was_opened_last_is_current_whatever_goes_on_in_others(migrated: Database) -> None:
    await sessions.open_session(migrated, "old", "ann", NOON)
    await sessions.open_session(migrated, "new", "ann", NOON + 1)
    await migrated.write([sessions.add_totals([SessionTotals("old", 0, 1, 1, NOON + 9)])])
    assert await sessions.current(migrated, "ann", active_since=NOON) == "new"
    assert await sessions.current(migrated, "ann", active_since=NOON + 5) == "old", "the new one has been idle"


async def test_an_end_is_told_once_and_keeps_its_time(migrated: Database) -> None:
    await sessions.open_session(migrated, "s", "ann", NOON)
    before = await sessions.revision(migrated)
    assert await sessions.end(migrated, "bob", "s", NOON + 1) is None
    assert await sessions.revision(migrated) == before
    ended = await sessions.end(migrated, "ann", "s", NOON + 1)
    assert ended is not None
    assert ended.ended_at == NOON + 1
    assert await sessions.revision(migrated) > before
    assert await sessions.end(migrated, "ann", "s", NOON + 2) == ended == await sessions.get(migrated, "ann", "s")
    assert await sessions.get(migrated, "bob", "s") is None


@pytest.mark.parametrize(("order", "right"), [("asc", "abcd"), ("desc", "dcba")])
async def test_sessions_in_pages(migrated: Database, order: Order, right: str) -> None:
    for name, at in (("a", 0), ("b", 1), ("c", 1), ("d", 2)):
        await sessions.open_session(migrated, name, "ann", NOON + at)
    await sessions.open_session(migrated, "x", "bob", NOON)
    found = ""
    while page := await sessions.listed(migrated, "ann", limit=1, after=found[-1:] or None, order=order):
        found += page[0].id
    assert found == right
    assert await sessions.count(migrated, "ann") == 4
    with pytest.raises(NoSuchPlace):
        await sessions.listed(migrated, "ann", limit=1, after="x")


async def test_messages_of_a_session_are_the_newest_of_its_conversations_in_time(migrated: Database) -> None:
    await sessions.open_session(migrated, "s", "ann", NOON)
    one, two = turn("1", "2", id="one", session_id="s"), turn("3", id="two", session_id="s", at=NOON + 1)
    await save(migrated, one, two, turn("z", id="other"), turn("b", id="b", user="bob", session_id="s"))
    await save(migrated, turn("4", "5", id="one", pk=one.pk, is_new=False, at=NOON + 2))
    for most in (1, 3, 5, 50):
        found = [message.content.strip('"') for message in await sessions.messages(migrated, "ann", "s", most)]
        assert found == ["1", "2", "3", "4", "5"][-most:]
