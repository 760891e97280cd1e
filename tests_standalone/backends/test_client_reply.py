"""Replies on the wire: their framing, whole and in pieces; how they break; their limits in time and in memory."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from gateway.backends import client_protocol
from gateway.backends.client import HTTPTransport
from gateway.backends.client_head import MAX_HEAD, MAX_HEADERS
from gateway.backends.client_pool import Pool
from gateway.backends.client_reply import HIGH_WATER, Reply, chunk_start
from gateway.backends.transport import Timeouts
from gateway.errors import UpstreamError, UpstreamTimeout
from tests_standalone.backends.raw_upstream import (
    OK,
    QUICK,
    Peer,
    Script,
    answering,
    assert_whole,
    call,
    raw_upstream,
    whole,
)

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"


def sending(*pieces: bytes, pause: float = 0, end: str = "fin") -> Script:
    """One reply in pieces; then the connection is closed, reset, or kept."""

    async def script(peer: Peer) -> None:
        await peer.request()
        for piece in pieces:
            peer.send(piece)
            await asyncio.sleep(pause)
        if end == "rst":
            await peer.drained()
            await asyncio.sleep(0.02)
            peer.reset()
        elif end == "kept":
            await peer.gone()

    return script


async def sockets(client: HTTPTransport) -> int:
    """Open ones, once all has settled."""
    await assert_whole(client)
    return sum(len(pool.sockets) for pool in client.pools.values())


class TestFraming:
    REPLIES = {
        "length": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        "chunks": CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        "extensions": CHUNKED + b'2;a="b"\r\nhe\r\n03\r\nllo\r\n0;x\r\n\r\n',
        "trailers": CHUNKED + b"5\r\nhello\r\n0\r\nx-sum: 1\r\nx-a: 9\r\n\r\n",
        "1xx": b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\nHTTP/1.1 103 Early\r\nlink: </a>\r\n\r\n" + CHUNKED
        + b"5\r\nhello\r\n0\r\n\r\n",
        "HTTP/1.0 with length": b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello",
        "no reason": b"HTTP/1.1 200\r\ncontent-length: 5\r\n\r\nhello",
    }  # fmt: skip

    @pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
    async def test_whole_and_byte_by_byte(self, client: HTTPTransport, reply: bytes) -> None:
        async def script(peer: Peer) -> None:
            for pieces in ([reply], [bytes([byte]) for byte in reply]):
                await peer.request()
                for piece in pieces:
                    peer.send(piece)
                    await asyncio.sleep(0)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            for _ in range(2):
                response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
                assert (response.status, "x-sum" in response.headers, "x" in response.headers) == (200, False, False)
                assert await whole(response) == b"hello"
            assert len(upstream.peers) == 1

    @pytest.mark.parametrize("head", [CLOSED, b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nx: y\r\n\r\n"])
    @pytest.mark.parametrize("body", [b"", b"hello"])
    async def test_up_to_the_end_of_the_connection(self, client: HTTPTransport, head: bytes, body: bytes) -> None:
        async with raw_upstream(sending(head, body, pause=0.01)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert await whole(response) == body
            assert response.at_end()
            assert await sockets(client) == 0

    @pytest.mark.parametrize("head", [b"204 No Content", b"304 Not Modified", b"204 No\r\ncontent-length: 5"])
    async def test_without_a_body(self, client: HTTPTransport, head: bytes) -> None:
        async with raw_upstream(answering(*[b"HTTP/1.1 %s\r\n\r\n" % head] * 2)) as upstream:
            for _ in range(2):
                response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
                assert (response.at_end(), await response.read()) == (True, b"")
            assert len(upstream.peers) == 1

    @pytest.mark.parametrize("framing", [b"content-length: 5", b"transfer-encoding: chunked", b"x: y"])
    async def test_the_reply_to_head(self, client: HTTPTransport, framing: bytes) -> None:
        async with raw_upstream(answering(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing)) as upstream:
            response = await client.send("HEAD", upstream.url, {}, None, QUICK)
            assert (response.at_end(), await response.read()) == (True, b"")
            assert await sockets(client) == 0

    async def test_many_headers_of_one_name(self, client: HTTPTransport) -> None:
        reply = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-b: \xe9\r\nx-a:2\r\ncontent-length: 0\r\nX-a: 3 \r\n\r\n"
        async with raw_upstream(answering(reply)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert response.headers == {"x-a": "1, 2, 3", "x-b": "é", "content-length": "0"}

    async def test_pieces_come_as_they_come(self, client: HTTPTransport) -> None:
        turn = asyncio.Semaphore(0)

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(CHUNKED)
            for number in range(5):
                await turn.acquire()
                peer.send(b"1\r\n%d\r\n" % number)
            await turn.acquire()
            peer.send(b"0\r\n\r\n")
            await peer.gone()

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            for number in range(5):
                turn.release()
                assert await response.read() == b"%d" % number
                assert not response.at_end()
            turn.release()
            assert await response.read() == b""
            assert response.at_end()
            assert len(_pool(client).idle) == 1

    async def test_what_has_come_is_read_in_one_piece(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(CHUNKED + b"1\r\na\r\n" * 1000 + b"0\r\n\r\n")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            while not response.at_end() and _pool(client).leases:
                await asyncio.sleep(0.005)
            assert await response.read() == b"a" * 1000
            assert response.at_end()


class TestBroken:
    """Each of these is an UpstreamError, and its connection is not used again."""

    REPLIES = {
        "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
        "HTML": b"<html>no</html>\r\n\r\n",
        "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
        "no status": b"HTTP/1.1 OK\r\n\r\n",
        "status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
        "status 042": b"HTTP/1.1 042 No\r\n\r\n",
        "protocols switched": b"HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        "101 alone": b"HTTP/1.1 101 Go\r\n\r\n",
        "header without colon": b"HTTP/1.1 200 OK\r\nhello\r\n\r\n",
        "blank in a name": b"HTTP/1.1 200 OK\r\na b: c\r\n\r\n",
        "NUL in a value": b"HTTP/1.1 200 OK\r\na: \x00\r\ncontent-length: 0\r\n\r\n",
        "length no number": b"HTTP/1.1 200 OK\r\ncontent-length: 5x\r\n\r\nhello",
        "length negative": b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",
        "length out of range": b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nhello",
        "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        "length and chunks": CHUNKED[:-2] + b"content-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "length in a trailer": CHUNKED + b"5\r\nhello\r\n0\r\ncontent-length: 5\r\n\r\n",
        "unknown coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "chunk size no number": CHUNKED + b"xyz\r\nhello\r\n",
        "chunk size out of range": CHUNKED + b"fffffffffffffffff\r\nhello\r\n",
        "chunk longer than its size": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n",
        "chunk without its end": CHUNKED + b"5\r\nhelloxx0\r\n\r\n",
        "too many headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * MAX_HEADERS + b"content-length: 0\r\n\r\n",
        "a head of 100 KB": b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000 + b"\r\ncontent-length: 0\r\n\r\n",
        "100 KB of names": b"HTTP/1.1 200 OK\r\n" + b"b" * 100_000 + b": a\r\ncontent-length: 0\r\n\r\n",
    }  # fmt: skip

    @pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
    async def test_malformed(self, client: HTTPTransport, reply: bytes) -> None:
        async with raw_upstream(sending(reply, end="kept")) as upstream:
            with pytest.raises(UpstreamError, match="The connection to the upstream broke") as caught:
                await call(client, upstream.url)
            assert "malformed reply: " in (caught.value.log or "")
            assert await sockets(client) == 0

    @pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\na: ", b"HTTP/1.1 ", b"HTTP/1.1 200 ", CHUNKED + b"0\r\nx: ",
                                       CHUNKED + b"5;"])  # fmt: skip
    async def test_a_head_or_a_trailer_without_end(self, client: HTTPTransport, start: bytes) -> None:
        sent = 0

        async def script(peer: Peer) -> None:
            nonlocal sent
            await peer.request()
            peer.send(start)
            while True:
                peer.send(b"b" * 4096)
                sent += 4096
                await peer.drained()

        async with raw_upstream(script) as upstream:
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url)
            assert sent >= MAX_HEAD or start == b"HTTP/1.1 "

    async def test_informative_replies_without_end(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(*[b"HTTP/1.1 103 Hint\r\na: b\r\n\r\n" * 1000] * 100, end="kept")) as upstream:
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url)

    @pytest.mark.parametrize("end", ["fin", "rst"])
    @pytest.mark.parametrize(
        "reply",
        [b"", b"HTTP", b"HTTP/1.1 200 OK\r\n", OK[:-2], OK[:-1], CHUNKED, CHUNKED + b"5\r\nhel", CHUNKED + b"5",
         CHUNKED + b"5\r\nhello\r\n", CHUNKED + b"5\r\nhello\r\n0\r\n", CHUNKED + b"0\r\nx: "],
    )  # fmt: skip
    async def test_cut_short(self, client: HTTPTransport, reply: bytes, end: str) -> None:
        async with raw_upstream(sending(reply, end=end)) as upstream:
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url)
            assert await sockets(client) == 0

    async def test_what_came_before_the_break_can_be_read(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(CHUNKED + b"5\r\nhello\r\n", b"nonsense\r\n", pause=0.02)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            await asyncio.sleep(0.05)
            assert await response.read() == b"hello"
            assert not response.at_end()
            for _ in range(2):
                with pytest.raises(UpstreamError, match="broke"):
                    await response.read()

    async def test_a_reset_does_not_end_a_reply_without_length(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(CLOSED + b"hel", end="rst")) as upstream:
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url)

    @pytest.mark.parametrize("junk", [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyou", b"junk", b"\x00"])
    @pytest.mark.parametrize("pause", [0, 0.02])
    async def test_bytes_after_the_reply(self, client: HTTPTransport, junk: bytes, pause: float) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK if pause else OK + junk)
            await asyncio.sleep(pause)
            if pause:
                peer.send(junk)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url) == b"ok"
            await asyncio.sleep(pause * 2)
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 2


class TestWhole:
    """A reply that has come already is read as one that is still coming."""

    @pytest.mark.parametrize("pause", [0, 0.02])
    async def test_up_to_a_limit(self, client: HTTPTransport, pause: float) -> None:
        reply = (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", b"lo")
        async with raw_upstream(sending(*reply, pause=pause, end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert await response.read_all(5) == b"hello"
            assert response.at_end()
            assert await response.read_all(5) == b""

    @pytest.mark.parametrize("pause", [0, 0.02])
    async def test_and_no_further(self, client: HTTPTransport, pause: float) -> None:
        reply = (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", b"lo")
        async with raw_upstream(sending(*reply, pause=pause, end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            with pytest.raises(UpstreamError, match="too large"):
                await response.read_all(4)

    @pytest.mark.parametrize("pause", [0, 0.02])
    async def test_not_what_broke(self, client: HTTPTransport, pause: float) -> None:
        reply = (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhel", b"lo")
        async with raw_upstream(sending(*reply, pause=pause)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            await asyncio.sleep(2 * pause)
            with pytest.raises(UpstreamError, match="broke"):
                await response.read_all(9)


class TestClose:
    async def test_before_the_end_the_connection_is_dropped(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:-1], end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            response.close()
            response.close()
            with pytest.raises(UpstreamError):
                await response.read()
            assert not response.at_end()
            assert await sockets(client) == 0

    async def test_after_the_end_it_is_kept(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            await response.read_all(9)
            response.close()
            response.close()
            assert await sockets(client) == 1

    async def test_late_and_by_mistake_it_does_not_touch_the_next_call(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.request()
            await asyncio.sleep(0.05)
            peer.send(OK)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            first = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            await first.read_all(9)
            second = asyncio.create_task(call(client, upstream.url))
            await asyncio.sleep(0.01)
            first.close()
            assert await second == b"ok"
            assert len(upstream.peers) == 1

    async def test_a_waiting_read_ends(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:-2], end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            reading = asyncio.create_task(response.read())
            await asyncio.sleep(0.01)
            response.close()
            with pytest.raises(UpstreamError):
                await reading

    async def test_two_readers_are_a_mistake(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:-2], end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            reading = asyncio.create_task(response.read())
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError):
                await response.read()
            response.close()
            with pytest.raises(UpstreamError):
                await reading


class TestTime:
    async def test_no_first_byte(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(b"HTTP/1.1 200 OK\r\n", end="kept")) as upstream:
            started = time.monotonic()
            with pytest.raises(UpstreamTimeout, match="in time") as caught:
                await call(client, upstream.url, limits=Timeouts(first_byte=0.1, idle=30))
            assert time.monotonic() - started >= 0.1
            assert caught.value.log == "no reply in time"
            assert await sockets(client) == 0

    async def test_silence_within_the_body(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:-1], end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", Timeouts(first_byte=30, idle=0.1))
            assert await response.read() == b"o"
            started = time.monotonic()
            with pytest.raises(UpstreamTimeout, match="in time") as caught:
                await response.read()
            assert time.monotonic() - started >= 0.1 - client_protocol._TICK
            assert "silence for 0.1 s" in (caught.value.log or "")
            assert await sockets(client) == 0

    async def test_slow_is_not_silent(self, client: HTTPTransport) -> None:
        reply = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n", *[b"x"] * 10
        async with raw_upstream(sending(*reply, pause=0.05)) as upstream:
            assert await call(client, upstream.url, limits=Timeouts(first_byte=0.3, idle=0.3)) == b"x" * 10

    async def test_while_nobody_reads_no_clock_runs(self, client: HTTPTransport) -> None:
        more = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK[:-2])
            await more.wait()
            peer.send(OK[-2:])
            await peer.gone()

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", Timeouts(first_byte=0.1, idle=0.1))
            await asyncio.sleep(0.4)
            more.set()
            assert await whole(response) == b"ok"

    async def test_back_pressure_is_not_silence(self, client: HTTPTransport) -> None:
        async with raw_upstream(_flood(8 << 20)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", Timeouts(idle=0.15))
            await asyncio.sleep(0.4)
            assert len(await whole(response)) == 8 << 20

    @pytest.mark.parametrize("idle", [10, None])
    async def test_the_limit_on_the_whole(self, client: HTTPTransport, idle: float | None) -> None:
        reply = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", *[b"x"] * 1000
        async with raw_upstream(sending(*reply, pause=0.01)) as upstream:
            with pytest.raises(UpstreamTimeout) as caught:
                await call(client, upstream.url, limits=Timeouts(first_byte=idle, idle=idle, total=0.2))
            assert "in total" in (caught.value.log or "")

    async def test_the_limit_on_the_whole_runs_while_nobody_reads(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:-2], end="kept")) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", Timeouts(total=0.1))
            assert await sockets(client) == 0
            with pytest.raises(UpstreamTimeout):
                await response.read()

    async def test_no_limits(self, client: HTTPTransport) -> None:
        async with raw_upstream(sending(OK[:20], OK[20:-1], OK[-1:], pause=0.05)) as upstream:
            assert await call(client, upstream.url, limits=Timeouts(None, None, None, None)) == b"ok"

    async def test_limits_of_the_call_before_are_forgotten(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.request()
            await asyncio.sleep(0.4)
            peer.send(OK)
            await peer.gone()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url, limits=Timeouts(first_byte=0.2, idle=0.2, total=0.2)) == b"ok"
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 1


class TestBackPressure:
    async def test_who_does_not_read_pauses_the_upstream(self, client: HTTPTransport) -> None:
        sent = [0]
        async with raw_upstream(_flood(50 << 20, sent)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            size = 0
            for _ in range(3):
                before = -1
                while before != sent[0]:
                    before = sent[0]
                    await asyncio.sleep(0.1)
                assert sent[0] - size < 24 << 20  # what two sockets hold
                piece = await response.read()
                assert HIGH_WATER < len(piece) <= HIGH_WATER + (256 << 10)
                size += len(piece)
            while piece := await response.read():
                size += len(piece)
            assert size == 50 << 20
            response.close()
            assert await sockets(client) == 1

    async def test_who_leaves_while_it_is_paused(self, client: HTTPTransport) -> None:
        async with raw_upstream(_flood(50 << 20)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            await asyncio.sleep(0.1)
            response.close()
            assert await sockets(client) == 0

    async def test_a_reply_that_fits_need_not_be_read_for_the_next_call(self, client: HTTPTransport) -> None:
        reply = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % HIGH_WATER + b"x" * HIGH_WATER
        async with raw_upstream(answering(reply, OK)) as upstream:
            first = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            while _pool(client).leases:
                await asyncio.sleep(0.005)
            assert await call(client, upstream.url) == b"ok"
            assert await whole(first) == b"x" * HIGH_WATER
            assert len(upstream.peers) == 1


def _flood(size: int, sent: list[int] | None = None) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            peer.send(b"x" * (1 << 16))
            await peer.drained()
            if sent is not None:
                sent[0] += 1 << 16
        await peer.gone()

    return script


def _pool(client: HTTPTransport) -> Pool:
    (pool,) = client.pools.values()
    return pool


class Line:
    """A connection of which only its end is looked at."""

    kept: bool | None = None

    def due(self, at: float) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop_sending(self) -> None: ...

    def retire(self, reply: Reply) -> None: ...

    def finish(self, keep: bool) -> None:
        self.kept = keep

    def drop(self) -> None:
        self.kept = False


class TestPush:
    """What is handed over while the socket is read is what `read` would give, however the two take turns."""

    PAYLOADS = (b"data: x\n\n", b"x" * 300, b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"a")
    """Some look like the framing that they are in."""

    async def test_pushed_and_read_in_turns(self) -> None:
        seed = random.randrange(1 << 32)
        print("seed", seed)
        dice = random.Random(seed)
        for _ in range(400):
            body = dice.choices(self.PAYLOADS, k=dice.randrange(1, 9))
            await self._try(
                dice, body, b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in body) + b"0\r\n\r\n"
            )

    def test_how_a_chunk_begins_is_told_by_its_length(self) -> None:
        sizes = [*range(1, 5000), 65535, 65536, 1 << 20]
        starts = {len(_chunk(b"x" * size)): b"%x\r\n" % size for size in sizes}
        assert {length: chunk_start(length) for length in starts} == starts
        none = [length for length in range(max(sizes[:-3])) if length not in starts]
        assert [chunk_start(length) for length in none] == [b""] * len(none)

    @pytest.mark.parametrize("chunk", [b"00a\r\n0123456789\r\n", b"A\r\n0123456789\r\n", b"a;x=y\r\n0123456789\r\n"])
    async def test_a_size_may_be_written_in_other_ways(self, chunk: bytes) -> None:
        line, got = Line(), list[bytes]()
        reply = self._reply(line)
        pushing = asyncio.create_task(reply.push(lambda piece: len(got) < 3 and got.append(piece) is None))
        await asyncio.sleep(0)
        reply.feed(b"2\r\nok\r\n")
        reply.feed(chunk)
        reply.feed(b"a\r\n0123456789\r\n")
        reply.feed(b"0\r\n\r\n")
        assert await _ended(pushing)
        assert (got, line.kept) == ([b"ok", b"0123456789", b"0123456789"], True)

    async def test_a_chunk_within_a_chunk_is_its_content(self) -> None:
        """The first half is read; the other, which looks like a whole chunk, comes while the reply is pushed."""
        line, got = Line(), list[bytes]()
        reply = self._reply(line)
        pushing = asyncio.create_task(reply.push(lambda piece: got.append(piece) is not None))
        await asyncio.sleep(0)
        reply.feed(b"2\r\nok\r\n")
        await pushing
        reply.feed(b"c\r\n12")
        assert await reply.read() == b"12"
        pushing = asyncio.create_task(reply.push(lambda piece: got.append(piece) is None))
        await asyncio.sleep(0)
        reply.feed(b"5\r\nhello\r\n")
        reply.feed(b"\r\n0\r\n\r\n")
        assert await _ended(pushing)
        assert (b"".join(got), line.kept) == (b"ok5\r\nhello\r\n", True)

    async def test_a_lane_is_asked_for_between_chunks_and_forgotten_with_the_push(self) -> None:
        line, got = Line(), list[bytes]()
        reply = self._reply(line)
        pushing = asyncio.create_task(reply.push(lambda piece: got.append(piece) is None, lambda _: got.remove))  # type: ignore[arg-type,return-value] # any function
        await asyncio.sleep(0)
        assert reply.lane is None
        for data, found in ((b"2\r\nok\r\n", True), (b"4\r\nhal", False), (b"f\r\n", False), (b"1\r\nx\r\n", True)):
            reply.feed(data)
            assert (reply.lane is not None) == found
        pushing.cancel()
        await asyncio.wait([pushing])
        assert reply.lane is None

    async def _try(self, dice: random.Random, body: list[bytes], wire: bytes) -> None:
        line, got = Line(), list[bytes]()
        reply = self._reply(line)

        def take(piece: bytes) -> bool:
            got.append(piece)
            return dice.random() < 0.7

        async def consume() -> None:
            while True:
                await reply.push(take)
                for _ in range(dice.randrange(1, 3)):
                    piece = await reply.read()
                    if not piece:
                        return
                    got.append(piece)

        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        cuts = sorted({0, len(wire), *(_chunk_ends(body)), *dice.choices(range(len(wire)), k=dice.randrange(5))})
        for start, end in pairwise(cuts):
            reply.feed(wire[start:end])
            if dice.random() < 0.8:
                await asyncio.sleep(0)
        assert await _ended(task), (wire, cuts)
        assert (b"".join(got), line.kept) == (b"".join(body), True)

    @staticmethod
    def _reply(line: Line) -> Reply:
        loop = asyncio.get_running_loop()
        reply = Reply(line, loop, bodiless=False, timeouts=Timeouts(), end=math.inf)
        reply.feed(CHUNKED)
        return reply


def _chunk_ends(body: list[bytes]) -> Iterator[int]:
    at = 0
    for piece in body:
        at += len(_chunk(piece))
        yield at


async def _ended(task: asyncio.Task[None]) -> bool:
    """Without another byte."""
    for _ in range(50):
        await asyncio.sleep(0)
    task.cancel()
    return task.done()


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)
