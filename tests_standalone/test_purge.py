"""The background task: who works, what a round does, and that it goes on after a failure."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from gateway import purge
from gateway.purge import DAY, Purge
from gateway.store import chores, conversations, usage, user_deletions
from gateway.store.database import Database
from gateway.user_deletion import delete_user
from tests_standalone.conftest import Unsteady, eventually, opened, rows, usage_row
from tests_standalone.store.test_purge import left, turn


@pytest.fixture
def now() -> int:
    return int(time.time() * 1000)


async def test_a_round_removes_what_is_old_and_what_was_deleted_long_ago(migrated: Database, now: int) -> None:
    await migrated.write(
        conversations.save(
            [
                turn("unused", "a", at=now - 8 * DAY),
                turn("used", "b", at=now - 6 * DAY),
                turn("deleted", "c", at=now - 6 * DAY),
                turn("deleted lately", "d", at=now - 6 * DAY),
            ]
        )
    )
    deleted = "UPDATE conversations SET deleted_at = $1 WHERE id = $2"
    await migrated.write([(deleted, [(now - 4 * DAY, "deleted"), (now - 2 * DAY, "deleted lately")])])
    await migrated.write([usage.insert([usage_row(conversation_id="unused", created_at=now - 8 * DAY)])])
    for _ in range(2):
        assert await Purge(migrated, retention_days=7, deleted_days=3, every=0).round()
    assert await left(migrated) == {"pk_used": ["b"], "pk_deleted lately": ["d"]}
    assert await rows(migrated, "SELECT cost_nanousd FROM usage_rows") == [(1000,)]


async def test_without_retention_what_is_not_deleted_is_kept_for_ever(migrated: Database, now: int) -> None:
    await migrated.write(conversations.save([turn("old", "a", at=1)]))
    assert await Purge(migrated, deleted_days=0).round()
    assert await left(migrated) == {"pk_old": ["a"]}


async def test_one_round_at_a_time_over_all_hosts(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as other:
        both = Purge(one), Purge(other)
        assert sorted(await asyncio.gather(*(each.round() for each in both))) == [False, True]
        assert not any([await each.round() for each in both])


async def test_a_round_leaves_what_it_has_no_time_for_to_the_next_and_to_another(
    migrated: Database, now: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.purge.ROWS_AT_ONCE", 2)
    monkeypatch.setattr(purge, "ROUND", 0.0)
    monkeypatch.setattr(purge, "WALK_EVERY", 0.0)
    await migrated.write(conversations.save([turn(f"{place:02}", "a", at=now - 8 * DAY) for place in range(20)]))
    seen = set()
    for _ in range(200):
        assert await Purge(migrated, retention_days=7, every=0).round()
        seen |= set(await rows(migrated, "SELECT place FROM chores WHERE name = 'walk'"))
        if not await left(migrated):
            break
    assert await left(migrated) == {}
    assert len(seen) > 2


async def test_the_walk_begins_again_after_a_while(migrated: Database, now: int) -> None:
    task = Purge(migrated, retention_days=7, every=0)
    await task.round()
    await migrated.write(conversations.save([turn("old", "a", at=now - 8 * DAY)]))
    await task.round()
    await task.round()
    assert await left(migrated) == {"pk_old": ["a"]}
    await migrated.write([("UPDATE chores SET until = 0 WHERE name = 'walk'", [()])])
    await task.round()
    await task.round()
    assert await left(migrated) == {}


async def test_a_deleted_user_is_looked_after_for_a_day(migrated: Database, now: int) -> None:
    await migrated.write([usage.insert([usage_row(user_id="ann", created_at=now - 5)])])
    who, _ = await delete_user(migrated, "ann", seconds=10)
    await migrated.write([usage.insert([usage_row(user_id="ann", created_at=now - 5)])])
    task = Purge(migrated, every=0)
    assert await task.round()
    assert await rows(migrated, "SELECT DISTINCT user_id FROM usage_rows") == [(who.anonymous_id,)]
    assert len(await user_deletions.running(migrated)) == 1
    await migrated.write([("UPDATE user_deletions SET until = $1", [(now - 1,)])])
    assert await task.round()
    assert await user_deletions.running(migrated) == []


async def test_it_works_in_the_background_and_goes_on_after_a_failure(
    migrated: Database, now: int, caplog: pytest.LogCaptureFixture
) -> None:
    await migrated.write(conversations.save([turn("old", "a", at=now - 8 * DAY)]))
    line = Unsteady(migrated)
    line.down = True
    task = Purge(line, retention_days=7, every=0.02)
    with caplog.at_level(logging.WARNING, "gateway.purge"):
        task.start()

        async def failed() -> bool:
            return "told to be down" in caplog.text

        await eventually(failed)
    line.down = False

    async def gone() -> bool:
        return not await left(migrated)

    await eventually(gone)
    await task.aclose()


async def test_who_was_overtaken_does_not_write_down_how_far_it_came(migrated: Database) -> None:
    task = Purge(migrated, every=0)
    await chores.take(migrated, purge.NAME, "another", 0)
    assert await task.round()
    await chores.take(migrated, purge.NAME, "another", 60)
    assert not await chores.go_on(migrated, purge.NAME, task._me, 0, 5)
