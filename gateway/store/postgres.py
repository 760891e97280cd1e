"""PostgreSQL through asyncpg.

Rules:

- One deadline holds for all of a call: the wait for a free connection, the connect, the statements, the retries.
- A connection goes back to the pool only if it is known to be idle and outside a transaction. After a time-out, a
  cancellation or a lost connection nobody knows, so it is dropped without a word to the server, which may be silent.
- asyncpg's exceptions end here, by SQLSTATE: the row is at fault (`RowRejected`) or the database is
  (`DatabaseUnavailable`). Any other is a mistake in our SQL and flies as it is.
- After `DatabaseUnavailable` from `write` or `transaction` the commit may have happened all the same: repeat only what
  can be repeated. Only `Conflict` says that nothing was done.

With `statement_cache=False` nothing outlives a transaction on the server and no setting is sent that pgbouncer
refuses, so that its transaction mode works. `synchronous_commit` must be on: it is what makes `write` durable. A URL
with several hosts needs `target_session_attrs=read-write`, so that a reconnect finds the one that takes writes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Literal

import asyncpg

from gateway.errors import DatabaseUnavailable
from gateway.store.database import AlreadyThere, PoolUse, Row, RowRejected, Step, Transaction, Value

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]

FOREIGN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# What an SQLSTATE, or the start of one, means for the caller.
ROW_REJECTED = ("22", "23")
CONFLICT = ("40001", "40P01")
READ_ONLY = ("25006",)
UNAVAILABLE = (
    "08",  # connection lost; pgbouncer has no server
    "25P03",  # we were silent too long inside a transaction
    "26",  # a prepared statement is gone: there is a pooler, and statement_cache is on
    "28",  # password or certificate rejected
    "3D",  # no such database
    "40",  # the other ways to lose a transaction; of some the end is unknown
    "42501",  # no right to the table
    "42P05",  # a prepared statement is already there: as 26
    "53",  # disk full, out of memory, too many connections
    "55P03",  # lock_timeout
    "57",  # shutting down, starting up, crashed, statement_timeout
    "58",  # I/O error
    "XX",  # corrupted
)


class Conflict(DatabaseUnavailable):
    """A deadlock or a serialization failure: another transaction won, and nothing of this one remains."""


class ReadOnly(DatabaseUnavailable):
    """The server takes no writes: it was the primary once, or its disk is full and the provider locked it."""


class PostgresDatabase:
    dialect: Literal["postgres", "sqlite"] = "postgres"

    # A migration may take long, but not hold up others: every later query waits behind a DDL that waits for a lock.
    migration_lock: str | None = (
        "SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(7205759403792793); SET LOCAL lock_timeout = '2s'"
    )

    CONNECT_TIMEOUT = 5.0
    FETCH_TIMEOUT = 2.0
    WRITE_TIMEOUT = 5.0
    LONGEST_COMMAND = 60.0  # the deadline of the whole call ends it sooner
    MIGRATION_TIMEOUT = 3600.0
    CLOSE_TIMEOUT = 10.0
    ATTEMPTS = 5

    # What we gave up must not live on in the server: a statement, or the transaction of a worker that stands still.
    SETTINGS = {"jit": "off", "statement_timeout": "6s", "idle_in_transaction_session_timeout": "10s"}

    def __init__(self, url: str, pool_size: int, statement_cache: bool = True) -> None:
        self._url = url
        self._pool_size = pool_size
        self._statement_cache = statement_cache
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    @property
    def pool_use(self) -> PoolUse:
        if self._pool is None:
            return PoolUse(0, 0, self._pool_size)
        size = self._pool.get_size()
        return PoolUse(size - self._pool.get_idle_size(), size, self._pool_size)

    async def open(self) -> None:
        if self._pool is not None:
            return
        settings = self.SETTINGS if self._statement_cache else {}
        pool = asyncpg.create_pool(
            self._url,
            min_size=1,
            max_size=self._pool_size,
            max_queries=1 << 62,  # to end a connection after some queries would make the last one wait for a goodbye
            timeout=self.CONNECT_TIMEOUT,
            command_timeout=self.LONGEST_COMMAND,
            statement_cache_size=256 if self._statement_cache else 0,
            max_cached_statement_lifetime=0,
            server_settings={"application_name": "gateway", **settings},
            reset=_nothing,
        )
        try:
            async with asyncio.timeout(self.CONNECT_TIMEOUT):
                await pool
        except ValueError:  # its text may quote a part of the password
            raise DatabaseUnavailable("the database URL cannot be used: check its port, host and options") from None
        except FOREIGN as error:
            raise _translated(error, None) from error
        self._pool = pool

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            with suppress(*FOREIGN):  # asyncpg has then dropped all connections
                async with asyncio.timeout(self.CLOSE_TIMEOUT):
                    await pool.close()

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        async with self._connection(asyncio.timeout(self.FETCH_TIMEOUT)) as connection:
            with _mapped(connection):
                return await connection.fetch(sql, *args)

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        work = [(sql, rows) for sql, rows in steps if rows]
        if not work:
            return
        deadline = asyncio.get_running_loop().time() + max(timeout or 0, self.WRITE_TIMEOUT)
        for attempt in range(1, self.ATTEMPTS + 1):
            try:
                async with self._connection(asyncio.timeout_at(deadline)) as connection:
                    with _mapped(connection):
                        await _run(connection, work)
                return
            except Conflict:
                if attempt == self.ATTEMPTS:
                    raise
            await asyncio.sleep(random.uniform(0, 0.02 * attempt))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        timer = asyncio.timeout(self.WRITE_TIMEOUT)
        async with self._connection(timer) as connection:
            transaction = _Transaction(connection, timer, self.WRITE_TIMEOUT)
            await transaction.execute("BEGIN")
            yield transaction
            await transaction.execute("COMMIT")

    @asynccontextmanager
    async def _connection(self, timer: asyncio.Timeout) -> AsyncIterator[Connection]:
        """A connection until the timer ends. How the work inside ends decides whether the pool sees it again."""
        pool, connection = self._pool, None
        if pool is None:
            raise DatabaseUnavailable("the database is not open")
        try:
            async with timer:
                with _mapped():
                    connection = await pool.acquire()
                try:
                    yield connection
                except BaseException as error:
                    await _settle(pool, connection, error)
                    raise
                finally:
                    await pool.release(connection)
        except TimeoutError:
            if not timer.expired():
                raise  # the caller's own
            fault = "no answer from PostgreSQL" if connection else f"no connection free or made, of {self._pool_size},"
            raise DatabaseUnavailable(f"{fault} in time") from None


class _Transaction:
    """Once a statement has failed all others fail, the commit too, so that no half of a transaction remains."""

    def __init__(self, connection: Connection, timer: asyncio.Timeout, limit: float) -> None:
        self._connection = connection
        self._timer = timer
        self._limit = limit
        self._failure: BaseException | None = None

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        with self._statement():
            return await self._connection.fetch(sql, *args, timeout=self._limit)

    async def execute(self, sql: str, *args: Value) -> None:
        if sql == PostgresDatabase.migration_lock:
            self._limit = PostgresDatabase.MIGRATION_TIMEOUT
            self._timer.reschedule(asyncio.get_running_loop().time() + self._limit)
        with self._statement():
            await self._connection.execute(sql, *args, timeout=self._limit)

    @contextmanager
    def _statement(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            with _mapped(self._connection):
                yield
        except BaseException as error:
            self._failure = error
            raise


async def _run(connection: Connection, work: Sequence[Step]) -> None:
    """One transaction with as few round trips as asyncpg allows: a single statement needs no BEGIN and COMMIT."""
    alone = len(work) == 1
    if not alone:
        await connection.execute("BEGIN")
    for sql, rows in work:
        if len(rows) == 1:
            await connection.execute(sql, *rows[0])
        else:
            await _run_many(connection, sql, rows)
    if not alone:
        await connection.execute("COMMIT")


async def _run_many(connection: Connection, sql: str, rows: Sequence[Sequence[Value]]) -> None:
    """`executemany` in a task of its own. While it sends much it swallows a cancellation, then waits in vain for an
    answer to half a message (asyncpg 0.32, `bind_execute_many`); only the end of the connection ends that wait.
    """
    task = asyncio.ensure_future(connection.executemany(sql, rows))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        _drop(connection)
        task.cancel()
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        raise


async def _settle(pool: asyncpg.Pool[asyncpg.Record], connection: Connection, error: BaseException) -> None:
    """Rolls back where the server has just answered and will again; drops the connection everywhere else."""
    if isinstance(error, ReadOnly):
        await pool.expire_connections()  # the others lead to the same server
    answered = isinstance(error, Exception) and not isinstance(error, (DatabaseUnavailable, TimeoutError))
    clean = False
    try:
        if (answered or isinstance(error, Conflict)) and not _lost(connection):
            if connection.is_in_transaction():
                await connection.execute("ROLLBACK")
            clean = True
    except FOREIGN:
        pass  # the first error is the one to tell
    finally:
        if not clean:
            _drop(connection)


def _lost(connection: Connection) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool took it back when it broke
        return True


def _drop(connection: Connection) -> None:
    if not _lost(connection):
        connection.terminate()


async def _nothing(_connection: object) -> None:
    """For `reset`: we leave no session state behind, and asyncpg's own reset costs as much as a small query."""


@contextmanager
def _mapped(connection: Connection | None = None) -> Iterator[None]:
    try:
        yield
    except FOREIGN as error:
        ours = _translated(error, connection)
        if ours is error:
            raise
        # asyncpg's text shows the values of a rejected row, which are nobody's business.
        raise ours from (None if isinstance(ours, RowRejected) else error)


def _translated(error: Exception, connection: Connection | None) -> Exception:
    if isinstance(error, asyncpg.InterfaceError):
        # "pool is closing", "connection is closed"; on a connection that lives it is a mistake in our call.
        return DatabaseUnavailable(_said(error)) if connection is None or _lost(connection) else error
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Conflict(_said(error))  # a migration changed a table under a prepared statement: prepare again
    if not isinstance(error, asyncpg.PostgresError):
        return DatabaseUnavailable(_said(error))
    state = error.sqlstate or ""
    if isinstance(error, asyncpg.UniqueViolationError):
        return AlreadyThere(_said(error))
    if state.startswith(ROW_REJECTED):
        return RowRejected(_said(error))
    if state.startswith(CONFLICT):
        return Conflict(_said(error))
    if state.startswith(READ_ONLY):
        return ReadOnly(_said(error))
    if state.startswith(UNAVAILABLE):
        return DatabaseUnavailable(_said(error))
    return error


def _said(error: Exception) -> str:
    """One line without values: asyncpg's own data errors quote the value between the place and the reason."""
    if type(error) is asyncpg.DataError and error.__cause__ is not None:
        text = f"{str(error.args[0]).partition(':')[0]}: {error.__cause__}"
    elif isinstance(error, asyncpg.PostgresError):
        text = str(error.args[0])
    else:
        text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
