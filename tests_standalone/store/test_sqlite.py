"""What only SQLite has: a file, its neighbours who lock it, and a disk."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import gateway.store.sqlite
from gateway.errors import DatabaseUnavailable
from gateway.store.database import RowRejected, Step
from gateway.store.sqlite import CHARACTERS_HERE, SqliteDatabase
from tests_standalone.support.databases import in_processes

ADD = "INSERT INTO notes (id, text) VALUES ($1, $2)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
async def notes(path: Path) -> AsyncIterator[SqliteDatabase]:
    database = SqliteDatabase(path)
    await database.open()
    await database.write([("CREATE TABLE notes (id TEXT PRIMARY KEY, text TEXT NOT NULL)", [()])])
    yield database
    await database.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.store.sqlite, "BUSY_TIMEOUT", 0.2)


async def count(database: SqliteDatabase) -> int:
    return int((await database.fetch("SELECT COUNT(*) FROM notes"))[0][0])


async def unopenable(path: Path) -> str:
    """The cause that `open` gives; there must be one."""
    with pytest.raises(DatabaseUnavailable) as caught:
        await SqliteDatabase(path).open()
    return caught.value.cause


@contextmanager
def locked_by_another(path: Path) -> Iterator[sqlite3.Connection]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield other
    other.close()


# The file


async def test_the_file_and_its_folder_are_made_for_us_alone(tmp_path: Path) -> None:
    path = tmp_path / "data" / "deep" / "odd name?#%.db"
    database = SqliteDatabase(path)
    await database.open()
    await database.write([("CREATE TABLE t (x TEXT)", [()])])

    modes = {file.name.removeprefix(path.name): stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"": 0o600, "-wal": 0o600, "-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await database.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_the_settings_that_promises_rest_on(notes: SqliteDatabase) -> None:
    async with notes.transaction() as transaction:
        names = ("journal_mode", "synchronous", "foreign_keys")
        settings = [(await transaction.fetch(f"PRAGMA {name}"))[0][0] for name in names]
    assert settings == ["wal", 2, 1]


async def test_a_null_has_an_adapter_so_that_sqlite3_looks_for_none(notes: SqliteDatabase) -> None:
    assert sqlite3.adapters[type(None), sqlite3.PrepareProtocol](None) is None
    (row,) = await notes.fetch("SELECT typeof($1), $2", None, "text")
    assert tuple(row) == ("null", "text")


async def test_a_small_write_while_another_process_writes_waits_for_it_and_not_in_the_loop(
    notes: SqliteDatabase, path: Path
) -> None:
    with locked_by_another(path) as another:
        writing = asyncio.create_task(notes.write([(ADD, [("a", "first")])]))
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert not writing.done()
        another.execute("COMMIT")
        await writing
    assert await count(notes) == 1


async def test_writes_that_nobody_waits_for_are_whole_and_the_next_ones_come_after_them(notes: SqliteDatabase) -> None:
    for number in range(100):
        abandoned = asyncio.create_task(notes.write([(ADD, [(f"a{number}", ""), (f"b{number}", "")])]))
        for _ in range(number % 5):
            await asyncio.sleep(0)
        abandoned.cancel()
        await asyncio.wait({abandoned})
        await notes.write([(ADD, [(f"c{number}", "")])])
    rows = await notes.fetch("SELECT substr(id, 1, 1) AS kind, COUNT(*) AS n FROM notes GROUP BY 1 ORDER BY 1")
    found = {row["kind"]: row["n"] for row in rows}
    assert found["c"] == 100
    assert found.get("a") == found.get("b")


async def test_a_disk_that_is_slow_is_waited_for_by_the_thread(
    notes: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    real = gateway.store.sqlite._do

    def noted(connection: sqlite3.Connection, work: Sequence[Step]) -> None:
        threads.append("loop" if threading.current_thread() is threading.main_thread() else "thread")
        if len(threads) == 2:
            time.sleep(0.04)
        real(connection, work)

    monkeypatch.setattr(gateway.store.sqlite, "_do", noted)
    for number in range(5):
        await notes.write([(ADD, [(f"a{number}", "")])])
    await notes.write([(ADD, [("large", "x" * 200_000)])])
    assert threads == ["loop", "loop", "thread", "thread", "thread", "thread"]
    assert await count(notes) == 6


async def test_fetch_only_reads(notes: SqliteDatabase) -> None:
    with pytest.raises(DatabaseUnavailable, match="does not answer"):
        await notes.fetch(ADD, "a", "")
    assert await count(notes) == 0


def flip(path: Path, page: int) -> None:
    """Turns the head of a page into nonsense."""
    content = bytearray(path.read_bytes())
    head = slice(page * 4096, page * 4096 + 40)
    content[head] = bytes(255 - byte for byte in content[head])
    path.write_bytes(content)


async def test_a_file_that_is_no_database(notes: SqliteDatabase, path: Path) -> None:
    await notes.close()
    flip(path, 0)
    assert "file is not a database. Restore a backup, or save what can be read: sqlite3" in await unopenable(path)


async def test_a_damaged_page_is_found_at_the_start(notes: SqliteDatabase, path: Path) -> None:
    await notes.write([(ADD, [(f"{n:05}", "x" * 100) for n in range(500)])])
    await notes.close()
    flip(path, 4)
    assert ".recover" in await unopenable(path)


async def test_a_path_that_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "unable to open" in await unopenable(tmp_path)
    assert "unable to open" in await unopenable(tmp_path / "file" / "gateway.db")
    assert "Not a directory" in await unopenable(tmp_path / "file" / "deep" / "gateway.db")


async def test_after_a_failure_to_open_it_can_be_opened(notes: SqliteDatabase, path: Path) -> None:
    await notes.close()
    flip(path, 0)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable):
            await notes.open()
    flip(path, 0)
    await notes.open()
    assert await count(notes) == 0


async def test_a_full_disk_refuses_writes_and_nothing_else(notes: SqliteDatabase) -> None:
    await notes.write([(ADD, [("before", "")])])
    async with notes.transaction() as transaction:
        await transaction.execute("PRAGMA max_page_count = 20")  # SQLite then says that the disk is full

    with pytest.raises(DatabaseUnavailable) as caught:
        await notes.write([(ADD, [("much", "x" * 200_000)])])

    assert "database or disk is full" in caught.value.cause
    assert await count(notes) == 1
    async with notes.transaction() as transaction:
        await transaction.execute("PRAGMA max_page_count = 1000000")
    await notes.write([(ADD, [("much", "x" * 200_000)])])
    assert await count(notes) == 2


async def test_after_an_error_of_the_disk_the_file_is_opened_anew(notes: SqliteDatabase) -> None:
    class BrokenDisk(sqlite3.OperationalError):
        sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    def fail(connection: sqlite3.Connection) -> None:
        seen.append(connection)
        raise BrokenDisk("disk I/O error")

    seen: list[sqlite3.Connection] = []
    writer = notes._writer
    assert writer is not None
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable):
            await writer.run(fail)

    assert seen[0] is not seen[1]
    await notes.write([(ADD, [("a", "")])])
    assert await count(notes) == 1


# Neighbours


async def test_reads_go_on_while_somebody_writes(notes: SqliteDatabase, path: Path) -> None:
    with locked_by_another(path):
        assert await count(notes) == 0
    async with notes.transaction() as transaction:
        await transaction.execute(ADD, "a", "")
        assert await count(notes) == 0


async def test_a_write_waits_for_another_process(notes: SqliteDatabase, path: Path) -> None:
    with locked_by_another(path) as other:
        writing = asyncio.create_task(notes.write([(ADD, [("a", "")])]))
        await asyncio.sleep(0.2)
        assert not writing.done()
        other.execute("COMMIT")
        await writing
    assert await count(notes) == 1


async def test_a_write_waits_no_longer_than_busy_timeout(impatient: None, notes: SqliteDatabase, path: Path) -> None:
    with locked_by_another(path):
        with pytest.raises(DatabaseUnavailable) as caught:
            await notes.write([(ADD, [("a", "")])])
        assert "database is locked" in caught.value.cause
    await notes.write([(ADD, [("a", "")])])


async def test_waiting_behind_an_own_transaction_is_bounded_too(impatient: None, notes: SqliteDatabase) -> None:
    async with notes.transaction():
        with pytest.raises(DatabaseUnavailable) as caught:
            await notes.write([(ADD, [("a", "")])])
        assert "another transaction" in caught.value.cause


def open_and_add(number: int, path: Path) -> None:
    async def run() -> None:
        for turn in range(10):
            database = SqliteDatabase(path)
            await database.open()
            await database.write(
                [
                    ("CREATE TABLE IF NOT EXISTS notes (id TEXT PRIMARY KEY, text TEXT NOT NULL)", [()]),
                    (ADD, [(f"{number}-{turn}", "")]),
                ]
            )
            await database.close()

    asyncio.run(run())


async def test_processes_may_make_open_and_close_one_file_at_once(path: Path) -> None:
    in_processes(4, open_and_add, path)

    database = SqliteDatabase(path)
    await database.open()
    assert await count(database) == 40
    await database.close()


async def test_of_rows_that_are_inserted_together_none_stays_if_one_is_refused(notes: SqliteDatabase) -> None:
    rows = [(str(number), "text") for number in range(40)]
    for refused in (("39", None), ("0", "twice")):
        for padding in ("", "x" * CHARACTERS_HERE):  # here and on the thread
            with pytest.raises(RowRejected):
                await notes.write([(ADD, [("first", padding)]), (ADD, [*rows, refused])])
            assert await count(notes) == 0


# Ends


async def test_a_cancelled_write_runs_to_its_end_if_it_has_begun(notes: SqliteDatabase) -> None:
    began, go_on = threading.Event(), threading.Event()

    def hold() -> str:
        began.set()
        go_on.wait()
        return ""

    writer = notes._writer
    assert writer is not None
    await writer.run(lambda connection: connection.create_function("hold", 0, hold))
    large = "x" * CHARACTERS_HERE
    begun = asyncio.create_task(notes.write([(ADD, [("a", large)]), ("UPDATE notes SET text = hold()", [()])]))
    await asyncio.to_thread(began.wait)
    begun.cancel()
    await asyncio.wait([begun])
    waiting = asyncio.create_task(notes.write([(ADD, [("b", "")])]))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait([waiting])
    go_on.set()
    await notes.write([(ADD, [("c", "")])])

    assert begun.cancelled()
    assert waiting.cancelled()
    assert [row["id"] for row in await notes.fetch("SELECT id FROM notes ORDER BY id")] == ["a", "c"]


WRITE_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from gateway.store.sqlite import SqliteDatabase

async def main():
    database = SqliteDatabase(Path(sys.argv[1]))
    await database.open()
    n = 0
    while True:
        rows = [(f"{sys.argv[2]}-{n}-{m}", "x" * 500) for m in range(5)]
        await database.write([("INSERT INTO notes (id, text) VALUES ($1, $2)", rows)])
        print(n, flush=True)
        n += 1

asyncio.run(main())
"""


async def test_a_kill_in_the_middle_loses_no_acknowledged_write(notes: SqliteDatabase, path: Path) -> None:
    for round_ in range(10):
        writing = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), str(round_), stdout=subprocess.PIPE
        )
        assert writing.stdout is not None
        await writing.stdout.readline()
        await asyncio.sleep(random.uniform(0, 0.05))
        writing.kill()
        acknowledged = [0, *map(int, (await writing.stdout.read()).split())]
        await writing.wait()

        found = await notes.fetch("SELECT id FROM notes WHERE id LIKE $1", f"{round_}-%")
        assert {f"{round_}-{n}-{m}" for n in acknowledged for m in range(5)} <= {row["id"] for row in found}
        assert len(found) % 5 == 0
    assert (await notes.fetch("PRAGMA integrity_check"))[0][0] == "ok"


async def test_a_rejected_row_does_not_tell_its_text(notes: SqliteDatabase) -> None:
    with pytest.raises(RowRejected) as caught:
        await notes.write([(ADD, [("a", "private"), ("b", None)])])
    assert str(caught.value) == "NOT NULL constraint failed: notes.text"
