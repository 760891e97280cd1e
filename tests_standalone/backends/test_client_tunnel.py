"""Through a proxy: what it is asked, what its refusals become, and that all rules of the client hold behind it."""

from __future__ import annotations

import asyncio
import gc
from base64 import b64encode

import pytest

from gateway.backends.client import HTTPTransport
from gateway.backends.client_request import Origin
from gateway.backends.client_tunnel import MAX_ANSWER, Proxy, proxy_of
from gateway.backends.transport import Access, Timeouts
from gateway.errors import UNSENT, UpstreamError, UpstreamUnreachable
from tests_standalone.backends.certificates import Certificates
from tests_standalone.backends.raw_proxy import ESTABLISHED, raw_proxy
from tests_standalone.backends.raw_upstream import (
    OK,
    QUICK,
    Peer,
    answering,
    assert_whole,
    call,
    raw_upstream,
    whole,
)

PLACE = "llm.example.test"


async def closed(client: HTTPTransport) -> None:
    await assert_whole(client)
    await client.aclose()
    gc.collect()


class Saying:
    """A proxy that answers so, and then hangs up or stays. `left`: its client has hung up, too."""

    def __init__(self, answer: bytes, *, stays: bool = True) -> None:
        self._answer = answer
        self._stays = stays
        self.left = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.request_head()
        peer.send(self._answer)
        if self._stays:
            await peer.gone()
            self.left.set()


class TestAddress:
    def test_with_and_without_credentials(self) -> None:
        assert proxy_of("http://proxy.example:3128") == Proxy("proxy.example", 3128, None)
        assert proxy_of("http://PROXY.example:3128/") == Proxy("proxy.example", 3128, None)
        secret = b64encode(b"ann:p@ss:w\xc3\xb6rd/").decode()
        assert proxy_of("http://ann:p%40ss:w%C3%B6rd%2F@[::1]:80") == Proxy("::1", 80, f"Basic {secret}")
        assert proxy_of("http://ann@h:1").credentials == f"Basic {b64encode(b'ann:').decode()}"

    @pytest.mark.parametrize(
        "url", ["http://proxy", "https://proxy:1", "socks5://proxy:1", "http://proxy:1/path", "http://:1", "proxy:1"]
    )
    def test_what_is_none(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"proxy|host"):
            proxy_of(url)

    def test_it_is_shown_without_credentials(self) -> None:
        proxy = proxy_of("http://ann:secret@[::1]:3128")
        assert str(proxy) == "proxy [::1]:3128"
        assert "Basic" not in repr(proxy)
        assert "secret" not in repr(Access(proxy="http://ann:secret@h:1"))

    @pytest.mark.parametrize(
        ("host", "through"),
        [
            ("localhost", False), ("localhost.", False), ("a.localhost", False), ("127.0.0.1", False),
            ("127.9.9.9", False), ("::1", False), ("::ffff:127.0.0.1", False), ("0.0.0.0", False), ("::", False),
            ("10.0.0.1", True), ("::2", True), ("api.openai.com", True), ("localhost.example", True),
            ("notlocalhost", True), ("127.0.0.1.example", True),
        ],
    )  # fmt: skip
    def test_upstreams_on_this_machine_are_not_its_business(self, host: str, through: bool) -> None:
        assert Proxy("h", 1).serves(Origin(False, host, 80)) is through

    def test_what_it_is_asked(self) -> None:
        asked = Proxy("h", 1, "Basic eA==").request(Origin(True, "::2", 443))
        assert asked == b"CONNECT [::2]:443 HTTP/1.1\r\nhost: [::2]:443\r\nproxy-authorization: Basic eA==\r\n\r\n"


class TestPlain:
    async def test_request_and_reply_and_the_connection_again(self) -> None:
        async with raw_upstream(answering(OK, OK)) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base))
            for _ in range(2):
                assert await call(client, f"http://{PLACE}:8080/v1/chat?q=1") == b"ok"
            asked = f"CONNECT {PLACE}:8080 HTTP/1.1\r\nhost: {PLACE}:8080\r\n\r\n"
            assert [peer.head for peer in proxy.peers] == [asked.encode()]
            assert upstream.peers[0].head == (
                f"POST /v1/chat?q=1 HTTP/1.1\r\nhost: {PLACE}:8080\r\ncontent-length: 2\r\n\r\n".encode()
            )
            await closed(client)

    async def test_its_password_goes_to_nobody_else(self) -> None:
        async with raw_upstream(answering(OK)) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base.replace("//", "//ann:s%3Acret@")))
            assert await call(client, f"http://{PLACE}/") == b"ok"
            who = b64encode(b"ann:s:cret")
            assert proxy.peers[0].head.endswith(b"\r\nproxy-authorization: Basic " + who + b"\r\n\r\n")
            assert b"authorization" not in upstream.peers[0].head
            await closed(client)

    async def test_an_upstream_on_this_machine_is_called_directly(self) -> None:
        async with raw_upstream(answering(OK)) as upstream:
            client = HTTPTransport(Access(proxy="http://127.0.0.1:1"))
            assert await call(client, upstream.url) == b"ok"
            assert await call(client, upstream.url.replace("127.0.0.1", "localhost")) == b"ok"
            await closed(client)

    @pytest.mark.parametrize("before", [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Wait\r\nx: y\r\n\r\n", b""])
    @pytest.mark.parametrize("line", [b"HTTP/1.0 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 201 Made\r\nx: 200"])
    async def test_good_answers(self, before: bytes, line: bytes) -> None:
        async with (
            raw_upstream(answering(OK)) as upstream,
            raw_proxy(upstream.port, before + line + b"\r\nvia: x\r\n\r\n") as proxy,
        ):
            client = HTTPTransport(Access(proxy=proxy.base))
            assert await call(client, f"http://{PLACE}/") == b"ok"
            await closed(client)


class TestRefused:
    ANSWERS = {
        "wants credentials": (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 4\r\n\r\nno!!",
            "CONNECT was refused: 407 Proxy Authentication Required",
        ),
        "forbids": (b"HTTP/1.1 403 Forbidden\r\n\r\n", "CONNECT was refused: 403 Forbidden"),
        "cannot reach it": (b"HTTP/1.1 503\r\n\r\n", "CONNECT was refused: 503"),
        "redirects": (b"HTTP/1.1 302 Go\r\nlocation: http://evil/\r\n\r\n", "CONNECT was refused: 302 Go"),
        "in colours": (b"HTTP/1.1 500 a\x1b[31m\xe9\r\n\r\n", "CONNECT was refused: 500 a?[31m?"),
        "speaks something else": (b"SSH-2.0-OpenSSH\r\n\r\n", "it speaks no HTTP"),
        "has no status": (b"HTTP/1.1 OK\r\n\r\n", "it speaks no HTTP"),
        "hangs up": (b"", "it hung up"),
        "hangs up in its answer": (b"HTTP/1.1 200 OK\r\n", "it hung up"),
        "never ends": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * MAX_ANSWER, "its answer is too large"),
        "goes on": (ESTABLISHED + b"SSH-2.0-OpenSSH\r\n", "bytes that nobody asked for"),
    }  # fmt: skip

    @pytest.mark.parametrize(("answer", "said"), ANSWERS.values(), ids=ANSWERS)
    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_is_an_upstream_that_cannot_be_reached(self, answer: bytes, said: str, scheme: str) -> None:
        script = Saying(answer, stays=said != "it hung up")
        async with raw_upstream(script) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base.replace("//", "//ann:secret@")))
            with pytest.raises(UpstreamUnreachable, match="could not be reached") as caught:
                await call(client, f"{scheme}://{PLACE}/")
            log = caught.value.log or ""
            assert f"proxy 127.0.0.1:{proxy.port}" in log
            assert said in log or (scheme == "https" and answer.startswith(ESTABLISHED))
            assert not any(word in log + caught.value.message for word in ("secret", "Basic", "ann"))
            await closed(client)
            if said != "it hung up":
                await script.left.wait()

    async def test_a_proxy_that_is_not_there(self) -> None:
        client = HTTPTransport(Access(proxy="http://127.0.0.1:1"))
        with pytest.raises(UpstreamUnreachable) as caught:
            await call(client, f"https://{PLACE}/")
        assert "proxy 127.0.0.1:1" in (caught.value.log or "")
        assert "ConnectionRefusedError" in (caught.value.log or "")
        await closed(client)

    async def test_a_reset(self) -> None:
        async def script(peer: Peer) -> None:
            await peer.request_head()
            peer.reset()

        async with raw_upstream(script) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base))
            with pytest.raises(UpstreamUnreachable, match="could not be reached"):
                await call(client, f"http://{PLACE}/")
            await closed(client)

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", ESTABLISHED])
    @pytest.mark.parametrize("limits", [Timeouts(connect=0.1), Timeouts(connect=None, total=0.1)])
    async def test_one_that_hangs_is_left_when_the_time_for_connecting_is_up(
        self, answer: bytes, limits: Timeouts
    ) -> None:
        """After a good answer it is the handshake that hangs."""
        script = Saying(answer)
        async with raw_upstream(script) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base))
            with pytest.raises(UpstreamUnreachable) as caught:
                await call(client, f"https://{PLACE}/", limits=limits)
            assert f"proxy 127.0.0.1:{proxy.port}" in (caught.value.log or "")
            assert "TimeoutError" in (caught.value.log or "")
            await script.left.wait()
            await closed(client)

    async def test_cancelled_while_it_is_asked(self) -> None:
        script = Saying(b"")
        async with raw_upstream(script) as proxy:
            client = HTTPTransport(Access(proxy=proxy.base))
            task = asyncio.create_task(call(client, f"http://{PLACE}/"))
            while not (proxy.peers and proxy.peers[0].head):
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError, match=UNSENT):
                await task
            await script.left.wait()
            await closed(client)


class TestTLS:
    async def test_with_the_upstream_by_its_own_name(self, certificates: Certificates) -> None:
        """The proxy sees a name and a port, then bytes that it cannot read."""
        seen: list[str | None] = []
        context = certificates.context(certificates.elsewhere)
        context.sni_callback = lambda _, name, __: seen.append(name)
        async with raw_upstream(answering(OK, OK), tls=context) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(certificates.ca, proxy=proxy.base))
            for _ in range(2):
                assert await call(client, "https://elsewhere.test/v1", b"prompt") == b"ok"
            assert seen == ["elsewhere.test"]
            assert [peer.head.partition(b"\r\n")[0] for peer in proxy.peers] == [b"CONNECT elsewhere.test:443 HTTP/1.1"]
            assert upstream.peers[0].head.startswith(b"POST /v1 HTTP/1.1\r\nhost: elsewhere.test\r\n")
            await closed(client)

    async def test_certificates_are_checked_behind_it(self, certificates: Certificates) -> None:
        context = certificates.context(certificates.server)
        async with raw_upstream(answering(OK), tls=context) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(certificates.ca, proxy=proxy.base))
            with pytest.raises(UpstreamUnreachable) as caught:
                await call(client, "https://elsewhere.test/v1")
            assert "CERTIFICATE_VERIFY_FAILED" in (caught.value.log or "")
            await closed(client)

    async def test_a_certificate_of_ours(self, certificates: Certificates) -> None:
        context = certificates.context(certificates.elsewhere, ask=True)
        async with raw_upstream(answering(OK), tls=context) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(certificates.ca, *certificates.client, proxy=proxy.base))
            assert await call(client, "https://elsewhere.test/v1") == b"ok"
            await closed(client)

    async def test_much_both_ways(self, certificates: Certificates) -> None:
        size = 4 << 20

        async def script(peer: Peer) -> None:
            for _ in range(2):
                await peer.request()
                peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(peer.body) + peer.body)
                await peer.drained()
            await peer.gone()

        context = certificates.context(certificates.elsewhere)
        async with raw_upstream(script, tls=context) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(certificates.ca, proxy=proxy.base))
            for _ in range(2):
                response = await client.send("POST", "https://elsewhere.test/", {}, b"x" * size, QUICK)
                await asyncio.sleep(0.1)
                pieces = [await response.read()]
                assert len(pieces[0]) < 2 << 20, "who does not read pauses the upstream"
                assert await whole(response) == b"x" * (size - len(pieces[0]))
            assert len(upstream.peers) == len(proxy.peers) == 1
            await closed(client)

    async def test_an_upstream_that_hangs_up_is_seen(self, certificates: Certificates) -> None:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)

        context = certificates.context(certificates.elsewhere)
        async with raw_upstream(script, tls=context) as upstream, raw_proxy(upstream.port) as proxy:
            client = HTTPTransport(Access(certificates.ca, proxy=proxy.base))
            assert await call(client, "https://elsewhere.test/") == b"ok"
            while any(pool.sockets for pool in client.pools.values()):
                await asyncio.sleep(0.005)
            assert await call(client, "https://elsewhere.test/") == b"ok"
            assert len(proxy.peers) == 2
            await closed(client)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("most", [2, 1000])
async def test_a_storm_of_cancellations(certificates: Certificates, scheme: str, most: int) -> None:
    context = certificates.context(certificates.elsewhere) if scheme == "https" else None
    async with raw_upstream(answering(*[OK] * 999), tls=context) as upstream, raw_proxy(upstream.port) as proxy:
        client = HTTPTransport(Access(certificates.ca, proxy=proxy.base), max_connections_per_origin=most)
        for delay in range(40):
            tasks = [asyncio.create_task(call(client, f"{scheme}://elsewhere.test/")) for _ in range(4)]
            await asyncio.sleep(delay * 0.0005)
            for _ in range(2):
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(ended, (UpstreamError, asyncio.CancelledError)) or ended == b"ok"
        await assert_whole(client)
        assert await call(client, f"{scheme}://elsewhere.test/") == b"ok"
        await closed(client)


async def test_no_limit_at_all() -> None:
    async with raw_upstream(answering(OK)) as upstream, raw_proxy(upstream.port) as proxy:
        client = HTTPTransport(Access(proxy=proxy.base))
        assert await call(client, f"http://{PLACE}/", limits=Timeouts(None, None, None, None)) == b"ok"
        await closed(client)
