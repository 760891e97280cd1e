"""The pool: how many connections, in which order, for how long; and that a storm of cancellations leaves it whole."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
from collections import Counter
from functools import partial
from typing import Any

import pytest

from gateway.backends import client_dial
from gateway.backends.client import HTTPTransport
from gateway.backends.client_reply import Reply
from gateway.backends.transport import Access, Timeouts
from gateway.errors import UpstreamError, UpstreamUnreachable
from tests_standalone.backends.certificates import Certificates
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


class TestTenThousand:
    """Calls cancelled at each of the places where they can wait, twice in a row, by the thousand."""

    PLACES = frozenset(
        {"Names.find", "Pool._lease", "Dialer._connect", "HTTPTransport.send", "Reply.read", "Reply.push"}
    )

    async def test_the_pool_is_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seed, count = 20_261_121, 10_000
        print(f"seed {seed}")  # shown if the test fails
        dice = random.Random(seed)
        monkeypatch.setattr(client_dial, "KNOWN_SECONDS", 0.0005)
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _here)
        sockets = _open_sockets()
        places: Counter[str] = Counter()
        async with raw_upstream(partial(_moody, dice)) as upstream:
            client = HTTPTransport(max_connections_per_origin=15)

            async def many() -> None:
                while places.total() < count:
                    await _cancelled_somewhere(client, f"http://upstream.test:{upstream.port}/", dice, places)

            await asyncio.gather(*(many() for _ in range(20)))
            await assert_whole(client)
            ends = await asyncio.gather(*(_patient(client, upstream.url) for _ in range(20)))
            assert ends == [b"0123"] * 20
            await closed(client)
            assert all(pool.leases == len(pool.waiting) == len(pool.sockets) == 0 for pool in client.pools.values())
        assert places.keys() >= self.PLACES
        assert all(places[place] >= 100 for place in self.PLACES), places
        gc.collect()
        assert _open_sockets() == sockets

    @pytest.mark.parametrize("steps", [0, 3], ids=["before it began", "within"])
    async def test_closing_that_is_cancelled_leaves_no_socket(self, certificates: Certificates, steps: int) -> None:
        """Not even to an upstream that has no goodbye for us."""

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.drained()
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is one that reads
            await asyncio.Event().wait()

        client = HTTPTransport(Access(certificates.ca))
        async with raw_upstream(script, tls=certificates.context(certificates.server)) as upstream:
            assert await asyncio.gather(*(call(client, upstream.url) for _ in range(3))) == [b"ok"] * 3
            closing = asyncio.create_task(client.aclose())
            for _ in range(steps):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            for _ in range(3):
                await asyncio.sleep(0)
            assert steps == 0 or not any(pool.sockets for pool in client.pools.values())
            await client.aclose()
            assert not any(pool.sockets for pool in client.pools.values())


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


async def _here(host: str, port: int, **_: Any) -> list[Any]:
    """A name service that takes a moment."""
    await asyncio.sleep(0.0005)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


async def _moody(dice: random.Random, peer: Peer) -> None:
    """Answers at once, in pieces, not at all or not to the end, and hangs up now and then."""
    while True:
        await peer.request()
        mood = "well" if b"patient" in peer.body else dice.choice(["well", "well", "late", "silent", "half", "once"])
        if mood == "silent":
            await peer.gone()
        peer.send(CHUNKED)
        for number in range(4):
            peer.send(b"1\r\n%d\r\n" % number)
            await asyncio.sleep(0.001 if mood == "late" else 0)
            if mood == "half":
                await peer.gone()
        peer.send(b"0\r\n\r\n")
        if mood == "once":
            return


async def _patient(client: HTTPTransport, url: str) -> bytes:
    return await call(client, url, b"patient")


async def _pushed(client: HTTPTransport, url: str) -> bytes:
    """As the relay reads: pieces are taken while the socket is read, then the rest."""
    response = await client.send("POST", url, {}, b"{}", QUICK)
    pieces: list[bytes] = []
    try:
        assert isinstance(response, Reply)
        await response.push(lambda piece: pieces.append(piece) is None)
        return b"".join(pieces) + await response.read_all(1 << 20)
    finally:
        response.close()


async def _cancelled_somewhere(client: HTTPTransport, url: str, dice: random.Random, places: Counter[str]) -> None:
    how = dice.choice([_streamed, _pushed])
    task = asyncio.create_task(how(client, url))
    if dice.random() < 0.5:
        for _ in range(dice.randrange(20)):
            await asyncio.sleep(0)
    else:
        late = "Reply.read" if how is _streamed else "Reply.push"
        for _ in range(40):
            if not task.done() and _waits_in(task) != late:
                await asyncio.sleep(0.0002)
    place = None if task.done() else _waits_in(task)
    task.cancel()
    for _ in range(dice.randrange(3)):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        places[place or "before it began"] += 1
    else:
        assert isinstance(task.exception(), UpstreamError) or task.result() == b"0123"


def _waits_in(task: asyncio.Task[bytes]) -> str | None:
    """The innermost of the client's own functions that the task waits in."""
    found, coroutine = None, task.get_coro()
    while (code := getattr(coroutine, "cr_code", None)) is not None:
        if "gateway" in code.co_filename and code.co_qualname not in ("Reply._wait", "read_whole"):
            found = code.co_qualname
        coroutine = coroutine.cr_await  # type: ignore[union-attr] # it has cr_code
    return found


def _open_sockets() -> int:
    found = 0
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found += os.readlink(f"/proc/self/fd/{file}").startswith("socket:")
    return found
