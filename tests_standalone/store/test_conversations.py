"""Turns in, conversations with gapless messages and right totals out."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from gateway.store import conversations
from gateway.store.conversations import ConversationTurn, Parent, Place, StoredMessage
from gateway.store.database import AlreadyThere, Database
from tests_standalone.conftest import NOON, opened, rows

TOTALS = """
    SELECT id, message_count, total_tokens_input, total_tokens_output, total_cost_nanousd, last_used
    FROM conversations ORDER BY id"""


def message(text: str, role: str = "user", **fields: Any) -> StoredMessage:
    return StoredMessage(f"msg_{secrets.token_hex(16)}", role, f'"{text}"', fields.pop("extra", None), None, **fields)


def turn(*texts: str, id: str = "chat", user: str = "ann", **fields: Any) -> ConversationTurn:
    """A turn of ann's conversation `chat` that makes it, if it is not there: 3 tokens in, 2 out, 10 nano-dollars."""
    values: dict[str, Any] = {
        "pk": f"c_{secrets.token_hex(16)}", "key_id": None, "end_user": None, "session_id": None, "is_new": True,
        "title": None, "at": NOON, "tokens_input": 3, "tokens_output": 2, "cost_nanousd": 10,
        "messages": [message(text) for text in texts],
    }  # fmt: skip
    return ConversationTurn(id=id, user_id=user, **values | fields)


async def save(database: Database, *turns: ConversationTurn) -> None:
    await database.write(conversations.save(turns))


async def said(database: Database, id: str = "chat", user: str = "ann") -> list[str] | None:
    found = await conversations.find(database, user, id)
    return None if found is None else [item.content.strip('"') for item in found.messages]


async def seqs(database: Database) -> list[int]:
    return [row[0] for row in await rows(database, "SELECT seq FROM messages ORDER BY conversation_pk, seq")]


async def test_a_new_conversation_with_its_messages(migrated: Database) -> None:
    first = turn("hello", title="Hello", key_id="key_1", end_user="kid", session_id="sess_1")
    answer = StoredMessage("msg_a", "assistant", '[{"type":"text"}]', '{"x":1}', "abc", 5, 77, "gpt", "stop")
    first.messages = [*first.messages, answer]
    await save(migrated, first)

    found = await conversations.find(migrated, "ann", "chat")
    assert found is not None
    assert (found.pk, found.session_id) == (first.pk, "sess_1")
    assert [(item.role, item.content, item.extra, item.chain) for item in found.messages] == [
        ("user", '"hello"', None, None),
        ("assistant", '[{"type":"text"}]', '{"x":1}', "abc"),
    ]
    assert await rows(
        migrated, "SELECT id, user_id, key_id, end_user, session_id, created_at, title FROM conversations"
    ) == [("chat", "ann", "key_1", "kid", "sess_1", NOON, "Hello")]
    assert await rows(
        migrated, "SELECT seq, tokens, cost_nanousd, model, finish_reason, created_at FROM messages ORDER BY seq"
    ) == [(1, 0, None, None, None, NOON), (2, 5, 77, "gpt", "stop", NOON)]
    assert await rows(migrated, TOTALS) == [("chat", 2, 3, 2, 10, NOON)]


async def test_a_later_turn_goes_on_counting(migrated: Database) -> None:
    first = turn("one", "two")
    await save(migrated, first)
    await save(migrated, turn("three", pk=first.pk, is_new=False, at=NOON + 9))
    await save(migrated, turn("four", "five", pk=first.pk, is_new=False, at=NOON + 5))

    assert await said(migrated) == ["one", "two", "three", "four", "five"]
    assert await seqs(migrated) == [1, 2, 3, 4, 5]
    assert await rows(migrated, TOTALS) == [("chat", 5, 9, 6, 30, NOON + 9)]


async def test_several_turns_of_one_conversation_in_one_write(migrated: Database) -> None:
    first = turn("one")
    await save(migrated, first)
    await save(migrated, *(turn(text, pk=first.pk, is_new=False) for text in ("two", "three", "four")))
    assert await said(migrated) == ["one", "two", "three", "four"]
    assert await seqs(migrated) == [1, 2, 3, 4]
    assert await rows(migrated, TOTALS) == [("chat", 4, 12, 8, 40, NOON)]


async def test_a_turn_without_messages_counts_its_tokens(migrated: Database) -> None:
    await save(migrated, turn())
    assert await said(migrated) == []
    assert await rows(migrated, TOTALS) == [("chat", 0, 3, 2, 10, NOON)]


async def test_a_name_that_two_turns_make_at_once_is_one_conversation(migrated: Database) -> None:
    one, two = turn("one", title="first", at=NOON + 1), turn("two", title="second", at=NOON)
    await save(migrated, one, two)
    three = turn("three", title="third", at=NOON - 1)
    await save(migrated, three)

    assert await said(migrated) == ["one", "two", "three"]
    assert await seqs(migrated) == [1, 2, 3]
    assert await rows(migrated, TOTALS) == [("chat", 3, 9, 6, 30, NOON + 1)]
    assert await rows(migrated, "SELECT pk, title FROM conversations") == [(one.pk, "first")]


async def test_a_name_that_one_turn_makes_and_another_has_found_is_one_conversation(migrated: Database) -> None:
    first = turn("one")
    await save(migrated, first)
    await save(migrated, turn("two"), turn("three", pk=first.pk, is_new=False))
    assert await said(migrated) == ["one", "two", "three"]
    assert await seqs(migrated) == [1, 2, 3]
    assert await rows(migrated, TOTALS) == [("chat", 3, 9, 6, 30, NOON)]


async def test_one_write_makes_and_continues_conversations_of_several_users(migrated: Database) -> None:
    old = turn("old", id="old")
    await save(migrated, old)
    await save(
        migrated,
        turn("a", id="x"),
        turn("b", id="x", user="bob"),
        turn("more", id="old", pk=old.pk, is_new=False),
        turn("c", id="y"),
    )
    assert await said(migrated, "x") == ["a"]
    assert await said(migrated, "x", "bob") == ["b"]
    assert await said(migrated, "y") == ["c"]
    assert await said(migrated, "old") == ["old", "more"]


async def test_a_conversation_of_another_user_or_name_is_not_found(migrated: Database) -> None:
    await save(migrated, turn("mine"))
    assert await said(migrated, user="bob") is None
    assert await said(migrated, "other") is None
    assert await said(migrated, "' OR '1'='1") is None


async def test_a_deleted_conversation_is_gone_and_its_name_is_free(migrated: Database) -> None:
    await save(migrated, turn("old"))
    await migrated.write([("UPDATE conversations SET deleted_at = 1", [()])])
    assert await said(migrated) is None
    await save(migrated, turn("new"))
    assert await said(migrated) == ["new"]


async def test_numbers_are_never_given_again(migrated: Database) -> None:
    await save(migrated, turn(id="a"), turn(id="b"))
    await migrated.write([("DELETE FROM conversations WHERE id = 'b'", [()])])
    await save(migrated, turn(id="c"))
    numbers = dict(await rows(migrated, "SELECT id, number FROM conversations"))
    assert numbers["c"] > numbers["a"] + 1


async def test_a_message_is_never_written_twice(migrated: Database) -> None:
    first = turn("one")
    await save(migrated, first)
    again = turn(pk=first.pk, is_new=False, messages=first.messages)
    with pytest.raises(AlreadyThere):
        await save(migrated, again)
    assert await said(migrated) == ["one"]
    assert await rows(migrated, TOTALS) == [("chat", 1, 3, 2, 10, NOON)]


@pytest.mark.parametrize("is_new", [True, False], ids=["both make it", "it is there"])
async def test_two_workers_on_one_conversation_leave_no_gap(tables_url: str, is_new: bool) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        there = turn()
        if not is_new:
            await save(one, there)
        turns = [turn("q", "a", is_new=is_new, **({} if is_new else {"pk": there.pk})) for _ in range(30)]
        await asyncio.gather(*(save(database, item) for item, database in zip(turns, [one, two] * 15, strict=True)))

        assert await seqs(two) == list(range(1, 61))
        ((_, count, *totals),) = await rows(one, TOTALS)
        made = 30 + (not is_new)
        assert (count, totals) == (60, [3 * made, 2 * made, 10 * made, NOON])


async def test_two_workers_that_meet_in_opposite_order_both_get_through(tables_url: str) -> None:
    async with opened(tables_url) as one, opened(tables_url) as two:
        names = [f"c{number}" for number in range(6)]
        forth = [[turn("x", id=name) for name in names] for _ in range(10)]
        back = [[turn("x", id=name) for name in reversed(names)] for _ in range(10)]
        await asyncio.gather(*(save(one, *turns) for turns in forth), *(save(two, *turns) for turns in back))
        assert await rows(one, TOTALS) == [(name, 20, 60, 40, 200, NOON) for name in names]


# Turns that have seen what they go on from


async def test_a_turn_goes_on_from_what_it_has_seen_or_nowhere(migrated: Database) -> None:
    first = turn("one", "two")
    await save(migrated, first)
    await save(migrated, turn("three", "four", pk=first.pk, is_new=False, after=2))
    for after in (0, 2, 3):
        with pytest.raises(AlreadyThere):
            await save(migrated, turn("other", "another", pk=first.pk, is_new=False, after=after))
    assert await said(migrated) == ["one", "two", "three", "four"]
    assert await rows(migrated, TOTALS) == [("chat", 4, 6, 4, 20, NOON)]


@pytest.mark.parametrize("seen_first", [True, False])
async def test_one_that_has_seen_and_one_that_only_adds_in_one_write(migrated: Database, seen_first: bool) -> None:
    first = turn("one")
    await save(migrated, first)
    seen = turn("two", "three", pk=first.pk, is_new=False, after=1)
    adds = turn("four", "five", pk=first.pk, is_new=False)
    await save(migrated, *([seen, adds] if seen_first else [adds, seen]))
    assert await said(migrated) == ["one", "two", "three", "four", "five"]
    assert await seqs(migrated) == [1, 2, 3, 4, 5]


async def test_one_that_only_adds_is_never_refused(migrated: Database) -> None:
    first = turn("one")
    await save(migrated, first)
    await save(migrated, turn("two", pk=first.pk, is_new=False))
    with pytest.raises(AlreadyThere):
        await save(migrated, turn("x", pk=first.pk, is_new=False, after=1))
    await save(migrated, turn("three", pk=first.pk, is_new=False, after=2))
    await save(migrated, turn("four", pk=first.pk, is_new=False))
    assert await said(migrated) == ["one", "two", "three", "four"]


async def test_a_name_that_was_found_free_must_be_free(migrated: Database) -> None:
    await save(migrated, turn("one", after=0))
    for fence in ({"after": 0}, {"after": None}):
        if fence["after"] is None:
            await save(migrated, turn("two", **fence))
        else:
            with pytest.raises(AlreadyThere):
                await save(migrated, turn("two", **fence))
    assert await said(migrated) == ["one", "two"]


async def test_a_conversation_that_is_gone_takes_nothing(migrated: Database) -> None:
    await save(migrated, turn("one", is_new=False, after=3))
    assert await rows(migrated, "SELECT * FROM messages") == []


async def test_a_name_and_what_was_left_out_are_written_where_they_are_told(migrated: Database) -> None:
    await save(migrated, turn(title=None))
    ((pk,),) = await rows(migrated, "SELECT pk FROM conversations")
    answer = message("yes", "assistant", omitted_turns=3)
    later = turn(pk=pk, is_new=False, after=0, title="Hello", gives_title=True, messages=[message("hi"), answer])
    await save(migrated, later)
    await save(migrated, turn("x", pk=pk, is_new=False, after=2, title="Other", gives_title=True))
    assert await rows(migrated, "SELECT title FROM conversations") == [("Hello",)]
    assert await rows(migrated, "SELECT omitted_turns FROM messages ORDER BY seq") == [(None,), (3,), (None,)]


# Branches


def branch(parent: ConversationTurn, after: int, *texts: str, id: str = "branch", **fields: Any) -> ConversationTurn:
    return turn(*texts, id=id, after=after, parent=Parent(parent.id, parent.pk, after), **fields)


async def test_a_branch_shares_what_came_before_it(migrated: Database) -> None:
    first = turn("one", "two", "three", "four")
    await save(migrated, first)
    second = branch(first, 2, "other", "another")
    await save(migrated, second)
    third = branch(second, 3, "third", id="twig")
    fourth = branch(third, 1, "fourth", id="early")
    await save(migrated, third, fourth)
    await save(migrated, turn("five", pk=second.pk, is_new=False, after=4))

    assert await said(migrated) == ["one", "two", "three", "four"]
    assert await said(migrated, "branch") == ["one", "two", "other", "another", "five"]
    assert await said(migrated, "twig") == ["one", "two", "other", "third"]
    assert await said(migrated, "early") == ["one", "fourth"]
    found = await conversations.find(migrated, "ann", "twig")
    assert found is not None
    assert [item.seq for item in found.messages] == [1, 2, 3, 4]
    assert await rows(migrated, TOTALS) == [
        ("branch", 5, 6, 4, 20, NOON),
        ("chat", 4, 3, 2, 10, NOON),
        ("early", 2, 3, 2, 10, NOON),
        ("twig", 4, 3, 2, 10, NOON),
    ]


async def test_a_branch_outlives_its_parent(migrated: Database) -> None:
    first = turn("one", "two")
    await save(migrated, first, branch(first, 1, "other"))
    await migrated.write([("UPDATE conversations SET deleted_at = 1 WHERE id = 'chat'", [()])])
    await save(migrated, turn("again"))
    assert await said(migrated) == ["again"]
    assert await said(migrated, "branch") == ["one", "other"]


async def test_long_lines_of_branches_are_read(migrated: Database) -> None:
    last = turn("0")
    await save(migrated, last)
    for number in range(1, 60):
        last = branch(last, number, str(number), id=f"b{number}")
        await save(migrated, last)
    assert await said(migrated, "b59") == [str(number) for number in range(60)]


# By their chains


def answer(text: str, chain: str, **fields: Any) -> StoredMessage:
    found = message(text, "assistant", **fields)
    found.chain = chain
    return found


async def test_answers_are_found_by_their_chain(migrated: Database) -> None:
    whole = turn(id="whole", session_id="s", title="T", messages=[message("q"), answer("yes", "aa")])
    partial = turn(id="partial", messages=[message("q"), answer("ye", "bb", extra='{"x":1}'), message("more")])
    deleted = turn(id="deleted", messages=[answer("yes", "aa")])
    other = turn(id="other", user="bob", messages=[answer("yes", "aa")])
    question = message("q")
    question.chain = "aa"
    await save(migrated, whole, partial, deleted, other, turn(id="question", messages=[question]))
    await migrated.write([("UPDATE conversations SET deleted_at = 1 WHERE id = 'deleted'", [()])])

    found = {place.id: place for place in await conversations.places(migrated, "ann", "aa", "bb")}
    assert found == {
        "whole": Place(whole.pk, "whole", "s", "T", 2, True, NOON, None, None),
        "partial": Place(partial.pk, "partial", None, None, 2, False, NOON, '"ye"', '{"x":1}'),
    }
    assert await conversations.places(migrated, "ann", "bb", "aa") != []
    assert await conversations.places(migrated, "ann", "cc", "dd") == []


async def test_of_many_answers_alike_the_newest_are_looked_at(migrated: Database) -> None:
    turns = [turn(id=f"c{number}", at=NOON + number, messages=[answer("yes", "aa")]) for number in range(50)]
    await save(migrated, *turns)
    found = await conversations.places(migrated, "ann", "aa", "bb")
    assert {place.created_at for place in found} == set(range(NOON + 30, NOON + 50))


async def test_the_last_chains_of_a_conversation(migrated: Database) -> None:
    texts = [answer(str(number), f"chain{number}") for number in range(6)]
    await save(migrated, turn(messages=[*texts, message("no chain")], title="T", session_id="s"))
    found = await conversations.find_chains(migrated, "ann", "chat", 3)
    assert found is not None
    assert (found.message_count, found.title, found.session_id) == (7, "T", "s")
    assert found.chains == {"chain4", "chain5"}
    assert await conversations.find_chains(migrated, "bob", "chat", 3) is None
    await save(migrated, turn(id="empty"))
    empty = await conversations.find_chains(migrated, "ann", "empty", 3)
    assert empty is not None
    assert (empty.message_count, empty.chains) == (0, frozenset())


async def test_the_look_up_by_chain_uses_its_index(migrated: Database) -> None:
    """Told by the engine, with many rows and no statistics."""
    many = [turn(id=f"c{number}", messages=[message("q"), answer("yes", f"{number:032}")]) for number in range(300)]
    for first in range(0, 300, 50):
        await save(migrated, *many[first : first + 50])
    explain = "EXPLAIN QUERY PLAN" if migrated.dialect == "sqlite" else "EXPLAIN"
    plan = await rows(migrated, f"{explain} {conversations._PLACES}", "a", "b", "ann")
    text = "\n".join(str(row) for row in plan)
    assert text.count("messages_by_chain") == 2
    assert "SCAN messages" not in text
    assert "Seq Scan on messages" not in text
