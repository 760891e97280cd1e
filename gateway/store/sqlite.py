"""SQLite through the standard library, on threads of its own (`sqlite_thread`).

Rules:

- One thread writes and one reads, each with its own connection: in WAL mode a read does not wait for a commit's fsync.
- A `fetch` or a `write` is one job for its thread. A job that has begun runs to its end, whoever stops waiting for it.
- A write begins with BEGIN IMMEDIATE, so it waits for other processes at its start (`BUSY_TIMEOUT`) and never later.
- The statements of a small write run in the event loop, while its thread has nothing to do, and only the COMMIT in the
  thread: each call into SQLite gives Python's lock away and waits for it four times, which beside a busy loop costs
  several times what the statements do. Whoever would have to wait, for a lock or a slow disk, goes to the thread.
- `$1` is bound by position (`sqlite_statements`).
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from gateway.errors import DatabaseUnavailable
from gateway.store.database import PoolUse, Row, Step, Transaction, Value
from gateway.store.sqlite_statements import positional, statements
from gateway.store.sqlite_thread import BUSY, SqliteThread, kind, mapped

BUSY_TIMEOUT = 10.0

CHECKED_BYTES = 256 << 20
"""A file up to this size is checked as a whole when it is opened (about half a second); damage in a larger one shows
when it is read."""

WRITER = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA wal_autocheckpoint = 4000",  # 16 MB: a page that many rows touch is copied once for all of them
)
READER = ("PRAGMA query_only = ON",)

ROWS_HERE = 128
CHARACTERS_HERE = 128 << 10
"""What a write in the event loop may have."""

# sqlite3 asks whatever is no number and no text how it wants to be stored. None has no answer, which costs an
# AttributeError or two for each null of each row; this is asked instead, and answers None.
_NULLS: dict[None, None] = {}
sqlite3.register_adapter(type(None), _NULLS.get)


class SqliteDatabase:
    dialect: Literal["postgres", "sqlite"] = "sqlite"
    migration_lock: str | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: SqliteThread | None = None
        self._reader: SqliteThread | None = None
        self._writing = asyncio.Lock()
        """Held by a `write` or a `transaction`, for a transaction leaves the thread between its statements."""

    @property
    def pool_use(self) -> PoolUse:
        threads = [thread for thread in (self._writer, self._reader) if thread is not None]
        return PoolUse(sum(thread.busy for thread in threads), sum(thread.is_open for thread in threads), 2)

    @property
    def is_cut(self) -> bool:
        return False

    async def open(self) -> None:
        if self._writer is not None:
            return
        writer = SqliteThread(self._path, partial(_connect, self._path, WRITER))
        reader = SqliteThread(self._path, partial(_connect, self._path, READER))
        try:
            await asyncio.to_thread(_create, self._path)
            await writer.run(_prove_writable)
            await reader.run(_prove_sound)
        except BaseException:
            await _close(writer, reader)
            raise
        self._writer, self._reader = writer, reader

    async def close(self) -> None:
        writer, reader = self._writer, self._reader
        self._writer = self._reader = None
        if writer is None or reader is None:
            return
        with suppress(DatabaseUnavailable):
            async with self._turn():
                pass
        await _close(writer, reader)

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        return await _opened(self._reader).run(lambda connection: _patiently(connection, sql, args))

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        work = [(sql, rows) for sql, rows in steps if rows]
        if not work:
            return
        writer = _opened(self._writer)
        async with self._turn():
            if writer.is_idle and _is_small(work) and writer.prepare(lambda connection: _prepare(connection, work)):
                await asyncio.shield(writer.start(_end))  # it must be ended, whoever stops waiting
            else:
                await writer.run(lambda connection: _commit(connection, work))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        writer = _opened(self._writer)
        async with self._turn():
            transaction = _Transaction(writer)
            try:
                await writer.run(_begin)
                yield transaction
                await transaction.execute("COMMIT")
            except BaseException:
                await asyncio.shield(writer.start(_roll_back))
                raise

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(BUSY_TIMEOUT):
                await self._writing.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("another transaction of this process did not end in time") from None
        try:
            yield
        finally:
            self._writing.release()


class _Transaction:
    """Once a statement has failed all others fail, the commit too, as they do in PostgreSQL."""

    def __init__(self, writer: SqliteThread) -> None:
        self._writer = writer
        self._failure: BaseException | None = None

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        if self._failure is not None:
            raise self._failure
        try:
            return await self._writer.run(lambda connection: _fetch(connection, sql, args))
        except BaseException as error:
            self._failure = error
            raise

    async def execute(self, sql: str, *args: Value) -> None:
        await self.fetch(sql, *args)


def _opened(thread: SqliteThread | None) -> SqliteThread:
    if thread is None:
        raise DatabaseUnavailable("the database is not open")
    return thread


async def _close(writer: SqliteThread, reader: SqliteThread) -> None:
    """One after the other: the last to close moves the WAL into the file, and two at once may each think it is not."""
    try:
        await reader.close()
    finally:
        await writer.close()


# What follows runs on a thread; `_is_small` and `_prepare`, with what it does, in the event loop.


def _create(path: Path) -> None:
    with mapped(path), suppress(FileExistsError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)  # SQLite gives its -wal and -shm the same mode


def _connect(path: Path, settings: Sequence[str]) -> sqlite3.Connection:
    # mode=rw, so that a file that has gone is an error and not a new, empty database.
    uri = path.absolute().as_uri() + "?mode=rw"
    # It is never used by two threads at once. Whoever may wait for another process does so in `_patiently`.
    connection = sqlite3.connect(
        uri, uri=True, timeout=0, isolation_level=None, cached_statements=256, check_same_thread=False
    )
    connection.row_factory = sqlite3.Row
    try:
        for statement in settings:
            _patiently(connection, statement)
    except BaseException:
        connection.close()
        raise
    return connection


def _prove_writable(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        raise DatabaseUnavailable("SQLite cannot use WAL mode for this file. Is it on a network file system?")
    _begin(connection)
    try:
        connection.execute("CREATE TABLE write_probe (x)")  # BEGIN alone passes on a read-only file system
    finally:
        _roll_back(connection)


def _prove_sound(connection: sqlite3.Connection) -> None:
    pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    if pages * size <= CHECKED_BYTES:
        found = str(_patiently(connection, "PRAGMA quick_check(1)")[0][0])
        if found != "ok":
            raise _Damaged(found)


def _is_small(work: Sequence[Step]) -> bool:
    if sum(len(rows) for _, rows in work) > ROWS_HERE:
        return False
    return sum(len(value) for _, rows in work for row in rows for value in row if type(value) is str) < CHARACTERS_HERE


def _commit(connection: sqlite3.Connection, work: Sequence[Step]) -> None:
    _begin(connection)
    _do(connection, work)
    _end(connection)


def _prepare(connection: sqlite3.Connection, work: Sequence[Step]) -> bool:
    """All but the COMMIT; False, and nothing, while another process writes."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if kind(error) not in BUSY:
            raise
        return False
    _do(connection, work)
    return True


def _do(connection: sqlite3.Connection, work: Sequence[Step]) -> None:
    try:
        for sql, rows in work:
            for statement, values in statements(sql, rows):
                connection.execute(statement, values)
    except BaseException:
        _roll_back(connection)
        raise


def _end(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise


def _begin(connection: sqlite3.Connection) -> None:
    _patiently(connection, "BEGIN IMMEDIATE")


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # SQLite ends it by itself when the disk is full
        connection.execute("ROLLBACK")


def _patiently(connection: sqlite3.Connection, sql: str, args: Sequence[Value] = ()) -> list[sqlite3.Row]:
    """Waits for other processes also where SQLite's own busy_timeout does not: recovery, the switch to WAL mode."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            return _fetch(connection, sql, args)
        except sqlite3.OperationalError as error:
            if kind(error) not in BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.001, 0.02))


def _fetch(connection: sqlite3.Connection, sql: str, args: Sequence[Value]) -> list[sqlite3.Row]:
    if not args:
        return connection.execute(sql).fetchall()
    text, placed = positional(sql)
    return connection.execute(text, placed(args)).fetchall()


class _Damaged(sqlite3.DatabaseError):
    sqlite_errorcode = sqlite3.SQLITE_CORRUPT
