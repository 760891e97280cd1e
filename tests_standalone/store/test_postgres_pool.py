"""Connections in, connections out: no more than so many, none lost, none twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import asyncpg
import pytest

from gateway.errors import DatabaseUnavailable
from gateway.store import postgres_pool
from gateway.store.postgres_pool import Pool
from tests_standalone.conftest import settle
from tests_standalone.support.postgres import Postgres

if TYPE_CHECKING:
    from gateway.store.postgres_pool import Connection


class Line:
    """The way to a server, which can be held up or cut."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.cut = False
        self.open = asyncio.Event()
        self.open.set()

    async def connect(self) -> Connection:
        await self.open.wait()
        if self.cut:
            raise ConnectionRefusedError
        return await asyncpg.connect(self._url)


@pytest.fixture
async def line(postgres: Postgres) -> Line:
    return Line(postgres.admin_url)


@pytest.fixture
async def pool(line: Line) -> AsyncIterator[Pool]:
    pool = Pool(line.connect, 2)
    yield pool
    await pool.close()
    assert (pool.size, pool.busy) == (0, 0)


def soon(work: Callable[[], Awaitable[Connection]]) -> asyncio.Task[Connection]:
    async def run() -> Connection:
        return await work()

    return asyncio.create_task(run())


async def test_connections_are_made_when_none_is_free_and_then_used_again(pool: Pool) -> None:
    assert pool.take_idle() is None
    first = await pool.take()
    second = await pool.take()
    assert first is not second
    assert (pool.size, pool.busy) == (2, 2)
    pool.give(second)
    pool.give(first)
    assert (pool.size, pool.busy) == (2, 0)
    assert [await pool.take(), pool.take_idle(), pool.take_idle()] == [first, second, None]
    pool.give(first)
    pool.give(second)


async def test_who_has_waited_longest_gets_the_next_one(pool: Pool) -> None:
    first, second = await pool.take(), await pool.take()
    waiting = [soon(pool.take) for _ in range(3)]
    await settle()
    pool.give(first)
    pool.give(second)
    assert [await waiting[0], await waiting[1]] == [first, second]
    assert not waiting[2].done()
    pool.give(second)
    assert await waiting[2] is second
    pool.give(first)
    pool.give(second)


async def test_a_dropped_one_makes_place_for_who_waits(pool: Pool) -> None:
    first, second = await pool.take(), await pool.take()
    waiting = soon(pool.take)
    await settle()
    pool.drop(first)
    assert first.is_closed()
    third = await waiting
    assert third not in (first, second)
    assert pool.size == 2
    pool.give(second)
    pool.give(third)


async def test_one_that_has_broken_is_not_given_out(pool: Pool) -> None:
    first = await pool.take()
    pool.give(first)
    first.terminate()
    second = await pool.take()
    assert second is not first
    second.terminate()
    pool.give(second)
    assert pool.size == 0


async def test_it_is_cut_while_the_server_has_ended_one_that_is_free(line: Line) -> None:
    pool = Pool(line.connect, 3)
    oldest, newest, busy = [await pool.take() for _ in range(3)]
    assert not pool.is_cut
    pool.give(oldest)
    pool.give(newest)
    assert not pool.is_cut

    assert await busy.fetchval("SELECT pg_terminate_backend($1, 5000)", oldest.get_server_pid())
    while not oldest.is_closed():
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert pool.is_cut
    assert pool.take_idle() is newest
    assert pool.is_cut
    assert pool.take_idle() is None
    assert (pool.is_cut, pool.size) == (False, 2)

    assert await busy.fetchval("SELECT pg_terminate_backend($1, 5000)", newest.get_server_pid())
    while not newest.is_closed():
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not pool.is_cut, "it was taken"
    pool.give(newest)
    pool.give(busy)
    assert (pool.is_cut, pool.size) == (False, 1)
    await pool.close()


@pytest.mark.parametrize("what", ["a connection", "a place"])
async def test_who_leaves_as_it_is_handed_something_leaves_it_to_the_next(pool: Pool, what: str) -> None:
    first, second = await pool.take(), await pool.take()
    leaves, stays = soon(pool.take), soon(pool.take)
    await settle()
    if what == "a place":
        pool.drop(first)
    else:
        pool.give(first)
    leaves.cancel()
    found = await stays
    assert leaves.cancelled()
    assert (found is first) == (what == "a connection")
    assert pool.size == 2
    pool.give(found)
    pool.give(second)


async def test_who_leaves_while_it_waits_is_passed_over(pool: Pool) -> None:
    first, second = await pool.take(), await pool.take()
    leaves, stays = soon(pool.take), soon(pool.take)
    await settle()
    leaves.cancel()
    await settle()
    pool.give(first)
    assert await stays is first
    pool.give(first)
    pool.give(second)


async def test_a_failure_to_connect_is_told_and_the_next_one_tries(pool: Pool, line: Line) -> None:
    line.open.clear()
    tries = [soon(pool.take) for _ in range(4)]
    await settle()
    assert pool.size == 2
    line.cut = True
    line.open.set()
    told = await asyncio.gather(*tries, return_exceptions=True)
    assert {type(failure) for failure in told} == {ConnectionRefusedError}
    assert pool.size == 0
    line.cut = False
    pool.give(await pool.take())


async def test_leaving_while_it_connects_frees_the_place(pool: Pool, line: Line) -> None:
    line.open.clear()
    tries = [soon(pool.take) for _ in range(3)]
    await settle()
    for leaving in tries[:2]:
        leaving.cancel()
    line.open.set()
    pool.give(await tries[2])
    assert pool.size == 1


async def test_expired_ones_go_at_once_or_when_they_come_back(pool: Pool) -> None:
    free, busy = await pool.take(), await pool.take()
    pool.give(free)
    pool.expire()
    assert (free.is_closed(), busy.is_closed()) == (True, False)
    pool.give(busy)
    assert busy.is_closed()
    fresh = await pool.take()
    pool.give(fresh)
    assert pool.take_idle() is fresh
    pool.give(fresh)


async def test_those_not_needed_are_closed_but_for_one(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "IDLE_SECONDS", 0.02)
    pool = Pool(line.connect, 3)
    taken = [await pool.take() for _ in range(3)]
    for connection in taken:
        pool.give(connection)
    while pool.size > 1:
        await asyncio.sleep(0.005)
    assert [connection.is_closed() for connection in taken] == [True, True, False]
    await pool.close()


async def test_the_last_one_is_not_used_again_after_so_long(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(line.connect, 3)
    old = await pool.take()
    pool.give(old)
    monkeypatch.setattr(postgres_pool, "IDLE_SECONDS", 0.0)
    fresh = await pool.take()
    assert (old.is_closed(), fresh.is_closed()) == (True, False)
    pool.give(fresh)
    await pool.close()


async def test_closing_waits_for_who_is_at_work_and_lets_nobody_in(line: Line) -> None:
    pool = Pool(line.connect, 2)
    free, busy = await pool.take(), await pool.take()
    pool.give(free)
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    with pytest.raises(DatabaseUnavailable):
        await pool.take()
    assert await busy.fetchval("SELECT 1") == 1
    pool.give(busy)
    await closing
    assert (free.is_closed(), busy.is_closed()) == (True, True)


async def test_closing_that_is_cut_short_drops_the_rest(line: Line) -> None:
    pool = Pool(line.connect, 1)
    busy = await pool.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await pool.close()
    assert busy.is_closed()
