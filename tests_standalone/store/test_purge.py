"""What is removed for good, and what stays."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from gateway.store import conversation_edits, conversations, purge, sessions
from gateway.store.conversations import ConversationTurn, Parent, StoredMessage
from gateway.store.database import Database
from tests_standalone.conftest import NOON, opened, rows

DAY = 24 * 60 * 60 * 1000


def turn(id: str, *texts: str, at: int = NOON, **fields: Any) -> ConversationTurn:
    """A turn of ann's that makes a conversation."""
    values: dict[str, Any] = {
        "pk": f"pk_{id}", "user_id": "ann", "key_id": None, "end_user": None, "session_id": None, "is_new": True,
        "title": f"about {id}",
        "messages": [StoredMessage(f"m_{secrets.token_hex(16)}", "user", f'"{text}"', None, None) for text in texts],
    }  # fmt: skip
    return ConversationTurn(id=id, at=at, **values | fields)


async def save(database: Database, *turns: ConversationTurn) -> None:
    await database.write(conversations.save(turns))


async def mark_deleted(database: Database, at: int, *names: str) -> None:
    marks = [(at, name) for name in names]
    await database.write([("UPDATE conversations SET deleted_at = $1 WHERE id = $2", marks)])


async def left(database: Database) -> dict[str, list[str]]:
    """Conversations, and what was said in each by its rows."""
    found: dict[str, list[str]] = {pk: [] for (pk,) in await rows(database, "SELECT pk FROM conversations")}
    for pk, content in await rows(
        database, "SELECT conversation_pk, content FROM messages ORDER BY conversation_pk, seq"
    ):
        found.setdefault(pk, []).append(content.strip('"'))
    return found


async def remove_all(database: Database, before: int, *, idle_since: int = 0) -> None:
    found = await purge.due(database, before)
    await purge.remove(database, found, idle_since=idle_since)


async def test_what_was_not_used_since_then_is_deleted_and_loses_its_title(migrated: Database) -> None:
    await save(migrated, turn("old", "a", at=NOON - DAY), turn("young", "b", at=NOON))
    assert await purge.expire(migrated, 0, unused_since=NOON) == 0
    assert await rows(migrated, "SELECT id, deleted_at, title FROM conversations ORDER BY id") == [
        ("old", 0, None),
        ("young", None, "about young"),
    ]


async def test_what_is_old_and_still_used_stays(migrated: Database) -> None:
    await save(migrated, turn("chat", "a", at=NOON - DAY))
    await save(migrated, turn("chat", "b", at=NOON, is_new=False))
    await purge.expire(migrated, 0, unused_since=NOON)
    assert await rows(migrated, "SELECT deleted_at FROM conversations") == [(None,)]


async def test_what_is_old_and_has_a_turn_running_stays(migrated: Database) -> None:
    """A lease is by the user and the name; one that ran out before that time, nobody holds any more."""
    await save(migrated, *(turn(name, "a", at=NOON - DAY) for name in ("running", "over", "free")))
    lease = "INSERT INTO turn_leases (user_id, conversation_id, holder, until) VALUES ($1, $2, 'h', $3)"
    until = [("ann", "running", NOON + 1), ("ann", "over", NOON), ("bob", "free", NOON + 1)]
    await migrated.write([(lease, until)])
    await purge.expire(migrated, 0, unused_since=NOON)
    await remove_all(migrated, NOON)
    assert await left(migrated) == {"pk_running": ["a"]}


async def test_the_walk_goes_on_and_ends_where_conversations_are_too_young(
    migrated: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "ROWS_AT_ONCE", 2)
    for place in range(5):
        await save(migrated, turn(f"old{place}", "a", at=NOON - DAY))
    for place in range(5):
        await save(migrated, turn(f"young{place}", "a", at=NOON))
    place, looks = await purge.expire(migrated, 0, unused_since=NOON), 1
    while place:
        place, looks = await purge.expire(migrated, place, unused_since=NOON), looks + 1
    assert looks == 3
    assert await rows(migrated, "SELECT COUNT(*) FROM conversations WHERE deleted_at IS NOT NULL") == [(5,)]


async def test_what_was_deleted_long_ago_goes_with_its_messages_and_tags(migrated: Database) -> None:
    await save(migrated, turn("gone", "a", "b"), turn("deleted", "c"), turn("living", "d"))
    await migrated.write(
        [("INSERT INTO conversation_tags (number, tag, user_id) SELECT number, 'x', 'ann' FROM conversations", [()])]
    )
    await mark_deleted(migrated, NOON - 1, "gone")
    await mark_deleted(migrated, NOON, "deleted")
    await remove_all(migrated, NOON)
    assert await left(migrated) == {"pk_deleted": ["c"], "pk_living": ["d"]}
    assert await rows(migrated, "SELECT COUNT(*) FROM conversation_tags") == [(2,)]


async def test_a_parent_stays_for_its_branch_without_what_the_branch_does_not_share(migrated: Database) -> None:
    await save(migrated, turn("parent", "a", "b", "c", "d"))
    branch = turn("branch", "B", after=2, parent=Parent("parent", "pk_parent", 2))
    await save(migrated, branch)
    await mark_deleted(migrated, NOON - 1, "parent")
    await remove_all(migrated, NOON)
    assert await left(migrated) == {"pk_parent": ["a", "b"], "pk_branch": ["B"]}
    found = await conversations.find(migrated, "ann", "branch")
    assert found is not None
    assert [message.content for message in found.messages] == ['"a"', '"b"', '"B"']
    assert await rows(migrated, "SELECT title FROM conversations WHERE id = 'parent'") == [(None,)]

    await mark_deleted(migrated, NOON - 1, "branch")
    await remove_all(migrated, NOON)
    await remove_all(migrated, NOON)
    assert await left(migrated) == {}


async def test_ten_thousand_messages_go_in_parts(migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purge, "TRIM", purge.TRIM.replace("500", "20"))
    monkeypatch.setattr(purge, "ROWS_AT_ONCE", 20)
    await save(migrated, turn("long", *[str(number) for number in range(95)]))
    await mark_deleted(migrated, 0, "long")
    await remove_all(migrated, NOON)
    assert await left(migrated) == {}


async def test_what_is_undeleted_meanwhile_stays(migrated: Database) -> None:
    await save(migrated, turn("chat", "a"))
    await mark_deleted(migrated, NOON - 1, "chat")
    found = await purge.due(migrated, NOON)
    await migrated.write([("UPDATE conversations SET deleted_at = NULL", [()])])
    await purge.remove(migrated, found, idle_since=0)
    assert await left(migrated) == {"pk_chat": ["a"]}


@pytest.mark.parametrize("deleted_again", [False, True])
async def test_a_long_one_that_is_undeleted_while_others_go_keeps_its_beginning(
    migrated: Database, monkeypatch: pytest.MonkeyPatch, deleted_again: bool
) -> None:
    monkeypatch.setattr(purge, "ROWS_AT_ONCE", 2)
    await save(migrated, turn("back", *"abcdef"))
    await mark_deleted(migrated, NOON - DAY, "back")
    found = await purge.due(migrated, NOON)
    assert await conversation_edits.undelete(migrated, "ann", "back") is not None
    if deleted_again:
        await conversation_edits.delete(migrated, "ann", "back", NOON)
    await purge.remove(migrated, found, idle_since=0)
    assert await left(migrated) == {"pk_back": [*"abcdef"]}


async def test_what_has_begun_to_go_cannot_be_brought_back(migrated: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(purge, "ROWS_AT_ONCE", 2)
    await save(migrated, turn("gone", *"abcdef"))
    await mark_deleted(migrated, NOON - DAY, "gone")
    with monkeypatch.context() as dying:
        dying.setattr(purge, "_remove", die)
        with pytest.raises(asyncio.CancelledError):
            await remove_all(migrated, NOON)
    assert await conversation_edits.undelete(migrated, "ann", "gone") is None
    await remove_all(migrated, NOON)
    assert await left(migrated) == {}


async def test_a_turn_that_comes_too_late_leaves_nothing(migrated: Database) -> None:
    await save(migrated, turn("chat", "a"))
    await mark_deleted(migrated, 0, "chat")
    await remove_all(migrated, NOON)
    await save(migrated, turn("chat", "b", is_new=False))
    await save(migrated, turn("chat", "c", is_new=False, after=1))
    assert await left(migrated) == {}


async def test_turns_and_removal_at_once_leave_no_message_without_a_conversation(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as other:
        for turn_of in range(10):
            await save(one, *[turn(f"{turn_of}-{place}", "a") for place in range(10)])
            await one.write([("UPDATE conversations SET deleted_at = 0", [()])])

            async def late(place: int, turn_of: int = turn_of) -> None:
                await save(other, turn(f"{turn_of}-{place}", "late", is_new=False))

            await asyncio.gather(*map(late, range(10)), remove_all(one, NOON), *map(late, range(10)))
            await remove_all(one, NOON)
            assert await left(one) == {}


async def test_a_session_goes_with_its_last_conversation_when_it_is_over(migrated: Database) -> None:
    for name in ("over", "idle", "busy", "shared"):
        await sessions.open_session(migrated, name, "ann", NOON if name == "busy" else NOON - DAY)
    await migrated.write([("UPDATE sessions SET ended_at = $1, last_activity = $1 WHERE id = 'over'", [(NOON,)])])
    await save(migrated, *[turn(name, "a", session_id=name) for name in ("over", "idle", "busy", "shared")])
    await save(migrated, turn("other", "a", session_id="shared"))
    await mark_deleted(migrated, 0, "over", "idle", "busy", "shared")
    await remove_all(migrated, NOON, idle_since=NOON - 1)
    assert await rows(migrated, "SELECT id FROM sessions ORDER BY id") == [("busy",), ("shared",)]


async def test_old_stored_completions_go_with_their_labels(migrated: Database) -> None:
    add = """INSERT INTO stored_completions (pk, id, user_id, key_id, conversation_id, created_at, model, metadata,
        completion, messages) VALUES ($1, $1, 'ann', NULL, NULL, $2, 'm', '{}', '{}', '[]')"""
    label = "INSERT INTO stored_labels (completion_pk, label, user_id) VALUES ($1, 'l', 'ann')"
    times = [("s_1", NOON - DAY), ("s_2", NOON - 1), ("s_3", NOON)]
    await migrated.write([(add, times), (label, [(pk,) for pk, _ in times])])
    assert not await purge.remove_completions(migrated, NOON)
    assert await rows(migrated, "SELECT pk FROM stored_completions") == [("s_3",)]
    assert await rows(migrated, "SELECT completion_pk FROM stored_labels") == [("s_3",)]


async def test_what_is_due_is_found_by_its_index(migrated: Database) -> None:
    await save(migrated, *[turn(str(place), "a") for place in range(50)])
    await mark_deleted(migrated, NOON - 1, "7")
    explain = "EXPLAIN QUERY PLAN " if migrated.dialect == "sqlite" else "EXPLAIN "
    sql = purge._DUE.replace("$1", str(NOON)).replace("$2", "-1").replace("$3", "0").replace("$4", "100")
    if migrated.dialect == "postgres":
        await migrated.write([("ANALYZE conversations", [()])])
        async with migrated.transaction() as transaction:
            await transaction.execute("SET LOCAL enable_seqscan = off")
            plan = [tuple(row)[-1] for row in await transaction.fetch(explain + sql)]  # type: ignore[call-overload]
    else:
        plan = [row[-1] for row in await rows(migrated, explain + sql)]
    assert any("conversations_to_remove" in line for line in plan), plan
    assert any("conversations_by_parent" in line for line in plan), plan
