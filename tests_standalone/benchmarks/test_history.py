"""How conversations are found, in a database that is large enough for a scan to be a fault. No times."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.history import QUESTIONS, Answer, analyze, ask, filled, markdown
from benchmarks.history_plans import large_tables, plans, sqlite_faults
from benchmarks.history_rows import BRANCHES, DEEP, USER, Size
from gateway.store.database import Database
from tests_standalone.support.databases import postgres, sqlite_url
from tests_standalone.support.postgres import Postgres

__all__ = ["postgres"]

SIZE = Size(100_000, of_user=4_000, deep=5_000)
SCANS = [
    "SELECT COUNT(*) FROM messages WHERE content = $1",
    "SELECT 1 FROM conversations c LEFT JOIN messages m ON m.conversation_pk = c.pk WHERE c.title = $1",
    "UPDATE conversations SET title = 'x' WHERE title = $1",
    "SELECT 1 FROM conversations WHERE message_count || '' = $1",
]
HUGE = {"conversations", "messages"}


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    server: Postgres = request.getfixturevalue("postgres")
    url = sqlite_url(tmp_path) if request.param == "sqlite" else server.create_database()
    async with filled(url, SIZE) as made:
        yield made


async def test_nothing_reads_a_whole_table(database: Database) -> None:
    large = await large_tables(database)
    await _rows_are_as_they_are_said_to_be(database)
    await _scans_are_faults(database, large)
    found: dict[str, Answer] = {}
    for engine_knows_its_tables in (False, True):
        if engine_knows_its_tables:
            await analyze(database)
        found = await ask(database, 1, large)
        assert list(found) == list(QUESTIONS)
        assert all(answer.plans for answer in found.values())
        assert {name: answer.faults for name, answer in found.items() if answer.faults} == {}
    page = markdown({"machine": "any"}, SIZE, {"here": found})
    assert "| load a conversation | " in page
    assert "## What reads too much\n\nNothing." in page


async def _rows_are_as_they_are_said_to_be(database: Database) -> None:
    async def one(sql: str) -> Any:
        return (await database.fetch(sql))[0]["n"]

    assert await one("SELECT COUNT(*) AS n FROM messages") == SIZE.messages + 2 * BRANCHES
    assert await one(f"SELECT COUNT(*) AS n FROM conversations WHERE user_id = '{USER}'") == SIZE.of_user + 1 + BRANCHES
    assert await one(f"SELECT message_count AS n FROM conversations WHERE id = '{DEEP}'") == SIZE.deep
    assert await one("SELECT COUNT(DISTINCT id) AS n FROM conversations") == SIZE.conversations + 1 + BRANCHES
    counted = "SELECT COUNT(*) AS k FROM messages GROUP BY conversation_pk"
    assert await one(f"SELECT MAX(k) AS n FROM ({counted}) AS counts") == SIZE.deep
    owners = "SELECT COUNT(DISTINCT user_id) AS k FROM conversations WHERE session_id IS NOT NULL GROUP BY session_id"
    assert await one(f"SELECT MAX(k) AS n FROM ({owners}) AS counts") == 1


async def _scans_are_faults(database: Database, large: set[str]) -> None:
    assert {"conversations", "messages"} <= large
    for sql in SCANS:
        assert all(plan.faults for plan in await plans(database, [(sql, ("nobody said this",))], large)), sql


@pytest.mark.parametrize(
    ("line", "sql", "bad"),
    [
        ("SCAN m", "SELECT 1 FROM messages m", True),
        ("SCAN m USING COVERING INDEX x", "SELECT 1 FROM messages AS m", True),
        ("BLOOM FILTER ON m (pk=?)", "SELECT 1 FROM messages m", True),
        ("SEARCH m USING AUTOMATIC COVERING INDEX (a=?)", "SELECT 1 FROM messages m", True),
        ("SCAN messages", "SELECT 1 FROM messages WHERE content = 'a'", True),
        ("SCAN parents", "WITH RECURSIVE parents AS (SELECT 1) SELECT 1 FROM parents", False),
        ("SCAN s", "SELECT 1 FROM sessions s", False),
        ("SEARCH m USING INDEX x (a=?)", "SELECT 1 FROM messages m", False),
    ],
)
def test_what_sqlite_says(line: str, sql: str, bad: bool) -> None:
    assert sqlite_faults(sql, [line], HUGE) == [line] * bad
