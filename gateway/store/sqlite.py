"""SQLite through the standard library, on threads of its own.

Rules:

- One thread writes and one reads, each with its own connection: in WAL mode a read does not wait for a commit's fsync.
- A `fetch` or a `write` is one job for its thread. A job that has begun runs to its end, whoever stops waiting for it.
- A write begins with BEGIN IMMEDIATE, so it waits for other processes at its start (`BUSY_TIMEOUT`) and never later.
- The statements of a small write run in the event loop, while its thread has nothing to do, and only the COMMIT in the
  thread: each call into SQLite gives Python's lock away and waits for it four times, which beside a busy loop costs
  several times what the statements do. Whoever would have to wait, for a lock or a slow disk, goes to the thread.
- `$1` is bound by position (`sqlite_statements`).
- sqlite3's exceptions end here, by SQLite's own code: the row is at fault (`RowRejected`) or the database is
  (`DatabaseUnavailable`). Any other is a mistake in our SQL and flies as it is.
- After an error of the file or the disk the connection is closed; the next job opens another.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from gateway.errors import DatabaseUnavailable
from gateway.store.database import AlreadyThere, PoolUse, Row, RowRejected, Step, Transaction, Value
from gateway.store.sqlite_statements import positional, statements

T = TypeVar("T")

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
SLOW = 0.03
SLOW_FOR = 30.0
"""Seconds that a write in the event loop may take, and for which none follows one that took longer."""

DUPLICATE = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_ROWID}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL}
BROKEN = DAMAGED | {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
UNAVAILABLE = BUSY | BROKEN | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT}


class SqliteDatabase:
    dialect: Literal["postgres", "sqlite"] = "sqlite"
    migration_lock: str | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: _Thread | None = None
        self._reader: _Thread | None = None
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
        writer, reader = _Thread(self._path, WRITER), _Thread(self._path, READER)
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

    def __init__(self, writer: _Thread) -> None:
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


class _Thread:
    """A thread and its connection, which the event loop may use while the thread `is_idle`. Jobs run in the order in
    which they came.

    An executor has two futures and three locks for each job, which costs as much as the statements of a small one.
    """

    def __init__(self, path: Path, settings: Sequence[str]) -> None:
        self._path = path
        self._settings = settings
        self._connection: sqlite3.Connection | None = None
        self.busy = False
        self._closed = False
        self._unanswered = 0
        self._slow_until = 0.0
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="sqlite", daemon=True).start()

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @property
    def is_idle(self) -> bool:
        """Is its connection open, and free for the event loop?"""
        return self._connection is not None and not self._unanswered and time.monotonic() >= self._slow_until

    def prepare(self, job: Callable[[sqlite3.Connection], bool]) -> bool:
        """Runs a short job in the event loop; only while the thread `is_idle`."""
        started = time.monotonic()
        try:
            return self._run(job)
        finally:
            if (ended := time.monotonic()) - started > SLOW:
                self._slow_until = ended + SLOW_FOR

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        return await self.start(job)

    def start(self, job: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        if self._closed:
            raise DatabaseUnavailable("the database is closed")
        return self._ask(lambda: self._run(job))

    async def close(self) -> None:
        self._closed = True
        closing = self._ask(self._disconnect)
        self._jobs.put(None)
        await asyncio.shield(closing)

    def _ask(self, job: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._unanswered += 1
        self._jobs.put(lambda: self._answer(loop, future, job))
        return future

    def _answer(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], job: Callable[[], T]) -> None:
        """Runs a job that somebody still waits for. A loop that has gone takes no answer."""
        answer: T | None = None
        failure: BaseException | None = None
        if not future.cancelled():
            try:
                answer = job()
            except BaseException as error:
                failure = error
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._settle, future, answer, failure)

    def _settle(self, future: asyncio.Future[Any], answer: object, failure: BaseException | None) -> None:
        self._unanswered -= 1
        if future.done():  # nobody waits any more
            return
        if failure is None:
            future.set_result(answer)
        else:
            future.set_exception(failure)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        with _mapped(self._path):
            if self._connection is None:
                self._connection = _connect(self._path, self._settings)
            self.busy = True
            try:
                return job(self._connection)
            except sqlite3.Error as error:
                if _kind(error) in BROKEN:
                    self._disconnect()
                raise
            finally:
                self.busy = False

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _opened(thread: _Thread | None) -> _Thread:
    if thread is None:
        raise DatabaseUnavailable("the database is not open")
    return thread


async def _close(writer: _Thread, reader: _Thread) -> None:
    """One after the other: the last to close moves the WAL into the file, and two at once may each think it is not."""
    try:
        await reader.close()
    finally:
        await writer.close()


# What follows runs on a thread; `_is_small` and `_prepare`, with what it does, in the event loop.


def _create(path: Path) -> None:
    with _mapped(path), suppress(FileExistsError):
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
        if _kind(error) not in BUSY:
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
            if _kind(error) not in BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.001, 0.02))


def _fetch(connection: sqlite3.Connection, sql: str, args: Sequence[Value]) -> list[sqlite3.Row]:
    if not args:
        return connection.execute(sql).fetchall()
    text, placed = positional(sql)
    return connection.execute(text, placed(args)).fetchall()


class _Damaged(sqlite3.DatabaseError):
    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


@contextmanager
def _mapped(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, OverflowError, UnicodeEncodeError) as error:
        ours = _translated(error, path)
        if ours is error:
            raise
        raise ours from error


def _translated(error: Exception, path: Path) -> Exception:
    said = f"{path}: {error}"
    if isinstance(error, OSError):
        return DatabaseUnavailable(said)
    if getattr(error, "sqlite_errorcode", None) in DUPLICATE:
        return AlreadyThere(str(error))
    if isinstance(error, (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeEncodeError)):
        return RowRejected(str(error))
    if _kind(error) in DAMAGED:
        return DatabaseUnavailable(
            f"{said}. Restore a backup, or save what can be read: sqlite3 {path} .recover | sqlite3 recovered.db"
        )
    return DatabaseUnavailable(said) if _kind(error) in UNAVAILABLE else error


def _kind(error: Exception) -> int | None:
    """SQLite's primary result code; the higher bits say more."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
