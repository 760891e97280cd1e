"""What only PostgreSQL does to us: it restarts, falls silent, refuses, deadlocks; and where tests get one from."""

from __future__ import annotations

import asyncio
import random
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.store import usage
from gateway.store.database import AlreadyThere, RowRejected, Step
from gateway.store.migrate import migrate
from gateway.store.postgres import PostgresDatabase
from gateway.store.postgres_errors import Conflict, ReadOnly
from tests_standalone.conftest import usage_row
from tests_standalone.support.postgres import OwnPostgres, Postgres, Way, find_binaries, free_port, launch

ADD = "INSERT INTO notes (id, text) VALUES ($1, $2)"
SECRET = "s3cret/w0rd"


class Hasty(PostgresDatabase):
    """Gives up soon, so that tests of a silent server are quick."""

    CONNECT_TIMEOUT = 1.0
    FETCH_TIMEOUT = 0.3
    WRITE_TIMEOUT = 0.5
    CLOSE_TIMEOUT = 0.5


@pytest.fixture(scope="module")
def server() -> Iterator[OwnPostgres]:
    """A server for this module to stop, crash and pause."""
    server = OwnPostgres()
    yield server
    server.close()


@asynccontextmanager
async def opened(database: PostgresDatabase) -> AsyncIterator[PostgresDatabase]:
    await database.open()
    try:
        async with database.transaction() as transaction:
            await transaction.execute("CREATE TABLE IF NOT EXISTS notes (id TEXT PRIMARY KEY, text TEXT NOT NULL)")
        yield database
    finally:
        await database.close()


@pytest.fixture
async def notes(postgres: Postgres) -> AsyncIterator[PostgresDatabase]:
    async with opened(PostgresDatabase(postgres.create_database(), pool_size=4)) as database:
        yield database


async def count(database: PostgresDatabase) -> int:
    rows = await database.fetch("SELECT COUNT(*) FROM notes")
    return int(rows[0][0])


async def unavailable(database: PostgresDatabase) -> str:
    """The cause that a read and a write give; there must be one."""
    with pytest.raises(DatabaseUnavailable):
        await database.write([(ADD, [("never", "")])])
    with pytest.raises(DatabaseUnavailable) as caught:
        await database.fetch("SELECT 1")
    return caught.value.cause


async def eventually_counts(database: PostgresDatabase, number: int) -> None:
    """For after a restart: connections are made again by themselves."""
    for _ in range(100):
        try:
            assert await count(database) == number
            return
        except DatabaseUnavailable:
            await asyncio.sleep(0.05)
    pytest.fail("the database did not come back")


async def runs_in_parallel(database: PostgresDatabase, number: int) -> bool:
    """Whether that many connections are free: each query waits until it sees all of them."""
    sleeping = [database.fetch("SELECT pg_backend_pid(), pg_sleep(0.3)") for _ in range(number)]
    return len({rows[0][0] for rows in await asyncio.gather(*sleeping)}) == number


# Opening


async def test_nobody_listens() -> None:
    database = PostgresDatabase(f"postgresql://u:secret@127.0.0.1:{free_port()}/d", pool_size=2)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable) as caught:
            await database.open()
        assert "Connect call failed" in caught.value.cause


async def test_open_works_once_the_server_is_there(server: OwnPostgres) -> None:
    database = PostgresDatabase(server.create_database(), pool_size=2)
    server.stop()
    with pytest.raises(DatabaseUnavailable):
        await database.open()
    server.start()
    async with opened(database):
        assert await count(database) == 0


async def test_a_server_that_accepts_and_says_nothing(server: OwnPostgres) -> None:
    database = Hasty(server.create_database(), pool_size=2)
    server.pause()
    with pytest.raises(DatabaseUnavailable):
        await database.open()
    server.resume()
    async with opened(database):
        assert await count(database) == 0


async def test_a_wrong_password_is_not_told(server: OwnPostgres) -> None:
    server.admin("CREATE ROLE locked LOGIN PASSWORD 'right'")
    url = server.create_database().replace("postgres@", f"locked:{SECRET.replace('/', '%2F')}@")
    with pytest.raises(DatabaseUnavailable, match="does not answer") as caught:
        await PostgresDatabase(url, pool_size=2).open()
    assert 'password authentication failed for user "locked"' in caught.value.cause
    assert SECRET not in caught.value.cause


async def test_a_database_that_does_not_exist(server: OwnPostgres) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await PostgresDatabase(server.url("nowhere"), pool_size=2).open()
    assert '"nowhere" does not exist' in caught.value.cause


@pytest.mark.parametrize("url", [f"postgresql://u:{SECRET}@127.0.0.1/d", f"mysql://u:{SECRET}@h/d"])
async def test_a_url_that_cannot_be_read(url: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await PostgresDatabase(url, pool_size=2).open()
    assert "s3cret" not in caught.value.cause
    assert "w0rd" not in caught.value.cause


async def test_sessions_are_named_and_limited(notes: PostgresDatabase) -> None:
    names = ("application_name", "jit", "statement_timeout", "idle_in_transaction_session_timeout")
    settings = [(await notes.fetch(f"SHOW {name}"))[0][0] for name in names]
    assert settings == ["gateway", "off", "6s", "10s"]


# Losing the server


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_is_survived_without_opening_again(server: OwnPostgres, mode: str) -> None:
    async with opened(PostgresDatabase(server.create_database(), pool_size=4)) as database:
        await database.write([(ADD, [("before", "")])])
        assert await runs_in_parallel(database, 4)
        running = asyncio.create_task(database.fetch("SELECT pg_sleep(10)"))
        await asyncio.sleep(0.1)

        server.stop("fast" if mode == "fast" else "immediate")
        with pytest.raises(DatabaseUnavailable):
            await running
        await unavailable(database)
        server.start()

        await eventually_counts(database, 1)
        await database.write([(ADD, [("after", "")]), (ADD, [("after all", "")])])
        assert await runs_in_parallel(database, 4)


async def test_acknowledged_writes_outlive_crashes_of_the_server(server: OwnPostgres) -> None:
    async with opened(PostgresDatabase(server.create_database(), pool_size=2)) as database:
        acknowledged: set[str] = set()

        async def keep_writing(round_: int) -> None:
            n = 0
            while True:
                key = f"{round_}-{n}"
                await database.write(
                    [(ADD, [(key, "")]), ("UPDATE notes SET text = $1 WHERE id = $2", [("seen", key)])]
                )
                acknowledged.add(key)
                n += 1

        for round_ in range(5):
            writing = asyncio.create_task(keep_writing(round_))
            await asyncio.sleep(random.uniform(0.02, 0.1))
            server.stop("immediate")
            with pytest.raises(DatabaseUnavailable):
                await writing
            server.start()
            await eventually_counts_at_least(database, len(acknowledged))

        found = {row["id"] for row in await database.fetch("SELECT id FROM notes WHERE text = $1", "seen")}
        assert acknowledged <= found
        assert len(found) == await count(database)


async def eventually_counts_at_least(database: PostgresDatabase, number: int) -> None:
    for _ in range(100):
        try:
            assert await count(database) >= number
            return
        except DatabaseUnavailable:
            await asyncio.sleep(0.05)
    pytest.fail("the database did not come back")


async def test_a_silent_server_holds_nobody(server: OwnPostgres) -> None:
    async with opened(Hasty(server.create_database(), pool_size=2)) as database:
        server.pause()
        answers = await asyncio.gather(
            *(database.fetch("SELECT 1") for _ in range(10)),
            *(database.write([(ADD, [(str(n), "")]), (ADD, [(f"{n} too", "")])]) for n in range(10)),
            return_exceptions=True,
        )
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        causes = {answer.cause for answer in answers if isinstance(answer, DatabaseUnavailable)}
        assert "no answer from PostgreSQL in time" in causes
        assert any(cause.startswith("no connection free") for cause in causes)
        server.resume()

        await eventually_counts(database, 0)
        database.FETCH_TIMEOUT = 2.0
        assert await runs_in_parallel(database, 2)


async def test_closing_does_not_wait_for_a_silent_server(server: OwnPostgres) -> None:
    database = Hasty(server.create_database(), pool_size=2)
    await database.open()
    server.pause()
    await database.close()
    server.resume()


async def test_a_server_that_became_read_only_is_left_for_one_that_writes(server: OwnPostgres) -> None:
    url = server.create_database()
    name = urlsplit(url).path[1:]
    server.admin(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with opened_read_only(PostgresDatabase(url, pool_size=3)) as database:
        assert await runs_in_parallel(database, 3)  # three connections to the read-only server
        server.admin(f"ALTER DATABASE {name} RESET default_transaction_read_only")

        with pytest.raises(ReadOnly):
            await database.write([("CREATE TABLE notes (id TEXT, text TEXT)", [()])])

        for n in range(6):
            await database.write(
                [("CREATE TABLE IF NOT EXISTS notes (id TEXT, text TEXT)", [()]), (ADD, [(str(n), "")])]
            )


@asynccontextmanager
async def opened_read_only(database: PostgresDatabase) -> AsyncIterator[PostgresDatabase]:
    await database.open()
    yield database
    await database.close()


async def test_too_many_connections(server: OwnPostgres) -> None:
    server.admin("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
    url = server.create_database().replace("postgres@", "few@")
    first, second = PostgresDatabase(url, pool_size=1), PostgresDatabase(url, pool_size=1)
    await first.open()
    with pytest.raises(DatabaseUnavailable) as caught:
        await second.open()
    assert "too many connections" in caught.value.cause
    await first.close()
    await second.open()
    await second.close()


async def test_waiting_for_a_free_connection_is_bounded(server: OwnPostgres) -> None:
    async with opened(Hasty(server.create_database(), pool_size=1)) as database:
        async with database.transaction():
            with pytest.raises(DatabaseUnavailable) as caught:
                await database.fetch("SELECT 1")
            assert caught.value.cause.startswith("no connection free")
        assert await count(database) == 0


async def test_a_transaction_that_takes_too_long_is_undone(server: OwnPostgres) -> None:
    async with opened(Hasty(server.create_database(), pool_size=1)) as database:
        with pytest.raises(DatabaseUnavailable):
            await add_and_dawdle(database)
        await eventually_counts(database, 0)


async def add_and_dawdle(database: PostgresDatabase) -> None:
    async with database.transaction() as transaction:
        await transaction.execute(ADD, "a", "")
        await asyncio.sleep(10)


# What the server says

SQLSTATES = {
    "23505": AlreadyThere,
    "23502": RowRejected,
    "22P02": RowRejected,
    "25006": ReadOnly,
    "40001": Conflict,
    "40P01": Conflict,
    "53100": DatabaseUnavailable,
    "53200": DatabaseUnavailable,
    "55P03": DatabaseUnavailable,
    "57014": DatabaseUnavailable,
    "57P01": DatabaseUnavailable,
    "58030": DatabaseUnavailable,
    "XX001": DatabaseUnavailable,
}


@pytest.mark.parametrize(("state", "expected"), SQLSTATES.items())
async def test_whose_fault_an_sqlstate_is(notes: PostgresDatabase, state: str, expected: type[Exception]) -> None:
    raising = f"DO $$ BEGIN RAISE 'it is so' USING ERRCODE = '{state}'; END $$"
    for calling in (notes.fetch(raising), notes.write([(ADD, [("a", "")]), (raising, [()])])):
        with pytest.raises(expected) as caught:
            await calling
        assert type(caught.value) is expected
    assert await count(notes) == 0


async def test_a_nul_byte_is_the_rows_fault(notes: PostgresDatabase) -> None:
    with pytest.raises(RowRejected):
        await notes.write([(ADD, [("a", "nul: \0")])])


async def test_a_number_for_text_is_the_rows_fault_and_not_told(notes: PostgresDatabase) -> None:
    with pytest.raises(RowRejected) as caught:
        await notes.write([(ADD, [("a", 123456)])])
    assert "123456" not in str(caught.value)


async def test_a_failed_write_costs_no_connection(notes: PostgresDatabase) -> None:
    pids = {(await notes.fetch("SELECT pg_backend_pid()"))[0][0]}
    for _ in range(5):
        with pytest.raises(RowRejected):
            await notes.write([(ADD, [("a", "")]), (ADD, [("a", "")])])
        pids.add((await notes.fetch("SELECT pg_backend_pid()"))[0][0])
    assert len(pids) == 1


async def test_a_deadlock_is_tried_again(server: OwnPostgres) -> None:
    url = server.create_database()
    server.admin(f"ALTER DATABASE {urlsplit(url).path[1:]} SET deadlock_timeout = '20ms'")
    async with opened(PostgresDatabase(url, pool_size=2)) as database:
        await database.write([(ADD, [("a", ""), ("b", "")])])
        append = "UPDATE notes SET text = text || $1 WHERE id = $2"
        pause: Step = ("SELECT pg_sleep(0.01)", [()])
        forth: list[Step] = [(append, [("x", "a")]), pause, (append, [("x", "b")])]
        back: list[Step] = [(append, [("y", "b")]), pause, (append, [("y", "a")])]

        for _ in range(10):
            await asyncio.gather(database.write(forth), database.write(back))

        texts = [row["text"] for row in await database.fetch("SELECT text FROM notes")]
        assert [sorted(text) for text in texts] == [sorted("xy" * 10)] * 2
        assert "deadlock detected" in server.log


async def test_an_endless_conflict_is_given_up(notes: PostgresDatabase) -> None:
    await notes.write([("CREATE SEQUENCE attempts", [()])])
    conflict = "DO $$ BEGIN PERFORM nextval('attempts'); RAISE 'again' USING ERRCODE = '40001'; END $$"
    with pytest.raises(Conflict):
        await notes.write([(ADD, [("a", "")]), (conflict, [()])])
    assert (await notes.fetch("SELECT last_value FROM attempts"))[0][0] == PostgresDatabase.ATTEMPTS
    assert await count(notes) == 0


async def test_a_migration_under_a_prepared_statement(notes: PostgresDatabase) -> None:
    everything, add = "SELECT * FROM notes", "INSERT INTO notes (id, text) VALUES ($1, $2) RETURNING *"
    await asyncio.gather(*(notes.fetch(everything) for _ in range(4)))
    await notes.write([(add, [("a", "")]), (add, [("b", "")])])

    await notes.write([("ALTER TABLE notes ADD COLUMN size BIGINT", [()])])

    await notes.write([(add, [("c", "")]), (add, [("d", "")])])
    assert [len(tuple(row)) for row in await notes.fetch(everything)] == [3] * 4  # type: ignore[arg-type]


# Cancelling


async def test_cancelled_reads_leave_the_pool_whole(notes: PostgresDatabase) -> None:
    async def read() -> None:
        await notes.fetch("SELECT pg_sleep($1 / 1000.0)", random.randint(0, 3))

    for _ in range(300):
        reading = [asyncio.create_task(read()) for _ in range(5)]
        await asyncio.sleep(random.uniform(0, 0.006))
        for task in reading:
            task.cancel()
        if random.random() < 0.5:
            await asyncio.sleep(0)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)

    assert await runs_in_parallel(notes, 4)


async def test_a_write_that_is_cancelled_leaves_no_transaction_open(notes: PostgresDatabase) -> None:
    writing = asyncio.create_task(notes.write([(ADD, [("a", "")]), ("SELECT pg_sleep(0.5)", [()]), (ADD, [("b", "")])]))
    await asyncio.sleep(0.2)
    writing.cancel()
    await asyncio.wait([writing])
    assert writing.cancelled()

    await notes.write([("LOCK TABLE notes", [()]), (ADD, [("c", "")])])  # waits until the server has noticed
    assert await count(notes) == 1
    assert await runs_in_parallel(notes, 4)


async def test_cancelling_while_much_is_sent_at_once(server: OwnPostgres) -> None:
    async with opened(PostgresDatabase(server.create_database(), pool_size=2)) as database:
        await migrate(database)
        batch = [usage.insert(usage_row(price="x" * 100_000) for _ in range(count)) for count in (3, 300)]
        await database.write(batch[:1])
        server.pause()
        writing = asyncio.create_task(database.write(batch[1:]))
        await asyncio.sleep(0.3)
        writing.cancel()
        await asyncio.wait([writing])
        server.resume()

        assert writing.cancelled()
        assert await runs_in_parallel(database, 2)
        assert (await database.fetch("SELECT COUNT(*) FROM usage_rows"))[0][0] == 3


async def test_a_batch_that_a_silent_server_does_not_take_ends_in_time(server: OwnPostgres) -> None:
    async with opened(Hasty(server.create_database(), pool_size=2)) as database:
        await migrate(database)
        await database.write([usage.insert([usage_row()])])
        server.pause()
        told = await asyncio.gather(
            *(database.write([usage.insert([usage_row()])]) for _ in range(4)), return_exceptions=True
        )
        assert {type(failure) for failure in told} == {DatabaseUnavailable}
        server.resume()


async def test_cancelling_while_much_is_sent(server: OwnPostgres) -> None:
    """asyncpg swallows such a cancellation and would wait for its time-out."""
    async with opened(PostgresDatabase(server.create_database(), pool_size=2)) as database:
        rows = [(str(n), "x" * 100_000) for n in range(300)]
        await database.write([(ADD, rows[:2])])  # the statement is prepared
        server.pause()
        writing = asyncio.create_task(database.write([(ADD, rows[2:])]))
        await asyncio.sleep(0.3)
        writing.cancel()
        await asyncio.wait([writing])
        server.resume()

        assert writing.cancelled()
        await eventually_counts(database, 2)
        assert await runs_in_parallel(database, 2)


# A pooler in transaction mode


class TransactionPooler:
    """Does to us what pgbouncer does with `pool_mode = transaction`: each transaction runs on another of two sessions
    of the server, and a setting at the start of a session is refused.
    """

    ALLOWED = {"user", "database", "application_name", "client_encoding"}

    def __init__(self, server: Postgres, url: str) -> None:
        self._upstream = urlsplit(server.admin_url)
        self._database = urlsplit(url).path[1:]
        self._sessions: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._greeting = b""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        for _ in range(2):
            self._sessions.put_nowait(await self._log_in())
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener:
            yield f"postgresql://postgres@127.0.0.1:{port}/{self._database}"
            listener.close()
        while not self._sessions.empty():
            self._sessions.get_nowait()[1].close()

    async def _log_in(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        body = struct.pack("!i", 196608) + f"user\0postgres\0database\0{self._database}\0\0".encode()
        writer.write(struct.pack("!i", len(body) + 4) + body)
        self._greeting, message = b"", b""
        while message[:1] != b"Z":
            message = await self._message(reader)
            self._greeting += message
        return reader, writer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._greet(reader, writer)
            while True:
                first = await self._message(reader)
                if first[:1] == b"X":
                    return
                session = await self._sessions.get()
                await self._relay_transaction(first, (reader, writer), session)
                self._sessions.put_nowait(session)  # at the end of the line: the next transaction gets the other
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        code, body = await self._startup(reader)
        if code == 80877103:  # may we use TLS?
            writer.write(b"N")
            code, body = await self._startup(reader)
        words = body.decode().rstrip("\0").split("\0")
        if refused := set(words[::2]) - self.ALLOWED:
            text = f"SFATAL\0C08P01\0Munsupported startup parameter: {refused}\0\0".encode()
            writer.write(b"E" + struct.pack("!i", len(text) + 4) + text)
            raise asyncio.IncompleteReadError(b"", None)
        writer.write(self._greeting)

    async def _relay_transaction(
        self,
        message: bytes,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        session: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        async def answer() -> None:
            while True:
                reply = await self._message(session[0])
                client[1].write(reply)
                if reply == b"Z\0\0\0\5I":
                    return

        answering = asyncio.create_task(answer())
        while not answering.done():
            session[1].write(message)
            asking = asyncio.ensure_future(self._message(client[0]))
            await asyncio.wait([asking, answering], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                asking.cancel()  # nothing was read: the client waits for our answer before it asks again
                await asyncio.wait([asking])
                return
            message = await asking

    async def _startup(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        length, code = struct.unpack("!ii", await reader.readexactly(8))
        return code, await reader.readexactly(length - 8)

    async def _message(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(5)
        return head + await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)


async def test_without_statement_cache_a_pooler_may_change_sessions(server: OwnPostgres) -> None:
    async with (
        TransactionPooler(server, server.create_database()).listening() as url,
        opened(PostgresDatabase(url, pool_size=1, statement_cache=False)) as database,
    ):
        pids = set()
        for n in range(10):
            await database.write([(ADD, [(str(n), "")])])
            await database.write([(ADD, [(f"{n}a", "")]), (ADD, [(f"{n}b", ""), (f"{n}c", "")])])
            with pytest.raises(RowRejected):
                await database.write([(ADD, [(f"{n}d", None)]), (ADD, [(str(n), "")])])
            for _ in range(3):
                pids.add((await database.fetch("SELECT pg_backend_pid(), $1 + 1", n))[0][0])
        assert await count(database) == 40
        assert len(pids) == 2


async def test_finished_turns_through_a_pooler(server: OwnPostgres) -> None:
    url = server.create_database()
    async with opened(PostgresDatabase(url, pool_size=1)) as direct:
        await migrate(direct)
    async with (
        TransactionPooler(server, url).listening() as url,
        opened(PostgresDatabase(url, pool_size=1, statement_cache=False)) as database,
    ):
        for count in (1, 1, 5, 5):
            await database.write([usage.insert(usage_row() for _ in range(count))])
            with pytest.raises(RowRejected):
                await database.write([usage.insert(usage_row(model=None) for _ in range(count))])
        assert (await database.fetch("SELECT COUNT(*) FROM usage_rows"))[0][0] == 12


async def test_with_statement_cache_a_pooler_is_refused_at_once(server: OwnPostgres) -> None:
    async with TransactionPooler(server, server.create_database()).listening() as url:
        with pytest.raises(DatabaseUnavailable) as caught:
            await PostgresDatabase(url, pool_size=1).open()
        assert "unsupported startup parameter" in caught.value.cause


# Where tests get their PostgreSQL from


@pytest.mark.parametrize("way", ["installed", "wheel"])
def test_a_server_of_our_own(way: Way, server: OwnPostgres) -> None:
    own = launch(way)
    try:
        assert own.admin("SHOW server_encoding", database=urlsplit(own.create_database()).path[1:])[0][0] == "UTF8"
    finally:
        own.close()


def test_a_server_that_is_given(server: OwnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", server.admin_url)
    given = launch()
    assert type(given) is Postgres
    name = urlsplit(given.create_database()).path[1:]
    assert server.admin("SELECT current_database()", database=name)[0][0] == name
    given.close()
    assert server.admin(f"SELECT 1 FROM pg_database WHERE datname = '{name}'") == []


def test_no_server_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_DATABASE_URL", raising=False)
    with pytest.raises(RuntimeError, match="TEST_DATABASE_URL is not set"):
        launch("dsn")
    monkeypatch.setattr("tests_standalone.support.postgres.installed_binaries", lambda: iter([Path("/nowhere")]))
    with pytest.raises(RuntimeError, match="no PostgreSQL for tests"):
        find_binaries("installed")


def test_a_durable_server_syncs() -> None:
    durable = OwnPostgres(durable=True)
    assert durable.admin("SHOW fsync")[0][0] == "on"
    durable.close()


START_AND_DIE = """
import os
from tests_standalone.conftest import usage_row
from tests_standalone.support.postgres import OwnPostgres
print(OwnPostgres().socket_folder, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_test_run_leaves_no_server() -> None:
    killed = subprocess.run([sys.executable, "-c", START_AND_DIE], stdout=subprocess.PIPE, text=True, check=False)
    folder = Path(killed.stdout.strip())
    assert folder.is_absolute()
    while folder.exists():
        time.sleep(0.1)
