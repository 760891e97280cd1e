"""How a database finds what it is asked: the plans of statements that were really asked, and what in them is too much.

`Watched` is a Database that remembers each statement with its parameters; `plans` asks the engine how it runs them. A
plan is bad if it reads all of a large table, or a whole index without a condition, or (on PostgreSQL, which counts)
more rows than `MOST_ROWS`. SQLite does not tell all: a Bloom filter in a recursive part shows in the times only.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Container, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from gateway.store import postgres_turns
from gateway.store.database import Database, PoolUse, Row, Step, Transaction, Value

LARGE = 1_000
"""Rows of a table that nobody should read whole."""
MOST_ROWS = 25_000
USED = 6
"""So often PostgreSQL has to plan a statement before it may keep one plan for all parameters."""
Asked = tuple[str, tuple[Value, ...]]


class Watched:
    """The real database, and what it was asked. Nothing is written: to explain a statement later is to run it."""

    def __init__(self, real: Database) -> None:
        self.real = real
        self.asked: list[Asked] = []
        self.dialect: Literal["postgres", "sqlite"] = real.dialect
        self.migration_lock = real.migration_lock

    @property
    def pool_use(self) -> PoolUse:
        return self.real.pool_use

    async def open(self) -> None:
        await self.real.open()

    async def close(self) -> None:
        await self.real.close()

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        self.asked.append((sql, args))
        return await self.real.fetch(sql, *args)

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        work = [step for step in steps if step[1]]
        as_one = postgres_turns.as_one(work) if work and self.dialect == "postgres" else None
        one = [] if as_one is None else [(as_one[0], tuple(as_one[1]))]
        self.asked += one or [(sql, tuple(row)) for sql, rows in work for row in rows]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self.real.transaction() as inner:
            yield _WatchedTransaction(inner, self.asked)


@dataclass(slots=True)
class _WatchedTransaction:
    real: Transaction
    asked: list[Asked]

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        self.asked.append((sql, args))
        return await self.real.fetch(sql, *args)

    async def execute(self, sql: str, *args: Value) -> None:
        self.asked.append((sql, args))
        await self.real.execute(sql, *args)


@dataclass(frozen=True, slots=True)
class Plan:
    """`how`: the engine's words, a line for each step. `faults`: those of them that read too much."""

    sql: str
    how: Sequence[str]
    faults: Sequence[str]


class _RolledBack(Exception):
    """Explaining ran the statement: what it did is taken back."""


async def large_tables(database: Database) -> set[str]:
    """Those with more rows than `LARGE`."""
    if database.dialect == "sqlite":
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    else:
        names = "SELECT CAST(tablename AS TEXT) AS name FROM pg_tables WHERE schemaname = 'public'"
    found = set()
    for row in await database.fetch(names):
        counted = await database.fetch(
            f'SELECT COUNT(*) AS n FROM (SELECT 1 FROM "{row["name"]}" LIMIT {LARGE + 1}) AS counted'
        )
        if counted[0]["n"] > LARGE:
            found.add(str(row["name"]))
    return found


async def plans(database: Database, asked: Sequence[Asked], large: Container[str]) -> list[Plan]:
    """One for each different statement; on PostgreSQL one more for what comes of it once it has been in use."""
    if database.dialect == "postgres":
        return [plan for times in (0, USED) for plan in await _on_postgres(database, asked, large, times)]
    found = {}
    for sql, args in asked:
        how = [str(row["detail"]) for row in await database.fetch(f"EXPLAIN QUERY PLAN {sql}", *args)]
        found[sql] = Plan(sql, how, sqlite_faults(sql, how, large))
    return list(found.values())


def sqlite_faults(sql: str, how: Sequence[str], large: Container[str]) -> list[str]:
    """Where it reads all of a large table: to look at each row, or to make a filter or an index of it that it throws
    away. It calls tables by their alias if they have one."""
    named = {(alias or table).lower(): table.lower() for table, alias in _tables(sql)}
    scans = [(line, found[1].lower()) for line in how if (found := _WHOLE.match(line))]
    return [line for line, name in scans if named.get(name, name) in large]


def _tables(sql: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"\b(?:FROM|JOIN|INTO|UPDATE)\s+(\w+)(?:\s+(?:AS\s+)?(\w+))?", sql, re.IGNORECASE):
        alias = found[2] or ""
        yield found[1], "" if alias.upper() in _WORDS else alias


_WHOLE = re.compile(r"(?:SCAN|BLOOM FILTER ON|SEARCH(?= \w+ USING AUTOMATIC)) (\w+)")
_WORDS = {"WHERE", "SET", "ON", "LEFT", "JOIN", "ORDER", "GROUP", "LIMIT", "UNION", "VALUES", "SELECT", "CROSS"}


async def _on_postgres(database: Database, asked: Sequence[Asked], large: Container[str], times: int) -> list[Plan]:
    """As the server plans a prepared statement that it has planned so many times. All of it is undone."""
    found: dict[str, Plan] = {}
    with suppress(_RolledBack):
        async with database.transaction() as transaction:
            await transaction.execute("SET LOCAL statement_timeout = '60s'")
            for sql, args in asked:
                await transaction.execute(f"PREPARE asked AS {sql}")
                given = f"({', '.join(map(_literal, args))})" if args else ""
                for _ in range(times):
                    await transaction.fetch(f"EXPLAIN EXECUTE asked {given}")
                explain = f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, FORMAT JSON) EXECUTE asked {given}"
                tree = json.loads((await transaction.fetch(explain))[0][0])[0]["Plan"]
                await transaction.execute("DEALLOCATE asked")
                steps = list(_steps(tree, 0))
                how = [f"{'  ' * depth}{_words(step)}" for depth, step in steps]
                faults = [_words(step) for _, step in steps if _reads_too_much(step, large)]
                found.setdefault(sql, Plan(sql, how, faults))
            raise _RolledBack
    return list(found.values())


def _literal(value: Value) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else str(value)


def _steps(node: Mapping[str, Any], depth: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield depth, node
    for child in node.get("Plans", ()):
        yield from _steps(child, depth + 1)


def _reads_too_much(step: Mapping[str, Any], large: Container[str]) -> bool:
    kind = step["Node Type"]
    if step.get("Relation Name") not in large or not step.get("Actual Loops"):
        return False
    unbounded = kind == "Seq Scan" or (kind in ("Index Scan", "Index Only Scan") and "Index Cond" not in step)
    return rows_read(step) > (2 * LARGE if unbounded else MOST_ROWS)


def rows_read(step: Mapping[str, Any]) -> int:
    """Those it gave and those it threw away."""
    each = step["Actual Rows"] + step.get("Rows Removed by Filter", 0) + step.get("Rows Removed by Index Recheck", 0)
    return int(each * step["Actual Loops"])


_VALUES = re.compile(r"'[^']*'::\w+|\$\d+")


def _words(step: Mapping[str, Any]) -> str:
    words = [step["Node Type"]]
    if "Index Name" in step:
        words.append(f"using {step['Index Name']}")
    if "Relation Name" in step:
        words.append(f"on {step['Relation Name']}")
    words += [f"{name}: {_VALUES.sub('?', step[name])}" for name in ("Index Cond", "Filter") if name in step]
    return ", ".join([" ".join(words[:3]), *words[3:], f"{rows_read(step)} rows"])
