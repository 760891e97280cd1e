"""PostgreSQL through asyncpg.

Rules:

- One deadline holds for all of a call: the wait for a free connection, the connect, the statements, the retries.
- A connection goes back to the pool only if it is known to be idle and outside a transaction. After a time-out, a
  cancellation or a lost connection nobody knows, so it is dropped without a word to the server, which may be silent.
- asyncpg's exceptions end here (`postgres_errors`): the row is at fault (`RowRejected`) or the database is
  (`DatabaseUnavailable`). Any other is a mistake in our SQL and flies as it is.
- A statement that is a transaction of its own has no BEGIN and COMMIT around it, and asyncpg's own timer instead of
  ours: `fetch`, a `write` of one row, and a batch of finished turns, which `postgres_turns` makes one statement.
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
from gateway.store import postgres_turns
from gateway.store.database import PoolUse, Row, RowRejected, Step, Transaction, Value
from gateway.store.postgres_errors import FOREIGN, Conflict, ReadOnly, translated
from gateway.store.postgres_pool import Pool

if TYPE_CHECKING:
    from gateway.store.postgres_pool import Connection


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
    CLOSE_TIMEOUT = 2.0  # the worker's end has five seconds for all that it closes
    ATTEMPTS = 5

    # What we gave up must not live on in the server: a statement, or the transaction of a worker that stands still.
    SETTINGS = {"jit": "off", "statement_timeout": "6s", "idle_in_transaction_session_timeout": "10s"}

    def __init__(self, url: str, pool_size: int, statement_cache: bool = True) -> None:
        self._url = url
        self._pool_size = pool_size
        self._statement_cache = statement_cache
        self._pool: Pool | None = None

    @property
    def pool_use(self) -> PoolUse:
        if self._pool is None:
            return PoolUse(0, 0, self._pool_size)
        return PoolUse(self._pool.busy, self._pool.size, self._pool_size)

    @property
    def is_cut(self) -> bool:
        return self._pool is None or self._pool.is_cut

    async def open(self) -> None:
        if self._pool is not None:
            return
        pool = Pool(self._connect, self._pool_size)
        try:
            async with asyncio.timeout(self.CONNECT_TIMEOUT):
                pool.give(await pool.take())
        except ValueError:  # its text may quote a part of the password
            raise DatabaseUnavailable("the database URL cannot be used: check its port, host and options") from None
        except FOREIGN as error:
            raise translated(error, alive=False) from error
        self._pool = pool

    async def _connect(self) -> Connection:
        settings = self.SETTINGS if self._statement_cache else {}
        return await asyncpg.connect(
            self._url,
            timeout=self.CONNECT_TIMEOUT,
            command_timeout=self.LONGEST_COMMAND,
            statement_cache_size=256 if self._statement_cache else 0,
            max_cached_statement_lifetime=0,
            server_settings={"application_name": "gateway", **settings},
        )

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            with suppress(*FOREIGN):  # asyncpg has then dropped all connections
                async with asyncio.timeout(self.CLOSE_TIMEOUT):
                    await pool.close()

    async def fetch(self, sql: str, *args: Value) -> Sequence[Row]:
        return await self._run_alone(sql, args, self._deadline(self.FETCH_TIMEOUT))

    async def write(self, steps: Sequence[Step], *, timeout: float | None = None) -> None:
        work = [step for step in steps if step[1]]
        if not work:
            return
        seconds = max(timeout or 0, self.WRITE_TIMEOUT)
        deadline = self._deadline(seconds)
        # What is given more time is large, and quicker step by step.
        alone = postgres_turns.as_one(work) if seconds < self.WRITE_TIMEOUT + 1 else None
        conflicts = 0
        while True:
            try:
                if alone is not None:
                    await self._run_alone(*alone, deadline)
                else:
                    async with self._connection(asyncio.timeout_at(deadline)) as connection:
                        with _mapped(connection):
                            await _run(connection, work, seconds if seconds > self.WRITE_TIMEOUT else None)
                return
            except Conflict:
                conflicts += 1
                if conflicts == self.ATTEMPTS:
                    raise
                await asyncio.sleep(random.uniform(0, 0.02 * conflicts))
            except asyncpg.CardinalityViolationError:
                if alone is None:
                    raise
                alone = None

    def _deadline(self, seconds: float) -> float:
        return self._opened().loop.time() + seconds

    async def _run_alone(self, sql: str, args: Sequence[Value], deadline: float) -> Sequence[Row]:
        """One statement, which the server takes as a transaction of its own."""
        pool = self._opened()
        connection = pool.take_idle() or await self._free_connection(pool, deadline)
        try:
            found = await connection.fetch(sql, *args, timeout=deadline - pool.loop.time())
        except TimeoutError:
            pool.drop(connection)
            raise DatabaseUnavailable("no answer from PostgreSQL in time") from None
        except FOREIGN as error:
            ours = _ours(error, connection)
            await _settle(pool, connection, ours)
            raise ours from _cause(ours, error)
        except BaseException as error:
            await _settle(pool, connection, error)
            raise
        pool.give(connection)
        return found

    async def _free_connection(self, pool: Pool, deadline: float) -> Connection:
        timer = asyncio.timeout_at(deadline)
        try:
            async with timer:
                with _mapped():
                    return await pool.take()
        except TimeoutError:
            if not timer.expired():
                raise  # the caller's own
            raise self._none_free() from None

    def _none_free(self) -> DatabaseUnavailable:
        return DatabaseUnavailable(f"no connection free or made, of {self._pool_size}, in time")

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
        pool, connection = self._opened(), None
        try:
            async with timer:
                with _mapped():
                    connection = await pool.take()
                try:
                    yield connection
                except BaseException as error:
                    await _settle(pool, connection, error)
                    raise
                pool.give(connection)
        except TimeoutError:
            if not timer.expired():
                raise  # the caller's own
            if connection is None:
                raise self._none_free() from None
            raise DatabaseUnavailable("no answer from PostgreSQL in time") from None

    def _opened(self) -> Pool:
        if self._pool is None:
            raise DatabaseUnavailable("the database is not open")
        return self._pool


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


async def _run(connection: Connection, work: Sequence[Step], seconds: float | None) -> None:
    """One transaction with as few round trips as asyncpg allows: a single statement needs no BEGIN and COMMIT.

    `seconds`: what each statement may take, if it is more than the connection allows."""
    alone = len(work) == 1 and seconds is None
    if not alone:
        limit = "" if seconds is None else f"; SET LOCAL statement_timeout = {int(seconds * 1000)}"
        await connection.execute(f"BEGIN{limit}")
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
        connection.terminate()
        task.cancel()
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        raise


async def _settle(pool: Pool, connection: Connection, error: BaseException) -> None:
    """Rolls back where the server has just answered and will again; drops the connection everywhere else."""
    if isinstance(error, ReadOnly):
        pool.expire()  # the others lead to the same server
    answered = isinstance(error, Exception) and not isinstance(error, (DatabaseUnavailable, TimeoutError))
    clean = False
    try:
        if (answered or isinstance(error, Conflict)) and not connection.is_closed():
            if connection.is_in_transaction():
                await connection.execute("ROLLBACK")
            clean = True
    except FOREIGN:
        pass  # the first error is the one to tell
    finally:
        if clean:
            pool.give(connection)
        else:
            pool.drop(connection)


@contextmanager
def _mapped(connection: Connection | None = None) -> Iterator[None]:
    try:
        yield
    except FOREIGN as error:
        ours = _ours(error, connection)
        raise ours from _cause(ours, error)


def _ours(error: Exception, connection: Connection | None) -> Exception:
    return translated(error, alive=connection is not None and not connection.is_closed())


def _cause(ours: Exception, error: Exception) -> BaseException | None:
    """What to chain: asyncpg's text shows the values of a rejected row, which are nobody's business."""
    return error.__cause__ if ours is error else None if isinstance(ours, RowRejected) else error
