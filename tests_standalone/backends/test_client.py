"""The client as its callers see it: what leaves, what comes back, and which failure says what."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.transport import Timeouts
from gateway.errors import UNSENT, NeverSent, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from tests_standalone.backends.raw_upstream import (
    OK,
    QUICK,
    Peer,
    answering,
    assert_whole,
    call,
    deaf,
    raw_upstream,
    whole,
)


class TestExchange:
    async def test_request_and_reply(self, client: HTTPTransport) -> None:
        reply = b"HTTP/1.1 201 Made\r\nContent-Type: text/plain\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 5\r\n\r\nhello"
        async with raw_upstream(answering(reply)) as upstream:
            response = await client.send("POST", upstream.url + "?q=1", {"X-Key": "v"}, b'{"a":1}', QUICK)
            assert (response.status, response.headers["content-type"], response.headers["x-a"]) == (
                201,
                "text/plain",
                "1, 2",
            )
            assert not response.at_end()
            assert await response.read() == b"hello"
            assert response.at_end()
            assert await response.read() == b""
            response.close()
        assert upstream.peers[0].body == b'{"a":1}'
        host = f"127.0.0.1:{upstream.port}".encode()
        assert upstream.peers[0].head == (
            b"POST /v1/chat?q=1 HTTP/1.1\r\nhost: " + host + b"\r\ncontent-length: 7\r\nX-Key: v\r\n\r\n"
        )

    async def test_a_connection_serves_one_call_after_another(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(*[OK] * 5)) as upstream:
            assert [await call(client, upstream.url) for _ in range(5)] == [b"ok"] * 5
            assert len(upstream.peers) == 1

    async def test_calls_at_the_same_time_have_a_connection_each(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            assert await asyncio.gather(*(call(client, upstream.url) for _ in range(20))) == [b"ok"] * 20
            assert len(upstream.peers) == 20

    async def test_a_reply_that_is_too_large(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            response = await client.send("POST", upstream.url, {}, b"", QUICK)
            with pytest.raises(UpstreamError, match="too large"):
                await response.read_all(1)

    async def test_a_redirect_is_a_reply_like_any_other(self, client: HTTPTransport) -> None:
        reply = b"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
        async with raw_upstream(answering(reply)) as upstream:
            response = await client.send("POST", upstream.url, {"authorization": "Bearer k"}, b"{}", QUICK)
            assert (response.status, await response.read()) == (307, b"")
            response.close()
            assert len(upstream.peers) == 1

    async def test_proxies_of_the_environment_are_not_used(
        self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        async with raw_upstream(answering(OK)) as upstream:
            assert await call(client, upstream.url) == b"ok"

    @pytest.mark.parametrize(
        ("method", "url", "headers"),
        [
            ("POST", "http://127.0.0.1:{port}/", {"a": "b\r\nx: y"}),
            ("POST", "http://127.0.0.1:{port}/a b", {}),
            ("POST / HTTP/1.1\r\nx:", "http://127.0.0.1:{port}/", {}),
            ("POST", "http://key:secret@127.0.0.1:{port}/", {}),
            ("POST", "ftp://127.0.0.1:{port}/", {}),
        ],
    )
    async def test_what_cannot_be_sent_is_not(
        self, client: HTTPTransport, method: str, url: str, headers: dict[str, str]
    ) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            with pytest.raises(UpstreamError) as caught:
                await client.send(method, url.format(port=upstream.port), headers, b"{}", QUICK)
            assert upstream.peers == []
        assert "secret" not in f"{caught.value.message} {caught.value.log}"


class TestUnreachable:
    async def test_refused(self, client: HTTPTransport) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(UpstreamUnreachable) as caught:
                await call(client, f"http://127.0.0.1:{unused.getsockname()[1]}/")
        assert caught.value.message == "The upstream could not be reached."
        assert "ConnectionRefusedError" in (caught.value.log or "")

    async def test_a_name_that_does_not_exist(self, client: HTTPTransport) -> None:
        with pytest.raises(UpstreamUnreachable, match="could not be reached"):
            await call(client, "http://no-such-host.invalid/")

    async def test_a_name_that_cannot_exist(self, client: HTTPTransport) -> None:
        with pytest.raises(UpstreamError):
            await call(client, f"http://{'a' * 70}.invalid/")

    async def test_connecting_takes_too_long(self, client: HTTPTransport) -> None:
        with deaf() as port, pytest.raises(UpstreamUnreachable) as caught:
            await call(client, f"http://127.0.0.1:{port}/", limits=Timeouts(connect=0.1))
        assert "TimeoutError" in (caught.value.log or "")

    async def test_the_limit_in_total_ends_connecting_too(self, client: HTTPTransport) -> None:
        with deaf() as port, pytest.raises(UpstreamUnreachable):
            await call(client, f"http://127.0.0.1:{port}/", limits=Timeouts(connect=None, total=0.1))

    async def test_cancelled_while_it_connects(self, client: HTTPTransport) -> None:
        with deaf() as port:
            task = asyncio.create_task(call(client, f"http://127.0.0.1:{port}/"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError, match=UNSENT):
                await task
            assert task.cancelled()


class TestCancelled:
    async def test_once_the_request_has_left_it_is_a_cancellation(self, client: HTTPTransport) -> None:
        came, left = asyncio.Event(), asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            came.set()
            await peer.gone()
            left.set()

        async with raw_upstream(script) as upstream:
            task = asyncio.create_task(call(client, upstream.url))
            await came.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await left.wait()

    async def test_a_cancelled_read_loses_nothing(self, client: HTTPTransport) -> None:
        more = asyncio.Event()

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK[:-1])
            await more.wait()
            peer.send(OK[-1:])
            await peer.gone()

        async with raw_upstream(script) as upstream:
            response = await client.send("POST", upstream.url, {}, b"{}", QUICK)
            assert await response.read() == b"o"
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await response.read()
            more.set()
            assert await whole(response) == b"k"


class TestHungUp:
    """The upstream closes a connection that we might use again."""

    async def test_noticed_before_the_next_call(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url) == b"ok"
            await assert_no_socket(client)
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 2

    async def test_noticed_by_asking_the_kernel(self, client: HTTPTransport) -> None:
        """The end of the connection is there, but the loop has not told it yet."""
        async with raw_upstream(answering(OK, OK)) as upstream:
            assert await call(client, upstream.url) == b"ok"
            _hang_up_behind_the_loop(upstream.peers[0])
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 2

    async def test_a_get_is_sent_again_once(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            if peer.number == 0:
                peer.send(OK)
                await peer.request()
            elif peer.number == 1:
                peer.send(OK)
                await peer.gone()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url, None) == b"ok"
            assert await call(client, upstream.url, None) == b"ok"
            assert len(upstream.peers) == 2

    async def test_a_get_is_not_sent_a_third_time(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            if peer.number == 0:
                peer.send(OK)
                await peer.request()

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url, None) == b"ok"
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url, None)
            assert len(upstream.peers) == 2

    @pytest.mark.parametrize("first", [True, False])
    async def test_a_post_is_never_sent_again(self, client: HTTPTransport, first: bool) -> None:
        async def script(peer: Peer) -> None:
            if not first:
                await peer.request()
                peer.send(OK)
            await peer.request()

        async with raw_upstream(script) as upstream:
            if not first:
                assert await call(client, upstream.url) == b"ok"
            with pytest.raises(UpstreamError, match="broke") as caught:
                await call(client, upstream.url)
            assert not isinstance(caught.value, UpstreamUnreachable)
            assert len(upstream.peers) == 1

    async def test_a_get_whose_reply_had_begun_is_not_sent_again(self, client: HTTPTransport) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.request()
            peer.send(b"HTTP/1.1 2")

        async with raw_upstream(script) as upstream:
            assert await call(client, upstream.url, None) == b"ok"
            with pytest.raises(UpstreamError, match="broke"):
                await call(client, upstream.url, None)
            assert len(upstream.peers) == 1

    async def test_a_get_that_was_too_slow_is_not_sent_again(self, client: HTTPTransport) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            assert await call(client, upstream.url, None) == b"ok"
            with pytest.raises(UpstreamTimeout):
                await call(client, upstream.url, None, Timeouts(first_byte=0.05))
            assert len(upstream.peers) == 1


class TestClosing:
    async def test_idle_connections_close_and_running_calls_end(self) -> None:
        client = HTTPTransport()
        async with raw_upstream(answering(OK)) as upstream:
            await asyncio.gather(*(call(client, upstream.url) for _ in range(3)))
            calls = [asyncio.create_task(call(client, upstream.url)) for _ in range(2)]
            await asyncio.sleep(0.05)
            (pool,) = client.pools.values()
            assert (pool.leases, len(pool.idle)) == (2, 1)
            await client.aclose()
            for ended in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(ended, UpstreamError)
        await assert_whole(client)
        assert not any(pool.sockets for pool in client.pools.values())

    async def test_calls_that_wait_for_a_connection_end_as_never_sent(self) -> None:
        client = HTTPTransport(max_connections_per_origin=1)
        async with raw_upstream(answering()) as upstream:
            running = asyncio.create_task(call(client, upstream.url))
            while not upstream.peers:
                await asyncio.sleep(0.005)
            waiting = asyncio.create_task(call(client, upstream.url))
            await asyncio.sleep(0.01)
            await client.aclose()
            with pytest.raises(NeverSent):
                await waiting
            with pytest.raises(UpstreamError):
                await running

    async def test_calls_while_it_connects_and_afterwards(self) -> None:
        client = HTTPTransport()
        async with raw_upstream(answering(OK)) as upstream:
            task = asyncio.create_task(call(client, upstream.url))
            await asyncio.sleep(0)
            await client.aclose()
            with pytest.raises(UpstreamError):
                await task
            with pytest.raises(UpstreamUnreachable):
                await call(client, upstream.url)
        assert not any(pool.sockets for pool in client.pools.values())

    async def test_again_and_without_use(self) -> None:
        client = HTTPTransport()
        await client.aclose()
        await client.aclose()


async def assert_no_socket(client: HTTPTransport) -> None:
    while any(pool.sockets for pool in client.pools.values()):
        await asyncio.sleep(0.005)


def _hang_up_behind_the_loop(peer: Peer) -> None:
    """The end of file is in the client's socket when this returns, and no loop has run since."""
    sock = socket.socket(fileno=peer.writer.get_extra_info("socket").fileno())
    sock.shutdown(socket.SHUT_WR)
    sock.detach()
