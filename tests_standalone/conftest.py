"""What the tests of the core share: migrated databases, a database that can be made to fail, values by example."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from gateway.admission import Admission
from gateway.allowances import Allowances
from gateway.auth import Auth
from gateway.caller import Caller, KeyLimits
from gateway.errors import DatabaseUnavailable
from gateway.key_watch import KeyWatch
from gateway.limits import Account
from gateway.limits_memory import MemoryBook
from gateway.store.connect import database_at
from gateway.store.database import Database, Row, Step, Transaction, Value
from gateway.store.keys import StoredKey
from gateway.store.migrate import migrate
from gateway.store.usage import UsageRow
from tests_standalone.support.databases import postgres, sqlite_url
from tests_standalone.support.postgres import Postgres

__all__ = ["postgres"]

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # Not beside the sources, then, but for this run: a gateway that has to compile all takes twice as long to start.
    os.environ["PYTHONPYCACHEPREFIX"] = _bytecode = tempfile.mkdtemp(prefix="gateway-bytecode-")
    atexit.register(shutil.rmtree, _bytecode, ignore_errors=True)

NOON = 1_800_000_000_000
"""Some moment, in milliseconds."""


_EMPTY = """
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'
            AND tablename NOT IN ('schema_migrations', 'gateway_state')
        LOOP EXECUTE 'DELETE FROM ' || quote_ident(name); END LOOP;
        UPDATE gateway_state SET revision = 0, keys_ever_made = 0;
    END $$"""


@pytest.fixture(scope="session")
def postgres_tables(postgres: Postgres) -> str:
    """A database with all tables, made once: to make one takes longer than a test."""

    async def make(url: str) -> str:
        async with opened(url):
            return url

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, make(postgres.create_database())).result()


@pytest.fixture(params=["sqlite", "postgres"])
def tables_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database for `opened`, with no rows; its test runs once on each engine."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    server: Postgres = request.getfixturevalue("postgres")
    url: str = request.getfixturevalue("postgres_tables")
    server.admin(_EMPTY, database=url.rpartition("/")[2])
    return url


@pytest.fixture
async def migrated(tables_url: str) -> AsyncIterator[Database]:
    """Open, with all tables; its test runs once on each engine."""
    async with opened(tables_url) as database:
        yield database


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    """Open, with all tables, for tests that ask nothing of the engine."""
    async with opened(sqlite_url(tmp_path)) as database:
        yield database


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = database_at(url)
    await database.open()
    try:
        await migrate(database)
        yield database
    finally:
        await database.close()


class Unsteady:
    """A real database behind a line that a test can hold up (`hold`), break (`down`), or cut after the work is done
    (`lose_answers` counts, for writes whose SQL has `of` in it). `down_after` so many writes it breaks by itself."""

    def __init__(self, real: Database) -> None:
        self._real = real
        self._open = asyncio.Event()
        self._answers = asyncio.Event()
        self.let_go()
        self.dialect: Literal["postgres", "sqlite"] = real.dialect
        self.migration_lock = real.migration_lock
        self.down = False
        self.down_after: int | None = None
        self.lose_answers = 0
        self.of = "usage_rows"
        self.fetched: list[str] = []
        self.written: list[Sequence[Step]] = []
        self.begun = 0

    def hold(self) -> None:
        self._open.clear()

    def hold_answers(self) -> None:
        """Reads are done and not told."""
        self._answers.clear()

    def let_go(self) -> None:
        self._open.set()
        self._answers.set()

    async def open(self) -> None:
        await self._real.open()

    async def close(self) -> None:
        await self._real.close()

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        self.fetched.append(sql)
        await self._pass()
        found = await self._real.fetch(sql, *args)
        await self._answers.wait()
        return found

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        self.written.append(steps)
        self.down = self.down or (self.down_after is not None and len(self.written) > self.down_after)
        await self._pass()
        await self._real.write(steps)
        if self.lose_answers and any(self.of in sql and rows for sql, rows in steps):
            self.lose_answers -= 1
            raise DatabaseUnavailable("the answer was lost")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        self.begun += 1
        await self._pass()
        async with self._real.transaction() as transaction:
            yield transaction

    async def _pass(self) -> None:
        await self._open.wait()
        if self.down:
            raise DatabaseUnavailable("told to be down")


@pytest.fixture
def own_logging() -> Iterator[None]:
    """The test may configure the loggers of this process; afterwards they are as they were."""
    root = logging.getLogger()
    handlers = root.handlers
    levels = {name: logging.getLogger(name).level for name in ("", "asyncio", "asyncpg", "uvicorn.error")}
    yield
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


async def eventually(check: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer of `check`, which is asked again and again."""
    for _ in range(2000):
        if found := await check():
            return found
        await asyncio.sleep(0.005)
    raise AssertionError(f"{check} never came true")


async def settle() -> None:
    """Lets everything run that can run without waiting for anybody."""
    for _ in range(20):
        await asyncio.sleep(0)


async def rows(database: Database, sql: str, *args: Value) -> list[tuple[Any, ...]]:
    """What a statement finds, as plain tuples."""
    found: Sequence[Any] = await database.fetch(sql, *args)
    return [tuple(row) for row in found]


def usage_row(**changes: Any) -> UsageRow:
    """One call of model `m` at NOON by ann: 10 tokens in, 5 out, 1,000 nano-dollars."""
    row = UsageRow(
        id=f"use_{secrets.token_hex(16)}", request_id="req_1", attempt=1, created_at=NOON, user_id="ann", key_id=None,
        end_user=None, session_id=None, conversation_id=None, backend="b", model="m", upstream_model="m",
        input_tokens=10, cached_tokens=0, cache_write_tokens=0, audio_input_tokens=0, output_tokens=5,
        reasoning_tokens=0, audio_output_tokens=0, counted_by="upstream", price="{}", price_unknown=0,
        cost_nanousd=1000, charged=1, status="ok", finish_reason="stop", stream=0, ended_by=None, ttft_ms=None,
        duration_ms=7, image_input_tokens=0, image_output_tokens=0, cache_write_1h_tokens=0,
    )  # fmt: skip
    return replace(row, **changes)


def stored_key(**changes: Any) -> StoredKey:
    """A key of ann's without limits."""
    key = StoredKey(
        id=f"key_{secrets.token_hex(8)}", digest=secrets.token_hex(32), hint="abcd", user_id="ann", name=None,
        is_admin=False, models=None, requests_per_minute=None, tokens_per_minute=None, max_parallel=None,
        budget_nanousd=None, budget_period=None, created_at=NOON, expires_at=None,
    )  # fmt: skip
    return replace(key, **changes)


def no_limits() -> Admission:
    """Lets every call in, and asks no database."""
    nowhere = database_at("sqlite:///nowhere.db")
    watch = KeyWatch(nowhere)

    async def spent(account: Account, caller: Caller) -> int:
        return 0

    return Admission(Allowances(KeyLimits()), Auth(nowhere, watch, mode="open"), watch, MemoryBook(), spent)
