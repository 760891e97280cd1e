"""Compressed replies: whole, byte by byte, broken, and bombs."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.client_inflate import FREE, PIECE, Inflater
from gateway.errors import UpstreamError
from tests_standalone.backends.raw_upstream import QUICK, Peer, answering, assert_whole, call, raw_upstream

TEXT = bytes(random.Random(1).choices(b"abcdefgh ", k=300_000))
ENCODED = {
    # Without the time of day, or the names of cases would hold it, and each of pytest's processes has other cases.
    "gzip": gzip.compress(TEXT, mtime=0),
    "x-gzip": gzip.compress(TEXT, mtime=0),
    "deflate": zlib.compress(TEXT),
}


def bare(text: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(text) + stream.flush()


def inflated(encoding: str, *pieces: bytes) -> bytes:
    inflater = Inflater(encoding)
    made = []
    for piece in pieces:
        inflater.feed(piece)
        while found := inflater.take():
            assert len(found) <= PIECE
            made.append(found)
        assert inflater.dry()
    inflater.end()
    return b"".join(made)


class TestInflater:
    @pytest.mark.parametrize("encoding", ENCODED)
    def test_whole(self, encoding: str) -> None:
        assert inflated(encoding, ENCODED[encoding]) == TEXT

    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("gzip", gzip.compress(b"hello, " * 9, mtime=0)),
            ("deflate", zlib.compress(b"hello, " * 9)),
            ("deflate", bare(b"hello, " * 9)),
        ],
    )
    def test_byte_by_byte(self, encoding: str, data: bytes) -> None:
        assert inflated(encoding, *(bytes([byte]) for byte in data)) == b"hello, " * 9

    @pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, PIECE + 200, 2 * PIECE, 3 * PIECE + 258])
    @pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, bare])
    def test_sizes_around_a_piece(self, size: int, pack: type) -> None:
        encoding = "gzip" if pack is gzip.compress else "deflate"  # type: ignore[comparison-overlap] # a function
        assert inflated(encoding, pack(b"a" * size)) == b"a" * size

    def test_members_one_after_another(self) -> None:
        assert inflated("gzip", gzip.compress(b"one, ") + gzip.compress(b"two")) == b"one, two"

    def test_what_was_flushed_is_given_at_once(self) -> None:
        stream = zlib.compressobj(wbits=31)
        inflater = Inflater("gzip")
        for event in (b"data: 1\n\n", b"data: 2\n\n"):
            inflater.feed(stream.compress(event) + stream.flush(zlib.Z_SYNC_FLUSH))
            assert inflater.take() == event

    def test_nothing_at_all(self) -> None:
        assert inflated("gzip") == b""

    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("gzip", b"plain text"),
            ("deflate", b"\xffplain text"),
            ("gzip", ENCODED["gzip"][:-9]),
            ("gzip", ENCODED["gzip"][:5]),
            ("gzip", ENCODED["gzip"] + b"junk"),
            ("gzip", ENCODED["gzip"][:-8] + b"checksum"),
            ("deflate", ENCODED["deflate"] + b"junk"),
            ("deflate", ENCODED["deflate"][:-4]),
        ],
    )
    def test_what_is_broken(self, encoding: str, data: bytes) -> None:
        with pytest.raises(ValueError, match=r"Error -|cut short|bytes follow"):
            inflated(encoding, data)

    def test_a_bomb(self) -> None:
        bomb = gzip.compress(b"\0" * (100 << 20))
        inflater = Inflater("gzip")
        inflater.feed(bomb)
        pieces = iter(inflater.take, b"")
        assert sum(len(next(pieces)) for _ in range(FREE // PIECE)) == FREE
        with pytest.raises(ValueError, match="expand"):
            list(pieces)


class TestOverTheWire:
    @pytest.mark.parametrize("encoding", [*ENCODED, "GZIP"])
    async def test_a_reply(self, client: HTTPTransport, encoding: str) -> None:
        data = ENCODED[encoding.lower()]
        head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %s\r\ncontent-length: %d\r\n\r\n" % (encoding.encode(), len(data))
        async with raw_upstream(answering(head + data, head + data)) as upstream:
            for _ in range(2):
                assert await call(client, upstream.url) == TEXT
            assert len(upstream.peers) == 1

    async def test_events_as_they_come(self, client: HTTPTransport) -> None:
        more = asyncio.Event()
        stream = zlib.compressobj(wbits=31)

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n")
            peer.send(stream.compress(b"data: 1\n\n") + stream.flush(zlib.Z_SYNC_FLUSH))
            await more.wait()
            peer.send(stream.compress(b"data: 2\n\n") + stream.flush())

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert await response.read() == b"data: 1\n\n"
            assert not response.at_end()
            more.set()
            assert await response.read() == b"data: 2\n\n"
            assert await response.read() == b""
            assert response.at_end()
            response.close()

    @pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip"])
    async def test_encodings_that_nobody_asked_for(self, client: HTTPTransport, encoding: bytes) -> None:
        reply = b"HTTP/1.1 200 OK\r\ncontent-encoding: %s\r\ncontent-length: 2\r\n\r\nok" % encoding
        async with raw_upstream(answering(reply)) as upstream:
            with pytest.raises(UpstreamError, match="broke") as caught:
                await call(client, upstream.url)
            assert "not asked for" in (caught.value.log or "")

    async def test_a_bomb_never_expands_and_its_connection_goes(self, client: HTTPTransport) -> None:
        bomb = gzip.compress(b"\0" * (50 << 20)) * 4
        reply = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % (len(bomb) + 1) + bomb
        async with raw_upstream(answering(reply)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert len(await response.read()) == PIECE
            with pytest.raises(UpstreamError, match="broke"):
                await response.read_all(50 << 20)
            with pytest.raises(UpstreamError):
                await response.read()
            await assert_whole(client)
            assert not any(pool.sockets for pool in client.pools.values())

    async def test_cut_short(self, client: HTTPTransport) -> None:
        data = ENCODED["gzip"][:-1]
        reply = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        async with raw_upstream(answering(reply)) as upstream:
            with pytest.raises(UpstreamError) as caught:
                await call(client, upstream.url)
            assert "cut short" in (caught.value.log or "")

    @pytest.mark.parametrize("reply", [b"204 No", b"304 Not", b"200 OK\r\ncontent-length: 0"])
    async def test_no_body(self, client: HTTPTransport, reply: bytes) -> None:
        async with raw_upstream(answering(b"HTTP/1.1 %s\r\ncontent-encoding: gzip\r\n\r\n" % reply)) as upstream:
            assert await call(client, upstream.url) == b""
