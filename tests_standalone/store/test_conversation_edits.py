"""Made, edited, deleted, brought back: what is in the rows then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.store import conversation_edits, conversation_reads, conversations, sessions
from gateway.store.conversation_edits import Edit, NewConversation, NoOpenSession
from gateway.store.database import AlreadyThere, Database
from tests_standalone.conftest import NOON, opened, rows
from tests_standalone.store.test_conversations import save, turn


def new(id: str = "chat", **fields: Any) -> NewConversation:
    values: dict[str, Any] = {"pk": f"c_{id}", "user_id": "ann", "key_id": "key_1", "session_id": "s", "at": NOON}
    return NewConversation(id=id, **values | fields)


@pytest.fixture
async def database(migrated: Database) -> Database:
    await sessions.open_session(migrated, "s", "ann", NOON - 5)
    return migrated


async def test_a_new_one_is_empty_and_counts_in_its_session(database: Database) -> None:
    tags = {"tags": ["a", "b"], "tags_json": '["a","b"]'}
    made = await conversation_edits.make(database, new(title="Hello", metadata='{"x":"y"}', **tags))
    assert made == await conversation_reads.get(database, "ann", "chat")
    assert (made.title, made.tags, made.metadata, made.message_count) == ("Hello", '["a","b"]', '{"x":"y"}', 0)
    assert (made.session_id, made.created_at, made.last_used) == ("s", NOON, NOON)
    tagged = await rows(database, "SELECT tag, user_id FROM conversation_tags ORDER BY tag")
    assert tagged == [("a", "ann"), ("b", "ann")]
    assert await rows(database, "SELECT conversation_count, last_activity FROM sessions") == [(1, NOON)]
    assert await rows(database, "SELECT key_id FROM conversations") == [("key_1",)]


@pytest.mark.parametrize("session", ["none", "bobs", "over"])
async def test_a_session_that_is_not_open_or_anothers_takes_none(database: Database, session: str) -> None:
    await sessions.open_session(database, "bobs", "bob", NOON)
    await sessions.open_session(database, "over", "ann", NOON)
    await sessions.end(database, "ann", "over", NOON)
    with pytest.raises(NoOpenSession):
        await conversation_edits.make(database, new(session_id=session, tags=["a"]))
    assert await rows(database, "SELECT id FROM conversations") == []
    assert await rows(database, "SELECT tag FROM conversation_tags") == []


async def test_an_id_is_given_once(database: Database) -> None:
    await conversation_edits.make(database, new())
    with pytest.raises(AlreadyThere):
        await conversation_edits.make(database, new(pk="c_2"))
    assert await rows(database, "SELECT conversation_count FROM sessions") == [(1,)]


async def test_a_turn_goes_on_in_one_that_was_made(database: Database) -> None:
    made = await conversation_edits.make(database, new(title="Hello"))
    found = await conversations.find(database, "ann", "chat")
    assert found is not None
    await save(database, turn("one", pk=found.pk, is_new=False))
    after = await conversation_reads.get(database, "ann", "chat")
    assert after is not None
    assert (after.number, after.title, after.message_count, after.total_tokens_output) == (made.number, "Hello", 1, 2)


async def test_an_edit_changes_what_it_names(database: Database) -> None:
    made = await conversation_edits.make(database, new(title="Hello", tags=["a"], tags_json='["a"]'))
    same = await conversation_edits.edit(database, "ann", "chat", Edit(), NOON + 1)
    assert same == made
    changes: dict[str, Any] = {"title": "Other", "summary": "Short", "metadata": '{"k":"v"}', "pinned": True}
    change = Edit(frozenset(changes), **changes, archived=True, tags=["b"], tags_json='["b"]')
    edited = await conversation_edits.edit(database, "ann", "chat", change, NOON + 1)
    assert edited == await conversation_reads.get(database, "ann", "chat")
    assert edited is not None
    assert (edited.title, edited.summary, edited.metadata, edited.tags) == ("Other", "Short", '{"k":"v"}', '["b"]')
    assert (edited.pinned_at, edited.archived_at, edited.last_used) == (NOON + 1, NOON + 1, NOON)
    assert await rows(database, "SELECT tag FROM conversation_tags") == [("b",)]

    again = await conversation_edits.edit(database, "ann", "chat", Edit(pinned=True), NOON + 2)
    assert again == edited, "it is pinned already"
    nothing = Edit(frozenset({"title", "summary"}), tags=[], tags_json="[]", pinned=False, archived=False)
    bare = await conversation_edits.edit(database, "ann", "chat", nothing, NOON + 3)
    assert bare is not None
    assert (bare.title, bare.summary, bare.tags, bare.pinned_at, bare.archived_at) == (None, None, "[]", None, None)
    assert await rows(database, "SELECT tag FROM conversation_tags") == []


async def test_edits_of_several_workers_at_once_all_hold(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        await save(one, turn("x", id="chat"))
        title, summary = Edit(frozenset({"title"}), title="T"), Edit(frozenset({"summary"}), summary="S")
        edits = [(one, title), (two, summary), (one, Edit(pinned=True)), (two, Edit(metadata='{"a":"b"}'))]
        await asyncio.gather(*(conversation_edits.edit(where, "ann", "chat", edit, NOON) for where, edit in edits * 5))
        found = await conversation_reads.get(two, "ann", "chat")
        assert found is not None
        assert (found.title, found.summary, found.pinned_at, found.metadata) == ("T", "S", NOON, '{"a":"b"}')


async def test_deleted_and_brought_back(database: Database) -> None:
    made = await conversation_edits.make(database, new(tags=["a"], tags_json='["a"]'))
    assert await conversation_edits.delete(database, "ann", "chat", NOON + 1)
    assert not await conversation_edits.delete(database, "ann", "chat", NOON + 2)
    assert await conversation_reads.get(database, "ann", "chat") is None
    assert await conversation_edits.edit(database, "ann", "chat", Edit(pinned=True), NOON) is None
    assert await conversation_edits.undelete(database, "bob", "chat") is None
    assert await conversation_edits.undelete(database, "ann", "chat") == made
    assert await conversation_edits.undelete(database, "ann", "chat") is None
    assert await conversation_reads.get(database, "ann", "chat") == made


async def test_of_several_the_last_one_comes_back_while_the_id_is_free(database: Database) -> None:
    for number in range(3):
        await conversation_edits.make(database, new(pk=f"c_{number}", title=f"{number}"))
        await conversation_edits.delete(database, "ann", "chat", NOON + number)
    back = await conversation_edits.undelete(database, "ann", "chat")
    assert back is not None
    assert back.title == "2"
    with pytest.raises(AlreadyThere):
        await conversation_edits.undelete(database, "ann", "chat")


async def test_what_is_about_to_be_removed_for_good_does_not_come_back(database: Database) -> None:
    await conversation_edits.make(database, new())
    await conversation_edits.delete(database, "ann", "chat", 0)
    assert await conversation_edits.undelete(database, "ann", "chat") is None


async def test_tags_go_with_the_row(database: Database) -> None:
    await conversation_edits.make(database, new(tags=["a"], tags_json='["a"]'))
    await database.write([("DELETE FROM conversations", [()])])
    assert await rows(database, "SELECT tag FROM conversation_tags") == []
