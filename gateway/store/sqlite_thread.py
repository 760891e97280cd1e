"""A thread that calls SQLite, with its connection, and what SQLite's errors are to us.

Rules:

- sqlite3's exceptions end here, by SQLite's own code: the row is at fault (`RowRejected`) or the database is
  (`DatabaseUnavailable`). Any other is a mistake in our SQL and flies as it is.
- After an error of the file or the disk the connection is closed; the next job opens another.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from gateway.errors import DatabaseUnavailable
from gateway.store.database import AlreadyThere, RowRejected

T = TypeVar("T")

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


class SqliteThread:
    """A thread and its connection, which the event loop may use while the thread `is_idle`. Jobs run in the order in
    which they came.

    An executor has two futures and three locks for each job, which costs as much as the statements of a small one.
    """

    def __init__(self, path: Path, connect: Callable[[], sqlite3.Connection]) -> None:
        self._path = path
        self._connect = connect
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
        with mapped(self._path):
            if self._connection is None:
                self._connection = self._connect()
            self.busy = True
            try:
                return job(self._connection)
            except sqlite3.Error as error:
                if kind(error) in BROKEN:
                    self._disconnect()
                raise
            finally:
                self.busy = False

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    """SQLite's errors, and those of the file at `path`, leave as ours."""
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
    if kind(error) in DAMAGED:
        return DatabaseUnavailable(
            f"{said}. Restore a backup, or save what can be read: sqlite3 {path} .recover | sqlite3 recovered.db"
        )
    return DatabaseUnavailable(said) if kind(error) in UNAVAILABLE else error


def kind(error: Exception) -> int | None:
    """SQLite's primary result code; the higher bits say more."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
