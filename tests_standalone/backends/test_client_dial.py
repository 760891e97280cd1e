"""New connections: names, addresses in order, and TLS with certificates made for the test."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.backends import client_dial
from gateway.backends.client import HTTPTransport
from gateway.backends.transport import Access, Timeouts
from gateway.errors import NeverSent, UpstreamError, UpstreamUnreachable
from tests_standalone.backends.certificates import Certificates
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


class Lookups:
    """What the name service of the loop answers, and how often it was asked."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.asked = 0

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked += 1
        await asyncio.sleep(0.01)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


def lookups(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> Lookups:
    found = Lookups(*addresses)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found.getaddrinfo)
    return found


class TestNames:
    async def test_asked_once_for_all_who_wait_and_kept(
        self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = lookups(monkeypatch, "127.0.0.1")
        async with raw_upstream(answering(*[OK] * 9)) as upstream:
            url = f"http://upstream.test:{upstream.port}/"
            assert await asyncio.gather(*(call(client, url) for _ in range(9))) == [b"ok"] * 9
            assert await asyncio.gather(*(call(client, url) for _ in range(12))) == [b"ok"] * 12
            assert (names.asked, len(upstream.peers)) == (1, 12)
            assert upstream.peers[0].head.startswith(f"POST / HTTP/1.1\r\nhost: upstream.test:{upstream.port}".encode())

    async def test_kept_for_a_while_only(self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client_dial, "KNOWN_SECONDS", -1)
        names = lookups(monkeypatch, "127.0.0.1")
        async with raw_upstream(answering(b"HTTP/1.1 204 No\r\nconnection: close\r\n\r\n")) as upstream:
            for _ in range(3):
                await call(client, f"http://upstream.test:{upstream.port}/")
            assert names.asked == 3

    async def test_a_failure_is_kept_shortly(self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client_dial, "FAILED_SECONDS", 0.1)
        names = lookups(monkeypatch)
        async with raw_upstream(answering(OK)) as upstream:
            url = f"http://upstream.test:{upstream.port}/"
            for _ in range(2):
                with pytest.raises(UpstreamUnreachable) as caught:
                    await call(client, url)
                assert "gaierror" in (caught.value.log or "")
            assert names.asked == 1
            names.addresses = ["127.0.0.1"]
            await asyncio.sleep(0.15)
            assert await call(client, url) == b"ok"

    async def test_a_look_up_that_hangs(self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        async def hang(*_: Any, **__: Any) -> list[Any]:
            await asyncio.sleep(3600)
            return []

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
        with pytest.raises(UpstreamUnreachable):
            await call(client, "http://upstream.test/", limits=Timeouts(connect=0.05))

    async def test_who_waits_for_a_look_up_when_the_client_closes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        client = HTTPTransport()
        lookups(monkeypatch, "127.0.0.1")
        task = asyncio.create_task(call(client, "http://upstream.test/"))
        await asyncio.sleep(0.001)
        await client.aclose()
        with pytest.raises(NeverSent):
            await task


class TestAddresses:
    async def test_tried_in_order_and_the_good_one_first_next_time(
        self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = lookups(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1")
        async with raw_upstream(answering(OK, OK)) as upstream:
            assert await call(client, f"http://upstream.test:{upstream.port}/") == b"ok"
            with deaf("127.0.0.2", upstream.port):
                limits = Timeouts(connect=None, first_byte=10)
                calls = (call(client, f"http://upstream.test:{upstream.port}/", limits=limits) for _ in range(2))
                assert await asyncio.gather(*calls) == [b"ok"] * 2
            assert (names.asked, len(upstream.peers)) == (1, 2)

    async def test_one_that_hangs_does_not_use_up_the_time_of_the_others(
        self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lookups(monkeypatch, "127.0.0.2", "127.0.0.1")
        async with raw_upstream(answering(OK)) as upstream:
            with deaf("127.0.0.2", upstream.port):
                limits = Timeouts(connect=0.4)
                assert await call(client, f"http://upstream.test:{upstream.port}/", limits=limits) == b"ok"

    async def test_all_refuse(self, client: HTTPTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        names = lookups(monkeypatch, "127.0.0.2", "127.0.0.3")
        for _ in range(2):
            with pytest.raises(UpstreamUnreachable) as caught:
                await call(client, "http://upstream.test:1/")
            assert "127.0.0.2: ConnectionRefusedError" in (caught.value.log or "")
            assert "127.0.0.3: ConnectionRefusedError" in (caught.value.log or "")
        assert names.asked == 2

    async def test_version_6(self, client: HTTPTransport) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            assert f"host: [::1]:{port}\r\n".encode() in head
            writer.write(OK)
            await reader.read()
            writer.close()

        try:
            server = await asyncio.start_server(serve, "::1", 0)
        except OSError:
            with pytest.raises(UpstreamUnreachable):  # this machine has none
                await call(client, "http://[::1]:1/")
            return
        port = server.sockets[0].getsockname()[1]
        assert await call(client, f"http://[::1]:{port}/") == b"ok"
        await client.aclose()
        server.close()


class TestTLS:
    async def test_own_authority_name_and_protocol(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))
        context = certificates.context(certificates.server)
        asked: list[str | None] = []
        context.sni_callback = lambda _, name, __: asked.append(name)
        spoken = []

        async def script(peer: Peer) -> None:
            spoken.append(peer.writer.get_extra_info("ssl_object").selected_alpn_protocol())
            await answering(OK, OK)(peer)

        async with raw_upstream(script, tls=context) as upstream:
            for _ in range(2):
                assert await call(client, f"https://localhost:{upstream.port}/") == b"ok"
            assert await call(client, upstream.url) == b"ok"
            assert (asked[0], spoken) == ("localhost", ["http/1.1"] * 2)
            assert len(upstream.peers) == 2
            await client.aclose()

    @pytest.mark.parametrize("wrong", ["authority", "name"])
    async def test_a_certificate_that_proves_nothing(self, certificates: Certificates, wrong: str) -> None:
        client = HTTPTransport(Access(None if wrong == "authority" else certificates.ca))
        pair = certificates.elsewhere if wrong == "name" else certificates.server
        received = []

        async def script(peer: Peer) -> None:
            received.append(await peer.gone())

        async with raw_upstream(script, tls=certificates.context(pair)) as upstream:
            with pytest.raises(UpstreamUnreachable, match="could not be reached") as caught:
                await call(client, upstream.url)
            assert "CERTIFICATE_VERIFY_FAILED" in (caught.value.log or "")
            await client.aclose()
        assert not any(received)

    async def test_a_certificate_of_the_clients(self, certificates: Certificates) -> None:
        with_one = HTTPTransport(Access(certificates.ca, *certificates.client))
        without = HTTPTransport(Access(certificates.ca))
        context = certificates.context(certificates.server, ask=True)
        async with raw_upstream(answering(OK), tls=context) as upstream:
            assert await call(with_one, upstream.url) == b"ok"
            with pytest.raises(UpstreamError):
                await call(without, upstream.url)
            await with_one.aclose()
            await without.aclose()

    @pytest.mark.parametrize("name", ["missing.pem", "empty.pem"])
    async def test_files_that_cannot_be_used(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty.pem").touch()
        with pytest.raises(OSError, match=r"No such file|no certificate|PEM|X509"):
            HTTPTransport(Access(str(tmp_path / name)))

    async def test_an_upstream_that_speaks_no_tls(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))

        async def script(peer: Peer) -> None:
            await peer.reader.read(1)
            peer.send(b"HTTP/1.1 400 Bad\r\n\r\n")

        async with raw_upstream(script) as upstream:
            with pytest.raises(UpstreamUnreachable):
                await call(client, upstream.url.replace("http:", "https:"))
            await client.aclose()

    async def test_a_handshake_that_hangs(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))
        async with raw_upstream(answering()) as upstream:
            with pytest.raises(UpstreamUnreachable):
                await call(client, upstream.url.replace("http:", "https:"), limits=Timeouts(connect=0.1))
            await client.aclose()

    async def test_much_both_ways(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))
        size = 8 << 20

        async def script(peer: Peer) -> None:
            for _ in range(2):
                await peer.request()
                peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(peer.body) + peer.body)
                await peer.drained()
            await peer.gone()

        async with raw_upstream(script, tls=certificates.context(certificates.server)) as upstream:
            for _ in range(2):
                response = await client.send("POST", upstream.url, {}, b"x" * size, QUICK)
                await asyncio.sleep(0.1)
                pieces = [await response.read()]
                assert len(pieces[0]) < 2 << 20
                assert await whole(response) == b"x" * (size - len(pieces[0]))
            assert len(upstream.peers) == 1
            await assert_whole(client)
            await client.aclose()

    async def test_an_upstream_that_says_goodbye(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)

        async with raw_upstream(script, tls=certificates.context(certificates.server)) as upstream:
            assert await call(client, upstream.url) == b"ok"
            while any(pool.sockets for pool in client.pools.values()):
                await asyncio.sleep(0.005)
            assert await call(client, upstream.url) == b"ok"
            assert len(upstream.peers) == 2
            await client.aclose()

    async def test_closing_does_not_wait_for_an_upstream_that_says_nothing(self, certificates: Certificates) -> None:
        client = HTTPTransport(Access(certificates.ca))

        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(OK)
            await peer.drained()
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is one that reads
            await asyncio.sleep(3600)

        async with raw_upstream(script, tls=certificates.context(certificates.server)) as upstream:
            assert await call(client, upstream.url) == b"ok"
            await client.aclose()
            await asyncio.sleep(0)
            assert not any(pool.sockets for pool in client.pools.values())

    @pytest.mark.parametrize("most", [2, 1000])
    async def test_a_storm_of_cancellations(self, certificates: Certificates, most: int) -> None:
        client = HTTPTransport(Access(certificates.ca), max_connections_per_origin=most)
        async with raw_upstream(answering(OK, OK), tls=certificates.context(certificates.server)) as upstream:
            for delay in range(40):
                tasks = [asyncio.create_task(call(client, upstream.url)) for _ in range(4)]
                await asyncio.sleep(delay * 0.0005)
                for _ in range(2):
                    for task in tasks:
                        task.cancel()
                    await asyncio.sleep(0)
                for ended in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(ended, (UpstreamError, asyncio.CancelledError)) or ended == b"ok"
            await assert_whole(client)
            await client.aclose()
        gc.collect()
