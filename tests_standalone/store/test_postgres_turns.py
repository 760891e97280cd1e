"""Steps in, one statement out, which leaves the same rows as the steps one after the other."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.ledger import Ledger
from gateway.limits import Settlement
from gateway.store import conversations, sessions, usage
from gateway.store.connect import database_at
from gateway.store.conversations import ConversationTurn, Parent, StoredMessage
from gateway.store.database import AlreadyThere, Database, RowRejected, Step
from gateway.store.limits import settlement_step
from gateway.store.migrate import migrate
from gateway.store.postgres import PostgresDatabase
from gateway.store.postgres_turns import as_one
from gateway.store.sessions import SessionTotals
from gateway.store.turn_leases import Lease, release_step
from gateway.store.usage import UsageRow
from gateway.turns import Turn
from tests_standalone.conftest import NOON, rows, usage_row
from tests_standalone.support.postgres import Postgres

USERS = ("ann", "bob", "cleo")
HOLD = "INSERT INTO turn_leases (user_id, conversation_id, holder, until) VALUES ($1, $2, $3, 0)"
TABLES = {
    "usage_rows": "SELECT * FROM usage_rows ORDER BY id",
    "conversations": """
        SELECT pk, id, user_id, session_id, created_at, last_used, message_count, total_tokens_input,
            total_tokens_output, total_cost_nanousd, title, parent_id, parent_pk, parent_seq
        FROM conversations ORDER BY pk""",
    "messages": "SELECT * FROM messages ORDER BY id",
    "sessions": "SELECT * FROM sessions ORDER BY id",
    "limit_settlements": "SELECT * FROM limit_settlements ORDER BY subject, id",
    "turn_leases": "SELECT user_id, conversation_id, holder FROM turn_leases ORDER BY user_id, conversation_id",
}  # fmt: skip


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_database()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, url)


async def opened(stack: AsyncExitStack, url: str, **options: Any) -> Database:
    """With all tables, and a session `s_NAME` for each user."""
    database = database_at(url, **options)
    await database.open()
    stack.push_async_callback(database.close)
    await migrate(database)
    if not await database.fetch("SELECT 1 FROM sessions"):
        for user in USERS:
            await sessions.open_session(database, f"s_{user}", user, NOON)
        await database.write(
            [(HOLD, [(user, f"chat-{number}", f"h{number}") for user in USERS for number in range(4)])]
        )
    return database


def messages(*texts: str) -> list[StoredMessage]:
    return [StoredMessage(f"msg_{secrets.token_hex(16)}", "user", f'"{text}"', None, None) for text in texts]


def talk(name: str = "chat", *texts: str, user: str = "ann", **changes: Any) -> ConversationTurn:
    """A turn that makes the user's conversation of that name, if it is not there."""
    values: dict[str, Any] = {
        "pk": f"c_{secrets.token_hex(16)}", "id": name, "user_id": user, "key_id": None, "end_user": None,
        "session_id": f"s_{user}", "is_new": True, "is_named": True, "title": None, "at": NOON,
        "messages": messages(*texts), "tokens_input": 3, "tokens_output": 2, "cost_nanousd": 10,
    }  # fmt: skip
    return ConversationTurn(**values | changes)


def later(first: ConversationTurn, *texts: str, **changes: Any) -> ConversationTurn:
    """A turn of a conversation that was there already, under its `pk`."""
    return talk(first.id, *texts, user=first.user_id, pk=first.pk, is_new=False, is_named=False, **changes)


def steps(
    *turns: ConversationTurn | None, used: Sequence[UsageRow] = (), settled: Sequence[Settlement] = ()
) -> list[Step]:
    """What the ledger writes for these; None is a call without a conversation."""
    talks = [turn for turn in turns if turn is not None]
    totals: dict[str, SessionTotals] = {}
    for turn in talks:
        total = totals.setdefault(str(turn.session_id), SessionTotals(str(turn.session_id)))
        total.conversations += turn.is_new and not turn.is_named
        total.tokens, total.cost_nanousd = total.tokens + turn.tokens_output, total.cost_nanousd + turn.cost_nanousd
        total.last_activity = max(total.last_activity, turn.at)
    named = [(str(turn.session_id), turn.pk) for turn in talks if turn.is_new and turn.is_named]
    return [
        usage.insert(used or [usage_row() for _ in turns]),
        *conversations.save(talks),
        sessions.add_totals(totals.values()),
        sessions.count_named(named),
        settlement_step(settled),
        release_step(turn.lease for turn in talks if turn.lease is not None),
    ]


def ended(subject: str = "key:a", **changes: Any) -> Settlement:
    """What a call held of one of its accounts, and what it used."""
    values: dict[str, Any] = {
        "subject": subject, "worker": "w1", "slots": 1, "tokens_held": 100, "tokens_used": 7, "cost_held": 50,
        "cost": 2**62, "period": 2_020_833,
    }  # fmt: skip
    return Settlement(**values | changes)


def one(work: Sequence[Step]) -> tuple[str, list[Any]]:
    """The statement that does all of these steps; there must be one."""
    found = as_one([step for step in work if step[1]])
    assert found is not None
    return found


async def save(database: Database, *turns: ConversationTurn | None) -> None:
    work = steps(*turns)
    assert one(work)
    await database.write(work)


async def one_by_one(database: Database, work: Sequence[Step]) -> None:
    async with database.transaction() as transaction:
        for sql, values in work:
            for row in values:
                await transaction.execute(sql, *row)


async def everything(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    return {name: await rows(database, sql) for name, sql in TABLES.items()}


async def said(database: Database, name: str = "chat", user: str = "ann") -> list[tuple[int, str]]:
    sql = """
        SELECT m.seq, m.content FROM messages m JOIN conversations c ON c.pk = m.conversation_pk
        WHERE c.id = $1 AND c.user_id = $2 ORDER BY m.seq"""
    return [(seq, content.strip('"')) for seq, content in await rows(database, sql, name, user)]


# The same rows


class Story:
    """Batches of turns, by chance: new ones, named ones that are there already, known ones, none at all."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._made: list[ConversationTurn] = []
        self._fences: list[tuple[ConversationTurn, list[int]]] = []

    def batch(self) -> list[Step]:
        size = self._random.choice((1, 1, 2, 3, 12))
        settled = [ended(f"key:{number}") for number in range(self._random.choice((0, 0, 1, 2, 5)))]
        return steps(*(self._turn() for _ in range(size)), settled=settled)

    def _turn(self) -> ConversationTurn | None:
        texts = [secrets.token_hex(4) for _ in range(self._random.choice((0, 1, 2, 2, 5)))]
        at = NOON + self._random.randrange(-5, 50)
        kind = self._random.randrange(8)
        if kind == 0:
            return None
        if kind < 4 and self._made:
            first = self._random.choice(self._made)
            lease = Lease(first.user_id, first.id, f"h{kind}") if kind == 3 else None
            return later(first, *texts, at=at, lease=lease)
        if kind == 7:
            return self._fenced(texts, at)
        user, number = self._random.choice(USERS), self._random.randrange(4)
        if kind == 4:
            turn = talk(secrets.token_hex(8), *texts, user=user, at=at, is_named=False, title="t", key_id="k")
        else:
            turn = talk(f"chat-{number}", *texts, user=user, at=at, end_user="kid")
        if all((turn.user_id, turn.id) != (other.user_id, other.id) for other in self._made):
            self._made.append(turn)
        return turn

    def _fenced(self, texts: Sequence[str], at: int) -> ConversationTurn:
        """One that has seen what it goes on from: nothing, a conversation that only such turns add to, or a parent."""
        kind = self._random.randrange(3)
        if kind == 0 and self._fences:
            first, seen = self._random.choice(self._fences)
            turn = later(first, *texts, at=at, after=sum(seen))
            seen.append(len(texts))
            return turn
        turn = talk(secrets.token_hex(8), *texts, user=self._random.choice(USERS), at=at, is_named=False, after=0)
        if kind == 1 and self._made:
            first = self._random.choice(self._made)
            turn.after, turn.parent = 5, Parent(first.id, first.pk, 5)
        else:
            self._fences.append((turn, [len(texts)]))
        return turn


@pytest.mark.parametrize("statement_cache", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_the_rows_are_those_of_the_steps_one_after_the_other(
    postgres: Postgres, seed: int, statement_cache: bool
) -> None:
    story = Story(seed)
    async with AsyncExitStack() as stack:
        ours = await opened(stack, postgres.create_database(), statement_cache=statement_cache)
        plain = await opened(stack, postgres.create_database())
        for _ in range(60):
            work = story.batch()
            assert one(work)
            await ours.write(work)
            await one_by_one(plain, work)
        found = await everything(ours)
        assert found == await everything(plain)
        assert all(found.values())


async def test_several_turns_of_one_conversation_keep_their_order(database: Database) -> None:
    await save(database, talk("chat", "1", "2"), talk("chat", "3"), talk("chat"), talk("chat", "4", "5"))
    assert await said(database) == [(number, str(number)) for number in range(1, 6)]


async def test_new_and_known_conversations_in_one_batch(database: Database) -> None:
    old = talk("old", "a")
    await save(database, old)
    await save(database, talk("new", "x"), later(old, "b"), None, talk("new", "y", user="bob"), later(old, "c", "d"))
    assert await said(database, "old") == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert await said(database, "new") == [(1, "x")]
    assert await said(database, "new", "bob") == [(1, "y")]


async def test_a_conversation_that_is_made_and_known_in_one_batch(database: Database) -> None:
    """No statement changes a row twice; one that does so by mistake would lose the second change without a word."""
    first = talk("chat", "a")
    await save(database, first)
    await save(database, talk("chat", "b"), later(first, "c"), talk("other", "x"))
    assert [text for _, text in await said(database)] == ["a", "b", "c"]
    assert await rows(database, "SELECT message_count, total_tokens_input FROM conversations WHERE id = 'chat'") == [
        (3, 9)
    ]
    assert await rows(database, "SELECT conversation_count, total_tokens FROM sessions WHERE id = 's_ann'") == [(2, 8)]


async def test_that_batch_is_written_after_the_most_conflicts_too(
    database: PostgresDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a second run as plain steps, which must not count as a conflict: nothing would be written, or said."""
    monkeypatch.setattr(PostgresDatabase, "ATTEMPTS", 1)
    first = talk("chat", "a")
    await save(database, first)
    await save(database, later(first, "b"), talk("chat", "c"), later(first, "d"))
    assert sorted(text for _, text in await said(database)) == ["a", "b", "c", "d"]


async def test_what_may_take_long_goes_step_by_step_and_has_that_time(database: PostgresDatabase) -> None:
    slow = ("SELECT set_config('gateway.limit', current_setting('statement_timeout'), false), $1::bigint", [(1,)])
    await database.write([slow, *(step for step in steps(talk("long", "a")) if step[1])], timeout=90)
    assert await rows(database, "SELECT current_setting('gateway.limit')") == [("90s",)]
    await database.write([step for step in steps(talk("large", "b")) if step[1]], timeout=90)
    prepared = [row[0] for row in await rows(database, "SELECT statement FROM pg_prepared_statements")]
    assert not [sql for sql in prepared if sql.startswith("WITH usage AS")]
    assert await said(database, "large") == [(1, "b")]


async def test_a_known_conversation_that_is_gone_takes_nothing(database: Database) -> None:
    for turns in ([later(talk(), "a")], [later(talk(), "a"), later(talk("other"), "b")]):
        await save(database, *turns)
    assert await rows(database, "SELECT COUNT(*) FROM messages") == [(0,)]
    assert await rows(database, "SELECT COUNT(*) FROM usage_rows") == [(3,)]


TEXTS = ["", "'; --", '\\u0000 \\"x\\"', "€ 🙂 \u2028", "\x01\x7f", "x" * 100_000]


def test_rows_of_another_length_are_a_mistake_of_ours() -> None:
    """In a batch of many they would be read by their places, and what is missing as NULL."""
    release, leases = release_step([Lease("ann", "chat", "h")])
    with pytest.raises(ValueError, match="Rows of 2 values where ended has other columns"):
        as_one([(release, [lease[:2] for lease in leases])])


def test_only_rows_are_turned_into_arrays() -> None:
    totals = SessionTotals("s", conversations=[b"x"])  # type: ignore[arg-type]
    with pytest.raises(RowRejected, match="not JSON serializable"):
        as_one([sessions.add_totals([totals, totals])])


@pytest.mark.parametrize("turns", [1, 3])
async def test_values_arrive_as_they_are(database: Database, turns: int) -> None:
    used = [
        usage_row(cost_nanousd=2**63 - 1 - number, input_tokens=-(2**63), end_user=TEXTS[1], attempt=2**31 - 1)
        for number in range(turns)
    ]
    talks = [talk(f"chat-{number}", *TEXTS[:4]) for number in range(turns)]
    for turn in talks:
        turn.messages = [*turn.messages[:3], StoredMessage(secrets.token_hex(9), "user", TEXTS[5], "{}", TEXTS[4])]
    work = steps(*talks, used=used)
    assert ("jsonb_array_elements" in one(work)[0]) == (turns > 1)
    await database.write(work)
    kept = [row[0] for row in await rows(database, "SELECT cost_nanousd FROM usage_rows ORDER BY cost_nanousd DESC")]
    assert kept == [2**63 - 1 - number for number in range(turns)]
    assert await rows(database, "SELECT DISTINCT input_tokens, end_user FROM usage_rows") == [(-(2**63), TEXTS[1])]
    found = await rows(database, "SELECT content, extra, chain FROM messages ORDER BY conversation_pk, seq")
    assert found == [*((f'"{text}"', None, None) for text in TEXTS[:3]), (TEXTS[5], "{}", TEXTS[4])] * turns


# One culprit

CULPRITS = {
    "null": {"model": None},
    "too large": {"input_tokens": 2**63},
    "far too large": {"input_tokens": 2**70},
    "too large for its column": {"attempt": 2**31},
    "half a surrogate pair": {"end_user": "secret \ud800"},
    "U+0000": {"end_user": "secret \0"},
}


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("bad", CULPRITS.values(), ids=CULPRITS.keys())
async def test_a_batch_with_a_bad_value_is_rejected_as_a_whole(
    database: Database, turns: int, bad: dict[str, Any]
) -> None:
    used = [usage_row() for _ in range(turns)]
    used[-1] = usage_row(**bad)
    before = await everything(database)
    for _ in range(2):
        with pytest.raises(RowRejected) as caught:
            await database.write(steps(*(talk(f"chat-{n}", "x") for n in range(turns)), used=used, settled=[ended()]))
        assert "secret" not in str(caught.value)
    assert await everything(database) == before
    await save(database, talk("chat", "x"))


@pytest.mark.parametrize("turns", [1, 4])
async def test_a_batch_that_is_written_twice_counts_once(database: Database, turns: int) -> None:
    work = steps(*(talk(f"chat-{number % 2}", "q", "a") for number in range(turns)))
    await database.write(work)
    written = await everything(database)
    with pytest.raises(AlreadyThere):
        await database.write(work)
    assert await everything(database) == written


# Many workers


async def test_workers_that_meet_in_any_order_do_not_deadlock(url: str, postgres: Postgres) -> None:
    """Each makes the same names, goes on with the same known conversations and adds to the same sessions, in batches
    of every shape."""
    names = [f"chat-{number}" for number in range(6)]
    async with AsyncExitStack() as stack:
        databases = [await opened(stack, url) for _ in range(5)]
        known = [talk(f"known-{number}", user=USERS[number % 3]) for number in range(6)]
        await save(databases[0], *known)

        async def work(database: Database) -> None:
            for _ in range(15):
                made = [talk(name, "q", "a", user=user) for name in names for user in USERS]
                found = [later(first, "q", "a") for first in known]
                again = [later(first, "q", "a") for first in known]
                single = [[turn] for turn in (later(first, "q", "a") for first in known)]
                batches = [made + found, again, *single]
                random.shuffle(batches)
                for batch in batches:
                    random.shuffle(batch)
                    await save(database, *batch)

        await asyncio.gather(*(work(database) for database in databases))
        counts = "SELECT message_count, COUNT(*) FROM conversations GROUP BY message_count ORDER BY message_count"
        assert await rows(databases[0], counts) == [(150, 18), (450, 6)]
        seqs = "SELECT MIN(seq), MAX(seq) - COUNT(DISTINCT seq) FROM messages GROUP BY conversation_pk"
        assert await rows(databases[1], seqs) == [(1, 0)] * 24
        totals = "SELECT conversation_count, total_tokens, total_cost_nanousd FROM sessions"
        turns = 75 * (6 + 3 * 2) + 2
        assert await rows(databases[2], totals) == [(6 + 2, 2 * turns, 10 * turns)] * 3
    name = url.rpartition("/")[2]
    assert postgres.admin(f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{name}'")[0][0] == 0


async def test_ledgers_that_make_and_know_the_same_conversations(url: str, postgres: Postgres) -> None:
    """Some workers have seen a conversation that others are still making: its rows may be met in either order."""
    postgres.admin(f"ALTER DATABASE {url.rpartition('/')[2]} SET deadlock_timeout = '20ms'")
    async with AsyncExitStack() as stack:
        databases = [await opened(stack, url) for _ in range(4)]
        ledgers = [Ledger(database) for database in databases]
        for ledger in ledgers:
            ledger.start()
            stack.push_async_callback(ledger.aclose)

        async def chat(number: int) -> None:
            ledger, database = ledgers[number % 4], databases[number % 4]
            for step in range(10):
                user, name = USERS[(number + step) % 3], f"chat-{(number * 7 + step) % 4}"
                found = await conversations.find(database, user, name)
                turn = talk(name, "q", "a", user=user, session_id=None if found is None else found.session_id)
                if found is not None:
                    turn.pk, turn.is_new, turn.is_named = found.pk, False, False
                await ledger.record(Turn([usage_row(user_id=user)], turn))

        await asyncio.gather(*(chat(number) for number in range(40)))
        assert await rows(databases[0], "SELECT COUNT(*), SUM(message_count) FROM conversations") == [(12, 800)]
        seqs = "SELECT MIN(seq), MAX(seq) - COUNT(DISTINCT seq) FROM messages GROUP BY conversation_pk"
        assert await rows(databases[0], seqs) == [(1, 0)] * 12
        sums = "SELECT SUM(conversation_count), SUM(total_tokens), SUM(total_cost_nanousd) FROM sessions"
        assert await rows(databases[0], sums) == [(12, 800, 4000)]


# The statement


@pytest.mark.parametrize("count", [1, 2, 20])
async def test_settlements_alone_and_with_turns_that_have_no_conversation(database: Database, count: int) -> None:
    settled = [ended(f"key:{number:02}", period=-number) for number in range(count)]
    for work in (steps(settled=settled)[-2:], steps(*[None] * count, settled=settled)):
        assert one(work)
        await database.write(work)
    found = await rows(
        database,
        """
        SELECT subject, worker, slots, tokens_held, tokens_used, cost_held_nanousd, cost_nanousd, period
        FROM limit_settlements ORDER BY subject""",
    )
    assert found == [tuple(one) for one in settled for _ in range(2)]
    assert await rows(database, "SELECT COUNT(*) FROM usage_rows") == [(count,)]


async def test_what_the_ledger_writes_is_one_statement(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the server, which has prepared it; the steps alone would show here as they are."""
    ledger = Ledger(database)
    ledger.start()
    first = talk(is_named=False, session_id=None)
    await ledger.record(Turn([usage_row()], first))
    await ledger.record(Turn([usage_row(), usage_row()], later(first, "a", session_id=first.session_id)))
    await ledger.record(Turn([usage_row()]))
    await asyncio.gather(*(ledger.record(Turn([usage_row()], talk(f"chat-{number}", "a"))) for number in range(9)))
    await ledger.aclose()
    prepared = [row[0] for row in await rows(database, "SELECT statement FROM pg_prepared_statements")]
    writing = [sql for sql in prepared if "INTO usage_rows" in sql]
    assert len(writing) == 4
    assert all(sql.startswith("WITH usage AS") for sql in writing)
    assert not [sql for sql in prepared if sql.lstrip().startswith("UPDATE")]


@pytest.mark.parametrize(
    "work",
    [
        [("SELECT $1", [(1,)])],
        [*steps(talk()), ("SELECT $1", [(1,)])],
        steps(talk())[::-1],
        [usage.insert([usage_row()]), usage.insert([usage_row()])],
        [settlement_step([ended()]), usage.insert([usage_row()])],
        [sessions.count_named([("s", "c")])],
        [conversations.save([talk("x", "a")])[1]],
        [conversations.save([later(talk(), "a")])[4]],
        [conversations.save([later(talk(), "a", after=0)])[5]],
    ],
    ids=[
        "of others",
        "others too",
        "in another order",
        "twice",
        "settled first",
        "no sessions",
        "no conversation",
        "none known",
        "none known for a place",
    ],
)
def test_other_steps_are_left_alone(work: list[Step]) -> None:
    assert as_one([step for step in work if step[1]]) is None


async def test_a_plan_that_was_made_for_empty_tables_uses_their_indexes(database: Database) -> None:
    """The server keeps it while they grow. Where several rows are locked, their order is not left to a join."""
    for turns in ([talk("x", "a")], [later(talk(), "a")], [talk("x", "a"), talk("y", "a"), later(talk("z"), "a")]):
        sql, values = one(steps(*turns))
        async with database.transaction() as transaction:
            await transaction.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await transaction.execute(f"PREPARE kept AS {sql}")
            plan = await transaction.fetch(f"EXPLAIN EXECUTE kept({', '.join(['NULL'] * len(values))})")
            await transaction.execute("DEALLOCATE kept")
        assert [line[0] for line in plan if "Seq Scan" in line[0]] == []
        assert sum("LockRows" in line[0] for line in plan) == (2 if len(turns) > 1 else 0)
