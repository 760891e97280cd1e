"""What a user is shown of its conversations: lists in pages, the line of a branch, sums."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gateway.store import conversation_edits, conversation_reads
from gateway.store.conversation_edits import Edit
from gateway.store.conversation_reads import NoSuchPlace, Order, Wanted
from gateway.store.database import Database
from tests_standalone.conftest import NOON, rows
from tests_standalone.store.test_conversations import message, save, turn


async def ids(database: Database, user: str = "ann", wanted: Wanted | None = None, **page: Any) -> list[str]:
    found = await conversation_reads.listed(database, user, wanted or Wanted(), **{"limit": 100, **page})
    return [one.id for one in found]


async def said(database: Database, id: str, **page: Any) -> list[str] | None:
    found = await conversation_reads.messages(database, "ann", id, **{"limit": 100, **page})
    return None if found is None else [one.content.strip('"') for one in found]


async def branch(database: Database, id: str, parent: str, at: int, *texts: str) -> None:
    """Of the first `at` messages of its parent."""
    await save(database, turn(*texts, id=id))
    moved = "UPDATE messages SET seq = seq + $1 WHERE conversation_pk = (SELECT pk FROM conversations WHERE id = $2)"
    tied = """UPDATE conversations SET parent_id = $2, parent_seq = $3, message_count = message_count + $3,
        parent_pk = (SELECT p.pk FROM conversations p WHERE p.id = $2) WHERE id = $1"""
    await database.write([(moved, [(at + 1000, id)]), (moved, [(-1000, id)]), (tied, [(id, parent, at)])])


async def many(database: Database, count: int = 7, user: str = "ann") -> None:
    for number in range(count):
        await save(database, turn(id=f"c{number}", user=user))


@pytest.mark.parametrize(("order", "right"), [("asc", "0123456"), ("desc", "6543210")])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
async def test_pages_put_together_are_the_list(migrated: Database, order: Order, right: str, limit: int) -> None:
    await many(migrated)
    await many(migrated, user="bob")
    found: list[str] = []
    page = await ids(migrated, limit=limit, order=order)
    while page:
        assert len(page) <= limit
        found += page
        page = await ids(migrated, limit=limit, order=order, after=page[-1])
    assert found == [f"c{number}" for number in right]


async def test_a_list_goes_on_after_what_was_deleted_meanwhile(migrated: Database) -> None:
    await many(migrated)
    page = await ids(migrated, limit=3)
    for name in page:
        assert await conversation_edits.delete(migrated, "ann", name, NOON)
    assert await ids(migrated, after=page[-1]) == ["c3", "c2", "c1", "c0"]


@pytest.mark.parametrize("after", ["nobody's", "bobs", "' OR '1'='1"])
async def test_a_list_does_not_go_on_after_what_is_not_in_it(migrated: Database, after: str) -> None:
    await many(migrated)
    await save(migrated, turn(id="bobs", user="bob"))
    with pytest.raises(NoSuchPlace):
        await ids(migrated, after=after)


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        (Wanted(), "6420"), (Wanted(archived=True), "531"), (Wanted(archived=None), "6543210"),
        (Wanted(pinned=True), "60"), (Wanted(pinned=False), "42"), (Wanted(archived=None, pinned=True), "630"),
        (Wanted(archived=True, pinned=True), "3"), (Wanted(tag="x"), "640"), (Wanted(archived=None, tag="x"), "6540"),
        (Wanted(tag="x", pinned=True), "60"), (Wanted(tag="y"), "4"), (Wanted(tag="%"), ""),
        (Wanted(session_id="s"), "42"), (Wanted(archived=None, session_id="s"), "432"),
        (Wanted(archived=True, pinned=True, session_id="s"), "3"), (Wanted(tag="x", session_id="s"), "4"),
        (Wanted(tag="x", session_id="t"), ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_filters(migrated: Database, wanted: Wanted, right: str, order: Order) -> None:
    for number in range(7):
        await save(migrated, turn(id=f"c{number}", session_id="s" if number in (2, 3, 4) else None))
    for name in ("c1", "c3", "c5"):
        await conversation_edits.edit(migrated, "ann", name, Edit(archived=True), NOON)
    for name in ("c0", "c3", "c6"):
        await conversation_edits.edit(migrated, "ann", name, Edit(pinned=True), NOON)
    for name, tags in (("c0", ["x"]), ("c4", ["x", "y"]), ("c5", ["x"]), ("c6", ["x"])):
        await conversation_edits.edit(migrated, "ann", name, Edit(tags=tags, tags_json="[]"), NOON)
    found = await ids(migrated, wanted=wanted, order=order)
    assert found == [f"c{number}" for number in (right if order == "desc" else reversed(right))]
    for number in range(7):
        assert await conversation_edits.delete(migrated, "ann", f"c{number}", NOON)
    assert await ids(migrated, wanted=wanted, order=order) == []


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_messages_of_a_branch_begin_with_those_of_its_parents(migrated: Database, order: Order) -> None:
    await save(migrated, turn("1", "2", "3", "4", id="root"))
    await branch(migrated, "left", "root", 2, "3l", "4l", "5l")
    await branch(migrated, "leaf", "left", 4, "5f")
    await branch(migrated, "early", "left", 1, "2e")  # left before it had anything of its own
    right = {"root": ["1", "2", "3", "4"], "left": ["1", "2", "3l", "4l", "5l"], "leaf": ["1", "2", "3l", "4l", "5f"]}
    right["early"] = ["1", "2e"]
    for name, texts in right.items():
        assert await said(migrated, name, order=order) == (texts if order == "asc" else texts[::-1])
        for limit in (1, 2, 3):
            found: list[str] = []
            after = None
            while page := await conversation_reads.messages(
                migrated, "ann", name, limit=limit, after=after, order=order
            ):
                found += [one.content.strip('"') for one in page]
                after = page[-1].id
            assert found == (texts if order == "asc" else texts[::-1]), name
    await conversation_edits.delete(migrated, "ann", "root", NOON)
    await conversation_edits.delete(migrated, "ann", "left", NOON)
    assert await said(migrated, "leaf", order="asc") == right["leaf"]
    assert await said(migrated, "left") is None


async def test_messages_go_on_only_after_one_of_the_same_line(migrated: Database) -> None:
    await save(migrated, turn("1", "2", "3", id="root"))
    await branch(migrated, "left", "root", 2, "3l")
    places = dict(await rows(migrated, "SELECT content, id FROM messages"))
    assert await said(migrated, "left", after=places['"2"']) == ["3l"]
    for name, text in (("left", '"3"'), ("root", '"3l"')):
        with pytest.raises(NoSuchPlace):
            await said(migrated, name, after=places[text])


async def test_a_gap_loses_nothing(migrated: Database) -> None:
    await save(migrated, turn("1", "2", "3", "4", "5"))
    await migrated.write([("DELETE FROM messages WHERE seq IN (2, 3)", [()])])
    assert await said(migrated, "chat", limit=2) == ["1", "4"]


async def test_what_a_message_holds(migrated: Database) -> None:
    kept = message("a", "assistant", extra='{"x":1}', tokens=3, cost_nanousd=5, model="m", finish_reason="stop")
    await save(migrated, turn(messages=[kept]))
    ((found),) = await conversation_reads.messages(migrated, "ann", "chat", limit=5) or ()
    assert (found.id, found.seq, found.role, found.content, found.extra) == (kept.id, 1, "assistant", '"a"', '{"x":1}')
    assert (found.tokens, found.cost_nanousd, found.model, found.finish_reason) == (3, 5, "m", "stop")
    assert found.created_at == NOON


async def test_sums_count_what_is_there_and_what_all_has_cost(migrated: Database) -> None:
    assert await conversation_reads.stats(migrated, "ann") == conversation_reads.Stats(0, 0, 0, 0, 0)
    await save(migrated, turn("1", "2", id="root"), turn("x", id="gone"), turn("y", id="bobs", user="bob"))
    await branch(migrated, "left", "root", 1, "2l")
    await conversation_edits.delete(migrated, "ann", "gone", NOON)
    assert await conversation_reads.stats(migrated, "ann") == conversation_reads.Stats(2, 3, 9, 6, 30)


async def test_views_have_the_columns_that_were_promised(migrated: Database) -> None:
    """Both tables of the system before, and the contract's section 9."""
    conversation = """id, user_id, session_id, created_at, last_used, message_count, total_tokens_input,
        total_tokens_output, total_cost, image_urls, tags, title, summary, metadata, is_deleted, number, parent_id"""
    session = "id, user_id, created_at, last_activity, total_tokens, total_cost, conversation_count, is_active"
    await save(migrated, turn())
    assert len(await rows(migrated, f"SELECT {conversation} FROM conversations_view")) == 1
    assert await rows(migrated, f"SELECT {session} FROM sessions_view") == []


@pytest.mark.parametrize("analyzed", [False, True])
async def test_no_list_reads_more_than_it_shows(migrated: Database, analyzed: bool) -> None:
    """By the plans: lists come in their order from an index, and nothing is read from end to end."""
    await migrated.write([(FILLED, [(user, f"c_{user}") for user in ("ann", "bob", "cid")])])
    tagged = "INSERT INTO conversation_tags (number, tag, user_id) SELECT number, 'x', user_id FROM conversations"
    await migrated.write([(tagged, [()])])
    if analyzed:
        await migrated.write([("ANALYZE", [()])])
    common = {"active": (None,), "archived": (None,), "all": (None,), "pinned": (0,), "tag": (0, None, "x", None)}
    for name, sql in conversation_reads.LISTS.items():
        source, order = name.split()
        if source == "session":
            continue
        values = ("ann", 2**62 if order == "desc" else 0, 21, *common[source])
        plan = await plan_of(migrated, sql, *values)
        assert "Seq Scan" not in plan, name
        assert not re.search(r"SCAN (c|t|conversations)\b|-> +Sort|^Sort", plan, re.MULTILINE), (name, plan)
    plan = await plan_of(migrated, conversation_reads.LISTS["session desc"], "ann", 2**62, 21, 0, None, "s_7")
    assert "conversations_by_session" in plan
    for sql, values in ((conversation_reads.GET, ("ann", "i7")), (conversation_reads.LINE, ("ann", "i7"))):
        plan = await plan_of(migrated, sql, *values)
        assert "conversations_by_owner" in plan
        assert "Seq Scan" not in plan
        assert "BLOOM" not in plan


FILLED = """
    INSERT INTO conversations (pk, id, user_id, session_id, created_at, last_used, message_count, total_tokens_input,
        total_tokens_output, total_cost_nanousd, archived_at, pinned_at, deleted_at)
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)
    SELECT CAST($2 AS TEXT) || i, 'i' || i, CAST($1 AS TEXT), 's_' || (i / 10), i, i, 0, 0, 0, 0,
        CASE WHEN i % 7 = 0 THEN 1 END, CASE WHEN i % 200 = 0 THEN 1 END, CASE WHEN i % 50 = 1 THEN 1 END FROM n"""


async def plan_of(database: Database, sql: str, *values: Any) -> str:
    if database.dialect == "sqlite":
        return "\n".join(row[3] for row in await rows(database, "EXPLAIN QUERY PLAN " + sql, *values))
    async with database.transaction() as transaction:
        return "\n".join(row[0] for row in await transaction.fetch("EXPLAIN (COSTS OFF) " + sql, *values)) + "\n"
