"""A user goes, with everything but the figures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from gateway.errors import PermissionDenied
from gateway.limits import DEAD_AFTER
from gateway.store import conversations, keys, sessions, usage, user_deletions
from gateway.store.conversations import Parent
from gateway.store.database import Database
from gateway.store.keys import Changes, StoredKey
from gateway.user_deletion import delete_user, pass_over
from tests_standalone.conftest import opened, rows, stored_key, usage_row
from tests_standalone.store.test_purge import left, turn

NOW = int(time.time() * 1000) - 1000
TABLES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
    "postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
}


async def dump(database: Database, *but: str) -> str:
    """All that lies in all tables."""
    names = [name for (name,) in await rows(database, TABLES[database.dialect])]
    found = {name: await rows(database, f"SELECT * FROM {name}") for name in names if name not in but}
    return "\n".join(f"{name}: {sorted(map(repr, lines))}" for name, lines in sorted(found.items()))


def _key(user: str) -> StoredKey:
    return stored_key(
        id=f"key_{user}", digest=f"d_{user}", user_id=user, name=f"laptop of {user}", created_at=NOW - 1000
    )


async def live(database: Database, user: str, at: int = NOW) -> None:
    """A key, conversations (one branched, one deleted), a session, a stored completion, costs, limits, a lease."""
    await keys.add(database, _key(user))
    await sessions.open_session(database, f"sess_{user}", user, at)
    common: dict[str, Any] = {"user_id": user, "key_id": f"key_{user}", "at": at, "session_id": f"sess_{user}"}
    await database.write(
        conversations.save([turn(f"{user}1", "secret", "b", **common), turn(f"{user}2", "secret", **common)])
    )
    branch = turn(f"{user}3", "secret", after=1, parent=Parent(f"{user}1", f"pk_{user}1", 1), **common)
    await database.write(conversations.save([branch]))
    completion = """
        INSERT INTO stored_completions (pk, id, user_id, key_id, conversation_id, created_at, model, metadata,
            completion, messages) VALUES ($1, $1, $2, NULL, NULL, $3, 'm', '{}', '"secret"', '[]')"""
    await database.write(
        [
            ("UPDATE conversations SET deleted_at = $1 WHERE id = $2", [(at, f"{user}2")]),
            (completion, [(f"s_{user}", user, at)]),
            ("INSERT INTO stored_labels (completion_pk, label, user_id) VALUES ($1, 'l', $2)", [(f"s_{user}", user)]),
            ("INSERT INTO turn_leases VALUES ($1, 'c', 'h', 0)", [(user,)]),
            usage.insert([usage_row(user_id=user, key_id=f"key_{user}", created_at=at, end_user=f"kid of {user}",
                                    session_id=f"sess_{user}", conversation_id=f"{user}1") for _ in range(3)]),
            (
                "INSERT INTO limit_states (subject, at, spent_nanousd, full_at) VALUES ($1, 0, 0, 0)",
                [(f"user:{user}",), (f"key:key_{user}",), (f"key:key_{user}/kid",)],
            ),
        ]
    )  # fmt: skip


async def test_all_goes_but_the_figures(migrated: Database) -> None:
    await live(migrated, "ann")
    who, removed = await delete_user(migrated, "ann", seconds=30)
    assert removed.finished
    assert (removed.conversations, removed.sessions, removed.stored_completions, removed.usage_rows) == (3, 1, 1, 3)
    shown = await dump(migrated, "user_deletions", "schema_migrations")
    assert "ann" not in shown
    assert "secret" not in shown
    assert await left(migrated) == {}
    figures = "SELECT user_id, key_id, end_user, session_id, conversation_id, cost_nanousd FROM usage_rows"
    assert await rows(migrated, figures) == [(who.anonymous_id, None, None, None, None, 1000)] * 3
    assert who.anonymous_id.startswith("deleted-")
    assert len(who.anonymous_id) == 20


async def test_nobody_else_loses_anything(migrated: Database) -> None:
    await live(migrated, "ann")
    await live(migrated, "anna")
    before = await dump(migrated, "gateway_state", "user_deletions")
    await live(migrated, "bob")
    await delete_user(migrated, "bob", seconds=30)
    await migrated.write([("DELETE FROM usage_rows WHERE user_id LIKE 'deleted-%'", [()])])
    assert await dump(migrated, "gateway_state", "user_deletions") == before


async def test_keys_end_first_and_their_rows_go(migrated: Database) -> None:
    await live(migrated, "ann")
    seen: list[Any] = []

    async def check(changes: Changes) -> None:
        seen.extend((key.id, key.revoked_at) for key in await changes.of("ann"))

    revision = (await keys.state(migrated)).revision
    await delete_user(migrated, "ann", seconds=30, check=check)
    assert seen == [("key_ann", None)]
    assert (await keys.state(migrated)).revision > revision
    assert (await keys.state(migrated)).ever_made
    assert await rows(migrated, "SELECT id FROM api_keys") == []


async def test_what_the_check_raises_leaves_all_as_it_was(migrated: Database) -> None:
    await live(migrated, "ann")
    before = await dump(migrated)

    async def check(changes: Changes) -> None:
        raise PermissionDenied("no")

    with pytest.raises(PermissionDenied):
        await delete_user(migrated, "ann", seconds=30, check=check)
    assert await dump(migrated) == before


async def test_a_call_that_ends_later_leaves_nothing_after_the_next_pass(migrated: Database) -> None:
    await live(migrated, "ann")
    who, _ = await delete_user(migrated, "ann", seconds=30)
    began: dict[str, Any] = {"user_id": "ann", "key_id": "key_ann", "at": NOW, "session_id": "sess_ann"}
    late = [
        turn("ann1", "late", is_new=False, **began),
        turn("ann1", "late", is_new=False, after=2, **began),
        turn("new", "late", **began),
    ]
    for one in late:
        row = usage_row(user_id="ann", created_at=NOW, conversation_id=one.id)
        await migrated.write([usage.insert([row]), *conversations.save([one])])
    await sessions.open_session(migrated, "sess_late", "ann", NOW)
    assert await left(migrated) == {"pk_new": ["late"]}
    (open_one,) = await user_deletions.running(migrated)
    assert (await pass_over(migrated, open_one, seconds=30)).finished
    shown = await dump(migrated, "user_deletions")
    assert "ann" not in shown
    assert "late" not in shown
    assert await rows(migrated, "SELECT DISTINCT user_id FROM usage_rows") == [(who.anonymous_id,)]


async def test_who_uses_the_name_later_is_somebody_else(migrated: Database) -> None:
    await live(migrated, "ann")
    who, _ = await delete_user(migrated, "ann", seconds=30)
    later = who.up_to + 60_000
    await live(migrated, "ann", at=later)
    await migrated.write([("UPDATE api_keys SET created_at = $1, revoked_at = NULL", [(later,)])])
    before = await dump(migrated, "gateway_state", "limit_states", "turn_leases")
    await pass_over(migrated, who, seconds=30)
    assert await dump(migrated, "gateway_state", "limit_states", "turn_leases") == before


async def test_again_for_the_same_user_keeps_the_anonymous_name(migrated: Database) -> None:
    await live(migrated, "ann")
    first, _ = await delete_user(migrated, "ann", seconds=30)
    second, removed = await delete_user(migrated, "ann", seconds=30)
    assert (second.anonymous_id, removed.usage_rows) == (first.anonymous_id, 0)
    assert set(second.subjects) == {"user:ann", "key:key_ann"}
    assert second.up_to >= first.up_to


async def test_without_time_the_rest_is_left_to_the_next_pass(migrated: Database) -> None:
    await live(migrated, "ann")
    who, removed = await delete_user(migrated, "ann", seconds=0)
    assert not removed.finished
    assert await rows(migrated, "SELECT id FROM api_keys") == []
    assert (await pass_over(migrated, who, seconds=30)).finished
    assert await left(migrated) == {}


async def test_a_lease_and_a_hold_that_are_in_use_stay(migrated: Database) -> None:
    await live(migrated, "ann")
    far = NOW + 10 * DEAD_AFTER + 10**9
    await migrated.write(
        [
            ("UPDATE turn_leases SET until = $1", [(far,)]),
            (
                "INSERT INTO limit_holds (subject, worker, slots, tokens, cost_nanousd) VALUES ($1, 'w', $2, 0, 0)",
                [("key:key_ann", 1), ("key:key_ann/kid", 0)],
            ),
        ]
    )
    await delete_user(migrated, "ann", seconds=30)
    assert await rows(migrated, "SELECT until FROM turn_leases") == [(far,)]
    assert await rows(migrated, "SELECT subject FROM limit_holds") == [("key:key_ann",)]


async def test_other_users_turns_run_meanwhile(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as other:
        await live(one, "ann")
        for place in range(150):
            await one.write(conversations.save([turn(f"x{place}", "secret", user_id="ann", at=NOW)]))
        kept = [turn(f"y{place}", "kept", user_id="bob", at=NOW) for place in range(50)]

        async def work() -> None:
            for each in kept:
                await other.write(conversations.save([each]))

        await asyncio.gather(delete_user(one, "ann", seconds=60), work())
        assert await left(one) == {each.pk: ["kept"] for each in kept}


async def test_who_there_is(migrated: Database) -> None:
    await live(migrated, "ann")
    await keys.add(migrated, _key("zoe"))
    await migrated.write([usage.insert([usage_row(user_id="default", created_at=at) for at in (5, 7)])])
    found = await user_deletions.listed(migrated, "", 10)
    assert [(user.user_id, user.active_keys, user.first_call, user.last_call) for user in found] == [
        ("ann", 1, NOW, NOW),
        ("default", 0, 5, 7),
        ("zoe", 1, None, None),
    ]
    assert [user.user_id for user in await user_deletions.listed(migrated, "ann", 1)] == ["default"]
    for user, known in (("ann", True), ("default", True), ("zoe", True), ("an", False), ("", False)):
        assert await user_deletions.known(migrated, user) is known
