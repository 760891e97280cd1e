"""When a connection is idle for too long. What a peer does not take is tested in test_server.py."""

from __future__ import annotations

import asyncio

from gateway.server_deadlines import IdleDeadline


async def test_idleness_that_lasts_is_told_once() -> None:
    missed = asyncio.Event()
    deadline = IdleDeadline(asyncio.get_running_loop(), 0.01, missed.set)
    deadline.begin()
    await missed.wait()
    missed.clear()
    await asyncio.sleep(0.05)
    assert not missed.is_set()


async def test_each_idleness_has_all_its_time() -> None:
    loop = asyncio.get_running_loop()
    missed: asyncio.Future[float] = loop.create_future()
    deadline = IdleDeadline(loop, 0.1, lambda: missed.set_result(loop.time()))
    deadline.begin()
    await asyncio.sleep(0.06)
    deadline.end()
    deadline.begin()
    began = loop.time()
    assert await missed - began > 0.09


async def test_what_is_not_idle_is_left_alone_until_it_is_again() -> None:
    missed = asyncio.Event()
    deadline = IdleDeadline(asyncio.get_running_loop(), 0.01, missed.set)
    deadline.begin()
    deadline.end()
    await asyncio.sleep(0.05)
    assert not missed.is_set()
    deadline.begin()
    await missed.wait()


async def test_a_stopped_one_tells_nothing() -> None:
    missed = asyncio.Event()
    deadline = IdleDeadline(asyncio.get_running_loop(), 0.01, missed.set)
    deadline.begin()
    deadline.stop()
    await asyncio.sleep(0.05)
    assert not missed.is_set()
