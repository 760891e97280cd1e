"""What both engines must do alike."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.store.connect import database_at
from gateway.store.database import AlreadyThere, Database, Row, RowRejected, Value
from gateway.store.migrate import migrate
from tests_standalone.support.databases import in_processes

ADD = "INSERT INTO notes (id, text, size) VALUES ($1, $2, $3)"
COUNT = "UPDATE counters SET value = value + $1 WHERE name = $2"


@pytest.fixture
async def notes(database: Database) -> Database:
    """A database with a table of notes, and a counter that stands at 0."""
    async with database.transaction() as transaction:
        await transaction.execute("CREATE TABLE notes (id TEXT PRIMARY KEY, text TEXT NOT NULL, size BIGINT)")
        await transaction.execute("CREATE TABLE counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL)")
        await transaction.execute("INSERT INTO counters (name, value) VALUES ('c', 0)")
    return database


async def all_notes(database: Database) -> list[tuple[Value, ...]]:
    return values(await database.fetch("SELECT id, text, size FROM notes ORDER BY id"))


def values(rows: Sequence[Row]) -> list[tuple[Value, ...]]:
    return [tuple(row) for row in rows]  # type: ignore[arg-type]  # both engines' rows can be iterated


async def test_what_is_written_can_be_read(notes: Database) -> None:
    await notes.write([(ADD, [("a", "first", 1), ("b", "second", None)])])

    rows = await notes.fetch("SELECT text, size FROM notes WHERE id = $1 OR id = $2 ORDER BY id", "a", "b")

    assert [(row["text"], row[1]) for row in rows] == [("first", 1), ("second", None)]


async def test_a_parameter_can_be_used_twice(notes: Database) -> None:
    await notes.write([("INSERT INTO notes (id, text) VALUES ($1, $1)", [("same",)])])
    assert await all_notes(notes) == [("same", "same", None)]


@pytest.mark.parametrize(
    "text", ["", "it's", "$1", "ünïcode 🙂 \U0010ffff", "a\nb\tc\\u0000", '{"a": [1]}', "x" * 1_000_000]
)
async def test_text_comes_back_as_it_was(notes: Database, text: str) -> None:
    await notes.write([(ADD, [("a", text, None)])])
    assert await all_notes(notes) == [("a", text, None)]


@pytest.mark.parametrize("size", [0, -1, 2**63 - 1, -(2**63)])
async def test_numbers_have_64_bits(notes: Database, size: int) -> None:
    await notes.write([(ADD, [("a", "", size)])])
    assert await all_notes(notes) == [("a", "", size)]


async def test_steps_run_in_order_and_once_per_row(notes: Database) -> None:
    await notes.write(
        [
            (ADD, [("a", "", 1), ("b", "", 2)]),
            ("UPDATE notes SET size = size * $1 WHERE id = $2", [(10, "a"), (3, "a"), (5, "b")]),
            ("UPDATE notes SET size = size + 1", [()]),
        ]
    )
    assert await all_notes(notes) == [("a", "", 31), ("b", "", 11)]


COPY = "INSERT INTO copies (id, text) SELECT CAST($1 AS TEXT), n.text FROM notes n WHERE n.id = $2"
NEXT = "INSERT INTO counters (name, value) SELECT CAST($1 AS TEXT), MAX(value) + 1 FROM counters"
COUNT_UP = (
    "INSERT INTO counters (name, value) VALUES ($2, $1) ON CONFLICT (name) DO UPDATE SET value = counters.value + 1"
)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100])
async def test_any_number_of_rows_may_go_with_a_step(notes: Database, count: int) -> None:
    async with notes.transaction() as transaction:
        await transaction.execute("CREATE TABLE copies (id TEXT PRIMARY KEY, text TEXT NOT NULL)")
    ids = [f"{index:03}" for index in range(count)]

    await notes.write(
        [
            (ADD, [(each, f"text {each}", index) for index, each in enumerate(ids)]),
            (COPY, [(f"copy of {each}", each) for each in [*ids, "missing"]]),
            (COUNT_UP, [(7, "c")] * count),
            (NEXT, [(each,) for each in ids]),
        ]
    )

    assert await all_notes(notes) == [(each, f"text {each}", index) for index, each in enumerate(ids)]
    copies = await notes.fetch("SELECT id, text FROM copies ORDER BY id")
    assert values(copies) == [(f"copy of {each}", f"text {each}") for each in ids]
    counters = await notes.fetch("SELECT name, value FROM counters ORDER BY value")
    assert values(counters) == [("c", count), *((each, count + 1 + index) for index, each in enumerate(ids))]


async def test_steps_without_rows_are_left_out(notes: Database) -> None:
    await notes.write([])
    await notes.write([("this is no SQL", [])])
    await notes.write([("this is no SQL", []), (ADD, [("a", "", None)])])
    assert await all_notes(notes) == [("a", "", None)]


BAD_ROWS = {
    "not null": ("bad", None, 1),
    "too large": ("bad", "", 2**63),
    "far too large": ("bad", "", 10**30),
    "no UTF-8": ("bad", "half a pair: \ud800", 1),
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("rows_before", [0, 1])
@pytest.mark.parametrize("steps_before", [0, 1])
async def test_a_bad_row_is_rejected_and_takes_its_whole_write_along(
    notes: Database, bad: tuple[Value, ...], rows_before: int, steps_before: int
) -> None:
    steps = [(COUNT, [(1, "c")])] * steps_before + [(ADD, [("good", "", 1)] * rows_before + [bad])]

    with pytest.raises(RowRejected) as caught:
        await notes.write(steps)

    assert not isinstance(caught.value, AlreadyThere)
    assert "half a pair" not in str(caught.value)
    assert await all_notes(notes) == []
    assert (await notes.fetch("SELECT value FROM counters"))[0][0] == 0


async def test_a_key_that_is_taken(notes: Database) -> None:
    await notes.write([(ADD, [("a", "first", 1)])])

    with pytest.raises(AlreadyThere):
        await notes.write([(ADD, [("b", "", 1)]), (ADD, [("a", "second", 2)])])
    with pytest.raises(AlreadyThere):
        async with notes.transaction() as transaction:
            await transaction.execute(ADD, "a", "third", 3)

    assert await all_notes(notes) == [("a", "first", 1)]


async def test_a_mistake_in_our_sql_is_nobody_elses_fault(notes: Database) -> None:
    for wrong in (notes.fetch("SELECT nothing FROM nowhere"), notes.write([("INSERT nothing", [()])])):
        with pytest.raises(Exception, match=r"(?i)nowhere|syntax") as caught:
            await wrong
        assert not isinstance(caught.value, (DatabaseUnavailable, RowRejected))
    assert await all_notes(notes) == []


async def test_a_transaction_sees_its_own_rows_and_others_see_them_after_it(notes: Database) -> None:
    async with notes.transaction() as transaction:
        await transaction.execute(ADD, "a", "", 1)
        assert len(await transaction.fetch("SELECT id FROM notes")) == 1
        assert await all_notes(notes) == []
    assert await all_notes(notes) == [("a", "", 1)]


async def test_an_exception_undoes_a_transaction(notes: Database) -> None:
    async def add_and_fail() -> None:
        async with notes.transaction() as transaction:
            await transaction.execute(ADD, "a", "", 1)
            raise LookupError

    with pytest.raises(LookupError):
        await add_and_fail()
    assert await all_notes(notes) == []


@pytest.mark.parametrize("own", [OSError("a file"), TimeoutError("a wait")])
async def test_the_callers_own_exceptions_pass_through_a_transaction(notes: Database, own: Exception) -> None:
    with pytest.raises(type(own)) as caught:
        async with notes.transaction():
            raise own
    assert caught.value is own


async def test_a_statement_that_failed_dooms_its_transaction(notes: Database) -> None:
    async def go_on_after_a_failure() -> None:
        async with notes.transaction() as transaction:
            await transaction.execute(ADD, "a", "", 1)
            with pytest.raises(RowRejected):
                await transaction.execute(ADD, "b", None, 1)
            with pytest.raises(RowRejected):
                await transaction.execute(ADD, "c", "", 1)

    with pytest.raises(RowRejected):
        await go_on_after_a_failure()
    assert await all_notes(notes) == []


async def test_a_transaction_can_insert_and_return(notes: Database) -> None:
    async with notes.transaction() as transaction:
        rows = await transaction.fetch(f"{ADD} RETURNING size", "a", "", 7)
    assert values(rows) == [(7,)]


async def test_writers_of_one_worker_lose_nothing(notes: Database) -> None:
    async def count_in_a_transaction() -> None:
        async with notes.transaction() as transaction:
            await transaction.execute(COUNT, 1, "c")

    writes = [notes.write([(COUNT, [(1, "c")]), (ADD, [(str(n), "", n)])]) for n in range(50)]
    await asyncio.gather(*writes, *(count_in_a_transaction() for _ in range(10)))

    assert values(await notes.fetch("SELECT value FROM counters")) == [(60,)]
    assert len(await all_notes(notes)) == 50


def count_and_add(process: int, url: str) -> None:
    async def run() -> None:
        database = database_at(url, pool_size=2)
        await database.open()
        for n in range(50):
            await database.write([(COUNT, [(1, "c")]), (ADD, [(f"{process}-{n}-{m}", "", n) for m in range(3)])])
        await database.close()

    asyncio.run(run())


async def test_four_processes_writing_at_once_lose_nothing(notes: Database, database_url: str) -> None:
    in_processes(4, count_and_add, database_url)

    assert values(await notes.fetch("SELECT value FROM counters")) == [(200,)]
    assert len(await all_notes(notes)) == 600


async def test_another_worker_sees_an_acknowledged_write_at_once(notes: Database, database_url: str) -> None:
    other = database_at(database_url)
    await other.open()
    for n in range(50):
        await notes.write([(ADD, [(f"{n:02}", "", n)])])
        assert len(await all_notes(other)) == n + 1
    await other.close()


async def test_a_cancelled_write_is_whole_or_not_there(notes: Database) -> None:
    for n in range(100):
        rows = [(f"{n}-{m}", "x" * 1000, m) for m in range(20)]
        writing = asyncio.create_task(notes.write([(COUNT, [(1, "c")]), (ADD, rows), (COUNT, [(1, "c")])]))
        await asyncio.sleep(random.uniform(0, 0.004))
        writing.cancel()
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
    await notes.write([(COUNT, [(0, "c")])])  # behind all that may still run

    for size in range(20):
        assert values(await notes.fetch("SELECT COUNT(*) * 2 FROM notes WHERE size = $1", size)) == values(
            await notes.fetch("SELECT value FROM counters")
        )


async def test_a_cancelled_transaction_leaves_nothing(notes: Database) -> None:
    for n in range(50):

        async def add_and_wait(key: str = str(n)) -> None:
            async with notes.transaction() as transaction:
                await transaction.execute(ADD, key, "", 1)
                await asyncio.sleep(1)

        adding = asyncio.create_task(add_and_wait())
        await asyncio.sleep(random.uniform(0, 0.004))
        adding.cancel()
        await asyncio.wait([adding])

    await notes.write([(ADD, [("after", "", 1)])])
    assert await all_notes(notes) == [("after", "", 1)]


async def test_a_database_that_is_not_open(database_url: str) -> None:
    database = database_at(database_url)
    for never in (database.fetch("SELECT 1"), database.write([("SELECT 1", [()])])):
        with pytest.raises(DatabaseUnavailable, match="does not answer") as caught:
            await never
        assert "not open" in caught.value.cause
    with pytest.raises(DatabaseUnavailable):
        async with database.transaction():
            pass
    await database.close()


async def test_a_database_can_be_closed_and_opened_again(notes: Database) -> None:
    await notes.open()  # already: nothing happens
    for _ in range(3):
        await notes.close()
        with pytest.raises(DatabaseUnavailable):
            await all_notes(notes)
        await notes.open()
        assert await all_notes(notes) == []


async def test_closing_waits_for_running_work(notes: Database) -> None:
    async def slow() -> None:
        async with notes.transaction() as transaction:
            await transaction.execute(ADD, "a", "", 1)
            began.set()
            await asyncio.sleep(0.1)
            await transaction.execute(ADD, "b", "", 2)

    began = asyncio.Event()
    running = asyncio.create_task(slow())
    await began.wait()

    await notes.close()

    assert running.done()
    await notes.open()
    assert len(await all_notes(notes)) == 2


ADD_CONVERSATION = """
INSERT INTO conversations (pk, id, user_id, created_at, last_used, message_count, total_tokens_input,
    total_tokens_output, total_cost_nanousd)
VALUES ($1, $2, $3, $4, $4, $5, 0, 0, 0)
ON CONFLICT (user_id, id) WHERE deleted_at IS NULL
DO UPDATE SET message_count = conversations.message_count + excluded.message_count
"""

ADD_MESSAGE = """
INSERT INTO messages (id, conversation_pk, seq, role, content, tokens, model, created_at)
SELECT $1, c.pk, c.message_count - $2, $3, $4, $5, $6, $7
FROM conversations c WHERE c.user_id = $8 AND c.id = $9 AND c.deleted_at IS NULL
"""


async def test_the_statements_of_a_turn_need_no_casts(database: Database) -> None:
    await migrate(database)

    for turn in range(3):
        rows = [(f"{turn}{back}", back, "user", '"hi"', 1, None, 5, "u", "c") for back in (2, 1)]
        one = [(f"{turn}x", 3, "system", '""', 1, "m", 5, "u", "c")]
        await database.write(
            [(ADD_CONVERSATION, [(f"pk{turn}", "c", "u", 5, 3)]), (ADD_MESSAGE, one), (ADD_MESSAGE, rows)]
        )

    assert values(await database.fetch("SELECT pk, message_count FROM conversations")) == [("pk0", 9)]
    found = await database.fetch("SELECT conversation_pk, seq FROM messages ORDER BY seq")
    assert values(found) == [("pk0", seq) for seq in range(9)]
