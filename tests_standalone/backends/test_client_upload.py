"""Bodies that come piece by piece: in HTTP chunks, no faster than the upstream reads, and only while it wants them."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncGenerator

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamError, UpstreamTimeout
from tests_standalone.backends.raw_upstream import OK, QUICK, Peer, answering, assert_whole, raw_upstream, whole


class Pieces:
    """A maker of pieces that notes how far it came, and that it was closed. A piece that is None: it waits for ever."""

    def __init__(self, *pieces: bytes | Exception | None, pause: float = 0) -> None:
        self._pieces = pieces
        self._pause = pause
        self.made = 0
        self.closed = asyncio.Event()

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self._pieces:
                if piece is None:
                    await asyncio.Event().wait()
                if isinstance(piece, Exception):
                    raise piece
                self.made += 1
                yield piece or b""
                await asyncio.sleep(self._pause)
        finally:
            self.closed.set()


async def chunked_body(peer: Peer) -> list[bytes]:
    """The chunks of one request."""
    await peer.request_head()
    found = []
    while size := int(await peer.reader.readuntil(b"\r\n"), 16):
        found.append(await peer.reader.readexactly(size))
        assert await peer.reader.readexactly(2) == b"\r\n"
    assert await peer.reader.readexactly(2) == b"\r\n"
    return found


async def upload(client: HTTPTransport, url: str, pieces: Pieces, limits: Timeouts = QUICK) -> bytes:
    return await whole(await client.send("POST", url, {"x-a": "1"}, pieces(), limits))


async def test_pieces_leave_as_they_come_and_the_connection_serves_again(client: HTTPTransport) -> None:
    got: list[list[bytes]] = []

    async def script(peer: Peer) -> None:
        for _ in range(3):
            got.append(await chunked_body(peer))
            peer.send(OK)
        await peer.gone()

    async with raw_upstream(script) as upstream:
        for pieces in ([b"one", b"", b"two" * 9], [], [b"x" * (3 << 20)]):
            source = Pieces(*pieces)
            assert await upload(client, upstream.url, source) == b"ok"
            assert got[-1] == [piece for piece in pieces if piece]
            assert source.closed.is_set() or not pieces
        assert len(upstream.peers) == 1
        head = upstream.peers[0].head
        assert b"\r\ntransfer-encoding: chunked\r\nx-a: 1\r\n\r\n" in head
        assert b"content-length" not in head


async def test_an_upstream_that_does_not_read_holds_the_maker_up(client: HTTPTransport) -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await go_on.wait()
        assert sum(map(len, await chunked_body(peer))) == 64 << 20
        peer.send(OK)
        await peer.gone()

    source = Pieces(*[b"x" * (64 << 10)] * 1024)
    async with raw_upstream(script) as upstream:
        task = asyncio.create_task(upload(client, upstream.url, source))
        made = -1
        while made != source.made:
            made = source.made
            await asyncio.sleep(0.2)
        assert source.made < 300
        go_on.set()
        assert await task == b"ok"
        assert source.made == 1024


@pytest.mark.parametrize("status", [b"413 No", b"200 OK"])
async def test_a_reply_before_the_end_stops_the_maker(client: HTTPTransport, status: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request_head()
        peer.send(b"HTTP/1.1 %b\r\ncontent-length: 2\r\n\r\nok" % status)
        await peer.gone()

    async with raw_upstream(script) as upstream:
        for _ in range(2):
            source = Pieces(b"one", None)
            response = await client.send("POST", upstream.url, {}, source(), QUICK)
            assert (response.status, await whole(response)) == (int(status[:3]), b"ok")
            await source.closed.wait()
        assert len(upstream.peers) == 2


async def test_a_maker_that_fails_ends_the_call(client: HTTPTransport) -> None:
    async with raw_upstream(answering()) as upstream:
        with pytest.raises(RuntimeError, match="client left"):
            await upload(client, upstream.url, Pieces(b"one", RuntimeError("client left")))
        await assert_whole(client)
        assert not any(pool.sockets for pool in client.pools.values())


async def test_limits_and_broken_connections_stop_the_maker(client: HTTPTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request_head()
        if peer.number:
            await peer.gone()

    async with raw_upstream(script) as upstream:
        for failure in (UpstreamError, UpstreamTimeout):
            source = Pieces(b"one", None)
            with pytest.raises(failure):
                await upload(client, upstream.url, source, Timeouts(first_byte=0.1))
            await source.closed.wait()


async def test_cancelled_anywhere() -> None:
    client, dice = HTTPTransport(max_connections_per_origin=3), random.Random(5)

    async def script(peer: Peer) -> None:
        while True:
            await chunked_body(peer)
            peer.send(OK)

    async with raw_upstream(script) as upstream:

        async def many() -> None:
            for _ in range(60):
                source = Pieces(*[b"x" * 9000] * 20)
                task = asyncio.create_task(upload(client, upstream.url, source))
                for _ in range(dice.randrange(60)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.result() == b"ok"
                if source.made:
                    await source.closed.wait()

        await asyncio.gather(*(many() for _ in range(10)))
        await assert_whole(client)
        assert await upload(client, upstream.url, Pieces(b"one")) == b"ok"
        await client.aclose()
    gc.collect()
