"""Requests on their way out: small and large bodies, upstreams that do not read, replies that come early."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.client_protocol import WRITE_PIECE
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamTimeout
from tests_standalone.backends.raw_upstream import OK, QUICK, Peer, answering, assert_whole, call, raw_upstream, whole

REFUSED = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno!"


class TestBodies:
    @pytest.mark.parametrize("size", [0, 1, WRITE_PIECE, WRITE_PIECE + 1, 3 * WRITE_PIECE, 20 << 20])
    async def test_arrive_whole(self, client: HTTPTransport, size: int) -> None:
        body = os.urandom(size)
        async with raw_upstream(answering(OK, OK)) as upstream:
            for _ in range(2):
                assert await call(client, upstream.url, body) == b"ok"
                assert hashlib.sha256(upstream.peers[0].body).digest() == hashlib.sha256(body).digest()
            assert len(upstream.peers) == 1

    async def test_large_ones_wait_for_a_slow_upstream(self, client: HTTPTransport) -> None:
        """Not the whole body is handed to the transport at once."""
        go_on = asyncio.Event()

        async def script(peer: Peer) -> None:
            await go_on.wait()
            await peer.request()
            peer.send(OK)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            body = b"x" * (64 << 20)
            task = asyncio.create_task(call(client, upstream.url, body))
            await asyncio.sleep(0.2)
            ((connection,),) = (pool.sockets for pool in client.pools.values())
            assert 0 < connection.transport.get_write_buffer_size() <= 2 * WRITE_PIECE
            go_on.set()
            assert await task == b"ok"
            assert upstream.peers[0].body == body

    async def test_an_upstream_that_never_reads(self, client: HTTPTransport) -> None:
        forever = asyncio.Event()

        async def script(peer: Peer) -> None:
            await forever.wait()

        async with raw_upstream(script) as upstream:
            with pytest.raises(UpstreamTimeout):
                await call(client, upstream.url, b"x" * (64 << 20), Timeouts(first_byte=0.1))
            await assert_whole(client)


class TestEarlyReplies:
    """Final replies that come before the body has been sent."""

    @pytest.mark.parametrize("size", [0, 64 << 20])
    async def test_a_refusal_is_read_and_ends_the_sending(self, client: HTTPTransport, size: int) -> None:
        received = -1

        async def script(peer: Peer) -> None:
            nonlocal received
            await peer.request_head()
            peer.send(REFUSED)
            await peer.drained()
            await asyncio.sleep(0.05)
            received = len(await peer.gone())

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"x" * size, QUICK)
            assert (response.status, await whole(response)) == (413, b"no!")
            if size:
                while received < 0:
                    await asyncio.sleep(0.005)
            assert received < 64 << 20

    async def test_a_refused_request_that_was_cut_short_ends_the_connection(self, client: HTTPTransport) -> None:
        """Else what we send next would be read as the rest of its body."""

        async def script(peer: Peer) -> None:
            await peer.request_head()
            peer.send(REFUSED[:-1])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    while await peer.reader.read(1 << 20):
                        pass
            peer.send(REFUSED[-1:])
            await peer.gone()

        async with raw_upstream(script) as upstream:
            for _ in range(2):
                response = await client.send("POST", upstream.url, {}, b"x" * (64 << 20), QUICK)
                assert (response.status, await whole(response)) == (413, b"no!")
            assert len(upstream.peers) == 2

    async def test_a_refusal_by_an_upstream_that_hangs_up(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request_head()
            peer.send(REFUSED)

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"x" * (64 << 20), QUICK)
            assert (response.status, await whole(response)) == (413, b"no!")

    async def test_an_answer_that_begins_while_we_send(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request_head()
            peer.send(OK[:-2])
            await asyncio.sleep(0.05)
            await peer.reader.readexactly(16 << 20)
            peer.send(OK[-2:])
            await peer.gone()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url, b"x" * (16 << 20)) == b"ok"

    async def test_an_answer_to_half_a_request_ends_the_connection(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request_head()
            peer.send(OK)
            await asyncio.sleep(0.1)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            for _ in range(2):
                assert await call(client, upstream.url, b"x" * (64 << 20)) == b"ok"
            assert len(upstream.peers) == 2


class TestSocket:
    async def test_its_options(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            await call(client, upstream.url)
            ((connection,),) = (pool.sockets for pool in client.pools.values())
            option = connection.transport.get_extra_info("socket").getsockopt
            assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    async def test_the_end_of_an_idle_one_is_seen_at_once(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)

        async with raw_upstream(script) as upstream:
            await call(client, upstream.url)
            while any(pool.sockets for pool in client.pools.values()):
                await asyncio.sleep(0.005)

    async def test_a_reset_of_an_idle_one(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.drained()
            await asyncio.sleep(0.02)
            peer.reset()

        async with raw_upstream(script) as upstream:
            await call(client, upstream.url)
            while any(pool.sockets for pool in client.pools.values()):
                await asyncio.sleep(0.005)
