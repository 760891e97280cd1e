"""Usage rows in, rows and sums out."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

import pytest

from gateway.store import usage
from gateway.store.database import AlreadyThere, Database, RowRejected
from gateway.store.usage import Grouping, UsageRow
from tests_standalone.conftest import NOON, rows, usage_row

DAY = 86_400_000
COLUMNS = ", ".join(column.name for column in fields(UsageRow))


async def add(database: Database, *found: UsageRow) -> None:
    await database.write([usage.insert(found)])


async def summary(
    database: Database, by: Grouping = "model", user_id: str | None = None, since: int | None = None
) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await usage.summary(database, by, user_id=user_id, since=since)]  # type: ignore[arg-type]  # both engines' rows can be iterated


@pytest.mark.parametrize(
    "row",
    [
        usage_row(),
        usage_row(cost_nanousd=None, price=None, price_unknown=1, finish_reason=None, counted_by="gateway"),
        usage_row(key_id="key_1", end_user="🙂", session_id="sess_1", conversation_id="conv_1", ended_by="drain"),
        usage_row(image_input_tokens=10**9, image_output_tokens=7, cache_write_tokens=3, cache_write_1h_tokens=2),
        usage_row(input_tokens=10**9, output_tokens=10**9, cost_nanousd=2**62, ttft_ms=0, stream=1, charged=0),
    ],
    ids=["plain", "without what may be missing", "with all of it", "pictures", "large"],
)
async def test_a_row_is_stored_as_it_is(migrated: Database, row: UsageRow) -> None:
    await add(migrated, row)
    assert await rows(migrated, f"SELECT {COLUMNS} FROM usage_rows") == [astuple(row)]


async def test_no_rows_are_no_statement(migrated: Database) -> None:
    await add(migrated)
    assert await rows(migrated, "SELECT id FROM usage_rows") == []


async def test_a_row_is_never_written_twice(migrated: Database) -> None:
    row = usage_row()
    await add(migrated, row)
    with pytest.raises(AlreadyThere):
        await add(migrated, usage_row(), row)
    assert await rows(migrated, "SELECT id FROM usage_rows") == [(row.id,)]


@pytest.mark.parametrize(
    "bad", [{"model": None}, {"input_tokens": 2**63}, {"end_user": "\ud800"}], ids=["null", "too large", "no text"]
)
async def test_a_row_that_cannot_be_stored(migrated: Database, bad: dict[str, Any]) -> None:
    with pytest.raises(RowRejected):
        await add(migrated, usage_row(), usage_row(**bad))
    assert await rows(migrated, "SELECT id FROM usage_rows") == []


# Sums: what, calls, tokens in, tokens out, nano-dollars, calls without a price


async def test_nothing_used(migrated: Database) -> None:
    assert await summary(migrated) == []


@pytest.mark.parametrize(
    ("by", "sums"),
    [
        ("model", [("big", 1, 7, 8, 900, 0), ("small", 3, 33, 6, 600, 1)]),
        ("user", [("bob", 2, 18, 10, 1100, 0), ("ann", 2, 22, 4, 400, 1)]),
        ("key", [("", 3, 29, 12, 1300, 1), ("key_1", 1, 11, 2, 200, 0)]),
        ("day", [(NOON // DAY, 2, 18, 10, 1300, 0), (NOON // DAY + 1, 2, 22, 4, 200, 1)]),
    ],
)
async def test_sums_by(migrated: Database, by: Grouping, sums: list[tuple[Any, ...]]) -> None:
    small = {"model": "small", "input_tokens": 11, "output_tokens": 2}
    await add(
        migrated,
        usage_row(**small, user_id="ann", cost_nanousd=400),
        usage_row(**small, user_id="ann", cost_nanousd=None, price_unknown=1, created_at=NOON + DAY),
        usage_row(**small, user_id="bob", cost_nanousd=200, key_id="key_1", created_at=NOON + DAY),
        usage_row(model="big", user_id="bob", input_tokens=7, output_tokens=8, cost_nanousd=900),
    )
    assert await summary(migrated, by) == sums


async def test_equal_costs_are_in_the_order_of_their_names(migrated: Database) -> None:
    await add(migrated, *(usage_row(model=name) for name in ("b", "a", "c")))
    assert [row[0] for row in await summary(migrated)] == ["a", "b", "c"]


async def test_sums_of_one_user_and_of_a_time(migrated: Database) -> None:
    await add(
        migrated,
        usage_row(user_id="ann", created_at=NOON),
        usage_row(user_id="ann", created_at=NOON - 1),
        usage_row(user_id="bob", created_at=NOON),
    )
    assert await summary(migrated, user_id="ann") == [("m", 2, 20, 10, 2000, 0)]
    assert await summary(migrated, since=NOON) == [("m", 2, 20, 10, 2000, 0)]
    assert await summary(migrated, user_id="ann", since=NOON) == [("m", 1, 10, 5, 1000, 0)]
    assert await summary(migrated, user_id="' OR 1=1 --") == []


async def test_many_tiny_costs_are_summed_exactly(migrated: Database) -> None:
    await add(migrated, *(usage_row(cost_nanousd=3, input_tokens=1, output_tokens=0) for _ in range(1000)))
    assert await summary(migrated) == [("m", 1000, 1000, 0, 3000, 0)]
