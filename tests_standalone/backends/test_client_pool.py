"""The pool: how many connections, in which order, for how long; and that a storm of cancellations leaves it whole."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamError, UpstreamUnreachable
from tests_standalone.backends.raw_upstream import OK, QUICK, Peer, answering, assert_whole, call, raw_upstream, whole

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def closed(client: HTTPTransport) -> None:
    await assert_whole(client)
    await client.aclose()


class TestCap:
    async def test_at_most_so_many_and_in_order(self) -> None:
        client = HTTPTransport(max_connections_per_origin=3)
        order: list[bytes] = []
        busy = most = 0

        async def script(peer: Peer) -> None:
            nonlocal busy, most
            while True:
                await peer.request()
                busy += 1
                most = max(most, busy)
                order.append(peer.body)
                await asyncio.sleep(0.002)
                busy -= 1
                peer.send(OK)

        async with raw_upstream(script) as upstream:
            bodies = [b"%d" % number for number in range(60)]
            await asyncio.gather(*(call(client, upstream.url, body) for body in bodies))
            assert sorted(order[:3]) == bodies[:3]
            assert all(abs(int(body) - place) <= 3 for place, body in enumerate(order))
            assert (most, len(upstream.peers)) == (3, 3)
            await closed(client)

    async def test_waiting_for_one_counts_as_connecting(self) -> None:
        client = HTTPTransport(max_connections_per_origin=1)
        async with raw_upstream(answering()) as upstream:
            running = asyncio.create_task(call(client, upstream.url))
            await asyncio.sleep(0.01)
            with pytest.raises(UpstreamUnreachable):
                await call(client, upstream.url, limits=Timeouts(connect=0.05))
            running.cancel()
            await asyncio.wait([running])
            await closed(client)

    async def test_a_connection_that_breaks_lets_the_next_one_in(self) -> None:
        client = HTTPTransport(max_connections_per_origin=1)

        async def script(peer: Peer) -> None:
            await peer.request()

        async with raw_upstream(script) as upstream:
            ended = await asyncio.gather(*(call(client, upstream.url) for _ in range(10)), return_exceptions=True)
            assert all(isinstance(failure, UpstreamError) for failure in ended)
            assert len(upstream.peers) == 10
            await closed(client)

    async def test_connecting_that_fails_lets_the_next_one_in(self) -> None:
        client = HTTPTransport(max_connections_per_origin=1)
        calls = (call(client, "http://127.0.0.1:1/") for _ in range(10))
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(failure, UpstreamUnreachable)
        await closed(client)

    async def test_origins_do_not_share(self) -> None:
        client = HTTPTransport(max_connections_per_origin=1)
        async with raw_upstream(answering(OK)) as one, raw_upstream(answering(OK)) as other:
            held = await client.send("POST", one.url, {}, b"", QUICK)
            assert await call(client, other.url) == b"ok"
            held.close()
            await closed(client)


class TestIdle:
    async def test_for_so_long(self) -> None:
        client = HTTPTransport(idle_seconds=0.1)
        async with raw_upstream(answering(*[OK] * 9)) as upstream:
            for _ in range(4):
                await call(client, upstream.url)
                await asyncio.sleep(0.05)
            assert len(upstream.peers) == 1
            (pool,) = client.pools.values()
            while pool.sockets:
                await asyncio.sleep(0.005)
            await call(client, upstream.url)
            assert len(upstream.peers) == 2
            await closed(client)

    async def test_the_last_one_used_is_used_next_so_that_the_others_expire(self) -> None:
        client = HTTPTransport(idle_seconds=0.2)
        async with raw_upstream(answering(*[OK] * 99)) as upstream:
            await asyncio.gather(*(call(client, upstream.url) for _ in range(5)))
            (pool,) = client.pools.values()
            assert len(pool.idle) == 5
            while len(pool.idle) > 1:
                await call(client, upstream.url)
                await asyncio.sleep(0.01)
            await call(client, upstream.url)
            assert len(upstream.peers) == 5
            await closed(client)

    async def test_a_long_call_is_not_idle(self) -> None:
        client = HTTPTransport(idle_seconds=0.05)

        async def script(peer: Peer) -> None:
            for _ in range(2):
                await peer.request()
                await asyncio.sleep(0.2)
                peer.send(OK)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url) == b"ok"
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 1
            await closed(client)


class TestStorm:
    """Calls cancelled at every point, twice in a row, by the thousand. Warnings are errors: nothing may be left."""

    @pytest.mark.parametrize("most", [1, 3, 1000])
    async def test_cancelled_after_any_number_of_steps(self, most: int) -> None:
        client = HTTPTransport(max_connections_per_origin=most)
        async with raw_upstream(_talkative) as upstream:
            for steps in range(60):
                tasks = [asyncio.create_task(_streamed(client, upstream.url)) for _ in range(6)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                await _cancel_twice(tasks)
            await assert_whole(client)
            assert await call(client, upstream.url) == b"0123456789"
            await closed(client)
        gc.collect()

    @pytest.mark.parametrize("most", [2, 8])
    async def test_cancelled_at_random(self, most: int) -> None:
        client = HTTPTransport(max_connections_per_origin=most)
        dice = random.Random(7)
        async with raw_upstream(_talkative) as upstream:

            async def one() -> None:
                task = asyncio.create_task(_streamed(client, upstream.url))
                await asyncio.sleep(dice.random() * 0.01)
                await _cancel_twice([task])

            async def many() -> None:
                for _ in range(60):
                    await one()

            await asyncio.gather(*(many() for _ in range(20)))
            await assert_whole(client)
            assert await asyncio.gather(*(call(client, upstream.url) for _ in range(20))) == [b"0123456789"] * 20
            await closed(client)
        gc.collect()

    async def test_cancelled_while_names_are_looked_up(self) -> None:
        client = HTTPTransport(max_connections_per_origin=4)
        for steps in range(30):
            tasks = [asyncio.create_task(call(client, "http://no-such-host.invalid/")) for _ in range(8)]
            for _ in range(steps):
                await asyncio.sleep(0)
            await _cancel_twice(tasks)
        await closed(client)
        gc.collect()


async def _talkative(peer: Peer) -> None:
    while True:
        await peer.request()
        peer.send(CHUNKED)
        for number in range(10):
            peer.send(b"1\r\n%d\r\n" % number)
            await asyncio.sleep(0)
        peer.send(b"0\r\n\r\n")


async def _streamed(client: HTTPTransport, url: str) -> bytes:
    return await whole(await client.send("POST", url, {}, b"{}", QUICK))


async def _cancel_twice(tasks: list[asyncio.Task[bytes]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, (UpstreamError, asyncio.CancelledError)) or ended == b"0123456789"
